"""Where a run's figures come from, read from its files, and the commands that make them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.evaluation.report.summary import Row, load_metrics
from src.utils.data_versions import DatasetVersion, DataVersionManager
from src.utils.errors import DataError

MEASURED_EVENT = "measured"  # row of scripts/evaluate.py: model, stock and data as they were named
DATA_VERSIONS_DIR = "data_versions"
BEST_MODEL_DIR = "best_model_hf"


@dataclass(frozen=True)
class RunOrigin:
    """Where a run's figures come from, as its files say.

    Attributes:
        config: the tree of config.yaml; empty where there is none.
        environment: env.json; empty where there is none.
        data_versions: logged in the run, from old to new.
        measured: the row of `scripts/evaluate.py`; None for other runs.
        trained: whether the run trained.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data_versions: Sequence[DatasetVersion]
    measured: Row | None
    trained: bool

    @property
    def base(self) -> str | None:
        """The stock model, as it was named; None where the files do not say."""
        name = self.config.get("model", {}).get("variant") if self.measured is None else self.measured.get("stock")
        return None if name is None else str(name)

    def commands(self, run_dir: Path) -> list[str]:
        """Return the lines that make the run's figures again."""
        config = ["--config", str(run_dir / "config.yaml")]
        model = Path(self.config.get("paths", {}).get("checkpoints_dir", "checkpoints"), BEST_MODEL_DIR)
        named = self.measured or {"model": model, "stock": self.base}
        options = {f"--{key.replace('_', '-')}": named.get(key) for key in ("model", "stock", "data", "max_clips")}
        given = [part for key, value in options.items() if value is not None for part in (key, str(value))]
        given += ["--no-stock"] * (self.base is None)
        revision, changed, _ = str(self.environment.get("git_revision") or "").partition("+")
        note = "  # and changes that were not committed" if changed else ""
        lines = [f"git checkout {revision}{note}"] if revision else []
        lines += [shlex.join(["python", "scripts/train.py", *config])] if self.trained else []
        return [*lines, shlex.join(["python", "scripts/evaluate.py", *config, *given])]


def read_origin(run_dir: Path) -> RunOrigin:
    """Read where a run comes from.

    Raises: DataError: a damaged file.
    """
    rows = load_metrics(run_dir)
    measured = [row for row in rows if row["event"] == MEASURED_EVENT]
    return RunOrigin(
        config=_read_tree(run_dir / "config.yaml"),
        environment=_read_tree(run_dir / "env.json"),
        data_versions=DataVersionManager(run_dir / DATA_VERSIONS_DIR).versions(),
        measured=measured[-1] if measured else None,
        trained=any(row["event"] == "epoch" for row in rows),
    )


def _read_tree(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file, which is YAML too; nothing where there is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: damaged: {err}; remove it, or take it from a copy of the run") from err
    return tree if isinstance(tree, dict) else {}
