"""Memory and disk in use: which of them a run is about to exhaust. MB are 10^6 bytes."""

from __future__ import annotations

import ctypes
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

_MB = 1e6


@dataclass(frozen=True)
class MemoryUse:
    """A reading.

    Attributes:
        process_mb: resident memory of this process; loader processes have their own.
        system_available_mb: what processes can still take without swapping.
        gpu_mb: held by tensors on the device now, without torch's cache; None without a GPU.
        gpu_peak_mb: the most since the process began or `torch.cuda.reset_peak_memory_stats`; None where not counted.
        disk_free_mb: of the file system that holds the folder.
    """

    process_mb: float
    system_available_mb: float
    gpu_mb: float | None
    gpu_peak_mb: float | None
    disk_free_mb: float

    def fields(self) -> dict[str, float | None]:
        """Return the fields of a row of metrics.jsonl, in whole MB."""
        gpu_mb = None if self.gpu_mb is None else round(self.gpu_mb)
        return {
            "memory_mb": round(self.process_mb),
            "gpu_memory_mb": gpu_mb,
            "disk_free_mb": round(self.disk_free_mb),
        }


def measure_memory(folder: Path, device: torch.device | str | None = None) -> MemoryUse:
    """Read memory and disk; cheap enough for every update.

    Args:
        folder: exists; its file system is measured.
        device: whose memory is read, "cuda" or "mps"; None, and the CPU, have none of their own.
    Raises: OSError: the folder is absent.
    """
    gpu_bytes, gpu_peak_bytes = _gpu_bytes(device)
    return MemoryUse(
        process_mb=psutil.Process().memory_info().rss / _MB,
        system_available_mb=psutil.virtual_memory().available / _MB,
        gpu_mb=None if gpu_bytes is None else gpu_bytes / _MB,
        gpu_peak_mb=None if gpu_peak_bytes is None else gpu_peak_bytes / _MB,
        disk_free_mb=shutil.disk_usage(folder).free / _MB,
    )


def free_memory_mb(device: torch.device | str | None = None) -> float:
    """Return what this process can still take: of a CUDA device its memory, torch's unused cache included, else RAM."""
    if str(device).partition(":")[0] != "cuda":
        return float(psutil.virtual_memory().available / _MB)
    import torch  # only a GPU's memory needs it

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float((torch.cuda.mem_get_info(device)[0] + cached) / _MB)


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    It keeps large blocks that were freed, and batches of ever other lengths leave ever other holes: a process that
    trains grows by half (tiny.en, batch 8, two cores, 2026-11-25: resting at 1.9 GB instead of 1.4 GB).
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _gpu_bytes(device: torch.device | str | None) -> tuple[int | None, int | None]:
    kind = str(device).partition(":")[0]
    if kind not in ("cuda", "mps"):
        return None, None
    import torch  # only a GPU's memory needs it

    if kind == "mps":
        return torch.mps.current_allocated_memory(), None
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
