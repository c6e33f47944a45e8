"""Curves of a training while it runs: one picture in the notebook, replaced in place.

No widget is needed: `display_id` works in Jupyter and in Colab alike. Outside a notebook nothing is drawn.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from src.evaluation.report.summary import last_training, load_metrics
from src.evaluation.visualization.style import gap
from src.utils.colab import in_notebook
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

MAX_POINTS = 800  # of a curve; a panel is about 400 pixels wide
_SMOOTHING_UPDATES = 25  # a spike's weight in the smoothed curve
_MAX_SHARE = 0.05  # of the time that may go into drawing, on whatever machine


class TrainingCurves:
    """What the picture shows, gathered row by row."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []  # nan where an update had none
        self.smoothed: list[float] = []
        self.rates: list[float] = []
        self.epochs: list[Mapping[str, Any]] = []
        self.epoch_steps: list[int] = []  # updates done at the end of each epoch
        self.newest: Mapping[str, Any] = {}

    def add(self, row: Mapping[str, Any]) -> bool:
        """Take a row of metrics.jsonl; updates and epochs that are done again replace the older ones.

        Returns: whether it is of a kind that is shown.
        """
        if row["event"] == "train_step":
            self._forget_from(int(row["step"]))
            loss = gap(row["loss"])
            before = self.smoothed[-1] if self.smoothed else math.nan
            weight = 1 / min(len(self.losses) + 1, _SMOOTHING_UPDATES)  # a plain mean at first
            smoothed = loss if math.isnan(before) else before + weight * (loss - before)
            self.steps.append(int(row["step"]))
            self.losses.append(loss)
            self.smoothed.append(before if math.isnan(smoothed) else smoothed)
            self.rates.append(gap(row.get("learning_rate")))
            self.newest = row
            return True
        if row["event"] == "epoch":
            self._keep_epochs([e["epoch"] < row["epoch"] for e in self.epochs])
            self.epochs.append(row)
            self.epoch_steps.append(self.steps[-1] if self.steps else 0)
            return True
        return False

    def _forget_from(self, step: int) -> None:
        if not self.steps or self.steps[-1] < step:
            return
        count = int(np.searchsorted(self.steps, step))
        for values in (self.steps, self.losses, self.smoothed, self.rates):
            del values[count:]
        self._keep_epochs([done < step for done in self.epoch_steps])

    def _keep_epochs(self, kept: list[bool]) -> None:
        self.epochs = [e for e, keep in zip(self.epochs, kept, strict=True) if keep]
        self.epoch_steps = [s for s, keep in zip(self.epoch_steps, kept, strict=True) if keep]


