"""Both gradients of the tied vocabulary in one tensor: the same as autograd's own, and only where that is safe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.training.tied_vocabulary import TiedVocabulary

PADDING = 3
IDS = torch.tensor([[1, 2, 2, 5], [2, 7, PADDING, PADDING]])


def tied_ends() -> tuple[nn.Embedding, nn.Linear]:
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 4, padding_idx=PADDING)
    output = nn.Linear(4, 11, bias=False)
    output.weight = embedding.weight
    return embedding, output


def gradient(embedding: nn.Embedding, output: nn.Linear, *, joined: bool) -> torch.Tensor:
    vocabulary = TiedVocabulary(embedding, output)
    embed, project = (vocabulary.embed, vocabulary.project) if joined else (embedding, output)
    hidden = torch.tanh(embed(IDS)).flatten(0, 1)[1:6]
    project(hidden).square().sum().backward()
    assert embedding.weight.grad is not None
    found = embedding.weight.grad.clone()
    embedding.weight.grad = None
    return found


def test_the_gradient_is_autograds() -> None:
    ends = tied_ends()
    torch.testing.assert_close(gradient(*ends, joined=True), gradient(*ends, joined=False))


def test_gradients_of_two_passes_add_up_in_any_order() -> None:
    embedding, output = tied_ends()
    once = gradient(embedding, output, joined=False)
    passes = [TiedVocabulary(embedding, output) for _ in range(2)]
    embedded = [one.embed(IDS) for one in passes]  # both forward before either goes backward
    sums = [
        one.project(torch.tanh(rows).flatten(0, 1)[1:6]).square().sum()
        for one, rows in zip(passes, embedded, strict=True)
    ]
    (sums[0] + sums[1]).backward()
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad, 2 * once)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_or_separate_weights_go_through_the_model_as_it_is(frozen: bool) -> None:
    embedding, output = tied_ends()
    if frozen:
        embedding.weight.requires_grad_(False)
    else:
        output.weight = nn.Parameter(output.weight.detach().clone())
    vocabulary = TiedVocabulary(embedding, output)
    hidden = vocabulary.embed(IDS).flatten(0, 1) * torch.ones(1, requires_grad=True)
    vocabulary.project(hidden).sum().backward()
    assert (embedding.weight.grad is None) == frozen
    assert (output.weight.grad is None) == frozen


def test_without_gradients_nothing_is_kept() -> None:
    vocabulary = TiedVocabulary(*tied_ends())
    with torch.no_grad():
        plain = TiedVocabulary(*tied_ends())
        assert not plain.project(plain.embed(IDS)).requires_grad
    assert vocabulary.project(vocabulary.embed(IDS)).requires_grad
