"""The live picture: what it gathers, when it draws, and that a notebook keeps one output of it."""

from __future__ import annotations

import base64
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest

from src.evaluation.visualization import training as live_plot
from src.evaluation.visualization.training import MAX_POINTS, LivePlot, TrainingCurves, draw_curves, thin_places
from src.utils.config import Config
from src.utils.figures import save_figure
from src.utils.tracking import ExperimentLogger
from tests.evaluation.run_files import epoch

ROOT = Path(__file__).resolve().parents[3]


def step(number: int, **fields: Any) -> dict[str, Any]:
    values = {"epoch": 1, "loss": 1 / number, "learning_rate": 1e-5, "samples_per_sec": 8.0, "gpu_memory_mb": None}
    return {"event": "train_step", "step": number, **values, **fields}


def curves_of(*rows: dict[str, Any]) -> TrainingCurves:
    curves = TrainingCurves()
    for row in rows:
        curves.add(row)
    return curves


class Display:
    """Stands for the notebook; remembers what it was told to show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        monkeypatch.setattr(live_plot, "in_notebook", lambda: True)
        monkeypatch.setattr("IPython.display.display", self._display)

    def _display(self, picture: Any, *, display_id: str, update: bool) -> None:
        assert picture.data[:4] == b"\x89PNG"
        self.calls.append((display_id, update))


def test_smoothing_is_a_mean_at_first_and_skips_what_is_missing() -> None:
    curves = curves_of(step(1, loss=4.0), step(2, loss=2.0), step(3, loss=None), step(4, loss=3.0))
    assert curves.smoothed == pytest.approx([4.0, 3.0, 3.0, 3.0])
    assert math.isnan(curves.losses[2])


def test_updates_that_are_done_again_replace_the_older_ones() -> None:
    rows = [step(1), step(2), epoch(1, 0.4, True), step(3), step(4), epoch(2, 0.3, True)]
    resumed = curves_of(*rows, step(3), step(4), epoch(2, 0.2, True))
    assert resumed.steps == [1, 2, 3, 4]
    assert [row["val_wer"] for row in resumed.epochs] == [0.4, 0.2]
    assert resumed.epoch_steps == [2, 4]
    anew = curves_of(*rows, step(1))
    assert (anew.steps, anew.epochs) == ([1], [])


def test_thinning_keeps_order_ends_and_spikes() -> None:
    values = list(np.random.default_rng(0).normal(size=10_000))
    values[4321], values[8765] = 99.0, -99.0
    values[100:200] = [math.nan] * 100
    places = thin_places(values)
    assert len(places) <= MAX_POINTS
    assert np.all(np.diff(places) > 0)
    assert {4321, 8765} <= set(places.tolist())
    assert list(thin_places([1.0, 2.0])) == [0, 1]


@pytest.mark.usefixtures("no_warning_and_no_global_change")
@pytest.mark.parametrize(
    "rows",
    [
        [step(1)],
        [step(1, loss=None, learning_rate=0.0)],
        [{"event": "train_step", "step": 1, "epoch": 1, "loss": 2.0}],
        [step(1), step(2), epoch(1, None, False)],
        [step(1), step(2), epoch(1, 0.4, True), step(3), epoch(2, 0.0, True)],
        [step(number) for number in range(1, 5001)],
    ],
    ids=["one update", "no loss", "few fields", "no WER", "two epochs", "many updates"],
)
def test_whatever_is_there_draws(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    figure = draw_curves(curves_of(*rows))
    save_figure(figure, tmp_path, "live")
    assert max(len(line.get_xdata()) for axes in figure.axes for line in axes.lines) <= MAX_POINTS  # type: ignore[arg-type]


def test_the_headline_names_speed_waiting_memory_and_disk() -> None:
    row = step(1200, audio_sec_per_sec=33.4, data_wait_share=0.031, memory_mb=3210, disk_free_mb=61_000)
    (text,) = [text.get_text() for text in draw_curves(curves_of(row)).texts]
    assert text.split("   ") == [
        "update 1,200", "epoch 1", "8 clips/s", "33.4 s of audio/s", "waits for data 3% of the time", "memory 3.21 GB",
        "61 GB of disk free",
    ]  # fmt: skip


def test_it_draws_at_most_so_often_and_once_more_at_the_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, now = Display(monkeypatch), [0.0]
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment, every_sec=2.0, clock=lambda: now[0]):
        for number in range(1, 9):
            now[0] += 0.5
            experiment.log(**step(number))
        assert len(shown.calls) == 2  # at 0.5 and 2.5 s
    assert [update for _, update in shown.calls] == [False, True, True]
    assert len({name for name, _ in shown.calls}) == 1


def test_slow_drawing_is_done_less_often(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, ticks = Display(monkeypatch), itertools.count()
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment, every_sec=2.0, clock=lambda: float(next(ticks))):  # a picture takes 1 s
        for number in range(1, 23):
            experiment.log(**step(number))
        assert len(shown.calls) == 2  # the second after 20 s


def test_a_continued_run_begins_with_the_curve_that_it_has(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        for number in (1, 2, 3):
            experiment.log(**step(number))
    Display(monkeypatch)
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment) as plot:
        experiment.log(**step(3))
        assert plot._curves.steps == [1, 2, 3]


def test_an_error_in_drawing_ends_the_picture_with_one_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Display(monkeypatch)
    monkeypatch.setattr(live_plot, "draw_curves", lambda curves: 1 / 0)
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment, every_sec=0.0):
        for number in (1, 2, 3):
            experiment.log(**step(number))
    assert caplog.messages == [
        "the live plot stops after an error, training goes on: ZeroDivisionError: division by zero"
    ]
    assert len(experiment.metrics_path.read_text().splitlines()) == 3


def test_an_interrupted_training_is_shown_to_its_end_and_stays_interrupted(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Display(monkeypatch)
    experiment = ExperimentLogger(config, run_id="r")
    with pytest.raises(KeyboardInterrupt), experiment, LivePlot(experiment):
        experiment.log(**step(1))
        experiment.log(**step(2))
        raise KeyboardInterrupt
    assert len(shown.calls) == 2


def test_outside_a_notebook_nothing_is_gathered_or_drawn(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))  # a terminal
    experiment = ExperimentLogger(config, run_id="r")
    with experiment, LivePlot(experiment) as plot:
        experiment.log(**step(1))
        plot.update(force=True)
    assert plot._curves.steps == []


CELL = """
from src.evaluation.visualization.training import LivePlot
from src.utils.config import load_config
from src.utils.tracking import ExperimentLogger
experiment = ExperimentLogger(load_config(None, overrides={"paths": {"runs_dir": RUNS}}), run_id="r")
with experiment, LivePlot(experiment, every_sec=0.0) as plot:
    experiment.log("train_step", step=1, epoch=1, loss=2.0, learning_rate=1e-5)
    plot.update(force=True)
    print("between two pictures")
    for step in range(2, 6):
        experiment.log("train_step", step=step, epoch=1, loss=2 / step, learning_rate=1e-5)
        plot.update(force=True)
"""


@pytest.mark.slow
def test_a_notebook_keeps_one_output_the_last_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(f"RUNS = {str(tmp_path)!r}" + CELL), nbformat.v4.new_code_cell("'after'")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    pictures: list[int] = []
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120)
    process_message = client.process_message

    def count(message: Any, *rest: Any) -> Any:
        if message["msg_type"] in ("display_data", "update_display_data"):
            pictures.append(len(message["content"]["data"]["image/png"]))
        return process_message(message, *rest)

    monkeypatch.setattr(client, "process_message", count)
    client.execute()
    outputs = notebook.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data", "stream"]
    assert len(pictures) >= 6
    assert len(outputs[0].data["image/png"]) == pictures[-1]  # the newest, in the first one's place
    assert base64.b64decode(outputs[0].data["image/png"])[:4] == b"\x89PNG"
