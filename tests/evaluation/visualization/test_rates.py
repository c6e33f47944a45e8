"""Rates of slices: what is missing leaves a gap, and what the picture leaves out is said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from src.evaluation.slices import Slice
from src.evaluation.visualization.rates import MAX_SLICES, draw_slices
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import evaluation

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def slice_of(value: str, wer: float, *, n: int = 20, column: str = "room", blocks: int = 12) -> Slice:
    return Slice(column, value, n, 4 * n, wer, wer - 0.1, wer + 0.1, "speaker", blocks)


def test_a_slice_without_a_rate_is_a_gap_and_said(tmp_path: Path) -> None:
    slices = {"stock": [slice_of("hall", 0.3), slice_of("mute", math.nan)], "tuned": [slice_of("hall", 0.2)]}
    figure = draw_slices(slices, {})
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["not measured", "not measured"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hall, 20 clips", "mute, 20 / 0 clips"]
    assert np.isnan(np.asarray(axes.lines[1].get_xdata(), dtype=float)).tolist() == [False, True]
    assert axes.get_xlim()[0] == 0
    save_figure(figure, tmp_path, "gap")


def test_more_slices_than_fit_are_counted_and_equal_labels_stay_apart(tmp_path: Path) -> None:
    slices = [slice_of(f"speaker-{'x' * 40}-{i % 3}-{'x' * 20}-{i}", 0.1) for i in range(30)]
    figure = draw_slices({"tuned": slices}, {"tuned": evaluation("tuned", 0.2)})
    assert len(figure.axes[0].get_yticks()) == MAX_SLICES + 1
    assert "12 of 30 slices are drawn" in figure.get_supxlabel()
    save_figure(figure, tmp_path, "many")


def test_the_caption_says_where_intervals_are_too_narrow() -> None:
    few = draw_slices({"tuned": [slice_of("hall", 0.2, blocks=3)]}, {}).get_supxlabel()
    assert few == "bootstrap intervals over speakers; too narrow where there are fewer than 10"
    many = draw_slices({"tuned": [slice_of("hall", 0.2)]}, {"tuned": evaluation("tuned", 0.2)}).get_supxlabel()
    assert many == "95% bootstrap intervals over speakers"


def test_units_stand_beside_ranges_but_not_beside_unknown() -> None:
    slices = [slice_of("0 to 12", 0.2, column="age"), slice_of("unknown", 0.3, column="age")]
    labels = [label.get_text() for label in draw_slices({"tuned": slices}, {}).axes[0].get_yticklabels()]
    assert labels == ["0 to 12 years, 20 clips", "unknown, 20 clips"]


def test_no_slice_is_an_error() -> None:
    with pytest.raises(DataError, match="no slice"):
        draw_slices({"stock": []}, {})
