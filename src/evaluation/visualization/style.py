"""What the pictures of a run have in common: how a model looks, and how a missing figure is shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from src.evaluation.report.summary import STOCK
from src.utils.figures import BLUE, GREEN, GREY, ORANGE


@dataclass(frozen=True)
class Look:
    """How a model is told from the others: by colour, and without it by marker, line and hatch."""

    color: str
    marker: str
    line: str
    hatch: str


STOCK_LOOK = Look(GREY, "s", "--", "")
OTHER_LOOKS = (Look(BLUE, "o", "-", "//"), Look(ORANGE, "^", "-.", ".."), Look(GREEN, "D", ":", "xx"))


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """Give each name a look; the stock model has its own in every picture."""
    others = itertools.cycle(OTHER_LOOKS)
    return {name: STOCK_LOOK if name == STOCK else next(others) for name in names}


def gap(value: Any) -> float:
    """Return nan for None: a missing value leaves a gap, never a zero."""
    return math.nan if value is None else float(value)


def mark_powers(axis: Axis) -> None:
    """Mark a logarithmic axis at 1, 2, 5, 10, ... with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def say(axes: Axes, text: str) -> None:
    """Write a text where a panel has nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])
