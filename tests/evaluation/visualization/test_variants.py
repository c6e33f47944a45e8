"""Variants: points stand where their figures are, labels keep out of each other's way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation

from src.evaluation.visualization.variants import variants_chart
from src.utils.errors import DataError
from src.utils.figures import save_figure

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def variant(name: str, rtfx: float | None, wer: float | None, size_mb: float | None, half: float | None = 0.03) -> Any:
    known = wer is not None and half is not None
    ends = {"wer_low": wer - half, "wer_high": wer + half} if known else {"wer_low": None, "wer_high": None}  # type: ignore[operator]
    return {"name": name, "rtfx": rtfx, "wer": wer, "size_mb": size_mb, **ends}


ROWS = [
    variant("tiny float32", 7.2, 0.34, 151), variant("tiny int8", 12.5, 0.345, 42), variant("tuned", 7.4, 0.27, 151),
    variant("tuned int8", 12.1, 0.274, 42), variant("base float32", 3.3, 0.29, 290),
    variant("base int8", 6.1, 0.292, 78), variant("small", 1.1, 0.22, 967, None), variant("turbo", 1.0, 0.17, 1620),
]  # fmt: skip


def test_points_intervals_and_areas_are_the_figures(tmp_path: Path) -> None:
    figure = variants_chart(ROWS)
    axes = figure.axes[0]
    intervals, points = axes.collections
    np.testing.assert_allclose(points.get_offsets(), [[row["rtfx"], row["wer"]] for row in ROWS])
    areas = points.get_sizes()  # type: ignore[attr-defined]
    np.testing.assert_allclose(areas / areas.max(), [row["size_mb"] / 1620 for row in ROWS])
    drawn = [len(segment) > 0 for segment in intervals.get_segments()]  # type: ignore[attr-defined]
    assert drawn == [row["wer_low"] is not None for row in ROWS]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == 0
    save_figure(figure, tmp_path, "variants")


def test_labels_cover_neither_each_other_nor_the_edge() -> None:
    figure = variants_chart(ROWS)
    figure.draw_without_rendering()
    labels = [each for each in figure.axes[0].texts if isinstance(each, Annotation)]
    assert [label.get_text() for label in labels][1] == "tiny int8\n42 MB"
    boxes = [label.get_window_extent() for label in labels]
    for label, (a, b) in zip(labels, itertools.combinations(boxes, 2), strict=False):
        assert not a.overlaps(b), label.get_text()
    for box in boxes:
        assert figure.axes[0].get_window_extent().contains(box.x0, box.y0)
        assert figure.axes[0].get_window_extent().contains(box.x1, box.y1)


def test_twenty_variants_in_one_place_still_draw(tmp_path: Path) -> None:
    save_figure(variants_chart([variant(f"m{i}", 5.0, 0.3, 100) for i in range(20)]), tmp_path, "heap")


def test_a_variant_with_a_missing_figure_is_named_below() -> None:
    figure = variants_chart([*ROWS, variant("模型", None, 0.2, 80), variant("big", 1.0, None, None)])
    assert len(figure.axes[0].texts) == len(ROWS)
    last = figure.get_supxlabel().split("\n")[-1]
    assert last.startswith("not measured: ")
    assert last.endswith("(rtfx); big (wer, size_mb)")


def test_nothing_measured_or_no_positive_speed_is_an_error() -> None:
    with pytest.raises(DataError, match="no variant has rtfx, wer and size_mb"):
        variants_chart([variant("a", None, 0.1, 1.0)])
    with pytest.raises(DataError, match=r"must be positive; they are not for a\b"):
        variants_chart([variant("a", 0.0, 0.1, 1.0), variant("b", 1.0, 0.1, 1.0)])
