"""A run's rows in TensorBoard, Weights & Biases and MLflow. All files are below the run's folder; no login is needed.

`train/<field>` at the update, `epoch/<field>` at the epoch, `evaluation/<name>/<rate>` at the last update before it.

tensorboard  `tensorboard --logdir <run>/tensorboard`. Its event file is written here, record by record: torch's writer
             needs a thread, in which errors wait, and imports TensorFlow wherever it is installed, as in Colab.
wandb        online with a login, else offline; `wandb sync <run>/wandb/offline-run-*` sends it later.
mlflow       `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri <run>/mlruns`, with the whole of mlflow.

Updates that are done again, in a run that is resumed or trained anew, replace the older ones in TensorBoard; the other
two only ever append, so there both passes stay.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from src.utils.config import Config, flatten
from src.utils.errors import MissingDependencyError, WhisperASRError

logger = logging.getLogger(__name__)

_RATES = ("wer", "cer", "loss", "rtf")
_NOT_VALUES = ("event", "time", "step")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # on by default since 3.2; DO_NOT_TRACK would do as well
    "MLFLOW_ALLOW_FILE_STORE": "true",  # 3.17 refuses files without it; what it prefers is a database
    "GIT_PYTHON_REFRESH": "quiet",  # no lecture where git is absent
}
# Our rows hold the measures. Names that a version of wandb does not know are left out.
_WANDB_SETTINGS: dict[str, Any] = {
    "silent": True, "console": "off", "disable_git": True, "disable_code": True, "save_code": False,
    "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Numbers of one row, by name, at a place on an axis."""

    axis: Literal["step", "epoch"]
    x: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """Where points go."""

    def write(self, point: Point) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the update `step` and later ones, which are about to be done again."""

    def close(self) -> None: ...


class Trackers:
    """The trackers that `tracking.trackers` names. One that fails later is switched off; training goes on.

    Args:
        config: `tracking`; all of it but the paths is shown as the run's parameters.
        run_dir: what is written goes below it.
        run_id: the run's name in W&B and MLflow.
    Raises: MissingDependencyError: a package is absent. WhisperASRError: a tracker cannot start.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        self._open: dict[str, Tracker] = {}
        self._last_step: int | None = None
        try:
            for name in config.tracking.trackers:
                self._open[name] = _start(name, config, run_dir, run_id)
        except WhisperASRError:
            self.close()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Write what a row of metrics.jsonl holds for trackers, if anything."""
        if row["event"] == "train_step":
            step = int(row["step"])
            if self._last_step is None or step <= self._last_step:  # an earlier session may have gone further
                self._each(lambda tracker: tracker.rewind(step))
            self._last_step = step
        point = point_of(row, self._last_step or 0)
        if point is not None:
            self._each(lambda tracker: tracker.write(point))

    def close(self) -> None:
        """Finish all."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as err:  # noqa: BLE001  boundary: other packages' errors must not end hours of training
                del self._open[name]
                logger.warning(
                    "tracker %s failed and is off from here on; metrics.jsonl goes on: %s: %s",
                    name, type(err).__name__, err,
                )  # fmt: skip


def _start(name: str, config: Config, run_dir: Path, run_id: str) -> Tracker:
    try:
        return _OPENERS[name](config, run_dir, run_id)
    except ImportError as err:
        raise MissingDependencyError(
            f"tracker {name!r} needs a package that is absent ({err}): pip install {_PACKAGES[name]}, or leave it out "
            "of tracking.trackers"
        ) from err
    except WhisperASRError:
        raise
    except Exception as err:  # each package has errors of its own
        raise WhisperASRError(
            f"tracker {name!r} cannot start: {type(err).__name__}: {err}; leave it out of tracking.trackers"
        ) from err


