"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# pre-training rate / 40 (Jong Wook Kim's advice for full fine-tuning), by width of the model
LEARNING_RATES = {384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}  # tiny .. large


def default_learning_rate(d_model: int) -> float:
    """Return the peak rate for full fine-tuning of a model of this width."""
    nearest = min(LEARNING_RATES, key=lambda width: abs(width - d_model))
    return LEARNING_RATES[nearest]


def count_updates(num_batches: int, accumulation_steps: int, epochs: int) -> int:
    """Return optimizer updates, not micro-batches: the last window of an epoch may be short, and is stepped too."""
    return math.ceil(num_batches / accumulation_steps) * epochs


def build_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW with decay on matrices only; LayerNorm and biases (one dimension) have none."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)


def build_schedule(optimizer: Optimizer, *, total_updates: int, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up over a share of the real updates, then linear to zero.

    Args:
        total_updates: of the optimizer, over all epochs.
        warmup_ratio: share of them; at least one update where it is not zero.
    """
    warmup = math.ceil(warmup_ratio * total_updates)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        return max(0.0, (total_updates - update) / max(1, total_updates - warmup))

    return LambdaLR(optimizer, factor)
