"""The script as its user runs it, with a variant whose weights cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.variants import table_row
from src.evaluation.variants import VariantFigures

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_not_measured_is_blank_and_has_its_reason() -> None:
    cells = table_row(VariantFigures("medium", "torch", reason="no network"))
    assert cells["not measured"] == "no network"
    assert {cells[name] for name in ("parameters", "weights", "memory", "RTF", "WER")} == {""}


@pytest.mark.slow
def test_each_variant_is_measured_in_a_process_of_its_own() -> None:
    command = [sys.executable, "benchmarks/variants.py", "--quick", "--engine", "torch"]
    done = subprocess.run(
        [*command, "--variant", "medium", "--variant", "tiny.en"],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["medium torch"] == {"rtf": None, "wer": None}
    assert 0 < figures["tiny.en torch"]["wer"] < 0.5
