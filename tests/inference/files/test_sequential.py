"""Windows of 30 s: the cuts of openai/whisper's `transcribe`, by hand and on real speech."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from src.data.audio import Waveform
from src.inference.files.segmentation import decode_windows, split_at_timestamps
from src.inference.files.transcribe import BatchInference
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.words import Word
from src.utils.config import InferenceConfig


class Letters:
    """A vocabulary of letters; times begin at 1,000, the end is 500."""

    end, timestamp_begin = 500, 1_000

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token < self.end)


def tokens(*parts: str | float) -> list[int]:
    """Text as letters, seconds as times."""
    found: list[int] = []
    for part in parts:
        found += [ord(c) for c in part] if isinstance(part, str) else [1_000 + round(part / 0.02)]
    return found


@pytest.mark.parametrize(
    ("given", "texts", "next_sec"),
    [
        (tokens(0.0, "one", 2.0, 2.0, "two", 5.0), [("one", 0.0, 2.0), ("two", 2.0, 5.0)], 30.0),  # ends whole
        (tokens(0.0, "one", 2.0, 2.4, "cut"), [("one", 0.0, 2.0)], 2.0),  # the next window hears "cut" again
        (tokens(0.0, "one", 2.0, 2.4, "two", 4.0, 4.0), [("one", 0.0, 2.0), ("two", 2.4, 4.0)], 4.0),
        (tokens(0.0, "all of it"), [("all of it", 0.0, 30.0)], 30.0),  # no second time: nothing to go by
        (tokens(0.0, "all of it", 7.0), [("all of it", 0.0, 7.0)], 30.0),
        (tokens("no times"), [("no times", 0.0, 30.0)], 30.0),
        (tokens(0.0, 0.0), [], 30.0),  # never stands still
        ([], [], 30.0),
    ],
)
def test_windows_are_split_and_advance_as_in_openai_whisper(
    given: list[int], texts: list[tuple[str, float, float]], next_sec: float
) -> None:
    found, end_sec = split_at_timestamps(given, Letters(), 30.0)  # type: ignore[arg-type]
    assert [(Letters().decode(t.tokens), t.start_sec, t.end_sec) for t in found] == texts
    assert end_sec == next_sec


class Windows:
    """An engine that hears a sentence and the beginning of another in each window, and keeps the prompts."""

    vocabulary = Letters()

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> None:
        return None

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        self.prompts.append(options.prompt)
        return [DecodingResult(" one cut", tuple(tokens(0.0, " one", 20.0, 21.0, " cut")), -0.1)]

    def align(self, *_: Any) -> list[tuple[Word, ...]]:
        return [(Word("one", 19.0, 24.0, 0.9),)]


def test_what_the_next_window_hears_again_is_no_context_and_no_word_reaches_into_it() -> None:
    engine, audio = Windows(), np.zeros(50 * 16_000, dtype=np.float32)
    found = list(
        decode_windows(
            engine,
            [audio],
            DecodingOptions(prompt="Before.", word_timestamps=True),
            InferenceConfig(),  # type: ignore[arg-type]
        )
    )
    assert engine.prompts == ["Before.", "Before. one", "Before. one one"]
    assert [(start_sec, end_sec) for _, start_sec, end_sec in found] == [(0.0, 20.0), (20.0, 40.0), (40.0, 50.0)]
    assert [part.words[0].end_sec for part, _, _ in found if part.words] == [20.0, 40.0, 50.0]


@pytest.mark.slow
def test_stock_weights_lose_and_double_nothing_over_windows(tiny_en: tuple[Any, Any], jfk: Waveform) -> None:
    pause = np.zeros(8_000, dtype=np.float32)
    long = np.concatenate([jfk, pause, jfk, pause, jfk, pause, jfk])  # 45.5 s
    model, processor = copy.deepcopy(tiny_en[0]), tiny_en[1]
    inference = BatchInference(model, processor)
    (result,) = inference.transcribe_iter([long], mode="sequential", word_timestamps=True)
    assert result.text is not None
    assert result.text.lower().count("fellow americans") == 4
    assert result.words is not None
    assert " ".join(word.text for word in result.words).split() == result.text.split()
    starts = [word.start_sec for word in result.words]
    assert starts == sorted(starts)
    assert result.words[-1].end_sec == pytest.approx(45.2, abs=0.8)
