"""Training curves draw whatever is there; the live figure keeps to its time and to one output of a notebook."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from src.evaluation.report.run_files import last_training
from src.evaluation.visualization import training
from src.evaluation.visualization.training import MAX_POINTS, LivePlot, TrainingVisualizer, draw_curves
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.figures import save_figure
from src.utils.tracking import ExperimentLogger
from tests.evaluation.run_files import epoch, evaluation, steps, write

Shown = list[tuple[str, bool]]  # id of the output, and whether it is replaced


def step(number: int, **fields: Any) -> dict[str, Any]:
    values = {"epoch": 1, "loss": 1 / number, "learning_rate": 1e-5, "samples_per_sec": 8.0, "gpu_memory_mb": None}
    return {"event": "train_step", "step": number, **values, **fields}


def most_points(figure: Any) -> int:
    return max(len(line.get_xdata()) for axes in figure.axes for line in axes.lines)


BOTH = [evaluation("stock", 0.37), evaluation("tuned", 0.27)]


@pytest.mark.usefixtures("no_warning_and_no_global_change")
@pytest.mark.parametrize(
    "rows",
    [
        [epoch(1, 0.3, True), epoch(2, None, False)],
        [*steps(6)[:3], epoch(1, None, False)],
        [*steps(5000), epoch(1, 0.33, True), epoch(2, 0.27, True), *BOTH],
    ],
    ids=["a missing value", "no WER", "many updates, evaluated"],
)
def test_the_analysis_draws_whatever_is_there_and_saves(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    run = write(tmp_path / "run", rows)
    figure = TrainingVisualizer(run).training_analysis()
    assert len(figure.axes) == 4
    assert most_points(figure) <= MAX_POINTS
    drawn = np.asarray(figure.axes[1].lines[0].get_ydata(), dtype=float)
    missing = [row["val_wer"] is None for row in rows if row["event"] == "epoch"]
    assert np.isnan(drawn).tolist() == missing  # a gap, never a zero
    files = save_figure(figure, tmp_path, "a")
    again = save_figure(TrainingVisualizer(run).training_analysis(), tmp_path, "b")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]


def test_a_best_epoch_that_is_the_first_is_not_compared_with_itself(tmp_path: Path) -> None:
    for rates, head in (((0.33, 0.27), ["epoch 1", "epoch 2", "change"]), ((0.27, 0.33), ["epoch 1", "", ""])):
        rows = [*steps(6), *(epoch(i, rate, rate < 0.3) for i, rate in enumerate(rates, start=1)), *BOTH]
        figure = TrainingVisualizer(write(tmp_path / "run", rows)).training_analysis()
        (table,) = figure.axes[3].tables
        assert [table[0, column].get_text().get_text() for column in (1, 2, 3)] == head


def test_a_spike_of_the_loss_does_not_flatten_the_rest(tmp_path: Path) -> None:
    rows = steps(200)
    rows[50]["loss"] = 400.0
    figure = TrainingVisualizer(write(tmp_path / "run", [*rows, epoch(1, 0.3, True)])).training_analysis()
    assert 1.2 < figure.axes[0].get_ylim()[1] < 5
    with pytest.raises(DataError, match="no finished epoch"):
        TrainingVisualizer(write(tmp_path / "run", steps(3)))


def test_thinning_keeps_order_and_spikes() -> None:
    losses = np.random.default_rng(0).normal(size=10_000).tolist()
    losses[4321], losses[8765] = 99.0, -99.0
    losses[100:200] = [None] * 100
    figure = draw_curves([step(i + 1, loss=loss) for i, loss in enumerate(losses)], [])
    assert most_points(figure) <= MAX_POINTS
    updates, drawn = (np.asarray(values) for values in figure.axes[0].lines[0].get_data())
    assert np.all(np.diff(updates) > 0)
    assert {4322.0: 99.0, 8766.0: -99.0}.items() <= dict(zip(updates.tolist(), drawn.tolist(), strict=True)).items()


@pytest.mark.usefixtures("no_warning_and_no_global_change")
@pytest.mark.parametrize(
    "rows",
    [
        [step(1, loss=None, learning_rate=0.0)],
        [{"event": "train_step", "step": 1, "epoch": 1, "loss": 2.0}],
        [step(1), step(2), epoch(1, None, False)],
        [step(1), step(2), epoch(1, 0.4, True), step(3, epoch=2, data_wait_share=0.03), epoch(2, 0.0, True)],
    ],
    ids=["no loss", "few fields", "no WER", "two epochs"],
)
def test_the_live_figure_draws_whatever_is_there(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    figure = draw_curves(*last_training(rows))
    save_figure(figure, tmp_path, "live")
    ends = [line.get_xdata() for line in figure.axes[0].lines if line.get_label() == "validation"]
    assert [list(each) for each in ends] in ([], [[2]], [[2, 3]])  # at the last update of each epoch


@pytest.fixture
def experiment(config: Config) -> ExperimentLogger:
    return ExperimentLogger(config, run_id="r")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Stands for the notebook: what it was told to show."""
    calls: Shown = []

    def display(figure: Any, *, display_id: str, update: bool) -> None:
        assert figure.data[:4] == b"\x89PNG"
        calls.append((display_id, update))

    monkeypatch.setattr(training, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    return calls


def test_it_draws_at_most_so_often_and_once_more_at_the_end(experiment: ExperimentLogger, shown: Shown) -> None:
    now = [0.0]
    with experiment, LivePlot(experiment, every_sec=2.0, clock=lambda: now[0]):
        for number in range(1, 9):
            now[0] += 0.5
            experiment.log(**step(number))
        assert len(shown) == 2  # at 0.5 and 2.5 s
    assert [update for _, update in shown] == [False, True, True]
    assert len({name for name, _ in shown}) == 1


def test_slow_drawing_is_done_less_often(experiment: ExperimentLogger, shown: Shown) -> None:
    ticks = itertools.count(0.0)
    with experiment, LivePlot(experiment, every_sec=2.0, clock=lambda: next(ticks)):  # a figure takes 1 s
        for number in range(1, 23):
            experiment.log(**step(number))
        assert len(shown) == 2  # the second after 20 s


@pytest.mark.usefixtures("shown")
def test_a_continued_run_begins_with_the_curve_that_it_has(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    draw = training.draw_curves
    monkeypatch.setattr(training, "draw_curves", lambda s, e: drawn.append([row["step"] for row in s]) or draw(s, e))
    with ExperimentLogger(config, run_id="r") as experiment:
        for number in (1, 2, 3):
            experiment.log(**step(number))
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment):
        experiment.log(**step(3))
    assert drawn[-1] == [1, 2, 3]


@pytest.mark.usefixtures("shown")
def test_an_error_in_drawing_ends_the_figure_with_one_warning(
    experiment: ExperimentLogger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "draw_curves", lambda steps, epochs: 1 / 0)
    with experiment, LivePlot(experiment, every_sec=0.0):
        for number in (1, 2, 3):
            experiment.log(**step(number))
    (message,) = caplog.messages
    assert "ZeroDivisionError" in message
    assert len(experiment.metrics_path.read_text().splitlines()) == 3


def test_outside_a_notebook_nothing_is_gathered_or_drawn(
    experiment: ExperimentLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))  # a terminal
    with experiment, LivePlot(experiment) as plot:
        experiment.log(**step(1))
        plot.update(force=True)
    assert plot._rows == []
