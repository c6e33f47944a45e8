"""What every engine shares: the language of each clip, its token cap, and texts that end at a limit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from src.data.audio import Waveform
from src.inference.engine_base import Decoded, DecodingResult, Engine
from src.inference.options import DecodingOptions
from src.inference.words import Vocabulary, Word
from src.utils.errors import ModelError

SECOND = np.zeros(16_000, dtype=np.float32)


class Endless(Engine):
    """Hears German, and writes one token without end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.given, self.caps = vocabulary, list[list[int]](), list[int]()

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        return audios

    def _generate(
        self, encoded: Any, given: list[list[int]], prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        self.given, self.caps = given, caps
        return [Decoded([*prefix, *[400] * cap]) for cap in caps]

    def _place(self, *_: Any) -> list[tuple[Word, ...]]:
        raise NotImplementedError

    def _detect(self, encoded: Any) -> list[tuple[str, float]]:
        return [("de", 0.9)] * len(encoded)

    def transcribe(self, *languages: str | None, samples: int = 16_000, **options: Any) -> list[DecodingResult]:
        audios = [np.zeros(samples, dtype=np.float32)] * len(languages)
        return self.decode(audios, audios, DecodingOptions(**options), languages=languages)


@pytest.fixture
def engine(base_vocabulary: Vocabulary) -> Endless:
    return Endless(base_vocabulary)


def test_a_row_s_language_comes_before_that_of_the_options_the_checkpoint_and_detection(engine: Endless) -> None:
    def spoken(**options: Any) -> list[str | None]:
        results = engine.transcribe("hi", None, **options)
        assert [given[1] for given in engine.given] == [engine.vocabulary.languages[r.language or ""] for r in results]
        return [result.language for result in results]

    assert spoken() == ["hi", "de"]
    engine.language = "ta"
    assert spoken() == ["hi", "ta"]
    assert spoken(language="Thai") == ["hi", "th"]
    with pytest.raises(ModelError, match="'xx'"):
        spoken(language="xx")


def test_cantonese_is_chinese_to_a_vocabulary_without_it(engine: Endless, caplog: pytest.LogCaptureFixture) -> None:
    engine.vocabulary._replaced.clear()
    with caplog.at_level(logging.INFO):
        assert [result.language for result in engine.transcribe("yue", "yue")] == ["zh", "zh"]
    assert len([record for record in caplog.records if "yue" in record.message]) == 1


def test_caps_follow_language_task_checkpoint_and_options(engine: Endless) -> None:
    def caps(*languages: str | None, **options: Any) -> list[int]:
        assert all(result.truncated for result in engine.transcribe(*languages, samples=32_000, **options))
        return engine.caps

    assert caps("en", "hi", "my") == [8 + 20, 8 + 85, 8 + 230]
    assert caps("hi", task="translate") == [8 + 20]
    assert caps("en", "my", max_tokens_per_sec=1.5) == [11, 11]
    engine.cap_rates = {"en": 15.0, "my": 20.0}
    assert caps("en", "my") == [8 + 30, 8 + 230]


def test_the_decoder_s_positions_are_a_limit_too(engine: Endless) -> None:
    (result,) = engine.transcribe("ka", samples=30 * 16_000)
    assert result.truncated
    assert len(result.tokens) == 448 - 4
    (forced,) = engine.transcribe("ka", samples=30 * 16_000, prefix="one two")
    assert len(forced.tokens) == 448 - 4


def test_english_has_ten_tokens_per_second(tiny_en: Any) -> None:
    engine = Endless(Vocabulary.of(tiny_en[1].tokenizer))
    assert engine.max_tokens_per_sec(None) == engine.max_tokens_per_sec("en") == 10
    engine.transcribe(None, samples=11_111)
    assert engine.caps == [8 + math.ceil(10 * 11_111 / 16_000)]
    with pytest.raises(ModelError, match="multilingual"):
        engine.detect([SECOND])


def test_names_of_special_tokens_in_a_prompt_or_a_prefix_are_text(engine: Endless) -> None:
    spelled = "<|endoftext|> one<|0.00|> <|startoftranscript|>"
    engine.transcribe("en", prompt=spelled, prefix=spelled)
    (given,) = engine.given
    special = [token for token in given if token >= engine.vocabulary.end]
    assert [engine.vocabulary._tokenizer.id_to_token(token) for token in special] == [
        "<|startofprev|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>",
    ]  # fmt: skip
    assert engine.vocabulary.decode(given) == f" {spelled}" * 2


def test_given_tokens_are_given_as_they_are(engine: Endless) -> None:
    tokens = tuple(token for char in "爸爸" for token in engine.vocabulary.encode(char, language="zh"))
    assert list(tokens) != engine.vocabulary.encode("爸爸", language="zh")
    (result,) = engine.transcribe("zh", prefix="爸爸", prefix_tokens=tokens)
    assert result.tokens[: len(tokens)] == tokens == tuple(engine.given[0][-len(tokens) :])


def test_given_text_has_the_space_of_its_language_and_all_its_symbols(engine: Endless) -> None:
    def prefix(language: str, text: str, **options: Any) -> str:
        engine.transcribe(language, prefix=text, **options)
        (given,) = engine.given
        return engine.vocabulary.decode(given)

    assert prefix("zh", "今天OK") == "今天OK"
    assert prefix("zh", "OK") == "OK"
    assert prefix("de", "OK") == prefix("zh", "OK", task="translate") == " OK"
    assert prefix("de", '"Na gut.') == ' "Na gut.'
    assert prefix("ja", "（笑）") == "（笑）"
    assert prefix("ja", "天気", prompt="明日の") == "明日の天気"


def test_a_prefix_that_fills_the_decoder_is_cut_and_the_result_says_so(engine: Endless) -> None:
    (result,) = engine.transcribe("ka", samples=12 * 16_000, prefix="ამინდის " * 200, prompt="before")
    assert result.truncated
    assert len(engine.given[0]) == 447
    assert len(result.tokens) == 444
