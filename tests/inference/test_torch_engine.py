"""Greedy decoding against `generate` and a teacher-forced pass, and what each option does to the text."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from src.data.audio import load_audio
from src.data.features import CONTEXT_SAMPLES, LogMel
from src.inference.engine_base import DecodingResult
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode, encode
from src.models.dynamic_context import DynamicWhisper
from src.utils.errors import ModelError

pytestmark = pytest.mark.slow
JFK = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."
Say = Callable[..., DecodingResult]


def full_mel(audio: np.ndarray) -> torch.Tensor:
    padded = torch.zeros(1, CONTEXT_SAMPLES)
    padded[0, : len(audio)] = torch.from_numpy(audio)
    return LogMel()(padded)


@pytest.fixture(scope="module")
def clips(sample: list, jfk: np.ndarray) -> list[np.ndarray]:
    return [jfk, *(load_audio(u.audio) for u in sample[400:500:34])]


@pytest.fixture
def say(tiny_en: Any, jfk: np.ndarray) -> Say:
    return lambda **options: decode(*tiny_en, [jfk], DecodingOptions(**options))[0]


def test_greedy_gives_the_tokens_of_generate_in_any_batch(tiny_en: Any, clips: list[np.ndarray]) -> None:
    model, processor = tiny_en
    together = decode(model, processor, clips, DecodingOptions(word_timestamps=True))
    for clip, result in zip(clips, together, strict=True):
        expected = model.generate(full_mel(clip))[0].tolist()
        assert list(result.tokens) == [t for t in expected if t < model.generation_config.eos_token_id]
        assert decode(model, processor, [clip], DecodingOptions())[0].text == result.text
    padded = pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    lengths = [len(clip) for clip in clips]
    assert decode(model, processor, padded, DecodingOptions(word_timestamps=True), lengths=lengths) == together


def test_a_multilingual_model_gives_the_tokens_of_generate_in_the_language_it_hears(base: Any, jfk: np.ndarray) -> None:
    model, processor = base
    expected = model.generate(full_mel(jfk), language="en", task="transcribe")[0].tolist()
    for language in ("en", None):
        (result,) = decode(model, processor, [jfk], DecodingOptions(language=language))
        assert list(result.tokens) == [t for t in expected if t < model.generation_config.eos_token_id]
        assert result.language == "en"
    with pytest.raises(ModelError, match="'xx'"):
        decode(*base, [jfk], DecodingOptions(language="xx"))


def test_log_probability_is_that_of_a_teacher_forced_pass(tiny_en: Any, jfk: np.ndarray, say: Say) -> None:
    model, _ = tiny_en
    result = say()
    assert result.text == JFK
    sequence = torch.tensor([[50257, 50362, *result.tokens, 50256]])
    with torch.no_grad():
        logits = model(full_mel(jfk), decoder_input_ids=sequence[:, :-1]).logits[0, 1:]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    logits[0, model.generation_config.begin_suppress_tokens] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, sequence[0, 2:, None]).mean()
    assert result.avg_logprob == pytest.approx(float(expected), abs=1e-3)


def test_words_cover_the_text_also_that_of_a_forced_beginning(say: Say) -> None:
    words = say(word_timestamps=True).words or ()
    assert " ".join(word.text for word in words) == JFK
    times = [t for word in words for t in (word.start_sec, word.end_sec)]
    assert times == sorted(times)
    assert 10.0 < times[-1] <= 11.0
    assert words[4].end_sec == pytest.approx(2.3, abs=0.25)  # Americans: by ear; a pause follows
    assert all(0 < word.probability <= 1 and word.tokens for word in words)
    forced = say(word_timestamps=True, prefix="And so my fellow").words or ()
    assert [replace(word, probability=0.0) for word in forced] == [replace(word, probability=0.0) for word in words]
    assert [word.probability for word in forced] == pytest.approx([word.probability for word in words], abs=1e-3)


def test_timestamps_ascend_and_a_temperature_draws_the_same_text_again(tiny_en: Any, say: Say) -> None:
    result = say(timestamps=True)
    begin = tiny_en[0].generation_config.no_timestamps_token_id + 1
    times = [token for token in result.tokens if token >= begin]
    assert times == sorted(times)
    assert result.tokens[0] == begin
    first, again = (say(temperature=1.0).tokens for _ in range(2))
    assert first == again != say().tokens


def test_silence_has_the_token_for_it_and_a_prompt_is_not_part_of_the_text(tiny_en: Any, jfk: np.ndarray) -> None:
    options = DecodingOptions(no_speech=True, prompt="The inaugural address of the president.")
    speech, silence = decode(*tiny_en, [jfk, np.zeros(48_000, dtype=np.float32)], options)
    assert (speech.no_speech_prob or 0) < 0.1 < 0.8 < (silence.no_speech_prob or 0)
    assert "inaugural" not in speech.text


def test_beams_go_on_from_a_forced_beginning(say: Say) -> None:
    assert say(num_beams=3).text == JFK
    continued = say(num_beams=3, prefix="And so my fellow", prompt="The inaugural address of the president.")
    assert continued.text.startswith("And so my fellow Americans")
    assert continued.avg_logprob < 0
    with pytest.raises(ModelError, match=r"3 at temperature 0\.5"):
        DecodingOptions(num_beams=3, temperature=0.5)


def test_a_short_clip_of_a_model_at_own_length_has_few_tokens(tiny_en: Any, jfk: np.ndarray) -> None:
    model, processor = tiny_en
    assert encode(model, [jfk], 0.5).last_hidden_state.shape[1] == 1500
    model.audio_context = "dynamic"  # untrained for it: it repeats itself until it is stopped
    assert len(decode(model, processor, [jfk[:16_000]], DecodingOptions(max_tokens_per_sec=4))[0].tokens) <= 8 + 4


def test_bad_requests_are_refused(tiny_en: Any) -> None:
    for samples, language, named in (([31 * 16_000], None, r"31\.0 s"), ([], None, "empty"), ([16_000], "de", "'de'")):
        with pytest.raises(ModelError, match=named):
            decode(*tiny_en, [np.zeros(n, np.float32) for n in samples], DecodingOptions(language=language))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_threads_may_share_a_model(untrained: DynamicWhisper, tiny_en: Any, num_beams: int) -> None:
    processor, options = tiny_en[1], DecodingOptions(word_timestamps=True, num_beams=num_beams)
    noise = np.random.default_rng(0).standard_normal((4, 16_000)).astype(np.float32) / 10
    batches = [[noise[0]], [noise[1], noise[2]], [noise[3], noise[0]]]
    untrained.train()

    def heard(batch: list[np.ndarray]) -> list[DecodingResult]:
        return decode(untrained, processor, batch, options)

    alone = [heard(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(heard, batches * 4))
    assert together == alone * 4
    assert all(module.training for module in untrained.modules())
