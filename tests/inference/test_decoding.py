from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from src.data.audio import load_audio
from src.data.features import CONTEXT_SAMPLES, LogMel
from src.data.mel import padded_samples
from src.inference.decoding import decode, encode
from src.inference.options import DecodingOptions
from src.utils.errors import ModelError

pytestmark = pytest.mark.slow
JFK = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."


def full_mel(audio: np.ndarray) -> torch.Tensor:
    padded = torch.zeros(1, CONTEXT_SAMPLES)
    padded[0, : len(audio)] = torch.from_numpy(audio)
    return LogMel()(padded)


@pytest.fixture(scope="module")
def clips(sample: list, jfk: np.ndarray) -> list[np.ndarray]:
    return [jfk, *(load_audio(u.audio) for u in sample[400:500:25])]


def test_greedy_gives_the_tokens_of_generate(tiny_en: tuple[Any, Any], clips: list[np.ndarray]) -> None:
    model, processor = tiny_en
    for clip, result in zip(clips, decode(model, processor, clips, DecodingOptions()), strict=True):
        expected = model.generate(full_mel(clip))[0].tolist()
        text = [t for t in expected if t < model.generation_config.eos_token_id]
        assert list(result.tokens) == text


def test_multilingual_greedy_gives_the_tokens_of_generate(base: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = base
    result = decode(model, processor, [jfk], DecodingOptions(language="en"))[0]
    expected = model.generate(full_mel(jfk), language="en", task="transcribe")[0].tolist()
    assert list(result.tokens) == [t for t in expected if t < model.generation_config.eos_token_id]


def test_language_is_detected_where_none_is_set(base: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = base
    options = DecodingOptions()
    assert decode(model, processor, [jfk], options)[0].text == decode(
        model, processor, [jfk], replace(options, language="en")
    )[0].text  # fmt: skip


def test_log_probability_is_that_of_a_teacher_forced_pass(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    result = decode(model, processor, [jfk], DecodingOptions())[0]
    assert result.text == JFK
    sequence = torch.tensor([[50257, 50362, *result.tokens, 50256]])
    with torch.no_grad():
        logits = model(full_mel(jfk), decoder_input_ids=sequence[:, :-1]).logits[0, 1:]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    logits[0, model.generation_config.begin_suppress_tokens] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, sequence[0, 2:, None]).mean()
    assert result.avg_logprob == pytest.approx(float(expected), abs=1e-4)


def test_a_batch_gives_what_single_clips_give(tiny_en: tuple[Any, Any], clips: list[np.ndarray]) -> None:
    model, processor = tiny_en
    together = decode(model, processor, clips, DecodingOptions())
    alone = [decode(model, processor, [clip], DecodingOptions())[0] for clip in clips]
    assert [r.text for r in together] == [r.text for r in alone]


def test_words_cover_the_text_in_order_and_at_their_places(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    words = decode(model, processor, [jfk], DecodingOptions(word_timestamps=True))[0].words
    assert words is not None
    assert " ".join(word.text for word in words) == JFK
    times = [t for word in words for t in (word.start_sec, word.end_sec)]
    assert times == sorted(times)
    assert 10.0 < times[-1] <= 11.0
    ends = {word.text: word.end_sec for word in words}
    assert ends["Americans"] == pytest.approx(2.3, abs=0.25)  # by ear; a pause follows
    assert all(0 < word.probability <= 1 for word in words)


def test_prefix_begins_the_text_and_the_rest_continues_it(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    result = decode(model, processor, [jfk], DecodingOptions(prefix="And so my fellow Americans"))[0]
    assert result.text.startswith("And so my fellow Americans")
    assert result.text.endswith("do for your country.")


def test_words_of_a_forced_prefix_have_the_times_that_they_have_without(
    tiny_en: tuple[Any, Any], jfk: np.ndarray
) -> None:
    model, processor = tiny_en
    free = decode(model, processor, [jfk], DecodingOptions(word_timestamps=True))[0]
    forced = decode(model, processor, [jfk], DecodingOptions(word_timestamps=True, prefix="And so my fellow"))[0]
    for expected, found in zip(free.words or (), forced.words or (), strict=True):
        assert (found.text, found.start_sec, found.end_sec) == (expected.text, expected.start_sec, expected.end_sec)
        assert found.probability == pytest.approx(expected.probability, abs=1e-4)


def test_timestamps_are_pairs_that_ascend(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    result = decode(model, processor, [jfk], DecodingOptions(timestamps=True))[0]
    begin = model.generation_config.no_timestamps_token_id + 1
    times = [token for token in result.tokens if token >= begin]
    assert times == sorted(times)
    assert result.tokens[0] == begin
    assert "country" in result.text


def test_a_temperature_draws_the_same_text_from_the_same_seed(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    texts = [
        decode(model, processor, [jfk], DecodingOptions(temperature=1.0, seed=seed))[0].tokens for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_silence_is_told_by_the_token_for_it(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    clips = [jfk, np.zeros(48_000, dtype=np.float32)]
    speech, silence = decode(model, processor, clips, DecodingOptions(no_speech=True))
    assert (speech.no_speech_prob or 0) < 0.1 < 0.8 < (silence.no_speech_prob or 0)


def test_prompt_is_not_part_of_the_text(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    result = decode(model, processor, [jfk], DecodingOptions(prompt="The inaugural address of the president."))[0]
    assert "inaugural" not in result.text
    assert "country" in result.text


def test_tokens_are_capped_by_duration(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"  # untrained for it: it repeats itself until it is stopped
    result = decode(model, processor, [jfk[:16_000]], DecodingOptions(max_tokens_per_sec=4))[0]
    assert len(result.tokens) <= 8 + 4


def test_beam_search_decodes_own_length(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    assert decode(model, processor, [jfk], DecodingOptions(num_beams=3))[0].text == JFK
    given = DecodingOptions(num_beams=3, prefix="And so my fellow", prompt="The inaugural address of the president.")
    continued = decode(model, processor, [jfk], given)[0]
    assert continued.text.startswith("And so my fellow Americans")
    assert continued.avg_logprob < 0
    with pytest.raises(ModelError, match="one of them"):
        DecodingOptions(num_beams=3, temperature=0.5)


def test_encoder_sees_own_length_and_its_pause(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, _ = tiny_en
    assert encode(model, [jfk], 0.5).last_hidden_state.shape[1] == 1500
    model.audio_context = "dynamic"
    assert encode(model, [jfk], 0.5).last_hidden_state.shape[1] == 575  # 11.5 s x 50
    assert padded_samples(1) == 1_600
    assert padded_samples(CONTEXT_SAMPLES + 1) == CONTEXT_SAMPLES


def test_bad_requests_are_refused(tiny_en: tuple[Any, Any], base: tuple[Any, Any], jfk: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"31\.0 s"):
        decode(*tiny_en, [np.zeros(31 * 16_000, dtype=np.float32)], DecodingOptions())
    with pytest.raises(ModelError, match="empty batch"):
        decode(*tiny_en, [], DecodingOptions())
    with pytest.raises(ModelError, match="English-only"):
        decode(*tiny_en, [jfk], DecodingOptions(language="de"))
    with pytest.raises(ModelError, match="unknown language 'xx'"):
        decode(*base, [jfk], DecodingOptions(language="xx"))
