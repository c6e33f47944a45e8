"""A run's folder: everything that a table or a picture is drawn from, so that both can be drawn again.

runs/<id>/config.yaml        the resolved configuration
runs/<id>/env.json           versions, machine, git revision
runs/<id>/metrics.jsonl      one row an event: train_step, epoch, evaluation, ...
runs/<id>/predictions.jsonl  one row a decoded utterance
runs/<id>/figures/
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from src.utils.config import Config
from src.utils.errors import WhisperASRError
from src.utils.versioning import get_git_revision

_PACKAGES = ("torch", "torchaudio", "transformers", "accelerate", "ctranslate2", "numpy", "jiwer", "silero-vad", "soxr")


class ExperimentLogger:
    """Append-only record of one run.

    Args:
        config: saved with the run.
        run_id: folder name under `paths.runs_dir`; the time by default. An existing run is continued.
    Raises: WhisperASRError: the folder cannot be written.
    """

    def __init__(self, config: Config, *, run_id: str | None = None) -> None:
        self.run_id = run_id or time.strftime("%Y%m%d-%H%M%S")
        self.dir = config.paths.runs_dir / self.run_id
        self.figures_dir = self.dir / "figures"
        self.metrics_path = self.dir / "metrics.jsonl"
        self.predictions_path = self.dir / "predictions.jsonl"
        try:
            self.figures_dir.mkdir(parents=True, exist_ok=True)
            (self.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            (self.dir / "env.json").write_text(json.dumps(describe_environment(), indent=2), encoding="utf-8")
            self._file = self.metrics_path.open("a", encoding="utf-8")
        except OSError as err:
            raise WhisperASRError(
                f"{self.dir}: cannot write the run's files: {err.strerror}; set paths.runs_dir"
            ) from err

    def log(self, event: str, **fields: Any) -> None:
        """Append one row with the time; it is on disk when this returns. Values that are not finite become null."""
        row = {"event": event, "time": round(time.time(), 3), **{k: _jsonable(v) for k, v in fields.items()}}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; logging afterwards is an error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe_environment() -> dict[str, Any]:
    """Return versions, machine and git revision; holds no name, token or path of the user."""
    import torch  # here, so that reading a run's files needs no torch

    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
        "git_revision": get_git_revision(),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
