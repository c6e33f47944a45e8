"""Where speech is: silero-vad's bundled weights, over whole recordings and over live audio.

silero's own iterator keeps its recurrent state inside the model, so that two streams on one model disturb each other.
Here the weights are shared and each stream owns its state. Whole recordings go through the same stream, so that batch
and live agree by construction; the rule is silero's `get_speech_timestamps` (equal to it, tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad_network import CONTEXT_SAMPLES, WINDOW_SAMPLES, SpeechNetwork, load_network, new_state
from src.utils.config import VADConfig
from src.utils.errors import AudioError

HYSTERESIS = 0.15  # speech ends below threshold - 0.15, silero's value
MIN_END_THRESHOLD = 0.01
BATCH_CLIPS, BATCH_WINDOWS = 64, 64  # of clips side by side: 25 MB
CHUNK_WINDOWS = 256  # of one recording at once


@dataclass(frozen=True)
class SpeechSegment:
    """A stretch of speech, in seconds from the start of the recording."""

    start_sec: float
    end_sec: float

    @property
    def duration_sec(self) -> float:
        """Length in seconds."""
        return self.end_sec - self.start_sec


@dataclass(frozen=True)
class VADEvent:
    """Speech began or ended.

    Attributes:
        kind: "start" is reported once `min_speech_sec` of speech is certain, "end" after `min_silence_sec` of silence.
        time_sec: where it happened, without padding.
        detected_sec: how much audio had been heard when it was reported.
    """

    kind: Literal["start", "end"]
    time_sec: float
    detected_sec: float


class VoiceActivityDetector:
    """Finds speech.

    Args:
        config: threshold and durations; the defaults of `VADConfig` if None.
    Raises: MissingDependencyError: silero-vad is not installed. ModelError: its weights cannot be used.
    """

    def __init__(self, config: VADConfig | None = None) -> None:
        self.config = config or VADConfig()
        self._network = load_network()

    def speech_segments(self, audio: Waveform, sample_rate: int = SAMPLE_RATE) -> list[SpeechSegment]:
        """Find all speech in a recording.

        Args:
            audio: (T,) float32 in [-1, 1].
            sample_rate: of `audio`, Hz; it is resampled to 16 kHz here.
        Returns: segments in order, padded by `pad_sec` without overlap, in seconds at any rate; none for silence.
        Raises: AudioError: not one channel of finite samples, or a rate that is not positive.
        """
        if sample_rate <= 0:
            raise AudioError(f"sample rate {sample_rate} Hz; pass the rate of the recording, for example 16000")
        check_waveform(audio)
        duration_sec = len(audio) / sample_rate
        if sample_rate != SAMPLE_RATE and len(audio):
            audio = soxr.resample(audio, sample_rate, SAMPLE_RATE, quality="HQ")
        stream = self.stream()
        return _pad(stream.feed(audio) + stream.finish(), self.config.pad_sec, duration_sec)

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> list[list[SpeechSegment]]:
        """Find all speech in many recordings: what `speech_segments` finds in each, in a fifth of the time.

        Args:
            audios: (T,) float32 each, 16 kHz, any lengths.
        Raises: AudioError: not one channel of finite samples.
        """
        for audio in audios:
            check_waveform(audio)
        found: list[list[SpeechSegment]] = [[] for _ in audios]
        order = sorted(range(len(audios)), key=lambda i: len(audios[i]), reverse=True)
        for at in range(0, len(order), BATCH_CLIPS):
            rows = order[at : at + BATCH_CLIPS]
            for i, row in zip(rows, _window_probabilities(self._network, [audios[i] for i in rows]), strict=True):
                events = self.stream().judge(row, len(audios[i]))
                found[i] = _pad(events, self.config.pad_sec, len(audios[i]) / SAMPLE_RATE)
        return found

    def stream(self) -> VADStream:
        """Start a stream with a state of its own."""
        return VADStream(self._network, self.config)


class VADStream:
    """Speech detection on audio that arrives in pieces; any piece sizes give the same events.

    Attributes:
        in_speech: whether a "start" was reported whose "end" was not.
        probability: of speech in the newest window, in [0, 1].
    """

    def __init__(self, network: SpeechNetwork, config: VADConfig) -> None:
        self._network = network
        self._threshold = config.threshold
        self._end_threshold = max(config.threshold - HYSTERESIS, MIN_END_THRESHOLD)
        self._min_silence = config.min_silence_sec * SAMPLE_RATE
        self._min_speech = config.min_speech_sec * SAMPLE_RATE
        self._state = new_state(1)
        self._context: Waveform = np.zeros(CONTEXT_SAMPLES, dtype=np.float32)
        self._rest: Waveform = np.zeros(0, dtype=np.float32)  # less than a window
        self._heard = 0  # samples in whole windows
        self._start: int | None = None  # sample at which the current speech began
        self._silence: int | None = None  # sample at which its current silence began
        self.in_speech = False
        self.probability = 0.0

    def feed(self, samples: Waveform) -> list[VADEvent]:
        """Hear more audio.

        Args:
            samples: (T,) float32, 16 kHz, any T.
        Returns: events in order; "start" and "end" alternate.
        Raises: AudioError: not one channel of finite samples.
        """
        check_waveform(samples)
        pending = np.concatenate([self._rest, samples])
        whole = len(pending) // WINDOW_SAMPLES * WINDOW_SAMPLES
        self._rest = pending[whole:].copy()
        joined = np.concatenate([self._context, pending[:whole]])
        self._context = joined[-CONTEXT_SAMPLES:].copy()
        windows = _windows(joined)
        events: list[VADEvent] = []
        for at in range(0, len(windows), CHUNK_WINDOWS):
            for gates in self._network.gates(windows[at : at + CHUNK_WINDOWS]):
                probability, self._state = self._network.step(gates[None], self._state)
                self.probability = float(probability[0])
                events += self._advance()
        return events

    def finish(self) -> list[VADEvent]:
        """Hear the last incomplete window and close what is open; the stream takes no more audio after it."""
        total = self._heard + len(self._rest)
        events = self.feed(np.zeros(WINDOW_SAMPLES - len(self._rest), dtype=np.float32)) if len(self._rest) else []
        return events + self.judge([], total)

    def judge(self, probabilities: Sequence[float], total: int) -> list[VADEvent]:
        """Hear windows whose probabilities are known, then close what is open after `total` samples in all."""
        events: list[VADEvent] = []
        for self.probability in probabilities:
            events += self._advance()
        if self._start is not None and (self.in_speech or total - self._start > self._min_speech):
            if not self.in_speech:
                events.append(self._event("start", self._start))
            events.append(self._event("end", total))
        self._start, self.in_speech = None, False
        return events

    def _advance(self) -> list[VADEvent]:
        """silero's rule for one window: begin at the threshold, end after enough windows below the lower one."""
        at = self._heard
        self._heard += WINDOW_SAMPLES
        if self.probability >= self._threshold:
            self._silence = None
            if self._start is None:
                self._start = at
        elif self._start is not None and self.probability < self._end_threshold and self._silence is None:
            self._silence = at
        if self._start is None:
            return []
        events = []
        certain = (self._heard if self._silence is None else self._silence) - self._start
        if not self.in_speech and certain > self._min_speech:
            self.in_speech = True
            events.append(self._event("start", self._start))
        below = self.probability < self._end_threshold
        if below and self._silence is not None and at - self._silence >= self._min_silence:
            if self.in_speech:
                events.append(self._event("end", self._silence))
            self._start = self._silence = None
            self.in_speech = False
        return events

    def _event(self, kind: Literal["start", "end"], sample: int) -> VADEvent:
        return VADEvent(kind, sample / SAMPLE_RATE, self._heard / SAMPLE_RATE)


