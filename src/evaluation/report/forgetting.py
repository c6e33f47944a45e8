"""What fine-tuning cost elsewhere, in sentences: the guard set, and the mix with stock weights.

Rows of a guard set are kept under names such as "tuned (guard)", so that no table takes them for the test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.evaluation.metrics import PairedComparison

FEW_BLOCKS = 10  # below it a percentile interval is clearly too narrow
_GUARD_SUFFIX = " (guard)"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Forgetting:
    """What a run's files say about forgetting; nothing where nothing was measured.

    Attributes:
        guard: last row of each evaluation on the guard set: "stock (guard)", "tuned (guard)".
        guard_set: the row that says what the guard set was.
        mix: rows of the last sweep over mixes of stock and tuned weights, from share 0 to 1.
    """

    guard: Mapping[str, Row] = field(default_factory=dict)
    guard_set: Row | None = None
    mix: Sequence[Row] = ()

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> Forgetting:
        """Pick the last of each from the rows of metrics.jsonl."""
        guard_set: Row | None = None
        mix: list[Row] = []
        for row in rows:
            if row["event"] == "guard":
                guard_set = row
            elif row["event"] == "mix":
                mix = [row] if row["share"] == 0 else [*mix, row]  # share 0 begins a sweep
            elif row["event"] == "epoch":
                mix = []  # trained since: the sweep was of other weights
        evaluations = [row for row in rows if row["event"] == "evaluation"]
        return cls({row["name"]: row for row in evaluations if is_guard(row["name"])}, guard_set, mix)

    def describe_guard_set(self) -> str:
        """Return what the guard set was; empty where there was none."""
        if self.guard_set is None:
            return ""
        clips, speakers = self.guard_set["clips"], self.guard_set["speakers"]
        of_speakers = f" of {speakers} speaker{'s' * (speakers != 1)}" if speakers else ""
        return f"guard set: {self.guard_set['set']}, {clips} clip{'s' * (clips != 1)}{of_speakers}"

    def describe_mix(self) -> str:
        """Return what the sweep found; empty where there was none."""
        return describe_mix(self.mix) if self.mix else ""


def guard_name(model: str) -> str:
    """Return the name under which a model's results on the guard set are kept."""
    return model + _GUARD_SUFFIX


def is_guard(name: str) -> bool:
    """Whether results of this name are of the guard set."""
    return name.endswith(_GUARD_SUFFIX)


def describe_interval(comparison: PairedComparison) -> str:
    """Return the interval of a difference in points, with what was resampled and whether that is little."""
    blocks = f"{comparison.num_blocks} {comparison.blocks}{'s' if comparison.num_blocks > 1 else ''}"
    if math.isnan(comparison.low):
        return f"(no interval from {blocks})"
    interval = f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}] over {blocks}"
    return interval if comparison.num_blocks >= FEW_BLOCKS else f"{interval}; so few that the interval is too narrow"


def describe_guard(stock: Row, tuned: Row, comparison: PairedComparison | None) -> str:
    """Return what the guard set shows, in one sentence.

    Args:
        stock, tuned: evaluations on it, with `name` and a `wer`.
        comparison: tuned against stock on its clips; None where their rows are absent.
    """
    said = f"guard: {_model(stock)} WER {stock['wer']:.3f}, {_model(tuned)} {tuned['wer']:.3f}"
    if comparison is None:
        return f"{said}; no verdict, since the rows of its clips are absent"
    interval = describe_interval(comparison)
    if comparison.verdict == "no difference shown":
        return f"{said}: {100 * comparison.difference:+.1f} points {interval}: no difference shown on general speech"
    points = f"{100 * abs(comparison.difference):.1f} points {interval}"
    return f"{said}: {comparison.verdict} on general speech by {points}"


def describe_trade(stock: Row, tuned: Row, guard_stock: Row, guard_tuned: Row) -> str:
    """Return the sentence for a model that is better on its own test set and worse on the guard set."""
    name = _model(tuned)
    return (
        f"the {name} model is better on its own domain (WER {stock['wer']:.3f} to {tuned['wer']:.3f}) but worse on "
        f"the guard set ({guard_stock['wer']:.3f} to {guard_tuned['wer']:.3f}): use it for speech of its own domain, "
        f"and the {_model(stock)} model for other speech"
    )


def describe_mix(rows: Sequence[Row]) -> str:
    """Return what a sweep found, in one sentence.

    Args:
        rows: from share 0 to 1, each with share, wer, clips and chosen.
    """
    clips = rows[0]["clips"]
    ends = {0: " (stock)", 1: " (tuned)"}
    wers = ", ".join(f"{row['share']:g}{ends.get(row['share'], '')} {row['wer']:.3f}" for row in rows)
    chosen = next(row["share"] for row in rows if row["chosen"])
    meaning = {
        0: "none is below the stock weights: keep the stock model",
        1: "the tuned weights are the lowest: no mix was taken",
    }.get(
        chosen,
        f"the mix of share {chosen:g} was taken; it was chosen by these clips, which flatters it: the test set judges",
    )
    return f"mix: WER on {clips} validation clip{'s' * (clips != 1)} by share of tuned weights: {wers}; {meaning}"


def _model(row: Row) -> str:
    return str(row["name"]).removesuffix(_GUARD_SUFFIX)
