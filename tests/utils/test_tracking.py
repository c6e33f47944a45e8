"""A run's rows, and what trackers wrote of them, read back with the trackers' own readers."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.report.run_files import load_metrics
from src.utils import tracking
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, MissingDependencyError, WhisperASRError
from src.utils.tracking import ExperimentLogger, check_run_id, point_of

ROOT = Path(__file__).resolve().parents[2]


def refuse(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_run_that_begins_in_the_second_of_another_has_a_name_of_its_own(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *given: "20261129-023000")  # the hour that comes twice
    names = []
    for _ in range(3):
        with ExperimentLogger(config) as experiment:
            names.append(experiment.run_id)
    assert names == ["20261129-023000", "20261129-023000-2", "20261129-023000-3"]


def test_rows_are_on_disk_at_once_and_values_that_are_not_finite_are_null(config: Config) -> None:
    experiment = ExperimentLogger(config, run_id="r")
    experiment.log("train_step", loss=float("nan"), path=Path("a"), step=1)
    (row,) = [json.loads(line) for line in experiment.metrics_path.read_text().splitlines()]
    assert (row["event"], row["loss"], row["path"], row["step"]) == ("train_step", None, "a", 1)
    for _ in range(2):
        experiment.close()
    with pytest.raises(ValueError, match="closed"):
        experiment.log("epoch", epoch=1)


def test_a_run_is_continued_and_its_configuration_loads(config: Config) -> None:
    for _ in range(2):
        with ExperimentLogger(config, run_id="r") as experiment:
            experiment.log("epoch", epoch=1)
    assert len(load_metrics(experiment.dir)) == 2
    assert load_config(experiment.dir / "config.yaml") == config
    environment = json.loads((experiment.dir / "env.json").read_text())
    assert {"python", "platform", "packages", "git_revision"} <= set(environment)


def test_a_place_that_cannot_be_written_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file stands here")
    with pytest.raises(WhisperASRError, match=r"paths\.runs_dir"):
        ExperimentLogger(config, run_id="r")


@contextmanager
def no_space_after(size_bytes: int) -> Iterator[None]:
    """The system cuts writes at this size of a file, then refuses them, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_a_full_disk_refused_follow_once_there_is_space_and_lost_ones_are_counted(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        experiment = ExperimentLogger(config, run_id="r")
        log_training(experiment, range(1, 2))
        with no_space_after(experiment.metrics_path.stat().st_size + 20):  # within the next row
            log_training(experiment, range(2, 4))
        assert not experiment.metrics_path.read_text().endswith("\n")
        log_training(experiment, range(4, 5))
        assert [step for _, step in shown(experiment, "train_step")] == [1, 2, 3, 4]
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        with no_space_after(experiment.metrics_path.stat().st_size + 20):
            log_training(experiment, range(5, 6))
            log_training(experiment, range(7, 8))
            experiment.close()
        assert "the last 2 rows are lost" in caplog.messages[-1]
        with ExperimentLogger(config, run_id="r") as experiment:
            log_training(experiment, range(5, 6))
        assert "a crash cut the last row" in caplog.messages[-1]
    assert [step for _, step in shown(experiment, "train_step")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rest", "kept"), [(b'{"event": "ep', 1), (b"\0\0\0\0", 1), (b'{"event": "epoch", "epoch": 9}', 2)]
)
def test_a_last_row_without_its_end_is_finished_or_taken_off(config: Config, rest: bytes, kept: int) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("epoch", epoch=1)
    with experiment.metrics_path.open("ab") as file:
        file.write(rest)
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("epoch", epoch=2)
    assert len(load_metrics(experiment.dir)) == kept + 1


def test_a_line_separator_in_a_text_is_no_end_of_a_row_for_any_reader(config: Config) -> None:
    """Also of runs that older versions wrote."""
    name = "a\u2028b\u2029c\x85d"
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("evaluation", name=name)
        with experiment.metrics_path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"event": "epoch", "epoch": 1, "name": name}, ensure_ascii=False) + "\n")
        saved = experiment.read_rows()
        experiment.resume_at(0, 0)
        assert [row["name"] for row in load_metrics(experiment.dir)] == [name]
    with ExperimentLogger(config, run_id="s") as experiment:
        experiment.resume_at(0, 1, metrics=saved)
        assert [(row["event"], row["name"]) for row in load_metrics(experiment.dir)] == [("epoch", name)]


