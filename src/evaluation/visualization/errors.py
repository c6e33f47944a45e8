"""Kinds of errors as pictures: what share of the words is wrong in which way, and which words it befalls most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.evaluation.edits import EditCounts, align_words, sum_counts
from src.evaluation.report.summary import NOT_MEASURED, PredictionsByModel, Row, stock_first
from src.evaluation.results import Prediction
from src.evaluation.visualization.style import Look, gap, looks_of, say
from src.evaluation.visualization.text import drawable, figure_style
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREEN, GREY, ORANGE, NotebookFigure

MAX_TOP = 20  # words under one another in four inches
_KINDS = ("substitutions", "deletions", "insertions")
_ROW_RATES = {"loop_rate": "loops", "empty_rate": "empty outputs"}


@dataclass(frozen=True)
class Confusions:
    """How often each word error occurs, in normalised words.

    Attributes:
        substitutions: by (word said, word written).
        deletions: by word said.
        insertions: by word written.
    """

    substitutions: Counter[tuple[str, str]]
    deletions: Counter[str]
    insertions: Counter[str]


def count_confusions(rows: Sequence[Prediction], normalizer: str) -> Confusions:
    """Count the word errors of rows.

    Args:
        normalizer: by name, that of the evaluation.
    Raises: DataError: an unknown normaliser.
    """
    found = Confusions(Counter(), Counter(), Counter())
    for row in rows:
        for step in align_words(row.reference, row.hypothesis, normalizer):
            if step.reference is not None and step.hypothesis is not None:
                if step.edit == "substitute":
                    found.substitutions[step.reference, step.hypothesis] += 1
            elif step.reference is not None:
                found.deletions[step.reference] += 1
            elif step.hypothesis is not None:
                found.insertions[step.hypothesis] += 1
    return found


def draw_confusions(confusions: Confusions, *, model: str, top: int = 15) -> Figure:
    """Draw the most frequent substitutions, deletions and insertions; of equally frequent ones the first by letter.

    Args:
        model: for the title.
        top: words a panel, 1 to 20.
    Raises: DataError: `top` is out of range.
    """
    if not 1 <= top <= MAX_TOP:
        raise DataError(f"top is {top}; a panel of confusions shows 1 to {MAX_TOP} words")
    pairs = [(f"{drawable(a)} → {drawable(b)}", n) for (a, b), n in _most_frequent(confusions.substitutions, top)]
    deleted = [(drawable(word), n) for word, n in _most_frequent(confusions.deletions, top)]
    inserted = [(drawable(word), n) for word, n in _most_frequent(confusions.insertions, top)]
    panels: list[tuple[list[tuple[str, int]], Counter[Any], str]] = [
        (pairs, confusions.substitutions, ORANGE),
        (deleted, confusions.deletions, BLUE),
        (inserted, confusions.insertions, GREEN),
    ]
    most = max(len(shown) for shown, _, _ in panels)
    with figure_style({"font.size": 9, "axes.titlesize": 10}):
        figure = NotebookFigure(figsize=(10, 4), layout="constrained")
        for axes, kind, (shown, counter, color) in zip(figure.subplots(1, 3), _KINDS, panels, strict=True):
            _draw_counts(axes, shown, color, most)
            axes.set_title(f"{kind.capitalize()}: {counter.total():,}")
            if shown:
                axes.set_xlabel(f"times; {len(shown)} of {len(counter):,} different")
        figure.suptitle(f"Most frequent word errors, {drawable(model)}", fontsize=9, color=GREY)
    return figure


def draw_error_types(evaluations: Mapping[str, Row], predictions: PredictionsByModel) -> Figure:
    """Draw substitutions, deletions and insertions as shares of the reference's words, loops and empties of the clips.

    Args:
        evaluations: rows of metrics.jsonl by model, at least one.
        predictions: by model; they give the edits of evaluations that were logged without them.
    """
    names = stock_first(evaluations)
    looks = looks_of(names)
    edits = {name: _edit_shares(evaluations[name], predictions.get(name, ())) for name in names}
    per_row = {name: [gap(evaluations[name].get(key)) for key in _ROW_RATES] for name in names}
    with figure_style():
        figure = NotebookFigure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_groups(left, _KINDS, edits, looks)
        left.set(title="Word errors", ylabel="share of the reference's words")
        _draw_groups(right, list(_ROW_RATES.values()), per_row, looks)
        right.set(title="Clips that failed", ylabel="share of the clips")
        left.legend(frameon=False)
        figure.supxlabel(
            "the three shares of a model add up to its WER; loops and empty outputs are clips, their words count "
            "on the left too", fontsize=8, color=GREY,
        )  # fmt: skip
    return figure


def _edit_shares(evaluation: Row, rows: Sequence[Prediction]) -> list[float]:
    if all(evaluation.get(key) is not None for key in (*_KINDS, "reference_words")):
        counts = EditCounts(*(int(evaluation[key]) for key in (*_KINDS, "reference_words")))
    else:
        counts = sum_counts([row.counts for row in rows])
    if not counts.reference:
        return [math.nan] * len(_KINDS)
    return [edits / counts.reference for edits in (counts.substitutions, counts.deletions, counts.insertions)]


def _draw_groups(
    axes: Axes, groups: Sequence[str], shares: Mapping[str, Sequence[float]], looks: Mapping[str, Look]
) -> None:
    width = 0.8 / len(looks)
    for index, (name, look) in enumerate(looks.items()):
        places = [place + width * (index - (len(looks) - 1) / 2) for place in range(len(groups))]
        total = sum(shares[name])
        label = f"{drawable(name)}, WER {total:.3f}" if math.isfinite(total) else drawable(name)
        axes.bar(
            places, shares[name], width=0.92 * width, color=look.color, hatch=look.hatch, edgecolor="white",
            linewidth=0, label=label,
        )  # fmt: skip
        for place, value in zip(places, shares[name], strict=True):
            known = math.isfinite(value)
            axes.annotate(
                f"{value:.3f}" if known else NOT_MEASURED, (place, value if known else 0), (0, 4),
                textcoords="offset points", ha="center", fontsize=9 if len(looks) <= 2 else 7,
                color="black" if known else GREY, rotation=0 if known and len(looks) <= 4 else 90,
            )  # fmt: skip
    top = max((value for values in shares.values() for value in values if math.isfinite(value)), default=0.0)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.2 * top or 1)
    axes.grid(axis="x", visible=False)


def _draw_counts(axes: Axes, counts: Sequence[tuple[str, int]], color: str, most: int) -> None:
    if not counts:
        say(axes, "none")
        return
    words, numbers = zip(*counts, strict=True)
    axes.barh(range(len(words)), numbers, height=0.6, color=color)
    for place, n in enumerate(numbers):
        axes.annotate(f"{n:,}", (n, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.set_ylim(most - 0.4, -0.6)  # bars as thick as in the other panels
    axes.set_xlim(0, 1.15 * max(numbers))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(axis="y", visible=False)


def _most_frequent(counter: Counter[Any], top: int) -> list[tuple[Any, int]]:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:top]
