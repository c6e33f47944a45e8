"""Shared by the tests of models: a random multilingual Whisper, of which only the state is of interest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from src.models.dynamic_context import DynamicWhisper


@pytest.fixture
def small_base(base: tuple[Any, Any]) -> tuple[Any, Any]:
    """A random Whisper of width 16 with the tokens of base, and its processor."""
    model, processor = base
    config = copy.deepcopy(model.config)
    config.d_model, config.num_hidden_layers = 16, 2
    for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items():
        config.update({f"encoder_{name}": value, f"decoder_{name}": value})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = DynamicWhisper(config)
    small.generation_config = copy.deepcopy(model.generation_config)
    small.generation_config.alignment_heads = [[0, 0], [1, 1]]
    small.generation_config.language = None
    return small.eval(), processor
