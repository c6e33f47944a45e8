from __future__ import annotations

import pytest

from src.evaluation.text import PLAIN, WHISPER_BASIC, WHISPER_ENGLISH, get_normalizer, whisper_normalizer_for
from src.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Well-known.", "well known"),
        ("BOB'S dog, isn't it?", "bob's dog isn't it"),
        ("the ‘quoted’ word’s", "the quoted word's"),
        ("  spaces\n\tand  tabs ", "spaces and tabs"),
        ("ÉTÉ, naïve — 5 €", "été naïve 5"),
        ("你好，世界", "你好 世界"),
        ("...", ""),
    ],
)
def test_plain_changes_case_and_punctuation_only(text: str, expected: str) -> None:
    assert get_normalizer(PLAIN)(text) == expected


def test_whisper_english_spells_american_and_joins_contractions() -> None:
    normalize = get_normalizer(WHISPER_ENGLISH)
    assert normalize("The colour of Mr. Smith's centre") == "the color of mister smith is center"


def test_language_chooses_whispers_normaliser() -> None:
    assert whisper_normalizer_for("en") == whisper_normalizer_for(None) == WHISPER_ENGLISH
    assert whisper_normalizer_for("de") == WHISPER_BASIC
    assert get_normalizer(WHISPER_BASIC)("Grüße, Welt!") == "grüße welt"


def test_unknown_normaliser_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'plain-v1'"):
        get_normalizer("plain")
