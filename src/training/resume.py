"""Which checkpoint a run goes on from: the newest whole one of the same training, here or in the mirror."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.training.checkpoint import clean_up, list_checkpoints, read_values, verify_checkpoint
from src.utils.config import Config, flatten
from src.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

# what may change between two sessions of one training: it changes how long or how watched it is, not what is learnt
_FREE_KEYS = frozenset(
    {
        "training.epochs", "training.patience", "training.grad_spike_factor", "training.max_nonfinite_steps",
        "training.mix_shares", "training.compile", "training.gradient_checkpointing", "data.num_workers",
        "training.shard_model", "data.cache_decoded",
    }
)  # fmt: skip
_COMPARED_SECTIONS = ("model", "data", "composition", "augmentation", "training")


@dataclass(frozen=True)
class ResumeReport:
    """What a search found.

    Attributes:
        checkpoint: to go on from, or None: nothing usable was found.
        refused: every other candidate that is newer, with the reason.
        searched: folders.
    """

    checkpoint: Path | None
    refused: tuple[tuple[Path, str], ...]
    searched: tuple[Path, ...]

    def __str__(self) -> str:
        places = ", ".join(map(str, self.searched))
        lines = [f"going on from {self.checkpoint}" if self.checkpoint else f"no checkpoint to go on from in {places}"]
        return "\n".join([*lines, *(f"  refused {path}: {reason}" for path, reason in self.refused)])


def find_checkpoint(
    roots: Sequence[Path], config: Config | None, *, made_from: Mapping[str, str] | None = None
) -> ResumeReport:
    """Search `<root>/<run>/checkpoint-*` for the newest whole checkpoint of this training, or of any.

    Args:
        roots: the local folder first; absent ones are passed over.
        config: of the run that is to go on; None takes the newest of any training.
        made_from: values of a checkpoint that must be the same too, such as its `data_version`.
    """
    refused: list[tuple[Path, str]] = []
    candidates: list[tuple[float, int, Path, Mapping[str, Any]]] = []
    for order, root in enumerate(roots):
        for run in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []:
            if order == 0:
                clean_up(run)
            for path in list_checkpoints(run):
                try:
                    values = read_values(path)
                    candidates.append((float(values["saved_at"]), -order, path, values))
                except (CheckpointError, KeyError, TypeError, ValueError) as err:
                    refused.append((path, _reason(err)))
    for _, _, path, found in sorted(candidates, key=lambda entry: entry[:2], reverse=True):
        try:
            if config is not None:
                _check_training(path, found, config, made_from or {})
            verify_checkpoint(path)
        except (CheckpointError, KeyError, TypeError, AttributeError) as err:  # a damaged byte may hit a key's name
            refused.append((path, _reason(err)))
            continue
        return ResumeReport(path, tuple(refused), tuple(roots))
    return ResumeReport(None, tuple(refused), tuple(roots))


def config_differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Return "key: then, now" for each setting that decides what is learnt."""
    ours = config.model_dump(mode="json")
    found = []
    for section in _COMPARED_SECTIONS:
        before, now = flatten(saved.get(section, {}), f"{section}."), flatten(ours[section], f"{section}.")
        for key in sorted({**before, **now}):
            if key not in _FREE_KEYS and before.get(key) != now.get(key):
                found.append(f"{key}: {before.get(key)} then, {now.get(key)} now")
    if saved.get("seed") != ours["seed"]:
        found.append(f"seed: {saved.get('seed')} then, {ours['seed']} now")
    return found


def _check_training(path: Path, values: Mapping[str, Any], config: Config, made_from: Mapping[str, str]) -> None:
    differences = config_differences(values["config"], config)
    differences += [f"{key}: {values[key]} then, {now} now" for key, now in made_from.items() if values[key] != now]
    if differences:
        raise CheckpointError(
            f"belongs to another training ({'; '.join(differences)}); restore these settings, or resume it by "
            f"its path: {path}"
        )


def _reason(err: Exception) -> str:
    return str(err) if isinstance(err, CheckpointError) else f"{err!r} in its state"
