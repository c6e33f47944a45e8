"""Training loss, as a module of its own: DDP, FSDP and autocast wrap only this."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from src.data.labels import IGNORE_INDEX
from src.models.dynamic_context import DynamicWhisper, decoder_states

LOSS_ROWS = 1_024  # tokens whose logits exist at once: 210 MB in float32


class TokenLoss(nn.Module):
    """Cross-entropy summed over the text and end tokens of a batch, so that it does not depend on how they are cut."""

    def __init__(self, model: DynamicWhisper) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats of (B, mels, frames) and (B, L) tokens; no loss is due where labels are -100."""
        audio = self.model.model.encoder(input_features).last_hidden_state  # (B, frames // 2, d_model)
        text = decoder_states(self.model, self._embed(decoder_input_ids), audio)  # (B, L, d_model)
        text, labels = text.flatten(0, 1), labels.flatten()
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            # logits only where a loss is due; a GPU is better off with shapes that repeat
            due = torch.from_numpy(np.flatnonzero(labels.numpy() != IGNORE_INDEX))
            text, labels = text.index_select(0, due), labels.index_select(0, due)
        parts = list(zip(text.split(LOSS_ROWS), labels.split(LOSS_ROWS), strict=True))
        if len(parts) == 1:
            return self._cross_entropy(*parts[0])
        # the vocabulary makes logits the largest tensor of all: the backward pass makes those of each part again
        again = partial(checkpoint, self._cross_entropy, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([again(*part) for part in parts]).sum()

    def _cross_entropy(self, text: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.proj_out(text)  # (tokens, vocabulary)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def _embed(self, ids: Tensor) -> Tensor:
        """Look up tokens: (B, L) to (B, L, d_model).

        The embedding is the output layer's weight too, and autograd makes a dense gradient of the whole vocabulary for
        each use. On a CPU the looked-up rows are added to the output's gradient instead, which saves a sixth of an
        update's time (tiny.en, two cores, 2026-11-26).
        """
        embedding = self.model.model.decoder.embed_tokens
        weight = embedding.weight
        joined = weight is self.model.proj_out.weight and weight.requires_grad and torch.is_grad_enabled()
        # DDP and FSDP exchange a gradient as soon as autograd has made it
        if not joined or weight.device.type != "cpu" or distributed.is_initialized() or torch.compiler.is_compiling():
            looked_up: Tensor = embedding(ids)
            return looked_up

        def add_rows(gradient: Tensor) -> None:
            if embedding.padding_idx is not None:
                gradient = gradient.masked_fill((ids == embedding.padding_idx).unsqueeze(-1), 0.0)
            if weight.grad is None:  # several passes go backward at once: the output's gradient is still to come
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, ids.flatten(), gradient.flatten(0, 1))

        embedded = functional.embedding(ids, weight.detach()).requires_grad_()
        embedded.register_hook(add_rows)
        return embedded
