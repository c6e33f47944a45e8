"""Microphones: of this machine, and of the browser that shows a notebook.

Both are iterators of blocks; the caller's thread does all the work. PortAudio's callback only queues them. A notebook
in the cloud has no audio device, but its kernel can evaluate JavaScript in the output of the running cell: there an
AudioWorklet queues samples, and each call of `take()` answers with what waits, as 16-bit PCM.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import queue
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.utils.errors import AudioError, ConfigError, MissingDependencyError
from src.utils.files import read_template

logger = logging.getLogger(__name__)

BLOCK_SEC = 0.1
MAX_QUEUED_SEC = 60.0  # a consumer this far behind loses audio, which is counted
PATIENCE_SEC = 5.0  # without a single block the device is dead
ABANDONED_SEC = 120.0  # without a reader: the kernel has died, and the page releases the microphone
ANSWER_SEC = 10.0  # without an answer to a script the page is gone
ASK_SEC = 60.0  # for a person to allow the microphone, or to click

_FIXES = {  # names of DOMException, as getUserMedia raises them
    "NotAllowedError": "allow it for this page (the icon next to the address), and run the cell again",
    "NotFoundError": "plug a microphone in, and run the cell again",
    "NotReadableError": "close the program that holds it, and run the cell again",
    "SecurityError": "open the notebook over https",
}
_ENDINGS = {
    "ended": "the browser's microphone was unplugged, or its permission withdrawn; run the cell again",
    "abandoned": "the page closed the browser's microphone, because nothing was read from it for "
    f"{ABANDONED_SEC:.0f} s; use a faster model or machine",
    "gone": "the page with the microphone was closed or loaded again; keep it open, and run the cell again",
}
_PATIENCE = {
    "asking": (ASK_SEC, "nobody answered the browser's question whether this page may use the microphone"),
    "paused": (ASK_SEC, "the browser wants a click before it records, and nobody clicked 'Start recording'"),
    "recording": (PATIENCE_SEC, "the browser's microphone delivers nothing; is it muted?"),
}
_TAKE = """window.whisperMicrophone ? window.whisperMicrophone.take() : { state: "gone" }"""
_CLOSE = """window.whisperMicrophone?.close(), true"""


def in_real_time(
    audio: Waveform, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Waveform]:
    """Yield a recording, (T,) float32 at 16 kHz, in blocks, each when a microphone would have recorded it."""
    began, block = clock(), round(BLOCK_SEC * SAMPLE_RATE)
    for at in range(0, len(audio), block):
        piece = audio[at : at + block]
        sleep(max(0.0, began + (at + len(piece)) / SAMPLE_RATE - clock()))
        yield piece


class _Recorder:
    """Records for a given time; `overruns` counts the blocks lost because the device or the reader was too slow."""

    sample_rate = SAMPLE_RATE

    def __init__(self, duration_sec: float) -> None:
        if duration_sec <= 0:
            raise ConfigError(f"duration_sec is {duration_sec}; give the seconds to record, above 0")
        self._duration_sec, self.overruns = duration_sec, 0

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks until the time is over; an AudioError says that no more can come."""
        yield from self._recorded()
        if self.overruns:
            lost = "%d blocks of microphone audio were lost: decoding is slower than speech"
            logger.warning(lost, self.overruns)

    def _recorded(self) -> Generator[Waveform, None, None]:
        raise NotImplementedError


