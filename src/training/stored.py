"""What is on this machine that a training can start from: bundled data, weights, checkpoints."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from src.data.sources.catalog import SAMPLES_DIR
from src.models.export.huggingface import read_provenance
from src.models.offline_weights import PACKAGED_MODELS, PackagedModel
from src.models.weights import HUB_REPOSITORIES
from src.training.checkpoint import list_checkpoints, read_values, verify_checkpoint
from src.training.resume import config_differences
from src.training.saver import BEST_MODEL_NAME
from src.utils.config import Config
from src.utils.errors import CheckpointError, first_line
from src.utils.memory import size_mb
from src.utils.validation import Check, CheckReport


class StoredReport(CheckReport):
    """Bundled data, weights and checkpoints on this machine."""

    title = "To start from"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on the disk.

    Attributes:
        update, epochs_done, saved_at: None where its state cannot be read; `saved_at` in seconds since 1970.
        problem: why it is damaged; empty where every file is as it was written.
        differences: settings of another training; "auto" does not resume it.
    """

    path: Path
    mb: float
    update: int | None = None
    epochs_done: int | None = None
    saved_at: float | None = None
    problem: str = ""
    differences: tuple[str, ...] = ()


def stored_report(config: Config) -> StoredReport:
    """Look at what a training can start from; every file of every checkpoint is read and compared."""
    return StoredReport(tuple(_check_stored(config)))


def stored_checkpoints(config: Config) -> list[StoredCheckpoint]:
    """Read and verify every checkpoint below `paths.checkpoints_dir`, run by run."""
    root = config.paths.checkpoints_dir
    runs = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [_inspect(path, config) for run in runs for path in list_checkpoints(run)]


def spare_checkpoints(config: Config, *, keep: int = 1) -> list[Path]:
    """Return the checkpoints that `clean_up` may remove: all but the newest `keep` whole ones of each run."""
    spare: list[Path] = []
    for _, stored in itertools.groupby(stored_checkpoints(config), key=lambda each: each.path.parent):
        ordered = sorted(stored, key=lambda each: (not each.problem, each.saved_at or 0.0))  # damaged, old, new
        kept = [each for each in ordered if not each.problem][-keep:]
        spare += [each.path for each in ordered if each not in kept]
    return spare


def _check_stored(config: Config) -> Iterator[Check]:
    samples = [path for path in sorted(SAMPLES_DIR.iterdir()) if path.suffix != ".md"]
    yield Check("bundled data", "ok", ", ".join(f"{path.name} {size_mb(path):.1f} MB" for path in samples))
    yield _check_weights(config.model.variant)
    stored = stored_checkpoints(config)
    yield from map(_describe, stored)
    if not stored:
        yield Check("checkpoints", "absent", f"none below {config.paths.checkpoints_dir}")
    best = config.paths.checkpoints_dir / BEST_MODEL_NAME
    if best.is_dir():
        made = read_provenance(best)
        found = f"run {made.get('run')}, epoch {made.get('epoch')}, {size_mb(best):,.0f} MB"
        yield Check("best model", "ok", f"{found}, validation WER {made.get('validation_wer', math.nan):.3f}")


def _inspect(path: Path, config: Config) -> StoredCheckpoint:
    found: dict[str, Any] = {}
    try:
        values = read_values(path)
        found["update"], found["epochs_done"] = int(values["progress"]["step"]), int(values["progress"]["epochs_done"])
        found["saved_at"] = float(values["saved_at"])
        found["differences"] = tuple(config_differences(values["config"], config))
        verify_checkpoint(path)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as err:  # damage may hit a key's name
        reason = first_line(err) if isinstance(err, CheckpointError) else f"{err!r} in its state"
        found["problem"] = reason.removeprefix(f"{path}: ")
    return StoredCheckpoint(path, size_mb(path), **found)


def _describe(stored: StoredCheckpoint) -> Check:
    name = f"checkpoint {stored.path.parent.name}/{stored.path.name}"
    if stored.problem:
        fix = "clean_up(config, checkpoints=spare_checkpoints(config)) lists it with what else can go"
        return Check(name, "warning", f"damaged, {stored.mb:,.0f} MB: {stored.problem}", fix)
    stale = f"; stale, of another training: {stored.differences[0]}" if stored.differences else ""
    found = f"whole, {stored.mb:,.0f} MB, update {stored.update}, {stored.epochs_done} epoch(s) done{stale}"
    return Check(name, "ok", found)


def _check_weights(wanted: str) -> Check:
    """Find the variants whose weights are on this machine."""
    here = [name for name, model in PACKAGED_MODELS.items() if _is_installed(model)]
    for name, repository in HUB_REPOSITORIES.items():
        if isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
            here.append(name)
    found = f"here without a network: {', '.join(here) or 'none'}"
    if wanted in here or Path(wanted).is_dir():
        return Check("weights", "ok", f"{wanted}; {found}")
    fix = f"hf download {HUB_REPOSITORIES.get(wanted, wanted)}"
    return Check("weights", "absent", f"{wanted} has to be fetched; {found}", fix)


def _is_installed(model: PackagedModel) -> bool:
    try:
        return all(importlib.metadata.version(name) == version for name, version in model.distributions)
    except importlib.metadata.PackageNotFoundError:
        return False
