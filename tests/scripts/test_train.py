"""scripts/train.py: the first command as its user runs it, the others in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import train
from scripts.command_line import parse_setting

ROOT = Path(__file__).resolve().parents[2]


def test_settings_are_yaml() -> None:
    assert parse_setting("training.epochs=5") == ("training.epochs", 5)
    assert parse_setting("tracking.trackers=[wandb]") == ("tracking.trackers", ["wandb"])
    with pytest.raises(SystemExit, match="KEY=VALUE"):
        parse_setting("training.epochs")


@pytest.mark.slow
def test_the_same_command_again_goes_on_and_a_wrong_key_is_named(
    small: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for part in small:
        part.save_pretrained(tmp_path / "model")
    settings = {
        "paths.runs_dir": tmp_path / "runs", "paths.checkpoints_dir": tmp_path / "checkpoints", "device": "cpu",
        "model.variant": tmp_path / "model", "inference.max_tokens_per_sec": 2.0,
        "data.max_train": 8, "data.max_validation": 2, "data.max_test": 2, "training.epochs": 1,
    }  # fmt: skip
    given = ["--profile", "demo", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *given]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr[-3000:]
    figures = json.loads(first.stdout.strip().splitlines()[-1])
    assert (figures["processes"], figures["epochs"], figures["best_epoch"]) == (1, 1, 1)
    assert (Path(figures["best_model"]) / "model.safetensors").exists()

    monkeypatch.setattr(train, "setup_logging", lambda level: None)  # it would last
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    with caplog.at_level("INFO"):
        assert train.main() == 0
    assert "resuming from" in caplog.text
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == figures
    monkeypatch.setattr("sys.argv", ["train.py", *given, "--set", "training.epoch=2"])
    assert train.main() == 1
    assert "'epochs'" in capsys.readouterr().err.splitlines()[-1]
