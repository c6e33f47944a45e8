"""Memory and disk: shown around a heavy step, compared with what a run needs, freed of what earlier runs left.

Only files that this project names are ever removed, only below the configured folders, and never through a link.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from src.utils.config import Config
from src.utils.errors import WhisperASRError
from src.utils.files import read_hidden_name, remove_folder
from src.utils.memory import MemoryUse, free_memory_mb, measure_memory, return_freed_memory
from src.utils.runtime import release_memory
from src.utils.validation import Check

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LITTLE_RAM_MB = 2_000.0  # training tiny.en takes 1.4 to 1.9 GB
RUN_DISK_MB = 1_000.0  # a run's figures and predictions, and an int8 export
CLEAN_UP = "src.utils.resources.clean_up(config) lists what can go"
SPARE_DISK_MB = 500.0  # left after a step: logs, figures, and what others write meanwhile
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # a trained parameter, in memory and in a checkpoint
# millions; of a folder or a repository they are not known before it is loaded
PARAMETERS_M = {"tiny": 37.8, "base": 72.6, "small": 241.7, "medium": 763.9, "distil": 756.4, "large-v3-turbo": 808.9}
_WEIGHT_BYTES = 4  # float32
_EXPORTS = 3  # the best model, its successor while that is written, and a mix with the stock weights
_DECODED = re.compile(r"[0-9a-f]{64}\.flac")  # as `data.audio_cache` names them
_REMOVED = re.compile(r"\.checkpoint-\d{8}\.removed")  # as `training.checkpoint` does


@contextmanager
def watch_resources(
    step: str,
    *,
    folder: Path,
    device: torch.device | str | None = None,
    needs_mb: float | None = None,
    needs_disk_mb: float | None = None,
) -> Iterator[MemoryUse]:
    """Log memory and disk before a step and, also where it fails, after it; warn before what will not fit.

    Args:
        step: what it is called in the log.
        folder: that the step writes to; it need not exist yet.
        device: whose memory is shown; on a GPU `needs_mb` is of that, else of RAM.
        needs_mb: memory that the step takes.
        needs_disk_mb: that the step writes.
    Yields: the reading before the step.
    Raises: WhisperASRError: less is free on the disk than the step writes; it has not begun.
    """
    place = existing_folder(folder)
    before = measure_memory(place, device)
    _check_disk(step, place, before.disk_free_mb, needs_disk_mb)
    free_mb = free_memory_mb(device)
    if needs_mb is not None and needs_mb > free_mb:
        logger.warning("%s: takes about %.0f MB of memory, %.0f MB are free", step, needs_mb, free_mb)
    logger.info("%s: before: %s", step, _describe(before))
    try:
        yield before
    finally:
        logger.info("%s: after: %s", step, _describe_change(before, measure_memory(place, device)))


@dataclass(frozen=True)
class Removable:
    """Something that this project wrote and can do without.

    Attributes:
        kind: "decoded audio", "left-over" or "checkpoint".
        place: the file or folder; of decoded audio, the folder that holds the files.
        paths: what goes.
        mb: 10^6 bytes.
    """

    kind: str
    place: Path
    paths: tuple[Path, ...]
    mb: float


@dataclass(frozen=True)
class CleanUp:
    """What `clean_up` found.

    Attributes:
        done: it was removed; else it was only listed.
    """

    items: tuple[Removable, ...]
    done: bool

    @property
    def mb(self) -> float:
        """Of all items, 10^6 bytes."""
        return sum(item.mb for item in self.items)

    def to_text(self) -> str:
        """Return one line an item, the largest first."""
        if not self.items:
            return "nothing to clean up"
        head = f"freed {self.mb:,.0f} MB" if self.done else f"{self.mb:,.0f} MB can be freed; nothing was removed yet"
        rows = sorted(self.items, key=lambda item: item.mb, reverse=True)
        return "\n".join([head, *(f"  {r.mb:8,.0f} MB  {r.kind}: {r.place} ({len(r.paths)} path(s))" for r in rows)])


def clean_up(
    config: Config, *, dry_run: bool = True, decoded_audio: bool = True, checkpoints: Sequence[Path] = ()
) -> CleanUp:
    """List what can go, then remove it; give memory that nothing uses back to the GPU and the system.

    Left-overs are what killed processes of this machine half wrote or half removed; those of running ones stay, and so
    does a folder that was replaced while its successor is missing: the next save brings it back.

    Args:
        config: `paths`.
        dry_run: list only, with sizes.
        decoded_audio: also the cache that `data.cache_decoded` fills; it is filled again when needed.
        checkpoints: these too, for example `spare_checkpoints(config)` of `training.stored`; no training may be
            writing there.
    Raises: WhisperASRError: a checkpoint lies outside `paths.checkpoints_dir` or is a link; or something cannot be
        removed.
    """
    for path in checkpoints:
        if not _is_inside(path, config.paths.checkpoints_dir):
            raise WhisperASRError(f"{path}: a link, or not below {config.paths.checkpoints_dir}; remove it by hand")
    items = [*find_leftovers(config), *(_item("checkpoint", path) for path in checkpoints)]
    if decoded_audio:
        items += _find_decoded(config.paths.cache_dir / "audio")
    if not dry_run:
        for path in (path for item in items for path in item.paths):
            _remove(path)
        release_memory()
        return_freed_memory()
    return CleanUp(tuple(items), done=not dry_run)


def find_leftovers(config: Config) -> list[Removable]:
    """List what killed processes left below the configured folders."""
    roots = (config.paths.runs_dir, config.paths.checkpoints_dir, config.paths.cache_dir)
    found = {path.resolve(): path for root in roots for path in _walk_leftovers(root)}  # folders may lie in each other
    return [_item("left-over", path) for path in found.values()]


def check_room(config: Config | None = None) -> Iterator[Check]:
    """Look at RAM and at the disks that a run writes to.

    Args: config: says where, and how much; without it the disk of the working folder is looked at.
    """
    memory = psutil.virtual_memory()
    is_little = memory.available / 1e6 < LITTLE_RAM_MB
    fix = "close other programs, and restart other notebooks' kernels" if is_little else ""
    found = f"{memory.available / 1e6:,.0f} MB available of {memory.total / 1e6:,.0f} MB"
    yield Check("RAM", "warning" if is_little else "ok", found, fix)
    if config is None:
        yield check_disk("disk", Path(), RUN_DISK_MB)
        return
    yield check_disk("disk of runs", config.paths.runs_dir, RUN_DISK_MB)
    parameters = 1e6 * PARAMETERS_M.get(config.model.variant.removesuffix(".en"), 0.0)
    needs_mb = run_disk_mb(parameters, trained=parameters, kept=config.checkpoints.save_total_limit)
    yield check_disk("disk of checkpoints", config.paths.checkpoints_dir, needs_mb)


def check_disk(name: str, folder: Path, needs_mb: float) -> Check:
    """Compare what is free at a folder, which need not exist yet, with what a run writes at most; 0: not known."""
    free_mb = shutil.disk_usage(existing_folder(folder)).free / 1e6
    needs = f"a run writes up to {needs_mb:,.0f} MB" if needs_mb else "what a run writes depends on the model"
    found = f"{free_mb:,.0f} MB free at {folder.absolute()}; {needs}"
    if free_mb >= needs_mb:
        return Check(name, "ok", found)
    return Check(name, "warning", found, CLEAN_UP)


def check_kept(config: Config) -> Iterator[Check]:
    """Look at what earlier runs left: their folders, the caches, and what killed processes half wrote."""
    runs = sorted(path.parent for path in config.paths.runs_dir.glob("*/metrics.jsonl"))
    yield Check("runs", "ok", f"{len(runs)} in {config.paths.runs_dir}, {sum(map(size_mb, runs)):,.0f} MB")
    caches = sorted(path for path in config.paths.cache_dir.glob("*") if path.is_dir())
    sizes = ", ".join(f"{path.name} {size_mb(path):,.0f} MB" for path in caches)
    yield Check("caches", "ok", f"{config.paths.cache_dir}: {sizes or 'empty'}")
    leftovers = find_leftovers(config)
    if leftovers:
        found = f"{len(leftovers)} of killed processes, {sum(each.mb for each in leftovers):,.0f} MB"
        yield Check("left-overs", "warning", found, CLEAN_UP)


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files below a folder, in 10^6 bytes; links count for nothing."""
    files = [path] if not path.is_dir() else [Path(top, name) for top, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process cleans up
            status = file.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total / 1e6


def existing_folder(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists: they lie on one disk."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def run_memory_mb(parameters: float, *, trained: float, optimizer: str = "adamw") -> float:
    """Return what weights, gradients and the optimizer's state take, in 10^6 bytes; arguments as of `run_disk_mb`."""
    return (_WEIGHT_BYTES * (parameters + trained) + OPTIMIZER_BYTES[optimizer] * trained) / 1e6


def run_disk_mb(parameters: float, *, trained: float, kept: int, optimizer: str = "adamw") -> float:
    """Return what a run keeps below `paths.checkpoints_dir` at most, in 10^6 bytes.

    Args:
        parameters: of the model.
        trained: of them, and of adapters; a checkpoint holds these and the optimizer's state.
        kept: `checkpoints.save_total_limit`; one more is there while it is written.
        optimizer: `training.optimizer`.
    """
    checkpoint = trained * (_WEIGHT_BYTES + OPTIMIZER_BYTES[optimizer])
    return ((kept + 1) * checkpoint + _EXPORTS * _WEIGHT_BYTES * parameters) / 1e6


def _check_disk(step: str, place: Path, free_mb: float, needs_mb: float | None) -> None:
    if needs_mb is None or needs_mb + SPARE_DISK_MB <= free_mb:
        return
    problem = f"{step}: {place}: {needs_mb:.0f} MB are needed on the disk, {free_mb:.0f} MB are free"
    if needs_mb > free_mb:
        raise WhisperASRError(f"{problem}; {CLEAN_UP}, or choose another disk under paths")
    logger.warning("%s, which leaves it almost full; %s", problem, CLEAN_UP)


def _describe(use: MemoryUse) -> str:
    gpu = "" if use.gpu_mb is None else f"GPU {use.gpu_mb:,.0f} MB, "
    return (
        f"process {use.process_mb:,.0f} MB, {use.system_available_mb:,.0f} MB of RAM available, {gpu}"
        f"{use.disk_free_mb:,.0f} MB of disk free"
    )


def _describe_change(before: MemoryUse, after: MemoryUse) -> str:
    gpu = ""
    if before.gpu_mb is not None and after.gpu_mb is not None:
        peak = "" if after.gpu_peak_mb is None else f", at most {after.gpu_peak_mb:,.0f}"
        gpu = f"GPU {after.gpu_mb:,.0f} MB ({after.gpu_mb - before.gpu_mb:+,.0f}{peak}), "
    return (
        f"process {after.process_mb:,.0f} MB ({after.process_mb - before.process_mb:+,.0f}), "
        f"{after.system_available_mb:,.0f} MB of RAM available "
        f"({after.system_available_mb - before.system_available_mb:+,.0f}), {gpu}"
        f"{after.disk_free_mb:,.0f} MB of disk free ({after.disk_free_mb - before.disk_free_mb:+,.0f})"
    )


def _item(kind: str, path: Path) -> Removable:
    return Removable(kind, path, (path,), size_mb(path))


def _find_decoded(folder: Path) -> list[Removable]:
    files = [path for path in sorted(folder.glob("??/*.flac")) if _DECODED.fullmatch(path.name)]
    files = [path for path in files if _is_inside(path, folder.parent)]
    return [Removable("decoded audio", folder, tuple(files), sum(map(size_mb, files)))] if files else []


def _walk_leftovers(root: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(root):  # follows no link below the root
        doomed = [name for name in folders if _is_leftover(Path(top, name))]
        folders[:] = [name for name in folders if name not in doomed]
        yield from (Path(top, name) for name in [*doomed, *files] if name in doomed or _is_leftover(Path(top, name)))


def _is_leftover(path: Path) -> bool:
    if path.is_symlink():
        return False
    if _REMOVED.fullmatch(path.name):
        return True
    hidden = read_hidden_name(path)
    if hidden is None or hidden.is_in_use:
        return False
    return hidden.kind == "partial" or hidden.final.exists()


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder with no link in between."""
    path, folder = path.absolute(), folder.absolute()
    below = path.is_relative_to(folder) and path != folder
    return below and path.resolve() == folder.resolve() / path.relative_to(folder)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and path.name.startswith("."):
            shutil.rmtree(path)
        elif path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as err:
        raise WhisperASRError(f"{path}: cannot be removed: {err.strerror}; close what uses it") from err
