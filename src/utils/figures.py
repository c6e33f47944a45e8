"""Style of all figures, and their display in a notebook and on the disk.

Okabe-Ito colours (safe for colour-blind readers) on an opaque white background, so that figures look the same in light
and dark notebooks. Only figure objects are used: no pyplot, no global state.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from src.utils.files import atomic_file

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
FIGURE_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor", "legend.facecolor"), "white"),
    **dict.fromkeys(  # a user's dark style would make them white on white
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), "black"
    ),
    "svg.hashsalt": "whisper",  # the same figure gives the same file
}


class NotebookFigure(Figure):
    """A figure that a notebook displays: without pyplot, it shows a plain `Figure` as its name only."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(FIGURE_STYLE):
            self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def save_figure(
    figure: Figure, folder: str | Path, name: str, *, vectors: Literal["svg", "pdf"] = "svg"
) -> tuple[Path, Path]:
    """Write PNG (150 dpi) and SVG or PDF, each whole or not at all; return both paths."""
    png, drawn = Path(folder, f"{name}.png"), Path(folder, f"{name}.{vectors}")
    undated = {"Date" if vectors == "svg" else "CreationDate": None}
    with matplotlib.rc_context(FIGURE_STYLE):
        with atomic_file(png) as file:
            figure.savefig(file, format="png", dpi=150)
        with atomic_file(drawn) as file:
            figure.savefig(file, format=vectors, metadata=undated)
    return png, drawn
