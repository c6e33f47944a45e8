"""Speech that a text leaves out shows in the times of its words, whatever the language and the speaker's pace."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from src.data.vad import SpeechSegment
from src.inference.coverage import Uncovered, uncovered_speech
from src.inference.words import Word


def words(*times: tuple[float, float], tokens: int = 1) -> list[Word]:
    return [Word("x", start, end, tokens=tokens) for start, end in times]


def evenly(until_sec: float, *, each_sec: float, from_sec: float = 0.0) -> list[tuple[float, float]]:
    count = round((until_sec - from_sec) / each_sec)
    return [(from_sec + i * each_sec, from_sec + (i + 1) * each_sec) for i in range(count)]


SPEECH = [SpeechSegment(0.0, 10.0), SpeechSegment(12.0, 20.0)]


@pytest.mark.parametrize(
    ("times", "skipped", "rest"),
    [
        ([*evenly(10.0, each_sec=0.4), (10.0, 12.4), *evenly(20.0, each_sec=0.4, from_sec=12.4)], False, False),
        (evenly(20.0, each_sec=0.5), False, False),  # slow, and the pause is no speech
        (evenly(19.3, each_sec=0.4), False, False),  # what is left is no word
        (evenly(10.0, each_sec=0.4), False, True),  # stops at the pause
        ([*evenly(4.0, each_sec=0.4), (4.0, 12.5), *evenly(20.0, each_sec=0.4, from_sec=12.5)], True, False),  # a word
        ([*evenly(4.0, each_sec=0.4), *evenly(20.0, each_sec=2.0, from_sec=4.0)], True, False),  # several
        ([(0.0, 16.0)], True, True),
        ([], False, True),
    ],
)
def test_what_words_do_not_explain_is_found(times: Sequence[tuple[float, float]], skipped: bool, rest: bool) -> None:
    found = uncovered_speech(words(*times), SPEECH, tokens_per_sec=4.0)
    assert (found.skipped is not None, found.rest is not None) == (skipped, rest)
    if found.rest is not None:
        assert found.rest.end_sec == 20.0
    if found.skipped is not None:
        assert found.skipped.start_sec <= 12.0 < found.skipped.end_sec


def test_words_of_many_tokens_and_languages_of_few_take_longer() -> None:
    times = evenly(20.0, each_sec=2.0)
    assert uncovered_speech(words(*times, tokens=4), SPEECH, tokens_per_sec=4.0) == Uncovered()
    assert uncovered_speech(words(*times, tokens=4), SPEECH, tokens_per_sec=17.0).skipped is not None
    assert uncovered_speech(words(*times), SPEECH, tokens_per_sec=1.0) == Uncovered()


def test_silence_is_not_left_out() -> None:
    assert uncovered_speech((), (), tokens_per_sec=4.0) == Uncovered()
    assert uncovered_speech(words((0.0, 30.0)), (), tokens_per_sec=4.0) == Uncovered()
