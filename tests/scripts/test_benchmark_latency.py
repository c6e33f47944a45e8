"""The benchmark's own arithmetic, and the script as its user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.benchmarking import BENCHMARKS
from scripts.benchmark_latency import Measured, row, speedup, summarize
from src.evaluation.latency import LatencyResult

ROOT = Path(__file__).resolve().parents[2]


def side(engine: str, rtfs: list[float | None], *, batch_size: int = 1, model: str = "tiny.en") -> Measured:
    rounds = tuple(
        LatencyResult(
            model, engine, "cpu", "float32", "full", batch_size, 4, calls=4,
            rtf=rtf, rtfx=None if rtf is None else 1 / rtf, reason="out of memory" if rtf is None else None,
        )
        for rtf in rtfs
    )  # fmt: skip
    return Measured(model, batch_size, engine, rounds, 0.25)


def test_speedup_is_the_median_of_the_ratios_of_the_rounds() -> None:
    ours, peer = side("torch", [1.0, 2.0, 10.0]), side("transformers", [3.0, 8.0, 10.0])
    assert speedup(ours, peer) == 3.0  # of 3, 4 and 1
    assert speedup(peer, peer) == 1.0
    assert ours.median("rtf") == 2.0


def test_a_side_that_did_not_fit_is_a_dash_and_null() -> None:
    ours, peer = side("torch", [None]), side("transformers", [1.0])
    line = row(ours, peer)
    assert (line["RTF"], line["speedup"], line["first token"]) == ("-", "-", "-")
    assert summarize([ours, peer])["rtf"] is None


def test_summary_begins_with_the_first_model_and_keeps_the_others() -> None:
    measured = [
        side(engine, [rtf], batch_size=size)
        for size, ours in ((1, 0.5), (8, 0.1))
        for engine, rtf in (("torch", ours), ("transformers", 1.0))
    ]
    summary = summarize(measured)
    assert (summary["measured"], summary["rtf"], summary["speedup_vs_transformers"]) == ("tiny.en, batch 1", 0.5, 2.0)
    assert summary["others"]["tiny.en, batch 8"]["speedup_vs_transformers"] == pytest.approx(10.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.slow
def test_quick_run_prints_both_sides_and_one_json_object_and_records_nothing() -> None:
    before = BENCHMARKS.read_bytes()
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_latency.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    *table, last = done.stdout.strip().splitlines()
    assert [line.split()[1] for line in table] == ["engine", "torch", "transformers", "torch", "transformers"]
    figures = json.loads(last)
    assert figures["measured"] == "tiny.en, batch 1"
    assert {"rtf", "rtfx", "p50_sec", "p95_sec", "first_token_sec", "speedup_vs_transformers"} <= set(figures)
    assert figures["rtf"] * figures["rtfx"] == pytest.approx(1)
    assert figures["wer"] == pytest.approx(figures["wer_transformers"])
    assert list(figures["others"]) == ["tiny.en, batch 4"]
    assert BENCHMARKS.read_bytes() == before
