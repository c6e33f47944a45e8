"""Figures of speed and what it costs in accuracy, for streams and for variants of a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from src.data.report.findings import NOT_MEASURED
from src.evaluation.report.run_files import Row
from src.evaluation.report.summary import headline
from src.evaluation.streaming import WordTiming
from src.evaluation.visualization.style import drawable, gap, mark_powers, new_figure
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREEN, ORANGE

_LARGEST_MARKER = 30.0  # points
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "loc": "upper left", "bbox_to_anchor": (1, 1)}


def draw_emission(systems: Mapping[str, Sequence[WordTiming]]) -> Figure:
    """Draw for each word how long after its end it was committed, and how long after it was first shown.

    The words of each system are those of `time_words` on one stream; on the replay's clock if all systems have one,
    else in audio heard.
    """
    words = [word for timings in systems.values() for word in timings]
    if not words:
        raise DataError("draw_emission: no system committed a word right, so that there is no latency to draw")
    clock = "clock" if all(word.commit_clock_sec is not None for word in words) else "audio"
    caption = f"full: committed, hollow: first shown; medians in the legend; on the {clock} of a live listener"
    with new_figure(10, 4, caption) as figure:
        axes = figure.subplots()
        for (name, timings), (color, marker) in zip(systems.items(), _styles(), strict=False):
            ends = [word.end_sec for word in timings]
            late, shown = (
                [gap(getattr(word, f"{moment}_{clock}_sec")) - word.end_sec for word in timings]
                for moment in ("commit", "shown")
            )
            medians = [f"{statistics.median(each):.2f} s" if each else NOT_MEASURED for each in (late, shown)]
            label = f"{drawable(name)}\n{medians[0]}, first shown {medians[1]}"
            axes.plot(ends, shown, marker, color=color, markersize=4, alpha=0.5, markerfacecolor="none")
            axes.plot(ends, late, marker, color=color, markersize=4, alpha=0.8, markeredgewidth=0, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title="When words come", xlabel="end of the word, s", ylabel="seconds after the word was said")
        axes.margins(x=0.01)
        axes.legend(**_LEGEND)
    return figure


def draw_tradeoff(rows: Sequence[Row]) -> Figure:
    """Draw the headline against the median latency of commits, computing included, with intervals; good is below left.

    The rows are from `measure_stream`, with "name" for the label.
    """
    return _draw_points(rows, "commit_aware_p50{}_sec", "What a lower latency costs", "median latency of commits, s")


def variants_chart(rows: Sequence[Row]) -> Figure:
    """Draw the headline with its interval against speed, the area of a marker as the size; good is below and right.

    The rows have "name", "rtfx" (seconds of audio per second of computing), "size_mb", and "metric", "rate", "low" and
    "high", or "wer", "wer_low" and "wer_high". One without rtfx, rate or size is named below the figure.
    """
    return _draw_points(rows, "rtfx{}", "Variants", "speed, seconds of audio per second of computing", "size_mb")


def _draw_points(rows: Sequence[Row], x_key: str, title: str, x_label: str, size_key: str | None = None) -> Figure:
    rates = [headline(row) for row in rows]
    lacking = []
    for row, rate in zip(rows, rates, strict=True):
        needed = {x_key.format(""): row.get(x_key.format("")), rate.key: rate.rate}
        needed |= {size_key: row.get(size_key)} if size_key else {}
        lacking.append([key for key, value in needed.items() if not math.isfinite(gap(value))])
    measured = [(row, rate) for row, rate, keys in zip(rows, rates, lacking, strict=True) if not keys]
    if not measured:
        raise DataError(
            f"{title}: no row has {x_key.format('')}, an error rate{' and a size' * bool(size_key)}; measure one"
        )
    names = {rate.name for _, rate in measured}
    missing = [f"{drawable(row['name'])} ({', '.join(keys)})" for row, keys in zip(rows, lacking, strict=True) if keys]
    caption = "lines: bootstrap intervals" + "; area of a marker: size on disk" * bool(size_key)
    caption += f"; {NOT_MEASURED}: {', '.join(missing)}" if missing else ""
    with new_figure(9, 4, caption) as figure:
        axes = figure.subplots()
        largest = max(row[size_key] for row, _ in measured) if size_key else 1.0
        for (row, rate), (color, marker) in zip(measured, _styles(), strict=False):
            low, x, high = (gap(row.get(x_key.format(end))) for end in ("_low", "", "_high"))
            axes.hlines(gap(rate.rate), low, high, color=color, linewidth=1.2)
            axes.vlines(x, gap(rate.low), gap(rate.high), color=color, linewidth=1.2)
            size = _LARGEST_MARKER * math.sqrt(row[size_key] / largest) if size_key else 7
            axes.plot(x, gap(rate.rate), marker, color=color, alpha=0.55, markersize=size)
            label = drawable(row["name"]) + f", {rate.name}" * (len(names) > 1)
            label += f", {row[size_key]:,.0f} MB" if size_key else ""
            axes.plot([], [], marker, color=color, alpha=0.55, markersize=7, label=label)
        if size_key:
            axes.set_xscale("log")
            mark_powers(axes.xaxis)
        axes.set(title=title, xlabel=x_label, ylabel=names.pop() if len(names) == 1 else "error rate")
        axes.set_ylim(bottom=0)
        axes.legend(**_LEGEND)
    return figure


def _styles() -> Iterator[tuple[str, str]]:
    """Give colours and markers; five of Okabe and Ito's colours and six markers make 30 pairs."""
    return zip(cycle((BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00")), cycle("o^DvPX"), strict=False)
