"""The benchmark's own arithmetic, and a quick run of the script."""

from __future__ import annotations

import json

import pytest

from scripts import benchmark_latency
from scripts.benchmark_latency import Measured, row, summarize
from scripts.benchmarking import BENCHMARKS
from src.evaluation.latency import LatencyResult


def side(engine: str, rtfs: list[float | None], peer: list[float | None], *, batch_size: int = 1) -> Measured:
    ours, theirs = (
        tuple(
            LatencyResult(
                "tiny.en", engine, "cpu", "float32", "full", batch_size, 4, calls=4,
                rtf=rtf, rtfx=None if rtf is None else 1 / rtf, reason="out of memory" if rtf is None else None,
            )
            for rtf in each
        )
        for each in (rtfs, peer)
    )  # fmt: skip
    return Measured("tiny.en", batch_size, engine, ours, theirs, 0.25, 0.25)


def test_speedup_is_the_median_of_the_ratios_of_the_rounds() -> None:
    ours = side("torch", [1.0, 2.0, 10.0], [3.0, 8.0, 10.0])
    assert ours.speedup == 3.0  # of 3, 4 and 1
    assert ours.median("rtf") == 2.0
    unfit = side("torch", [None], [1.0])  # a dash and null
    assert [row(unfit)[name] for name in ("RTF", "speedup", "first token")] == ["-"] * 3
    assert summarize([unfit])["rtf"] is None


def test_summary_begins_with_the_first_model_and_keeps_the_others() -> None:
    measured = [
        side(engine, [rtf], [1.0], batch_size=size)
        for size, ours in ((1, 0.5), (8, 0.1))
        for engine, rtf in (("torch", ours), ("transformers", 1.0))
    ]
    summary = summarize(measured)
    assert (summary["measured"], summary["rtf"], summary["speedup_vs_transformers"]) == ("tiny.en, batch 1", 0.5, 2.0)
    assert summary["others"]["tiny.en, batch 8"]["speedup_vs_transformers"] == pytest.approx(10.0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.slow
def test_quick_run_prints_both_sides_and_one_json_object_and_records_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = BENCHMARKS.read_bytes()
    monkeypatch.setattr("sys.argv", ["benchmark_latency.py", "--quick", "--device", "cpu"])
    monkeypatch.setattr(benchmark_latency.transformers_logging, "set_verbosity_error", lambda: None)  # it would last
    assert benchmark_latency.main() == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in table] == ["engine", "torch", "transformers", "torch", "transformers"]
    figures = json.loads(last)
    assert figures["measured"] == "tiny.en, batch 1"
    assert {"rtf", "rtfx", "p50_sec", "p95_sec", "first_token_sec", "speedup_vs_transformers"} <= set(figures)
    assert figures["rtf"] * figures["rtfx"] == pytest.approx(1)
    assert figures["wer"] == pytest.approx(figures["wer_transformers"])
    assert list(figures["others"]) == ["tiny.en, batch 4"]
    assert BENCHMARKS.read_bytes() == before