class LivePlot:
    """Shows loss, validation rates and learning rate of a training in the notebook cell that runs it.

        with LivePlot(experiment):
            trainer.train()

    Drawing takes at most a twentieth of the time. An error in it ends the picture with a warning, never the training.

    Args:
        experiment: its rows are shown, those of a resumed training included.
        every_sec: seconds between two pictures at least.
        clock: seconds that only grow.
    """

    def __init__(
        self, experiment: ExperimentLogger, *, every_sec: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._experiment = experiment
        self._every_sec = every_sec
        self._clock = clock
        self._curves = TrainingCurves()
        self._display_id: str | None = None
        self._next_sec = -math.inf
        self._drawing = in_notebook()
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        if self._drawing:
            if self._experiment.metrics_path.stat().st_size:
                steps, epochs = last_training(load_metrics(self._experiment.metrics_path))
                for row in sorted([*steps, *epochs], key=lambda row: float(row["time"])):
                    self._curves.add(row)
            self._unsubscribe = self._experiment.subscribe(self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unsubscribe()
        self.update(force=True)

    def update(self, *, force: bool = False) -> None:
        """Draw what there is, unless the last picture is younger than `every_sec`."""
        began_sec = self._clock()
        if not self._drawing or not self._curves.steps or (began_sec < self._next_sec and not force):
            return
        try:
            self._show(draw_curves(self._curves)._repr_png_())
        except Exception as err:  # noqa: BLE001  boundary: a picture must not end hours of training
            self._drawing = False
            logger.warning("the live plot stops after an error, training goes on: %s: %s", type(err).__name__, err)
        now_sec = self._clock()
        self._next_sec = now_sec + max(self._every_sec, (now_sec - began_sec) / _MAX_SHARE)

    def _receive(self, row: Mapping[str, Any]) -> None:
        if self._curves.add(row):
            self.update()

    def _show(self, png: bytes) -> None:
        from IPython.display import Image, display

        update = self._display_id is not None
        self._display_id = self._display_id or secrets.token_hex(8)
        display(Image(data=png, format="png"), display_id=self._display_id, update=update)


def draw_curves(curves: TrainingCurves) -> NotebookFigure:
    """Draw loss and learning rate by update, and validation WER and CER by epoch."""
    with matplotlib.rc_context({**FIGURE_STYLE, "font.size": 9, "axes.titlesize": 10, "axes.titley": 1.0}):
        figure = NotebookFigure(figsize=(10, 3.1))
        # fixed margins and titles: a solved layout costs as much as the drawing, and moves between two pictures
        axes = figure.subplots(
            1, 3, width_ratios=(2, 1.5, 1),
            gridspec_kw={"left": 0.055, "right": 0.985, "top": 0.81, "bottom": 0.16, "wspace": 0.24},
        )  # fmt: skip
        _draw_loss(axes[0], curves)
        _draw_error_rates(axes[1], curves)
        _draw_learning_rate(axes[2], curves)
        figure.text(0.055, 0.94, _headline(curves), color=GREY, fontsize=9)
    return figure


def _draw_loss(axes: Axes, curves: TrainingCurves) -> None:
    places = thin_places(curves.losses)
    steps, losses = np.asarray(curves.steps), np.asarray(curves.losses)
    axes.plot(
        steps[places], losses[places], **_line(len(places)), color=BLUE, alpha=0.3, linewidth=1, label="each update"
    )
    even = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).astype(int))
    axes.plot(steps[even], np.asarray(curves.smoothed)[even], color=BLUE, label="smoothed")
    val_losses = [gap(row.get("val_loss")) for row in curves.epochs]
    if val_losses:
        axes.plot(curves.epoch_steps, val_losses, color=ORANGE, marker="s", linestyle="--", label="validation")
    axes.set(title="Loss, nats a token", xlabel="update")
    _fit(axes, [*curves.losses, *val_losses])
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_error_rates(axes: Axes, curves: TrainingCurves) -> None:
    axes.set(title="Validation", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    numbers = [row["epoch"] for row in curves.epochs]
    series = {key: [gap(row.get(f"val_{key}")) for row in curves.epochs] for key in ("wer", "cer")}
    measured = [value for values in series.values() for value in values if math.isfinite(value)]
    if not measured:
        axes.text(0.5, 0.5, "after the first epoch", ha="center", color=GREY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    for (key, values), (color, marker) in zip(series.items(), ((ORANGE, "o"), (GREEN, "^")), strict=True):
        finite = [value for value in values if math.isfinite(value)]
        last = f" {finite[-1]:.3f}" if finite else ""
        axes.plot(numbers, values, color=color, marker=marker, label=f"{key.upper()}{last}")
    axes.set(xlim=(min(numbers) - 0.5, max(numbers) + 0.5), ylim=(0, 1.35 * max(measured) or 1))
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _draw_learning_rate(axes: Axes, curves: TrainingCurves) -> None:
    places = thin_places(curves.rates)
    rates = np.asarray(curves.rates)[places]
    highest = float(np.max(rates, initial=0, where=np.isfinite(rates)))
    power = math.floor(math.log10(highest)) if highest else 0
    axes.plot(np.asarray(curves.steps)[places], rates / 10**power, **_line(len(places)), color=GREY)
    axes.set(title=f"Learning rate, 1e{power}", xlabel="update")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _fit(axes: Axes, values: list[float]) -> None:
    """Begin at zero, and let a few spikes run out of the picture rather than flatten all the rest."""
    finite = np.asarray(values)[np.isfinite(values)]
    if len(finite):
        axes.set_ylim(0, min(1.3 * finite.max(), 1.6 * float(np.quantile(finite, 0.98))) or 1)


def _line(points: int) -> dict[str, Any]:
    return {"marker": "."} if points == 1 else {}  # a line of one point is nothing


def _headline(curves: TrainingCurves) -> str:
    parts = [f"update {curves.steps[-1]:,}"]
    for key, unit, text in (
        ("epoch", 1, "epoch {:.3g}"),
        ("samples_per_sec", 1, "{:.3g} clips/s"),
        ("audio_sec_per_sec", 1, "{:.3g} s of audio/s"),
        ("data_wait_share", 1, "waits for data {:.0%} of the time"),
        ("gpu_memory_mb", 1000, "GPU {:.3g} GB"),
        ("memory_mb", 1000, "memory {:.3g} GB"),
        ("disk_free_mb", 1000, "{:.3g} GB of disk free"),
    ):
        value = curves.newest.get(key)
        if value is not None:
            parts.append(text.format(value / unit))
    return "   ".join(parts)


def thin_places(values: list[float]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Choose at most `MAX_POINTS` places of a curve: the extremes of each stretch, so that spikes stay."""
    count = len(values)
    if count <= MAX_POINTS:
        return np.arange(count)
    edges = np.linspace(0, count, MAX_POINTS // 2 + 1).astype(int)
    numbers = np.asarray(values, dtype=float)
    low = np.where(np.isnan(numbers), np.inf, numbers)
    high = np.where(np.isnan(numbers), -np.inf, numbers)
    ends = [
        (begin + part.argmin(), begin + high[begin : begin + len(part)].argmax())
        for begin, part in zip(edges[:-1], np.split(low, edges[1:-1]), strict=True)
    ]
    return np.unique(np.asarray(ends))