def log_training(experiment: ExperimentLogger, steps: range) -> None:
    """Two updates an epoch, each epoch with its row."""
    for step in steps:
        experiment.log("train_step", step=step, epoch=(step + 1) // 2)
        if step % 2 == 0:
            experiment.log("epoch", epoch=step // 2)


def shown(experiment: ExperimentLogger, *events: str) -> list[tuple[str, Any]]:
    """Each row's event and its update or epoch."""
    rows = [(row["event"], row.get("step", row.get("epoch"))) for row in load_metrics(experiment.dir)]
    return [row for row in rows if not events or row[0] in events]


def test_a_resumed_run_holds_the_rows_of_one_that_ran_through(config: Config) -> None:
    with ExperimentLogger(config, run_id="straight") as straight:
        straight.log("evaluation", name="stock", text="a line\u2028separator")
        log_training(straight, range(1, 9))
    with ExperimentLogger(config, run_id="resumed") as experiment:
        experiment.log("evaluation", name="stock", text="a line\u2028separator")
        log_training(experiment, range(1, 7))
    with ExperimentLogger(config, run_id="resumed") as experiment:
        experiment.resume_at(step=3, epoch=1)
        log_training(experiment, range(4, 9))
    assert shown(experiment) == shown(straight)
    with ExperimentLogger(config, run_id="new") as experiment:  # on a new machine, with the rows of the checkpoint
        experiment.log("data_report", clips=3)
        experiment.resume_at(step=3, epoch=1, metrics=straight.metrics_path.read_text())
        log_training(experiment, range(4, 9))
    assert shown(experiment, "train_step", "epoch", "evaluation") == shown(straight, "train_step", "epoch")


def test_resuming_takes_rows_of_the_last_training_only(config: Config) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        log_training(experiment, range(1, 7))  # a cell that was run, and run again
        log_training(experiment, range(1, 5))
        for _ in range(2):
            experiment.resume_at(step=2, epoch=1)
            assert [place for _, place in shown(experiment, "train_step")] == [1, 2, 3, 4, 5, 6, 1, 2]
            assert [place for _, place in shown(experiment, "epoch")] == [1, 2, 3, 1]


def test_rows_that_cannot_be_read_or_taken_back_do_not_end_a_training(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        log_training(experiment, range(1, 4))
        before = shown(experiment)
        with (
            monkeypatch.context() as patch,
            pytest.raises(WhisperASRError, match="No space left on device; free space"),
        ):
            patch.setattr(tracking, "write_text_atomic", refuse)
            experiment.resume_at(step=1, epoch=0)
        experiment.log("train_step", step=4, epoch=2)
        assert shown(experiment) == [*before, ("train_step", 4)]
        assert '"epoch": 1' in experiment.read_rows()
        experiment.metrics_path.unlink()  # somebody cleans up
        assert experiment.read_rows() == ""
    assert "cannot be read for the checkpoint" in caplog.text


def test_subscribers_get_each_row_and_one_that_fails_gets_no_more(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.subscribe(refuse)
        unsubscribe = experiment.subscribe(lambda row: seen.append(row["step"]))
        for step in (1, 2):
            experiment.log("train_step", step=step, epoch=1)
        unsubscribe()
        experiment.log("train_step", step=3, epoch=1)
    assert seen == [1, 2]
    assert len(caplog.records) == 1
    assert len(load_metrics(experiment.dir)) == 3


# trackers


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def with_trackers(config: Config, *names: str) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"trackers": names})})


