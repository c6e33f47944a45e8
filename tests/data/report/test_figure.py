"""The figure of a data report is drawn from any table, without a warning, and from a saved one too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.data.report import figure as report_figure
from src.data.report.figure import draw_data_report
from src.data.report.report import DataReport, build_data_report
from src.utils.config import Config
from src.utils.figures import save_figure
from tests.data.report_data import clip, noise, plain_clips, splits_of

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


@pytest.fixture(scope="module")
def report() -> DataReport:
    train = [*plain_clips("a", 20), clip("c", np.clip(noise(2, 1, 0.8), -1, 1), "No.")]
    built = build_data_report(splits_of(train, test=plain_clips("b", 4)), Config())
    silence = {"leading_silence_sec": np.linspace(0, 3, len(built.clips)), "trailing_silence_sec": 0.2}
    return replace(built, clips=built.clips.assign(speech_fraction=0.8, **silence))


def test_bars_and_marks_say_what_the_table_says(report: DataReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_figure, "MAX_POINTS", 10)
    amount, durations, pace, levels, silence, rates = draw_data_report(report).axes
    widths = [patch.get_width() for patch in amount.patches]  # type: ignore[attr-defined]
    expected = report.clips.groupby("split")["duration_sec"].sum() / 60
    assert widths == pytest.approx([expected["train"], 0, expected["test"]])
    assert durations.patches and silence.patches and len(rates.patches) == 1
    for axes in (pace, levels):  # "No." in 2 s; cut off
        assert len(axes.lines[1].get_xdata()) == 1 < len(axes.lines[0].get_xdata()) <= 10  # type: ignore[arg-type]
    languages = pd.Series(["en", "zh", None]).sample(len(report.clips), replace=True, random_state=0).tolist()
    mixed = replace(report, clips=report.clips.assign(language=languages))
    assert len(draw_data_report(mixed).axes[2].lines) == len(pace.lines) + 2  # a median per language
    nats = [29.1, 7.0, 12.0]
    styles = pd.DataFrame({"style": ["keep", "lower", "sentence"], "space": True, "nats": nats, "clips": 16})
    panel = draw_data_report(replace(report, label_styles=styles)).axes[5]
    assert [patch.get_width() for patch in panel.patches] == nats  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 12])
@pytest.mark.parametrize("speech_fraction", [np.nan, 0.0], ids=["not measured", "no speech"])
def test_degenerate_data_draws(n: int, speech_fraction: float, tmp_path: Path) -> None:
    alike = [clip(str(i), noise(2, 1), "The same text.", speaker=None) for i in range(n)]
    report = build_data_report(splits_of(alike), Config())
    figure = draw_data_report(replace(report, clips=report.clips.assign(speech_fraction=speech_fraction)))
    save_figure(figure, tmp_path, "degenerate")
    assert len(figure.axes[4].texts) == 1 and not figure.axes[4].patches  # says why there are no bars


def test_a_saved_report_draws_the_same_figure(report: DataReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    files = [
        save_figure(draw_data_report(each), tmp_path / name, "data")[0]
        for name, each in (("a", report), ("b", DataReport.load(tmp_path)))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
