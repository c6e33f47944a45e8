"""Error rates as pictures: models side by side, over the whole test set and over parts of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.data.report.findings import count_clips
from src.evaluation.metrics import PairedComparison
from src.evaluation.report.forgetting import FEW_BLOCKS, describe_interval
from src.evaluation.report.summary import NOT_MEASURED, STOCK, TUNED, Row, stock_first
from src.evaluation.slices import UNKNOWN, Slice
from src.evaluation.visualization.style import Look, gap, looks_of
from src.evaluation.visualization.text import drawable, figure_style
from src.utils.errors import DataError
from src.utils.figures import GREY, NotebookFigure

MAX_SLICES = 12  # a row each; more do not fit into four inches
UNITS = {"duration_sec": "s", "duration": "s", "age": "years", "snr_db": "dB"}
NAMES = {"duration_sec": "clip length"}
ALL = "all"
_CHARS_A_PANEL = 36  # under the bars, on one line


@dataclass(frozen=True)
class _Rate:
    """One point with its interval; nan where there is none."""

    n: int
    value: float
    low: float
    high: float


_LabelledRates = tuple[str, list[_Rate | None]]  # of a slice, a rate a model


def draw_comparison(evaluations: Mapping[str, Row], difference: PairedComparison | None = None) -> Figure:
    """Draw WER with intervals under both normalisers, a bar a model, the stock model first.

    Args:
        evaluations: rows of metrics.jsonl by model, at least one.
        difference: of the tuned against the stock model; said below, as intervals of two models on the same clips may
            overlap although one of them is better.
    """
    names = stock_first(evaluations)
    first = evaluations[names[0]]
    panels = [("wer", str(first["normalizer"])), ("wer_plain", "plain-v1")]
    with figure_style():
        figure = NotebookFigure(figsize=(8, 3.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            _draw_bars(axes, [_rate_of(evaluations[name], key) for name in names], looks_of(names))
            axes.set_title(title)
        figure.axes[0].set_ylabel("WER, test set")
        caption = count_clips(first["n"])
        if first.get("wer_low") is not None:
            caption += f"; {first['confidence']:.0%} bootstrap intervals over {first['num_blocks']} {first['blocks']}s"
        if difference is not None:
            points = f"{100 * difference.difference:+.1f} points {describe_interval(difference)}"
            caption += f"\n{TUNED} against {STOCK}, clip by clip: {difference.verdict}; WER {points}"
        figure.supxlabel(caption, fontsize=8, color=GREY)
    return figure


def draw_slices(slices: Mapping[str, Sequence[Slice]], evaluations: Mapping[str, Row], *, omitted: str = "") -> Figure:
    """Draw WER with intervals for each slice of one column, a row a slice, below the rate over all clips.

    Args:
        slices: by model, of one column, as `slice_rates` gives them; the first 12 are drawn.
        evaluations: rows of metrics.jsonl by model, for the first row and the confidence.
        omitted: for the caption: what the caller left out.
    Raises: DataError: no slice.
    """
    names = [name for name in stock_first(slices) if slices[name]]
    values = list(dict.fromkeys(each.value for name in names for each in slices[name]))
    if not values:
        raise DataError("draw_slices: no slice of any model; evaluate first")
    column, shown = slices[names[0]][0].column, values[:MAX_SLICES]
    rates = {name: {each.value: _rate_of_slice(each) for each in slices[name]} for name in names}
    rows: list[_LabelledRates] = [
        (_label(column, value), [rates[name].get(value) for name in names]) for value in shown
    ]
    overall = {name: _rate_of(evaluations[name], "wer") for name in names if name in evaluations}
    if overall:
        rows.insert(0, (ALL, [overall.get(name) for name in names]))
    drawn = [each for name in names for each in slices[name] if each.value in shown]
    notes = [f"{len(shown)} of {len(values)} slices are drawn" if len(values) > len(shown) else "", omitted]
    notes.append(_describe_intervals(drawn, [evaluations[name] for name in overall]))
    with figure_style():
        figure = NotebookFigure(figsize=(8, min(4.0, 1.5 + 0.4 * len(rows))), layout="constrained")
        axes = figure.subplots()
        _draw_rows(axes, rows, looks_of(names), divide=bool(overall))
        axes.set_title(f"WER by {NAMES.get(column) or drawable(column)}")
        axes.set_xlabel("WER, test set")
        figure.supxlabel("\n".join(filter(None, notes)), fontsize=8, color=GREY)
    return figure


def _label(column: str, value: str) -> str:
    return f"{drawable(value)} {UNITS[column]}" if column in UNITS and value != UNKNOWN else drawable(value)


def _draw_rows(axes: Axes, rows: Sequence[_LabelledRates], looks: Mapping[str, Look], *, divide: bool) -> None:
    step = 0.5 / max(1, len(looks))  # models side by side, so that intervals do not hide one another
    for index, (name, look) in enumerate(looks.items()):
        places = [place + step * (index - (len(looks) - 1) / 2) for place in range(len(rows))]
        rates = [row[index] or _Rate(0, math.nan, math.nan, math.nan) for _, row in rows]
        axes.plot(
            [rate.value for rate in rates], places, look.marker, linestyle="none", color=look.color, markersize=6,
            label=drawable(name), clip_on=False,
        )  # fmt: skip
        axes.hlines(
            places, [rate.low for rate in rates], [rate.high for rate in rates], color=look.color, linewidth=1.5
        )
        for place, rate in zip(places, rates, strict=True):
            if not math.isfinite(rate.value):
                axes.annotate(
                    NOT_MEASURED, (0, place), (4, 0), textcoords="offset points", va="center", color=GREY, fontsize=8
                )
    if divide:
        axes.axhline(0.5, color=GREY, linewidth=0.8)
    ticks = [f"{label}, {_clips(row)}" for label, row in rows]
    axes.set_yticks(range(len(rows)), ticks)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _clips(rates: Iterable[_Rate | None]) -> str:
    """Return "12 clips", or "12 / 9 clips" where the models were measured on different ones."""
    sizes = list(dict.fromkeys(rate.n if rate else 0 for rate in rates))
    return count_clips(sizes[0]) if len(sizes) == 1 else f"{' / '.join(f'{size:,}' for size in sizes)} clips"


def _describe_intervals(slices: Sequence[Slice], evaluations: Sequence[Row]) -> str:
    """Say what the intervals are over, and where they promise too much; nothing where there is none."""
    measured = [each for each in slices if math.isfinite(each.low)]
    if not measured:
        return ""
    confidences = {row["confidence"] for row in evaluations if "confidence" in row}
    share = f"{confidences.pop():.0%} " if len(confidences) == 1 else ""
    over = sorted({f"{each.blocks}s" for each in measured}, reverse=True)  # speakers, then clips
    text = f"{share}bootstrap intervals over {', or in a slice of one speaker over '.join(over)}"
    few = any(each.num_blocks < FEW_BLOCKS for each in measured)
    return f"{text}; too narrow where there are fewer than {FEW_BLOCKS}" if few else text


def _draw_bars(axes: Axes, rates: Sequence[_Rate], looks: Mapping[str, Look]) -> None:
    for x, (rate, look) in enumerate(zip(rates, looks.values(), strict=True)):
        if not math.isfinite(rate.value):
            axes.annotate(NOT_MEASURED, (x, 0), (0, 5), textcoords="offset points", ha="center", color=GREY)
            continue
        axes.bar(x, rate.value, width=0.6, color=look.color)
        top = rate.value
        if math.isfinite(rate.low) and math.isfinite(rate.high):
            axes.vlines(x, rate.low, rate.high, color="black", linewidth=1.5)
            axes.plot([x, x], [rate.low, rate.high], "_", color="black", markersize=12)
            top = max(rate.value, rate.high)
        axes.annotate(f"{rate.value:.3f}", (x, top), (0, 5), textcoords="offset points", ha="center")
    labels = [drawable(name) for name in looks]
    crowded = len(labels) * max(map(len, labels)) > _CHARS_A_PANEL
    axes.set_xticks(
        range(len(labels)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )  # fmt: skip
    axes.set_xlim(-0.6, len(looks) - 0.4)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)


def _rate_of_slice(each: Slice) -> _Rate:
    return _Rate(each.n, each.wer, each.low, each.high)


def _rate_of(row: Row, key: str) -> _Rate:
    return _Rate(int(row["n"]), gap(row.get(key)), gap(row.get(f"{key}_low")), gap(row.get(f"{key}_high")))
