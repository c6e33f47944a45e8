from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import headline_normalizer
from src.evaluation.slices import slice_columns, slice_rates
from src.utils.errors import DataError


def row(i: int, errors: int = 0, words: int = 4, *, duration_sec: float = 3.0, **meta: Any) -> Prediction:
    return Prediction(
        id=f"u{i}", speaker=f"s{i % 3}", duration_sec=duration_sec, reference="the " * words, hypothesis="",
        substitutions=errors, deletions=0, insertions=0, reference_words=words, avg_logprob=-0.1, latency_sec=0.1,
        meta=meta,
    )  # fmt: skip


def test_the_rate_of_a_slice_is_that_of_its_rows() -> None:
    rows = [row(0, 1, gender="f"), row(1, 3, gender="f"), row(2, 0, gender="m"), row(3, 2, 0, gender="x"), row(4)]
    slices = {found.value: found for found in slice_rates(rows, "gender")}
    assert list(slices) == ["f", "m", "x", "unknown"]
    assert (slices["f"].rate, slices["f"].n, slices["f"].reference_words) == (0.5, 2, 8)
    assert (slices["f"].blocks, slices["f"].num_blocks) == ("speaker", 2)
    assert slices["f"].low <= 0.5 <= slices["f"].high
    assert slices["m"].rate == 0.0
    assert math.isnan(slices["m"].low)
    assert math.isnan(slices["x"].rate)  # no word to be right about: no rate, neither 0 nor 1
    assert sum(found.n for found in slices.values()) == len(rows)


def test_a_slice_per_language_has_its_own_metric_and_others_the_mean() -> None:
    rows = [
        replace(row(i, i % 2 + (i > 4), gender="fm"[i % 3 > 1]), language=code, normalizer=headline_normalizer(code))
        for i, code in enumerate(["de"] * 5 + ["zh"] * 3)
    ]
    assert slice_columns(rows)[0] == "language"
    found = {part.value: part for part in slice_rates(rows, "language")}
    assert {value: (part.metric, part.n, part.rate) for value, part in found.items()} == {
        "de": ("WER", 5, 2 / 20), "zh": ("CER", 3, 5 / 12),
    }  # fmt: skip
    by_gender = {part.value: (part.metric, part.rate) for part in slice_rates(rows, "gender")}
    assert by_gender["f"] == ("mean", pytest.approx(((0 + 1 + 1 + 0) / 16 + 3 / 8) / 2))


DURATIONS_AND_AGES = [
    row(i, duration_sec=sec, age=age) for i, (sec, age) in enumerate([(2.0, 40), (2.1, 7), (31.0, 7), (1.0, 12)])
]
FEW = [row(i, score=i % 3, same=1.0, missing=math.nan) for i in range(9)]


@pytest.mark.parametrize(
    ("rows", "column", "edges", "slices"),
    [
        (DURATIONS_AND_AGES, "age", None, {"0 to 12": 3, "29 to 44": 1}),
        (DURATIONS_AND_AGES, "duration_sec", None, {"0 to 2": 2, "2 to 4": 1, "unknown": 1}),
        (DURATIONS_AND_AGES, "duration_sec", np.array([0, 31]), {"0 to 31": 4}),
        ([row(i, tempo=float(i)) for i in range(101)], "tempo", None,
         {"0 to 25": 26, "25 to 50": 25, "50 to 75": 25, "75 to 100": 25}),  # quarters
        (FEW, "score", None, {"0": 3, "1": 3, "2": 3}),
        (FEW, "same", None, {"1": 9}),
        (FEW, "missing", None, {"unknown": 9}),
    ],
)  # fmt: skip
def test_numbers_are_cut_into_bands_in_ascending_order(
    rows: list[Prediction], column: str, edges: Any, slices: dict[str, int]
) -> None:
    found = {part.value: part.n for part in slice_rates(rows, column, edges=edges)}
    assert list(found.items()) == list(slices.items())


def test_columns_worth_a_picture_and_one_that_is_not_there() -> None:
    rows = [row(i, gender="fm"[i % 2], name=str(i), source_text=str(i % 2), same="x") for i in range(40)]
    assert slice_columns(rows) == ["speaker", "gender"]
    with pytest.raises(DataError, match="did you mean 'gender'"):
        slice_rates(rows, "gendre")
    with pytest.raises(DataError, match="no rows"):
        slice_rates([], "gender")
