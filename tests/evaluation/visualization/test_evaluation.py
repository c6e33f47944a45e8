"""Pictures are drawn from files alone, whatever is missing in them, and without pyplot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.axes import Axes

from src.evaluation.report.summary import load_predictions
from src.evaluation.slices import slice_rates
from src.evaluation.visualization import evaluation as visualization
from src.evaluation.visualization.evaluation import EvaluationVisualizer, TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import save_figure
from tests.evaluation.run_files import epoch, evaluation, steps, write

pytestmark = pytest.mark.usefixtures("no_warning_and_no_global_change")


def test_training_analysis_has_four_panels_and_is_saved_twice(run_dir: Path, tmp_path: Path) -> None:
    figure = TrainingVisualizer(run_dir).training_analysis()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss", "Word error rate", "Character error rate", "Summary",
    ]  # fmt: skip
    png, svg = save_figure(figure, tmp_path / "figures", "training_analysis")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in svg.read_text()
    assert len(TrainingVisualizer(run_dir)._epochs) == 2


@pytest.mark.parametrize("rows", [[epoch(1, 0.3, True)], [epoch(1, 0.3, True), epoch(2, None, False)]])
def test_one_epoch_or_a_missing_value_draws(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    figure = TrainingVisualizer(write(tmp_path / "r", rows)).training_analysis()
    save_figure(figure, tmp_path, "one")


def test_comparison_and_duration_draw(run_dir: Path, tmp_path: Path) -> None:
    visualizer = EvaluationVisualizer(run_dir)
    bars = visualizer.stock_against_tuned()
    assert [label.get_text() for label in bars.axes[0].get_xticklabels()] == ["stock", "tuned"]
    save_figure(bars, tmp_path, "bars")
    save_figure(visualizer.wer_by_duration(), tmp_path, "duration")


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "r", steps(3))
    with pytest.raises(DataError, match="no finished epoch"):
        TrainingVisualizer(path)
    with pytest.raises(DataError, match="nothing was evaluated"):
        EvaluationVisualizer(path)


def test_figures_show_as_pictures_in_a_notebook_without_pyplot(run_dir: Path) -> None:
    figure = TrainingVisualizer(run_dir).training_analysis()
    assert figure._repr_png_()[:4] == b"\x89PNG"  # type: ignore[attr-defined]
    source = Path(visualization.__file__).read_text()
    assert "import pyplot" not in source
    assert "matplotlib.pyplot" not in source


def test_the_same_run_gives_the_same_files(run_dir: Path, tmp_path: Path) -> None:
    files = [save_figure(TrainingVisualizer(run_dir).training_analysis(), tmp_path / name, "training") for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_value_that_is_missing_is_a_gap_and_said(tmp_path: Path) -> None:
    rows = [*steps(6)[:3], epoch(1, None, False)]
    figure = TrainingVisualizer(write(tmp_path / "r", rows)).training_analysis()
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]
    save_figure(figure, tmp_path, "gap")
    row = evaluation("stock", 0.4) | {"wer": None, "wer_low": None, "wer_high": None}
    bars = EvaluationVisualizer(write(tmp_path / "r", [row])).stock_against_tuned()
    assert [text.get_text() for text in bars.axes[0].texts] == ["not measured"]
    assert len(bars.axes[0].patches) == 0
    assert len(bars.axes[1].patches) == 1


def test_bars_have_the_heights_of_the_rates(run_dir: Path) -> None:
    bars = EvaluationVisualizer(run_dir).stock_against_tuned()
    heights = [patch.get_height() for patch in bars.axes[0].patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([0.37, 0.27])
    assert bars.axes[0].get_ylim()[0] == 0


def test_the_difference_of_two_models_is_said_below_their_bars(run_dir: Path, tmp_path: Path) -> None:
    bars = EvaluationVisualizer(run_dir).stock_against_tuned()
    caption = bars.get_supxlabel()
    assert caption.startswith(
        "40 clips; 95% bootstrap intervals over 8 speakers\ntuned against stock, clip by clip: better"
    )
    assert "WER -37.5 points [" in caption
    alone = EvaluationVisualizer(write(tmp_path / "r", [evaluation("stock", 0.4)])).stock_against_tuned()
    assert "against" not in alone.get_supxlabel()


def test_every_clip_falls_into_one_range_of_lengths(run_dir: Path) -> None:
    figure = EvaluationVisualizer(run_dir).wer_by_duration((0, 2, 4, 9, 20, 30))
    labels = tick_labels(figure.axes[0], "y")
    assert [label.split(", ")[0] for label in labels] == ["all", "0 to 2 s", "2 to 4 s", "4 to 9 s"]
    assert sum(int(label.split(", ")[1].split()[0]) for label in labels[1:]) == 40


def test_clips_outside_of_the_lengths_are_counted_below(run_dir: Path) -> None:
    figure = EvaluationVisualizer(run_dir).wer_by_duration((0, 2, 4))
    assert [label.split(", ")[0] for label in tick_labels(figure.axes[0], "y")] == ["all", "0 to 2 s", "2 to 4 s"]
    outside = sum(row.duration_sec > 4 for row in load_predictions(run_dir)["stock"])
    assert f"{outside} clips outside of these lengths" in figure.get_supxlabel()


def test_no_prediction_has_no_picture_by_length(run_dir: Path, tmp_path: Path) -> None:
    visualizer = EvaluationVisualizer(write(tmp_path / "r", [evaluation("stock", 0.4)]))
    for draw in (visualizer.wer_by_duration, visualizer.confusions, lambda: visualizer.wer_by_slice("speaker")):
        with pytest.raises(DataError, match=r"no prediction|no evaluation of 'tuned'"):
            draw()
    with pytest.raises(DataError, match="no prediction of 40 to 60 s"):
        EvaluationVisualizer(run_dir).wer_by_duration((40, 60))


def test_a_slice_is_drawn_with_its_rate_its_interval_and_its_size(run_dir: Path, tmp_path: Path) -> None:
    figure = EvaluationVisualizer(run_dir).wer_by_slice("speaker")
    axes = figure.axes[0]
    expected = {name: slice_rates(rows, "speaker") for name, rows in load_predictions(run_dir).items()}
    assert tick_labels(axes, "y") == ["all, 40 clips", *[f"{each.value}, {each.n} clips" for each in expected["stock"]]]
    for index, (name, wer) in enumerate((("stock", 0.37), ("tuned", 0.27))):
        line = axes.lines[index]
        assert line.get_label() == name
        assert np.asarray(line.get_xdata()).tolist() == pytest.approx([wer, *[each.wer for each in expected[name]]])
        drawn = [segment[:, 0].tolist() for segment in axes.collections[index].get_segments()]  # type: ignore[attr-defined]
        assert drawn[0] == pytest.approx([wer - 0.05, wer + 0.05])
        assert len(drawn) == 9
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()
    save_figure(figure, tmp_path, "speaker")
    with pytest.raises(DataError, match="no column 'speakr' in the rows; did you mean 'speaker'"):
        EvaluationVisualizer(run_dir).wer_by_slice("speakr")


def test_figures_that_need_timings_say_how_to_measure_them(run_dir: Path, tmp_path: Path) -> None:
    visualizer = EvaluationVisualizer(run_dir)
    with pytest.raises(DataError, match="LatencyBenchmark"):
        visualizer.rtf_by_batch()
    figure = visualizer.latency_distribution()  # of the evaluation's own rows
    assert "LatencyBenchmark" in figure.axes[1].texts[0].get_text()
    save_figure(figure, tmp_path, "latency")


def test_every_picture_of_a_run_is_drawn_and_saved(run_dir: Path, tmp_path: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for size in (1, 4):
            row = {"event": "latency", "name": "tuned", "engine": "torch", "batch_size": size, "rtf": 0.2}
            file.write(json.dumps(row | {"p50_sec": 1.0, "p95_sec": None}) + "\n")
    visualizer = EvaluationVisualizer(run_dir)
    pictures = {
        "types": visualizer.error_types(),
        "confusions": visualizer.confusions(),
        "latency": visualizer.latency_distribution(),
        "rtf": visualizer.rtf_by_batch(),
        "modes": visualizer.modes(),
    }
    for name, figure in pictures.items():
        assert max(figure.get_size_inches() / [10, 4]) <= 1
        for path in save_figure(figure, tmp_path, name):
            assert path.stat().st_size > 1000


def test_another_model_than_the_run_has_is_an_error_that_names_those(run_dir: Path) -> None:
    with pytest.raises(DataError, match="no evaluation of 'tunde'; did you mean 'tuned'"):
        EvaluationVisualizer(run_dir).modes("tunde")


def test_a_spike_of_the_loss_does_not_flatten_the_rest(tmp_path: Path) -> None:
    rows = steps(200)
    rows[50]["loss"] = 400.0
    figure = TrainingVisualizer(write(tmp_path / "r", [*rows, epoch(1, 0.3, True)])).training_analysis()
    assert 1.2 < figure.axes[0].get_ylim()[1] < 5
    calm = TrainingVisualizer(write(tmp_path / "r", [*steps(200), epoch(1, 0.3, True)])).training_analysis()
    assert calm.axes[0].get_ylim()[1] > 2  # the largest loss of an update
    save_figure(figure, tmp_path, "spike")


def test_a_long_training_draws_no_more_points_than_fit(tmp_path: Path) -> None:
    figure = TrainingVisualizer(write(tmp_path / "r", [*steps(5000), epoch(1, 0.3, True)])).training_analysis()
    assert len(np.asarray(figure.axes[0].lines[0].get_xdata())) <= 800


def tick_labels(axes: Axes, which: Literal["x", "y"]) -> list[str]:
    return [label.get_text() for label in (axes.get_xticklabels() if which == "x" else axes.get_yticklabels())]
