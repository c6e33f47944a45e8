from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from src.data.labels import IGNORE_INDEX
from src.training import loss
from src.training.loss import TokenLoss


def make_inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 80, 60, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    labels = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    labels[0, :2] = labels[1, 4:] = IGNORE_INDEX
    tokens[1, 5:] = model.config.pad_token_id
    return features, tokens, labels


def gradients(model: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("frozen", "pads", "rows"), [(False, True, 99), (True, True, 99), (False, False, 99), (False, True, 4)]
)
def test_loss_and_gradients_are_those_of_the_models_forward(
    small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, frozen: bool, pads: bool, rows: int
) -> None:
    """The embedding is the output's weight too, and its two gradients are added up; logits are made in parts."""
    model, _ = small
    monkeypatch.setattr(loss, "LOSS_ROWS", rows)
    model.audio_context = "dynamic"
    model.proj_out.weight.requires_grad_(not frozen)
    if not pads:
        model.model.decoder.embed_tokens.padding_idx = None
    features, tokens, labels = make_inputs(model)
    assert (tokens == model.config.pad_token_id).any()  # has no gradient of its own

    logits = model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
    expected = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    wanted = gradients(model, expected)
    module = TokenLoss(model)
    total = module(features, tokens, labels)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    found = gradients(model, total)
    assert set(found) == set(wanted)
    assert ("model.decoder.embed_tokens.weight" in found) is not frozen
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    # two passes before either goes backward, as in accumulation
    twice = gradients(model, module(features, tokens, labels) + module(features, tokens, labels))
    for name, gradient in wanted.items():
        torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-4, atol=2e-4 * float(gradient.abs().max()))
    with torch.no_grad():
        assert not module(features, tokens, labels).requires_grad


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
    assert torch.isfinite(gradients(model, loss)["model.decoder.embed_tokens.weight"]).all()
    torch.testing.assert_close(loss, TokenLoss(model)(features, tokens, labels), rtol=0.02, atol=0)
