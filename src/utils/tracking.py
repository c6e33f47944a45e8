"""A run's folder, from which tables and figures can be drawn again.

runs/<id>/config.yaml        the resolved configuration
runs/<id>/env.json           versions, machine, git revision
runs/<id>/metrics.jsonl      one row per event: train_step, epoch, evaluation, ...
runs/<id>/predictions.jsonl  one row per decoded utterance
runs/<id>/figures/

A full disk does not end a training: rows wait in memory until they can be written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from src.utils.config import Config
from src.utils.errors import WhisperASRError
from src.utils.files import write_text_atomic
from src.utils.trackers import Trackers
from src.utils.versioning import get_git_revision

logger = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "torchaudio", "transformers", "accelerate", "peft", "ctranslate2", "numpy", "jiwer", "silero-vad", "soxr",
)  # fmt: skip

Row = dict[str, Any]


class ExperimentLogger:
    """Append-only record of one run, in its folder and in the trackers that `tracking.trackers` names.

    Args:
        config: saved with the run.
        run_id: folder name under `paths.runs_dir`; the time by default. An existing run is continued; a last row that
            was cut by a crash is removed.

    Raises:
        WhisperASRError: if the folder cannot be written or a tracker cannot start.
        MissingDependencyError: if a package that a tracker needs is absent.
    """

    def __init__(self, config: Config, *, run_id: str | None = None) -> None:
        self.run_id = run_id or time.strftime("%Y%m%d-%H%M%S")
        self.dir = config.paths.runs_dir / self.run_id
        self.figures_dir = self.dir / "figures"
        self.metrics_path = self.dir / "metrics.jsonl"
        self.predictions_path = self.dir / "predictions.jsonl"
        self._subscribers: list[Callable[[Row], None]] = []
        try:
            self.figures_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.dir / "config.yaml", config.to_yaml())
            write_text_atomic(self.dir / "env.json", json.dumps(describe_environment(), indent=2))
            self._file = _RowFile(self.metrics_path)
        except OSError as err:
            raise WhisperASRError(
                f"{self.dir}: cannot write the run's files: {err.strerror}; set paths.runs_dir"
            ) from err
        try:
            self._trackers = Trackers(config, self.dir, self.run_id)
        except WhisperASRError:
            self._file.close()
            raise

    def log(self, event: str, **fields: Any) -> None:
        """Append one row with the time; values that are not finite become null.

        The row is on disk when this returns. If the disk is full, a warning is logged and the row is written together
        with a later one.
        """
        row = {"event": event, "time": round(time.time(), 3), **{k: _jsonable(v) for k, v in fields.items()}}
        self._file.append(json.dumps(row, ensure_ascii=False))
        self._trackers.write(row)
        for callback in list(self._subscribers):
            try:
                callback(row)
            except Exception as err:  # boundary: an observer must not end hours of training
                self._subscribers.remove(callback)
                logger.warning("%r gets no more rows of the run after an error: %s", callback, err, exc_info=True)

    def subscribe(self, callback: Callable[[Row], None]) -> Callable[[], None]:
        """Call `callback` with each further row, after it was written.

        Returns:
            A function that ends the subscription. An error in `callback` ends it too, with a warning.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def read_rows(self) -> str:
        """Return the content of metrics.jsonl; an empty string, after a warning, if it cannot be read."""
        try:
            return self.metrics_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            logger.warning("%s: cannot be read for the checkpoint: %s", self.metrics_path, err)
            return ""

    def resume_at(self, step: int, epoch: int, *, metrics: str = "") -> None:
        """Remove what the last training logged after a checkpoint, so that resuming from it repeats no row.

        Args:
            step: updates done at the checkpoint; later `train_step` rows are removed.
            epoch: epochs finished at the checkpoint; later `epoch` rows are removed.
            metrics: metrics.jsonl as saved in the checkpoint. If this run has no training rows, for example on a new
                machine, they are taken from there.

        Raises:
            WhisperASRError: if metrics.jsonl cannot be rewritten; it stays as it was.
        """
        try:
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
            restored = [] if _training_rows(lines) else _training_rows(metrics.splitlines())
            kept = _without_later([*restored, *lines], step, epoch)
            if kept != lines:
                self._file.replace("".join(f"{line}\n" for line in kept))
                logger.info(
                    "%s: %d rows until update %d, %d of them from the checkpoint",
                    self.metrics_path, len(kept), step, len(restored),
                )  # fmt: skip
        except OSError as err:
            raise WhisperASRError(f"{self.metrics_path}: cannot be rewritten: {err.strerror}; free space") from err

    def close(self) -> None:
        """Close the file and finish the trackers; logging afterwards is an error. Lost rows are reported."""
        self._file.close()
        self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe_environment() -> dict[str, Any]:
    """Return versions, machine and git revision, but no name, token or path of the user."""
    import torch  # reading a run's files needs no torch

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


class _RowFile:
    """Appends lines to a file without a buffer: what a full disk refuses is kept and tried again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""  # starts with the rest of a line that was written in part
        self._failing = False
        self._lock = threading.Lock()
        _repair_end(path)
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        if self._file.closed:
            raise ValueError(f"{self._path}: the run is closed; continue it with ExperimentLogger(config, run_id=...)")
        with self._lock:
            self._pending += line.encode() + b"\n"
            self._write()

    def replace(self, text: str) -> None:
        """Replace the file's content; if that fails, it stays."""
        with self._lock:
            self._file.close()
            try:
                write_text_atomic(self._path, text)
            finally:
                self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        if self._file.closed:
            return
        with self._lock:
            self._write()
            if self._pending:
                logger.warning(
                    "%s: the last %d rows are lost, no space for them", self._path, self._pending.count(b"\n")
                )
            try:
                self._file.close()
            except OSError as err:  # network drives report at the end what they could not keep
                logger.warning("%s: the last rows may be lost: %s", self._path, err.strerror)

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as err:
            if not self._failing:
                logger.warning(
                    "%s: a row cannot be written: %s; rows are kept in memory and written once there is space",
                    self._path, err.strerror,
                )  # fmt: skip
            self._failing = True
            return
        if self._failing:
            logger.info("%s: written again, no row is missing", self._path)
        self._failing = False


def _repair_end(path: Path) -> None:
    """Complete a last line without a newline, or remove it if it is not a row: readers refuse a broken line."""
    content = path.read_bytes() if path.exists() else b""
    whole, last = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if not last:
        return
    if _parse(last) is not None:
        write_text_atomic(path, content.decode() + "\n")
        return
    with path.open("r+b") as file:
        file.truncate(len(whole))
    logger.warning("%s: a crash cut the last row, it is removed: %.60r", path, last)


def _training_rows(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if (_parse(line) or {}).get("event") in ("train_step", "epoch")]


def _without_later(lines: Sequence[str], step: int, epoch: int) -> list[str]:
    rows = [_parse(line) or {} for line in lines]
    begin, previous = 0, 0
    for index, row in enumerate(rows):
        if row.get("event") == "train_step":
            if row["step"] <= previous:  # a training that started again
                begin = index
            previous = row["step"]
    limits = {"train_step": ("step", step), "epoch": ("epoch", epoch)}

    def is_later(row: Row) -> bool:
        key, limit = limits.get(str(row.get("event")), ("", 0))
        return bool(key) and row[key] > limit

    return [line for i, (line, row) in enumerate(zip(lines, rows, strict=True)) if i < begin or not is_later(row)]


def _parse(line: str | bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return row if isinstance(row, dict) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
