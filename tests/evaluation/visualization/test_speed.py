"""Points stand where their numbers are, and what was not measured is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.evaluation.streaming import WordTiming
from src.evaluation.visualization.speed import draw_emission, draw_tradeoff, variants_chart
from src.utils.errors import DataError
from src.utils.figures import save_figure

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def timing(end_sec: float, shown_sec: float, commit_sec: float, *, clock: bool = True) -> WordTiming:
    """Times on the clock a tenth of a second after those in audio."""
    moments = [at for sec in (commit_sec, shown_sec, shown_sec) for at in (sec, sec + 0.1 if clock else None)]
    return WordTiming("word", 0, end_sec - 0.3, end_sec, *moments)  # type: ignore[arg-type]


def test_each_word_has_its_commit_and_its_first_display(tmp_path: Path) -> None:
    systems = {"AlignAtt": [timing(1.0, 1.5, 2.0), timing(2.0, 2.6, 2.8)], "slow": [timing(1.0, 4.0, 5.0)], "mute": []}
    figure = draw_emission(systems)
    axes = figure.axes[0]
    shown, committed = axes.lines[:2]
    np.testing.assert_allclose(committed.get_xydata(), [[1.0, 1.1], [2.0, 0.9]])
    np.testing.assert_allclose(shown.get_xydata(), [[1.0, 0.6], [2.0, 0.7]])
    legend = axes.get_legend_handles_labels()[1]
    assert [text.split("\n")[0] for text in legend] == list(systems)
    assert "1.00 s" in legend[0]
    assert "not measured" in legend[2]
    save_figure(figure, tmp_path, "emission")


def test_without_a_clock_words_stand_in_audio_heard() -> None:
    figure = draw_emission({"a": [timing(1.0, 1.5, 2.0)], "b": [timing(1.0, 1.5, 2.5, clock=False)]})
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [1.0])
    with pytest.raises(DataError):
        draw_emission({"mute": []})


def stream(name: str, sec: float | None, wer: float | None) -> dict[str, Any]:
    return {"name": name, "commit_aware_p50_sec": sec, "commit_aware_p50_low_sec": 0.1, "wer": wer, "wer_low": 0.05,
        "commit_aware_p50_high_sec": 3.0, "wer_high": 0.5}  # fmt: skip


def variant(name: str, rtfx: float | None, wer: float | None, size_mb: int | None, half: float | None = 0.02) -> Any:
    ends = {"wer_low": wer - half, "wer_high": wer + half} if wer and half else {"wer_low": None, "wer_high": None}
    return {"name": name, "rtfx": rtfx, "wer": wer, "size_mb": size_mb, **ends}


STREAMS = [stream("AlignAtt", 0.7, 0.13), stream("模型", 2.1, 0.12), stream("mute", None, 0.1), stream("x", 1.0, None)]
VARIANTS = [
    variant("tiny", 7.2, 0.34, 151), variant("tiny int8", 12.5, 0.345, 42), variant("small", 1.1, 0.22, 967, None),
    variant("turbo", None, 0.17, 80), variant("big", 1.0, None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("draw", "rows", "key", "missing"),
    [
        (draw_tradeoff, STREAMS, "commit_aware_p50_sec", ["mute (commit_aware_p50_sec)", "x (wer)"]),
        (variants_chart, VARIANTS, "rtfx", ["turbo (rtfx)", "big (wer, size_mb)"]),
    ],
)
def test_points_have_their_places_and_intervals(
    tmp_path: Path, draw: Any, rows: list[dict[str, Any]], key: str, missing: list[str]
) -> None:
    figure, measured = draw(rows), rows[:-2]
    (axes,) = figure.axes
    points = [line for line in axes.lines if len(line.get_xdata())]
    expected = [[each[key], each["wer"]] for each in measured]
    np.testing.assert_allclose([line.get_xydata()[0] for line in points], expected)
    assert len({(line.get_color(), line.get_marker()) for line in points}) == len(points)
    intervals = [len(lines.get_segments()[0]) > 0 for lines in axes.collections[1::2]]
    assert intervals == [each["wer_low"] is not None for each in measured]
    assert len(axes.get_legend_handles_labels()[1]) == len(measured)
    assert all(each in figure.get_supxlabel() for each in missing)
    if draw is variants_chart:
        sizes = [line.get_markersize() for line in points]
        np.testing.assert_allclose(np.square(sizes) / max(sizes) ** 2, [each["size_mb"] / 967 for each in measured])
    save_figure(figure, tmp_path, "points")
    with pytest.raises(DataError, match=key):
        draw(rows[-2:])
