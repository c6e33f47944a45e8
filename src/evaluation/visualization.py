"""Pictures of a run, drawn from its files alone.

Okabe-Ito colours (safe for colour-blind readers) on an opaque white ground, so that they read the same in light and
dark notebooks. Only figure objects are used: no global state, nothing at import.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.evaluation.report import NOT_MEASURED, load_metrics, load_predictions
from src.utils.errors import DataError

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "whisper",  # the same picture gives the same file
}


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write PNG (150 dpi) and SVG; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=150)
    figure.savefig(svg, metadata={"Date": None})
    return png, svg


class TrainingVisualizer:
    """Curves of one run.

    Args:
        run_dir: with metrics.jsonl.
    Raises: DataError: no metrics, or no finished epoch.
    """

    def __init__(self, run_dir: str | Path) -> None:
        rows = load_metrics(Path(run_dir))
        self._steps = [row for row in rows if row["event"] == "train_step"]
        self._epochs = [row for row in rows if row["event"] == "epoch"]
        self._evaluations = {row["name"]: row for row in rows if row["event"] == "evaluation"}
        if not self._epochs:
            raise DataError(f"{run_dir}: no finished epoch yet; train first")

    def training_analysis(self) -> Figure:
        """Draw loss with the best epoch marked, WER, CER, and a table with relative changes."""
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(10, 7), layout="constrained")
            axes = figure.subplots(2, 2)
            self._draw_loss(axes[0, 0])
            self._draw_rate(axes[0, 1], "wer", "Word error rate", ORANGE)
            self._draw_rate(axes[1, 0], "cer", "Character error rate", GREEN)
            self._draw_summary(axes[1, 1])
        return figure

    @property
    def _best(self) -> Mapping[str, Any]:
        return [row for row in self._epochs if row["is_best"]][-1]

    def _draw_loss(self, axes: Axes) -> None:
        per_epoch = len(self._steps) / len(self._epochs) if self._steps else 1
        axes.plot(
            [row["step"] / per_epoch for row in self._steps],
            [_gap(row["loss"]) for row in self._steps],
            color=BLUE, alpha=0.3, linewidth=1, label="each update",
        )  # fmt: skip
        epochs = [row["epoch"] for row in self._epochs]
        axes.plot(epochs, self._series("train_loss"), color=BLUE, marker="o", label="train")
        axes.plot(epochs, self._series("val_loss"), color=ORANGE, marker="s", label="validation")
        axes.axvline(self._best["epoch"], color=GREY, linestyle=":", label=f"best epoch by WER: {self._best['epoch']}")
        axes.set(title="Loss", xlabel="epoch", ylabel="nats a token", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)

    def _draw_rate(self, axes: Axes, key: str, title: str, color: str) -> None:
        epochs = [row["epoch"] for row in self._epochs]
        values = self._series(f"val_{key}")
        axes.plot(epochs, values, color=color, marker="o", label="validation")
        axes.plot(self._best["epoch"], _gap(self._best[f"val_{key}"]), "*", color="black", markersize=13, label="best")
        for epoch, value in zip(epochs, values, strict=True):
            axes.annotate(f"{value:.3f}", (epoch, value), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        top = max((v for v in values if math.isfinite(v)), default=1.0)
        axes.set(title=title, xlabel="epoch", ylabel=key.upper(), ylim=(0, 1.25 * top or 1))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9, loc="lower left")

    def _draw_summary(self, axes: Axes) -> None:
        stock, tuned = self._evaluations.get("stock"), self._evaluations.get("tuned")
        if stock and tuned:
            head, rows = ("test set", "stock", "tuned", "change"), [
                _change_row(label, stock.get(key), tuned.get(key))
                for label, key in (("WER", "wer"), ("WER plain", "wer_plain"), ("CER", "cer"), ("RTF", "rtf"))
            ]  # fmt: skip
        else:
            first, best = self._epochs[0], self._best
            head, rows = ("validation", "epoch 1", f"epoch {best['epoch']}", "change"), [
                _change_row(label, first.get(key), best.get(key))
                for label, key in (("loss", "val_loss"), ("WER", "val_wer"), ("CER", "val_cer"))
            ]  # fmt: skip
        axes.axis("off")
        axes.set_title("Summary")
        table = axes.table(cellText=rows, colLabels=head, loc="upper center", cellLoc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(10)
        table.scale(1, 1.7)
        speeds = [row["samples_per_sec"] for row in self._steps if row.get("samples_per_sec")]
        note = f"{len(self._steps)} updates, {len(self._epochs)} epoch(s)"
        if speeds:
            note += f", median {sorted(speeds)[len(speeds) // 2]:.1f} clips/s"
        axes.text(0.5, 0.05, note, ha="center", color=GREY, transform=axes.transAxes)

    def _series(self, key: str) -> list[float]:
        return [_gap(row.get(key)) for row in self._epochs]


class EvaluationVisualizer:
    """Comparisons of one run.

    Args:
        run_dir: with metrics.jsonl and predictions.jsonl.
    Raises: DataError: nothing was evaluated.
    """

    def __init__(self, run_dir: str | Path) -> None:
        rows = [row for row in load_metrics(Path(run_dir)) if row["event"] == "evaluation"]
        if not rows:
            raise DataError(f"{run_dir}: nothing was evaluated yet; evaluate and save first")
        self._evaluations = {row["name"]: row for row in rows}
        self._predictions = load_predictions(Path(run_dir))

    def stock_against_tuned(self) -> Figure:
        """Draw WER with intervals under both normalisers, a bar a model, the stock model first."""
        names = sorted(self._evaluations, key=lambda name: (name != "stock", name))
        first = self._evaluations[names[0]]
        panels = [("wer", str(first["normalizer"])), ("wer_plain", "plain-v1")]
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(8, 3.6), layout="constrained")
            for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
                self._draw_bars(axes, names, key)
                axes.set_title(title)
            figure.axes[0].set_ylabel("WER on the test set")
            figure.supxlabel(
                f"{first['n']} clips; bars: {first['confidence']:.0%} bootstrap intervals over "
                f"{first['num_blocks']} {first['blocks']}s",
                fontsize=9, color=GREY,
            )  # fmt: skip
        return figure

    def wer_by_duration(self, edges_sec: Sequence[float] = (0, 2, 4, 6, 8, 12, 30)) -> Figure:
        """Draw WER (sum of errors over sum of words) against clip length, with the number of clips in each range."""
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(8, 3.6), layout="constrained")
            axes = figure.subplots()
            colors = dict(zip(sorted(self._predictions), (BLUE, ORANGE, GREEN, GREY), strict=False))
            counts: list[int] = []
            for name, rows in sorted(self._predictions.items()):
                rates = []
                counts = []
                for low, high in itertools.pairwise(edges_sec):
                    chosen = [r for r in rows if low <= r.duration_sec < high]
                    words = sum(r.reference_words for r in chosen)
                    errors = sum(r.substitutions + r.deletions + r.insertions for r in chosen)
                    rates.append(errors / words if words else math.nan)
                    counts.append(len(chosen))
                axes.plot(range(len(rates)), rates, marker="o", color=colors[name], label=name)
            labels = [
                f"{low:g} to {high:g} s\n{count} clips"
                for low, high, count in zip(edges_sec, edges_sec[1:], counts, strict=False)
            ]
            axes.set_xticks(range(len(labels)), labels)
            axes.set(title="WER by clip length", ylabel="WER", ylim=(0, None))
            axes.legend(frameon=False)
        return figure

    def _draw_bars(self, axes: Axes, names: Sequence[str], key: str) -> None:
        for x, name in enumerate(names):
            row = self._evaluations[name]
            value, low, high = (_gap(row.get(k)) for k in (key, f"{key}_low", f"{key}_high"))
            axes.bar(x, value, width=0.6, color=GREY if name == "stock" else BLUE)
            if math.isfinite(low):
                axes.errorbar(x, value, yerr=[[value - low], [high - value]], color="black", capsize=6)
            top = high if math.isfinite(high) else value
            axes.annotate(f"{value:.3f}", (x, top), (0, 5), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)


def _gap(value: Any) -> float:
    """A missing value leaves a gap, never a zero."""
    return math.nan if value is None else float(value)


def _change_row(label: str, before: float | None, after: float | None) -> tuple[str, str, str, str]:
    if before is None or after is None:
        shown = [NOT_MEASURED if value is None else f"{value:.3f}" for value in (before, after)]
        return label, shown[0], shown[1], "-"
    change = f"{100 * (after - before) / before:+.0f} %" if before else "-"
    return label, f"{before:.3f}", f"{after:.3f}", change
