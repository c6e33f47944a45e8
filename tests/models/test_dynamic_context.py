from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from src.data.features import CONTEXT_SAMPLES, LogMel
from src.models.dynamic_context import DynamicWhisper, get_cap_rates
from src.utils.errors import ModelError


@pytest.fixture
def small() -> DynamicWhisper:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=200, max_source_positions=1500, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return DynamicWhisper(config).eval()


def features(jfk: np.ndarray, samples: int) -> torch.Tensor:
    audio = torch.zeros(1, samples)
    audio[0, : min(samples, len(jfk))] = torch.from_numpy(jfk[:samples])
    return LogMel()(audio)


@pytest.mark.parametrize(
    ("context", "frames", "named"),
    [
        ("dynamic", 8, "8 mel"),
        ("dynamic", 11, "11 mel"),
        ("dynamic", 3002, "3002 mel"),
        ("full", 400, "WhisperTrainer"),
    ],
)
def test_unfit_frames_and_contexts_are_refused(small: DynamicWhisper, context: Any, frames: int, named: str) -> None:
    assert small.audio_context == "full"
    small.audio_context = context
    with pytest.raises(ModelError, match=named):
        small.get_encoder()(torch.zeros(1, 80, frames))
    with pytest.raises(ModelError, match="'half'"):
        small.audio_context = "half"  # type: ignore[assignment]


@pytest.mark.parametrize("context", ["full", "dynamic"])
def test_context_and_rates_are_saved_and_loaded(small: DynamicWhisper, tmp_path: Path, context: Any) -> None:
    small.audio_context = context
    assert get_cap_rates(small.config) == {}
    small.config.tokens_per_sec = {"hi": 43.5}
    small.save_pretrained(tmp_path)
    loaded = DynamicWhisper.from_pretrained(tmp_path)
    assert loaded.audio_context == context
    assert get_cap_rates(loaded.config) == {"hi": 43.5}
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path).config.architectures == [
        "WhisperForConditionalGeneration"
    ]


def test_gradients_reach_the_encoder_at_own_length(small: DynamicWhisper) -> None:
    small.audio_context = "dynamic"
    small.train()
    output = small(input_features=torch.randn(2, 80, 320), labels=torch.randint(4, 200, (2, 6)))
    output.loss.backward()
    gradient = small.model.encoder.layers[0].fc1.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("context", ["full", "dynamic"])
def test_at_30_s_all_outputs_equal_stock_whisper(tiny_en: Any, jfk: np.ndarray, context: Any) -> None:
    model, _ = tiny_en
    stock = WhisperForConditionalGeneration(model.config).eval()
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    model.audio_context = context
    mel = features(jfk, CONTEXT_SAMPLES)
    labels = torch.tensor([[50362, 843, 523, 616, 50256]])
    with torch.no_grad():
        ours, theirs = model(mel, labels=labels), stock(mel, labels=labels)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state, atol=1e-5, rtol=0)
        for options in ({}, {"num_beams": 3}, {"return_timestamps": True}):
            assert torch.equal(model.generate(mel, **options), stock.generate(mel, **options)), options


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.5, 3.0, 11.0, 29.98])
def test_generate_works_at_any_length(tiny_en: Any, jfk: np.ndarray, seconds: float) -> None:
    model, _ = tiny_en
    model.audio_context = "dynamic"
    mel = features(jfk, max(1_600, round(seconds * 16_000 / 320) * 320))
    seen: list[int] = []
    model.get_encoder().register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state.shape[1]))
    words = {"return_token_timestamps": True, "return_timestamps": True, "return_dict_in_generate": True}
    for options in ({}, {"num_beams": 2}, {"return_timestamps": True}, words):
        output = model.generate(mel, max_new_tokens=24, **options)
        assert output is not None
    # with timestamps generate may seek on and decode what is left, never more than there is
    assert seen[0] == max(seen) == mel.shape[-1] // 2, "generate padded the audio"
