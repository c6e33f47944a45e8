from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from src.utils.config import Config, load_config
from src.utils.errors import WhisperASRError
from src.utils.tracking import ExperimentLogger
from src.utils.versioning import get_git_revision


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


def test_git_revision_is_the_commit_and_marks_changes(tmp_path: Path) -> None:
    assert get_git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    revision = get_git_revision(tmp_path)
    assert revision is not None
    assert len(revision) == 40
    (tmp_path / "a").write_text("2")
    assert get_git_revision(tmp_path) == f"{revision}+changes"
