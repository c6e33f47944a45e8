"""Processes that work together: who this one is, and what they tell each other. Alone, everything is the identity.

A process that has not imported torch is alone: it cannot have joined others. So nothing here imports it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from src.utils.errors import WhisperASRError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def join_processes(*, patience: timedelta) -> None:
    """Join the processes that a launcher has started, as its variables say: torchrun, `accelerate launch`.

    Args: patience: how long the first to come to a meeting waits for the last.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=patience)


def world_size() -> int:
    """Return the number of processes that work together."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """Return this process's place among them, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def is_main_process() -> bool:
    """Whether this is the one process that writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return every process's value, by rank, in all of them; pickled between processes of one run, never on disk."""
    group = _group()
    if group is None or world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    group.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return the main process's value in all of them."""
    group = _group()
    if group is None or world_size() == 1:
        return value
    holder = [value]
    group.broadcast_object_list(holder, src=0)
    return holder[0]


def from_main(make: Callable[[], T]) -> T:
    """Return what the main process makes, in all of them.

    Raises: WhisperASRError: what it raised, in all of them: none waits for one that has failed.
    """
    made: T | WhisperASRError | None = None
    if is_main_process():
        try:
            made = make()
        except WhisperASRError as err:
            made = err
    made = broadcast_object(made)
    if isinstance(made, WhisperASRError):
        raise made
    return cast(T, made)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum of each value over all processes, in float64.

    Args:
        device: whose backend talks: the CPU for gloo, the GPU for nccl.
    """
    group = _group()
    if group is None or world_size() == 1:
        return list(values)
    import torch

    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    group.all_reduce(total)
    return [float(value) for value in total.tolist()]


def wait_for_all() -> None:
    """Return when every process has come here."""
    group = _group()
    if group is not None and world_size() > 1:
        group.barrier()


def _group() -> Any | None:
    """Return torch.distributed where this process has joined others."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
