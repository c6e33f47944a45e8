"""The drills on a few steps; `benchmarks/` has them in full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "command", [["full_disk", "--steps", "3"], ["interrupts", "--moments", "1", "--only", "save,convert"]]
)
def test_nothing_is_lost_or_left_behind(command: list[str]) -> None:
    name, *options = command
    script = str(ROOT / "benchmarks" / f"{name}.py")
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["broken"] == [], done.stdout + done.stderr[-4000:]
    assert done.returncode == 0
