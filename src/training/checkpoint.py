"""Checkpoints on disk: written whole or not at all, verified when read, and searched for when a run resumes.

checkpoints/<run>/checkpoint-00000123/
    model.safetensors, optimizer.safetensors, rng.safetensors
    state.json       everything that is not a tensor; its `order` counts all checkpoints below checkpoints/
    metrics.jsonl    the run's rows until here, for a session that lost them with its disk
    manifest.json    size and SHA-256 of each of these files; written last

A folder is written under a hidden name, read back and compared with memory, synchronised to disk (fsync), and renamed.
Nothing is pickled. The newest checkpoint is the one with the highest order, as clocks and file times may go back. A
restart hashes each file once: `verify_checkpoint` returns a `WholeCheckpoint`, which is loaded without another look.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.training.state import check_values
from src.utils.config import Config, flatten
from src.utils.errors import CheckpointError
from src.utils.files import LOCK, atomic_folder, claim, load_json, recover_folder, remove_folder, sha256_of
from src.utils.mirror import DriveMirror

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE, METRICS = "manifest.json", "state.json", "metrics.jsonl"
TENSOR_FILES = ("model", "optimizer", "rng")
# what a state raises that was damaged or written by others: a damaged byte may hit a key's name
UNREADABLE = (CheckpointError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
_NAME = re.compile(r"checkpoint-(\d{8})")
_SPARE_BYTES = 16 << 20  # besides the tensors: JSON, and what others write meanwhile

# what may change between two sessions of one training: it changes how long or how watched it is, not what is learnt
_FREE_KEYS = frozenset(
    {
        "training.epochs", "training.patience", "training.grad_spike_factor", "training.max_nonfinite_steps",
        "training.mix_shares", "training.compile", "training.gradient_checkpointing", "data.num_workers",
        "training.shard_model", "data.cache_decoded",
    }
)  # fmt: skip
_COMPARED = ("seed", "model", "data", "composition", "augmentation", "training")


@dataclass(frozen=True)
class TrainingState:
    """Everything that a stopped run continues from."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # by file ("model", "optimizer", "rng"), then by name, on the CPU
    values: Mapping[str, Any]  # the rest, as JSON
    metrics: str = ""  # content of the run's metrics.jsonl


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint whose files are those of its manifest; made by `verify_checkpoint`."""

    path: Path
    values: Mapping[str, Any]  # JSON part of the state

    def load(self) -> TrainingState:
        """Read the state, without another comparison; raises `CheckpointError` if it was removed since."""
        metrics = self.path / METRICS
        try:
            tensors = {name: load_file(self.path / f"{name}.safetensors") for name in TENSOR_FILES}
            rows = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
        except (SafetensorError, OSError, UnicodeDecodeError) as err:
            raise CheckpointError(f"{self.path}: {err}") from err
        return TrainingState(tensors, self.values, rows)


class CheckpointStore:
    """Checkpoints of one run: the newest `save_total_limit` in its folder, and a copy of each in the mirror.

    From its first save on, no other process can save into the folder. Each checkpoint is newer than all others next to
    the run's folder, and those below `older`, such as the mirror.
    """

    def __init__(
        self, folder: Path, *, save_total_limit: int, mirror: DriveMirror | None = None, older: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._order = max(map(_newest_order, older), default=0)
        self._claims: dict[Path, Callable[[], object]] = {}
        self._limit = save_total_limit
        self._mirror = mirror

    def save(self, state: TrainingState, step: int) -> Path:
        """Save a state as `checkpoint-<step>`, then remove the oldest ones over the limit; return its folder.

        Raises:
            CheckpointError: the disk is full or cannot be written, or reads back other bytes, or another process saves
                into this folder. The older checkpoints are as they were.
        """
        if self.folder not in self._claims:
            lock = self.folder.with_name(f".{self.folder.name}{LOCK}")  # not inside, where checkpoints are listed
            self._claims[self.folder] = claim_folder(self.folder, self, lock)
        target = checkpoint_path(self.folder, step)
        needed = _SPARE_BYTES + sum(t.nbytes for tensors in state.tensors.values() for t in tensors.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(f"it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
            self._order = 1 + max(self._order, _newest_order(self.folder.parent))
            with atomic_folder(target, replace=True, durable=True) as partial:
                _write(state, partial, self._order)
        except OSError as err:
            raise CheckpointError(
                f"{target}: cannot be saved: {err.strerror or err}; older checkpoints are whole. Free space there, or "
                "set paths.checkpoints_dir to another disk"
            ) from err
        logger.info("saved %s", target)
        run, mirror = self.folder.name, self._mirror
        if mirror is not None:
            mirror.submit(target, name=f"{run}/{target.name}", group=run, keep=self._limit)
        # by age: a new training in this folder counts its steps from 1 again
        others = sorted((path for path in list_checkpoints(self.folder) if path != target), key=_age_on_disk)
        for old in others[: max(0, len(others) + 1 - self._limit)]:
            if mirror is not None and mirror.is_busy(old):
                continue  # it goes after the next one
            try:
                remove_folder(old)
            except OSError as err:
                logger.warning("%s: an old checkpoint cannot be removed: %s", old, err)
        return target

    def unlock(self) -> None:
        """Let other processes save into the folder, until the next save."""
        while self._claims:
            self._claims.popitem()[1]()


def claim_folder(folder: Path, owner: object, lock: Path) -> Callable[[], object]:
    """Keep other processes from saving into a folder, see `claim`; raises `CheckpointError` if one does."""
    return claim(lock, owner, what=folder, error=CheckpointError, fix="set another paths.checkpoints_dir")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint of an update."""
    return folder / f"checkpoint-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps; they may be damaged."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def age(checkpoint: Path, values: Mapping[str, Any]) -> tuple[int, float, int]:
    """Return what sorts checkpoints from old to new; before 2026-12 they had no order, only the time of the clock."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(values.get("order", 0)), float(values["saved_at"]), int(match[1]) if match else 0


def _age_on_disk(checkpoint: Path) -> tuple[int, float, int]:
    """Return the age of a checkpoint, that of a damaged one as the oldest."""
    try:
        return age(checkpoint, {"saved_at": 0.0, **read_values(checkpoint)})
    except UNREADABLE:
        return 0, 0.0, 0


def _newest_order(root: Path) -> int:
    """Return the highest order of all runs below a folder, 0 without any."""
    return max((_age_on_disk(path)[0] for path in root.glob("*/checkpoint-*")), default=0)


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half-written in a run's folder, and restore a checkpoint it was replacing."""
    if not folder.is_dir():
        return
    for name in {match[0] for path in folder.iterdir() if (match := _NAME.search(path.name))}:
        recover_folder(folder / name)


