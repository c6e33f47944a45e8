"""A run's files: metrics, predictions, configuration and environment.

Results on the guard set are kept under names such as "tuned (guard)", so that no table takes them for the test set.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import Bootstrap
from src.utils.config import parse_yaml
from src.utils.errors import ConfigError, DataError, first_line
from src.utils.files import read_json, read_plain, read_run_rows
from src.utils.runtime import public
from src.utils.versioning import DatasetVersion, DataVersionManager

STOCK, TUNED = "stock", "tuned"
MEASURED_EVENT = "measured"  # row of scripts/evaluate.py: model, stock and data as they were named
DATA_VERSIONS_DIR = "data_versions"
_GUARD_SUFFIX = " (guard)"
_FIX = "remove it, or take it from a copy of the run"
Row = Mapping[str, Any]
PredictionsByModel = Mapping[str, Sequence[Prediction]]


def load_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; DataError if it is absent or a line is damaged."""
    return read_run_rows(Path(run_dir, "metrics.jsonl"), key="event")


def load_predictions(run_dir: str | Path, *, guard: bool | None = False) -> dict[str, list[Prediction]]:
    """Read predictions.jsonl: the last row of each clip by model, of the test set, the guard set or (None) both.

    Without this file there is nothing: rates can be shown, a verdict cannot be given.
    """
    file = Path(run_dir, "predictions.jsonl")
    if not file.exists():
        return {}
    models: dict[str, dict[str, Prediction]] = {}
    for number, row in enumerate(read_run_rows(file, key="model"), start=1):
        model, logprob = row.pop("model"), row.get("avg_logprob")
        try:
            prediction = Prediction(**row | {"avg_logprob": math.nan if logprob is None else logprob})
        except TypeError as err:
            raise DataError(f"{file}, line {number}: not a prediction ({err}); evaluate this model again") from err
        models.setdefault(model, {})[prediction.id] = prediction
    return {model: list(models[model].values()) for model in stock_first(models) if guard in (None, is_guard(model))}


def latest_evaluations(rows: Sequence[Row], *, guard: bool = False) -> dict[str, Row]:
    """Return the last evaluation of each name, the stock model first, on the test set or on the guard set."""
    latest = {row["name"]: row for row in rows if row["event"] == "evaluation" and is_guard(row["name"]) == guard}
    return {name: latest[name] for name in stock_first(latest)}


def last_row(rows: Sequence[Row], event: str) -> Row | None:
    """Return the last row of an event, or None."""
    return next((row for row in reversed(rows) if row["event"] == event), None)


def last_training(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Return the train_step and epoch rows of the last training.

    Updates and epochs that were repeated, after a resume or a new start in the same run, replace the older ones.
    """
    steps: list[Row] = []
    epochs: list[Row] = []
    for row in rows:
        if row["event"] not in ("train_step", "epoch"):
            continue
        while epochs and epochs[-1]["epoch"] >= row["epoch"]:
            epochs.pop()
        if row["event"] == "epoch":
            epochs.append(row)
            continue
        while steps and steps[-1]["step"] >= row["step"]:
            steps.pop()
        steps.append(row)
    return steps, epochs


def best_epoch(epochs: Sequence[Row]) -> Row | None:
    """Return the epoch whose weights were kept, or None if no epoch had an error rate."""
    return next((row for row in reversed(epochs) if row["is_best"]), None)


def bootstrap_of(row: Row) -> Bootstrap:
    """Return the bootstrap settings of an evaluation, so that other intervals of the run are drawn alike."""
    keys = {"samples": "bootstrap_samples", "confidence": "confidence", "seed": "bootstrap_seed"}
    return Bootstrap(**{name: row[key] for name, key in keys.items() if key in row})


def guard_name(model: str) -> str:
    """Return the name under which a model's results on the guard set are kept."""
    return model + _GUARD_SUFFIX


def is_guard(name: str) -> bool:
    """Whether results of this name are of the guard set."""
    return name.endswith(_GUARD_SUFFIX)


def stock_first(names: Iterable[str]) -> list[str]:
    """Order models for reading: the stock model first, the others as they come, the guard set last."""
    return sorted(names, key=lambda name: (is_guard(name), name not in (STOCK, guard_name(STOCK))))


@dataclass(frozen=True)
class RunOrigin:
    """Where a run's results come from."""

    run_dir: Path
    config: Mapping[str, Any]  # empty without config.yaml
    environment: Mapping[str, Any]  # empty without env.json
    data_versions: Sequence[DatasetVersion]  # from old to new
    measured: Row  # as logged by `scripts/evaluate.py`; empty for other runs
    trained: bool

    @property
    def base(self) -> str | None:
        """The stock model as it was named; None if the files do not name it."""
        name = self.measured.get("stock") if self.measured else self.config.get("model", {}).get("variant")
        return None if name is None else str(name)

    @property
    def data(self) -> str:
        """The source of the data, and the name of its file, folder or repository."""
        data = self.config.get("data", {})
        place = self.measured.get("data") or data.get("path") or data.get("hub", {}).get("id")
        source = data.get("source", "data that the run's files do not name")
        return f"{source} ({Path(place).name})" if place else str(source)

    def commands(self) -> list[str]:
        """Return the command lines that reproduce the run."""
        config = ["--config", str(Path(public(self.run_dir), "config.yaml"))]
        model = Path(self.config.get("paths", {}).get("checkpoints_dir", "checkpoints"), "best_model_hf")
        named = self.measured or {"model": model, "stock": self.base}
        options = {f"--{key.replace('_', '-')}": named.get(key) for key in ("model", "stock", "data", "max_clips")}
        given = [part for key, value in options.items() if value is not None for part in (key, str(value))]
        given += ["--no-stock"] * (self.base is None)
        revision, changed, _ = str(self.environment.get("git_revision") or "").partition("+")
        note = "  # and changes that were not committed" if changed else ""
        lines = [f"git checkout {revision}{note}"] if revision else []
        lines += [shlex.join(["python", "scripts/train.py", *config])] if self.trained else []
        return [*lines, shlex.join(["python", "scripts/evaluate.py", *config, *given])]


def read_origin(run_dir: str | Path) -> RunOrigin:
    """Read where a run's results come from; DataError for a damaged file."""
    run, rows = Path(run_dir), load_metrics(run_dir)
    environment: dict[str, Any] = {}
    if (run / "env.json").exists():
        environment = read_json(run / "env.json", _environment, what="the environment of a run", fix=_FIX)
    return RunOrigin(
        run_dir=run,
        config=public(_read_config(run / "config.yaml")),
        environment=public(environment),
        data_versions=DataVersionManager(run / DATA_VERSIONS_DIR).versions(),
        measured=public(last_row(rows, MEASURED_EVENT) or {}),
        trained=last_row(rows, "epoch") is not None,
    )


def _environment(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "packages": dict(tree.get("packages", {}))}


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.yaml, of an older version too; nothing if it is absent."""
    try:
        tree = parse_yaml(read_plain(path).decode("utf-8")) if path.exists() else {}
    except (ConfigError, OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: damaged: {first_line(err)}; {_FIX}") from err
    tree = {} if tree is None else tree
    parts = [tree, *(tree.get(name, {}) for name in ("model", "paths", "data"))] if isinstance(tree, dict) else [tree]
    if not all(isinstance(part, dict) and isinstance(part.get("hub", {}), dict) for part in parts):
        raise DataError(f"{path}: not the configuration of a run; {_FIX}")
    return dict(tree)
