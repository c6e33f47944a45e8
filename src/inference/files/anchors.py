"""Anchors: what a recogniser hears of a recording, and the words that its transcript has in common with that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rapidfuzz.distance import Indel

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.files.segmentation import PAD_SEC
from src.inference.words import Word, shifted

APART_SEC = 0.3  # of silence: stretches of speech with it between them are heard again one by one
NEAR_WORDS, LONG_WORD = 8, 7


def hear(
    audio: Waveform,
    speech: Sequence[tuple[float, float]],
    transcribe: Callable[..., Iterable[Any]],
    language: str | None,
) -> tuple[list[Word], str | None]:
    """Transcribe a recording; stretches that its text leaves out once more, each between two silences by itself.

    `transcribe` is `BatchInference.transcribe_iter`.
    """
    known = {"array 0": language} if language else None
    (whole,) = transcribe([audio], word_timestamps=True, languages=known)
    language = whole.language or language
    joined: list[list[float]] = []
    for start, end in speech:
        if joined and start - joined[-1][1] < APART_SEC:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    again = [
        (max(0.0, start - PAD_SEC), end + PAD_SEC)
        for start, end in joined
        if any(min(end, gap.end_sec) - max(start, gap.start_sec) > (end - start) / 2 for gap in whole.uncovered)
    ]
    words = list(whole.words or ())
    clips = [audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] for start, end in again]
    known = {f"array {i}": language for i in range(len(clips))} if language else None
    parts = transcribe(clips, word_timestamps=True, languages=known) if clips else ()
    for (start, end), part in zip(again, parts, strict=True):
        words = [word for word in words if not start < (word.start_sec + word.end_sec) / 2 < end]
        words += shifted(part.words or (), start)
    return sorted(words, key=lambda word: word.start_sec), language


def match_words(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Return which words of two texts are the same, (index, index), ascending in both; empty words match nothing.

    They are a longest common subsequence, of which a word that is alone in agreeing is left out.
    """
    rows, columns = ([i for i, word in enumerate(words) if word] for words in (left, right))
    a, b = [left[i] for i in rows], [right[j] for j in columns]
    pairs = [(i + k, j + k) for i, j, size in Indel.opcodes(a, b).as_matching_blocks() for k in range(size)]
    pairs = [pair for at, pair in enumerate(pairs) if len(a) <= NEAR_WORDS or _has_company(pairs, at, a)]
    return [(rows[i], columns[j]) for i, j in pairs]


def _has_company(pairs: Sequence[tuple[int, int]], at: int, words: Sequence[str]) -> bool:
    """Whether a pair is a long word, or others that are as far apart in both texts lie near it."""
    row, column = pairs[at]
    near = [pairs[k] for k in range(max(0, at - NEAR_WORDS), min(len(pairs), at + NEAR_WORDS + 1)) if k != at]
    return len(words[row]) >= LONG_WORD or any(
        abs(i - row) <= NEAR_WORDS and abs((j - column) - (i - row)) <= 3 for i, j in near
    )