def read_values(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint without verifying it; raises `CheckpointError` if it has none."""
    try:
        values = load_json(checkpoint / STATE)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{checkpoint}: {STATE} cannot be read ({err}); it is not a whole checkpoint") from err
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of format {FORMAT}; train with the version that wrote it"
        )
    return values


def verify_checkpoint(checkpoint: Path) -> WholeCheckpoint:
    """Compare every file with the manifest; `CheckpointError` names the first one that is absent, cut or changed."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder; resume('auto') searches for the newest checkpoint")
    try:
        files = load_json(checkpoint / MANIFEST)["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
        if foreign := [name for name in expected if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII)]:
            raise ValueError(f"{foreign[0]!r} is not a file of this folder")
    except FileNotFoundError as err:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}: it was never finished") from err
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as err:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read ({err})") from err
    missing = {STATE, *(f"{name}.safetensors" for name in TENSOR_FILES)} - set(expected)
    if missing:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} does not list {', '.join(sorted(missing))}")
    for name, (size, digest) in expected.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found == size and sha256_of(checkpoint / name) == digest:
                continue
        except OSError as err:
            raise CheckpointError(f"{checkpoint}: {name} cannot be read: {err.strerror}") from err
        if found == size:
            raise CheckpointError(f"{checkpoint}: {name} is damaged: its SHA-256 differs")
        raise CheckpointError(f"{checkpoint}: {name} has {found} bytes instead of {size}")
    return WholeCheckpoint(checkpoint, read_values(checkpoint))


