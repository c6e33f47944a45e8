from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.report.run_files import load_metrics
from src.utils.config import Config, load_config
from src.utils.errors import WhisperASRError
from src.utils.tracking import ExperimentLogger


def test_rows_are_on_disk_at_once_and_values_that_are_not_finite_are_null(config: Config) -> None:
    experiment = ExperimentLogger(config, run_id="r")
    experiment.log("train_step", loss=float("nan"), path=Path("a"), step=1)
    (row,) = [json.loads(line) for line in experiment.metrics_path.read_text().splitlines()]
    assert (row["event"], row["loss"], row["path"], row["step"]) == ("train_step", None, "a", 1)
    experiment.close()


def test_a_run_is_continued_and_its_configuration_loads(config: Config) -> None:
    for _ in range(2):
        with ExperimentLogger(config, run_id="r") as experiment:
            experiment.log("epoch", epoch=1)
    assert len(experiment.metrics_path.read_text().splitlines()) == 2
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


def test_rows_that_a_full_disk_refused_follow_once_there_is_space(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("train_step", step=1, epoch=1)
        with no_space_after(experiment.metrics_path.stat().st_size + 20):  # within the next row
            for step in (2, 3, 4):
                experiment.log("train_step", step=step, epoch=1)
        assert not experiment.metrics_path.read_text().endswith("\n")
        experiment.log("train_step", step=5, epoch=1)
        assert [row["step"] for row in load_metrics(experiment.dir)] == [1, 2, 3, 4, 5]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_rows_lost_at_the_end_are_counted_and_the_run_can_be_continued(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = ExperimentLogger(config, run_id="r")
    experiment.log("train_step", step=1, epoch=1)
    with no_space_after(experiment.metrics_path.stat().st_size + 20):
        for step in (2, 3):
            experiment.log("train_step", step=step, epoch=1)
        experiment.close()
    assert "the last 2 rows are lost" in caplog.messages[-1]
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("train_step", step=2, epoch=1)
    assert "a crash cut the last row" in caplog.messages[-1]
    assert [row["step"] for row in load_metrics(experiment.dir)] == [1, 2]


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


def places(experiment: ExperimentLogger, event: str) -> list[Any]:
    return [place for _, place in shown(experiment, event)]


def test_a_resumed_run_holds_the_rows_of_one_that_ran_through(config: Config) -> None:
    with ExperimentLogger(config, run_id="straight") as straight:
        straight.log("evaluation", name="stock")
        log_training(straight, range(1, 9))
    with ExperimentLogger(config, run_id="resumed") as experiment:
        experiment.log("evaluation", name="stock")
        log_training(experiment, range(1, 7))
    with ExperimentLogger(config, run_id="resumed") as experiment:
        experiment.resume_at(step=3, epoch=1)
        log_training(experiment, range(4, 9))
    assert shown(experiment) == shown(straight)
    with ExperimentLogger(config, run_id="new") as experiment:  # on a new machine, with the rows of the checkpoint
        experiment.log("data_report", clips=3)
        experiment.resume_at(step=3, epoch=1, metrics=straight.metrics_path.read_text())
        log_training(experiment, range(4, 9))
    assert shown(experiment, "train_step", "epoch") == shown(straight, "train_step", "epoch")
    assert places(experiment, "evaluation") == []


def test_resuming_takes_rows_of_the_last_training_only(config: Config) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        log_training(experiment, range(1, 7))  # a cell that was run, and run again
        log_training(experiment, range(1, 5))
        experiment.resume_at(step=2, epoch=1)
        assert places(experiment, "train_step") == [1, 2, 3, 4, 5, 6, 1, 2]
        assert places(experiment, "epoch") == [1, 2, 3, 1]
        before = experiment.metrics_path.read_bytes()
        experiment.resume_at(step=2, epoch=1)
        assert experiment.metrics_path.read_bytes() == before


def test_rows_that_cannot_be_read_do_not_end_a_training(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.log("epoch", epoch=1)
        assert '"epoch": 1' in experiment.read_rows()
        experiment.metrics_path.unlink()  # somebody cleans up
        assert experiment.read_rows() == ""
    assert "cannot be read for the checkpoint" in caplog.text


def test_rows_that_cannot_be_taken_back_stay_and_the_run_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with ExperimentLogger(config, run_id="r") as experiment:
        log_training(experiment, range(1, 4))
        before = shown(experiment)
        monkeypatch.setattr("src.utils.tracking.write_text_atomic", refuse)
        with pytest.raises(WhisperASRError, match="No space left on device; free space"):
            experiment.resume_at(step=1, epoch=0)
        experiment.log("train_step", step=4, epoch=2)
        assert shown(experiment) == [*before, ("train_step", 4)]


def test_subscribers_get_each_row_and_one_that_fails_gets_no_more(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("broken")

    with ExperimentLogger(config, run_id="r") as experiment:
        experiment.subscribe(fail)
        unsubscribe = experiment.subscribe(lambda row: seen.append(row["step"]))
        for step in (1, 2):
            experiment.log("train_step", step=step, epoch=1)
        unsubscribe()
        experiment.log("train_step", step=3, epoch=1)
    assert seen == [1, 2]
    assert len(caplog.records) == 1
    assert len(load_metrics(experiment.dir)) == 3


def test_logging_after_the_end_is_an_error_and_closing_twice_is_none(config: Config) -> None:
    experiment = ExperimentLogger(config, run_id="r")
    experiment.close()
    experiment.close()
    with pytest.raises(ValueError, match="closed"):
        experiment.log("epoch", epoch=1)
