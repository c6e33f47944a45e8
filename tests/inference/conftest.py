from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig

from src.models.dynamic_context import DynamicWhisper


@pytest.fixture(scope="module")
def untrained() -> DynamicWhisper:
    """Random weights in two decoder layers of two heads, which list no alignment heads."""
    torch.manual_seed(0)
    return DynamicWhisper(
        WhisperConfig(
            vocab_size=51_864, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    )  # fmt: skip
