"""What trackers wrote is read back with their own readers; nothing is written outside the run's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from src.utils import tracking
from src.utils.config import Config
from src.utils.errors import MissingDependencyError, WhisperASRError
from src.utils.tracking import ExperimentLogger, point_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def with_trackers(config: Config, *names: str) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"trackers": names})})


def log_a_training(experiment: ExperimentLogger, steps: range) -> None:
    for step in steps:
        experiment.log("train_step", step=step, epoch=1, loss=1 / step, grad_norm=None, gpu_memory_mb=None)
    experiment.log("epoch", epoch=1, val_wer=0.3, is_best=True)
    experiment.log("evaluation", name="tuned", wer=0.25, cer=float("nan"), rtf=0.1, normalizer="plain-v1", n=40)
    experiment.log("streaming", wer=0.3)


@pytest.mark.parametrize(
    ("row", "point"),
    [
        ({"event": "train_step", "time": 1.0, "step": 7, "epoch": 2, "loss": 0.5, "grad_norm": None},
         ("step", 7, {"train/loss": 0.5, "train/epoch": 2.0})),
        ({"event": "epoch", "time": 1.0, "epoch": 2, "val_wer": 0.5, "is_best": True},
         ("epoch", 2, {"epoch/val_wer": 0.5})),
        ({"event": "evaluation", "name": "stock", "wer": 0.5, "loss": float("nan"), "n": 3},
         ("step", 9, {"evaluation/stock/wer": 0.5})),
        ({"event": "checkpoint", "step": 9}, None),
    ],
)  # fmt: skip
def test_rows_become_numbers_under_slashed_names(row: dict[str, Any], point: Any) -> None:
    assert point_of(row, 9) == point


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_rows_while_the_run_goes_on_and_updates_done_again_once(config: Config) -> None:
    chosen = with_trackers(config, "tensorboard")
    with ExperimentLogger(chosen, run_id="r") as experiment:
        log_a_training(experiment, range(1, 4))
        scalars = read_tensorboard(experiment.dir / "tensorboard")
    assert scalars["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]  # kept as float32
    assert scalars["epoch/val_wer"] == [(1, pytest.approx(0.3))]
    assert scalars["evaluation/tuned/wer"] == [(3, 0.25)]
    assert set(scalars) == {
        "train/loss", "train/epoch", "epoch/val_wer", "evaluation/tuned/wer", "evaluation/tuned/rtf",
    }  # fmt: skip
    with ExperimentLogger(chosen, run_id="r") as experiment:  # a crash at 3, resumed from a checkpoint at 1
        log_a_training(experiment, range(2, 6))
    steps_shown = [step for step, _ in read_tensorboard(experiment.dir / "tensorboard")["train/loss"]]
    assert steps_shown == list(range(1, 6))


def test_mlflow_reads_the_rows_and_a_continued_run_stays_one(config: Config) -> None:
    chosen = with_trackers(config, "mlflow")
    before = dict(os.environ)
    for steps in (range(1, 4), range(4, 6)):
        with ExperimentLogger(chosen, run_id="r") as experiment:
            log_a_training(experiment, steps)
    assert dict(os.environ) == before
    from mlflow.tracking import MlflowClient

    with tracking._environment(tracking._MLFLOW_ENVIRONMENT):
        client = MlflowClient(tracking_uri=(experiment.dir / "mlruns").as_uri())
        project = client.get_experiment_by_name("whisper_asr")
        assert project is not None
        (run,) = client.search_runs([project.experiment_id])
        losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert losses == [(step, 1 / step) for step in range(1, 6)]
    assert run.data.metrics["evaluation/tuned/wer"] == 0.25
    assert run.data.params["training.epochs"] == str(config.training.epochs)
    assert not [name for name in run.data.params if name.startswith("paths")]


def read_wandb(run_file: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, rows = DataStore(), []
    store.open_for_scan(str(run_file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    return rows


SESSION = """
import sys
from src.utils.config import load_config
from src.utils.tracking import ExperimentLogger
from tests.utils.test_trackers import log_a_training
config = load_config(None, overrides={"paths": {"runs_dir": sys.argv[1]}, "tracking": {"trackers": sys.argv[2:]}})
for steps in (range(1, 4), range(4, 6)):
    with ExperimentLogger(config, run_id="r") as experiment:
        log_a_training(experiment, steps)
import tensorboard.compat
assert tensorboard.compat.tf.__version__ == "stub"  # TensorFlow would not be imported if it were installed
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None
"""


@pytest.mark.slow
def test_all_three_stay_within_the_run_silent_and_offline(tmp_path: Path) -> None:
    home, elsewhere, runs = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "runs"
    home.mkdir()
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "PYTEST_", "WANDB_", "MLFLOW_"))}
    environment.pop("CI", None)  # MLflow's telemetry is on where it sees no test and no CI
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(runs), "tensorboard", "wandb", "mlflow"],
        cwd=elsewhere, env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert not [path for folder in (home, elsewhere) for path in folder.rglob("*") if path.is_file()]
    folders = sorted((runs / "r" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # both are parts of one run
    rows = [row for folder in folders for row in read_wandb(next(folder.glob("*.wandb")))]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 1 / step) for step in range(1, 6)]
    assert [(row["step"], row["evaluation/tuned/wer"]) for row in rows if "evaluation/tuned/wer" in row] == [
        (3, 0.25), (5, 0.25),
    ]  # fmt: skip
    assert [(row["epoch"], row["epoch/val_wer"]) for row in rows if "epoch/val_wer" in row] == [(1, 0.3), (1, 0.3)]


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny")]
)
def test_an_absent_package_is_named_at_the_start(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name or m.startswith(f"torch.utils.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=package):
        ExperimentLogger(with_trackers(config, name), run_id="r")


def test_online_without_a_login_is_refused_rather_than_asked_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(WhisperASRError, match="wandb login"):
        ExperimentLogger(with_trackers(config, "wandb"), run_id="r")


def test_a_login_leaves_the_mode_to_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tracking._wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert tracking._wandb_mode() is None
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    assert tracking._wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking._wandb_mode() is None


class Failing:
    def __init__(self, *_: Any) -> None:
        self.writes = 0

    def rewind(self, step: int) -> None: ...

    def write(self, *point: Any) -> None:
        self.writes += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise AssertionError("it is off already")


def test_a_tracker_that_fails_is_off_after_one_warning_and_the_rest_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing()
    monkeypatch.setitem(tracking._TRACKERS, "mlflow", lambda *_: failing)
    with ExperimentLogger(with_trackers(config, "mlflow", "tensorboard"), run_id="r") as experiment:
        log_a_training(experiment, range(1, 4))
    assert failing.writes == 1
    warnings = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert len(warnings) == 1
    assert "mlflow" in warnings[0] and "No space left on device" in warnings[0]
    assert len(experiment.metrics_path.read_text().splitlines()) == 6
    assert len(read_tensorboard(experiment.dir / "tensorboard")["train/loss"]) == 3


def test_a_tracker_that_cannot_start_is_an_error_and_those_that_did_are_closed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such server")

    monkeypatch.setitem(tracking._TRACKERS, "mlflow", refuse)
    closed: list[bool] = []
    monkeypatch.setattr(tracking._TensorBoard, "close", lambda self: closed.append(True))
    with pytest.raises(WhisperASRError, match=r"'mlflow'.*no such server.*tracking\.trackers"):
        ExperimentLogger(with_trackers(config, "tensorboard", "mlflow"), run_id="r")
    assert closed == [True]
