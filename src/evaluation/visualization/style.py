"""Style of a run's figures: models, texts of any script, missing values and labels of points."""

from __future__ import annotations

import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from src.evaluation.metrics import FloatArray
from src.evaluation.report.run_files import STOCK
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE

MAIN_FONT = "DejaVu Sans"  # comes with matplotlib: Latin, Greek, Cyrillic, Hebrew and Arabic letters
FALLBACK_FONTS = (
    "Noto Sans CJK SC",  # `apt-get install fonts-noto-cjk`
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Arial Unicode MS",
)
MAX_CHARS = 24
_JOINS_LETTERS = matplotlib.__version_info__ >= (3, 11)  # it orders right-to-left text by itself
_LABEL_GAPS = (3.0, 16.0, 32.0, 50.0)  # points between a marker's edge and its label, the nearest first
_LABEL_ANGLES = np.deg2rad([0, 180, 90, 270, 35, -35, 145, -145])


@dataclass(frozen=True)
class ModelStyle:
    """Style of a model in figures: it differs from others by colour, and without colour by marker, line and hatch."""

    color: str
    marker: str
    line: str
    hatch: str


STOCK_STYLE = ModelStyle(GREY, "s", "--", "")
OTHER_STYLES = (
    ModelStyle(BLUE, "o", "-", "//"),
    ModelStyle(ORANGE, "^", "-.", ".."),
    ModelStyle(GREEN, "D", ":", "xx"),
)


def styles_of(names: Iterable[str]) -> dict[str, ModelStyle]:
    """Give each model a style; the stock model has the same one in every figure."""
    others = itertools.cycle(OTHER_STYLES)
    return {name: STOCK_STYLE if name == STOCK else next(others) for name in names}


def gap(value: Any) -> float:
    """Return nan for None: a missing value leaves a gap, never a zero."""
    return math.nan if value is None else float(value)


def mark_powers(axis: Axis) -> None:
    """Mark a logarithmic axis at 1, 2, 5, 10, ... with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def show_note(axes: Axes, text: str) -> None:
    """Write a text into a panel that has nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def figure_style(changes: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Return the context for figures with texts of the data: `FIGURE_STYLE`, fonts of many scripts, and changes."""
    return matplotlib.rc_context({**FIGURE_STYLE, "font.family": list(_fonts()), **(changes or {})})


def drawable(text: str, *, max_chars: int = MAX_CHARS) -> str:
    r"""Return a text that draws on one line, without a missing glyph and not as a formula.

    A character that no installed font has is written as its code, such as `\u4f60`, so that nothing disappears.

    Args:
        text: in any script.
        max_chars: a longer text loses its middle, since identifiers often differ at the end only.
    """
    line = " ".join(text.split())
    if len(line) > max_chars:
        tail = max_chars // 3
        line = f"{line[: max_chars - tail - 1].rstrip()}…{line[-tail:].lstrip()}"
    if not _JOINS_LETTERS:
        line = _in_visual_order(line)
    # two dollars would begin and end a formula
    return "".join(
        r"\$" if char == "$" else char if char.isprintable() and _has_glyph(char, _fonts())
        else char.encode("unicode_escape").decode()
        for char in line
    )  # fmt: skip


@functools.cache
def _fonts() -> tuple[str, ...]:
    installed = {font.name for font in fontManager.ttflist}
    return (MAIN_FONT, *(name for name in FALLBACK_FONTS if name in installed))


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str, fonts: tuple[str, ...]) -> bool:
    """Whether a font has it in both weights: titles are bold."""
    files = ([findfont(FontProperties(family=name, weight=each)) for each in ("normal", "bold")] for name in fonts)
    return any(all(get_font(file).get_char_index(ord(char)) for file in pair) for pair in files)


def _in_visual_order(line: str) -> str:
    """Reverse right-to-left words, since matplotlib before 3.11 draws every script from left to right.

    Arabic letters then stand in their order, though unjoined. A word with digits stays as it is.
    """
    parts: list[str] = []
    for reverse, words in itertools.groupby(line.split(" "), _is_right_to_left):
        parts += [_reverse(word) for word in reversed(list(words))] if reverse else words
    return " ".join(parts)


def _is_right_to_left(word: str) -> bool:
    kinds = {unicodedata.bidirectional(char) for char in word}
    return bool(kinds & {"R", "AL"}) and not kinds & {"L", "EN", "AN"}


def _reverse(word: str) -> str:
    """Reverse letters; a mark stays after the letter that carries it."""
    letters: list[str] = []
    for char in word:
        if letters and unicodedata.combining(char):
            letters[-1] += char
        else:
            letters.append(char)
    return "".join(reversed(letters))


def label_points(
    axes: Axes,
    points: FloatArray,
    labels: Sequence[str],
    radii: FloatArray,
    lines: FloatArray,
    texts: Sequence[Text] = (),
) -> None:
    """Put each label next to its point, at the nearest place where it covers least.

    Args:
        axes: with all else drawn.
        points: (n, 2) in data coordinates.
        labels: of the points.
        radii: (n,) of the markers, in points.
        lines: (m, 2, 2) both ends of lines that should stay visible, in data coordinates; nan for no line.
        texts: that should stay visible too.
    """
    figure, scale = axes.figure, axes.figure.dpi / 72  # pixels per point
    figure.draw_without_rendering()  # type: ignore[union-attr]  # solves the layout
    pixels, inside = axes.transData.transform(points), axes.get_window_extent()
    boxes = [text.get_window_extent() for text in texts]
    boxes += [Bbox([p - r * scale, p + r * scale]) for p, r in zip(pixels, radii, strict=True)]
    for ends in lines[np.isfinite(lines).all(axis=(1, 2))]:
        corners = axes.transData.transform(ends)
        boxes.append(Bbox([corners.min(axis=0) - scale, corners.max(axis=0) + scale]))
    directions = np.stack([np.cos(_LABEL_ANGLES), np.sin(_LABEL_ANGLES)], axis=1)
    for point, pixel, radius, label in zip(points, pixels, radii, labels, strict=True):
        text = axes.annotate(
            label, tuple(point), (0, 0), textcoords="offset points", ha="center", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        size = np.array(Text.get_window_extent(text).size)
        places = []
        for distance, way in itertools.product(_LABEL_GAPS, directions):
            center = pixel + way * ((radius + distance) * scale + size / 2)
            box = Bbox([center - size / 2, center + size / 2])
            outside = size.prod() - _overlap(box, inside)
            places.append((round(outside + sum(_overlap(box, other) for other in boxes)), distance, box))
        _, distance, box = min(places, key=lambda place: place[0])  # the first of the best is the nearest
        boxes.append(box)
        text.xyann = tuple((box.get_points().mean(axis=0) - pixel) / scale)
        text.set_in_layout(False)
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(distance > _LABEL_GAPS[0])  # too far to see whose label it is


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)