class Microphone(_Recorder):
    """Records from the default input device, at its own sample rate.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is absent.
        AudioError: no usable input device.
        ConfigError: a duration that is not positive.
    """

    def __init__(self, duration_sec: float) -> None:
        super().__init__(duration_sec)
        try:
            import sounddevice  # type: ignore[import-not-found]
        except (ImportError, OSError) as err:  # OSError: the package is there, the PortAudio library is not
            raise MissingDependencyError(
                f"recording needs sounddevice and PortAudio ({err}): pip install sounddevice, and on Linux "
                "apt-get install libportaudio2. A machine in the cloud has no microphone: in Colab record from a "
                "cell of the notebook, elsewhere upload a file"
            ) from err
        self._device = sounddevice
        try:
            self.sample_rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        except (sounddevice.PortAudioError, ValueError) as err:
            raise AudioError(f"no usable microphone: {err}; python -m sounddevice lists the devices") from err
        self._blocks: queue.Queue[Waveform] = queue.Queue(maxsize=round(MAX_QUEUED_SEC / BLOCK_SEC))

    def _recorded(self) -> Generator[Waveform, None, None]:
        remaining = round(self._duration_sec * self.sample_rate)
        size = round(BLOCK_SEC * self.sample_rate)
        try:
            with self._device.InputStream(
                samplerate=self.sample_rate, channels=1, dtype="float32", blocksize=size, callback=self._enqueue
            ):
                while remaining > 0:
                    block = self._waiting()[:remaining]
                    remaining -= len(block)
                    yield block
        except self._device.PortAudioError as err:
            raise AudioError(f"the microphone failed: {err}; python -m sounddevice lists the devices") from err

    def _enqueue(self, indata: Any, frames: int, time: Any, status: Any) -> None:
        """Run on PortAudio's thread: no decoding, no waiting."""
        self.overruns += bool(status and status.input_overflow)
        try:
            self._blocks.put_nowait(np.array(indata[:, 0], dtype=np.float32))  # PortAudio reuses its memory
        except queue.Full:
            self.overruns += 1

    def _waiting(self) -> Waveform:
        """Return all that waits as one block."""
        try:
            blocks = [self._blocks.get(timeout=PATIENCE_SEC)]
        except queue.Empty as err:
            silent = f"the microphone delivered nothing for {PATIENCE_SEC:.0f} s; is it muted or unplugged?"
            raise AudioError(silent) from err
        while not self._blocks.empty():
            blocks.append(self._blocks.get_nowait())
        return np.concatenate(blocks)


class BrowserMicrophone(_Recorder):
    """Records from the microphone of the browser that shows the notebook; a button in the cell's output ends it sooner.

    Its `sample_rate` is 16 kHz, except in browsers that do not resample; it is final at the first block. `eval_js`
    evaluates JavaScript in the page and returns its value, that of a promise once it is settled, or raises `AudioError`
    where the page does not answer; by default it is Colab's.
    """

    def __init__(
        self,
        duration_sec: float,
        *,
        eval_js: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(duration_sec)
        self._eval_js, self._clock = eval_js or eval_in_colab, clock

    def _recorded(self) -> Generator[Waveform, None, None]:
        options = {"rate": SAMPLE_RATE, "queueSec": MAX_QUEUED_SEC, "abandonedSec": ABANDONED_SEC}
        body = "".join(read_template("src.inference", name) for name in ("audio_source.js", "browser_microphone.js"))
        self._eval_js(f'((options) => {{\n"use strict";\n{body}}})({json.dumps(options)})')
        heard, last_state, since_sec = 0, "", self._clock()
        try:
            while True:
                state, samples = self._take()
                if len(samples):
                    wanted = round(self._duration_sec * self.sample_rate) - heard
                    yield samples[:wanted]
                    heard += len(samples)
                    if len(samples) >= wanted:
                        return
                elif state == "stopped":
                    return
                elif state == last_state:
                    patience_sec, complaint = _PATIENCE[state]
                    if self._clock() - since_sec > patience_sec:
                        raise AudioError(f"{complaint} ({patience_sec:.0f} s); run the cell again")
                    continue
                last_state, since_sec = state, self._clock()
        finally:
            with contextlib.suppress(AudioError):  # a page that is gone holds no microphone
                self._eval_js(_CLOSE)

    def _take(self) -> tuple[str, Waveform]:
        """Fetch the state and the samples that wait; samples heard before an end come before its error."""
        answer = self._eval_js(_TAKE)
        state = answer["state"]
        samples = np.frombuffer(base64.b64decode(answer.get("pcm", "")), "<i2").astype(np.float32) / 32_768
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
    """Evaluate JavaScript in the output of the running cell."""
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
