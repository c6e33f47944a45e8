"""Seed, device, precision, memory errors, and processes that train or transcribe together.

torch is imported where it is used: it takes seconds, and a process that decodes with CTranslate2 does not need it.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from src.utils.errors import DeviceError, OutOfMemoryError, WhisperASRError, first_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "float16"]


def set_seed(seed: int) -> int:
    """Seed Python, NumPy and torch; return the seed."""
    import torch

    random.seed(seed)
    np.random.seed(seed)  # used by libraries that draw from the global state
    torch.manual_seed(seed)
    return seed


def get_device(name: str = "auto") -> torch.device:
    """Resolve a device.

    Args:
        name: "auto" (CUDA, else Apple's MPS, else CPU), or any name that torch accepts: "cpu", "cuda:1", "mps".

    Raises:
        DeviceError: if the named device is not on this machine; only "auto" may choose the CPU.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            chosen, reason = "cuda", torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            chosen, reason = "mps", "no CUDA device, Apple GPU present"
        else:
            chosen, reason = "cpu", "no CUDA device"
        logger.info("device: %s (%s)", chosen, reason)
        return torch.device(chosen)
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise DeviceError(f"device {name!r} is unknown to torch; use auto, cpu, cuda or cuda:N") from err
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"device {name!r} was asked for, but torch sees no CUDA device. In Colab: Runtime > Change runtime "
                "type > GPU. Elsewhere: check nvidia-smi, or set device: auto"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but this machine has none; set device: auto")
    return device


@dataclass(frozen=True)
class PrecisionChoice:
    """The dtype of matrix products in training (master weights stay float32), and the reason."""

    precision: Precision
    reason: str


def choose_precision(precision: str, device: torch.device) -> PrecisionChoice:
    """Resolve "auto" for a device, or check a named precision; raises `DeviceError` if the device cannot compute it."""
    import torch

    if precision == "auto" and device.type != "cuda":
        return PrecisionChoice("float32", f"{device.type} gains nothing from 16 bits in training")
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        name = torch.cuda.get_device_name(device)
        if has_bfloat16:
            return PrecisionChoice("bfloat16", f"{name} computes bfloat16")
        return PrecisionChoice("float16", f"{name} has no bfloat16; losses are scaled")
    if precision == "bfloat16" and not has_bfloat16:
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set precision: auto or float16")
    if precision == "float16" and device.type != "cuda":
        raise DeviceError(f"float16 training needs a CUDA device, this is {device.type}; set precision: auto")
    if precision not in ("float32", "bfloat16", "float16"):
        raise DeviceError(f"precision {precision!r} is unknown; use auto, float32, bfloat16 or float16")
    return PrecisionChoice(precision, "asked for")  # type: ignore[arg-type]


def allow_tf32(device: torch.device) -> str:
    """Let float32 matrix products of an Ampere or newer GPU run in TF32; return what was done, for the log."""
    import torch

    if device.type != "cuda":
        return "TF32 off (no CUDA device)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"TF32 off ({torch.cuda.get_device_name(device)} has none)"
    torch.set_float32_matmul_precision("high")
    return f"TF32 on ({torch.cuda.get_device_name(device)} has it)"


def keep_cudnn_out_of_attention(device: torch.device) -> None:
    """Leave attention on a CUDA device to the other backends, in this whole process.

    On Hopper and newer GPUs torch tries cuDNN first, which builds a plan for every new shape: with torch 2.11 about
    half a second forward and again backward (https://github.com/modelscope/FunASR/issues/3704). Audio at its own length
    and a decoder's growing cache have a new shape at nearly every call.
    """
    import torch

    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def usable_cores() -> int:
    """Return this process's share of the cores that it may run on; a container may have fewer than the machine.

    Processes that train together on one machine share them; launchers set their number in LOCAL_WORLD_SIZE.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_threads() -> int:
    """Return how many threads this process may compute with: OMP_NUM_THREADS, which launchers set, or its cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


def in_memory(work: Callable[[], T]) -> T:
    """Return what `work` returns; if memory runs out, release what it held before the error is raised.

    Raises:
        OutOfMemoryError: if the GPU or the machine had no memory left. Any other error passes through.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        problem = first_line(err)
    release_memory()  # outside of the except block: in there the error's frames hold what did not fit
    raise OutOfMemoryError(f"out of memory: {problem}")


class FittingSize:
    """How many items fit into memory at once: halved when memory runs out, and kept for later calls."""

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, work: Callable[[int, int], T], names: Sequence[str]) -> list[T]:
        """Work on all items, in as few parts as fit.

        Args:
            work: takes the first item's index and the index after the last one.
            names: one per item, for errors.

        Returns:
            The result of each part, in order.

        Raises:
            OutOfMemoryError: if a single item does not fit; its name is in the message.
        """
        results: list[T] = []
        done = 0
        while done < len(names):
            size = min(self.most or len(names), len(names) - done)
            try:
                results.append(in_memory(partial(work, done, done + size)))
            except OutOfMemoryError as err:
                if size == 1:
                    raise OutOfMemoryError(
                        f"{names[done]} alone: {err}; lower inference.num_beams or take a smaller model"
                    ) from err
                self.most = size // 2
                logger.warning("%s with %d clips: from now on at most %d at once", err, size, self.most)
            else:
                done += size
        return results


def release_memory() -> None:
    """Collect garbage, and return torch's cache of GPU memory.

    After memory ran out, call it outside of the except block: inside, the error's frames hold what did not fit.
    """
    gc.collect()
    torch = sys.modules.get("torch")  # without an import it holds nothing
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU or the machine had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    text = str(error)
    return "out of memory" in text.lower() or "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def join_processes(*, patience: timedelta) -> None:
    """Join the processes that torchrun or `accelerate launch` has started.

    What follows works with torch.distributed alone: accelerate's helpers would choose the device of a process that
    only transcribes. A process that has not joined others is alone, and everything is the identity.

    Args:
        patience: how long the first process at a meeting point waits for the last.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=patience)


def world_size() -> int:
    """Return the number of processes that work together."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """Return the index of this process among them, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def is_main_process() -> bool:
    """Whether this is the one process that writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return every process's value, by rank, in all of them; pickled between processes of one run, never on disk."""
    group = _group()
    if group is None:
        return [value]
    gathered: list[T] = [value] * world_size()
    group.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return the main process's value in all of them."""
    group = _group()
    if group is None:
        return value
    holder = [value]
    group.broadcast_object_list(holder, src=0)
    return holder[0]


def from_main(make: Callable[[], T]) -> T:
    """Return what the main process makes, in all of them; its `WhisperASRError` is raised in all of them, too."""
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
        values: of this process.
        device: whose backend communicates: the CPU for gloo, the GPU for nccl.
    """
    group = _group()
    if group is None:
        return list(values)
    import torch

    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    group.all_reduce(total)
    return [float(value) for value in total.tolist()]


def wait_for_all() -> None:
    """Return when every process has arrived here."""
    group = _group()
    if group is not None:
        group.barrier()


def _group() -> Any | None:
    """Return torch.distributed if this process has joined others."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
