"""Error rates of parts of a test set: by language, age, gender, speaker, length, noise, or another column."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import UNKNOWN, Bootstrap, RateEstimate, estimate_rate
from src.utils.errors import DataError, did_you_mean

DURATION_EDGES_SEC = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 30.0)
EDGES: Mapping[str, tuple[float, ...]] = {  # customary ranges of numbers; the unit is the column's
    **dict.fromkeys(("duration_sec", "duration"), DURATION_EDGES_SEC),
    "age": (0.0, 12.0, 17.0, 29.0, 44.0, 59.0, 120.0),  # years
    "snr_db": (0.0, 10.0, 20.0, 30.0, 40.0, 60.0),
}
NO_COLUMNS = frozenset({"source_text", "line", "split", "duration"})  # of the source's rows, not of its speech
_OWN = ("language", "speaker", "duration_sec")  # fields of a row, not of its `meta`
MAX_VALUES = 8  # distinct numbers that are shown one by one; more are cut into quarters


@dataclass(frozen=True, kw_only=True)
class Slice(RateEstimate):
    """The headline of the rows that share a value of a column; nan if no reference of theirs has a word."""

    column: str
    value: str  # for reading: the value itself, a range of numbers, or "unknown"
    n: int  # rows
    reference_words: int


def slice_columns(rows: Sequence[Prediction], *, max_slices: int = 12) -> list[str]:
    """Return the columns that split rows into at least two slices and at most `max_slices`: those worth a figure."""
    names = dict.fromkeys(key for row in rows for key in row.meta if key not in NO_COLUMNS)
    return [column for column in dict.fromkeys((*_OWN, *names)) if 2 <= len(_group(rows, column, None)) <= max_slices]


def slice_rates(
    rows: Sequence[Prediction], column: str, *, edges: Sequence[float] | None = None,
    bootstrap: Bootstrap | None = None,
) -> list[Slice]:  # fmt: skip
    """Measure the slices of a column.

    Args:
        rows: of one evaluation.
        column: "language", "speaker", "duration_sec", or a key of the rows' `meta`.
        edges: ascending, for a column of numbers: a value at an edge belongs to the lower range, and values outside of
            all ranges count as unknown. Known columns have their own, see `EDGES`; others are cut into quarters.
        bootstrap: of the intervals.

    Returns:
        Numbers in ascending order, texts by their size, the largest first; rows without a value come last.
    """
    if not rows:
        raise DataError("slice_rates: no rows; evaluate first")
    known = [*_OWN, *dict.fromkeys(key for row in rows for key in row.meta)]
    if column not in known:
        raise DataError(f"no column {column!r} in the rows{did_you_mean(column, known)}; there are {', '.join(known)}")
    slices = []
    for value, part in _group(rows, column, edges).items():
        found = estimate_rate(part, [row.speaker for row in part], bootstrap, kinds=[row.kind for row in part])
        words = sum(row.reference_words for row in part)
        slices.append(Slice(**vars(found), column=column, value=value, n=len(part), reference_words=words))
    return slices


def _group(rows: Sequence[Prediction], column: str, edges: Sequence[float] | None) -> dict[str, list[Prediction]]:
    """Return the rows of each slice, by its value for reading, in the order to be shown."""
    values = pd.Series([getattr(r, column) if column in _OWN else r.meta.get(column) for r in rows], dtype=object)
    known = values[values.notna() & (values != "")]
    if known.map(lambda value: isinstance(value, int | float) and not isinstance(value, bool)).all():
        numbers = known.astype(float)
        edges = EDGES.get(column) if edges is None else edges
        if edges is None and numbers.nunique() <= MAX_VALUES:
            named = numbers.map("{:g}".format)
        else:
            if edges is None:
                edges = sorted(set(np.quantile(numbers, [0.0, 0.25, 0.5, 0.75, 1.0]).tolist()))
            names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
            index = np.searchsorted(edges, numbers).clip(1, len(names)) - 1  # at an edge: the lower range
            named = pd.Series(np.take(names, index), numbers.index)
            named = named.where(numbers.between(edges[0], edges[-1]), UNKNOWN)
        rank: Mapping[str, float] = numbers.groupby(named).min().to_dict()
    else:
        named = known.map(str)
        rank = (-named.value_counts()).to_dict()
    labels = named.reindex(values.index, fill_value=UNKNOWN)
    ordered = sorted(labels.unique(), key=lambda label: (label == UNKNOWN, rank.get(label, 0), label))
    return {label: [rows[i] for i in np.flatnonzero(labels == label)] for label in ordered}
