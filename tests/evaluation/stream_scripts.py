"""Streams and sessions written by hand, for the tests of what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.data.audio import SAMPLE_RATE
from src.evaluation.streams import SpeechStream, SpokenWord, StreamClip
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingResult
from src.inference.words import Word

WORD_SEC = 0.5


def spoken(*texts: str, ids: Sequence[str] = (), no_speech: Sequence[tuple[float, float]] = ()) -> SpeechStream:
    """Clips of words of half a second each, with a pause of a second after each clip."""
    clips, words = [], []
    at = 0.0
    for index, text in enumerate(texts):
        start = at
        for word in text.split():
            words.append(SpokenWord(word, at, at + WORD_SEC, index))
            at += WORD_SEC
        clips.append(StreamClip(ids[index] if ids else f"clip-{index}", text, start, at))
        at += 1.0
    audio = np.zeros(round(at * SAMPLE_RATE), dtype=np.float32)
    return SpeechStream("by hand", audio, tuple(clips), tuple(words), tuple(no_speech))


def event(kind: str, text: str, audio_sec: float, clock_sec: float, *, at: float = 0.0) -> Event:
    """An event whose words follow each other from `at` on."""
    words = [Word(w, at + WORD_SEC * i, at + WORD_SEC * (i + 1), 0.9) for i, w in enumerate(text.split())]
    return Event(kind, tuple(words), text, audio_sec, clock_sec, sequence=0)  # type: ignore[arg-type]


def result_of(*events: Event, compute_sec: float = 1.0) -> StreamingResult:
    return StreamingResult(
        events, audio_sec=4.0, compute_sec=compute_sec, longest_update_sec=compute_sec / 2, updates=3
    )
