"""The picture of a data report is drawn from any table, without a warning, and from a saved one too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.data.report import figure as report_figure
from src.data.report.figure import draw_data_report
from src.data.report.report import DataReport, build_data_report
from src.data.utterance import Utterance
from src.utils.config import Config
from src.utils.figures import save_figure
from tests.data.report_data import clip, noise, plain_clips, splits_of

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")

STYLES = pd.DataFrame(
    [
        {"style": style, "space": space, "nats": nats, "clips": 16, "example": "Hello."}
        for style, space, nats in (("keep", True, 29.1), ("sentence", True, 7.0), ("sentence", False, 12.0))
    ]
)


@pytest.fixture(scope="module")
def report() -> DataReport:
    built = build([*plain_clips("a", 20), clip("c", np.clip(noise(2, 1, 0.8), -1, 1), "No.")], plain_clips("b", 4))
    clips = built.clips.copy()
    clips["speech_fraction"], clips["leading_silence_sec"] = 0.8, np.linspace(0, 3, len(clips))
    clips["trailing_silence_sec"] = 0.2
    return replace(built, clips=clips)


def build(train: Sequence[Utterance], test: Sequence[Utterance] = ()) -> DataReport:
    return build_data_report(splits_of(train, test=test), Config())


def titles(report: DataReport) -> list[str]:
    return [axes.get_title(loc="left") for axes in draw_data_report(report).axes]


def test_six_panels_are_drawn_and_saved(report: DataReport, tmp_path: Path) -> None:
    assert titles(report) == [
        "Amount", "Durations", "Pace", "Levels", "Silence around speech", "Sample rates of the files",
    ]  # fmt: skip
    png, svg = save_figure(draw_data_report(report), tmp_path, "data_report")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in svg.read_text()
    assert draw_data_report(report).get_size_inches().tolist()[0] <= 10


def test_label_styles_take_the_place_of_the_rates(report: DataReport, tmp_path: Path) -> None:
    figure = draw_data_report(replace(report, label_styles=STYLES))
    panel = figure.axes[5]
    assert panel.get_title(loc="left") == "Label styles"
    assert [patch.get_width() for patch in panel.patches] == [29.1, 7.0, 12.0]  # type: ignore[attr-defined]
    save_figure(figure, tmp_path, "styles")


def test_bars_and_marks_say_what_the_table_says(report: DataReport) -> None:
    amount, durations, pace, levels = draw_data_report(report).axes[:4]
    widths = [patch.get_width() for patch in amount.patches]  # type: ignore[attr-defined]
    expected = report.clips.groupby("split")["duration_sec"].sum() / 60
    assert widths == pytest.approx([expected["train"], 0, expected["test"]])
    assert len(durations.patches) > 0
    assert "1 clip far off" in [text.get_text() for text in pace.get_legend().get_texts()]  # "No." in 2 s
    assert "1 clip cut off" in [text.get_text() for text in levels.get_legend().get_texts()]


def one_clip() -> DataReport:
    return build([clip("only", noise(1, 1), "One.", speaker=None)])


def all_alike() -> DataReport:
    return build([clip(str(i), noise(2, 1), "The same text.") for i in range(12)])


def nothing_measured() -> DataReport:
    report = build(plain_clips("a", 12))
    clips = report.clips.assign(speaker=None)
    return replace(report, clips=clips)


def no_speech_anywhere() -> DataReport:
    report = build(plain_clips("a", 12))
    return replace(report, clips=report.clips.assign(speech_fraction=0.0))


@pytest.mark.parametrize("make", [one_clip, all_alike, nothing_measured, no_speech_anywhere])
def test_degenerate_data_draws(make: object, tmp_path: Path) -> None:
    assert callable(make)
    save_figure(draw_data_report(make()), tmp_path, "degenerate")


def test_what_was_not_measured_is_said(report: DataReport) -> None:
    clips = report.clips.assign(speech_fraction=np.nan, leading_silence_sec=np.nan, trailing_silence_sec=np.nan)
    panel = draw_data_report(replace(report, clips=clips)).axes[4]
    assert [text.get_text() for text in panel.texts] == ["not measured"]


def test_a_saved_report_draws_the_same_picture(report: DataReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    files = [
        save_figure(draw_data_report(each), tmp_path / name, "data")[0]
        for name, each in (("a", report), ("b", DataReport.load(tmp_path)))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_many_clips_are_thinned(report: DataReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_figure, "MAX_POINTS", 10)
    pace = draw_data_report(report).axes[2]
    assert len(pace.lines[0].get_xdata()) <= 10  # type: ignore[arg-type]