class SpeechTimeline:
    """Which parts of a live stream are speech, in absolute time.

    Args:
        detector: None takes everything for speech, because the caller asked for no detection.

    Attributes:
        end_sec: where speech last ended; 0 before.
    """

    def __init__(self, detector: VoiceActivityDetector | None) -> None:
        self._detector = detector
        self._stream = detector.stream() if detector is not None else None
        self._stream_from_sec = 0.0
        self._heard = 0  # samples
        self._starts: list[float] = []
        self._ends: list[float] = []  # one shorter while speech goes on
        self.end_sec = 0.0

    def hear(self, samples: Waveform) -> list[VADEvent]:
        """Hear (T,) float32 at 16 kHz; return events in order."""
        self._heard += len(samples)
        now_sec = self._heard / SAMPLE_RATE
        if self._stream is not None:
            return self._note(self._stream.feed(samples))
        if len(self._starts) > len(self._ends):
            return []
        return self._note([VADEvent("start", now_sec - len(samples) / SAMPLE_RATE, now_sec)])

    def finish(self) -> list[VADEvent]:
        """Close speech that is open; what is heard afterwards is judged afresh."""
        now_sec = self._heard / SAMPLE_RATE
        if self._detector is None or self._stream is None:
            return self._note([VADEvent("end", now_sec, now_sec)] if len(self._starts) > len(self._ends) else [])
        events = self._note(self._stream.finish())
        self._stream, self._stream_from_sec = self._detector.stream(), now_sec
        return events

    def touches(self, start_sec: float, end_sec: float, *, slack_sec: float) -> bool:
        """Whether a stretch of time lies at most `slack_sec` away from speech."""
        return any(start_sec <= end + slack_sec and end_sec >= start - slack_sec for start, end in self._spans())

    def speech_sec(self, start_sec: float, end_sec: float) -> float:
        """How much speech lies between two times, seconds."""
        return sum(max(0.0, min(end, end_sec) - max(start, start_sec)) for start, end in self._spans())

    def discard_before(self, sec: float) -> None:
        """Forget speech that ended before a time."""
        old = sum(end < sec for end in self._ends)
        del self._starts[:old], self._ends[:old]

    def _spans(self) -> list[tuple[float, float]]:
        ends = self._ends if len(self._ends) == len(self._starts) else [*self._ends, float("inf")]
        return list(zip(self._starts, ends, strict=True))

    def _note(self, events: list[VADEvent]) -> list[VADEvent]:
        offset = self._stream_from_sec
        shifted = [VADEvent(e.kind, e.time_sec + offset, e.detected_sec + offset) for e in events]
        for event in shifted:
            if event.kind == "start":
                self._starts.append(event.time_sec)
            else:
                self._ends.append(event.time_sec)
                self.end_sec = event.time_sec
        return shifted