def point_of(row: Mapping[str, Any], last_step: int) -> Point | None:
    """Return the numbers of a row, without those that are missing or not finite; None for other events.

    Args:
        row: of metrics.jsonl.
        last_step: where the rates of an evaluation are shown.
    """
    if row["event"] == "train_step":
        return Point("step", int(row["step"]), _numbers(row, "train/", row))
    if row["event"] == "epoch":
        fields = [key for key in row if key != "epoch"]
        return Point("epoch", int(row["epoch"]), _numbers(row, "epoch/", fields))
    if row["event"] == "evaluation":
        return Point("step", last_step, _numbers(row, f"evaluation/{row['name']}/", _RATES))
    return None


def _numbers(row: Mapping[str, Any], prefix: str, keys: Any) -> dict[str, float]:
    values = {prefix + key: row.get(key) for key in keys if key not in _NOT_VALUES}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


class _TensorBoard(Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto, self._summary = event_pb2, summary_pb2
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # the name is what TensorBoard looks for and sorts by; one file a session
        self._records = RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}").open("xb"))
        self._write(file_version="brain.Event:2")

    def write(self, point: Point) -> None:
        values = [self._summary.Summary.Value(tag=tag, simple_value=v) for tag, v in point.values.items()]
        self._write(step=point.x, summary=self._summary.Summary(value=values))

    def rewind(self, step: int) -> None:
        # readers drop what came before this record and is at or after its step; epochs are fewer than updates
        self._write(step=step, session_log=self._proto.SessionLog(status=self._proto.SessionLog.START))

    def close(self) -> None:
        self._records.close()

    def _write(self, **fields: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()  # seen at once, and an error comes to its own row


class _Wandb(Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        cache_dir = str(folder.resolve() / "cache")  # else its service keeps a log below the user's home
        mode = _wandb_mode()
        with _environment({"WANDB_CACHE_DIR": cache_dir}):
            import wandb

            known = {k: v for k, v in _WANDB_SETTINGS.items() if k in wandb.Settings.model_fields}
            self._run = wandb.init(
                project=config.tracking.project, name=run_id, id=_kept_id(folder / "id"), dir=str(run_dir.resolve()),
                mode=mode, config=_parameters(config),
                resume=None if mode else "allow",  # offline it has no effect but a warning
                reinit="create_new",  # a run that the user has open stays as it is
                settings=wandb.Settings(**known),
            )  # fmt: skip
        for pattern, axis in (("train/*", "step"), ("epoch/*", "epoch"), ("evaluation/*", "step")):
            self._run.define_metric(pattern, step_metric=axis)

    def write(self, point: Point) -> None:
        self._run.log({point.axis: point.x, **point.values})

    def close(self) -> None:
        self._run.finish()


class _MLflow(Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        with _environment(_MLFLOW_ENVIRONMENT):
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient

            self._metric = Metric
            self._client = MlflowClient(tracking_uri=(run_dir / "mlruns").resolve().as_uri())
            self._id = self._continued_or_new(config, run_id)

    def _continued_or_new(self, config: Config, run_id: str) -> str:
        project = config.tracking.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        for run in self._client.search_runs([experiment_id], max_results=1):
            self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        new_id = str(self._client.create_run(experiment_id, run_name=run_id).info.run_id)
        for key, value in flatten(_parameters(config)).items():
            self._client.log_param(new_id, key, value)
        return new_id

    def write(self, point: Point) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self._metric(key, value, now_ms, point.x) for key, value in point.values.items()]
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def close(self) -> None:
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.set_terminated(self._id)


_OPENERS: dict[str, Callable[[Config, Path, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def _wandb_mode() -> Literal["offline"] | None:
    """Return "offline" where wandb would ask for a key; None leaves the choice to the user's own settings."""
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("offline", "dryrun"):
        return "offline"
    if wanted == "disabled" or _has_wandb_login():
        return None
    if wanted:
        raise WhisperASRError(f"WANDB_MODE={wanted} needs a login: run `wandb login` first, or unset WANDB_MODE")
    logger.info("W&B: no login found, so the run is recorded offline; `wandb sync` sends it later")
    return "offline"


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):  # absent or damaged: no login
            continue
    return False


def _kept_id(path: Path) -> str:
    """Return the id that a continued run had, so that its parts are one run in W&B."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _parameters(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"paths"})


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; the user's are put back."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
