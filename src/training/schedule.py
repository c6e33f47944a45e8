"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.utils.errors import DeviceError, MissingDependencyError

# pre-training rate / 40 (Jong Wook Kim's advice for full fine-tuning), by width of the model
LEARNING_RATES = {384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}  # tiny .. large
LORA_RATE_FACTOR = 10  # of the rate for full fine-tuning (Schulman et al. 2025, "LoRA without regret")
BETAS, EPS = (0.9, 0.98), 1e-6
_FUSED_DEVICES = ("cuda", "cpu", "mps")


def default_learning_rate(d_model: int, *, lora: bool = False) -> float:
    """Return the peak rate for full fine-tuning of a model of this width, or for adapters on it."""
    nearest = min(LEARNING_RATES, key=lambda width: abs(width - d_model))
    return LEARNING_RATES[nearest] * (LORA_RATE_FACTOR if lora else 1)


def count_updates(num_batches: int, accumulation_steps: int, epochs: int) -> int:
    """Return optimizer updates, not micro-batches: the last window of an epoch may be short, and is stepped too."""
    return math.ceil(num_batches / accumulation_steps) * epochs


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, kind: Literal["adamw", "adamw_8bit"] = "adamw"
) -> Optimizer:
    """AdamW with decay on matrices only; LayerNorm and biases (one dimension) have none.

    Args:
        kind: "adamw" (fused where the device has it: one pass over the weights), or "adamw_8bit" of bitsandbytes.
    Raises: MissingDependencyError: 8 bits without bitsandbytes. DeviceError: 8 bits without CUDA.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw_8bit":
        return _adamw_8bit(groups, learning_rate, {p.device.type for p in trained})
    fused = all(p.device.type in _FUSED_DEVICES and torch.is_floating_point(p) for p in trained)
    return AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPS, fused=fused)


def count_warmup(total_updates: int, warmup_ratio: float) -> int:
    """Return the updates of the warm-up; at least one where its share is not zero."""
    return math.ceil(warmup_ratio * total_updates)


def build_schedule(optimizer: Optimizer, *, total_updates: int, warmup_ratio: float, done_updates: int = 0) -> LambdaLR:
    """Linear warm-up over a share of the real updates, then linear to zero.

    Args:
        total_updates: of the optimizer, over all epochs.
        warmup_ratio: share of them; at least one update where it is not zero.
        done_updates: those of a resumed run, which lie behind.
    """
    warmup = count_warmup(total_updates, warmup_ratio)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        return max(0.0, (total_updates - update) / max(1, total_updates - warmup))

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=done_updates - 1)


def _adamw_8bit(groups: list[dict[str, Any]], learning_rate: float, devices: Iterable[str]) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]
    except ImportError as err:
        raise MissingDependencyError(
            "training.optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes, or set it to adamw"
        ) from err
    if set(devices) != {"cuda"}:
        raise DeviceError(f"adamw_8bit needs CUDA, the model is on {', '.join(sorted(devices))}; set optimizer: adamw")
    optimizer: Optimizer = AdamW8bit(groups, lr=learning_rate, betas=BETAS, eps=EPS)
    return optimizer
