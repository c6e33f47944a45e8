"""Figures of streaming: points stand where their numbers are, a missing one is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation

from src.evaluation.streaming import WordTiming
from src.evaluation.visualization.streaming import draw_emission, draw_tradeoff
from src.utils.errors import DataError
from src.utils.figures import save_figure

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def timing(end_sec: float, shown_sec: float, commit_sec: float, *, clock: bool = True) -> WordTiming:
    """Times on the clock a tenth of a second after those in audio."""
    moments = [at for sec in (commit_sec, shown_sec, shown_sec) for at in (sec, sec + 0.1 if clock else None)]
    return WordTiming("word", 0, end_sec - 0.3, end_sec, *moments)  # type: ignore[arg-type]


def point(name: str, sec: float | None, wer: float | None, *, half: float | None = 0.02, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "commit_aware_p50_sec": sec, "wer": wer, **more}
    if half is not None and sec is not None and wer is not None:
        row |= {"commit_aware_p50_low_sec": sec - half, "commit_aware_p50_high_sec": sec + half}
        row |= {"wer_low": wer - half, "wer_high": wer + half}
    return row


ROWS = [
    point("0.3 s", 0.7, 0.13, system="AlignAtt"), point("0.8 s", 1.4, 0.1, system="AlignAtt"),
    point("0.5 s", 1.0, 0.11, system="AlignAtt"), point("LocalAgreement-2", 2.1, 0.12, half=None),
    point("offline", None, 0.09), point("broken", 1.0, None),
]  # fmt: skip


def test_each_word_has_its_commit_and_its_first_display(tmp_path: Path) -> None:
    systems = {"AlignAtt": [timing(1.0, 1.5, 2.0), timing(2.0, 2.6, 2.8)], "slow": [timing(1.0, 4.0, 5.0)], "mute": []}
    figure = draw_emission(systems, no_speech=[(3.0, 4.0)])
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


def test_systems_are_points_with_intervals_and_what_does_not_stream_lies_across(tmp_path: Path) -> None:
    figure = draw_tradeoff(ROWS)
    axes = figure.axes[0]
    line, markers = axes.lines[:2]
    np.testing.assert_allclose(line.get_xydata(), [[0.7, 0.13], [1.0, 0.11], [1.4, 0.1]])  # in order of the latency
    assert line.get_color() == markers.get_color() != axes.lines[2].get_color()
    assert "broken" in figure.get_supxlabel()
    assert list(axes.lines[4].get_ydata()) == [0.09, 0.09]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in labels) == ["0.3 s", "0.5 s", "0.8 s", "LocalAgreement-2", "offline"]
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    save_figure(figure, tmp_path, "tradeoff")
    with pytest.raises(DataError, match="end_of_turn_aware_p95_sec"):
        draw_tradeoff(ROWS, latency="end_of_turn_aware_p95")
