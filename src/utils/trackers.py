"""A run's rows in TensorBoard, Weights & Biases and MLflow: all files lie below the run's folder, no login is needed.

tensorboard  `tensorboard --logdir <run>/tensorboard`
wandb        online with a login, else offline: `wandb sync <run>/wandb/offline-run-*` sends it later
mlflow       `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri <run>/mlruns`

They show `train/<field>` by update, `epoch/<field>` by epoch, and `evaluation/<name>/<rate>` at the last update before
it. Updates that are repeated by a resumed or restarted training replace the older ones in TensorBoard; the other two
keep both.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from src.utils.config import Config, flatten
from src.utils.errors import MissingDependencyError, WhisperASRError

logger = logging.getLogger(__name__)

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_EVALUATION_RATES = ("wer", "cer", "loss", "rtf")
_NOT_VALUES = ("event", "time", "step")
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


class Trackers:
    """The trackers that `tracking.trackers` names. One that fails is switched off with a warning; training goes on.

    Args:
        config: `tracking` is used; everything but the paths is recorded as the run's parameters.
        run_dir: the run's folder; all files are written below it.
        run_id: the run's name in W&B and MLflow.

    Raises:
        MissingDependencyError: if a package is absent.
        WhisperASRError: if a tracker cannot start.
    """

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        self._open: dict[str, _Tracker] = {}
        self._last_step: int | None = None
        for name in config.tracking.trackers:
            try:
                self._open[name] = _OPENERS[name](config, run_dir, run_id)
            except Exception as err:  # each package has errors of its own
                self.close()
                if isinstance(err, WhisperASRError):
                    raise
                if isinstance(err, ImportError):
                    raise MissingDependencyError(
                        f"tracker {name!r} needs a package that is absent ({err}): pip install "
                        f"{_PACKAGES[name]}, or leave it out of tracking.trackers"
                    ) from err
                raise WhisperASRError(
                    f"tracker {name!r} cannot start: {type(err).__name__}: {err}; leave it out of tracking.trackers"
                ) from err

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row of metrics.jsonl, if it has any for trackers."""
        if row["event"] == "train_step":
            step = int(row["step"])
            if self._last_step is None or step <= self._last_step:  # an earlier session may have gone further
                self._each(lambda tracker: tracker.rewind(step))
            self._last_step = step
        point = point_of(row, self._last_step or 0)
        if point is not None:
            self._each(lambda tracker: tracker.write(point))

    def close(self) -> None:
        """Finish all trackers."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, action: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as err:  # noqa: BLE001  boundary: other packages' errors must not end hours of training
                del self._open[name]
                logger.warning(
                    "tracker %s failed and is off from here on; metrics.jsonl goes on: %s: %s",
                    name, type(err).__name__, err,
                )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Numbers of one row, by name, at a place on an axis."""

    axis: Literal["step", "epoch"]
    x: int
    values: Mapping[str, float]


def point_of(row: Mapping[str, Any], last_step: int) -> Point | None:
    """Return the finite numbers of a row of metrics.jsonl; None for events that trackers do not show.

    Args:
        row: of metrics.jsonl.
        last_step: the update at which the rates of an evaluation are shown.
    """
    if row["event"] == "train_step":
        return Point("step", int(row["step"]), _numbers(row, "train/", row))
    if row["event"] == "epoch":
        return Point("epoch", int(row["epoch"]), _numbers(row, "epoch/", [key for key in row if key != "epoch"]))
    if row["event"] == "evaluation":
        return Point("step", last_step, _numbers(row, f"evaluation/{row['name']}/", _EVALUATION_RATES))
    return None


def _numbers(row: Mapping[str, Any], prefix: str, keys: Iterable[str]) -> dict[str, float]:
    values = {prefix + key: row.get(key) for key in keys if key not in _NOT_VALUES}
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class _Tracker(Protocol):
    # accelerate's trackers do not fit: they create its PartialState, which chooses the device before the trainer does
    def write(self, point: Point) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the update `step` and later ones, which are about to be repeated."""

    def close(self) -> None: ...


class _TensorBoard(_Tracker):
    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        # with this module, tensorboard does not import TensorFlow, which is installed in Colab and takes seconds
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        self._folder = run_dir / "tensorboard"
        self._start()

    def _start(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    def write(self, point: Point) -> None:
        for tag, value in point.values.items():
            self._writer.add_scalar(tag, value, point.x)
        self._writer.flush()  # visible at once, and an error is raised with its own row

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._start(purge_step=step)  # readers drop older events from this step on; epochs are fewer than updates

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

    def write(self, point: Point) -> None:
        self._run.log({point.axis: point.x, **point.values})

    def close(self) -> None:
        self._run.finish()


def _wandb_mode() -> Literal["offline"] | None:
    """Return "offline" if wandb would ask for a key; None leaves the choice to the user's own settings."""
    from requests.utils import get_netrc_auth  # type: ignore[import-untyped]

    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("offline", "dryrun"):
        return "offline"
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    has_login = has_key or get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None
    if wanted == "disabled" or has_login:
        return None
    if wanted:
        raise WhisperASRError(f"WANDB_MODE={wanted} needs a login: run `wandb login` first, or unset WANDB_MODE")
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

    def write(self, point: Point) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self._metric(key, value, now_ms, point.x) for key, value in point.values.items()]
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def close(self) -> None:
        with _environment(_MLFLOW_ENVIRONMENT):
            self._client.set_terminated(self._id)


_OPENERS: dict[str, Callable[[Config, Path, str], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def _parameters(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"paths"})


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
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
