"""Sources of live audio, and `StreamingASR`, the session that reads them.

A microphone is an iterator of blocks; the caller's thread does all the work. On this machine PortAudio's callback only
queues them. A notebook in the cloud has no audio device, but its kernel can evaluate JavaScript in the output of the
running cell: there an AudioWorklet queues samples at 16 kHz (all of it travels through the notebook's connection), and
each call of `take()` answers with what waits, as 16-bit PCM.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.vad import VoiceActivityDetector
from src.inference.engines import Engine
from src.inference.streaming.commit import CommitPolicy, Event
from src.inference.streaming.session import StreamingResult, StreamingSession
from src.utils.config import Config
from src.utils.errors import AudioError, ConfigError, MissingDependencyError, ModelError
from src.utils.files import read_template
from src.utils.runtime import in_colab, in_notebook

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]

BLOCK_SEC = 0.1
MAX_QUEUED_SEC = 60.0  # a consumer this far behind loses audio, which is counted
PATIENCE_SEC = 5.0  # without a single block the device is dead
BLOCK_FRAMES = 2_048  # of the browser; a power of 2, as a ScriptProcessor requires: 0.13 s at 16 kHz
TAKE_SEC = 5.0  # of audio in one answer of the browser at most; more would be a message of megabytes after a pause
TAKE_WAIT_SEC = 1.0  # the page waits this long for a first block before it answers with none
ABANDONED_SEC = 120.0  # without a reader: the kernel has died, and the page releases the microphone
ANSWER_SEC = 10.0  # without an answer to a script the page is gone
ASK_SEC = 60.0  # for a person to allow the microphone, or to click

_FIXES: Mapping[str, str] = {  # names of DOMException, as getUserMedia raises them
    "NotAllowedError": "allow it for this page (the icon next to the address), and run the cell again",
    "NotFoundError": "plug a microphone in, and run the cell again",
    "NotReadableError": "close the program that holds it, and run the cell again",
    "SecurityError": "open the notebook over https",
}
_ENDINGS: Mapping[str, str] = {
    "ended": "the browser's microphone was unplugged, or its permission withdrawn; run the cell again",
    "abandoned": "the page closed the browser's microphone, because nothing was read from it for "
    f"{ABANDONED_SEC:.0f} s; use a faster model or machine",
    "gone": "the page with the microphone was closed or loaded again; keep it open, and run the cell again",
}
_PATIENCE: Mapping[str, tuple[float, str]] = {
    "asking": (ASK_SEC, "nobody answered the browser's question whether this page may use the microphone"),
    "paused": (ASK_SEC, "the browser wants a click before it records, and nobody clicked 'Start recording'"),
    "recording": (PATIENCE_SEC, "the browser's microphone delivers nothing; is it muted?"),
}
_TAKE = """window.whisperMicrophone ? window.whisperMicrophone.take() : { state: "gone" }"""
_CLOSE = """window.whisperMicrophone?.close(), true"""
_LOST = "%d blocks of microphone audio were lost: decoding is slower than speech"


class StreamingASR(StreamingSession):
    """A session with its sources: `feed` it, or give it a file, an array or the microphone.

    Args:
        model: a `DynamicWhisper`, in the context that its config says; not needed with `engine`.
        processor: its `WhisperProcessor`.
        engine: from `load_engine`, instead of a model: CTranslate2 is the fastest on a CPU.
        vad: as for `StreamingSession`.
        config: likewise.
        context_silence_sec: likewise.
        policy: likewise.
        clock: likewise.

    Raises:
        ModelError: neither an engine nor a model with its processor.
    """

    def __init__(
        self,
        model: Any = None,
        processor: Any = None,
        *,
        engine: Engine | None = None,
        vad: VoiceActivityDetector | None = None,
        config: Config | None = None,
        context_silence_sec: float | None = None,
        policy: Callable[[], CommitPolicy] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if engine is None:
            if model is None or processor is None:
                raise ModelError("StreamingASR needs a model and its processor, or engine=load_engine(...)")
            from src.inference.decoding import TorchEngine

            engine = TorchEngine(model, processor)
        super().__init__(
            engine, vad=vad, config=config, context_silence_sec=context_silence_sec, policy=policy, clock=clock
        )

    def iter_file(self, path: str | Path) -> Iterator[Event]:
        """Reset, then yield the events of a file, fed in chunks of `min_chunk_sec` as fast as they are decoded.

        Raises:
            AudioError: the file cannot be decoded.
        """
        return self.iter_audio(load_audio(path, allow_silence=True))

    def iter_audio(self, audio: Waveform) -> Iterator[Event]:
        """As `iter_file`, for (T,) float32 at 16 kHz."""
        chunk = round(self._settings.min_chunk_sec * SAMPLE_RATE)
        chunks = ((audio[at : at + chunk], SAMPLE_RATE) for at in range(0, len(audio), chunk))
        return self._listen(chunks, adaptive=False)  # nobody waits: the chunks of real time, whatever the speed

    def stream_from_file(
        self, path: str | Path, *, real_time: bool = False, on_event: OnEvent | None = None
    ) -> StreamingResult:
        """Transcribe a file as a stream; see `iter_file`.

        Args:
            path: of the recording.
            real_time: hear it no faster than it was recorded, to see what a microphone would give.
            on_event: called with each event as it comes, in this thread.
        """
        if not real_time:
            return self._gather(self.iter_file(path), on_event)
        blocks = in_real_time(load_audio(path, allow_silence=True))
        return self._gather(self._listen((block, SAMPLE_RATE) for block in blocks), on_event)

    def stream_audio(self, audio: Waveform) -> StreamingResult:
        """Transcribe (T,) float32 at 16 kHz as a stream; see `iter_file`."""
        return self._gather(self.iter_audio(audio))

    def stream_from_microphone(self, duration_sec: float, *, on_event: OnEvent | None = None) -> StreamingResult:
        """Reset, then transcribe the microphone: in Colab the browser's, elsewhere the default device of this machine.

        Args:
            duration_sec: how much audio to record.
            on_event: called with each event as it comes, in this thread.

        Raises:
            MissingDependencyError, AudioError, ConfigError: as `Microphone` and `BrowserMicrophone`.
        """
        microphone: Microphone | BrowserMicrophone
        if in_colab() and in_notebook():
            microphone = BrowserMicrophone(duration_sec)
            logger.info("recording %g s from the browser's microphone; allow it if the browser asks", duration_sec)
        else:
            microphone = Microphone(duration_sec)
            rate = microphone.sample_rate
            logger.info("recording %g s from this machine's microphone at %d Hz", duration_sec, rate)
        with contextlib.closing(microphone.blocks()) as blocks:  # an error must not leave it open
            events = self._listen((block, microphone.sample_rate) for block in blocks)
            return replace(self._gather(events, on_event), overruns=microphone.overruns)

    def _listen(self, blocks: Iterable[tuple[Waveform, int]], *, adaptive: bool = True) -> Iterator[Event]:
        """Reset, then yield the events of samples that come with their rate in Hz, until there are no more."""
        self.reset()
        self._adaptive = adaptive
        for samples, sample_rate in blocks:
            yield from self.feed(samples, sample_rate)
        yield from self.flush()

    def _gather(self, events: Iterable[Event], on_event: OnEvent | None = None) -> StreamingResult:
        """Run a stream to its end, and gather what it gave."""
        gathered: list[Event] = []
        for event in events:
            gathered.append(event)
            if on_event is not None:
                on_event(event)
        return self.result(gathered)


def in_real_time(
    audio: Waveform,
    *,
    sample_rate: int = SAMPLE_RATE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Waveform]:
    """Yield a recording, (T,) float32, in blocks, each when a microphone would have recorded it."""
    began, block = clock(), round(BLOCK_SEC * sample_rate)
    for at in range(0, len(audio), block):
        piece = audio[at : at + block]
        sleep(max(0.0, began + (at + len(piece)) / sample_rate - clock()))
        yield piece


class Microphone:
    """Records for a given time from the default input device, at its own sample rate.

    Attributes:
        sample_rate: of the blocks, Hz.
        overruns: blocks that were lost, by the device or because the consumer was too slow.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is absent.
        AudioError: no usable input device.
        ConfigError: a duration that is not positive.
    """

    def __init__(self, duration_sec: float) -> None:
        _check_duration(duration_sec)
        self._duration_sec = duration_sec
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
        self.overruns = 0
        self._blocks: queue.Queue[Waveform] = queue.Queue(maxsize=round(MAX_QUEUED_SEC / BLOCK_SEC))

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks, all that is waiting in one, until `duration_sec` of audio has come.

        Raises:
            AudioError: the device cannot be opened, or delivers nothing for 5 s.
        """
        remaining = round(self._duration_sec * self.sample_rate)
        try:
            stream = self._device.InputStream(
                samplerate=self.sample_rate,
                channels=1,
                dtype="float32",
                blocksize=round(BLOCK_SEC * self.sample_rate),
                callback=self._enqueue,
            )
            with stream:
                while remaining > 0:
                    block = self._waiting()[:remaining]
                    remaining -= len(block)
                    yield block
        except self._device.PortAudioError as err:
            raise AudioError(f"the microphone failed: {err}; python -m sounddevice lists the devices") from err
        if self.overruns:
            logger.warning(_LOST, self.overruns)

    def _enqueue(self, indata: Any, frames: int, time: Any, status: Any) -> None:
        """Run on PortAudio's thread: no decoding, no waiting."""
        self.overruns += bool(status and status.input_overflow)
        try:
            self._blocks.put_nowait(np.array(indata[:, 0], dtype=np.float32))  # PortAudio reuses its memory
        except queue.Full:
            self.overruns += 1

    def _waiting(self) -> Waveform:
        try:
            blocks = [self._blocks.get(timeout=PATIENCE_SEC)]
        except queue.Empty as err:
            raise AudioError(
                f"the microphone delivered nothing for {PATIENCE_SEC:.0f} s; is it muted or unplugged?"
            ) from err
        while not self._blocks.empty():
            blocks.append(self._blocks.get_nowait())
        return np.concatenate(blocks)


