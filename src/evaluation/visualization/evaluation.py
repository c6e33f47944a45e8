"""Figures of a run's evaluation, drawn from its files alone: error rates, slices and kinds of errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.evaluation.evaluator import Prediction, compare_predictions
from src.evaluation.metrics import PairedComparison
from src.evaluation.report.run_files import (
    STOCK,
    TUNED,
    PredictionsByModel,
    Row,
    bootstrap_of,
    last_row,
    latest_evaluations,
    load_metrics,
    load_predictions,
    stock_first,
)
from src.evaluation.report.summary import FEW_BLOCKS, NOT_MEASURED, counted, describe_interval, number
from src.evaluation.slices import DURATION_EDGES_SEC, UNKNOWN, Slice, slice_rates
from src.evaluation.text import align_words, sum_counts
from src.evaluation.visualization.speed import (
    draw_latency_distribution,
    draw_modes,
    draw_rtf_by_batch,
    latest_latencies,
)
from src.evaluation.visualization.style import ModelStyle, drawable, figure_style, gap, show_note, styles_of
from src.utils.errors import DataError, did_you_mean
from src.utils.figures import BLUE, GREEN, GREY, ORANGE, NotebookFigure

MAX_SLICES = 12  # one row each; more do not fit into four inches
MAX_TOP = 20  # words of a panel
UNITS = {"duration_sec": "s", "duration": "s", "age": "years", "snr_db": "dB"}
_CHARS_PER_PANEL = 36  # below the bars, on one line
_EDITS = ("substitutions", "deletions", "insertions")
_CLIP_RATES = {"loop_rate": "loops", "empty_rate": "empty outputs"}
_Rate = tuple[float, float, float]  # value, low and high; nan for what was not measured


class EvaluationVisualizer:
    """Comparisons of one run.

    Args:
        run_dir: with metrics.jsonl and predictions.jsonl.

    Raises:
        DataError: nothing was evaluated.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        rows = load_metrics(run_dir)
        self._evaluations = latest_evaluations(rows)
        if not self._evaluations:
            raise DataError(f"{run_dir}: nothing was evaluated yet; evaluate and save first")
        self._predictions = load_predictions(run_dir)
        self._latencies = latest_latencies(rows)
        self._streaming = last_row(rows, "streaming")

    def stock_against_tuned(self) -> Figure:
        """Draw WER with intervals under both normalisers, one bar per model, and the difference of the two models.

        Raises:
            DataError: the predictions of the two models are of different clips.
        """
        stock, tuned = (self._predictions.get(name, []) for name in (STOCK, TUNED))
        if not (stock and tuned and {STOCK, TUNED} <= set(self._evaluations)):
            return draw_comparison(self._evaluations)
        difference = compare_predictions(stock, tuned, bootstrap_of(self._evaluations[TUNED]))
        return draw_comparison(self._evaluations, difference)

    def wer_by_duration(self, edges_sec: Sequence[float] = DURATION_EDGES_SEC) -> Figure:
        """Draw WER (sum of errors over sum of words) with intervals by clip length; empty ranges are left out.

        Ranges instead of one point per clip: the rate of a clip of four words is 0, 1/4, 1/2, ..., and a cloud of these
        hides what the sums show.

        Args:
            edges_sec: ascending; a clip of exactly an upper edge belongs to the lower range.

        Raises:
            DataError: no predictions, or no clip within the edges.
        """
        slices = self._slices("duration_sec", edges_sec)
        within = {name: [each for each in found if each.value != UNKNOWN] for name, found in slices.items()}
        outside = max((each.n for found in slices.values() for each in found if each.value == UNKNOWN), default=0)
        if not any(within.values()):
            raise DataError(
                f"{self._run_dir}: no prediction of {edges_sec[0]:g} to {edges_sec[-1]:g} s; evaluate first"
            )
        omitted = f"{counted(outside, 'clip')} outside of these lengths" if outside else ""
        return draw_slices(within, self._evaluations, omitted=omitted)

    def wer_by_slice(self, column: str, *, edges: Sequence[float] | None = None) -> Figure:
        """Draw WER with intervals for each slice of a column, for each model.

        Args:
            column: one of `slice_columns`, or another one of the rows; of more than 12 slices the first are drawn.
            edges: as in `slice_rates`.

        Raises:
            DataError: no predictions, or no row has this column.
        """
        return draw_slices(self._slices(column, edges), self._evaluations)

    def error_types(self) -> Figure:
        """Draw substitutions, deletions and insertions as shares of the words, loops and empty outputs of the clips."""
        return draw_error_types(self._evaluations, self._predictions)

    def confusions(self, model: str = TUNED, *, top: int = 15) -> Figure:
        """Draw the words that a model most often confuses, leaves out and inserts.

        Args:
            model: by name.
            top: words of each kind, 1 to 20.

        Raises:
            DataError: no predictions of this model, or `top` is out of range.
        """
        row = self._evaluation_of(model)
        rows = self._predictions.get(model)
        if not rows:
            raise DataError(f"{self._run_dir}: no predictions of {model!r}; evaluate it and save")
        return draw_confusions(rows, row["normalizer"], model=model, top=top)

    def latency_distribution(self) -> Figure:
        """Draw how long clips take: each one's share of its batch, and median to 95th percentile of each engine.

        Raises:
            DataError: no time was measured.
        """
        return draw_latency_distribution(self._predictions, self._latencies)

    def rtf_by_batch(self) -> Figure:
        """Draw the real-time factor of each engine against its batch size.

        Raises:
            DataError: none was measured.
        """
        return draw_rtf_by_batch(self._latencies)

    def modes(self, model: str = TUNED) -> Figure:
        """Draw WER and real-time factor in batches, as a stream and clip by clip; blank if not measured.

        Args:
            model: whose evaluation is shown; the stream and the timings are those of the run.

        Raises:
            DataError: this model was not evaluated.
        """
        return draw_modes(self._evaluation_of(model), self._streaming, self._latencies, model=model)

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


