"""scripts/train.py as its user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.command_line import parse_setting

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "paths.runs_dir": folder / "runs", "paths.checkpoints_dir": folder / "checkpoints", "device": "cpu",
        "data.max_train": 8, "data.max_validation": 2, "data.max_test": 2, "training.epochs": 1,
    }  # fmt: skip
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--profile", "demo", *given, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_settings_are_yaml() -> None:
    assert parse_setting("training.epochs=5") == ("training.epochs", 5)
    assert parse_setting("tracking.trackers=[wandb]") == ("tracking.trackers", ["wandb"])
    with pytest.raises(SystemExit, match="KEY=VALUE"):
        parse_setting("training.epochs")


@pytest.mark.slow
def test_the_same_command_again_goes_on_and_a_wrong_key_is_named(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    figures = json.loads(first.stdout.strip().splitlines()[-1])
    assert (figures["processes"], figures["epochs"], figures["best_epoch"]) == (1, 1, 1)
    assert (Path(figures["best_model"]) / "model.safetensors").exists()
    second = run(tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming from" in second.stderr
    assert json.loads(second.stdout.strip().splitlines()[-1]) == figures
    wrong = run(tmp_path, "--set", "training.epoch=2")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].endswith("did you mean 'epochs'?")
