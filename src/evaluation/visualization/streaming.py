"""Figures of streaming: when each word came after it was said, and what a lower latency costs in accuracy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from src.evaluation.report.run_files import Row
from src.evaluation.report.summary import NOT_MEASURED
from src.evaluation.streaming import WordTiming
from src.evaluation.visualization.style import OTHER_STYLES, ModelStyle, drawable, figure_style, gap, label_points
from src.utils.errors import DataError
from src.utils.figures import GREY, NotebookFigure

MARKER_RADIUS = 3.5  # points
# more of Okabe and Ito's colours, since more systems than models are compared
SYSTEM_STYLES = (
    *OTHER_STYLES,
    ModelStyle("#CC79A7", "v", "--", ""),
    ModelStyle("#E69F00", "P", "-", ""),
    ModelStyle("#56B4E9", "X", "-.", ""),
)


def draw_emission(
    systems: Mapping[str, Sequence[WordTiming]], *, no_speech: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Draw for each word how long after its end it was committed, and how long after it was first shown.

    On the replay's clock if all systems have one, else in audio heard.

    Args:
        systems: words of each system on the same stream, from `time_words`.
        no_speech: stretches of the stream without speech, in seconds, to shade.

    Raises:
        DataError: no system has a word.
    """
    words = [word for timings in systems.values() for word in timings]
    if not words:
        raise DataError("draw_emission: no system committed a word right, so that there is no latency to draw")
    aware = all(word.commit_clock_sec is not None for word in words)
    with figure_style():
        figure = NotebookFigure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        for (name, timings), style in zip(systems.items(), itertools.cycle(SYSTEM_STYLES), strict=False):
            ends = [word.end_sec for word in timings]
            late = [gap(w.commit_clock_sec if aware else w.commit_audio_sec) - w.end_sec for w in timings]
            shown = [gap(w.shown_clock_sec if aware else w.shown_audio_sec) - w.end_sec for w in timings]
            medians = [f"{statistics.median(each):.2f} s" if each else NOT_MEASURED for each in (late, shown)]
            label = f"{drawable(name)}\n{medians[0]}, first shown {medians[1]}"
            size = 5.0 if len(timings) <= 300 else 3.0
            for values, hollow, text in ((shown, True, None), (late, False, label)):
                axes.plot(
                    ends, values, style.marker, linestyle="none", color=style.color, markersize=size, label=text,
                    markerfacecolor="none" if hollow else style.color, markeredgewidth=0.8 if hollow else 0,
                    alpha=0.5 if hollow else 0.8,
                )  # fmt: skip
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


def draw_tradeoff(rows: Sequence[Row], *, latency: str = "commit_aware_p50") -> Figure:
    """Draw WER against latency, one point per system or setting, with intervals; good is below and left.

    Args:
        rows: from `measure_stream`, with "name" for the label. Rows with the same "system" (by default the
            name) have one style and are joined by a line. A row that has a WER but not this latency does not stream:
            it is drawn across.
        latency: key of the rows without "_sec", for example "display_unaware_p95".

    Raises:
        DataError: no row has both numbers.
    """
    with_wer = [row for row in rows if math.isfinite(gap(row.get("wer")))]
    points = [row for row in with_wer if math.isfinite(gap(row.get(f"{latency}_sec")))]
    if not points:
        raise DataError(f"draw_tradeoff: no row has wer and {latency}_sec; measure_stream a replay first")
    across = [row for row in with_wer if row not in points]
    missing = [drawable(str(row["name"])) for row in rows if row not in with_wer]
    x_low, x, x_high = (
        np.array([gap(row.get(f"{latency}{end}_sec")) for row in points]) for end in ("_low", "", "_high")
    )
    y_low, y, y_high = (np.array([gap(row.get(key)) for row in points]) for key in ("wer_low", "wer", "wer_high"))
    systems = [str(row.get("system", row["name"])) for row in points]
    with figure_style():
        figure = NotebookFigure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for system, style in zip(dict.fromkeys(systems), itertools.cycle(SYSTEM_STYLES), strict=False):
            mine = [i for i in np.argsort(x) if systems[i] == system]
            axes.plot(x[mine], y[mine], style.line, color=style.color, linewidth=1, alpha=0.5)
            axes.plot(x[mine], y[mine], style.marker, color=style.color, markersize=2 * MARKER_RADIUS, linestyle="none")
            axes.hlines(y[mine], x_low[mine], x_high[mine], color=style.color, linewidth=1.2)
            axes.vlines(x[mine], y_low[mine], y_high[mine], color=style.color, linewidth=1.2)
        lowest, highest = np.nanmin([x_low, x]), np.nanmax([x, x_high])
        axes.set_xlim(min(0.0, 1.15 * lowest), 1.15 * highest)  # shown before its end: negative
        axes.set_ylim(0, 1.15 * max([np.nanmax([y, y_high]), *(row["wer"] for row in across)]) or 1)
        name, clock, statistic = latency.replace("end_of_turn", "end of turn").split("_")
        computing = "included" if clock == "aware" else "left out"
        axes.set(title="What a lower latency costs", ylabel="WER")
        axes.set_xlabel(f"{name} latency, {statistic}, computing {computing}, s")
        texts = []
        for row in across:
            axes.axhline(row["wer"], color=GREY, linestyle="--", linewidth=1, zorder=0)
            text = axes.annotate(
                drawable(str(row["name"])), (1, row["wer"]), (-2, 2), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", ha="right", va="bottom", fontsize=8, color=GREY,
            )  # fmt: skip
            texts.append(text)
        caption = "lines: bootstrap intervals over clips" + (
            f"; {NOT_MEASURED}: {', '.join(missing)}" if missing else ""
        )
        figure.supxlabel(caption, fontsize=8, color=GREY)
        intervals = [((x_low, y), (x_high, y)), ((x, y_low), (x, y_high))]  # across and up
        label_points(
            axes,
            np.column_stack([x, y]),
            [drawable(str(row["name"])) for row in points],
            np.full(len(points), MARKER_RADIUS),
            np.concatenate([np.stack([np.column_stack(end) for end in ends], axis=1) for ends in intervals]),
            texts,
        )
    return figure