def draw_comparison(evaluations: Mapping[str, Row], difference: PairedComparison | None = None) -> Figure:
    """Draw WER with intervals under both normalisers, one bar per model, the stock model first."""
    styles = styles_of(stock_first(evaluations))
    first = evaluations[next(iter(styles))]
    with figure_style():
        figure = NotebookFigure(figsize=(8, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in zip(panels, ("wer", "wer_plain"), (first["normalizer"], "plain-v1"), strict=True):
            _draw_bars(axes, [_rate_of(evaluations[name], key) for name in styles], styles)
            axes.set_title(title)
        panels[0].set_ylabel("WER, test set")
        caption = counted(first["n"], "clip")
        if first.get("wer_low") is not None:
            caption += f"; {first['confidence']:.0%} bootstrap intervals over {first['num_blocks']} {first['blocks']}s"
        if difference is not None:  # intervals may overlap although one model is better
            points = f"{100 * difference.difference:+.1f} points {describe_interval(difference)}"
            caption += f"\n{TUNED} against {STOCK}, clip by clip: {difference.verdict}; WER {points}"
        figure.supxlabel(caption, fontsize=8, color=GREY)
    return figure


def _draw_bars(axes: Axes, rates: Sequence[_Rate], styles: Mapping[str, ModelStyle]) -> None:
    for x, ((value, low, high), style) in enumerate(zip(rates, styles.values(), strict=True)):
        if not math.isfinite(value):
            axes.annotate(NOT_MEASURED, (x, 0), (0, 5), textcoords="offset points", ha="center", color=GREY)
            continue
        axes.bar(x, value, width=0.6, color=style.color)
        top = value
        if math.isfinite(low) and math.isfinite(high):
            axes.vlines(x, low, high, color="black", linewidth=1.5)
            axes.plot([x, x], [low, high], "_", color="black", markersize=12)
            top = max(value, high)
        axes.annotate(f"{value:.3f}", (x, top), (0, 5), textcoords="offset points", ha="center")
    labels = [drawable(name) for name in styles]
    crowded = len(labels) * max(map(len, labels)) > _CHARS_PER_PANEL
    axes.set_xticks(
        range(len(labels)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )  # fmt: skip
    axes.set_xlim(-0.6, len(styles) - 0.4)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


def draw_slices(slices: Mapping[str, Sequence[Slice]], evaluations: Mapping[str, Row], *, omitted: str = "") -> Figure:
    """Draw WER with intervals, one row per slice of a column, below the rate over all clips."""
    names = [name for name in stock_first(slices) if slices[name]]
    values = list(dict.fromkeys(each.value for name in names for each in slices[name]))
    if not values:
        raise DataError("draw_slices: no slice of any model; evaluate first")
    column, shown = slices[names[0]][0].column, values[:MAX_SLICES]
    found = {name: {each.value: each for each in slices[name]} for name in names}
    # clips and rate of each model, row by row
    rows = [
        (
            f"{drawable(value)} {UNITS[column]}" if column in UNITS and value != UNKNOWN else drawable(value),
            {name: (part.n, (part.wer, part.low, part.high)) for name in names if (part := found[name].get(value))},
        )
        for value in shown
    ]
    overall = {name: (int(row["n"]), _rate_of(row, "wer")) for name in names if (row := evaluations.get(name))}
    if overall:
        rows.insert(0, ("all", overall))
    notes = [f"{len(shown)} of {len(values)} slices are drawn" if len(values) > len(shown) else "", omitted]
    drawn = [part for each in found.values() for part in each.values() if part.value in shown]
    notes.append(_describe_intervals(drawn, [evaluations[name] for name in overall]))
    with figure_style():
        figure = NotebookFigure(figsize=(8, min(4.0, 1.5 + 0.4 * len(rows))), layout="constrained")
        axes = figure.subplots()
        _draw_rows(axes, rows, styles_of(names))
        if overall:
            axes.axhline(0.5, color=GREY, linewidth=0.8)
        axes.set_title("WER by clip length" if column == "duration_sec" else f"WER by {drawable(column)}")
        axes.set_xlabel("WER, test set")
        figure.supxlabel("\n".join(filter(None, notes)), fontsize=8, color=GREY)
    return figure


def _draw_rows(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, tuple[int, _Rate]]]], styles: Mapping[str, ModelStyle]
) -> None:
    missing = (0, (math.nan, math.nan, math.nan))
    for index, (name, style) in enumerate(styles.items()):
        # models side by side, so that intervals do not hide one another
        places = np.arange(len(rows)) + 0.5 / len(styles) * (index - (len(styles) - 1) / 2)
        value, low, high = np.array([rates.get(name, missing)[1] for _, rates in rows]).T
        axes.plot(
            value, places, style.marker, linestyle="none", color=style.color, markersize=6, label=drawable(name),
            clip_on=False,
        )  # fmt: skip
        axes.hlines(places, low, high, color=style.color, linewidth=1.5)
        for place in places[np.isnan(value)]:
            axes.annotate(
                NOT_MEASURED, (0, place), (4, 0), textcoords="offset points", va="center", color=GREY, fontsize=8
            )
    ticks = []
    for label, rates in rows:
        sizes = dict.fromkeys(rates.get(name, missing)[0] for name in styles)  # models may differ in their clips
        ticks.append(f"{label}, {' / '.join(f'{size:,}' for size in sizes)} clip{'s' * (list(sizes) != [1])}")
    axes.set_yticks(range(len(rows)), ticks)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _describe_intervals(slices: Sequence[Slice], evaluations: Sequence[Row]) -> str:
    """Return what the intervals are over, and whether some are too narrow; empty if there is none."""
    measured = [each for each in slices if math.isfinite(each.low)]
    if not measured:
        return ""
    confidences = {row["confidence"] for row in evaluations if "confidence" in row}
    share = f"{confidences.pop():.0%} " if len(confidences) == 1 else ""
    over = sorted({f"{each.blocks}s" for each in measured}, reverse=True)  # speakers, then clips
    text = f"{share}bootstrap intervals over {', or in a slice of one speaker over '.join(over)}"
    few = any(each.num_blocks < FEW_BLOCKS for each in measured)
    return f"{text}; too narrow where there are fewer than {FEW_BLOCKS}" if few else text


