"""Speed: the latest timing of a setting is drawn, what is None leaves a gap, labels do not overlap."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation

from src.evaluation.report.run_files import load_predictions
from src.evaluation.visualization.speed import (
    MAX_ROWS,
    draw_latency_distribution,
    draw_modes,
    draw_rtf_by_batch,
    latest_latencies,
    variants_chart,
)
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


def test_the_distribution_shows_every_clip_and_the_engines_percentiles(run_dir: Path, tmp_path: Path) -> None:
    rows = [timing("torch", 1, 0.3, 1.5), timing("torch", 4, 0.2, None), timing("ct2", 1, 0.1) | {"p95_sec": None}]
    figure = draw_latency_distribution(load_predictions(run_dir), latest_latencies(rows))
    left, right = figure.axes
    assert [len(label) > 0 for label in left.get_legend_handles_labels()[1]] == [True, True]
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert [text.get_text() for text in right.texts] == ["1", "1.5 to 3"]  # the one without a median is left out
    save_figure(figure, tmp_path, "latency")
    save_figure(draw_latency_distribution(load_predictions(run_dir), []), tmp_path, "clips")
    many = draw_latency_distribution({}, [timing(f"engine {i}", 1, 0.1) for i in range(20)])
    assert len(many.axes[1].texts) == MAX_ROWS
    save_figure(many, tmp_path, "engines")


def test_nothing_measured_is_an_error_that_says_what_to_run() -> None:
    for rows in ([], [timing("torch", 1, None, None)]):
        for draw in (draw_rtf_by_batch, lambda timings: draw_latency_distribution({}, timings)):
            with pytest.raises(DataError, match="LatencyBenchmark"):
                draw(rows)


def test_modes_that_were_not_measured_are_blank(tmp_path: Path) -> None:
    figure = draw_modes(evaluation("tuned", 0.27), None, [], model="tuned")
    for axes in figure.axes:
        assert len(axes.patches) == 1
        assert [text.get_text() for text in axes.texts][1:] == ["not measured"] * 2
    save_figure(figure, tmp_path, "blank")


def test_the_stream_is_followed_by_the_same_clips_in_batches(tmp_path: Path) -> None:
    timings = latest_latencies(
        [timing("torch", 1, 0.4), timing("torch", 8, 0.1), timing("ct2", 1, 0.2) | {"wer": 0.26}]
    )
    figure = draw_modes(evaluation("tuned", 0.27), STREAMING, timings, model="tuned")
    names = ["batch, 40 clips", "streaming, 25 clips", "batch, the stream's 25 clips", "single pass, tuned, ct2",
        "single pass, tuned, torch"]  # fmt: skip
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == names
    assert [patch.get_width() for patch in left.patches] == [0.27, 0.3, 0.28, 0.26]  # type: ignore[attr-defined]
    assert [patch.get_width() for patch in right.patches] == [0.06, 0.3, 0.2, 0.4]  # type: ignore[attr-defined]
    assert [text.get_text() for text in left.texts][4] == [text.get_text() for text in right.texts][2] == "not measured"
    save_figure(figure, tmp_path, "modes")


def variant(name: str, rtfx: float | None, wer: float | None, size_mb: float | None, half: float | None = 0.03) -> Any:
    known = wer is not None and half is not None
    ends = {"wer_low": wer - half, "wer_high": wer + half} if known else {"wer_low": None, "wer_high": None}  # type: ignore[operator]
    return {"name": name, "rtfx": rtfx, "wer": wer, "size_mb": size_mb, **ends}


VARIANTS = [
    variant("tiny float32", 7.2, 0.34, 151), variant("tiny int8", 12.5, 0.345, 42), variant("tuned", 7.4, 0.27, 151),
    variant("tuned int8", 12.1, 0.274, 42), variant("base float32", 3.3, 0.29, 290),
    variant("base int8", 6.1, 0.292, 78), variant("small", 1.1, 0.22, 967, None), variant("turbo", 1.0, 0.17, 1620),
]  # fmt: skip


def test_variants_stand_where_their_numbers_are_with_labels_apart(tmp_path: Path) -> None:
    figure = variants_chart([*VARIANTS, variant("模型", None, 0.2, 80), variant("big", 1.0, None, None)])
    axes = figure.axes[0]
    intervals, points = axes.collections
    np.testing.assert_allclose(points.get_offsets(), [[row["rtfx"], row["wer"]] for row in VARIANTS])
    areas = points.get_sizes()  # type: ignore[attr-defined]
    np.testing.assert_allclose(areas / areas.max(), [row["size_mb"] / 1620 for row in VARIANTS])
    drawn = [len(segment) > 0 for segment in intervals.get_segments()]  # type: ignore[attr-defined]
    assert drawn == [row["wer_low"] is not None for row in VARIANTS]
    assert "(rtfx); big (wer, size_mb)" in figure.get_supxlabel()
    labels = [each for each in axes.texts if isinstance(each, Annotation)]
    assert len(labels) == len(VARIANTS)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    save_figure(figure, tmp_path, "variants")
    save_figure(variants_chart([variant(f"m{i}", 5.0, 0.3, 100) for i in range(20)]), tmp_path, "heap")


def test_no_complete_variant_or_no_positive_speed_is_an_error() -> None:
    with pytest.raises(DataError, match="rtfx, wer and size_mb"):
        variants_chart([variant("a", None, 0.1, 1.0)])
    with pytest.raises(DataError, match=r"for a\b"):
        variants_chart([variant("a", 0.0, 0.1, 1.0), variant("b", 1.0, 0.1, 1.0)])
