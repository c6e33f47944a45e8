"""Curves of a training: as one figure of a finished run, and live in the notebook cell that trains."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from src.evaluation.metrics import FloatArray
from src.evaluation.report.run_files import (
    STOCK,
    TUNED,
    Row,
    best_epoch,
    last_training,
    latest_evaluations,
    load_metrics,
)
from src.evaluation.report.summary import NOT_MEASURED, counted, number
from src.evaluation.visualization.style import gap, show_note
from src.utils.errors import DataError
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure
from src.utils.runtime import in_notebook
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

MAX_POINTS = 800  # of a curve; a panel is about 400 pixels wide
_SMOOTHING_UPDATES = 25
_MAX_SHARE = 0.05  # of the time that may be spent on drawing


class TrainingVisualizer:
    """Curves of the last training of a run.

    Args:
        run_dir: with metrics.jsonl.

    Raises:
        DataError: no metrics, or no finished epoch.
    """

    def __init__(self, run_dir: str | Path) -> None:
        rows = load_metrics(run_dir)
        self._steps, self._epochs = last_training(rows)
        self._evaluations = latest_evaluations(rows)
        self._best = best_epoch(self._epochs)
        if not self._epochs:
            raise DataError(f"{run_dir}: no finished epoch yet; train first")

    def training_analysis(self) -> Figure:
        """Draw loss with the best epoch marked, WER, CER, and a table with relative changes."""
        with matplotlib.rc_context(FIGURE_STYLE):
            figure = NotebookFigure(figsize=(10, 6.4), layout="constrained")
            axes = figure.subplots(2, 2)
            self._draw_loss(axes[0, 0])
            self._draw_rate(axes[0, 1], "wer", "Word error rate", ORANGE)
            self._draw_rate(axes[1, 0], "cer", "Character error rate", GREEN)
            self._draw_summary(axes[1, 1])
        return figure

    def _draw_loss(self, axes: Axes) -> None:
        # updates stand evenly within their epoch; those of the unfinished one as if it were as long as the longest
        groups = [list(rows) for _, rows in itertools.groupby(self._steps, lambda row: row["epoch"])]
        longest = max((len(rows) for rows in groups), default=1)
        places = [rows[0]["epoch"] - 1 + (i + 1) / longest for rows in groups for i in range(len(rows))]
        losses, epochs = _column(self._steps, "loss"), _column(self._epochs, "epoch")
        train, validation = _column(self._epochs, "train_loss"), _column(self._epochs, "val_loss")
        _draw_updates(axes, np.array(places), losses, color=BLUE, alpha=0.3, linewidth=1, label="each update")
        axes.plot(epochs, train, color=BLUE, marker="o", label="train, mean of the epoch")
        axes.plot(epochs, validation, color=ORANGE, marker="s", linestyle="--", label="validation")
        if self._best is not None:
            best = self._best["epoch"]
            axes.axvline(best, color=GREY, linestyle=":", label=f"best epoch by WER: {best}", zorder=0)
        axes.set(title="Loss", xlabel="epoch", ylabel="nats per token", xlim=(0, max([*epochs, *places]) + 0.1))
        axes.set_ylim(0, _top_of_loss(losses, train, validation))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")

    def _draw_rate(self, axes: Axes, key: str, title: str, color: str) -> None:
        epochs, values = _column(self._epochs, "epoch"), _column(self._epochs, f"val_{key}")
        measured = np.isfinite(values)
        axes.plot(epochs, values, color=color, marker="o")
        if self._best is not None:
            best = self._best["epoch"], gap(self._best[f"val_{key}"])
            axes.plot(*best, "*", color="black", markersize=13, linestyle="none", label="best epoch by WER")
            axes.legend(frameon=False, fontsize=9, loc="lower left")
        for place in zip(epochs[measured], values[measured], strict=True) if measured.sum() <= 12 else ():
            axes.annotate(number(place[1]), place, (0, 9), textcoords="offset points", ha="center", fontsize=9)
        if not measured.any():
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", color=GREY, transform=axes.transAxes)
        top = np.max(values, initial=0.0, where=measured)
        axes.set(title=title, xlabel="epoch", ylabel=f"{key.upper()}, validation", ylim=(0, 1.25 * top or 1))
        axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def _draw_summary(self, axes: Axes) -> None:
        first, best = self._epochs[0], self._best or self._epochs[-1]
        keys = {"loss": "val_loss", "WER": "val_wer", "CER": "val_cer"}
        cells = [["validation", f"epoch {first['epoch']}", f"epoch {best['epoch']}", "change"]]
        cells += [_change_row(label, first.get(key), best.get(key)) for label, key in keys.items()]
        if best is first:
            cells = [[*row[:2], "", ""] for row in cells]
        heads = [0]
        stock, tuned = self._evaluations.get(STOCK), self._evaluations.get(TUNED)
        if stock and tuned:
            keys = {"WER": "wer", "WER plain": "wer_plain", "CER": "cer"}
            heads.append(len(cells))
            cells.append(["test set", STOCK, TUNED, "change"])
            cells += [_change_row(label, stock.get(key), tuned.get(key)) for label, key in keys.items()]
        axes.axis("off")
        axes.set_title("Summary")
        height = 0.108 * len(cells)
        table = axes.table(
            cellText=cells, cellLoc="center", edges="horizontal", bbox=Bbox.from_bounds(0, 0.98 - height, 1, height)
        )  # fmt: skip
        table.auto_set_font_size(False)
        table.set_fontsize(10)
        for (row, _), cell in table.get_celld().items():
            cell.set_edgecolor("#BBBBBB")
            if row in heads:
                cell.set_text_props(weight="bold")
        speeds = sorted(row["samples_per_sec"] for row in self._steps if row.get("samples_per_sec"))
        speed = f", median {speeds[len(speeds) // 2]:.1f} clips/s" if speeds else ""
        note = f"{counted(len(self._steps), 'update')}, {counted(len(self._epochs), 'epoch')}{speed}"
        axes.text(0.5, 0.9 - height, note, ha="center", color=GREY, fontsize=9, transform=axes.transAxes)


def _change_row(label: str, before: float | None, after: float | None) -> list[str]:
    change = 100 * (gap(after) - gap(before)) / gap(before) if before else math.nan
    return [label, number(before), number(after), f"{change:+.0f} %" if math.isfinite(change) else "-"]


class LivePlot:
    """Shows loss, validation rates and learning rate of a training in the notebook cell that runs it.

        with LivePlot(experiment):
            trainer.train()

    One figure is replaced in place, without a widget: `display_id` works in Jupyter and in Colab. Drawing takes at most
    a twentieth of the time. An error in it ends the figure with a warning, never the training. Outside a notebook
    nothing is drawn.

    Args:
        experiment: its rows are shown, those of a resumed training included.
        every_sec: minimal time between two figures.
        clock: monotonic seconds.
    """

    def __init__(
        self, experiment: ExperimentLogger, *, every_sec: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._experiment = experiment
        self._every_sec = every_sec
        self._clock = clock
        self._rows: list[Mapping[str, Any]] = []
        self._display_id: str | None = None
        self._next_sec = -math.inf
        self._drawing = in_notebook()
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        if self._drawing:
            if self._experiment.metrics_path.stat().st_size:
                self._rows += load_metrics(self._experiment.metrics_path)
            self._unsubscribe = self._experiment.subscribe(self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unsubscribe()
        self.update(force=True)

    def _receive(self, row: Mapping[str, Any]) -> None:
        if row["event"] in ("train_step", "epoch"):
            self._rows.append(row)
            self.update()

    def update(self, *, force: bool = False) -> None:
        """Draw what there is, unless the last figure is younger than `every_sec`."""
        began_sec = self._clock()
        if not self._drawing or (began_sec < self._next_sec and not force):
            return
        try:
            steps, epochs = last_training(self._rows)
            if not steps:
                return
            self._show(draw_curves(steps, epochs)._repr_png_())
        except Exception as err:  # noqa: BLE001  boundary: a figure must not end hours of training
            self._drawing = False
            logger.warning("the live plot stops after an error, training goes on: %s: %s", type(err).__name__, err)
        now_sec = self._clock()
        self._next_sec = now_sec + max(self._every_sec, (now_sec - began_sec) / _MAX_SHARE)

    def _show(self, png: bytes) -> None:
        from IPython.display import Image, display

        update = self._display_id is not None
        self._display_id = self._display_id or secrets.token_hex(8)
        display(Image(data=png, format="png"), display_id=self._display_id, update=update)


def draw_curves(steps: Sequence[Row], epochs: Sequence[Row]) -> NotebookFigure:
    """Draw loss and learning rate by update, and validation WER and CER by epoch."""
    with matplotlib.rc_context({**FIGURE_STYLE, "font.size": 9, "axes.titlesize": 10, "axes.titley": 1.0}):
        figure = NotebookFigure(figsize=(10, 3.1))
        # fixed margins: a solved layout takes as long as the drawing, and moves between two figures
        axes = figure.subplots(
            1, 3, width_ratios=(2, 1.5, 1),
            gridspec_kw={"left": 0.055, "right": 0.985, "top": 0.81, "bottom": 0.16, "wspace": 0.24},
        )  # fmt: skip
        for each, most in zip(axes, (5, 5, 3), strict=True):
            each.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
            each.yaxis.set_major_locator(MaxNLocator(4))
        updates, losses = _column(steps, "step"), _column(steps, "loss")
        _draw_live_loss(axes[0], updates, losses, _column(steps, "epoch"), epochs)
        _draw_live_rates(axes[1], epochs)
        rates = _column(steps, "learning_rate")
        highest = float(np.max(rates, initial=0, where=np.isfinite(rates)))
        power = math.floor(math.log10(highest)) if highest else 0
        _draw_updates(axes[2], updates, rates / 10**power, color=GREY)
        axes[2].set(title=f"Learning rate, 1e{power}", xlabel="update", ylim=(0, None))
        axes[2].margins(x=0.02)
        figure.text(0.055, 0.94, _headline(steps[-1]), color=GREY, fontsize=9)
    return figure


def _draw_live_loss(
    axes: Axes, updates: FloatArray, losses: FloatArray, epoch_of: FloatArray, epochs: Sequence[Row]
) -> None:
    _draw_updates(axes, updates, losses, color=BLUE, alpha=0.3, linewidth=1, label="each update")
    smoothed = pd.Series(losses).ewm(alpha=1 / _SMOOTHING_UPDATES, ignore_na=True).mean().to_numpy()
    even = np.unique(np.linspace(0, len(updates) - 1, min(len(updates), MAX_POINTS)).astype(int))
    axes.plot(updates[even], smoothed[even], color=BLUE, label="smoothed")
    validation = _column(epochs, "val_loss")
    if epochs:  # at the last update of each
        ends = np.searchsorted(epoch_of, _column(epochs, "epoch"), side="right")
        places = np.concatenate([[0], updates])[ends]
        axes.plot(places, validation, color=ORANGE, marker="s", linestyle="--", label="validation")
    axes.set(title="Loss, nats per token", xlabel="update", ylim=(0, _top_of_loss(losses, validation)))
    axes.margins(x=0.02)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_live_rates(axes: Axes, epochs: Sequence[Row]) -> None:
    axes.set(title="Validation", xlabel="epoch")
    numbers = _column(epochs, "epoch")
    rates = {key: _column(epochs, f"val_{key}") for key in ("wer", "cer")}
    if not any(np.isfinite(values).any() for values in rates.values()):
        show_note(axes, "after the first epoch")
        return
    for (key, values), (color, marker) in zip(rates.items(), ((ORANGE, "o"), (GREEN, "^")), strict=True):
        measured = values[np.isfinite(values)]
        last = f" {measured[-1]:.3f}" if len(measured) else ""
        axes.plot(numbers, values, color=color, marker=marker, label=f"{key.upper()}{last}")
    top = np.nanmax([*rates.values()])
    axes.set(xlim=(numbers.min() - 0.5, numbers.max() + 0.5), ylim=(0, 1.35 * top or 1))
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _headline(row: Row) -> str:
    parts = [f"update {row['step']:,}"]
    for key, unit, text in (
        ("epoch", 1, "epoch {:.3g}"),
        ("samples_per_sec", 1, "{:.3g} clips/s"),
        ("audio_sec_per_sec", 1, "{:.3g} s of audio/s"),
        ("data_wait_share", 1, "waits for data {:.0%} of the time"),
        ("gpu_memory_mb", 1000, "GPU {:.3g} GB"),
        ("memory_mb", 1000, "memory {:.3g} GB"),
        ("disk_free_mb", 1000, "{:.3g} GB of disk free"),
    ):
        if row.get(key) is not None:
            parts.append(text.format(row[key] / unit))
    return "   ".join(parts)


def _column(rows: Sequence[Row], key: str) -> FloatArray:
    return np.array([gap(row.get(key)) for row in rows])


def _top_of_loss(updates: FloatArray, *epochs: FloatArray) -> float:
    """Return the end of the loss axis: above every epoch, while a few spikes of updates may leave the figure."""
    finite = updates[np.isfinite(updates)]
    usual = min(1.6 * float(np.quantile(finite, 0.98)), finite.max()) if len(finite) else 0.0
    return 1.05 * max([usual, *(value for values in epochs for value in values if math.isfinite(value))]) or 1.0


def _draw_updates(axes: Axes, places: FloatArray, values: FloatArray, **style: Any) -> None:
    """Draw a curve through at most `MAX_POINTS` points: the extremes of each stretch, so that spikes stay."""
    drawn = thin_places(values)
    marker = "." if len(drawn) == 1 else None  # a line of one point is invisible
    axes.plot(places[drawn], values[drawn], marker=marker, **style)


def thin_places(values: FloatArray) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return at most `MAX_POINTS` indices of a curve, ascending: minimum and maximum of each stretch."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MAX_POINTS // 2 + 1).astype(int)
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    stretches = itertools.pairwise(edges)
    ends = [a + int(part[a:b].argmin()) for a, b in stretches for part in (low, -high)]
    return np.unique(np.array(ends, dtype=np.intp))
