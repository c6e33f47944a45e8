from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.evaluation.text import (
    NORMALIZERS,
    PLAIN,
    WHISPER_BASIC,
    WHISPER_ENGLISH,
    align_words,
    get_normalizer,
    whisper_normalizer_for,
    word_counts,
)
from src.utils.errors import ConfigError

few_words = st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PLAIN, "Well-known.", "well known"),
        (PLAIN, "BOB'S dog, isn't it?", "bob's dog isn't it"),
        (PLAIN, "the ‘quoted’ word’s", "the quoted word's"),
        (PLAIN, "  spaces\n\tand  tabs ", "spaces and tabs"),
        (PLAIN, "ÉTÉ, naïve — 5 €", "été naïve 5"),
        (PLAIN, "你好，世界", "你好 世界"),
        (PLAIN, "...", ""),
        (WHISPER_ENGLISH, "The colour of Mr. Smith's centre", "the color of mister smith is center"),
        (WHISPER_ENGLISH, "BOB'S one five nine", "bob is 159"),  # its published quirks
        (WHISPER_ENGLISH, "uh [noise] well-known", "well known"),
        (WHISPER_ENGLISH, "hello...", "hello ."),
        (WHISPER_BASIC, "Grüße, Welt!", "grüße welt"),
    ],
)
def test_texts_as_each_normaliser_reads_them(name: str, text: str, expected: str) -> None:
    assert get_normalizer(name)(text) == expected


def test_language_chooses_whispers_normaliser() -> None:
    assert whisper_normalizer_for("en") == whisper_normalizer_for(None) == WHISPER_ENGLISH
    assert whisper_normalizer_for("de") == WHISPER_BASIC
    with pytest.raises(ConfigError, match="'plain-v1'"):
        get_normalizer("plain")


@given(text=st.text(max_size=20))
@pytest.mark.parametrize("name", NORMALIZERS)
def test_any_text_becomes_words_between_single_spaces(name: str, text: str) -> None:
    normalized = get_normalizer(name)(text)
    assert normalized == " ".join(normalized.split())
    if name == PLAIN:
        assert get_normalizer(name)(normalized) == normalized


def test_an_alignment_done_by_hand() -> None:
    steps = align_words("The cat sat on the big mat.", "a cat sat the big mat now", PLAIN)
    assert [(step.edit[0], step.reference, step.hypothesis) for step in steps] == [
        ("s", "the", "a"), ("e", "cat", "cat"), ("e", "sat", "sat"), ("d", "on", None), ("e", "the", "the"),
        ("e", "big", "big"), ("e", "mat", "mat"), ("i", None, "now"),
    ]  # fmt: skip


@given(few_words, few_words)
def test_an_alignment_has_the_counts_of_its_row_and_both_texts(reference: str, hypothesis: str) -> None:
    steps = align_words(reference, hypothesis, PLAIN)
    (counts,) = word_counts([reference], [hypothesis], PLAIN)
    edits = [step.edit for step in steps]
    found = (counts.substitutions, counts.deletions, counts.insertions, counts.hits)
    assert tuple(edits.count(edit) for edit in ("substitute", "delete", "insert", "equal")) == found
    assert " ".join(step.reference for step in steps if step.reference is not None) == reference
    assert " ".join(step.hypothesis for step in steps if step.hypothesis is not None) == hypothesis
    assert counts.hypothesis_words == len(hypothesis.split())
