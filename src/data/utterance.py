"""One recording with its transcript: what every source gives and every later step passes on."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from src.utils.errors import visible
from src.utils.languages import code_of_language

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
NO_SPEAKER = frozenset({"nan", "NaN", "None", "null", "NULL", "N/A", "<NA>"})
LANGUAGE_COLUMNS = ("language", "lang", "locale", "language_code", "lang_id")
NO_LANGUAGE = frozenset({"auto", "und", "mul", "mis", "zxx", "nan", "none", "null", "n/a", "unknown", "other"})
_TAKEN = frozenset({"id", "path", "file", *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS})  # the other columns are `meta`
NO_META: Mapping[str, Any] = {}  # one for all rows without other columns
_LINE_END = re.compile(r"\s*[\n\r\t\v\f\x1c-\x1f\x85\u2028\u2029]\s*")


@runtime_checkable
class EncodedAudio(Protocol):
    """An encoded recording that is read when it is needed, such as a cell of a Parquet file."""

    def read(self) -> bytes:
        """Return the bytes of the encoded file (wav, flac, opus, ...)."""
        ...


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)  # there are as many as rows
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
    meta: Mapping[str, Any] = field(default_factory=lambda: NO_META)  # other columns of the source (split, age, ...)
    problem: str | None = None  # why its row cannot be used; raised when it is checked
    line: int | None = None  # of its row in a manifest
    snr_db: float | None = None  # as measured; None until the recording has been checked

    @property
    def columns(self) -> dict[str, Any]:
        """`meta` with `line` and `snr_db`, for evaluation; a source's own `snr_db` is better than an estimate."""
        measured = {} if self.snr_db is None else {"snr_db": self.snr_db}
        return {**measured, **self.meta, **({} if self.line is None else {"line": self.line})}

    @property
    def audio_name(self) -> str:
        """What to call the recording in an error."""
        return visible(self.audio) if isinstance(self.audio, Path | EncodedAudio) else "embedded audio"

    @property
    def split(self) -> str | None:
        """The split that its source gives, "train" by default; None for an unknown name."""
        return SPLIT_NAMES.get(str(self.meta.get("split") or "train").lower())


def _path_as_text(slot: Any) -> property:
    """Keep the paths of a slot as texts, of 100 bytes instead of 350: there are as many as rows."""

    def get(owner: Utterance) -> Any:
        kept = slot.__get__(owner)
        return Path(kept) if isinstance(kept, str) else kept

    def set_text(owner: Utterance, value: Any) -> None:
        slot.__set__(owner, str(value) if isinstance(value, Path) else value)

    return property(get, set_text)


Utterance.audio = _path_as_text(Utterance.audio)  # type: ignore[assignment,method-assign,misc]


@dataclass(frozen=True)
class SkippedUtterance:
    """A row that was left out, and why."""

    id: str
    reason: str


def utterance_from_row(
    row: Mapping[str, Any], audio: Path | bytes | EncodedAudio, *, text_column: str, fallback_id: str,
    language: str | None = None, line: int | None = None,
) -> Utterance:  # fmt: skip
    """Build an utterance from a row's plain columns; `fallback_id` and `language` are for rows without their own.

    Line ends inside a transcript become spaces. Control characters and lone surrogates are escapes in ids and all that
    is printed; a transcript that has them, or is no text at all, is the utterance's `problem`.
    """
    problem = None
    cells = {"id": "", text_column: "", "speaker": ""}
    for name, columns in {"id": ("id",), text_column: (text_column,), "speaker": SPEAKER_COLUMNS}.items():
        try:
            cells[name] = next(filter(None, (text_of(row.get(column)).strip() for column in columns)), "")
        except ValueError as err:
            what = "transcript" if name == text_column else name
            problem = f"the {what} is wrong: {err}; write a text"
    text = cells[text_column]
    if not text.isprintable():
        text = _LINE_END.sub(" ", text)
    if visible(text) != text:
        strange = next(visible(char) for char in text if visible(char) != char)
        problem = f"the transcript has the character {strange}, which is no text; remove it"
    speaker = cells["speaker"]
    if speaker.endswith("0"):  # a column of numbers that pandas made floats
        speaker = re.sub(r"^(\d+)\.0+$", r"\1", speaker)
    return Utterance(
        id=visible(cells["id"] or fallback_id),
        audio=audio,
        text=text,
        speaker=sys.intern(visible(speaker)) if speaker and speaker not in NO_SPEAKER else None,  # many rows have one
        language=language_of_row(row) or language,
        meta={
            key: visible(value.strip()) if isinstance(value, str) else value
            for key, value in row.items()
            if key not in _TAKEN and key != text_column and _is_plain(value)
        }
        or NO_META,
        problem=problem,
        line=line,
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | type(None)) or (isinstance(value, float) and math.isfinite(value))


def language_of_row(row: Mapping[str, Any]) -> str | None:
    """Return Whisper's code for a row's language, its own mark where Whisper has none, None where it has no mark."""
    marks = [visible(cell.strip()) for c in LANGUAGE_COLUMNS if isinstance(cell := row.get(c), str)]
    marks = [mark for mark in marks if mark.lower() not in NO_LANGUAGE and any(map(str.isalpha, mark))]
    return next(filter(None, map(code_of_language, marks)), marks[0] if marks else None)


def text_of(value: object) -> str:
    """Return a cell as text, empty where it has no value; ValueError for what is neither text nor a number.

    A whole number is written without a point, also where pandas made it a float because another row has none.
    """
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float | Decimal) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} is no text")
    return str(int(value)) if value == int(value) else str(value)


def stable_hash(seed: int, text: str) -> str:
    """Return a hash that is the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def hashed_choice(utterances: Iterable[Utterance], count: int | None, seed: int) -> list[Utterance]:
    """Choose `count` utterances by a hash of their ids, all if there are fewer: a sample of the whole, not a head."""
    return sorted(utterances, key=lambda u: stable_hash(seed, u.id))[:count]


def split_of(path: Path) -> str | None:
    """Return the split that a file's or folder's name says, the nearest first; None where none does."""
    for part in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def with_unique_ids(utterances: Iterable[Utterance]) -> Iterator[Utterance]:
    """Number ids that were seen before: file names inside archives repeat, and nobody can change them there."""
    seen: dict[str, int] = {}  # ids, with the last number that each was given
    for utterance in utterances:
        unique, number = utterance.id, seen.get(utterance.id, 1)
        while unique in seen:
            number += 1
            unique = f"{utterance.id}#{number}"
        seen[utterance.id] = number
        seen.setdefault(unique, 1)
        yield utterance if unique == utterance.id else replace(utterance, id=unique)
