"""Speech detection: silero-vad's packaged network over whole recordings and over live audio.

silero's own iterator keeps its state inside the model, so two streams on one model would disturb each other; here each
stream owns its state. The rule for segments is that of silero's `get_speech_timestamps` (tested to be equal).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.utils.config import VADConfig
from src.utils.errors import AudioError, MissingDependencyError, ModelError
from src.utils.files import uninterrupted

WINDOW_SAMPLES = 512  # 32 ms: the only window that the 16 kHz network takes
HYSTERESIS = 0.15  # speech ends below threshold - 0.15, silero's value
MIN_END_THRESHOLD = 0.01
CHUNK_WINDOWS = 256  # 8 s of one recording in one call of the network

_CONTEXT_SAMPLES = 64  # the end of the previous window, which each window is preceded by
_STATE_SIZE = 128  # of the LSTM
_MODEL_FILE = Path("data", "silero_vad_16k_sequence.onnx")


@dataclass(frozen=True)
class SpeechSegment:
    """A stretch of speech, in seconds from the start of the recording."""

    start_sec: float
    end_sec: float


@dataclass(frozen=True)
class VADEvent:
    """Speech began, reported once `min_speech_sec` of it is certain, or ended, after `min_silence_sec` of silence."""

    kind: Literal["start", "end"]
    time_sec: float  # where it happened, without padding
    detected_sec: float  # how much audio had been heard when it was reported


class VoiceActivityDetector:
    """Finds speech in recordings and streams.

    Raises:
        MissingDependencyError: silero-vad or onnxruntime is not installed.
        ModelError: silero-vad's network cannot be loaded.
    """

    def __init__(self, config: VADConfig | None = None) -> None:
        self.config = config or VADConfig()
        self._network = load_network()

    def speech_segments(self, audio: Waveform) -> list[SpeechSegment]:
        """Find all speech in a recording, (T,) float32 in [-1, 1], 16 kHz.

        Returns:
            Segments in order, padded by `pad_sec` without overlap; none for silence.

        Raises:
            AudioError: not one channel of finite samples.
        """
        duration_sec, pad_sec = len(audio) / SAMPLE_RATE, self.config.pad_sec
        stream = self.stream()
        events = stream.feed(audio) + stream.finish()
        starts, ends = ([event.time_sec for event in events if event.kind == kind] for kind in ("start", "end"))
        segments = []  # wider by the padding; two that would overlap meet half-way
        for start, end, before, after in zip(starts, ends, [-inf, *ends], [*starts[1:], inf], strict=False):
            start_sec = max(0.0, start - min(pad_sec, (start - before) / 2))
            segments.append(SpeechSegment(start_sec, min(duration_sec, end + min(pad_sec, (after - end) / 2))))
        return segments

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> list[list[SpeechSegment]]:
        """Find all speech in many recordings at 16 kHz, one after another."""
        return [self.speech_segments(audio) for audio in audios]

    def stream(self, min_silence_sec: float | None = None) -> VADStream:
        """Start a stream with a state of its own; speech ends after so much silence, by default as `config` says."""
        own = {} if min_silence_sec is None else {"min_silence_sec": min_silence_sec}
        return VADStream(self._network, self.config.model_copy(update=own))


def speech_edges(audio: Waveform) -> tuple[float, float]:
    """Return when the speech of (T,) float32 at 16 kHz begins and ends, in seconds; all of it where none is heard."""
    short = VADConfig(pad_sec=0.0, min_silence_sec=0.1)  # a longer one would not end speech before the end of a clip
    segments = VoiceActivityDetector(short).speech_segments(audio)
    return (segments[0].start_sec, segments[-1].end_sec) if segments else (0.0, len(audio) / SAMPLE_RATE)


class VADStream:
    """Speech detection on audio that arrives in pieces; any piece sizes give the same events."""

    def __init__(self, network: Any, config: VADConfig) -> None:
        self._network = network
        self._threshold = config.threshold
        self._end_threshold = max(config.threshold - HYSTERESIS, MIN_END_THRESHOLD)
        self._min_silence = config.min_silence_sec * SAMPLE_RATE
        self._min_speech = config.min_speech_sec * SAMPLE_RATE
        self._hidden = self._cell = np.zeros((1, 1, _STATE_SIZE), dtype=np.float32)
        # the context of the next window, then samples that do not fill a window yet
        self._rest: Waveform = np.zeros(_CONTEXT_SAMPLES, dtype=np.float32)
        self._heard = 0  # samples in whole windows
        self._start: int | None = None  # sample at which the current speech began
        self._silence: int | None = None  # sample at which its current silence began
        self.in_speech = False  # a "start" was reported whose "end" was not
        self.probability = 0.0  # of speech in the newest window

    def feed(self, samples: Waveform) -> list[VADEvent]:
        """Hear (T,) float32 at 16 kHz, any T; return events in order, "start" and "end" in turn."""
        check_waveform(samples)
        pending = np.concatenate([self._rest, samples], dtype=np.float32)
        count = (len(pending) - _CONTEXT_SAMPLES) // WINDOW_SAMPLES
        self._rest = pending[count * WINDOW_SAMPLES :].copy()
        events: list[VADEvent] = []
        if not count:
            return events
        windows = np.lib.stride_tricks.sliding_window_view(pending, _CONTEXT_SAMPLES + WINDOW_SAMPLES)
        windows = windows[::WINDOW_SAMPLES]  # (count, 576)
        for at in range(0, count, CHUNK_WINDOWS):
            chunk = np.ascontiguousarray(windows[at : at + CHUNK_WINDOWS])
            inputs = {"input": chunk, "h": self._hidden, "c": self._cell}
            probabilities, self._hidden, self._cell = self._network.run(None, inputs)
            for probability in probabilities.tolist():
                self.probability = probability
                events += self._advance()
        return events

    def finish(self) -> list[VADEvent]:
        """Hear the last incomplete window and close open speech; the stream takes no more audio after it."""
        rest = len(self._rest) - _CONTEXT_SAMPLES
        total = self._heard + rest
        events = self.feed(np.zeros(WINDOW_SAMPLES - rest, dtype=np.float32)) if rest else []
        if self._start is not None and (self.in_speech or total - self._start > self._min_speech):
            if not self.in_speech:
                events.append(self._event("start", self._start))
            events.append(self._event("end", total))
        self._start, self.in_speech = None, False
        return events

    def _advance(self) -> list[VADEvent]:
        """Apply silero's rule to one window: begin at the threshold, end after enough windows below the lower one."""
        at = self._heard
        self._heard += WINDOW_SAMPLES
        below = self.probability < self._end_threshold
        if self.probability >= self._threshold:
            self._silence = None
            if self._start is None:
                self._start = at
        elif self._start is not None and below and self._silence is None:
            self._silence = at
        if self._start is None:
            return []
        events = []
        certain = (self._heard if self._silence is None else self._silence) - self._start
        if not self.in_speech and certain > self._min_speech:
            self.in_speech = True
            events.append(self._event("start", self._start))
        if below and self._silence is not None and at - self._silence >= self._min_silence:
            if self.in_speech:
                events.append(self._event("end", self._silence))
            self._start = self._silence = None
            self.in_speech = False
        return events

    def _event(self, kind: Literal["start", "end"], sample: int) -> VADEvent:
        return VADEvent(kind, sample / SAMPLE_RATE, self._heard / SAMPLE_RATE)


