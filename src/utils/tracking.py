"""A run's folder, from which tables and figures can be drawn again; and its rows in TensorBoard, W&B and MLflow.

runs/<id>/config.yaml        the resolved configuration
runs/<id>/env.json           versions, machine, git revision
runs/<id>/metrics.jsonl      one row per event: train_step, epoch, evaluation, ...
runs/<id>/predictions.jsonl  one row per decoded utterance
runs/<id>/figures/
runs/<id>/tensorboard        `tensorboard --logdir <run>/tensorboard`
runs/<id>/wandb              online with a login, else offline: `wandb sync <run>/wandb/offline-run-*` sends it later
runs/<id>/mlruns             `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri <run>/mlruns`
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import re
import secrets
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from src.utils.config import Config, flatten
from src.utils.errors import ConfigError, MissingDependencyError, WhisperASRError
from src.utils.files import LOCK, claim, json_line, jsonable, parse_json, read_plain, write_text_atomic
from src.utils.runtime import installed_version, public
from src.utils.versioning import get_git_revision

logger = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "torchaudio", "transformers", "accelerate", "peft", "ctranslate2", "numpy", "jiwer", "silero-vad", "soxr",
)  # fmt: skip
MAX_RUN_ID_BYTES = 200
_EVALUATION_RATES = ("wer", "cer", "loss", "rtf")
_TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # on by default since 3.2
    "MLFLOW_ALLOW_FILE_STORE": "true",  # 3.17 refuses files without it and prefers a database
    "GIT_PYTHON_REFRESH": "quiet",  # no warning where git is absent
}
# Only our rows are recorded: no console output, code or machine data. Settings unknown to a version are left out.
_WANDB_SETTINGS: dict[str, Any] = {
    "silent": True, "console": "off", "disable_git": True, "disable_code": True, "save_code": False,
    "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip

Row = dict[str, Any]


class ExperimentLogger(AbstractContextManager["ExperimentLogger"]):
    """Append-only record of one run, in its folder and in the trackers that `tracking.trackers` names.

    A full disk does not end a training: rows wait in memory until they can be written. A tracker that fails is switched
    off with a warning. Until it is closed, no other process can write to the run.

    Args:
        config: saved with the run; trackers record it without the paths.
        run_id: folder name under `paths.runs_dir`; the time by default. An existing run is continued; a last row that
            was cut by a crash is removed.

    Raises:
        ConfigError: if `run_id` is no name of a folder.
        WhisperASRError: if the folder cannot be written, another process writes there, or a tracker cannot start.
        MissingDependencyError: if a package that a tracker needs is absent.
    """

    def __init__(self, config: Config, *, run_id: str | None = None) -> None:
        import torch  # reading a run's files needs no torch

        runs_dir, now = config.paths.runs_dir, time.strftime("%Y%m%d-%H%M%S")
        # the clock may have been set back, to when another run began
        names = (now if number == 1 else f"{now}-{number}" for number in itertools.count(1))
        self.run_id = check_run_id(run_id or next(name for name in names if not (runs_dir / name).exists()))
        self.dir = runs_dir / self.run_id
        self.figures_dir = self.dir / "figures"
        self.metrics_path = self.dir / "metrics.jsonl"
        self.predictions_path = self.dir / "predictions.jsonl"
        self._subscribers: list[Callable[[Row], None]] = []
        self._trackers: dict[str, _Tracker] = {}
        self._last_step = 0
        environment = {  # but no name, token or path of the user
            "python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "packages": {name: installed_version(name) for name in _PACKAGES}, "git_revision": get_git_revision(),
        }  # fmt: skip
        fix = "set paths.runs_dir, or choose another run id"
        self._unlock = claim(self.dir / LOCK, self, what=self.dir, error=WhisperASRError, fix=fix)
        try:
            self.figures_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.dir / "config.yaml", config.to_yaml())
            write_text_atomic(self.dir / "env.json", json.dumps(environment, indent=2))
            self._file = _RowFile(self.metrics_path)
        except OSError as err:
            self._unlock()
            raise WhisperASRError(f"{self.dir}: cannot be written: {err.strerror}; set paths.runs_dir") from err
        for name in config.tracking.trackers:
            try:
                self._trackers[name] = _TRACKERS[name](config, self.dir, self.run_id)
            except Exception as err:  # each package has errors of its own
                self.close()
                if isinstance(err, WhisperASRError):
                    raise
                if isinstance(err, ImportError):
                    raise MissingDependencyError(
                        f"tracker {name!r} needs a package that is absent ({err}): pip install "
                        f"{_TRACKER_PACKAGES[name]}, or leave it out of tracking.trackers"
                    ) from err
                raise WhisperASRError(
                    f"tracker {name!r} cannot start: {type(err).__name__}: {err}; leave it out of tracking.trackers"
                ) from err

    def log(self, event: str, **fields: Any) -> None:
        """Append one row with the time; values that are not finite become null.

        The row is on disk when this returns; if the disk is full, a later one takes it along.
        """
        row = {"event": event, "time": round(time.time(), 3), **jsonable(fields)}
        self._file.append(json_line(row))
        if event == "train_step":
            if not self._last_step or row["step"] <= self._last_step:  # an earlier session may have gone further
                self._each_tracker(lambda tracker: tracker.rewind(row["step"]))
            self._last_step = row["step"]
        if (point := point_of(row, self._last_step)) is not None:
            self._each_tracker(lambda tracker: tracker.write(*point))
        for callback in list(self._subscribers):
            try:
                callback(row)
            except Exception as err:  # boundary: an observer must not end hours of training
                self._subscribers.remove(callback)
                logger.warning("%r gets no more rows of the run after an error: %s", callback, err, exc_info=True)

    def subscribe(self, callback: Callable[[Row], None]) -> Callable[[], None]:
        """Call `callback` with each further row, after it was written; return a function that ends this.

        An error in `callback` ends it too, with a warning.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with suppress(ValueError):
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
            metrics: metrics.jsonl as saved in the checkpoint; its training rows are taken if this run has none, for
                example on a new machine.

        Raises:
            WhisperASRError: if metrics.jsonl cannot be rewritten; it stays as it was.
        """
        try:
            lines = _lines(self.metrics_path.read_bytes().decode(errors="replace"))
            restored = [] if _training_rows(lines) else _training_rows(_lines(metrics))
            kept = _without_later([*restored, *lines], step, epoch)
            if kept != lines:
                self._file.replace("".join(f"{line}\n" for line in kept))
                where = (self.metrics_path, len(kept), step, len(restored))
                logger.info("%s: %d rows until update %d, %d of them from the checkpoint", *where)
        except OSError as err:
            raise WhisperASRError(f"{self.metrics_path}: cannot be rewritten: {err.strerror}; free space") from err

    def close(self) -> None:
        """Close the file and finish the trackers; logging afterwards is an error. Lost rows are reported."""
        self._file.close()
        self._each_tracker(lambda tracker: tracker.close())
        self._trackers.clear()
        self._unlock()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _each_tracker(self, action: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as err:  # noqa: BLE001  boundary: other packages' errors must not end hours of training
                del self._trackers[name]
                reason = f"{type(err).__name__}: {err}"
                logger.warning("tracker %s is off from here on; metrics.jsonl goes on: %s", name, reason)


def check_run_id(run_id: str) -> str:
    """Return a run id that is a name, which no path is; raises `ConfigError` for any other."""
    is_name = isinstance(run_id, str) and re.fullmatch(r"\w([\w .,+=@#()-]*[\w+=@#()-])?", run_id)
    if not is_name or len(os.fsencode(run_id)) > MAX_RUN_ID_BYTES:
        what = f"{str(run_id)[:100]!r} is no run id: that is a name of at most {MAX_RUN_ID_BYTES} bytes, and no path"
        raise ConfigError(f"{what}; use letters, digits, - and _, and set paths.runs_dir to choose the place")
    return run_id


class _RowFile:
    """Appends lines to a file without a buffer: what a full disk refuses is kept and tried again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""  # starts with the rest of a line that was written in part
        self._failing = False
        self._lock = threading.Lock()
        # a last line without a newline is completed, or removed if it is not a row: readers refuse a broken line
        content = read_plain(path) if path.exists() else b""
        self._file = path.open("ab", buffering=0)
        last = content.rpartition(b"\n")[2]
        if last and _parse(last):
            self._file.write(b"\n")
        elif last:
            self._file.truncate(len(content) - len(last))
            logger.warning("%s: a crash cut the last row, it is removed: %.60r", path, last)

    def append(self, line: bytes) -> None:
        if self._file.closed:
            raise ValueError(f"{self._path}: the run is closed; continue it with ExperimentLogger(config, run_id=...)")
        with self._lock:
            self._pending += line
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
            if lost := self._pending.count(b"\n"):
                logger.warning("%s: the last %d rows are lost, no space for them", self._path, lost)
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
                waits = "rows wait in memory and are written once there is space"
                logger.warning("%s: a row cannot be written: %s; %s", self._path, err.strerror, waits)
            self._failing = True
            return
        if self._failing:
            logger.info("%s: written again, no row is missing", self._path)
        self._failing = False


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]  # not splitlines: a text may hold U+2028