def check_waveform(samples: Waveform) -> None:
    """Raise AudioError unless `samples` is (T,) floating point and finite."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(
            f"audio of shape {samples.shape} and type {samples.dtype}: (T,) float32 in [-1, 1] is needed; "
            "mix the channels, and divide int16 samples by 32768"
        )
    if not np.isfinite(samples).all():
        raise AudioError(f"{int((~np.isfinite(samples)).sum())} NaN or infinite samples; check the source of the audio")


def _window_probabilities(network: SpeechNetwork, audios: Sequence[Waveform]) -> list[list[float]]:
    """Return the probability of speech a window; `audios` go from long to short: those that ended fall off the end."""
    windows = np.array([-(-len(audio) // WINDOW_SAMPLES) for audio in audios])
    padded = np.zeros((len(audios), CONTEXT_SAMPLES + int(windows.max()) * WINDOW_SAMPLES), dtype=np.float32)
    for row, audio in enumerate(audios):
        padded[row, CONTEXT_SAMPLES : CONTEXT_SAMPLES + len(audio)] = audio
    hidden, cell = new_state(len(audios))
    found = np.zeros((len(audios), int(windows.max())), dtype=np.float32)
    for at in range(0, found.shape[1], BATCH_WINDOWS):
        rows = int((windows > at).sum())
        part = _windows(padded[:rows, at * WINDOW_SAMPLES : (at + BATCH_WINDOWS) * WINDOW_SAMPLES + CONTEXT_SAMPLES])
        gates = network.gates(part.reshape(-1, part.shape[2])).reshape(rows, part.shape[1], -1)
        for i in range(part.shape[1]):
            left = int((windows > at + i).sum())
            found[:left, at + i], (hidden, cell) = network.step(gates[:left, i], (hidden[:left], cell[:left]))
    return [row[:n].tolist() for row, n in zip(found, windows, strict=True)]


def _windows(joined: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """View (..., 64 + n * 512) samples as (..., n, 576): windows with the 64 samples before each."""
    size = CONTEXT_SAMPLES + WINDOW_SAMPLES
    if joined.shape[-1] < size:
        return np.zeros((*joined.shape[:-1], 0, size), dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(joined, size, axis=-1)[..., ::WINDOW_SAMPLES, :]


def _pad(events: Sequence[VADEvent], pad_sec: float, duration_sec: float) -> list[SpeechSegment]:
    """Make segments of starts and ends, wider by `pad_sec`; two that would overlap meet half-way."""
    starts, ends = ([event.time_sec for event in events if event.kind == kind] for kind in ("start", "end"))
    segments = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        before = pad_sec if i == 0 else min(pad_sec, (start - ends[i - 1]) / 2)
        after = pad_sec if i == len(ends) - 1 else min(pad_sec, (starts[i + 1] - end) / 2)
        segments.append(SpeechSegment(max(0.0, start - before), min(duration_sec, end + after)))
    return segments
