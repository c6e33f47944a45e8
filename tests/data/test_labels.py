from __future__ import annotations

from typing import Any

import pytest
import torch

from src.data.labels import IGNORE_INDEX, MAX_LABEL_TOKENS, LabelEncoder, apply_case, resolve_case
from src.utils.errors import DataError


def fed_by_generate(model: Any, **options: Any) -> list[int]:
    """The tokens that `generate` gives the decoder before the first one of its own."""
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"])

    handle = model.model.decoder.register_forward_pre_hook(record, with_kwargs=True)
    model.generate(torch.zeros(1, model.config.num_mel_bins, 3000), max_new_tokens=1, **options)
    handle.remove()
    return seen[-1][0].tolist()


@pytest.mark.slow
def test_english_prefix_is_what_generate_feeds(tiny_en: tuple[Any, Any]) -> None:
    model, processor = tiny_en
    prefix = LabelEncoder(processor.tokenizer).prefix
    assert prefix == fed_by_generate(model) == [50257, 50362]


@pytest.mark.slow
def test_multilingual_prefix_is_what_generate_feeds(base: tuple[Any, Any]) -> None:
    model, processor = base
    prefix = LabelEncoder(processor.tokenizer, language="de", task="transcribe").prefix
    assert prefix == fed_by_generate(model, language="de", task="transcribe") == [50258, 50261, 50359, 50363]


@pytest.mark.slow
def test_multilingual_without_or_with_unknown_language_is_refused(base: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"model\.language"):
        LabelEncoder(base[1].tokenizer)
    with pytest.raises(DataError, match=r"<\|xx\|>"):
        LabelEncoder(base[1].tokenizer, language="xx")


@pytest.mark.slow
def test_label_has_one_start_token_a_leading_space_and_its_end(tiny_en: tuple[Any, Any]) -> None:
    tokenizer = tiny_en[1].tokenizer
    encoded = LabelEncoder(tokenizer).encode("hello world")
    assert encoded.decoder_input_ids[:2] == (50257, 50362)
    assert encoded.decoder_input_ids.count(50257) == 1
    assert tokenizer.decode(encoded.decoder_input_ids[2:]) == " hello world"
    assert encoded.labels[0] == IGNORE_INDEX
    assert encoded.labels[1:] == (*encoded.decoder_input_ids[2:], 50256)


@pytest.mark.slow
def test_more_than_448_tokens_are_refused(tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(tiny_en[1].tokenizer)
    fits = encoder.encode("a " * (MAX_LABEL_TOKENS - 3))
    assert len(fits.labels) == MAX_LABEL_TOKENS - 1
    with pytest.raises(DataError, match="449 tokens"):
        encoder.encode("a " * (MAX_LABEL_TOKENS - 2))


def test_a_corpus_in_capitals_is_recased_and_others_are_kept() -> None:
    assert resolve_case(["HELLO THERE", "I AM"], "auto") == "sentence"
    assert resolve_case(["Hello NASA", "I am"], "auto") == "keep"
    assert resolve_case(["HELLO"], "keep") == "keep"
    assert resolve_case(["你好"], "auto") == "keep"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("WHERE AM I", "Where am I."), ("I'M HERE AND I KNOW", "I'm here and I know."), ("WHY?", "Why?"), ("", "")],
)
def test_sentence_case(text: str, expected: str) -> None:
    assert apply_case(text, "sentence") == expected
