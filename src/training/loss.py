"""The training loss as a module of its own, so that what wraps models (DDP, FSDP, autocast) wraps just this."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from src.data.labels import IGNORE_INDEX
from src.models.dynamic_context import DynamicWhisper
from src.training.tied_vocabulary import TiedVocabulary


class TokenLoss(nn.Module):
    """Cross-entropy summed over the text and end tokens of a batch.

    A sum, not a mean: divided by the tokens of a whole update, it is the same however the update is cut into batches.

    Args:
        model: trained through this module.
    """

    def __init__(self, model: DynamicWhisper) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats, a float32 scalar.

        Args:
            input_features: (B, mels, frames).
            decoder_input_ids: (B, L) int64.
            labels: (B, L) int64, -100 where no loss is due.
        """
        inner = self.model.model
        vocabulary = TiedVocabulary(inner.decoder.embed_tokens, self.model.proj_out)
        audio = inner.encoder(input_features).last_hidden_state  # (B, frames // 2, d_model)
        text = inner.decoder(
            inputs_embeds=vocabulary.embed(decoder_input_ids), encoder_hidden_states=audio, use_cache=False
        ).last_hidden_state  # (B, L, d_model)
        due = labels != IGNORE_INDEX
        # only where a loss is due: the vocabulary makes this the largest tensor of all
        logits = vocabulary.project(text[due])  # (tokens, vocabulary)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return functional.cross_entropy(logits.float(), labels[due], reduction="sum")
