"""What a live session reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from src.inference.words import Word


@dataclass(frozen=True)
class Event:
    """Something that a listener should show.

    Attributes:
        kind: "commit": words that are now part of the transcript for good; they void the last partial. "partial": the
            tail after them, replaced whole by the next partial. "final": all committed since the last final, at a
            pause or at the end.
        words: in absolute time, seconds since the stream began.
        text: the words, joined.
        audio_sec: audio heard when it was emitted.
        emitted_at: the clock when it was emitted, seconds.
        sequence: 0, 1, 2, ... over the session.
    """

    kind: Literal["partial", "commit", "final"]
    words: tuple[Word, ...]
    text: str
    audio_sec: float
    emitted_at: float
    sequence: int


@dataclass(frozen=True)
class EmittedWord:
    """A committed word, the audio heard when it was committed, and the clock then (seconds both)."""

    word: Word
    audio_sec: float
    emitted_at: float


@dataclass(frozen=True)
class StreamingResult:
    """A finished session.

    Attributes:
        text: the transcript: exactly the commits, joined.
        compute_sec: clock time spent inside the session; `rtf` is compute_sec / audio_sec.
        longest_update_sec: the longest model call.
        updates: how many model calls there were.
        overruns: blocks that the microphone lost; 0 for files.
    """

    text: str
    events: tuple[Event, ...]
    words: tuple[EmittedWord, ...]
    audio_sec: float
    compute_sec: float
    rtf: float
    longest_update_sec: float
    updates: int
    overruns: int = 0

    @classmethod
    def from_events(
        cls, events: Sequence[Event], *, audio_sec: float, compute_sec: float, longest_update_sec: float, updates: int
    ) -> StreamingResult:
        """Gather all events of a session; `rtf` is nan where there was no audio."""
        words = tuple(
            EmittedWord(word, event.audio_sec, event.emitted_at)
            for event in events
            if event.kind == "commit"
            for word in event.words
        )
        return cls(
            text=join_words([emitted.word for emitted in words]),
            events=tuple(events),
            words=words,
            audio_sec=audio_sec,
            compute_sec=compute_sec,
            rtf=compute_sec / audio_sec if audio_sec else float("nan"),
            longest_update_sec=longest_update_sec,
            updates=updates,
        )


def join_words(words: Sequence[Word]) -> str:
    """Return the words as text, with spaces between them."""
    return " ".join(word.text for word in words)