class SpeechTimeline:
    """Which parts of a live stream are speech, in absolute time; everything, where the caller wants no detector.

    Speech ends after `min_silence_sec`.
    """

    def __init__(self, detector: VoiceActivityDetector | None, min_silence_sec: float) -> None:
        self._detector, self._min_silence_sec = detector, min_silence_sec
        self._stream = detector.stream(min_silence_sec) if detector is not None else None
        self._stream_from_sec = 0.0
        self._heard = 0  # samples
        self._spans: list[tuple[float, float]] = []  # the last one has no end while speech goes on
        self.end_sec = 0.0  # where speech last ended; 0 before

    def hear(self, samples: Waveform) -> list[VADEvent]:
        """Hear (T,) float32 at 16 kHz; return events in order."""
        began_sec = self._heard / SAMPLE_RATE
        self._heard += len(samples)
        if self._stream is not None:
            return self._note(self._stream.feed(samples))
        return [] if self._is_open() else self._note([VADEvent("start", began_sec, self._heard / SAMPLE_RATE)])

    def finish(self) -> list[VADEvent]:
        """Close speech that is open; what is heard afterwards is judged independently."""
        now_sec = self._heard / SAMPLE_RATE
        if self._detector is None or self._stream is None:
            return self._note([VADEvent("end", now_sec, now_sec)] if self._is_open() else [])
        events = self._note(self._stream.finish())
        self._stream, self._stream_from_sec = self._detector.stream(self._min_silence_sec), now_sec
        return events

    def touches(self, start_sec: float, end_sec: float, *, slack_sec: float) -> bool:
        """Whether a stretch of time lies at most `slack_sec` away from speech."""
        return any(start_sec <= end + slack_sec and end_sec >= start - slack_sec for start, end in self._spans)

    def speech_sec(self, start_sec: float, end_sec: float) -> float:
        """How much speech lies between two times, seconds."""
        return sum(max(0.0, min(end, end_sec) - max(start, start_sec)) for start, end in self._spans)

    def discard_before(self, sec: float) -> None:
        """Forget speech that ended before a time."""
        self._spans = [span for span in self._spans if span[1] >= sec]

    def _is_open(self) -> bool:
        return bool(self._spans) and self._spans[-1][1] == inf

    def _note(self, events: list[VADEvent]) -> list[VADEvent]:
        offset = self._stream_from_sec
        shifted = [VADEvent(e.kind, e.time_sec + offset, e.detected_sec + offset) for e in events]
        for event in shifted:
            if event.kind == "start":
                self._spans.append((event.time_sec, inf))
            else:
                self.end_sec = event.time_sec
                self._spans[-1] = (self._spans[-1][0], self.end_sec)
        return shifted