def _rate_of(row: Row, key: str) -> _Rate:
    return gap(row.get(key)), gap(row.get(f"{key}_low")), gap(row.get(f"{key}_high"))


def draw_error_types(evaluations: Mapping[str, Row], predictions: PredictionsByModel) -> Figure:
    """Draw the kinds of edits as shares of the reference's words, loops and empty outputs as shares of the clips."""
    styles = styles_of(stock_first(evaluations))
    edits = {name: _edit_shares(evaluations[name], predictions.get(name, ())) for name in styles}
    clip_rates = {name: [gap(evaluations[name].get(key)) for key in _CLIP_RATES] for name in styles}
    with figure_style():
        figure = NotebookFigure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_groups(left, _EDITS, edits, styles)
        left.set(title="Word errors", ylabel="share of the reference's words")
        _draw_groups(right, list(_CLIP_RATES.values()), clip_rates, styles)
        right.set(title="Clips that failed", ylabel="share of the clips")
        left.legend(frameon=False)
        figure.supxlabel(
            "the three shares of a model add up to its WER; the words of loops and empty outputs are counted on the "
            "left too", fontsize=8, color=GREY,
        )  # fmt: skip
    return figure


def _edit_shares(evaluation: Row, rows: Sequence[Prediction]) -> list[float]:
    totals = [evaluation.get(key) for key in (*_EDITS, "reference_words")]
    if None in totals:  # an older run logged no edits
        counts = sum_counts(rows)
        totals = [counts.substitutions, counts.deletions, counts.insertions, counts.reference_words]
    *edits, words = totals
    return [each / words if words else math.nan for each in edits]


