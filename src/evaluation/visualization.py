"""Pictures of a run, drawn from its files alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from src.evaluation.edits import error_rate
from src.evaluation.metrics import Bootstrap, rate_interval
from src.evaluation.report import (
    NOT_MEASURED,
    STOCK,
    TUNED,
    best_epoch,
    bootstrap_of,
    last_training,
    latest_evaluations,
    load_metrics,
    load_predictions,
    stock_first,
)
from src.evaluation.results import Prediction
from src.utils.errors import DataError
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure

MODEL_STYLES = ((GREY, "s"), (BLUE, "o"), (ORANGE, "^"), (GREEN, "D"))  # the stock model first


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
        places = self._step_positions()
        axes.plot(
            places, [_gap(row["loss"]) for row in self._steps],
            color=BLUE, alpha=0.3, linewidth=1, label="each update",
        )  # fmt: skip
        epochs = [row["epoch"] for row in self._epochs]
        axes.plot(epochs, self._series("train_loss"), color=BLUE, marker="o", label="train")
        axes.plot(epochs, self._series("val_loss"), color=ORANGE, marker="s", linestyle="--", label="validation")
        if self._best is not None:
            number = self._best["epoch"]
            axes.axvline(number, color=GREY, linestyle=":", label=f"best epoch by WER: {number}", zorder=0)
        axes.set(title="Loss", xlabel="epoch", ylabel="nats a token", xlim=(0, max([*epochs, *places]) + 0.1))
        axes.set_ylim(bottom=0)
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
            best = self._best["epoch"], _gap(self._best[f"val_{key}"])
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
        return [_gap(row.get(key)) for row in self._epochs]


class EvaluationVisualizer:
    """Comparisons of one run.

    Args:
        run_dir: with metrics.jsonl and predictions.jsonl.
    Raises: DataError: nothing was evaluated.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        self._evaluations = latest_evaluations(load_metrics(run_dir))
        if not self._evaluations:
            raise DataError(f"{run_dir}: nothing was evaluated yet; evaluate and save first")
        self._predictions = load_predictions(run_dir)

    def stock_against_tuned(self) -> Figure:
        """Draw WER with intervals under both normalisers, a bar a model, the stock model first."""
        names = stock_first(self._evaluations)
        first = self._evaluations[names[0]]
        panels = [("wer", str(first["normalizer"])), ("wer_plain", "plain-v1")]
        with matplotlib.rc_context(FIGURE_STYLE):
            figure = NotebookFigure(figsize=(8, 3.6), layout="constrained")
            for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
                self._draw_bars(axes, names, key)
                axes.set_title(title)
            figure.axes[0].set_ylabel("WER, test set")
            caption = f"{first['n']} clip{'s' * (first['n'] != 1)}"
            if first.get("wer_low") is not None:
                caption += (
                    f"; {first['confidence']:.0%} bootstrap intervals over {first['num_blocks']} {first['blocks']}s"
                )
            figure.supxlabel(caption, fontsize=9, color=GREY)
        return figure

    def wer_by_duration(self, edges_sec: Sequence[float] = (0, 2, 4, 6, 8, 12, 30)) -> Figure:
        """Draw WER (sum of errors over sum of words) with intervals against clip length; empty ranges are left out.

        Args:
            edges_sec: ascending; a clip of exactly an upper edge belongs to the lower range.
        Raises: DataError: no predictions, or no clip within the edges.
        """
        names = stock_first(self._predictions)
        clips = {row.id: row.duration_sec for name in names for row in self._predictions[name]}
        ranges = [(a, b, sum(a < d <= b for d in clips.values())) for a, b in itertools.pairwise(edges_sec)]
        ranges = [each for each in ranges if each[2]]
        if not ranges:
            raise DataError(
                f"{self._run_dir}: no prediction of {edges_sec[0]:g} to {edges_sec[-1]:g} s; evaluate first"
            )
        with matplotlib.rc_context(FIGURE_STYLE):
            figure = NotebookFigure(figsize=(8, 3.6), layout="constrained")
            axes = figure.subplots()
            for index, (name, (color, marker)) in enumerate(zip(names, itertools.cycle(MODEL_STYLES))):
                shift = 0.12 * (index - (len(names) - 1) / 2)  # side by side, so that intervals do not hide one another
                rates = [self._rate_between(name, low, high) for low, high, _ in ranges]
                values, lows, highs = (list(column) for column in zip(*rates, strict=True))
                places = [place + shift for place in range(len(ranges))]
                axes.plot(places, values, marker=marker, color=color, label=name)
                axes.vlines(places, lows, highs, color=color, linewidth=1.5)
            labels = [f"{a:g} to {b:g} s\n{n} clip{'s' * (n != 1)}" for a, b, n in ranges]
            axes.set_xticks(range(len(labels)), labels)
            axes.set(title="WER by clip length", ylabel="WER, test set", xlim=(-0.5, len(ranges) - 0.5))
            axes.set_ylim(bottom=0)
            axes.grid(axis="x", visible=False)
            axes.legend(frameon=False)
        return figure

    def _rate_between(self, name: str, low_sec: float, high_sec: float) -> tuple[float, float, float]:
        rows: list[Prediction] = [r for r in self._predictions[name] if low_sec < r.duration_sec <= high_sec]
        if not any(row.reference_words for row in rows):
            return math.nan, math.nan, math.nan
        counts = [row.counts for row in rows]
        evaluation = self._evaluations.get(name)
        bootstrap = Bootstrap() if evaluation is None else bootstrap_of(evaluation)
        return error_rate(counts), *rate_interval(counts, [row.speaker for row in rows], bootstrap)

    def _draw_bars(self, axes: Axes, names: Sequence[str], key: str) -> None:
        for x, (name, (color, _)) in enumerate(zip(names, itertools.cycle(MODEL_STYLES))):
            row = self._evaluations[name]
            value, low, high = (_gap(row.get(k)) for k in (key, f"{key}_low", f"{key}_high"))
            if not math.isfinite(value):
                axes.annotate(NOT_MEASURED, (x, 0), (0, 5), textcoords="offset points", ha="center", color=GREY)
                continue
            axes.bar(x, value, width=0.6, color=color)
            top = value
            if math.isfinite(low) and math.isfinite(high):
                axes.vlines(x, low, high, color="black", linewidth=1.5)
                axes.plot([x, x], [low, high], "_", color="black", markersize=12)
                top = max(value, high)
            axes.annotate(f"{value:.3f}", (x, top), (0, 5), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)


def _gap(value: Any) -> float:
    """A missing value leaves a gap, never a zero."""
    return math.nan if value is None else float(value)


def _change_row(label: str, before: float | None, after: float | None) -> list[str]:
    numbers = [_gap(before), _gap(after)]
    shown = [f"{number:.3f}" if math.isfinite(number) else NOT_MEASURED for number in numbers]
    change = 100 * (numbers[1] - numbers[0]) / numbers[0] if numbers[0] else math.nan
    return [label, *shown, f"{change:+.0f} %" if math.isfinite(change) else "-"]
