"""One picture of the ways to run a model: clips in batches, as a stream, one by one; accuracy beside speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.data.report.findings import count_clips
from src.evaluation.report.summary import NOT_MEASURED, Row
from src.evaluation.visualization.style import gap
from src.evaluation.visualization.text import drawable, figure_style
from src.utils.figures import BLUE, GREY, ORANGE, NotebookFigure

MAX_ENGINES = 5


@dataclass(frozen=True)
class Mode:
    """A way to run a model.

    Attributes:
        name: for reading.
        wer, rtf: nan where they were not measured.
        note: beside the speed.
    """

    name: str
    wer: float
    rtf: float
    note: str = ""


def list_modes(evaluation: Row, streaming: Row | None, latencies: Sequence[Row]) -> list[Mode]:
    """Gather what was measured of each mode; the stream has the same clips in batches beside it.

    Args:
        evaluation: of the test set in batches.
        streaming: last streaming row of the run.
        latencies: as `latest_latencies` gives them; single pass are those with a batch of one.
    """
    modes = [Mode(f"batch, {count_clips(evaluation['n'])}", gap(evaluation.get("wer")), gap(evaluation.get("rtf")))]
    if streaming is None:
        modes.append(Mode("streaming", math.nan, math.nan))
    else:
        longest = streaming.get("longest_update_sec")
        note = "" if longest is None else f"longest update {longest:.2f} s"
        clips = count_clips(streaming["clips"])
        modes += [
            Mode(f"streaming, {clips}", gap(streaming.get("wer")), gap(streaming.get("rtf")), note),
            Mode(f"batch, the stream's {clips}", gap(streaming.get("offline_wer")), math.nan),
        ]
    single = [row for row in latencies if row["batch_size"] == 1]
    modes += [
        Mode(f"single pass, {drawable(str(row['engine']))}", gap(row.get("wer")), gap(row.get("rtf")))
        for row in single[:MAX_ENGINES]
    ]
    return modes if single else [*modes, Mode("single pass", math.nan, math.nan)]


def draw_modes(modes: Sequence[Mode], *, model: str) -> Figure:
    """Draw WER and real-time factor of each mode; what was not measured is blank and says so.

    Args:
        modes: as `list_modes` gives them.
        model: whose batches they are, for the caption; rows of streams and timings do not say.
    """
    with figure_style():
        figure = NotebookFigure(figsize=(10, min(4.0, 1.4 + 0.4 * len(modes))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_values(left, [mode.wer for mode in modes], ["" for _ in modes], BLUE)
        left.set(title="Accuracy", xlabel="WER")
        _draw_values(right, [mode.rtf for mode in modes], [mode.note for mode in modes], ORANGE)
        right.set(title="Speed", xlabel="real-time factor, computing time / audio time")
        left.set_yticks(range(len(modes)), [mode.name for mode in modes])
        left.set_ylim(len(modes) - 0.5, -0.5)
        said = f"batch: {drawable(model)} model; stream and single pass: as the run measured them last; less is better"
        figure.supxlabel(said, fontsize=8, color=GREY)
    return figure


def _draw_values(axes: Axes, values: Sequence[float], notes: Sequence[str], color: str) -> None:
    for place, (value, note) in enumerate(zip(values, notes, strict=True)):
        known = math.isfinite(value)
        if known:
            axes.barh(place, value, height=0.55, color=color)
        text = ", ".join(part for part in (f"{value:.3f}" if known else NOT_MEASURED, note) if part)
        axes.annotate(
            text, (value if known else 0, place), (4, 0), textcoords="offset points", va="center", fontsize=9,
            color="black" if known else GREY,
        )  # fmt: skip
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    axes.set_xlim(0, (2.1 if any(notes) else 1.2) * top or 1)
    axes.grid(axis="y", visible=False)
