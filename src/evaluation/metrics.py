"""Word and character error rates over jiwer, with bootstrap intervals that respect speakers.

    WER = sum(S + D + I) / sum(N) over the corpus; CER likewise over characters.

An empty reference has N = 0 and its insertions count: a hallucination on silence is an error. Clips of one speaker are
not independent, so intervals resample speakers (Bisani & Ney, ICASSP 2004, with speakers as blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from numpy.typing import NDArray

from src.evaluation.text import PLAIN, get_normalizer, whisper_normalizer_for
from src.utils.errors import DataError

_CHUNK_CELLS = 5_000_000  # resampled cells held at once: 40 MB
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class EditCounts:
    """Edits of one row or of a sum of rows; `reference` is N."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def errors(self) -> int:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class ErrorRates:
    """Corpus rates of one set of rows.

    Attributes:
        n: rows.
        normalizer: of `wer`, `cer` and the counts; the `_plain` rates use "plain-v1".
        wer, cer: fractions; WER may exceed 1.
        wer_low, wer_high: bootstrap percentile interval; nan with fewer than two blocks.
        blocks: what was resampled, "speaker" or "clip", and how many there are.
    """

    n: int
    normalizer: str
    wer: float
    wer_low: float
    wer_high: float
    cer: float
    wer_plain: float
    wer_plain_low: float
    wer_plain_high: float
    cer_plain: float
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    blocks: str
    num_blocks: int
    confidence: float


@dataclass(frozen=True)
class PairedComparison:
    """Difference in WER, second minus first, on the same rows; negative is better.

    Attributes:
        low, high: paired bootstrap interval of the difference.
        verdict: "better", "worse", or "no difference shown" where the interval holds zero.
    """

    difference: float
    low: float
    high: float
    verdict: str


