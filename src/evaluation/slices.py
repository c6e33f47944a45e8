"""Error rates of parts of a test set: by age, gender, speaker, length, noise, or any other column of the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.evaluation.edits import error_rate, sum_counts
from src.evaluation.metrics import Blocks, Bootstrap, find_blocks, rate_interval
from src.evaluation.results import Prediction
from src.utils.errors import DataError, did_you_mean

UNKNOWN = "unknown"
DURATION_EDGES_SEC = (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 30.0)
EDGES: Mapping[str, tuple[float, ...]] = {  # of numbers that everybody cuts alike; the unit is the column's
    "duration_sec": DURATION_EDGES_SEC,
    "duration": DURATION_EDGES_SEC,
    "age": (0.0, 12.0, 17.0, 29.0, 44.0, 59.0, 120.0),  # years
    "snr_db": (0.0, 10.0, 20.0, 30.0, 40.0, 60.0),
}
NO_COLUMNS = frozenset({"source_text", "line", "split", "duration"})  # of the source's rows, not of its speech
_OWN = ("speaker", "duration_sec")  # fields of a row, not of its `meta`
MAX_VALUES = 8  # distinct numbers that are shown each for itself; more are cut into quarters


@dataclass(frozen=True)
class Slice:
    """The rows that share a value of a column.

    Attributes:
        value: for reading: the value itself, a range of numbers, or "unknown".
        n: rows; `reference_words` in them.
        wer: corpus rate; nan where no reference has a word.
        low, high: bootstrap interval, by speakers where two are known in the slice; nan where there is one clip only.
        blocks, num_blocks: what was resampled, and how many there are.
    """

    column: str
    value: str
    n: int
    reference_words: int
    wer: float
    low: float
    high: float
    blocks: Blocks
    num_blocks: int


def slice_columns(rows: Sequence[Prediction], *, max_slices: int = 12) -> list[str]:
    """Return the columns that split rows into at least two slices and at most so many: those worth a picture."""
    names = dict.fromkeys(key for row in rows for key in row.meta if key not in NO_COLUMNS)
    return [column for column in _OWN + tuple(names) if 2 <= len(_group(rows, column, None)) <= max_slices]


def slice_rates(
    rows: Sequence[Prediction],
    column: str,
    *,
    edges: Sequence[float] | None = None,
    bootstrap: Bootstrap | None = None,
) -> list[Slice]:
    """Measure the slices of a column.

    Args:
        column: "speaker", "duration_sec", or a key of the rows' `meta`.
        edges: ascending, for a column of numbers: a value at an edge belongs to the lower range, and what lies outside
            of all counts as unknown. Known columns have their own, see `EDGES`; others are cut into quarters.
        bootstrap: of the intervals; defaults without.
    Returns: numbers in ascending order, texts by their size, the largest first; rows without a value come last.
    Raises: DataError: no rows, or no row has this column.
    """
    if not rows:
        raise DataError("slice_rates: no rows; evaluate first")
    known = [*_OWN, *dict.fromkeys(key for row in rows for key in row.meta)]
    if column not in known:
        raise DataError(f"no column {column!r} in the rows{did_you_mean(column, known)}; there are {', '.join(known)}")
    groups = _group(rows, column, edges)
    return [_measure(column, value, part, bootstrap or Bootstrap()) for value, part in groups.items()]


def _measure(column: str, value: str, rows: Sequence[Prediction], bootstrap: Bootstrap) -> Slice:
    counts = [row.counts for row in rows]
    speakers = [row.speaker for row in rows]
    block_ids, blocks = find_blocks(speakers, len(rows))
    spoken = any(count.reference for count in counts)
    low, high = rate_interval(counts, speakers, bootstrap) if spoken else (math.nan, math.nan)
    return Slice(
        column=column,
        value=value,
        n=len(rows),
        reference_words=sum_counts(counts).reference,
        wer=error_rate(counts) if spoken else math.nan,
        low=low,
        high=high,
        blocks=blocks,
        num_blocks=int(block_ids.max()) + 1,
    )


def _group(rows: Sequence[Prediction], column: str, edges: Sequence[float] | None) -> dict[str, list[Prediction]]:
    values = [_value(row, column) for row in rows]
    numbers = [value for value in values if value is not None]
    name = _namer(column, numbers, edges)
    groups: dict[str, list[Prediction]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(UNKNOWN if value is None else name(value), []).append(row)
    if all(_is_number(value) for value in numbers):
        smallest = {label: min(_value(row, column) or 0.0 for row in part) for label, part in groups.items()}
        ordered = sorted(groups, key=lambda label: (label == UNKNOWN, smallest[label]))
    else:
        ordered = sorted(groups, key=lambda label: (label == UNKNOWN, -len(groups[label]), label))
    return {label: groups[label] for label in ordered}


def _namer(column: str, values: Sequence[Any], edges: Sequence[float] | None) -> Callable[[Any], str]:
    if not all(_is_number(value) for value in values):
        return str
    if edges is None:
        edges = EDGES.get(column)
    if edges is None:
        distinct = sorted(set(values))
        if len(distinct) <= MAX_VALUES:
            return lambda value: f"{value:g}"
        edges = sorted(set(np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0]).tolist()))
    cuts = tuple(edges)

    def name(value: float) -> str:
        if not cuts[0] <= value <= cuts[-1]:
            return UNKNOWN
        index = max(1, int(np.searchsorted(cuts, value)))  # at an edge: the lower range
        return f"{cuts[index - 1]:g} to {cuts[index]:g}"

    return name


def _value(row: Prediction, column: str) -> Any:
    value = getattr(row, column) if column in _OWN else row.meta.get(column)
    return None if value in (None, "") or value != value else value  # nan is unknown too


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
