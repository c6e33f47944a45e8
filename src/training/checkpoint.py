"""Checkpoints on disk: folders that are whole or are not there, and that prove it.

checkpoints/<run>/checkpoint-00000123/
    model.safetensors, optimizer.safetensors, rng.safetensors
    state.json       everything that is not a tensor
    metrics.jsonl    the run's rows until here, for a session that lost them with its disk
    manifest.json    size and SHA-256 of each of these files; written last

A folder is written under a hidden name, read back and compared with what is in memory, brought to the disk (fsync), and
renamed. Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.utils.colab import sha256_of
from src.utils.errors import CheckpointError
from src.utils.files import atomic_folder, recover_folder, remove_folder, removed_name
from src.utils.mirror import DriveMirror

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE, METRICS = "manifest.json", "state.json", "metrics.jsonl"
TENSOR_FILES = ("model", "optimizer", "rng")
_NAME = re.compile(r"checkpoint-(\d{8})")
_SPARE_BYTES = 16 << 20  # beside the tensors: JSON, and what others write meanwhile


@dataclass(frozen=True)
class TrainingState:
    """Everything that a stopped run goes on from.

    Attributes:
        tensors: by file ("model", "optimizer", "rng"), then by name, on the CPU.
        values: JSON: the rest.
        metrics: content of the run's metrics.jsonl.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    metrics: str = ""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: of the run; made when the first is saved.
        save_total_limit: whole ones that are kept.
        mirror: gets a copy of each.
    """

    def __init__(self, folder: Path, *, save_total_limit: int, mirror: DriveMirror | None = None) -> None:
        self.folder = folder
        self._limit = save_total_limit
        self._mirror = mirror

    def save(self, state: TrainingState, step: int) -> Path:
        """Save a state as `checkpoint-<step>`, then remove the oldest over the limit.

        Returns: the folder.
        Raises: CheckpointError: the disk is full or cannot be written, or gives back other bytes. The older checkpoints
            are as they were.
        """
        target = checkpoint_path(self.folder, step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space(state)
            with atomic_folder(target, replace=True, durable=True) as partial:
                _write(state, partial)
        except OSError as err:
            raise CheckpointError(
                f"{target}: cannot be saved: {err.strerror or err}; older checkpoints are whole. Free space there, or "
                "set paths.checkpoints_dir to another disk"
            ) from err
        logger.info("saved %s", target)
        if self._mirror is not None:
            self._mirror.submit(
                target, name=f"{self.folder.name}/{target.name}", group=self.folder.name, keep=self._limit
            )
        self._rotate(target)
        return target

    def _check_space(self, state: TrainingState) -> None:
        needed = _SPARE_BYTES + sum(t.nbytes for tensors in state.tensors.values() for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: a checkpoint needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; older "
                "checkpoints are whole. Free space there, or set paths.checkpoints_dir to another disk"
            )

    def _rotate(self, newest: Path) -> None:
        # by age: a training that begins anew in this folder counts its steps from 1 again
        others = sorted((path for path in list_checkpoints(self.folder) if path != newest), key=_saved_at_ns)
        for old in others[: max(0, len(others) + 1 - self._limit)]:
            if self._mirror is not None and self._mirror.is_busy(old):
                continue  # it goes after the next one
            try:
                remove_folder(old)
            except OSError as err:
                logger.warning("%s: an old checkpoint cannot be removed: %s", old, err)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where a run's checkpoint of an update lies."""
    return folder / f"checkpoint-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run by their steps, the last one last; they may be damaged."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def clean_up(folder: Path) -> None:
    """Finish what a killed process left in a run's folder: hidden halves go, a replaced checkpoint comes back."""
    if not folder.is_dir():
        return
    for name in {match[0] for path in folder.iterdir() if (match := _NAME.search(path.name))}:
        recover_folder(folder / name)
        shutil.rmtree(removed_name(folder / name), ignore_errors=True)


def read_values(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint, not checked.

    Raises: CheckpointError: it has none that can be read.
    """
    try:
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{checkpoint}: {STATE} cannot be read ({err}); it is not a whole checkpoint") from err
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of format {FORMAT}; train with the version that wrote it"
        )
    return values


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises: CheckpointError: naming the first file that is absent, cut or changed.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder; resume('auto') searches for the newest checkpoint")
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as err:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}: it was never finished") from err
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read ({err})") from err
    wanted = {STATE, *(f"{name}.safetensors" for name in TENSOR_FILES)}
    if wanted - set(expected):
        raise CheckpointError(f"{checkpoint}: {MANIFEST} does not list {', '.join(sorted(wanted - set(expected)))}")
    for name, (size, digest) in expected.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{checkpoint}: {name} has {found} bytes instead of {size}")
            if sha256_of(checkpoint / name) != digest:
                raise CheckpointError(f"{checkpoint}: the content of {name} is damaged (SHA-256 differs)")
        except OSError as err:
            raise CheckpointError(f"{checkpoint}: {name} cannot be read: {err.strerror}") from err


def load_checkpoint(checkpoint: Path) -> TrainingState:
    """Verify and read a checkpoint.

    Raises: CheckpointError: damaged, or of another format.
    """
    verify_checkpoint(checkpoint)
    values = read_values(checkpoint)
    try:
        tensors = {name: load_file(checkpoint / f"{name}.safetensors") for name in TENSOR_FILES}
    except SafetensorError as err:
        raise CheckpointError(f"{checkpoint}: {err}") from err
    metrics = checkpoint / METRICS
    return TrainingState(tensors, values, metrics.read_text(encoding="utf-8") if metrics.exists() else "")


def _saved_at_ns(checkpoint: Path) -> int:
    manifest = checkpoint / MANIFEST
    return manifest.stat().st_mtime_ns if manifest.is_file() else 0


def _write(state: TrainingState, folder: Path) -> None:
    for name in TENSOR_FILES:
        file = folder / f"{name}.safetensors"
        try:
            save_file({key: tensor.contiguous() for key, tensor in state.tensors[name].items()}, file)
        except SafetensorError as err:  # its way to say that the disk is full
            raise OSError(f"{file.name}: {err}") from err
        _compare(file, state.tensors[name])
    text = json.dumps({"format": FORMAT, **state.values}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")
    if (folder / STATE).read_text(encoding="utf-8") != text:
        raise CheckpointError(
            f"{folder / STATE}: reads back differently from what was written; the disk is not reliable"
        )
    (folder / METRICS).write_text(state.metrics, encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file back, one tensor at a time, and compare it with memory bit for bit."""
    with safe_open(file, framework="pt") as saved:
        if set(saved.keys()) != set(tensors):
            raise CheckpointError(f"{file}: holds other tensors than were written; the disk is not reliable")
        for name, tensor in tensors.items():
            found = saved.get_tensor(name)
            if found.dtype != tensor.dtype or not torch.equal(_bits(found), _bits(tensor)):
                raise CheckpointError(f"{file}: {name} reads back differently; the disk is not reliable")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)  # nan is equal to itself
