"""The token embedding that is the output's weights too, with both gradients in one tensor.

Autograd makes a dense gradient of the whole vocabulary for each of the two uses and adds them: on two cores, for
tiny.en, a sixth of an update's time, and 80 MB (profiled on 2026-11-26). Here the embedding's rows are added into the
gradient of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional


class TiedVocabulary:
    """One pass through both ends of a decoder, whose `embed` comes before its `project`.

    Args:
        embedding, output: of the model; used as they are where they share no weights, on a GPU, where the extra pass
            over memory costs next to nothing, and where the weights are frozen or sharded.
    """

    def __init__(self, embedding: nn.Embedding, output: nn.Linear) -> None:
        self._embedding = embedding
        self._output = output
        weight = output.weight
        self._is_joined = (
            embedding.weight is weight
            and weight.device.type == "cpu"
            and weight.requires_grad
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not isinstance(weight, DTensor)
        )
        self._kept: list[Tensor] = []  # the output's input and gradient, between its backward pass and the embedding's

    def embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: (B, L) int64 to (B, L, d_model)."""
        if not self._is_joined:
            embedded: Tensor = self._embedding(ids)
            return embedded
        looked_up: Tensor = _Lookup.apply(self._output.weight, ids, self._embedding.padding_idx, self._kept)
        return looked_up

    def project(self, text: Tensor) -> Tensor:
        """Return logits: (tokens, d_model) to (tokens, vocabulary)."""
        if not self._is_joined:
            logits: Tensor = self._output(text)
            return logits
        logits = functional_call(self._output, {"weight": self._output.weight.detach()}, (text,))
        logits.register_hook(lambda grad: self._kept.extend((text.detach(), grad)))
        return logits


class _Lookup(torch.autograd.Function):
    """An embedding whose backward pass returns the gradient of the output with its own rows added."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, kept: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.kept = padding_idx, kept
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        text, of_logits = ctx.kept
        of_weight = of_logits.T @ text
        ctx.kept.clear()
        if ctx.padding_idx is not None:  # as nn.Embedding
            grad = grad.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0.0)
        of_weight.index_add_(0, ids.flatten(), grad.flatten(0, 1))
        return of_weight, None, None, None
