"""Training loss, as a module of its own: DDP, FSDP and autocast wrap only this."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from src.data.labels import IGNORE_INDEX
from src.models.dynamic_context import DynamicWhisper


class TokenLoss(nn.Module):
    """Cross-entropy summed over the text and end tokens of a batch, so that it does not depend on how they are cut."""

    def __init__(self, model: DynamicWhisper) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats of (B, mels, frames) and (B, L) tokens; no loss is due where labels are -100."""
        inner = self.model.model
        audio = inner.encoder(input_features).last_hidden_state  # (B, frames // 2, d_model)
        text = inner.decoder(
            inputs_embeds=self._embed(decoder_input_ids), encoder_hidden_states=audio, use_cache=False
        ).last_hidden_state  # (B, L, d_model)
        due = labels != IGNORE_INDEX
        # only where a loss is due: the vocabulary makes this the largest tensor of all
        logits = self.model.proj_out(text[due])  # (tokens, vocabulary)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return functional.cross_entropy(logits.float(), labels[due], reduction="sum")

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
