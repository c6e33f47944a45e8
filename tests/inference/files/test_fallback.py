"""When a text is decoded again, and what is taken for silence; the engine is scripted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from src.data.audio import Waveform
from src.inference.engines import decode_with_fallback
from src.inference.options import DecodingOptions, DecodingResult
from src.utils.config import InferenceConfig

GOOD = DecodingResult("Ask not what your country can do for you.", (1, 2), -0.3, no_speech_prob=0.01)
LOOP = replace(GOOD, text="no no no " * 40)
GUESS = replace(GOOD, text="You can see it.", avg_logprob=-1.5)
RULES = InferenceConfig(temperatures=(0.0, 0.4, 0.8), logprob_threshold=-1.0)


class Scripted:
    """Gives, for a clip of k samples, what the script has for it at each temperature."""

    def __init__(self, script: dict[int, list[DecodingResult]]) -> None:
        self._script = script
        self.asked: list[tuple[float, int, list[int]]] = []

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> None:
        return None

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        sizes = [len(audio) for audio in audios]
        self.asked.append((options.temperature, options.num_beams, sizes))
        step = RULES.temperatures.index(options.temperature)
        return [replace(self._script[size][step], temperature=options.temperature) for size in sizes]


def clips(*sizes: int) -> list[Waveform]:
    return [np.zeros(size, dtype=np.float32) for size in sizes]


def run(engine: Scripted, *sizes: int, rules: InferenceConfig = RULES, vad: Any = None) -> list[DecodingResult]:
    return decode_with_fallback(engine, clips(*sizes), DecodingOptions(num_beams=3), rules, vad=vad)  # type: ignore[arg-type]


def test_only_what_fails_is_decoded_again_and_without_beams() -> None:
    engine = Scripted({1: [GOOD], 2: [LOOP, GOOD], 3: [GUESS, LOOP, GOOD]})
    results = run(engine, 1, 2, 3)
    assert engine.asked == [(0.0, 3, [1, 2, 3]), (0.4, 1, [2, 3]), (0.8, 1, [3])]
    assert [result.temperature for result in results] == [0.0, 0.4, 0.8]
    assert {result.text for result in results} == {GOOD.text}


def test_the_last_temperature_is_taken_as_it_is() -> None:
    assert run(Scripted({1: [LOOP, LOOP, LOOP]}), 1)[0].text == LOOP.text


def test_without_thresholds_nothing_is_decoded_twice() -> None:
    rules = InferenceConfig(temperatures=RULES.temperatures, compression_ratio_threshold=None, logprob_threshold=None)
    engine = Scripted({1: [LOOP], 2: [GUESS]})
    run(engine, 1, 2, rules=rules)
    assert len(engine.asked) == 1


def test_a_guess_on_likely_silence_has_no_text_and_costs_no_second_decoding() -> None:
    engine = Scripted({1: [replace(GUESS, no_speech_prob=0.9)], 2: [replace(GOOD, no_speech_prob=0.9)]})
    silent, confident = run(engine, 1, 2)
    assert (silent.text, silent.tokens) == ("", ())
    assert confident.text == GOOD.text  # the model trusts it
    assert len(engine.asked) == 1


@pytest.mark.parametrize(("speech", "text"), [([], ""), (["a stretch"], GOOD.text)])
def test_the_detector_decides_where_the_model_doubts(speech: list[str], text: str) -> None:
    heard: list[int] = []

    def segments(audios: Sequence[Waveform]) -> list[list[str]]:
        heard.extend(len(audio) for audio in audios)
        return [speech for _ in audios]

    engine = Scripted({1: [GOOD], 2: [replace(GOOD, no_speech_prob=0.5)]})
    sure, doubtful = run(engine, 1, 2, vad=SimpleNamespace(speech_segments_batch=segments))
    assert heard == [2]
    assert (sure.text, doubtful.text) == (GOOD.text, text)


def test_a_guess_without_speech_is_not_decoded_again() -> None:
    engine = Scripted({1: [replace(GUESS, no_speech_prob=0.5), GOOD]})  # less sure than `no_speech_threshold`
    (result,) = run(engine, 1, vad=SimpleNamespace(speech_segments_batch=lambda audios: [[] for _ in audios]))
    assert result.text == ""
    assert len(engine.asked) == 1
