"""Pictures of a run, drawn from its files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from src.data.report.findings import count_clips
from src.evaluation.report.summary import (
    NOT_MEASURED,
    STOCK,
    TUNED,
    Row,
    best_epoch,
    bootstrap_of,
    last_training,
    latest_evaluations,
    load_metrics,
    load_predictions,
)
from src.evaluation.results import compare_predictions
from src.evaluation.slices import DURATION_EDGES_SEC, UNKNOWN, Slice, slice_rates
from src.evaluation.visualization.errors import count_confusions, draw_confusions, draw_error_types
from src.evaluation.visualization.modes import draw_modes, list_modes
from src.evaluation.visualization.rates import draw_comparison, draw_slices
from src.evaluation.visualization.speed import draw_latency_distribution, draw_rtf_by_batch, latest_latencies
from src.evaluation.visualization.style import gap
from src.evaluation.visualization.training import thin_places
from src.utils.errors import DataError, did_you_mean
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure


class TrainingVisualizer:
    """Curves of the last training of a run.

    Args:
        run_dir: with metrics.jsonl.
    Raises: DataError: no metrics, or no finished epoch.
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
        places, losses = self._step_positions(), [gap(row["loss"]) for row in self._steps]
        drawn = thin_places(losses)  # a long training has more updates than pixels
        axes.plot(
            [places[i] for i in drawn], [losses[i] for i in drawn],
            color=BLUE, alpha=0.3, linewidth=1, label="each update",
        )  # fmt: skip
        epochs = [row["epoch"] for row in self._epochs]
        train, validation = self._series("train_loss"), self._series("val_loss")
        axes.plot(epochs, train, color=BLUE, marker="o", label="train, mean of the epoch")
        axes.plot(epochs, validation, color=ORANGE, marker="s", linestyle="--", label="validation")
        if self._best is not None:
            number = self._best["epoch"]
            axes.axvline(number, color=GREY, linestyle=":", label=f"best epoch by WER: {number}", zorder=0)
        axes.set(title="Loss", xlabel="epoch", ylabel="nats a token", xlim=(0, max([*epochs, *places]) + 0.1))
        axes.set_ylim(0, _top([*train, *validation], losses))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9, framealpha=0.9, edgecolor="none")

    def _step_positions(self) -> list[float]:
        """Place updates evenly within their epoch; the one that is not finished yet by the longest epoch so far."""
        groups = [list(rows) for _, rows in itertools.groupby(self._steps, lambda row: math.ceil(row["epoch"]))]
        longest = max((len(rows) for rows in groups), default=1)
        return [
            math.ceil(row["epoch"]) - 1 + (index + 1) / longest for rows in groups for index, row in enumerate(rows)
        ]

    def _draw_rate(self, axes: Axes, key: str, title: str, color: str) -> None:
        epochs = [row["epoch"] for row in self._epochs]
        values = self._series(f"val_{key}")
        measured = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
        axes.plot(epochs, values, color=color, marker="o")
        if self._best is not None:
            best = self._best["epoch"], gap(self._best[f"val_{key}"])
            axes.plot(*best, "*", color="black", markersize=13, linestyle="none", label="best epoch by WER")
            axes.legend(frameon=False, fontsize=9, loc="lower left")
        for epoch, value in measured if len(measured) <= 12 else ():
            axes.annotate(f"{value:.3f}", (epoch, value), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        if not measured:
            axes.text(0.5, 0.5, NOT_MEASURED, ha="center", color=GREY, transform=axes.transAxes)
        top = max((value for _, value in measured), default=0.0)
        axes.set(title=title, xlabel="epoch", ylabel=f"{key.upper()}, validation", ylim=(0, 1.25 * top or 1))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def _draw_summary(self, axes: Axes) -> None:
        first, best = self._epochs[0], self._best or self._epochs[-1]
        names = (("loss", "val_loss"), ("WER", "val_wer"), ("CER", "val_cer"))
        cells = [["validation", f"epoch {first['epoch']}", f"epoch {best['epoch']}", "change"]]
        cells += [_change_row(label, first.get(key), best.get(key)) for label, key in names]
        if best is first:
            cells = [[*row[:2], "", ""] for row in cells]
        heads = [0]
        stock, tuned = self._evaluations.get(STOCK), self._evaluations.get(TUNED)
        if stock and tuned:
            names = (("WER", "wer"), ("WER plain", "wer_plain"), ("CER", "cer"))
            heads.append(len(cells))
            cells.append(["test set", STOCK, TUNED, "change"])
            cells += [_change_row(label, stock.get(key), tuned.get(key)) for label, key in names]
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
        axes.text(0.5, 0.9 - height, self._note(), ha="center", color=GREY, fontsize=9, transform=axes.transAxes)

    def _note(self) -> str:
        speeds = sorted(row["samples_per_sec"] for row in self._steps if row.get("samples_per_sec"))
        speed = f", median {speeds[len(speeds) // 2]:.1f} clips/s" if speeds else ""
        return f"{len(self._steps)} updates, {len(self._epochs)} epoch{'s' * (len(self._epochs) != 1)}{speed}"

    def _series(self, key: str) -> list[float]:
        return [gap(row.get(key)) for row in self._epochs]


class EvaluationVisualizer:
    """Comparisons of one run.

    Args:
        run_dir: with metrics.jsonl and predictions.jsonl.
    Raises: DataError: nothing was evaluated.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        rows = load_metrics(run_dir)
        self._evaluations = latest_evaluations(rows)
        if not self._evaluations:
            raise DataError(f"{run_dir}: nothing was evaluated yet; evaluate and save first")
        self._predictions = load_predictions(run_dir)
        self._latencies = latest_latencies(rows)
        self._streaming = next((row for row in reversed(rows) if row["event"] == "streaming"), None)

    def stock_against_tuned(self) -> Figure:
        """Draw WER with intervals under both normalisers, a bar a model, the stock model first; and what differs.

        Raises: DataError: the predictions of the two models are of different clips.
        """
        stock, tuned = (self._predictions.get(name, []) for name in (STOCK, TUNED))
        if not (stock and tuned and {STOCK, TUNED} <= set(self._evaluations)):
            return draw_comparison(self._evaluations)
        difference = compare_predictions(stock, tuned, bootstrap_of(self._evaluations[TUNED]))
        return draw_comparison(self._evaluations, difference)

    def wer_by_duration(self, edges_sec: Sequence[float] = DURATION_EDGES_SEC) -> Figure:
        """Draw WER (sum of errors over sum of words) with intervals by clip length; empty ranges are left out.

        Ranges rather than a point a clip: the rate of one clip of four words is 0, 1/4, 1/2, ..., and a cloud of these
        hides what the sums show.

        Args:
            edges_sec: ascending; a clip of exactly an upper edge belongs to the lower range.
        Raises: DataError: no predictions, or no clip within the edges.
        """
        slices = self._slices("duration_sec", edges_sec)
        within = {name: [each for each in found if each.value != UNKNOWN] for name, found in slices.items()}
        outside = max((each.n for found in slices.values() for each in found if each.value == UNKNOWN), default=0)
        if not any(within.values()):
            raise DataError(
                f"{self._run_dir}: no prediction of {edges_sec[0]:g} to {edges_sec[-1]:g} s; evaluate first"
            )
        omitted = f"{count_clips(outside)} outside of these lengths" if outside else ""
        return draw_slices(within, self._evaluations, omitted=omitted)

    def wer_by_slice(self, column: str, *, edges: Sequence[float] | None = None) -> Figure:
        """Draw WER with intervals for each slice of a column, the models side by side.

        Args:
            column: one of `slice_columns`, or another of the rows; of more than 12 slices the first are drawn.
            edges: as in `slice_rates`.
        Raises: DataError: no predictions, or no row has this column.
        """
        return draw_slices(self._slices(column, edges), self._evaluations)

    def error_types(self) -> Figure:
        """Draw substitutions, deletions and insertions as shares of the words, loops and empty outputs of the clips."""
        return draw_error_types(self._evaluations, self._predictions)

    def confusions(self, model: str = TUNED, *, top: int = 15) -> Figure:
        """Draw the words that a model most often confuses, leaves out and puts in.

        Args:
            top: of each kind, 1 to 20.
        Raises: DataError: no predictions of this model, or `top` is out of range.
        """
        row = self._evaluation_of(model)
        rows = self._predictions.get(model)
        if not rows:
            raise DataError(f"{self._run_dir}: no predictions of {model!r}; evaluate it and save")
        return draw_confusions(count_confusions(rows, row["normalizer"]), model=model, top=top)

    def latency_distribution(self) -> Figure:
        """Draw how long clips take: each one's share of its batch, and median to 95th percentile of each engine.

        Raises: DataError: no time was measured.
        """
        return draw_latency_distribution(self._predictions, self._latencies)

    def rtf_by_batch(self) -> Figure:
        """Draw the real-time factor of each engine against its batch size.

        Raises: DataError: none was measured.
        """
        return draw_rtf_by_batch(self._latencies)

    def modes(self, model: str = TUNED) -> Figure:
        """Draw WER and real-time factor in batches, as a stream and clip by clip; blank where not measured.

        Args:
            model: whose evaluation is shown; the stream and the timings are those of the run.
        Raises: DataError: this model was not evaluated.
        """
        return draw_modes(list_modes(self._evaluation_of(model), self._streaming, self._latencies), model=model)

    def _evaluation_of(self, model: str) -> Row:
        if model not in self._evaluations:
            known = list(self._evaluations)
            raise DataError(
                f"{self._run_dir}: no evaluation of {model!r}{did_you_mean(model, known)}; there are {', '.join(known)}"
            )
        return self._evaluations[model]

    def _slices(self, column: str, edges: Sequence[float] | None) -> dict[str, list[Slice]]:
        if not self._predictions:
            raise DataError(f"{self._run_dir}: no predictions; evaluate a model and save")
        return {
            name: slice_rates(rows, column, edges=edges, bootstrap=bootstrap_of(self._evaluations.get(name, {})))
            for name, rows in self._predictions.items()
        }


def _top(epochs: Sequence[float], updates: Sequence[float]) -> float:
    """Return where the axis of the loss ends: above every epoch, while a few spikes of updates may run out of it."""
    finite = [value for value in updates if math.isfinite(value)]
    usual = 1.6 * float(np.quantile(finite, 0.98)) if finite else 0.0
    highest = max(
        (value for value in [*epochs, min(usual, max(finite, default=0.0))] if math.isfinite(value)), default=0.0
    )
    return 1.05 * highest or 1.0


def _change_row(label: str, before: float | None, after: float | None) -> list[str]:
    numbers = [gap(before), gap(after)]
    shown = [f"{number:.3f}" if math.isfinite(number) else NOT_MEASURED for number in numbers]
    change = 100 * (numbers[1] - numbers[0]) / numbers[0] if numbers[0] else math.nan
    return [label, *shown, f"{change:+.0f} %" if math.isfinite(change) else "-"]
