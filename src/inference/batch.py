"""Files to text: batches of similar length, long recordings cut at silences, faults reported by file."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, Waveform, load_audio, to_mono_16k
from src.data.vad import VoiceActivityDetector
from src.inference.alignment import Word
from src.inference.decoding import DecodingOptions, DecodingResult, decode
from src.utils.config import Config
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

MAX_SEGMENT_SEC = 28.0  # below the encoder's 30 s, so that the pause at the end has room
AudioSource = str | Path | Waveform


@dataclass(frozen=True)
class Transcription:
    """One recording's text.

    Attributes:
        source: the path, or "array N".
        text: segments joined by spaces; None where the recording could not be decoded.
        duration_sec: of the audio; nan where it could not be decoded.
        words: times from the recording's start; None unless asked for.
        error: why there is no text; None where there is.
    """

    source: str
    text: str | None
    duration_sec: float
    words: tuple[Word, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Transcriptions(Sequence[Transcription]):
    """Results in the order of the input, with what they cost.

    Attributes:
        audio_sec: audio transcribed.
        compute_sec: wall time of features, encoder and decoder; decoding of files not included.
    """

    items: tuple[Transcription, ...]
    audio_sec: float
    compute_sec: float

    @property
    def rtf(self) -> float:
        """Real-time factor: compute over audio, a ratio of sums; nan where nothing was transcribed."""
        return self.compute_sec / self.audio_sec if self.audio_sec else float("nan")

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class _Segment:
    recording: int
    start_sec: float
    audio: Waveform


class BatchInference:
    """Transcribes files and arrays.

    Args:
        model: a `DynamicWhisper`.
        processor: its processor.
        config: `inference` and `model` sections; defaults without.
        vad: cuts recordings longer than 28 s; made when first needed.
    """

    def __init__(
        self, model: Any, processor: Any, config: Config | None = None, *, vad: VoiceActivityDetector | None = None
    ) -> None:
        self._model = model
        self._processor = processor
        self._config = config or Config()
        self._vad = vad

    def transcribe_batch(
        self,
        sources: Sequence[AudioSource],
        *,
        word_timestamps: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Transcriptions:
        """Transcribe recordings of any length.

        Args:
            sources: paths, or (T,) float32 arrays at 16 kHz.
            word_timestamps: fill `words`.
            on_error: "skip" reports a bad recording in its `Transcription.error` and goes on.
        Returns: one `Transcription` a source, in order. Silence gives an empty text.
        Raises: DataError: no source. AudioError: a bad recording with "raise".
        """
        if isinstance(sources, str | Path):
            raise DataError(f"transcribe_batch takes a list; write transcribe_batch([{str(sources)!r}])")
        if not len(sources):
            raise DataError("transcribe_batch: no recording given")
        segments: list[_Segment] = []
        durations: list[float] = []
        errors: dict[int, str] = {}
        for index, source in enumerate(sources):
            try:
                audio = self._load(source, index)
            except AudioError as err:
                if on_error == "raise":
                    raise
                logger.warning("skipped: %s", err)
                errors[index] = str(err)
                durations.append(float("nan"))
                continue
            durations.append(len(audio) / SAMPLE_RATE)
            segments += [_Segment(index, start, part) for start, part in self._cut(audio)]
        began = time.perf_counter()
        results = self._decode(segments, word_timestamps)
        compute_sec = time.perf_counter() - began
        items = tuple(
            _join(_label(source, i), durations[i], segments, results, i, errors.get(i), word_timestamps)
            for i, source in enumerate(sources)
        )
        return Transcriptions(items, float(np.nansum(durations)), compute_sec)

    def _load(self, source: AudioSource, index: int) -> Waveform:
        if isinstance(source, str | Path):
            return load_audio(source, allow_silence=True)
        return to_mono_16k(np.asarray(source), SAMPLE_RATE, name=_label(source, index), allow_silence=True)

    def _cut(self, audio: Waveform) -> list[tuple[float, Waveform]]:
        """Return (start in seconds, segment) with every segment short enough for the encoder."""
        duration_sec = len(audio) / SAMPLE_RATE
        if duration_sec <= MAX_SEGMENT_SEC:
            return [(0.0, audio)]
        self._vad = self._vad or VoiceActivityDetector(self._config.vad)
        speech = [(s.start_sec, s.end_sec) for s in self._vad.speech_segments(audio)]
        return [
            (start, audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)])
            for start, end in pack_segments(speech, MAX_SEGMENT_SEC)
        ]

    def _decode(self, segments: list[_Segment], word_timestamps: bool) -> dict[int, DecodingResult]:
        """Decode in batches from long to short; keys are positions in `segments`."""
        options = replace(DecodingOptions.from_config(self._config), word_timestamps=word_timestamps)
        order = sorted(range(len(segments)), key=lambda i: len(segments[i].audio), reverse=True)
        size = self._config.inference.batch_size
        results: dict[int, DecodingResult] = {}
        was_training = self._model.training
        self._model.eval()
        try:
            with tqdm(total=len(order), desc="transcribing", unit="segment", disable=len(order) <= size) as bar:
                for at in range(0, len(order), size):
                    chosen = order[at : at + size]
                    decoded = decode(self._model, self._processor, [segments[i].audio for i in chosen], options)
                    results.update(zip(chosen, decoded, strict=True))
                    bar.update(len(chosen))
            _synchronize(self._model)
        finally:
            self._model.train(was_training)
        return results


def pack_segments(speech: Sequence[tuple[float, float]], max_sec: float) -> list[tuple[float, float]]:
    """Join speech segments into windows of at most `max_sec`; cut a longer one into equal parts.

    Args:
        speech: (start, end) in seconds, ascending.
    Returns: (start, end) windows, ascending, covering all of the speech.
    """
    windows: list[tuple[float, float]] = []
    for start, end in speech:
        if windows and end - windows[-1][0] <= max_sec:
            windows[-1] = (windows[-1][0], end)
            continue
        parts = int(np.ceil((end - start) / max_sec))
        edges = np.linspace(start, end, parts + 1)
        windows += [(float(a), float(b)) for a, b in itertools.pairwise(edges)]
    return windows


def _label(source: AudioSource, index: int) -> str:
    return str(source) if isinstance(source, str | Path) else f"array {index}"


def _join(
    label: str,
    duration_sec: float,
    segments: Sequence[_Segment],
    results: dict[int, DecodingResult],
    recording: int,
    error: str | None,
    word_timestamps: bool,
) -> Transcription:
    if error is not None:
        return Transcription(label, None, duration_sec, error=error)
    parts = [(segment, results[i]) for i, segment in enumerate(segments) if segment.recording == recording]
    words = None
    if word_timestamps:
        words = tuple(
            replace(word, start_sec=word.start_sec + segment.start_sec, end_sec=word.end_sec + segment.start_sec)
            for segment, result in parts
            for word in result.words or ()
        )
    return Transcription(label, " ".join(r.text for _, r in parts if r.text), duration_sec, words)


def _synchronize(model: Any) -> None:
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
