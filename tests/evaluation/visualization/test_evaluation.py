"""Figures are drawn from a run's files alone, whatever is missing in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from src.evaluation.metrics import word_counts
from src.evaluation.report.run_files import load_predictions
from src.evaluation.slices import slice_rates
from src.evaluation.visualization import evaluation as visualization
from src.evaluation.visualization.evaluation import MAX_SLICES, MAX_TIMINGS, EvaluationVisualizer
from src.evaluation.visualization.training import TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import append, epoch, evaluation, prediction, spoken_run, steps, write

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")
FIGURES = ["stock_against_tuned", "wer_by_duration", "error_types", "confusions", "latency_distribution",
    "rtf_by_batch", "modes"]  # fmt: skip


def heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]


def widths(axes: Axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]


def y_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def not_measured(axes: Axes) -> int:
    return sum("not measured" in text.get_text() for text in axes.texts)


def timing(engine: str, batch_size: int, rtf: float | None, median_sec: float | None = 1.0) -> dict[str, Any]:
    return {
        "event": "latency", "name": "tuned", "engine": engine, "batch_size": batch_size, "rtf": rtf,
        "p50_sec": median_sec, "p95_sec": None if median_sec is None else 2 * median_sec,
    }  # fmt: skip


def visualizer(run: Path, *metrics: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> EvaluationVisualizer:
    return EvaluationVisualizer(write(run, [evaluation("tuned", 0.27), *metrics], rows))


def test_one_page_has_all_and_says_what_was_not_measured(run_dir: Path, tmp_path: Path) -> None:
    page = EvaluationVisualizer(run_dir).comprehensive("speaker")
    titles = {axes.get_title(loc="left") for axes in page.axes}
    for part in (
        "Loss",
        "Summary",
        "Word error rate by normaliser",
        "Word errors",
        "WER by speaker",
        "Accuracy",
        "Speed",
    ):
        assert part in titles
    png, pdf = save_figure(page, tmp_path, "page", vectors="pdf")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
    untrained = visualizer(tmp_path / "run", rows=[prediction("tuned", 0, 1)]).comprehensive()
    assert any("training: not measured" in text.get_text() for axes in untrained.axes for text in axes.texts)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_a_run_is_drawn_and_saved(run_dir: Path, tmp_path: Path, name: str) -> None:
    append(run_dir, "metrics", *[timing("torch", size, 0.2) | {"p95_sec": None} for size in (1, 4)])
    figure = getattr(EvaluationVisualizer(run_dir), name)()
    assert max(figure.get_size_inches() / [10, 4]) <= 1
    assert figure._repr_png_()[:4] == b"\x89PNG"
    for path in save_figure(figure, tmp_path, name):
        assert path.stat().st_size > 1000
    assert "pyplot" not in Path(visualization.__file__).read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_rates_alone_draw_gaps_or_name_the_run(tmp_path: Path, name: str) -> None:
    run = visualizer(tmp_path / "rates", evaluation("stock", 0.4) | {"wer": None, "wer_low": None, "wer_high": None})
    gaps = {"stock_against_tuned": 1, "error_types": 10, "modes": 4}
    if name in gaps:
        figure = getattr(run, name)()
        assert sum(map(not_measured, figure.axes)) == gaps[name]
        save_figure(figure, tmp_path, name)
    else:
        with pytest.raises(DataError, match="rates"):
            getattr(run, name)()


def test_nothing_evaluated_or_no_such_column_is_an_error(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unevaluated"):
        EvaluationVisualizer(write(tmp_path / "unevaluated", steps(3)))
    with pytest.raises(DataError, match=r"'speakr'.*'speaker'"):
        EvaluationVisualizer(run_dir).wer_by_slice("speakr")


def test_bars_have_the_heights_of_the_rates(run_dir: Path) -> None:
    bars = EvaluationVisualizer(run_dir).stock_against_tuned()
    assert heights(bars.axes[0]) == pytest.approx([0.37, 0.38, 0.27, 0.28])
    assert bars.axes[0].get_ylim()[0] == 0
    assert "-37.5 points" in bars.get_supxlabel()


def test_a_slice_is_drawn_with_its_rate_its_interval_and_its_size(run_dir: Path) -> None:
    figure = EvaluationVisualizer(run_dir).wer_by_slice("speaker")
    axes = figure.axes[0]
    expected = {name: slice_rates(rows, "speaker") for name, rows in load_predictions(run_dir).items()}
    assert y_labels(axes) == ["all, 40 clips", *[f"{each.value}, {each.n} clips" for each in expected["stock"]]]
    for index, (name, wer) in enumerate((("stock", 0.37), ("tuned", 0.27))):
        assert axes.lines[index].get_label() == name
        drawn = np.asarray(axes.lines[index].get_xdata()).tolist()
        assert drawn == pytest.approx([wer, *[each.rate for each in expected[name]]])
        segments = axes.collections[index].get_segments()  # type: ignore[attr-defined]
        assert segments[0][:, 0].tolist() == pytest.approx([wer - 0.05, wer + 0.05])
        assert len(segments) == 9
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()
    assert figure.get_supxlabel() == "bootstrap intervals over clips"


def test_a_slice_without_a_rate_is_a_gap_and_labels_have_units(tmp_path: Path) -> None:
    ages = [*[8] * 4, *[30] * 4, *[None] * 4]
    rows = [{**prediction("tuned", i, 1), "meta": {"age": age}} for i, age in enumerate(ages)]
    rows += [{**prediction("stock", i, 1), "meta": {"age": age}} for i, age in enumerate(ages[:8])]
    silent = {"reference": "", "hypothesis": "", "substitutions": 0, "reference_words": 0}
    rows = [row | silent if row["meta"]["age"] == 30 else row for row in rows]
    figure = visualizer(tmp_path / "r", evaluation("stock", 0.3), rows=rows).wer_by_slice("age")
    axes = figure.axes[0]
    assert y_labels(axes) == ["all, 40 clips", "0 to 12 years, 4 clips", "29 to 44 years, 4 clips",
        "unknown, 0 / 4 clips"]  # fmt: skip
    assert np.isnan(np.asarray(axes.lines[0].get_xdata(), dtype=float)).tolist() == [False, False, True, True]
    assert not_measured(axes) == 3
    save_figure(figure, tmp_path, "gap")


def test_more_slices_than_fit_are_counted_and_equal_labels_stay_apart(tmp_path: Path) -> None:
    names = [f"speaker-{'x' * 40}-{i % 3}-{'x' * 20}-{i}" for i in range(30)]
    rows = [{**prediction("tuned", i, 1), "speaker": name} for i, name in enumerate(names)]
    figure = visualizer(tmp_path / "r", rows=rows).wer_by_slice("speaker")
    assert len(figure.axes[0].get_yticks()) == MAX_SLICES + 1
    assert figure.get_supxlabel() == "12 of 30 slices are drawn"  # of one clip each: no interval
    save_figure(figure, tmp_path, "many")


def test_confusions_add_up_to_the_edits_of_the_rates_in_any_script(tmp_path: Path) -> None:
    texts = [
        ("the cat sat", "the hat sat"), ("the cat ran", "a hat ran"), ("she said so", "said so"), ("go", "go on on"),
        ("", "thank you"), ("猫 meows", "مرحبا meows"),
    ]  # fmt: skip
    rows = [prediction("tuned", i, 0) | {"reference": a, "hypothesis": b} for i, (a, b) in enumerate(texts)]
    figure = visualizer(tmp_path / "r", rows=rows).confusions()
    counts = word_counts([a for a, _ in texts], [b for _, b in texts], "whisper-english-v1")
    for axes, kind in zip(figure.axes, ("substitutions", "deletions", "insertions"), strict=True):
        assert sum(widths(axes)) == sum(getattr(count, kind) for count in counts)
    left, middle, right = figure.axes
    assert (y_labels(left)[0], widths(left)[0], y_labels(middle)) == ("cat → hat", 2, ["she"])
    assert (y_labels(right), widths(right)) == (["on", "thank", "you"], [2, 1, 1])
    save_figure(figure, tmp_path, "confusions")
    perfect = visualizer(tmp_path / "p", rows=[prediction("tuned", 0, 0)]).confusions()
    assert [len(axes.patches) for axes in perfect.axes] == [0, 0, 0]


def test_error_types_are_shares_of_the_reference_and_older_runs_take_them_from_predictions(run_dir: Path) -> None:
    edits = {"substitutions": 20, "deletions": 10, "insertions": 5, "reference_words": 100}
    append(run_dir, "metrics", evaluation("stock", 0.35) | edits | {"loop_rate": 0.02, "empty_rate": 0.0})
    left, right = EvaluationVisualizer(run_dir).error_types().axes
    assert heights(left) == pytest.approx([0.2, 0.1, 0.05, 0.125, 0, 0])
    assert heights(right)[:2] == [0.02, 0.0]
    assert not_measured(right) == 2
    assert left.patches[0].get_hatch() != left.patches[3].get_hatch()  # models differ without colour too


def test_each_engine_has_a_line_over_its_batch_sizes(tmp_path: Path) -> None:
    rows = [timing("torch", 1, 0.3), timing("torch", 4, None), timing("torch", 8, 0.1), timing("ct2", 4, 0.05)]
    axes = visualizer(tmp_path / "r", *rows).rtf_by_batch().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "8"]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_equal(np.asarray(lines["tuned, torch"].get_ydata(), dtype=float), [0.3, math.nan, 0.1])
    assert lines["tuned, torch"].get_marker() != lines["tuned, ct2"].get_marker()


def test_the_distribution_shows_every_clip_and_the_engines_percentiles(tmp_path: Path) -> None:
    rows = [timing("torch", 1, 0.3, 1.5), timing("torch", 4, 0.2, None), timing("ct2", 1, 0.1) | {"p95_sec": None}]
    clips = [prediction("tuned", i, 0) for i in range(20)]
    left, right = visualizer(tmp_path / "r", *rows, rows=clips).latency_distribution().axes
    assert "20 clips" in left.get_legend_handles_labels()[1][0]
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert [text.get_text() for text in right.texts] == ["1", "1.5 to 3"]  # the one without a median is left out
    many = visualizer(tmp_path / "s", *[timing(f"engine {i}", 1, 0.1) for i in range(20)]).latency_distribution()
    assert len(many.axes[1].texts) == MAX_TIMINGS
    assert many.get_supxlabel() == "14 of 20 timings are drawn"
    assert not_measured(many.axes[0]) == 1
    save_figure(many, tmp_path, "engines")


def test_the_stream_is_followed_by_the_same_clips_in_batches(run_dir: Path) -> None:
    append(run_dir, "metrics", timing("torch", 1, 0.4), timing("torch", 8, 0.1), timing("ct2", 1, 0.2) | {"wer": 0.26})
    left, right = EvaluationVisualizer(run_dir).modes().axes
    assert y_labels(left) == ["batch, 40 clips", "streaming, 25 clips", "batch, the stream's 25 clips",
        "single pass, tuned, ct2", "single pass, tuned, torch"]  # fmt: skip
    np.testing.assert_equal(widths(left), [0.27, 0.3, 0.28, 0.26, math.nan])
    np.testing.assert_equal(widths(right), [0.06, 0.3, math.nan, 0.2, 0.4])
    assert [not_measured(axes) for axes in (left, right)] == [1, 1]


@pytest.mark.parametrize(
    ("languages", "metric"), [(("zh",), "CER"), (("hi",), "WER"), (("zh", "ar"), "mean of 2 languages")]
)
def test_every_figure_names_the_headline(tmp_path: Path, languages: tuple[str, ...], metric: str) -> None:
    found = EvaluationVisualizer(spoken_run(tmp_path / "run", *languages))
    bars = found.stock_against_tuned()
    assert bars.axes[0].get_ylabel() == f"{metric}, test set"
    assert "bootstrap intervals over" in bars.get_supxlabel()
    by_language = found.wer_by_slice("language").axes[0]
    assert by_language.get_xlabel() == ("error rate" if len(languages) > 1 else metric) + ", test set"
    labels = [label.get_text() for label in by_language.get_yticklabels()]
    if len(languages) > 1:
        assert labels == [f"all, {metric}, 12 clips", "Arabic, WER, 6 clips", "Chinese, CER, 6 clips"]
    analysis = TrainingVisualizer(tmp_path / "run").training_analysis()
    assert len(analysis.axes) == (3 if metric == "CER" else 4)  # the CER is drawn once
    for figure in (found.error_types(), found.confusions(), found.modes()):
        figure.draw_without_rendering()


def test_epochs_of_an_older_version_leave_a_gap_in_another_metric(tmp_path: Path) -> None:
    epochs = [epoch(1, 0.9, best=False), epoch(2, None, best=True) | {"metric": "CER", "val_rate": 0.2, "val_cer": 0.2}]
    figure = TrainingVisualizer(write(tmp_path / "run", [*steps(4), *epochs])).training_analysis()
    drawn = np.asarray(figure.axes[1].lines[0].get_ydata(), dtype=float)
    assert figure.axes[1].get_ylabel() == "CER, validation"
    assert np.isnan(drawn[0]) and drawn[1] == 0.2
