"""Figures of speed: latency of a clip, batch sizes and engines, ways to run a model, variants.

Timings are rows of metrics.jsonl with the event "latency", written by `LatencyResult.save`; any number may be None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.evaluation.metrics import FloatArray
from src.evaluation.report.run_files import PredictionsByModel, Row, stock_first
from src.evaluation.report.summary import NOT_MEASURED, counted, number
from src.evaluation.visualization.style import (
    OTHER_STYLES,
    drawable,
    figure_style,
    gap,
    label_points,
    mark_powers,
    show_note,
    styles_of,
)
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREY, ORANGE, NotebookFigure

HOW_TO_MEASURE = "measure with LatencyBenchmark\n(src/evaluation/latency.py) and save the results"
MAX_ROWS = 14  # engines and batch sizes below one another in four inches
MAX_ENGINES = 5
VARIANT_KEYS = ("rtfx", "wer", "size_mb")  # a variant without one of them has no place in the figure
LARGEST_AREA = 900.0  # square points


def latest_latencies(rows: Sequence[Row]) -> list[Row]:
    """Return the last "latency" row of each model, engine and batch size, ordered by these.

    `engine` of the returned rows names the model too.
    """
    named = [{**row, "engine": f"{row['name']}, {row['engine']}"} for row in rows if row["event"] == "latency"]
    latest = {(row["engine"], int(row["batch_size"])): row for row in named}
    return [latest[key] for key in sorted(latest)]


def draw_latency_distribution(predictions: PredictionsByModel, latencies: Sequence[Row]) -> Figure:
    """Draw how the clips' times in the evaluation are distributed, and median to 95th percentile of each engine."""
    times = {name: np.array([gap(row.latency_sec) for row in predictions[name]]) for name in stock_first(predictions)}
    times = {name: values[np.isfinite(values)] for name, values in times.items() if np.isfinite(values).any()}
    ranges = [row for row in latencies if math.isfinite(gap(row.get("p50_sec")))]
    if not times and not ranges:
        raise DataError(f"no latency to draw: evaluate a model, or {' '.join(HOW_TO_MEASURE.split())}")
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


