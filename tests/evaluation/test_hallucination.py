from __future__ import annotations

import pytest

from src.evaluation.edits import word_counts
from src.evaluation.hallucination import empty_outputs, invented_words, is_loop
from src.evaluation.text import PLAIN

LOOP = "and the " * 8


@pytest.mark.parametrize(
    ("reference", "hypothesis", "duration_sec", "num_tokens", "expected"),
    [
        ("the cat sat", "the cat sat", 2.0, 4, False),
        ("the cat", LOOP, 10.0, 16, True),
        ("the cat", LOOP, None, None, True),
        (LOOP, LOOP, 10.0, 16, False),  # he really said so
        ("no", "no no no no", 2.0, 4, False),  # as people do
        ("no", "no no no no no no", 0.5, 6, True),  # twelve a second
        ("the cat", "a b c d e f g h", 1.0, 17, True),  # more tokens than anybody says
        ("the cat", "a b c d e f g h", 1.0, 16, False),
        ("the cat", "", 1.0, 0, False),
        ("", "", 1.0, 0, False),
    ],
)
def test_loops_and_impossible_rates_are_told_from_speech(
    reference: str, hypothesis: str, duration_sec: float | None, num_tokens: int | None, expected: bool
) -> None:
    assert is_loop(reference, hypothesis, duration_sec=duration_sec, num_tokens=num_tokens) is expected


def test_words_on_silence_and_silence_on_words_are_counted() -> None:
    counts = word_counts(["the cat", "", "", "a dog"], ["the cat", "thank you", "", "!"], PLAIN)
    assert invented_words(counts) == (2, 2)
    assert empty_outputs(counts) == 1
