from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from src.data.audio import load_audio
from src.data.labels import IGNORE_INDEX, MAX_LABEL_TOKENS, LabelEncoder, TimedTokens, apply_case, resolve_case
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import Utterance
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
def test_prefixes_are_what_generate_feeds(tiny_en: tuple[Any, Any], base: tuple[Any, Any]) -> None:
    english = LabelEncoder(tiny_en[1].tokenizer)
    assert english.prefix == fed_by_generate(tiny_en[0]) == [50257, 50362]
    assert list(english.prefix_for(timestamps=True)) == fed_by_generate(tiny_en[0], return_timestamps=True) == [50257]
    spoken = {"language": "de", "task": "transcribe"}
    german = LabelEncoder(base[1].tokenizer, **spoken)
    assert german.prefix == fed_by_generate(base[0], **spoken) == [50258, 50261, 50359, 50363]
    times = fed_by_generate(base[0], return_timestamps=True, **spoken)
    assert list(german.prefix_for(timestamps=True)) == times == [50258, 50261, 50359]


@pytest.mark.slow
def test_multilingual_without_or_with_unknown_language_is_refused(base: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"model\.language"):
        LabelEncoder(base[1].tokenizer).encode("hello")
    with pytest.raises(DataError, match="xx"):
        LabelEncoder(base[1].tokenizer, language="xx")


@pytest.mark.slow
def test_label_has_one_start_token_a_leading_space_its_end_and_448_tokens_at_most(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    encoded = encoder.encode("hello world")
    assert encoded.decoder_input_ids[:2] == (50257, 50362)
    assert _tiny_en[1].tokenizer.decode(encoded.decoder_input_ids[2:]) == " hello world"
    assert encoded.labels == (IGNORE_INDEX, *encoded.decoder_input_ids[2:], 50256)
    assert len(encoder.encode("a " * (MAX_LABEL_TOKENS - 3)).labels) == MAX_LABEL_TOKENS - 1
    with pytest.raises(DataError, match="449 tokens"):
        encoder.encode("a " * (MAX_LABEL_TOKENS - 2))


@pytest.mark.slow
def test_a_text_with_times_is_written_as_generate_writes_it(tiny_en: tuple[Any, Any], sample: list[Utterance]) -> None:
    model, processor = tiny_en
    encoder = LabelEncoder(processor.tokenizer)
    pause = np.zeros(12_800, np.float32)
    audio = np.concatenate([load_audio(SAMPLE_CLIP), pause, load_audio(sample[0].audio)])
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    written = model.generate(features, return_timestamps=True)[0].tolist()
    text = processor.tokenizer.decode(written, decode_with_timestamps=True)
    segments = re.findall(r"<\|([\d.]+)\|>([^<]+)<\|([\d.]+)\|>", text)
    assert len(segments) >= 2  # some of them without a pause between, some with one
    parts = [TimedTokens(encoder.tokenize(said), float(start), float(end)) for start, said, end in segments]
    label = encoder.timed_label(parts)
    assert label.labels == (*written, encoder.end_token)
    assert label.decoder_input_ids == (50257, *written)


@pytest.mark.slow
def test_times_go_in_steps_of_an_encoder_position_up_to_30_s(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    label = encoder.timed_label([TimedTokens((1,), 0.0, 3.735), TimedTokens((2,), 4.11, 30.0)])
    assert label.labels == (50363, 1, 50363 + 187, 50363 + 206, 2, 50363 + 1500, 50256)  # 3.74 s, 4.12 s
    with pytest.raises(DataError, match=r"30\.02 s"):
        encoder.timed_label([TimedTokens((1,), 0.0, 30.02)])


@pytest.mark.slow
def test_a_prompt_is_cut_to_its_end_and_to_the_room_that_the_label_leaves(_tiny_en: tuple[Any, Any]) -> None:
    encoder = LabelEncoder(_tiny_en[1].tokenizer)
    before = tuple(range(1000, 1400))
    for tokens, kept in ((10, 223), (300, 448 - 303 - 1), (443, 1), (444, 0), (445, 0)):
        label = encoder.label([7] * tokens, previous=before)
        prompt = [50360, *before[-kept:]] if kept else []
        assert list(label.decoder_input_ids) == [*prompt, *encoder.prefix, *[7] * tokens]
        assert len(label.labels) + 1 == len(prompt) + 3 + tokens <= MAX_LABEL_TOKENS
        assert label.labels[-tokens - 1 :] == (*[7] * tokens, 50256)
        assert set(label.labels[: -tokens - 1]) == {IGNORE_INDEX}


@pytest.mark.parametrize(
    ("texts", "asked", "case"),
    [(["HELLO THERE", "I AM"], "auto", "sentence"), (["Hello NASA", "I am"], "auto", "keep"),
     (["HELLO"], "keep", "keep"), (["你好"], "auto", "keep")],
)  # fmt: skip
def test_a_corpus_in_capitals_is_recased_and_others_are_kept(texts: list[str], asked: Any, case: str) -> None:
    assert resolve_case(texts, asked) == case


@pytest.mark.parametrize(
    ("text", "expected"),
    [("WHERE AM I", "Where am I."), ("I'M HERE AND I KNOW", "I'm here and I know."), ("WHY?", "Why?"), ("", "")],
)
def test_sentence_case(text: str, expected: str) -> None:
    assert apply_case(text, "sentence") == expected
