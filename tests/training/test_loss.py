from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from src.data.labels import IGNORE_INDEX
from src.training.loss import TokenLoss


def make_inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 80, 60, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    labels = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    labels[0, :2] = labels[1, 4:] = IGNORE_INDEX
    tokens[1, 5:] = model.config.pad_token_id
    return features, tokens, labels


@pytest.mark.slow
def test_the_loss_is_the_full_cross_entropy_of_the_models_forward(tiny_en: tuple[Any, Any]) -> None:
    model, _ = tiny_en
    model.audio_context = "dynamic"
    features, tokens, labels = make_inputs(model)

    logits = model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
    expected = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss = TokenLoss(model)(features, tokens, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert set(gradients) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            scale = float(gradients[name].abs().max())
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4 * scale)


def test_positions_without_a_loss_have_no_say(small: tuple[Any, Any]) -> None:
    model, _ = small
    model.audio_context = "dynamic"
    features, tokens, labels = make_inputs(model)
    loss = TokenLoss(model)
    whole = loss(features, tokens, labels)
    # the end of a padded row changes nothing, and rows add up
    rows = loss(features[:1], tokens[:1], labels[:1]) + loss(features[1:], tokens[1:, :4], labels[1:, :4])
    torch.testing.assert_close(rows, whole)


def test_under_autocast_the_loss_is_float32(small: tuple[Any, Any]) -> None:
    model, _ = small
    model.audio_context = "dynamic"
    features, tokens, labels = make_inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TokenLoss(model)(features, tokens, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, TokenLoss(model)(features, tokens, labels), rtol=0.02, atol=0)
