"""Pictures are drawn from files alone, whatever is missing in them, and without pyplot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.evaluation import visualization
from src.evaluation.visualization import EvaluationVisualizer, TrainingVisualizer
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


def test_every_clip_falls_into_one_range_of_lengths(run_dir: Path) -> None:
    figure = EvaluationVisualizer(run_dir).wer_by_duration((0, 2, 4, 9, 20, 30))
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [label.split("\n")[0] for label in labels] == ["0 to 2 s", "2 to 4 s", "4 to 9 s"]
    assert sum(int(label.split("\n")[1].split()[0]) for label in labels) == 40


def test_no_prediction_has_no_picture_by_length(tmp_path: Path) -> None:
    visualizer = EvaluationVisualizer(write(tmp_path / "r", [evaluation("stock", 0.4)]))
    with pytest.raises(DataError, match="no prediction"):
        visualizer.wer_by_duration()