def _draw_groups(
    axes: Axes, groups: Sequence[str], shares: Mapping[str, Sequence[float]], styles: Mapping[str, ModelStyle]
) -> None:
    width = 0.8 / len(styles)
    for index, (name, style) in enumerate(styles.items()):
        places = np.arange(len(groups)) + width * (index - (len(styles) - 1) / 2)
        total = sum(shares[name])
        rate = f", WER {total:.3f}" if math.isfinite(total) else ""
        axes.bar(
            places, shares[name], width=0.92 * width, color=style.color, hatch=style.hatch, edgecolor="white",
            linewidth=0, label=drawable(name) + rate,
        )  # fmt: skip
        for place, value in zip(places, shares[name], strict=True):
            known = math.isfinite(value)
            axes.annotate(
                number(value), (place, value if known else 0), (0, 4), textcoords="offset points", ha="center",
                fontsize=9 if len(styles) <= 2 else 7, color="black" if known else GREY,
                rotation=0 if known and len(styles) <= 4 else 90,
            )  # fmt: skip
    top = max((value for values in shares.values() for value in values if math.isfinite(value)), default=0.0)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.2 * top or 1)
    axes.grid(axis="x", visible=False)


def draw_confusions(rows: Sequence[Prediction], normalizer: str, *, model: str, top: int = 15) -> Figure:
    """Draw the most frequent substitutions, deletions and insertions; of equally frequent ones the first by letter."""
    if not 1 <= top <= MAX_TOP:
        raise DataError(f"top is {top}; a panel of confusions shows 1 to {MAX_TOP} words")
    found = count_confusions(rows, normalizer)
    most = max(min(top, len(counter)) for counter in found.values())
    with figure_style({"font.size": 9, "axes.titlesize": 10}):
        figure = NotebookFigure(figsize=(10, 4), layout="constrained")
        panels = zip(figure.subplots(1, 3), found.items(), (ORANGE, BLUE, GREEN), strict=True)
        for axes, (kind, counter), color in panels:
            axes.set_title(f"{kind.capitalize()}: {counter.total():,}")
            if not counter:
                show_note(axes, "none")
                continue
            shown = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:top]
            counts = [n for _, n in shown]
            bars = axes.barh(range(len(shown)), counts, height=0.6, color=color)
            axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
            axes.set_yticks(range(len(shown)), [" → ".join(map(drawable, words)) for words, _ in shown], fontsize=8)
            axes.set_ylim(most - 0.4, -0.6)  # bars as thick as in the other panels
            axes.set_xlim(0, 1.15 * max(counts))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(axis="y", visible=False)
            axes.set_xlabel(f"times; {len(shown)} of {len(counter):,} different")
        figure.suptitle(f"Most frequent word errors, {drawable(model)}", fontsize=9, color=GREY)
    return figure


def count_confusions(rows: Sequence[Prediction], normalizer: str) -> dict[str, Counter[tuple[str, ...]]]:
    """Count the word errors of rows in normalised words.

    Returns:
        Counts of "substitutions" by (word said, word written), "deletions" by (word said,) and "insertions" by
        (word written,).
    """
    found: dict[str, Counter[tuple[str, ...]]] = {kind: Counter() for kind in _EDITS}
    kinds: dict[Any, str] = {"substitute": "substitutions", "delete": "deletions", "insert": "insertions"}
    for row in rows:
        for step in align_words(row.reference, row.hypothesis, normalizer):
            if step.edit != "equal":
                words = tuple(word for word in (step.reference, step.hypothesis) if word is not None)
                found[kinds[step.edit]][words] += 1
    return found