def _write(state: TrainingState, folder: Path, order: int) -> None:
    for name in TENSOR_FILES:
        file = folder / f"{name}.safetensors"
        try:
            save_file({key: tensor.contiguous() for key, tensor in state.tensors[name].items()}, file)
        except SafetensorError as err:  # its way to say that the disk is full
            raise OSError(f"{file.name}: {err}") from err
        _compare(file, state.tensors[name])
    text = json.dumps({"format": FORMAT, **state.values, "order": order}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")
    if (folder / STATE).read_text(encoding="utf-8") != text:
        raise CheckpointError(f"{folder / STATE}: reads back differently; the disk is not reliable")
    (folder / METRICS).write_text(state.metrics, encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file back, one tensor at a time, and compare it with memory bit for bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)  # nan is equal to itself

    with safe_open(file, framework="pt") as saved:
        names = set(saved.keys())
        for name in names | set(tensors):
            found = saved.get_tensor(name) if name in names & set(tensors) else None
            if found is None or found.dtype != tensors[name].dtype or not torch.equal(bits(found), bits(tensors[name])):
                raise CheckpointError(f"{file}: {name} reads back differently; the disk is not reliable")


@dataclass(frozen=True)
class ResumeReport:
    """What a search found; `whole` is None if nothing was usable."""

    whole: WholeCheckpoint | None
    refused: tuple[tuple[Path, str], ...] = ()  # every newer candidate, with the reason
    searched: tuple[Path, ...] = ()

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the checkpoint."""
        return None if self.whole is None else self.whole.path

    def __str__(self) -> str:
        nothing = f"no checkpoint to resume from in {', '.join(map(str, self.searched))}"
        head = f"resuming from {self.checkpoint}" if self.checkpoint else nothing
        return "\n".join([head, *(f"  refused {path}: {reason}" for path, reason in self.refused)])


def find_checkpoint(
    roots: Sequence[Path], config: Config | None, *, made_from: Mapping[str, str] | None = None
) -> ResumeReport:
    """Search `<root>/<run>/checkpoint-*` for the newest whole checkpoint of this training, or of any training.

    Args:
        roots: the local folder first; absent ones are skipped.
        config: of the run to resume; None takes the newest checkpoint of any training, also one with tensors alone.
        made_from: values of a checkpoint that must be the same too, such as its `data_version`.
    """
    refused: list[tuple[Path, str]] = []

    def refuse(path: Path, err: Exception) -> None:
        refused.append((path, str(err) if isinstance(err, CheckpointError) else f"{err!r} in its state"))

    candidates: list[tuple[tuple[int, float, int], int, Path, Mapping[str, Any]]] = []
    for order, root in enumerate(roots):
        for run in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
            if order == 0:
                clean_up(run)
            for path in list_checkpoints(run):
                try:
                    values = read_values(path)
                    candidates.append((age(path, values), -order, path, values))
                except UNREADABLE as err:
                    refuse(path, err)
    for _, _, path, saved in sorted(candidates, key=lambda entry: entry[:2], reverse=True):
        try:
            if config is not None:
                wanted = (made_from or {}).items()
                differences = config_differences(saved["config"], config)
                differences += [f"{key}: {saved[key]} then, {now} now" for key, now in wanted if saved[key] != now]
                if differences:
                    raise CheckpointError(
                        f"belongs to another training ({'; '.join(differences)}); restore these settings, or resume it "
                        f"by its path: {path}"
                    )
            whole = verify_checkpoint(path)
            if config is not None or "progress" in saved:
                check_values(whole.values)
            return ResumeReport(whole, tuple(refused), tuple(roots))
        except UNREADABLE as err:
            refuse(path, err)
    return ResumeReport(None, tuple(refused), tuple(roots))


def config_differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Return "key: then, now" for each changed setting that decides what is learnt; a new one had its default."""
    default, before, now = (
        flatten({section: tree[section] for section in _COMPARED if section in tree})
        for tree in (Config().model_dump(mode="json"), saved, config.model_dump(mode="json"))
    )
    before = {**default, **before}
    return [
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in sorted({**before, **now}.keys() - _FREE_KEYS)
        if before.get(key) != now.get(key)
    ]
