"""Figures are drawn from a run's files alone, whatever is missing in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from src.evaluation.evaluator import Prediction
from src.evaluation.report.run_files import load_predictions
from src.evaluation.slices import Slice, slice_rates
from src.evaluation.text import word_counts
from src.evaluation.visualization import evaluation as visualization
from src.evaluation.visualization.evaluation import (
    MAX_SLICES,
    EvaluationVisualizer,
    count_confusions,
    draw_confusions,
    draw_error_types,
    draw_slices,
)
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import append, evaluation, steps, write

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")
TEXTS = [
    ("the cat sat", "the hat sat"), ("the cat ran", "a hat ran"), ("she said so", "said so"), ("go", "go on on"),
    ("", "thank you"), ("猫 meows", "مرحبا meows"),
]  # fmt: skip
FIGURES: dict[str, Callable[[EvaluationVisualizer], Any]] = {
    "bars": lambda run: run.stock_against_tuned(),
    "duration": lambda run: run.wer_by_duration(),
    "speaker": lambda run: run.wer_by_slice("speaker"),
    "types": lambda run: run.error_types(),
    "confusions": lambda run: run.confusions(),
    "latency": lambda run: run.latency_distribution(),
    "rtf": lambda run: run.rtf_by_batch(),
    "modes": lambda run: run.modes(),
}


def heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]


def y_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def not_measured(axes: Axes) -> int:
    return sum("not measured" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_a_run_is_drawn_and_saved(run_dir: Path, tmp_path: Path, name: str) -> None:
    for size in (1, 4):
        row = {"event": "latency", "name": "tuned", "engine": "torch", "batch_size": size, "rtf": 0.2}
        append(run_dir, "metrics", row | {"p50_sec": 1.0, "p95_sec": None})
    figure = FIGURES[name](EvaluationVisualizer(run_dir))
    assert max(figure.get_size_inches() / [10, 4]) <= 1
    assert figure._repr_png_()[:4] == b"\x89PNG"
    for path in save_figure(figure, tmp_path, name):
        assert path.stat().st_size > 1000
    assert "pyplot" not in Path(visualization.__file__).read_text()


def test_nothing_to_draw_is_an_error_that_names_the_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unevaluated"):
        EvaluationVisualizer(write(tmp_path / "unevaluated", steps(3)))
    visualizer = EvaluationVisualizer(write(tmp_path / "rates", [evaluation("tuned", 0.4)]))
    for draw in (visualizer.wer_by_duration, visualizer.confusions, lambda: visualizer.wer_by_slice("speaker")):
        with pytest.raises(DataError, match="rates"):
            draw()
    visualizer = EvaluationVisualizer(run_dir)
    with pytest.raises(DataError, match="40 to 60 s"):
        visualizer.wer_by_duration((40, 60))
    with pytest.raises(DataError, match="LatencyBenchmark"):
        visualizer.rtf_by_batch()
    with pytest.raises(DataError, match=r"'speakr'.*'speaker'"):
        visualizer.wer_by_slice("speakr")
    with pytest.raises(DataError, match=r"'tunde'.*'tuned'"):
        visualizer.modes("tunde")


def test_bars_have_the_heights_of_the_rates_and_a_missing_one_is_blank(run_dir: Path, tmp_path: Path) -> None:
    bars = EvaluationVisualizer(run_dir).stock_against_tuned()
    assert heights(bars.axes[0]) == pytest.approx([0.37, 0.27])
    assert bars.axes[0].get_ylim()[0] == 0
    assert "-37.5 points" in bars.get_supxlabel()
    row = evaluation("stock", 0.4) | {"wer": None, "wer_low": None, "wer_high": None}
    bars = EvaluationVisualizer(write(tmp_path / "r", [row])).stock_against_tuned()
    assert (not_measured(bars.axes[0]), len(bars.axes[0].patches), len(bars.axes[1].patches)) == (1, 0, 1)


def test_every_clip_falls_into_one_range_of_lengths(run_dir: Path) -> None:
    visualizer = EvaluationVisualizer(run_dir)
    labels = y_labels(visualizer.wer_by_duration((0, 2, 4, 9, 20, 30)).axes[0])
    assert [label.split(", ")[0] for label in labels] == ["all", "0 to 2 s", "2 to 4 s", "4 to 9 s"]
    assert sum(int(label.split(", ")[1].split()[0]) for label in labels[1:]) == 40
    outside = sum(row.duration_sec > 4 for row in load_predictions(run_dir)["stock"])
    assert f"{outside} clips" in visualizer.wer_by_duration((0, 2, 4)).get_supxlabel()


def test_a_slice_is_drawn_with_its_rate_its_interval_and_its_size(run_dir: Path) -> None:
    axes = EvaluationVisualizer(run_dir).wer_by_slice("speaker").axes[0]
    expected = {name: slice_rates(rows, "speaker") for name, rows in load_predictions(run_dir).items()}
    assert y_labels(axes) == ["all, 40 clips", *[f"{each.value}, {each.n} clips" for each in expected["stock"]]]
    for index, (name, wer) in enumerate((("stock", 0.37), ("tuned", 0.27))):
        assert axes.lines[index].get_label() == name
        drawn = np.asarray(axes.lines[index].get_xdata()).tolist()
        assert drawn == pytest.approx([wer, *[each.wer for each in expected[name]]])
        segments = axes.collections[index].get_segments()  # type: ignore[attr-defined]
        assert segments[0][:, 0].tolist() == pytest.approx([wer - 0.05, wer + 0.05])
        assert len(segments) == 9
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()


def slice_of(value: str, wer: float, *, n: int = 20, column: str = "room", blocks: int = 12) -> Slice:
    return Slice(wer, wer - 0.1, wer + 0.1, "speaker", blocks, column=column, value=value, n=n, reference_words=4 * n)


def test_a_slice_without_a_rate_is_a_gap(tmp_path: Path) -> None:
    slices = {"stock": [slice_of("hall", 0.3), slice_of("mute", math.nan)], "tuned": [slice_of("hall", 0.2)]}
    figure = draw_slices(slices, {})
    axes = figure.axes[0]
    assert not_measured(axes) == 2
    assert y_labels(axes) == ["hall, 20 clips", "mute, 20 / 0 clips"]
    assert np.isnan(np.asarray(axes.lines[1].get_xdata(), dtype=float)).tolist() == [False, True]
    save_figure(figure, tmp_path, "gap")
    with pytest.raises(DataError):
        draw_slices({"stock": []}, {})


def test_more_slices_than_fit_are_counted_and_equal_labels_stay_apart(tmp_path: Path) -> None:
    slices = [slice_of(f"speaker-{'x' * 40}-{i % 3}-{'x' * 20}-{i}", 0.1) for i in range(30)]
    figure = draw_slices({"tuned": slices}, {"tuned": evaluation("tuned", 0.2)})
    assert len(figure.axes[0].get_yticks()) == MAX_SLICES + 1
    assert "12 of 30 slices" in figure.get_supxlabel()
    save_figure(figure, tmp_path, "many")


def test_labels_have_units_and_few_speakers_are_called_few() -> None:
    slices = [slice_of("0 to 12", 0.2, column="age"), slice_of("unknown", 0.3, column="age", blocks=3)]
    figure = draw_slices({"tuned": slices}, {})
    assert y_labels(figure.axes[0]) == ["0 to 12 years, 20 clips", "unknown, 20 clips"]
    assert "too narrow" in figure.get_supxlabel()
    assert "too narrow" not in draw_slices({"tuned": slices[:1]}, {}).get_supxlabel()


@pytest.fixture
def rows() -> list[Prediction]:
    counts = dict.fromkeys(("substitutions", "deletions", "insertions", "reference_words"), 0)
    given = {"speaker": None, "duration_sec": 2.0, "avg_logprob": -0.1, "latency_sec": 0.1, **counts}
    return [Prediction(id=f"u{i}", reference=a, hypothesis=b, **given) for i, (a, b) in enumerate(TEXTS)]


def test_confusions_add_up_to_the_edits_of_the_rates(rows: list[Prediction]) -> None:
    found = count_confusions(rows, "plain-v1")
    counts = word_counts([a for a, _ in TEXTS], [b for _, b in TEXTS], "plain-v1")
    for kind, counter in found.items():
        assert counter.total() == sum(getattr(count, kind) for count in counts)
    assert found["substitutions"]["cat", "hat"] == 2
    assert found["deletions"] == {("she",): 1}
    assert found["insertions"] == {("on",): 2, ("thank",): 1, ("you",): 1}


def test_the_most_frequent_confusions_come_first_in_any_script(rows: list[Prediction], tmp_path: Path) -> None:
    figure = draw_confusions(rows, "plain-v1", model="نموذج 好", top=2)
    left, _, right = figure.axes
    assert y_labels(left) == ["cat → hat", "the → a"]
    assert [patch.get_width() for patch in left.patches] == [2, 1]  # type: ignore[attr-defined]
    assert y_labels(right) == ["on", "thank"]
    save_figure(figure, tmp_path, "confusions")
    save_figure(draw_confusions(rows, "plain-v1", model="tuned"), tmp_path, "all")
    nothing = draw_confusions([], "plain-v1", model="x")
    assert [len(axes.patches) for axes in nothing.axes] == [0, 0, 0]
    for top in (0, 21):
        with pytest.raises(DataError, match=f"{top}"):
            draw_confusions(rows, "plain-v1", model="tuned", top=top)


def test_error_types_are_shares_of_the_reference_and_add_up_to_the_wer(tmp_path: Path) -> None:
    edits = {"substitutions": 20, "deletions": 10, "insertions": 5, "reference_words": 100}
    row = evaluation("stock", 0.35) | edits | {"loop_rate": 0.02, "empty_rate": 0.0}
    figure = draw_error_types({"stock": row}, {})
    left, right = figure.axes
    assert heights(left) == pytest.approx([0.2, 0.1, 0.05])
    assert left.get_legend_handles_labels()[1] == ["stock, WER 0.350"]
    assert heights(right) == [0.02, 0.0]
    save_figure(figure, tmp_path, "types")


def test_older_runs_take_edits_from_predictions_and_leave_a_gap_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    predictions = load_predictions(run_dir)
    figure = draw_error_types({"stock": evaluation("stock", 0.5), "tuned": evaluation("tuned", 0.2)}, predictions)
    left, right = figure.axes
    assert heights(left)[0] == pytest.approx(0.5)
    assert not_measured(right) == 4
    assert left.patches[0].get_hatch() != left.patches[3].get_hatch()  # models differ without colour too
    alone = draw_error_types({"stock": evaluation("stock", 0.5)}, {})
    assert [not_measured(axes) for axes in alone.axes] == [3, 2]
    save_figure(alone, tmp_path, "gap")
