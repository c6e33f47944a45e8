from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.evaluation.text import (
    NORMALIZERS,
    PLAIN,
    WHISPER_BASIC,
    WHISPER_ENGLISH,
    get_normalizer,
    whisper_normalizer_for,
)
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


def test_whisper_english_keeps_its_published_quirks() -> None:
    normalize = get_normalizer(WHISPER_ENGLISH)
    assert normalize("BOB'S one five nine") == "bob is 159"
    assert normalize("uh [noise] well-known") == "well known"
    assert normalize("hello...") == "hello ."


@given(text=st.text(max_size=20))
@pytest.mark.parametrize("name", NORMALIZERS)
def test_any_text_becomes_words_between_single_spaces(name: str, text: str) -> None:
    normalized = get_normalizer(name)(text)
    assert normalized == " ".join(normalized.split())


@given(text=st.text(max_size=20))
def test_plain_of_plain_is_itself(text: str) -> None:
    normalize = get_normalizer(PLAIN)
    assert normalize(normalize(text)) == normalize(text)