class BrowserMicrophone:
    """Records for a given time from the microphone of the browser that shows the notebook.

    A button in the cell's output ends it earlier.

    Args:
        duration_sec: how much audio to record.
        eval_js: evaluates JavaScript in the page and returns its value, that of a promise once it is settled; raises
            `AudioError` where the page does not answer. By default that of Colab.
        clock: seconds, monotone.

    Attributes:
        sample_rate: of the blocks, Hz: 16,000, except in browsers that do not resample; final at the first block.
        overruns: blocks that were lost because nobody fetched them in time.

    Raises:
        ConfigError: a duration that is not positive.
    """

    def __init__(
        self,
        duration_sec: float,
        *,
        eval_js: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_duration(duration_sec)
        self._duration_sec, self._clock = duration_sec, clock
        self._eval_js = eval_js or eval_in_colab
        self.sample_rate, self.overruns = SAMPLE_RATE, 0

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks until `duration_sec` of audio has come, or the button is clicked.

        Raises:
            AudioError: the browser has no microphone or may not use it, the microphone or the page goes away, or
                nothing comes: for 5 s while it records, for 60 s while a person is asked.
        """
        options = {
            "rate": SAMPLE_RATE,
            "blockFrames": BLOCK_FRAMES,
            "queueSec": MAX_QUEUED_SEC,
            "takeSec": TAKE_SEC,
            "waitMs": 1000 * TAKE_WAIT_SEC,
            "abandonedMs": 1000 * ABANDONED_SEC,
        }
        body = "".join(read_template("src.inference", name) for name in ("audio_source.js", "browser_microphone.js"))
        self._eval_js(f'((options) => {{\n"use strict";\n{body}}})({json.dumps(options)})')
        try:
            yield from self._recorded()
        finally:
            with contextlib.suppress(AudioError):  # a page that is gone holds no microphone
                self._eval_js(_CLOSE)
        if self.overruns:
            logger.warning(_LOST, self.overruns)

    def _recorded(self) -> Generator[Waveform, None, None]:
        heard, last_state, since_sec = 0, "", self._clock()
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
    """Evaluate JavaScript in the output of the running cell.

    Raises:
        MissingDependencyError: not in Colab.
        AudioError: the script fails, or the page does not answer.
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


def _check_duration(duration_sec: float) -> None:
    if duration_sec <= 0:
        raise ConfigError(f"duration_sec is {duration_sec}; give the seconds to record, above 0")
