"""Speed as pictures: how long a clip takes, and what larger batches and other engines save.

Timings are rows of metrics.jsonl with the event "latency", as `LatencyResult.save` writes them; any figure may be None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.data.report.findings import count_clips
from src.evaluation.report.summary import NOT_MEASURED, PredictionsByModel, Row, stock_first
from src.evaluation.visualization.style import OTHER_LOOKS, gap, looks_of, mark_powers, say
from src.evaluation.visualization.text import drawable, figure_style
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREY, NotebookFigure

HOW_TO_MEASURE = "measure with LatencyBenchmark (src/evaluation/latency.py) and save the results"
MEDIAN_KEY, HIGH_KEY = "p50_sec", "p95_sec"  # of a row with the event "latency"
MAX_ROWS = 14  # engines and batch sizes under one another in four inches


def latest_latencies(rows: Sequence[Row]) -> list[Row]:
    """Return the last "latency" row of each model, engine and batch size, ordered by these.

    `engine` of the returned rows names the model too.
    """
    named = [{**row, "engine": f"{row['name']}, {row['engine']}"} for row in rows if row["event"] == "latency"]
    latest = {(row["engine"], int(row["batch_size"])): row for row in named}
    return [latest[key] for key in sorted(latest)]


def draw_latency_distribution(predictions: PredictionsByModel, latencies: Sequence[Row]) -> Figure:
    """Draw how the clips' times in the evaluation are distributed, and median to 95th percentile of each engine.

    Args:
        predictions: by model.
        latencies: as `latest_latencies` gives them.
    Raises: DataError: neither holds a time.
    """
    times = {
        name: [r.latency_sec for r in predictions[name] if math.isfinite(gap(r.latency_sec))] for name in predictions
    }
    times = {name: times[name] for name in stock_first(times) if times[name]}
    ranges = [row for row in latencies if math.isfinite(gap(row.get(MEDIAN_KEY)))]
    if not times and not ranges:
        raise DataError(f"no latency to draw: evaluate a model, or {HOW_TO_MEASURE}")
    with figure_style():
        figure = NotebookFigure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_distribution(left, times)
        left.set_title("In the evaluation's batches")
        _draw_ranges(right, ranges[:MAX_ROWS])
        right.set_title("By engine, median to 95th percentile")
        if len(ranges) > MAX_ROWS:
            figure.supxlabel(f"{MAX_ROWS} of {len(ranges)} timings are shown", fontsize=8, color=GREY)
    return figure


def draw_rtf_by_batch(latencies: Sequence[Row]) -> Figure:
    """Draw the real-time factor (compute time / audio time; less is faster) of each engine against its batch size.

    Args:
        latencies: as `latest_latencies` gives them.
    Raises: DataError: none of them has a real-time factor.
    """
    measured = [row for row in latencies if math.isfinite(gap(row.get("rtf")))]
    if not measured:
        raise DataError(f"no real-time factor of any batch size: {HOW_TO_MEASURE}")
    engines = {engine: list(rows) for engine, rows in itertools.groupby(latencies, lambda row: str(row["engine"]))}
    sizes = sorted({int(row["batch_size"]) for row in measured})
    with figure_style():
        figure = NotebookFigure(figsize=(8, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, (engine, rows) in enumerate(engines.items()):
            look = OTHER_LOOKS[index % len(OTHER_LOOKS)]
            places = [sizes.index(size) if (size := int(row["batch_size"])) in sizes else math.nan for row in rows]
            values = [gap(row.get("rtf")) for row in rows]
            axes.plot(places, values, look.line, marker=look.marker, color=look.color, label=drawable(engine))
            for place, value in zip(places, values, strict=True) if len(engines) <= 2 else ():
                if math.isfinite(value):
                    axes.annotate(
                        f"{value:.3g}", (place, value), (0, -13 if index else 7), textcoords="offset points",
                        ha="center", fontsize=8,
                    )  # fmt: skip
        axes.set_yscale("log")
        axes.margins(y=0.2)
        mark_powers(axes.yaxis)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set(title="Real-time factor", xlabel="clips in a batch", ylabel="seconds of computing a second of audio")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_distribution(axes: Axes, times: dict[str, list[float]]) -> None:
    if not times:
        say(axes, f"{NOT_MEASURED}:\nevaluate a model")
        return
    looks = looks_of(times)
    for name, values in times.items():
        median, high = np.percentile(values, [50, 95])
        label = f"{drawable(name)}, {count_clips(len(values))}: median {median:.3g} s, 95 % at most {high:.3g} s"
        look = looks[name]
        axes.ecdf(values, color=look.color, linestyle=look.line, linewidth=2, label=label)
        axes.plot([median, high], [0.5, 0.95], look.marker, color=look.color, linestyle="none", clip_on=False)
    axes.set(xlabel="seconds a clip: its batch's time / clips in it", ylabel="share of the clips", ylim=(0, 1))
    axes.set_xlim(0, 1.05 * max(max(values) for values in times.values()))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_ranges(axes: Axes, rows: Sequence[Row]) -> None:
    if not rows:
        say(axes, f"{NOT_MEASURED}:\n{HOW_TO_MEASURE.replace(' (', chr(10) + '(')}")
        return
    for place, row in enumerate(rows):
        median, high = gap(row.get(MEDIAN_KEY)), gap(row.get(HIGH_KEY))
        axes.hlines(place, median, high, color=BLUE, linewidth=2)
        axes.plot(median, place, "o", color=BLUE)
        axes.plot(high, place, "|", color=BLUE, markersize=10, markeredgewidth=2)
        text = f"{median:.3g} to {high:.3g}" if math.isfinite(high) else f"{median:.3g}"
        right = high if math.isfinite(high) else median
        axes.annotate(text, (right, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(
        range(len(rows)), [f"{drawable(str(r['engine']))}, batch of {r['batch_size']}" for r in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    highest = max(max(gap(r.get(MEDIAN_KEY)), r.get(HIGH_KEY) or 0.0) for r in rows)
    axes.set_xlim(0, 1.3 * highest)
    axes.set_xlabel("seconds")
    axes.grid(axis="y", visible=False)
