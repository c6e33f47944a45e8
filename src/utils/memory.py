"""Memory and disk: measured, what a run needs, and freed of what earlier runs left. MB are 10^6 bytes."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from src.utils.config import Config
from src.utils.errors import WhisperASRError
from src.utils.files import LOCK, claim, read_hidden_name, remove_folder
from src.utils.runtime import release_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CLEAN_UP_HINT = "src.utils.clean_up(config) lists what can be removed"
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # per trained parameter, in memory and in a checkpoint
# in millions; those of a folder or a Hub repository are unknown before it is loaded
PARAMETERS_M = {"tiny": 37.8, "base": 72.6, "small": 241.7, "medium": 763.9, "distil": 756.4, "large-v3-turbo": 808.9}
_WEIGHT_BYTES = 4  # float32
_EXPORTS = 3  # the best model, its successor while that is written, and a mix with the stock weights
_DECODED = re.compile(r"[0-9a-f]{64}\.flac")  # as `data.audio` names them


@dataclass(frozen=True)
class MemoryUse:
    """A reading of memory and disk."""

    process_mb: float  # resident memory of this process; loader processes have their own
    system_available_mb: float  # what processes can still take without swapping
    gpu_mb: float | None  # held by tensors on the device now, without torch's cache; None without a GPU
    gpu_peak_mb: float | None  # the most since `torch.cuda.reset_peak_memory_stats`; None if not counted
    disk_free_mb: float  # of the file system that holds the folder

    def fields(self) -> dict[str, float | None]:
        """Return the fields of a row of metrics.jsonl, in whole MB."""
        gpu_mb = None if self.gpu_mb is None else round(self.gpu_mb)
        return {
            "memory_mb": round(self.process_mb), "gpu_memory_mb": gpu_mb, "disk_free_mb": round(self.disk_free_mb),
        }  # fmt: skip


def measure_memory(folder: Path, device: torch.device | str | None = None) -> MemoryUse:
    """Read memory, and the disk of an existing folder; cheap enough for every update."""
    gpu_mb = gpu_peak_mb = None
    kind = str(device).partition(":")[0]
    if kind in ("cuda", "mps"):
        import torch  # only a GPU's memory needs it

        if kind == "mps":
            gpu_mb = torch.mps.current_allocated_memory() / 1e6
        else:
            gpu_mb = torch.cuda.memory_allocated(device) / 1e6
            gpu_peak_mb = torch.cuda.max_memory_allocated(device) / 1e6
    return MemoryUse(
        process_mb=psutil.Process().memory_info().rss / 1e6,
        system_available_mb=psutil.virtual_memory().available / 1e6,
        gpu_mb=gpu_mb,
        gpu_peak_mb=gpu_peak_mb,
        disk_free_mb=shutil.disk_usage(folder).free / 1e6,
    )


def free_memory_mb(device: torch.device | str | None = None) -> float:
    """Return what this process can still take: of a CUDA device's memory with torch's unused cache, else of RAM."""
    if str(device).partition(":")[0] != "cuda":
        return float(psutil.virtual_memory().available / 1e6)
    import torch  # only a GPU's memory needs it

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float((torch.cuda.mem_get_info(device)[0] + cached) / 1e6)


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    glibc keeps large blocks that were freed, and batches of varying lengths leave varying holes: a training process
    grows by half (tiny.en, batch 8, two cores, 2026-11-25: 1.9 GB at rest instead of 1.4 GB).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def watch_resources(step: str, *, folder: Path, device: torch.device | str | None = None) -> Iterator[MemoryUse]:
    """Log memory and disk before and after a step, even if it fails; yield the reading before.

    `folder` is where the step writes, and need not exist yet; `device` is the one whose memory is shown.
    """
    before = measure_memory(existing_folder(folder), device)
    logger.info("%s: before: %s", step, _describe(before))
    try:
        yield before
    finally:
        logger.info("%s: after: %s", step, _describe(measure_memory(existing_folder(folder), device), before))


def _describe(now: MemoryUse, before: MemoryUse | None = None) -> str:
    names = {
        "process_mb": "process",
        "system_available_mb": "RAM available",
        "gpu_mb": "GPU",
        "disk_free_mb": "disk free",
    }
    shown = [f"GPU peak {now.gpu_peak_mb:,.0f} MB"] if before is not None and now.gpu_peak_mb is not None else []
    for field, name in names.items():
        mb, earlier = getattr(now, field), getattr(before, field, None)
        change = "" if earlier is None else f" ({mb - earlier:+,.0f})"
        shown += [] if mb is None else [f"{name} {mb:,.0f} MB{change}"]
    return ", ".join(shown)


def run_memory_mb(parameters: float, *, trained: float, optimizer: str = "adamw", half_copy: bool = False) -> float:
    """Return what weights, gradients and optimizer state take in MB; other arguments as in `run_disk_mb`.

    With `half_copy` there is a copy of weights and gradients in 16 bits, too.
    """
    weight_bytes = _WEIGHT_BYTES * (1.5 if half_copy else 1)
    return (weight_bytes * (parameters + trained) + OPTIMIZER_BYTES[optimizer] * trained) / 1e6


def run_disk_mb(parameters: float, *, trained: float, kept: int, optimizer: str = "adamw") -> float:
    """Return the most MB that a run keeps below `paths.checkpoints_dir`.

    A checkpoint holds the trained parameters and their optimizer state. `kept` is `checkpoints.save_total_limit`; one
    more exists while it is written.
    """
    checkpoint = trained * (_WEIGHT_BYTES + OPTIMIZER_BYTES[optimizer])
    return ((kept + 1) * checkpoint + _EXPORTS * _WEIGHT_BYTES * parameters) / 1e6


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files below a folder, in MB; links are not counted."""
    files = [Path(top, name) for top, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            status = file.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total / 1e6


def existing_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists: both lie on one disk."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


@dataclass(frozen=True)
class Removable:
    """Files that this project wrote and that can be removed."""

    kind: str  # "decoded audio", "unfinished" or "checkpoint"
    place: Path  # the file or folder; for decoded audio, the folder that contains the files
    paths: tuple[Path, ...]  # what is removed
    mb: float  # of all paths


@dataclass(frozen=True)
class CleanUp:
    """What `clean_up` found, and whether it was removed or only listed."""

    items: tuple[Removable, ...]
    done: bool

    @property
    def mb(self) -> float:
        """Size of all items."""
        return sum(item.mb for item in self.items)

    def to_text(self) -> str:
        """Return one line per item, the largest first."""
        if not self.items:
            return "nothing to clean up"
        head = f"freed {self.mb:,.0f} MB" if self.done else f"{self.mb:,.0f} MB can be freed; nothing was removed yet"
        rows = sorted(self.items, key=lambda item: item.mb, reverse=True)
        return "\n".join([head, *(f"  {r.mb:8,.0f} MB  {r.kind}: {r.place} ({len(r.paths)} path(s))" for r in rows)])


def clean_up(config: Config, *, dry_run: bool = True, checkpoints: Sequence[Path] = ()) -> CleanUp:
    """List what can be removed, then remove it; return unused memory to the GPU and the system.

    Only files that this project names are removed, only below the configured folders, and never through a link: the
    cache of decoded audio, which fills again when needed; what killed processes of this machine half wrote or half
    removed; and the given checkpoints, such as `spare_checkpoints(config)` of `src.training`. A replaced folder whose
    successor is missing stays: the next save restores it.

    Raises:
        WhisperASRError: if a checkpoint is not below `paths.checkpoints_dir`, another process trains there, or
            something cannot be removed.
    """
    for path in checkpoints:
        if not _is_inside(path, config.paths.checkpoints_dir):
            raise WhisperASRError(f"{path}: a link, or not below {config.paths.checkpoints_dir}; remove it by hand")
    items = [*find_unfinished(config), *(_item("checkpoint", path) for path in checkpoints)]
    folder = config.paths.cache_dir / "audio"
    files = [path for path in sorted(folder.glob("??/*.flac")) if _DECODED.fullmatch(path.name)]
    files = [path for path in files if _is_inside(path, folder.parent)]
    items += [Removable("decoded audio", folder, tuple(files), sum(map(size_mb, files)))] if files else []
    if not dry_run:
        with contextlib.ExitStack() as stack:
            if checkpoints:
                folder, fix = config.paths.checkpoints_dir, "end it"
                stack.callback(claim(folder / LOCK, stack, what=folder, error=WhisperASRError, fix=fix))
            for path in (path for item in items for path in item.paths):
                try:
                    with contextlib.suppress(FileNotFoundError):  # removed by another process
                        remove_folder(path)
                except OSError as err:
                    raise WhisperASRError(f"{path}: cannot be removed: {err.strerror}; close what uses it") from err
        release_memory()
        return_freed_memory()
    return CleanUp(tuple(items), done=not dry_run)


def find_unfinished(config: Config) -> list[Removable]:
    """List what killed processes half wrote or half removed below the configured folders."""
    found: dict[Path, Path] = {}  # by resolved path: the folders may lie inside each other
    for root in (config.paths.runs_dir, config.paths.checkpoints_dir, config.paths.cache_dir):
        for top, folders, files in os.walk(root):  # follows no link below the root
            unfinished = [path for path in (Path(top, name) for name in (*folders, *files)) if _is_unfinished(path)]
            found |= {path.resolve(): path for path in unfinished}
            folders[:] = [name for name in folders if Path(top, name) not in unfinished]
    return [_item("unfinished", path) for path in found.values()]


def _item(kind: str, path: Path) -> Removable:
    return Removable(kind, path, (path,), size_mb(path))


def _is_unfinished(path: Path) -> bool:
    hidden = read_hidden_name(path)
    if path.is_symlink() or hidden is None or hidden.is_in_use:
        return False
    return hidden.kind == "partial" or hidden.final.exists()


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder with no link in between."""
    path, folder = path.absolute(), folder.absolute()
    below = path.is_relative_to(folder) and path != folder
    return below and path.resolve() == folder.resolve() / path.relative_to(folder)
