"""The browser's microphone, for notebooks in the cloud: the page records and queues, Python fetches what has come.

The kernel of Google Colab has no audio device, but it can evaluate JavaScript in the output of the cell that runs.
There an AudioWorklet queues blocks of samples, and each call of `take()` answers with all that waits as 16-bit PCM. The
page asks for 16 kHz, a third of what a device delivers, because it all travels through the notebook's connection.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import time
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.microphone import MAX_QUEUED_SEC, PATIENCE_SEC, check_duration
from src.inference.protocol import read_samples
from src.utils.errors import AudioError, MissingDependencyError

logger = logging.getLogger(__name__)

EvalJs = Callable[[str], Any]

BLOCK_FRAMES = 2_048  # a power of 2, as a ScriptProcessor wants it: 0.13 s at 16 kHz
TAKE_SEC = 5.0  # of audio in one answer at most; more would be one message of megabytes after a pause in reading
TAKE_WAIT_SEC = 1.0  # the page waits so long for a first block before it answers with none
ABANDONED_SEC = 120.0  # without a reader: the kernel has died, and the page lets go of the microphone
ANSWER_SEC = 10.0  # without an answer to a script the page is gone
ASK_SEC = 60.0  # for a person to allow the microphone, or to click

_FIXES: Mapping[str, str] = MappingProxyType(  # names of DOMException, as getUserMedia raises them
    {
        "NotAllowedError": "allow it for this page (the icon beside the address), and run the cell again",
        "NotFoundError": "plug a microphone in, and run the cell again",
        "NotReadableError": "close the program that holds it, and run the cell again",
        "SecurityError": "open the notebook over https",
    }
)
_ENDINGS: Mapping[str, str] = MappingProxyType(
    {
        "ended": "the browser's microphone was unplugged, or its permission withdrawn; run the cell again",
        "abandoned": "the page closed the browser's microphone, because nothing was read from it for "
        f"{ABANDONED_SEC:.0f} s; use a faster model or machine",
        "gone": "the page with the microphone was closed or loaded again; keep it open, and run the cell again",
    }
)
_PATIENCE: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "asking": (ASK_SEC, "nobody answered the browser's question whether this page may use the microphone"),
        "paused": (ASK_SEC, "the browser wants a click before it records, and nobody clicked 'Start recording'"),
        "recording": (PATIENCE_SEC, "the browser's microphone delivers nothing; is it muted?"),
    }
)

# States: asking (for permission), paused (until a click, where the browser wants one), recording; then stopped (by the
# button), ended, abandoned or failed.
_OPEN = """
((options) => {
  "use strict";
  const { rate, blockFrames, queueSec, takeSec, waitMs, abandonedMs } = options;
  const WORKLET = `
    registerProcessor("blocks", class extends AudioWorkletProcessor {
      constructor({ processorOptions }) {
        super();
        this.frames = processorOptions.frames;
        this.filled = 0;
        this.block = new Float32Array(this.frames);
      }
      process([[samples]]) {
        if (!samples) return true; // no audio yet
        this.block.set(samples, this.filled);
        this.filled += samples.length;
        if (this.filled === this.frames) {
          this.port.postMessage(this.block); // a copy
          this.filled = 0;
        }
        return true;
      }
    });`;
  const queue = [];
  const button = document.createElement("button");
  const microphone = { state: "asking", error: null, lost: 0 };
  let source = null, queued = 0, wake = () => {}, takenAt = performance.now();

  const isLive = () => ["asking", "paused", "recording"].includes(microphone.state);

  const release = (stream) => stream.getTracks().forEach((track) => track.stop());

  const end = (state, error = null) => {
    if (!isLive()) return;
    Object.assign(microphone, { state, error });
    if (source) {
      release(source.mediaStream);
      source.context.close();
    }
    button.remove();
    wake();
  };

  const push = (samples) => {
    if (microphone.state !== "recording") return;
    if (performance.now() - takenAt > abandonedMs) {
      end("abandoned");
    } else if (queued + samples.length > queueSec * source.context.sampleRate) {
      microphone.lost += 1;
    } else {
      queue.push(samples);
      queued += samples.length;
    }
    wake();
  };

  const openSource = (stream) => {
    let refusal = null;
    for (const wish of [{ sampleRate: rate }, {}]) { // Firefox takes a device at its own rate only
      const context = new AudioContext(wish);
      try {
        return context.createMediaStreamSource(stream);
      } catch (error) {
        refusal = error;
        context.close();
      }
    }
    throw refusal;
  };

  const makeListener = async (context) => {
    const mono = { channelCount: 1, channelCountMode: "explicit" };
    try {
      const module = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
      await context.audioWorklet.addModule(module);
      const node = new AudioWorkletNode(context, "blocks", { ...mono, processorOptions: { frames: blockFrames } });
      node.port.onmessage = ({ data }) => push(data);
      return node;
    } catch { // an old browser, or a page that forbids modules of its own making
      const node = context.createScriptProcessor(blockFrames, 1, 1);
      node.onaudioprocess = ({ inputBuffer }) => push(inputBuffer.getChannelData(0).slice());
      return node;
    }
  };

  const show = (label, onclick) => {
    Object.assign(button, { textContent: label, onclick });
    document.body.append(button);
  };

  const open = async () => {
    if (!navigator.mediaDevices) throw new DOMException("this page may not use devices", "SecurityError");
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false }; // for calls; they cut words
    const stream = await navigator.mediaDevices.getUserMedia({ audio });
    if (!isLive()) return release(stream); // allowed too late
    source = openSource(stream);
    stream.getAudioTracks()[0].onended = () => end("ended");
    const listener = await makeListener(source.context);
    if (!isLive()) return;
    microphone.state = "paused";
    show("Start recording", () => source.context.resume());
    await source.context.resume(); // at once, unless the browser wants a click
    if (!isLive()) return;
    microphone.state = "recording";
    show("Stop recording", () => end("stopped"));
    source.connect(listener).connect(source.context.destination); // silence; what leads nowhere may not run
  };

  const toBase64 = (blocks, frames) => {
    const pcm = new Int16Array(frames);
    let at = 0;
    for (const block of blocks) {
      for (const sample of block) pcm[at++] = Math.max(-32768, Math.min(32767, Math.round(32768 * sample)));
    }
    return btoa(Array.from(new Uint8Array(pcm.buffer), (byte) => String.fromCharCode(byte)).join(""));
  };

  microphone.take = async () => {
    takenAt = performance.now();
    if (!queue.length && isLive()) {
      await new Promise((done) => {
        wake = done;
        setTimeout(done, waitMs);
      });
    }
    const blocks = [];
    let frames = 0;
    while (queue.length && frames < takeSec * source.context.sampleRate) {
      blocks.push(queue.shift());
      frames += blocks.at(-1).length;
    }
    queued -= frames;
    const { state, error, lost } = microphone;
    return { state, error, lost, rate: source ? source.context.sampleRate : rate, pcm: toBase64(blocks, frames) };
  };
  microphone.close = () => end("closed");

  window.whisperMicrophone?.close();
  window.whisperMicrophone = microphone;
  open().catch(({ name, message }) => end("failed", { name, message }));
  return true;
})"""
_TAKE = """window.whisperMicrophone ? window.whisperMicrophone.take() : { state: "gone" }"""
_CLOSE = """window.whisperMicrophone?.close(), true"""


class BrowserMicrophone:
    """Records for a given time from the microphone of the browser that shows the notebook.

    A button in the cell's output ends it earlier.

    Args:
        duration_sec: how much audio to record.
        eval_js: evaluates JavaScript in the page and returns its value, that of a promise once it is settled; raises
            `AudioError` where the page does not answer.
        clock: seconds, monotone.

    Attributes:
        sample_rate: of the blocks, Hz: 16,000, except in browsers that do not resample; final at the first block.
        overruns: blocks that were lost because nobody fetched them in time.
    Raises: ConfigError: a duration that is not positive.
    """

    def __init__(
        self, duration_sec: float, *, eval_js: EvalJs | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_duration(duration_sec)
        self._duration_sec, self._clock = duration_sec, clock
        self._eval_js = eval_js or eval_in_colab
        self.sample_rate, self.overruns = SAMPLE_RATE, 0

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks until `duration_sec` of audio has come, or the button is clicked.

        Raises: AudioError: the browser has no microphone or may not use it, the microphone or the page goes away, or
            nothing comes: for 5 s while it records, for 60 s while a person is asked.
        """
        self._eval_js(f"{_OPEN}({json.dumps(_page_options())})")
        try:
            yield from self._recorded()
        finally:
            with contextlib.suppress(AudioError):  # a page that is gone holds no microphone
                self._eval_js(_CLOSE)
        if self.overruns:
            logger.warning("%d blocks of microphone audio were lost: decoding is slower than speech", self.overruns)

    def _recorded(self) -> Generator[Waveform, None, None]:
        heard, last_state, since_sec = 0, "", self._clock()
        while heard < self._wanted_samples():
            state, samples = self._take()
            if len(samples):
                yield samples[: self._wanted_samples() - heard]
                heard += len(samples)
            elif state == "stopped":
                return
            elif state == last_state:
                patience_sec, complaint = _PATIENCE[state]
                if self._clock() - since_sec > patience_sec:
                    raise AudioError(f"{complaint} ({patience_sec:.0f} s); run the cell again")
                continue
            last_state, since_sec = state, self._clock()

    def _wanted_samples(self) -> int:
        return round(self._duration_sec * self.sample_rate)

    def _take(self) -> tuple[str, Waveform]:
        """Fetch the state and what waits; what was heard before an end comes before its error."""
        answer = self._eval_js(_TAKE)
        state = answer["state"]
        samples = read_samples(base64.b64decode(answer.get("pcm", "")), "s16le")
        if len(samples):
            self.sample_rate = round(answer["rate"])
        elif state == "failed":
            name, message = answer["error"]["name"], answer["error"]["message"]
            fix = _FIXES.get(name, "try another browser")
            raise AudioError(f"the browser gives no microphone ({name}: {message}); {fix}")
        elif state in _ENDINGS:
            raise AudioError(_ENDINGS[state])
        self.overruns = answer.get("lost", self.overruns)
        return state, samples


def eval_in_colab(script: str) -> Any:
    """Evaluate JavaScript in the output of the cell that runs.

    Raises: MissingDependencyError: not in Colab. AudioError: the script fails, or the page does not answer.
    """
    try:
        from google.colab import errors, output
    except ImportError as err:
        raise MissingDependencyError(
            "the browser's microphone can be reached in Google Colab only; elsewhere `Microphone` records"
        ) from err
    try:
        answer = output.eval_js(script, timeout_sec=ANSWER_SEC)
    except errors.Error as err:  # a MessageError
        raise AudioError(f"the notebook's page refused a script: {err}; load the page again") from err
    if answer is None:  # the scripts here all have a value
        raise AudioError(f"the notebook's page did not answer for {ANSWER_SEC:.0f} s; {_ENDINGS['gone']}")
    return answer


def _page_options() -> dict[str, float]:
    return {
        "rate": SAMPLE_RATE,
        "blockFrames": BLOCK_FRAMES,
        "queueSec": MAX_QUEUED_SEC,
        "takeSec": TAKE_SEC,
        "waitMs": 1000 * TAKE_WAIT_SEC,
        "abandonedMs": 1000 * ABANDONED_SEC,
    }