def log_everything(experiment: ExperimentLogger, steps: range) -> None:
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
        ({"event": "evaluation", "name": "tuned", "metric": "mean", "rate": 0.3, "wer": 0.5, "rates_by_language": {
            "hi": {"metric": "WER", "rate": 0.5}, "zh": {"metric": "CER", "rate": 0.1}}},
         ("step", 9, {"evaluation/tuned/wer": 0.5, "evaluation/tuned/mean_of_languages": 0.3,
                      "evaluation/tuned/hi_wer": 0.5, "evaluation/tuned/zh_cer": 0.1})),
        ({"event": "evaluation", "name": "tuned", "metric": "CER", "rate": 0.1, "wer": None, "cer": 0.1},
         ("step", 9, {"evaluation/tuned/cer": 0.1})),
        ({"event": "epoch", "epoch": 1, "metric": "mean", "val_rate": 0.3, "val_wer": 0.5},
         ("epoch", 1, {"epoch/val_wer": 0.5, "epoch/val_mean_of_languages": 0.3})),
        ({"event": "epoch", "epoch": 1, "metric": "CER", "val_rate": 0.1, "val_cer": 0.1, "val_wer": None},
         ("epoch", 1, {"epoch/val_cer": 0.1})),
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
        log_everything(experiment, range(1, 4))
        scalars = read_tensorboard(experiment.dir / "tensorboard")
    assert scalars["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]  # kept as float32
    assert scalars["evaluation/tuned/wer"] == [(3, 0.25)]
    names = {"train/loss", "train/epoch", "epoch/val_wer", "evaluation/tuned/wer", "evaluation/tuned/rtf"}
    assert set(scalars) == names
    with ExperimentLogger(chosen, run_id="r") as experiment:  # a crash at 3, resumed from a checkpoint at 1
        log_everything(experiment, range(2, 6))
    steps_shown = [step for step, _ in read_tensorboard(experiment.dir / "tensorboard")["train/loss"]]
    assert steps_shown == list(range(1, 6))


def test_mlflow_reads_the_rows_and_a_continued_run_stays_one(config: Config) -> None:
    before = dict(os.environ)
    for steps in (range(1, 4), range(4, 6)):
        with ExperimentLogger(with_trackers(config, "mlflow"), run_id="r") as experiment:
            log_everything(experiment, steps)
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


def test_no_tracker_is_told_a_private_place() -> None:
    config = load_config(
        None,
        overrides={
            "model.variant": "/home/ann/models/best",
            "data": {"source": "folder", "path": "/home/ann/secret/speech"},
            "checkpoints.mirror_dir": "/content/drive/MyDrive/Ann",
            "augmentation.noise_dir": "/mnt/ann/noise",
        },
    )
    told = tracking._parameters(config)
    assert (told["model"]["variant"], told["data"]["path"], told["augmentation"]["noise_dir"]) == (
        "best",
        "speech",
        "noise",
    )
    assert "/" not in f"{told['checkpoints']['mirror_dir']}"


def read_wandb(folders: list[Path], axis: str, key: str) -> list[tuple[Any, Any]]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found = []
    for folder in folders:
        store = DataStore()
        store.open_for_scan(str(next(folder.glob("*.wandb"))))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found += [(json.loads(row[axis]), json.loads(row[key]))] if key in row else []
    return found


SESSION = """
import sys
from src.utils.config import load_config
from src.utils.tracking import ExperimentLogger
from tests.utils.test_tracking import log_everything
config = load_config(None, overrides={"paths": {"runs_dir": sys.argv[1]}, "tracking": {"trackers": sys.argv[2:]}})
for steps in (range(1, 4), range(4, 6)):
    with ExperimentLogger(config, run_id="r") as experiment:
        log_everything(experiment, steps)
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
    # both are parts of one run; a second one of the same second has another number at its end
    assert len({re.fullmatch(r"offline-run-\d+_\d+-(\w{8})(-\d+)?", folder.name)[1] for folder in folders}) == 1  # type: ignore[index]
    assert read_wandb(folders, "step", "train/loss") == [(step, 1 / step) for step in range(1, 6)]
    assert read_wandb(folders, "step", "evaluation/tuned/wer") == [(3, 0.25), (5, 0.25)]
    assert read_wandb(folders, "epoch", "epoch/val_wer") == [(1, 0.3), (1, 0.3)]


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


def test_a_login_leaves_the_mode_to_wandb_and_online_without_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config
) -> None:
    netrc = "machine {} login user password " + "0" * 40
    for machine, mode in (("", "offline"), ("api.wandb.ai", None), ("elsewhere.example", "offline")):
        (tmp_path / "netrc").write_text(netrc.format(machine) if machine else "")
        assert tracking._wandb_mode() == mode
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking._wandb_mode() is None
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(WhisperASRError, match="wandb login"):
        ExperimentLogger(with_trackers(config, "wandb"), run_id="r")


def test_a_tracker_that_fails_is_off_after_one_warning_and_the_rest_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(tracking._Tracker):
        write = close = refuse

    monkeypatch.setitem(tracking._TRACKERS, "mlflow", Failing)
    with ExperimentLogger(with_trackers(config, "mlflow", "tensorboard"), run_id="r") as experiment:
        log_everything(experiment, range(1, 4))
    (warning,) = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert "mlflow" in warning and "No space left on device" in warning
    assert len(load_metrics(experiment.dir)) == 6
    assert len(read_tensorboard(experiment.dir / "tensorboard")["train/loss"]) == 3


def test_a_tracker_that_cannot_start_is_an_error_and_those_that_did_are_closed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking._TRACKERS, "mlflow", refuse)  # type: ignore[arg-type]
    closed: list[bool] = []
    monkeypatch.setattr(tracking._TensorBoard, "close", lambda self: closed.append(True))
    with pytest.raises(WhisperASRError, match=r"'mlflow'.*No space.*tracking\.trackers"):
        ExperimentLogger(with_trackers(config, "tensorboard", "mlflow"), run_id="r")
    assert closed == [True]


@pytest.mark.parametrize(
    "run_id",
    ["../../escaped", "/tmp/escaped", "a/b", "a\\b", "..", ".", ".hidden", "a\nb", "a\0b", "~", "$HOME", "x" * 201,
     "漢" * 70, "name.", " a", "a ", "C:x", "\ud800", "-rf"],
)  # fmt: skip
def test_a_run_id_is_a_name_and_no_path(tmp_path: Path, run_id: str) -> None:
    config = load_config(None, overrides={"paths.runs_dir": tmp_path / "a" / "runs"})
    with pytest.raises(ConfigError, match="is no run id") as caught:
        ExperimentLogger(config, run_id=run_id)
    assert len(str(caught.value)) < 1000
    assert not list(tmp_path.iterdir())
    for name in ("20261130-104500", "golden (2)", "r", "läuft_1.2", "漢字"):
        assert check_run_id(name) == name