def _draw_distribution(axes: Axes, times: Mapping[str, FloatArray]) -> None:
    if not times:
        show_note(axes, f"{NOT_MEASURED}:\nevaluate a model")
        return
    for name, style in styles_of(times).items():
        values = times[name]
        median, high = np.percentile(values, [50, 95])
        label = f"{drawable(name)}, {counted(len(values), 'clip')}: median {median:.3g} s, 95 % at most {high:.3g} s"
        axes.ecdf(values, color=style.color, linestyle=style.line, linewidth=2, label=label)
        axes.plot([median, high], [0.5, 0.95], style.marker, color=style.color, linestyle="none", clip_on=False)
    axes.set(xlabel="seconds per clip: its batch's time / clips in it", ylabel="share of the clips", ylim=(0, 1))
    axes.set_xlim(0, 1.05 * max(values.max() for values in times.values()))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_ranges(axes: Axes, rows: Sequence[Row]) -> None:
    if not rows:
        show_note(axes, f"{NOT_MEASURED}:\n{HOW_TO_MEASURE}")
        return
    for place, row in enumerate(rows):
        median, high = row["p50_sec"], gap(row.get("p95_sec"))
        axes.hlines(place, median, high, color=BLUE, linewidth=2)
        axes.plot(median, place, "o", color=BLUE)
        axes.plot(high, place, "|", color=BLUE, markersize=10, markeredgewidth=2)
        text, right = (f"{median:.3g} to {high:.3g}", high) if math.isfinite(high) else (f"{median:.3g}", median)
        axes.annotate(text, (right, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [f"{drawable(str(row['engine']))}, batch of {row['batch_size']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(max(row["p50_sec"], row.get("p95_sec") or 0.0) for row in rows))
    axes.set_xlabel("seconds")
    axes.grid(axis="y", visible=False)


def draw_rtf_by_batch(latencies: Sequence[Row]) -> Figure:
    """Draw the real-time factor (compute time / audio time; less is faster) of each engine against its batch size."""
    sizes = sorted({int(row["batch_size"]) for row in latencies if math.isfinite(gap(row.get("rtf")))})
    if not sizes:
        raise DataError(f"no real-time factor of any batch size: {' '.join(HOW_TO_MEASURE.split())}")
    engines = {engine: list(rows) for engine, rows in itertools.groupby(latencies, lambda row: str(row["engine"]))}
    with figure_style():
        figure = NotebookFigure(figsize=(8, 3.8), layout="constrained")
        axes = figure.subplots()
        for index, (engine, rows) in enumerate(engines.items()):
            style = OTHER_STYLES[index % len(OTHER_STYLES)]
            measured = {int(row["batch_size"]): gap(row.get("rtf")) for row in rows}
            values = [measured[size] for size in sizes if size in measured]
            places = [place for place, size in enumerate(sizes) if size in measured]
            axes.plot(places, values, style.line, marker=style.marker, color=style.color, label=drawable(engine))
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
        axes.set(title="Real-time factor", xlabel="clips in a batch", ylabel="computing time / audio time")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_modes(evaluation: Row, streaming: Row | None, latencies: Sequence[Row], *, model: str) -> Figure:
    """Draw WER and real-time factor in batches, as a stream and clip by clip; what was not measured is blank.

    The stream is followed by the same clips in batches; timings with a batch of one are the single passes.
    """
    clips = counted(evaluation["n"], "clip")
    modes = [(f"batch, {clips}", evaluation.get("wer"), evaluation.get("rtf"), "")]  # name, WER, RTF and a note
    if streaming is None:
        modes.append(("streaming", None, None, ""))
    else:
        longest, clips = streaming.get("longest_update_sec"), counted(streaming["clips"], "clip")
        note = "" if longest is None else f"longest update {longest:.2f} s"
        modes.append((f"streaming, {clips}", streaming.get("wer"), streaming.get("rtf"), note))
        modes.append((f"batch, the stream's {clips}", streaming.get("offline_wer"), None, ""))
    single = [row for row in latencies if row["batch_size"] == 1][:MAX_ENGINES]
    modes += [(f"single pass, {drawable(row['engine'])}", row.get("wer"), row.get("rtf"), "") for row in single]
    modes += [] if single else [("single pass", None, None, "")]
    names, wers, rtfs, notes = zip(*modes, strict=True)
    with figure_style():
        figure = NotebookFigure(figsize=(10, min(4.0, 1.4 + 0.4 * len(modes))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_values(left, wers, [""] * len(modes), BLUE)
        left.set(title="Accuracy", xlabel="WER")
        _draw_values(right, rtfs, notes, ORANGE)
        right.set(title="Speed", xlabel="real-time factor, computing time / audio time")
        left.set_yticks(range(len(modes)), names)
        left.set_ylim(len(modes) - 0.5, -0.5)
        caption = f"batch: {drawable(model)} model; stream and single pass: last measurement of the run; less is better"
        figure.supxlabel(caption, fontsize=8, color=GREY)
    return figure


def _draw_values(axes: Axes, values: Sequence[float | None], notes: Sequence[str], color: str) -> None:
    widths = np.nan_to_num([gap(value) for value in values])
    for place, (value, width, note) in enumerate(zip(values, widths, notes, strict=True)):
        if number(value) != NOT_MEASURED:
            axes.barh(place, width, height=0.55, color=color)
        axes.annotate(
            ", ".join(filter(None, (number(value), note))), (width, place), (4, 0), textcoords="offset points",
            va="center", fontsize=9, color=GREY if number(value) == NOT_MEASURED else "black",
        )  # fmt: skip
    axes.set_xlim(0, (2.1 if any(notes) else 1.2) * widths.max() or 1)
    axes.grid(axis="y", visible=False)


def variants_chart(rows: Sequence[Row]) -> Figure:
    """Draw WER with its interval against speed, the area of a marker as the size; good is below and right.

    Args:
        rows: with "name", "rtfx" (seconds of audio per second of computing), "wer", "wer_low", "wer_high" and
            "size_mb". One whose rtfx, wer or size is None is named below the figure; without bounds no interval is
            drawn.

    Raises:
        DataError: no row has all numbers, or a speed or size is not positive.
    """
    lacking = [[key for key in VARIANT_KEYS if not math.isfinite(gap(row.get(key)))] for row in rows]
    measured = [row for row, keys in zip(rows, lacking, strict=True) if not keys]
    if not measured:
        raise DataError("variants_chart: no variant has rtfx, wer and size_mb; measure at least one")
    wrong = [str(row["name"]) for row in measured if min(row["rtfx"], row["size_mb"]) <= 0]
    if wrong:
        raise DataError(f"variants_chart: rtfx and size_mb must be positive; they are not for {', '.join(wrong)}")
    x, y, size_mb, low, high = (
        np.array([gap(row.get(key)) for row in measured]) for key in (*VARIANT_KEYS, "wer_low", "wer_high")
    )
    areas = LARGEST_AREA * size_mb / size_mb.max()
    caption = ["area of a marker: size on disk; line: interval of the WER"]
    missing = [
        f"{drawable(str(row['name']))} ({', '.join(keys)})" for row, keys in zip(rows, lacking, strict=True) if keys
    ]
    caption += [f"{NOT_MEASURED}: {'; '.join(missing)}"] if missing else []
    with figure_style():
        figure = NotebookFigure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        axes.vlines(x, low, high, color=GREY, linewidth=1.2)
        axes.scatter(x, y, s=areas, color=BLUE, alpha=0.55, edgecolor=BLUE)
        axes.set_xscale("log")
        axes.set_xlim(x.min() / 1.6, x.max() * 2.2)  # to the right: room for labels
        axes.set_ylim(0, 1.2 * float(np.nanmax([y, high])) or 1)
        mark_powers(axes.xaxis)
        axes.set(title="Variants", xlabel="speed, seconds of audio per second of computing", ylabel="WER")
        figure.supxlabel("\n".join(caption), fontsize=8, color=GREY)
        label_points(
            axes,
            np.column_stack([x, y]),
            [f"{drawable(str(row['name']))}\n{row['size_mb']:,.0f} MB" for row in measured],
            np.sqrt(areas / math.pi),
            np.stack([np.column_stack([x, low]), np.column_stack([x, high])], axis=1),
        )
    return figure
