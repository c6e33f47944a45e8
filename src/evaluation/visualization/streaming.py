"""Two pictures of streaming: when each word came after it was said, and what a lower latency costs in accuracy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from src.evaluation.metrics import FloatArray
from src.evaluation.report.summary import NOT_MEASURED, Row
from src.evaluation.visualization.style import OTHER_LOOKS, Look, gap
from src.evaluation.visualization.text import drawable, figure_style
from src.evaluation.visualization.variants import place_label
from src.evaluation.word_timing import WordTiming
from src.utils.errors import DataError
from src.utils.figures import GREY, NotebookFigure

MARKER_RADIUS = 3.5  # points
# more of Okabe and Ito's colours: systems are compared, of which there are more than models
LOOKS = (*OTHER_LOOKS, Look("#CC79A7", "v", "--", ""), Look("#E69F00", "P", "-", ""), Look("#56B4E9", "X", "-.", ""))


def draw_emission(
    systems: Mapping[str, Sequence[WordTiming]], *, no_speech: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Draw for each word how long after its end it was committed, and how long after it was first shown.

    On the replay's clock where all systems have one, else in audio heard.

    Args:
        systems: the words of each system on the same stream, as `time_words` gives them.
        no_speech: stretches of the stream without speech, in seconds, to shade.
    Raises: DataError: no system has a word.
    """
    words = [word for timings in systems.values() for word in timings]
    if not words:
        raise DataError("draw_emission: no system committed a word right, so that there is no latency to draw")
    aware = all(word.commit_clock_sec is not None for word in words)
    with figure_style():
        figure = NotebookFigure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        for (name, timings), look in zip(systems.items(), itertools.cycle(LOOKS), strict=False):
            _draw_words(axes, name, timings, look, aware=aware)
        axes.axhline(0, color="black", linewidth=0.8)
        for begin, end in no_speech:
            axes.axvspan(begin, end, color=GREY, alpha=0.15, linewidth=0)
        axes.set(title="When words come", xlabel="end of the word, s", ylabel="seconds after the word was said")
        axes.margins(x=0.01)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        notes = ["full: committed, hollow: first shown; in the legend: medians"]
        notes.append("on the clock of a live listener" if aware else "in audio heard, without the computing")
        notes += ["shaded: nothing is said"] if no_speech else []
        figure.supxlabel("; ".join(notes), fontsize=8, color=GREY)
    return figure


def _draw_words(axes: Axes, name: str, words: Sequence[WordTiming], look: Look, *, aware: bool) -> None:
    ends = [word.end_sec for word in words]
    committed = [gap(word.commit_clock_sec if aware else word.commit_audio_sec) - word.end_sec for word in words]
    shown = [gap(word.shown_clock_sec if aware else word.shown_audio_sec) - word.end_sec for word in words]
    style: dict[str, Any] = {"linestyle": "none", "color": look.color, "markersize": 5.0 if len(words) <= 300 else 3.0}
    medians = [f"{statistics.median(late):.2f} s" if late else NOT_MEASURED for late in (committed, shown)]
    axes.plot(ends, shown, look.marker, **style, markerfacecolor="none", markeredgewidth=0.8, alpha=0.5)
    axes.plot(
        ends, committed, look.marker, **style, markeredgewidth=0, alpha=0.8,
        label=f"{drawable(name)}\n{medians[0]}, first shown {medians[1]}",
    )  # fmt: skip


def draw_tradeoff(rows: Sequence[Row], *, latency: str = "commit_aware_p50") -> Figure:
    """Draw WER against latency, a point a system or setting, with intervals; good is below and left.

    Args:
        rows: as `StreamingMetrics.to_row` gives them, with "name" for the label. Rows with the same "system" (the name
            where there is none) look alike and are joined by a line. A row that has a WER but not this latency does
            not stream: it is drawn across.
        latency: which one, as in the rows' keys, without "_sec": "display_unaware_p95", for example.
    Raises: DataError: no row has both figures.
    """
    points = [
        row for row in rows if math.isfinite(gap(row.get("wer"))) and math.isfinite(gap(row.get(f"{latency}_sec")))
    ]
    if not points:
        raise DataError(f"draw_tradeoff: no row has wer and {latency}_sec; measure_stream a replay first")
    across = [row for row in rows if row not in points and math.isfinite(gap(row.get("wer")))]
    x = _spans(points, [f"{latency}{end}_sec" for end in ("_low", "", "_high")])  # (n, 3)
    y = _spans(points, ["wer_low", "wer", "wer_high"])
    with figure_style():
        figure = NotebookFigure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        _draw_systems(axes, [str(row.get("system", row["name"])) for row in points], x, y)
        axes.set_xlim(
            min(0.0, 1.15 * float(np.nanmin(x))), 1.15 * float(np.nanmax(x))
        )  # shown before its end: negative
        axes.set_ylim(0, 1.15 * max([float(np.nanmax(y)), *(row["wer"] for row in across)]) or 1)
        axes.set(title="What a lower latency costs", xlabel=_describe(latency), ylabel="WER")
        taken = [_draw_across(axes, row) for row in across]
        figure.supxlabel(_caption(rows, [*points, *across]), fontsize=8, color=GREY)
        figure.draw_without_rendering()  # a solved layout: where the points are
        _label_points(axes, [str(row["name"]) for row in points], x, y, [text.get_window_extent() for text in taken])
    return figure