def _training_rows(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if _parse(line).get("event") in ("train_step", "epoch")]


def _without_later(lines: Sequence[str], step: int, epoch: int) -> list[str]:
    rows = [_parse(line) for line in lines]
    begin, previous = 0, 0
    for index, row in enumerate(rows):
        if row.get("event") == "train_step":
            if row["step"] <= previous:  # a training that started again
                begin = index
            previous = row["step"]

    def is_later(row: Row) -> bool:
        event = row.get("event")
        return (event == "train_step" and row["step"] > step) or (event == "epoch" and row["epoch"] > epoch)

    return [line for i, (line, row) in enumerate(zip(lines, rows, strict=True)) if i < begin or not is_later(row)]


def _parse(line: str | bytes) -> Row:
    """Return a row, empty if the line is not one."""
    try:
        row = parse_json(line)
    except ValueError:  # not JSON, or not UTF-8
        return {}
    return row if isinstance(row, dict) else {}


Axis = Literal["step", "epoch"]


def point_of(row: Mapping[str, Any], last_step: int) -> tuple[Axis, int, dict[str, float]] | None:
    """Return axis, place on it, and the finite numbers of a row; None for events that trackers do not show.

    These are `train/<field>` by update, `epoch/<field>` by epoch, and `evaluation/<name>/<rate>` at the last update.
    Rates have their own names: the headline of several languages is `mean_of_languages`, that of Chinese `zh_cer`.
    """
    named: dict[str, Any] = {}
    if row.get("metric") == "mean":  # of one language, `wer` or `cer` is the headline
        by_language = row.get("rates_by_language") or {}
        named = {f"{prefix}mean_of_languages": row.get(f"{prefix}rate") for prefix in ("", "val_")}
        named |= {f"{code}_{rate['metric'].lower()}": rate["rate"] for code, rate in by_language.items()}
    row = {**row, **named}

    def numbers(prefix: str, keys: Iterable[str]) -> dict[str, float]:
        found = {f"{prefix}/{key}": row.get(key) for key in keys if key not in ("event", "time", "step")}
        finite = {k: v for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
        return {k: float(v) for k, v in finite.items() if not isinstance(v, bool)}

    match row["event"]:
        case "train_step":
            return "step", row["step"], numbers("train", row)
        case "epoch":
            return "epoch", row["epoch"], numbers("epoch", row.keys() - {"epoch", "val_rate"})
        case "evaluation":
            return "step", last_step, numbers(f"evaluation/{row['name']}", (*_EVALUATION_RATES, *named))
    return None


class _Tracker:
    """A package that shows rows; accelerate's own create its PartialState, which chooses the device."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None: ...

    def write(self, axis: Axis, x: int, values: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the update `step` and later ones, which are about to be repeated; W&B and MLflow keep both."""

    def close(self) -> None: ...


class _TensorBoard(_Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        # with this module, tensorboard does not import TensorFlow, which is installed in Colab and takes seconds
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda purge_step: SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self._writer = self._open(None)

    def write(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, x)
        self._writer.flush()  # visible at once, and an error is raised with its own row

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)  # readers drop older events from this step on; epochs are fewer than updates

    def close(self) -> None:
        self._writer.close()


class _Wandb(_Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        folder, id_file = run_dir / "wandb", run_dir / "wandb" / "id"
        folder.mkdir(exist_ok=True)
        if not id_file.exists():  # the parts of a continued run are one run in W&B
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        mode = _wandb_mode()
        cache_dir = str(folder.resolve() / "cache")  # else its service keeps a log below the user's home
        with _environment({"WANDB_CACHE_DIR": cache_dir}):
            import wandb

            known = {k: v for k, v in _WANDB_SETTINGS.items() if k in wandb.Settings.model_fields}
            self._run = wandb.init(
                project=config.tracking.project, name=run_id, id=id_file.read_text(encoding="utf-8").strip(),
                dir=str(run_dir.resolve()), mode=mode, config=_parameters(config),
                resume=None if mode else "allow",  # offline it has no effect but a warning
                reinit="create_new",  # a run that the user has open stays as it is
                settings=wandb.Settings(**known),
            )  # fmt: skip
        for pattern, axis in (("train/*", "step"), ("epoch/*", "epoch"), ("evaluation/*", "step")):
            self._run.define_metric(pattern, step_metric=axis)

    def write(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        self._run.log({axis: x, **values})

    def close(self) -> None:
        self._run.finish()


def _wandb_mode() -> Literal["offline"] | None:
    """Return "offline" if wandb would ask for a key; None leaves the choice to the user's own settings."""
    from requests.utils import get_netrc_auth  # type: ignore[import-untyped]

    wanted = os.environ.get("WANDB_MODE")
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    has_login = has_key or get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None
    if wanted == "disabled" or (has_login and wanted not in ("offline", "dryrun")):
        return None
    if wanted not in (None, "", "offline", "dryrun"):
        raise WhisperASRError(f"WANDB_MODE={wanted} needs a login: run `wandb login` first, or unset WANDB_MODE")
    if not has_login:
        logger.info("W&B: no login found, so the run is recorded offline; `wandb sync` sends it later")
    return "offline"


class _MLflow(_Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        project = config.tracking.project
        with _environment(_MLFLOW_ENVIRONMENT):
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient

            self._metric = Metric
            self._client = MlflowClient(tracking_uri=(run_dir / "mlruns").resolve().as_uri())
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            earlier = self._client.search_runs([experiment_id], max_results=1)  # of a run that is continued
            if earlier:
                self._id = str(earlier[0].info.run_id)
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = str(self._client.create_run(experiment_id, run_name=run_id).info.run_id)
                for key, value in flatten(_parameters(config)).items():
                    self._client.log_param(self._id, key, value)

    def write(self, axis: Axis, x: int, values: Mapping[str, float]) -> None:
        metrics = [self._metric(key, value, int(1000 * time.time()), x) for key, value in values.items()]
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def close(self) -> None:
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.set_terminated(self._id)


_TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}


def _parameters(config: Config) -> dict[str, Any]:
    return dict(public(config.model_dump(mode="json", exclude={"paths"})))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables temporarily; the user's are restored."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
