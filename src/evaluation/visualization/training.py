"""Curves of a training: as one figure of a finished run, and live in the notebook cell that trains."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from src.data.report.findings import NOT_MEASURED, counted
from src.evaluation.metrics import FloatArray
from src.evaluation.report import run_files
from src.evaluation.report.run_files import STOCK, TUNED, Row
from src.evaluation.report.summary import headline, number, relative_change, second_label, title_of
from src.evaluation.visualization.style import annotate, gap, new_figure, show_note
from src.utils.errors import DataError
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure
from src.utils.runtime import in_notebook
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

MAX_POINTS = 800  # of a curve; a panel is about 400 pixels wide
_SMOOTHING_UPDATES = 25
_MAX_SHARE = 0.05  # of the time that may be spent on drawing


class TrainingVisualizer:
    """Curves of the last training of a run; DataError if it has no finished epoch."""

    def __init__(self, run_dir: str | Path) -> None:
        rows = run_files.load_metrics(run_dir)
        self._steps, self._epochs = run_files.last_training(rows)
        self._evaluations = run_files.latest_evaluations(rows)
        if not self._epochs:
            raise DataError(f"{run_dir}: no finished epoch yet; train first")
        self._rates = _validation_rates(self._epochs)

    def training_analysis(self, *, on: SubFigure | None = None) -> Figure:
        """Draw loss with the best epoch marked, the headline, CER, and a table with relative changes."""
        best = run_files.best_epoch(self._epochs)
        first, *others = self._rates
        with new_figure(10, 6.4, on=on) as figure:
            places = figure.subplot_mosaic([["loss", first], [*(others or ["summary"]), "summary"]])
            self._draw_loss(places["loss"], best)
            for name, color in ((first, ORANGE), *((other, GREEN) for other in others)):
                self._draw_rate(places[name], best, name, color)
            self._draw_summary(places["summary"], best or self._epochs[-1])
        return figure

    def _draw_loss(self, axes: Axes, best: Row | None) -> None:
        # updates stand evenly within their epoch; those of the unfinished one as if it were as long as the longest
        groups = [list(rows) for _, rows in itertools.groupby(self._steps, lambda row: row["epoch"])]
        longest = max(map(len, groups), default=1)
        places = [rows[0]["epoch"] - 1 + (i + 1) / longest for rows in groups for i in range(len(rows))]
        losses, epochs = _column(self._steps, "loss"), _column(self._epochs, "epoch")
        train, validation = _column(self._epochs, "train_loss"), _column(self._epochs, "val_loss")
        _draw_updates(axes, np.array(places), losses, color=BLUE, alpha=0.3, linewidth=1, label="each update")
        axes.plot(epochs, train, color=BLUE, marker="o", label="train, mean of the epoch")
        axes.plot(epochs, validation, color=ORANGE, marker="s", linestyle="--", label="validation")
        if best is not None:
            label = f"best epoch by {headline(best, 'val_').name}: {best['epoch']}"
            axes.axvline(best["epoch"], color=GREY, linestyle=":", zorder=0, label=label)
        axes.set(title="Loss", xlabel="epoch", ylabel="nats per token", xlim=(0, max([*epochs, *places]) + 0.1))
        axes.set_ylim(0, _top_of_loss(losses, train, validation))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")

    def _draw_rate(self, axes: Axes, best: Row | None, name: str, color: str) -> None:
        epochs, values = _column(self._epochs, "epoch"), self._rates[name]
        axes.plot(epochs, values, color=color, marker="o")
        if best is not None:
            place, label = epochs == best["epoch"], f"best epoch by {headline(best, 'val_').name}"
            axes.plot(epochs[place], values[place], "*", color="black", markersize=13, linestyle="none", label=label)
            axes.legend(frameon=False, fontsize=9, loc="lower left")
        measured = np.isfinite(values)
        for epoch, value in zip(epochs[measured], values[measured], strict=True) if measured.sum() <= 12 else ():
            annotate(axes, number(value), (epoch, value), (0, 9), ha="center", fontsize=9)
        if not measured.any():
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", color=GREY, transform=axes.transAxes)
        top = np.max(values, initial=0.0, where=measured)
        title = title_of(name).capitalize()
        axes.set(title=title, xlabel="epoch", ylabel=f"{name}, validation", ylim=(0, 1.25 * top or 1))
        axes.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def _draw_summary(self, axes: Axes, best: Row) -> None:
        cells: list[list[str]] = []
        heads = []
        first, stock, tuned = self._epochs[0], self._evaluations.get(STOCK), self._evaluations.get(TUNED)
        compared = [(("validation", f"epoch {first['epoch']}", f"epoch {best['epoch']}"), first, best, "val_")]
        if stock and tuned:
            compared.append((("test set", STOCK, TUNED), stock, tuned, ""))
        for head, before, after, prefix in compared:
            heads.append(len(cells))
            name = headline(after, prefix).name
            rates = {name: tuple(headline(row, prefix).rate for row in (before, after))}
            for other, key in (("CER", "cer"), ("loss", "loss"))[: 2 if prefix else 1]:
                rates.setdefault(other, tuple(row.get(prefix + key) for row in (before, after)))
            if not prefix:
                rates[second_label(after)] = tuple(headline(row, "second_").rate for row in (before, after))
            rows = [[*head, "change"]]
            rows += [[name, number(a), number(b), relative_change(a, b)] for name, (a, b) in rates.items()]
            is_one = prefix and best["epoch"] == first["epoch"]
            cells += [[*row[:2], "", ""] for row in rows] if is_one else rows
        axes.axis("off")
        axes.set_title("Summary")
        height = 0.108 * len(cells)
        place = Bbox.from_bounds(0, 0.98 - height, 1, height)
        table = axes.table(cells, cellLoc="center", colWidths=[0.4, 0.2, 0.2, 0.2], edges="horizontal", bbox=place)
        table.auto_set_font_size(False)
        table.set_fontsize(10)
        for (row, _), cell in table.get_celld().items():
            cell.set_edgecolor("#BBBBBB")
            if row in heads:
                cell.set_text_props(weight="bold")
        speed = pd.Series(_column(self._steps, "samples_per_sec")).median()
        note = f"{counted(len(self._steps), 'update')}, {counted(len(self._epochs), 'epoch')}"
        note += f", median {speed:.1f} clips/s" if math.isfinite(speed) else ""
        axes.text(0.5, 0.9 - height, note, ha="center", color=GREY, fontsize=9, transform=axes.transAxes)


class LivePlot:
    """Shows loss, validation rates and learning rate of a training in the notebook cell that runs it.

        with LivePlot(experiment):
            trainer.train()

    One figure is replaced in place, without a widget: `display_id` works in Jupyter and in Colab. Drawing takes at most
    a twentieth of the time, and happens at most every `every_sec`. An error in it ends the figure with a warning, never
    the training. Rows of a resumed training are included. Outside a notebook nothing is drawn.
    """

    def __init__(
        self, experiment: ExperimentLogger, *, every_sec: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._experiment, self._every_sec, self._clock = experiment, every_sec, clock
        self._rows: list[Row] = []
        self._display_id: str | None = None
        self._next_sec, self._drawing = -math.inf, in_notebook()
        self._unsubscribe: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        if self._drawing:
            self._rows += run_files.load_metrics(self._experiment.dir)
            self._unsubscribe = self._experiment.subscribe(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()
        self.update(force=True)

    def _receive(self, row: Row) -> None:
        if row["event"] in ("train_step", "epoch"):
            self._rows.append(row)
            self.update()

    def update(self, *, force: bool = False) -> None:
        """Draw what there is, unless the last figure is younger than `every_sec`."""
        began_sec = self._clock()
        if not self._drawing or (began_sec < self._next_sec and not force):
            return
        try:
            steps, epochs = run_files.last_training(self._rows)
            if not steps:
                return
            from IPython.display import Image, display

            png = draw_curves(steps, epochs)._repr_png_()
            update, self._display_id = self._display_id is not None, self._display_id or secrets.token_hex(8)
            display(Image(data=png, format="png"), display_id=self._display_id, update=update)
        except Exception as err:  # noqa: BLE001  boundary: a figure must not end hours of training
            self._drawing = False
            logger.warning("the live plot stops after an error, training goes on: %s: %s", type(err).__name__, err)
        now_sec = self._clock()
        self._next_sec = now_sec + max(self._every_sec, (now_sec - began_sec) / _MAX_SHARE)


def draw_curves(steps: Sequence[Row], epochs: Sequence[Row]) -> NotebookFigure:
    """Draw loss and learning rate by update, and the headline and CER of the validation by epoch."""
    with matplotlib.rc_context({**FIGURE_STYLE, "font.size": 9, "axes.titlesize": 10, "axes.titley": 1.0}):
        figure = NotebookFigure(figsize=(10, 3.1))
        # fixed margins: a solved layout takes as long as the drawing, and moves between two figures
        margins = {"left": 0.055, "right": 0.985, "top": 0.81, "bottom": 0.16, "wspace": 0.24}
        loss, rates, speed = figure.subplots(1, 3, width_ratios=(2, 1.5, 1), gridspec_kw=margins)
        for axes, most in ((loss, 5), (rates, 5), (speed, 3)):
            axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))

        # each update, smoothed, and the validation at the last update of its epoch
        updates, losses = _column(steps, "step"), _column(steps, "loss")
        _draw_updates(loss, updates, losses, color=BLUE, alpha=0.3, linewidth=1, label="each update")
        smoothed = pd.Series(losses).ewm(alpha=1 / _SMOOTHING_UPDATES, ignore_na=True).mean().to_numpy()
        even = np.unique(np.linspace(0, len(updates) - 1, min(len(updates), MAX_POINTS)).astype(int))
        loss.plot(updates[even], smoothed[even], color=BLUE, label="smoothed")
        numbers, validation = _column(epochs, "epoch"), _column(epochs, "val_loss")
        if epochs:
            ends = np.searchsorted(_column(steps, "epoch"), numbers, side="right")
            places = np.concatenate([[0], updates])[ends]
            loss.plot(places, validation, color=ORANGE, marker="s", linestyle="--", label="validation")
        loss.set(title="Loss, nats per token", xlabel="update", ylim=(0, _top_of_loss(losses, validation)))
        loss.margins(x=0.02)
        loss.legend(fontsize=8, frameon=False, loc="upper right")

        rates.set(title="Validation", xlabel="epoch")
        both = _validation_rates(epochs)
        if not np.isfinite([*both.values()]).any():
            show_note(rates, "after the first epoch")
        else:
            for (name, values), color, marker in zip(both.items(), (ORANGE, GREEN), "o^", strict=False):
                last = "".join(f" {value:.3f}" for value in values[np.isfinite(values)][-1:])
                rates.plot(numbers, values, color=color, marker=marker, label=f"{name}{last}")
            top = np.nanmax([*both.values()])
            rates.set(xlim=(numbers.min() - 0.5, numbers.max() + 0.5), ylim=(0, 1.35 * top or 1))
            rates.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)

        learning = _column(steps, "learning_rate")
        highest = float(np.max(learning, initial=0, where=np.isfinite(learning)))
        power = math.floor(math.log10(highest)) if highest else 0
        _draw_updates(speed, updates, learning / 10**power, color=GREY)
        speed.set(title=f"Learning rate, 1e{power}", xlabel="update", ylim=(0, None))
        speed.margins(x=0.02)

        texts = {
            "step": (1, "update {:,.0f}"),
            "epoch": (1, "epoch {:.3g}"),
            "samples_per_sec": (1, "{:.3g} clips/s"),
            "audio_sec_per_sec": (1, "{:.3g} s of audio/s"),
            "data_wait_share": (1, "waits for data {:.0%} of the time"),
            "gpu_memory_mb": (1000, "GPU {:.3g} GB"),
            "memory_mb": (1000, "memory {:.3g} GB"),
            "disk_free_mb": (1000, "{:.3g} GB of disk free"),
        }
        given = {key: steps[-1][key] for key in texts if steps[-1].get(key) is not None}
        status = "   ".join(texts[key][1].format(value / texts[key][0]) for key, value in given.items())
        figure.text(0.055, 0.94, status, color=GREY, fontsize=9)
    return figure


def _validation_rates(epochs: Sequence[Row]) -> dict[str, FloatArray]:
    """Return the headline of the epochs by its name, and the CER if that is another rate."""
    found = [headline(row, "val_") for row in epochs]
    name = found[-1].name if found else "WER"
    rates = {name: np.array([gap(each.rate if each.name == name else None) for each in found])}  # older rows: WER
    return {**rates, **({} if name == "CER" else {"CER": _column(epochs, "val_cer")})}


def _column(rows: Sequence[Row], key: str) -> FloatArray:
    return np.array([gap(row.get(key)) for row in rows])


def _top_of_loss(updates: FloatArray, *epochs: FloatArray) -> float:
    """Return the end of the loss axis: above every epoch, while a few spikes of updates may leave the figure."""
    finite = updates[np.isfinite(updates)]
    usual = min(1.6 * float(np.quantile(finite, 0.98)), finite.max()) if len(finite) else 0.0
    return 1.05 * max([usual, *(value for values in epochs for value in values if math.isfinite(value))]) or 1.0


def _draw_updates(axes: Axes, places: FloatArray, values: FloatArray, **style: Any) -> None:
    """Draw a curve through at most `MAX_POINTS` points: minimum and maximum of each stretch, so that spikes stay."""
    drawn = np.arange(len(values))
    if len(values) > MAX_POINTS:
        measured = pd.Series(values).dropna()
        stretches = measured.groupby(measured.index * (MAX_POINTS // 2) // len(values))
        drawn = np.unique([*stretches.idxmin(), *stretches.idxmax()]).astype(int)
    axes.plot(places[drawn], values[drawn], marker="." if len(drawn) == 1 else None, **style)
