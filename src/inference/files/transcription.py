"""What transcribing a recording gives, and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from src.inference.options import DecodingResult
from src.inference.words import Word, shifted


@dataclass(frozen=True)
class TranscribedSegment:
    """A stretch of a recording that was decoded together.

    Attributes:
        start_sec, end_sec: in the recording.
        text: stripped.
        avg_logprob, no_speech_prob, compression_ratio, temperature: as in `DecodingResult`.
        words: times in the recording; None unless asked for.
        language: given or detected; None for English-only models.
    """

    start_sec: float
    end_sec: float
    text: str
    avg_logprob: float
    no_speech_prob: float | None
    compression_ratio: float
    temperature: float
    words: tuple[Word, ...] | None
    language: str | None

    @classmethod
    def of(cls, result: DecodingResult, start_sec: float, end_sec: float) -> TranscribedSegment:
        """Place a clip's result in its recording."""
        return cls(
            start_sec,
            end_sec,
            result.text,
            result.avg_logprob,
            result.no_speech_prob,
            result.compression_ratio,
            result.temperature,
            None if result.words is None else shifted(result.words, start_sec),
            result.language,
        )


@dataclass(frozen=True)
class Transcription:
    """One recording's text.

    Attributes:
        source: the path, or "array N".
        text: segments joined by spaces; None where the recording could not be decoded.
        duration_sec: of the audio; nan where it could not be decoded.
        segments: those with text, in order.
        words: times from the recording's start; None unless asked for.
        language: of the first segment; None for English-only models and silence.
        error: why there is no text; None where there is.
    """

    source: str
    text: str | None
    duration_sec: float
    segments: tuple[TranscribedSegment, ...] = ()
    words: tuple[Word, ...] | None = None
    language: str | None = None
    error: str | None = None

    @classmethod
    def of(
        cls,
        source: str,
        segments: Sequence[TranscribedSegment],
        duration_sec: float,
        *,
        error: str | None = None,
        words: bool = False,
    ) -> Transcription:
        """Join a recording's segments; with an error there is no text, whatever was decoded before it."""
        if error is not None:
            return cls(source, None, float("nan"), error=error)
        spoken = tuple(segment for segment in segments if segment.text)
        return cls(
            source,
            " ".join(segment.text for segment in spoken),
            duration_sec,
            spoken,
            tuple(word for segment in spoken for word in segment.words or ()) if words else None,
            spoken[0].language if spoken else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON takes them: nan becomes None."""
        fields: dict[str, Any] = _for_json(asdict(self))
        return fields


@dataclass(frozen=True)
class Transcriptions(Sequence[Transcription]):
    """Results in the order of the input, with what they cost.

    Attributes:
        compute_sec: wall time of reading, cutting, features, encoder and decoder.
    """

    items: tuple[Transcription, ...]
    compute_sec: float

    @property
    def audio_sec(self) -> float:
        """Audio transcribed."""
        return float(np.nansum([item.duration_sec for item in self.items]))

    @property
    def rtf(self) -> float:
        """Real-time factor: compute over audio, a ratio of sums; nan where nothing was transcribed."""
        return self.compute_sec / self.audio_sec if self.audio_sec else float("nan")

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(each) for key, each in value.items() if key != "tokens"}
    if isinstance(value, list | tuple):
        return [_for_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
