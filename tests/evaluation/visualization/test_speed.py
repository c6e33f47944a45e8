"""Speed: the latest timing of a setting is drawn, what is None leaves a gap."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.evaluation.report.summary import load_predictions
from src.evaluation.visualization.modes import draw_modes, list_modes
from src.evaluation.visualization.speed import draw_latency_distribution, draw_rtf_by_batch, latest_latencies
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import evaluation

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")

STREAMING = {"event": "streaming", "clips": 25, "wer": 0.3, "offline_wer": 0.28, "rtf": 0.3, "longest_update_sec": 0.5}


def timing(engine: str, batch_size: int, rtf: float | None, median_sec: float | None = 1.0) -> dict[str, Any]:
    return {
        "event": "latency", "name": "tuned", "engine": engine, "batch_size": batch_size, "rtf": rtf,
        "p50_sec": median_sec, "p95_sec": None if median_sec is None else 2 * median_sec,
    }  # fmt: skip


def test_measuring_again_replaces_and_settings_are_ordered() -> None:
    rows = [timing("torch", 16, 0.1), timing("torch", 2, 0.3), timing("ct2", 1, 0.2), timing("torch", 2, 0.25)]
    latest = latest_latencies([*rows, evaluation("stock", 0.3)])
    assert [(row["engine"], row["batch_size"], row["rtf"]) for row in latest] == [
        ("tuned, ct2", 1, 0.2), ("tuned, torch", 2, 0.25), ("tuned, torch", 16, 0.1),
    ]  # fmt: skip


def test_each_engine_has_a_line_over_its_batch_sizes(tmp_path: Path) -> None:
    rows = [timing("torch", 1, 0.3), timing("torch", 4, None), timing("torch", 8, 0.1), timing("ct2", 4, 0.05)]
    figure = draw_rtf_by_batch(latest_latencies(rows))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "8"]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_equal(np.asarray(lines["tuned, torch"].get_ydata(), dtype=float), [0.3, math.nan, 0.1])
    assert lines["tuned, torch"].get_marker() != lines["tuned, ct2"].get_marker()
    save_figure(figure, tmp_path, "rtf")


@pytest.mark.parametrize("rows", [[], [timing("torch", 1, None, None)]])
def test_nothing_measured_is_an_error_that_says_what_to_run(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="LatencyBenchmark"):
        draw_rtf_by_batch(rows)
    with pytest.raises(DataError, match="evaluate a model, or measure with LatencyBenchmark"):
        draw_latency_distribution({}, rows)


def test_the_distribution_shows_every_clip_and_the_engines_percentiles(run_dir: Path, tmp_path: Path) -> None:
    rows = [
        timing("torch", 1, 0.3, 1.5),
        timing("torch", 4, 0.2, None),
        timing("ct2", 1, 0.1) | {"p95_sec": None},
    ]
    figure = draw_latency_distribution(load_predictions(run_dir), latest_latencies(rows))
    left, right = figure.axes
    assert left.get_legend_handles_labels()[1][0] == "stock, 40 clips: median 0.1 s, 95 % at most 0.1 s"
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "tuned, ct2, batch of 1",
        "tuned, torch, batch of 1",
    ]
    assert [text.get_text() for text in right.texts] == ["1", "1.5 to 3"]
    save_figure(figure, tmp_path, "latency")


def test_modes_that_were_not_measured_are_blank_and_say_so(tmp_path: Path) -> None:
    figure = draw_modes(list_modes(evaluation("tuned", 0.27), None, []), model="tuned")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["batch, 40 clips", "streaming", "single pass"]
    assert [text.get_text() for text in left.texts] == ["0.270", "not measured", "not measured"]
    assert [text.get_text() for text in right.texts] == ["0.060", "not measured", "not measured"]
    assert len(left.patches) == len(right.patches) == 1
    save_figure(figure, tmp_path, "blank")


def test_the_stream_stands_beside_the_same_clips_in_batches(tmp_path: Path) -> None:
    timings = latest_latencies(
        [timing("torch", 1, 0.4), timing("torch", 8, 0.1), timing("ct2", 1, 0.2) | {"wer": 0.26}]
    )
    modes = list_modes(evaluation("tuned", 0.27), STREAMING, timings)
    assert [(mode.name, mode.wer, mode.rtf) for mode in modes[:2]] == [
        ("batch, 40 clips", 0.27, 0.06), ("streaming, 25 clips", 0.3, 0.3),
    ]  # fmt: skip
    assert (modes[2].name, modes[2].wer) == ("batch, the stream's 25 clips", 0.28)
    assert math.isnan(modes[2].rtf)
    assert [(mode.name, mode.rtf) for mode in modes[3:]] == [
        ("single pass, tuned, ct2", 0.2), ("single pass, tuned, torch", 0.4),
    ]  # fmt: skip
    assert modes[3].wer == 0.26
    assert math.isnan(modes[4].wer)
    figure = draw_modes(modes, model="tuned")
    assert "0.300, longest update 0.50 s" in [text.get_text() for text in figure.axes[1].texts]
    save_figure(figure, tmp_path, "modes")