def check_waveform(samples: NDArray[Any]) -> None:
    """Raise AudioError unless `samples` is (T,) floating point and finite."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        found, fix = f"{samples.dtype} of shape {samples.shape}", "mix the channels, and divide int16 samples by 32768"
        raise AudioError(f"audio is {found}: (T,) float32 in [-1, 1] is needed; {fix}")
    if not np.isfinite(samples).all():
        raise AudioError(f"{int((~np.isfinite(samples)).sum())} NaN or infinite samples; check the source of the audio")


@cache
def load_network() -> Any:
    """Load the network of the installed silero-vad, whose own import takes seconds, once per process."""
    package = importlib.util.find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(
            "speech detection needs silero-vad, which is not installed: pip install 'silero-vad>=6.2.3,<7'"
        )
    try:
        with uninterrupted():  # it would answer Ctrl-C with an ImportError
            import onnxruntime  # type: ignore[import-untyped]
    except ImportError as err:
        raise MissingDependencyError(
            f"speech detection needs onnxruntime, which cannot be imported ({err}): pip install onnxruntime"
        ) from err
    path = Path(package.submodule_search_locations[0], _MODEL_FILE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # windows are small: threads would only wait
    options.log_severity_level = 3  # warns about its own optimisations otherwise
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as err:  # onnxruntime's errors have no common base
        fix = "pip install --force-reinstall --no-deps silero-vad==6.2.3"
        raise ModelError(f"silero-vad's network cannot be loaded: {path}: {err}; install it again: {fix}") from err