class MetricsCalculator:
    """Rates with intervals.

    Args:
        language: chooses Whisper's normaliser; None means English.
        bootstrap_samples: resamples.
        confidence: of the intervals.
        seed: of the resampling.
    """

    def __init__(
        self,
        language: str | None = "en",
        *,
        bootstrap_samples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.normalizer = whisper_normalizer_for(language)
        self._samples = bootstrap_samples
        self._confidence = confidence
        self._seed = seed

    def compute(
        self, references: Sequence[str], hypotheses: Sequence[str], groups: Sequence[str | None] | None = None
    ) -> ErrorRates:
        """Compute rates over rows.

        Args:
            references, hypotheses: raw texts; they are normalised here.
            groups: speaker of each row; rows without one are blocks of their own.
        Raises: DataError: no rows, different lengths, or no word in any reference.
        """
        words = word_counts(references, hypotheses, self.normalizer)
        plain = word_counts(references, hypotheses, PLAIN)
        blocks = _block_ids(groups, len(references))
        low, high = self._interval(words, blocks)
        plain_low, plain_high = self._interval(plain, blocks)
        total = sum_counts(words)
        return ErrorRates(
            n=len(references),
            normalizer=self.normalizer,
            wer=error_rate(words),
            wer_low=low,
            wer_high=high,
            cer=error_rate(character_counts(references, hypotheses, self.normalizer)),
            wer_plain=error_rate(plain),
            wer_plain_low=plain_low,
            wer_plain_high=plain_high,
            cer_plain=error_rate(character_counts(references, hypotheses, PLAIN)),
            substitutions=total.substitutions,
            deletions=total.deletions,
            insertions=total.insertions,
            reference_words=total.reference,
            blocks="speaker" if groups is not None and any(g is not None for g in groups) else "clip",
            num_blocks=int(blocks.max()) + 1,
            confidence=self._confidence,
        )

    def compare(
        self,
        references: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        groups: Sequence[str | None] | None = None,
    ) -> PairedComparison:
        """Compare two systems on the same rows by a paired bootstrap.

        Raises: DataError: as `compute`.
        """
        a = word_counts(references, first, self.normalizer)
        b = word_counts(references, second, self.normalizer)
        blocks = _block_ids(groups, len(references))
        errors = np.array([[x.errors, y.errors] for x, y in zip(a, b, strict=True)], dtype=float)  # (n, 2)
        drawn = self._resample(errors, np.array([x.reference for x in a], dtype=float), blocks)  # (samples, 2)
        low, high = _percentiles(drawn[:, 1] - drawn[:, 0], self._confidence)
        verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        return PairedComparison(error_rate(b) - error_rate(a), low, high, verdict)

    def _interval(self, counts: Sequence[EditCounts], blocks: NDArray[np.int64]) -> tuple[float, float]:
        if blocks.max() == 0:
            return float("nan"), float("nan")
        errors = np.array([[c.errors] for c in counts], dtype=float)
        drawn = self._resample(errors, np.array([c.reference for c in counts], dtype=float), blocks)
        return _percentiles(drawn[:, 0], self._confidence)

    def _resample(self, errors: FloatArray, words: FloatArray, blocks: NDArray[np.int64]) -> FloatArray:
        """Draw blocks with replacement: errors (n, k), words (n,) -> rates (samples, k)."""
        count = int(blocks.max()) + 1
        block_errors = np.stack([np.bincount(blocks, column, minlength=count) for column in errors.T], axis=1)
        block_words = np.bincount(blocks, words, minlength=count)
        rng = np.random.default_rng(self._seed)
        rates = []
        step = max(1, _CHUNK_CELLS // count)
        for at in range(0, self._samples, step):
            drawn = rng.integers(0, count, size=(min(step, self._samples - at), count))
            drawn_words = block_words[drawn].sum(axis=1)
            denominator = np.where(drawn_words > 0, drawn_words, np.nan)  # only empty references were drawn: no rate
            rates.append(np.stack([e[drawn].sum(axis=1) / denominator for e in block_errors.T], axis=1))
        return np.concatenate(rates)


def word_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[EditCounts]:
    """Count word edits a row.

    Raises: DataError: no rows, different lengths, or no word in any reference.
    """
    normalize = get_normalizer(normalizer)
    return _edit_counts([normalize(r) for r in references], [normalize(h) for h in hypotheses], by_word=True)


def character_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[EditCounts]:
    """Count character edits a row, spaces included."""
    normalize = get_normalizer(normalizer)
    return _edit_counts([normalize(r) for r in references], [normalize(h) for h in hypotheses], by_word=False)


def sum_counts(counts: Sequence[EditCounts]) -> EditCounts:
    """Add rows up."""
    return EditCounts(
        sum(c.substitutions for c in counts),
        sum(c.deletions for c in counts),
        sum(c.insertions for c in counts),
        sum(c.reference for c in counts),
    )


def error_rate(counts: Sequence[EditCounts]) -> float:
    """Return sum(S + D + I) / sum(N)."""
    total = sum_counts(counts)
    return total.errors / total.reference


def _edit_counts(references: list[str], hypotheses: list[str], *, by_word: bool) -> list[EditCounts]:
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references but {len(hypotheses)} hypotheses; every row needs both")
    if not references:
        raise DataError("no rows: there is nothing to measure")
    if not any(references):
        raise DataError(f"none of the {len(references)} references has a word, so no rate is defined")
    spoken = [i for i, reference in enumerate(references) if reference]
    process = jiwer.process_words if by_word else jiwer.process_characters
    output = process([references[i] for i in spoken], [hypotheses[i] for i in spoken])
    sizes = [len(h.split()) if by_word else len(h) for h in hypotheses]
    counts = [EditCounts(0, 0, size, 0) for size in sizes]  # of an empty reference: all insertions
    for i, reference, alignment in zip(spoken, output.references, output.alignments, strict=True):
        edits = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in alignment:
            edits[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        counts[i] = EditCounts(edits["substitute"], edits["delete"], edits["insert"], len(reference))
    return counts


def _block_ids(groups: Sequence[str | None] | None, n: int) -> NDArray[np.int64]:
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise DataError(f"{n} rows but {len(groups)} groups; every row needs one, or None")
    names = [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _percentiles(rates: FloatArray, confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(rates, [tail, 100 - tail])
    return float(low), float(high)
