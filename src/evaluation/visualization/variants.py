"""Variants of a model (sizes, precisions, engines) in one picture: how accurate, how fast, how large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from src.evaluation.metrics import FloatArray
from src.evaluation.report.summary import NOT_MEASURED, Row
from src.evaluation.visualization.style import gap, mark_powers
from src.evaluation.visualization.text import drawable, figure_style
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREY, NotebookFigure

FIGURES = ("rtfx", "wer", "size_mb")  # a variant without one of them has no place in the picture
LARGEST_AREA = 900.0  # square points
_GAPS = (3.0, 16.0, 32.0, 50.0)  # points between a marker's edge and its label, the nearest first
_DIRECTIONS = [(math.cos(a), math.sin(a)) for a in np.deg2rad([0, 180, 90, 270, 35, -35, 145, -145])]


def variants_chart(rows: Sequence[Row]) -> Figure:
    """Draw WER with its interval against speed, the area of a marker as the size; good is below and right.

    Args:
        rows: with "name", "rtfx" (seconds of audio a second of computing), "wer", "wer_low", "wer_high" and "size_mb".
            One whose rtfx, wer or size is None is named below the picture; without an interval none is drawn.
    Raises: DataError: no row has all figures, or a speed or size is not positive.
    """
    measured = [row for row in rows if all(math.isfinite(gap(row.get(key))) for key in FIGURES)]
    if not measured:
        raise DataError("variants_chart: no variant has rtfx, wer and size_mb; measure at least one")
    wrong = [str(row["name"]) for row in measured if min(row["rtfx"], row["size_mb"]) <= 0]
    if wrong:
        raise DataError(f"variants_chart: rtfx and size_mb must be positive; they are not for {', '.join(wrong)}")
    x, y, size_mb = (np.array([float(row[key]) for row in measured]) for key in FIGURES)
    areas = LARGEST_AREA * size_mb / size_mb.max()
    with figure_style():
        figure = NotebookFigure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        lows, highs = (np.array([gap(row.get(f"wer_{end}")) for row in measured]) for end in ("low", "high"))
        axes.vlines(x, lows, highs, color=GREY, linewidth=1.2)
        axes.scatter(x, y, s=areas, color=BLUE, alpha=0.55, edgecolor=BLUE)
        _set_axes(axes, x, np.nanmax([y, highs], axis=0))
        caption = ["area of a marker: size on disk; line: interval of the WER", *_missing(rows)]
        figure.supxlabel("\n".join(caption), fontsize=8, color=GREY)
        labels = [f"{drawable(str(row['name']))}\n{row['size_mb']:,.0f} MB" for row in measured]
        intervals = np.column_stack([lows, highs])
        _label_points(figure, axes, np.column_stack([x, y]), intervals, np.sqrt(areas / math.pi), labels)
    return figure


def _set_axes(axes: Axes, x: FloatArray, tops: FloatArray) -> None:
    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.6, x.max() * 2.2)  # to the right: room for labels
    axes.set_ylim(0, 1.2 * float(tops.max()) or 1)
    mark_powers(axes.xaxis)
    axes.set(title="Variants", xlabel="speed, seconds of audio a second of computing", ylabel="WER")


def _missing(rows: Sequence[Row]) -> list[str]:
    """Name the variants that have no place in the picture, with what they lack."""
    lacking = {str(row["name"]): [key for key in FIGURES if not math.isfinite(gap(row.get(key)))] for row in rows}
    named = [f"{drawable(name)} ({', '.join(keys)})" for name, keys in lacking.items() if keys]
    return [f"{NOT_MEASURED}: " + "; ".join(named)] if named else []


def _label_points(
    figure: Figure, axes: Axes, points: FloatArray, intervals: FloatArray, radii: FloatArray, labels: Sequence[str]
) -> None:
    """Put each label beside its marker, the nearest place where it covers no marker, interval or other label.

    Args:
        points: (n, 2) in data coordinates.
        intervals: (n, 2) their lows and highs; nan where there is none.
        radii: (n,) of the markers, in points.
    """
    figure.draw_without_rendering()  # a solved layout: where the points are
    per_point = figure.dpi / 72  # pixels
    pixels = axes.transData.transform(points)  # (n, 2)
    taken = [Bbox.from_extents(*(p - r * per_point), *(p + r * per_point)) for p, r in zip(pixels, radii, strict=True)]
    for (x, _), ends in zip(points, intervals, strict=True):
        if np.isfinite(ends).all():
            (left, low), (right, high) = axes.transData.transform([(x, ends[0]), (x, ends[1])])
            taken.append(Bbox.from_extents(left - per_point, low, right + per_point, high))
    inside = axes.get_window_extent()
    for point, pixel, radius, text in zip(points, pixels, radii, labels, strict=True):
        style: dict[str, Any] = {"fontsize": 8, "ha": "center", "va": "center", "textcoords": "offset points"}
        trial = axes.annotate(text, (point[0], point[1]), (0, 0), **style)
        extent = trial.get_window_extent()
        trial.remove()
        distance, box = place_label(pixel, radius * per_point, (extent.width, extent.height), taken, inside, per_point)
        taken.append(box)
        offset = (np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2 - pixel) / per_point
        if distance > _GAPS[0]:  # too far to be told whose it is
            style["arrowprops"] = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(text, (point[0], point[1]), (offset[0], offset[1]), **style).set_in_layout(False)


def place_label(
    center: FloatArray, radius: float, size: tuple[float, float], taken: Sequence[Bbox], inside: Bbox, scale: float
) -> tuple[float, Bbox]:
    """Find the place around a marker where a label overlaps least, the nearest of equals.

    Args:
        center: (2,) of the marker; as `radius`, `size` (width, height), `taken` and `inside` in pixels.
        taken: what the label should not cover.
        inside: what it should not leave.
        scale: pixels a point.
    Returns: distance from the marker's edge in points, and the label's box.
    """
    width, height = size
    best: tuple[float, float, Bbox] | None = None
    for distance in _GAPS:
        for dx, dy in _DIRECTIONS:
            x = center[0] + dx * (radius + distance * scale + width / 2)
            y = center[1] + dy * (radius + distance * scale + height / 2)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            cost = sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, inside)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, distance, box)
    assert best is not None  # there are places to try
    return best[1], best[2]


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)
