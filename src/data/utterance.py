"""One recording with its transcript: what every source gives and every later step passes on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from src.utils.errors import visible

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@runtime_checkable
class EncodedAudio(Protocol):
    """An encoded recording that is read when it is needed, such as a cell of a Parquet file."""

    def read(self) -> bytes:
        """Return the bytes of the encoded file (wav, flac, opus, ...)."""
        ...


@dataclass(frozen=True)
class AudioTrack:
    """One of several audio tracks of a recording."""

    audio: Path | bytes | EncodedAudio
    number: int  # from 1

    def read(self) -> bytes:
        """Return the bytes of the whole recording."""
        if isinstance(self.audio, Path):
            return self.audio.read_bytes()
        return self.audio if isinstance(self.audio, bytes) else self.audio.read()

    def __str__(self) -> str:
        return "embedded audio" if isinstance(self.audio, bytes) else str(self.audio)


@dataclass(frozen=True)
class TimedText:
    """A part of a transcript, and when it is spoken, in seconds from the start of its recording."""

    text: str  # without surrounding spaces
    start_sec: float
    end_sec: float


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript."""

    id: str  # unique in its data set; it follows the utterance into every report
    audio: Path | bytes | EncodedAudio  # a path, the bytes of an encoded file, or something that reads them when asked
    text: str  # as the source has it until `prepare_datasets` recases it
    speaker: str | None = None  # None where the source does not say
    language: str | None = None  # Whisper's code of what is spoken; of a source also a mark without a token in Whisper
    duration_sec: float | None = None  # after decoding; None until the recording has been checked
    parts: tuple[TimedText, ...] = ()  # of a transcript that its source gives with times; their texts joined are `text`
    label_space: bool | None = None  # whether labels begin with a space; None is by language
    meta: Mapping[str, Any] = field(default_factory=dict)  # other columns of the source (split, age, gender, ...)
    problem: str | None = None  # why its row cannot be used; raised when it is checked

    @property
    def audio_name(self) -> str:
        """What to call the recording in an error."""
        return visible(self.audio) if isinstance(self.audio, Path | EncodedAudio) else "embedded audio"


@dataclass(frozen=True)
class SkippedUtterance:
    """A row that was left out, and why."""

    id: str
    reason: str


def stable_hash(seed: int, text: str) -> str:
    """Return a hash that is the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def split_of(path: Path) -> str | None:
    """Return the split that a file's or folder's name says, the nearest first; None where none does."""
    for part in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def with_unique_ids(utterances: Iterable[Utterance]) -> Iterator[Utterance]:
    """Number ids that were seen before: file names inside archives repeat, and nobody can change them there."""
    seen: set[str] = set()
    for utterance in utterances:
        unique, number = utterance.id, 2
        while unique in seen:
            unique, number = f"{utterance.id}#{number}", number + 1
        seen.add(unique)
        yield utterance if unique == utterance.id else replace(utterance, id=unique)