def _spans(rows: Sequence[Row], keys: Sequence[str]) -> FloatArray:
    """Return low, value and high of each row, (n, 3); nan where there is none."""
    return np.array([[gap(row.get(key)) for key in keys] for row in rows])


def _draw_systems(axes: Axes, systems: Sequence[str], x: FloatArray, y: FloatArray) -> None:
    for system, look in zip(dict.fromkeys(systems), itertools.cycle(LOOKS), strict=False):
        mine = [i for i in np.argsort(x[:, 1]) if systems[i] == system]
        axes.plot(x[mine, 1], y[mine, 1], look.line, color=look.color, linewidth=1, alpha=0.5)
        axes.plot(x[mine, 1], y[mine, 1], look.marker, color=look.color, markersize=7, linestyle="none")
        axes.hlines(y[mine, 1], x[mine, 0], x[mine, 2], color=look.color, linewidth=1.2)
        axes.vlines(x[mine, 1], y[mine, 0], y[mine, 2], color=look.color, linewidth=1.2)


def _draw_across(axes: Axes, row: Row) -> Text:
    axes.axhline(row["wer"], color=GREY, linestyle="--", linewidth=1, zorder=0)
    return axes.annotate(
        drawable(str(row["name"])), (1, row["wer"]), (-2, 2), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right", va="bottom", fontsize=8, color=GREY,
    )  # fmt: skip


def _label_points(axes: Axes, names: Sequence[str], x: FloatArray, y: FloatArray, taken: list[Bbox]) -> None:
    """Put each name beside its point, where it covers no other point, interval or name."""
    scale = axes.figure.dpi / 72  # pixels a point
    pixels = axes.transData.transform(np.column_stack([x[:, 1], y[:, 1]]))  # (n, 2)
    for low, high in ((x[:, [0, 2]], y[:, [1, 1]]), (x[:, [1, 1]], y[:, [0, 2]])):  # across, and up
        for (x0, x1), (y0, y1) in zip(low, high, strict=True):
            if math.isfinite(x0 + x1 + y0 + y1):
                corners = axes.transData.transform([(x0, y0), (x1, y1)])
                taken.append(Bbox([corners[0] - scale, corners[1] + scale]))
    taken += [Bbox([pixel - MARKER_RADIUS * scale, pixel + MARKER_RADIUS * scale]) for pixel in pixels]
    for name, pixel, point in zip(names, pixels, np.column_stack([x[:, 1], y[:, 1]]), strict=True):
        text = axes.annotate(
            drawable(name), tuple(point), (0, 0), textcoords="offset points", ha="center", va="center", fontsize=8
        )
        extent = text.get_window_extent()
        _, box = place_label(
            pixel, MARKER_RADIUS * scale, (extent.width, extent.height), taken, axes.get_window_extent(), scale
        )
        taken.append(box)
        text.xyann = tuple((np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2 - pixel) / scale)
        text.set_in_layout(False)


def _caption(rows: Sequence[Row], drawn: Sequence[Row]) -> str:
    missing = [drawable(str(row["name"])) for row in rows if row not in drawn]
    return "; ".join(
        ["lines: bootstrap intervals over clips", *([f"{NOT_MEASURED}: {', '.join(missing)}"] if missing else [])]
    )


def _describe(latency: str) -> str:
    """Return "commit latency, p50, computing included, s" for "commit_aware_p50"."""
    name, axis, statistic = latency.replace("end_of_turn", "end of turn").split("_")
    return f"{name} latency, {statistic}, computing {'included' if axis == 'aware' else 'left out'}, s"
