"""Processes that train together: who this one is, and what they tell each other. Alone, everything is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    """Return this process's place among them, from 0."""
    return distributed.get_rank() if _initialized() else 0


def is_main_process() -> bool:
    """Whether this is the one process that writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return every process's value, by rank, in all of them; pickled between processes of one run, never on disk."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return the main process's value in all of them."""
    if world_size() == 1:
        return value
    holder = [value]
    distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum of each value over all processes, in float64.

    Args:
        device: whose backend talks: the CPU for gloo, the GPU for nccl.
    """
    if world_size() == 1:
        return list(values)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        distributed.barrier()


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
