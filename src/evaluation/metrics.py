"""Word and character error rates over jiwer, with bootstrap intervals that respect speakers.

    WER = sum(S + D + I) / sum(N) over the corpus; CER likewise over characters
    MER = sum(S + D + I) / sum(H + S + D + I), WIL = 1 - sum(H)^2 / (sum(N) sum(P)), with H hits and P words put out
    (Morris, Maier & Green, Interspeech 2004)

An empty reference has N = 0 and its insertions count: a hallucination on silence is an error. Clips of one speaker are
not independent, so intervals resample speakers (Bisani & Ney, ICASSP 2004, with speakers as blocks). Where there are
not two known speakers, clips are resampled: the interval then speaks of this voice's next clips, not of other voices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from src.evaluation.edits import EditCounts, character_counts, error_rate, sum_counts, word_counts
from src.evaluation.hallucination import empty_outputs, invented_words, is_loop
from src.evaluation.text import PLAIN, get_normalizer, whisper_normalizer_for
from src.utils.errors import DataError

_CHUNK_CELLS = 5_000_000  # resampled cells held at once: 40 MB
FloatArray = NDArray[np.float64]
Blocks = Literal["speaker", "clip"]
Verdict = Literal["better", "no difference shown", "worse"]


@dataclass(frozen=True)
class ErrorRates:
    """Corpus rates of one set of rows.

    Attributes:
        n: rows.
        normalizer: of `wer`, `cer` and the counts; the `_plain` rates use "plain-v1".
        wer, cer: fractions; WER may exceed 1.
        wer_low, wer_high: bootstrap percentile interval; nan where there is one clip only.
        mer, wil: match error rate and word information lost; both lie within 0 and 1.
        sentence_error_rate: share of rows with any error.
        loop_rate: share of rows that `is_loop` finds.
        empty_rate: share of the rows with a spoken reference whose hypothesis is empty.
        empty_references, hallucinated_words: rows without a word to say, and the words put out on them; these count in
            `insertions` too.
        blocks, num_blocks: what was resampled, and how many there are. Under about ten the interval is too narrow.
        confidence, bootstrap_samples, bootstrap_seed: how, so that it can be drawn again.
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
    mer: float
    wil: float
    sentence_error_rate: float
    loop_rate: float
    empty_rate: float
    empty_references: int
    hallucinated_words: int
    blocks: Blocks
    num_blocks: int
    confidence: float
    bootstrap_samples: int
    bootstrap_seed: int


@dataclass(frozen=True)
class PairedComparison:
    """Difference in WER, second minus first, on the same rows; negative is better.

    Attributes:
        low, high: paired bootstrap interval of the difference; nan where there is one clip only.
        verdict: "better" or "worse" where the interval leaves zero out, else "no difference shown".
        blocks, num_blocks: what was resampled, and how many there are.
    """

    difference: float
    low: float
    high: float
    verdict: Verdict
    blocks: Blocks
    num_blocks: int


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn.

    Attributes:
        samples: resamples.
        confidence: of the percentile interval.
        seed: of the resampling.
    """

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def interval(self, errors: FloatArray, words: FloatArray, block_ids: NDArray[np.int64]) -> tuple[float, float]:
        """Return the interval of sum(errors) / sum(words) when blocks are drawn with replacement.

        Args:
            errors, words: (n,) a row; errors may be differences of two systems.
            block_ids: (n,) in 0..blocks - 1.
        Returns: low, high; nan with fewer than two blocks. A draw without a word has no rate and is left out.
        """
        count = int(block_ids.max()) + 1
        if count < 2:
            return float("nan"), float("nan")
        block_errors = np.bincount(block_ids, errors, minlength=count)
        block_words = np.bincount(block_ids, words, minlength=count)
        rng = np.random.default_rng(self.seed)
        step = max(1, _CHUNK_CELLS // count)
        rates = []
        for at in range(0, self.samples, step):
            drawn = rng.integers(0, count, size=(min(step, self.samples - at), count))
            denominator = block_words[drawn].sum(axis=1)
            spoken = denominator > 0
            rates.append(block_errors[drawn].sum(axis=1)[spoken] / denominator[spoken])
        tail = 100 * (1 - self.confidence) / 2
        low, high = np.percentile(np.concatenate(rates), [tail, 100 - tail])
        return float(low), float(high)


class MetricsCalculator:
    """Rates with intervals.

    Args:
        language: chooses Whisper's normaliser; None means English, for models that know no other language.
        bootstrap_samples, confidence, seed: as in `Bootstrap`.
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
        self.bootstrap = Bootstrap(bootstrap_samples, confidence, seed)

    def compute(
        self,
        references: Sequence[str],
        hypotheses: Sequence[str],
        groups: Sequence[str | None] | None = None,
        *,
        durations_sec: Sequence[float] | None = None,
        num_tokens: Sequence[int | None] | None = None,
    ) -> ErrorRates:
        """Compute rates over rows.

        Args:
            references, hypotheses: raw texts; they are normalised here.
            groups: speaker of each row; rows without one are blocks of their own.
            durations_sec, num_tokens: of each row; with them `loop_rate` knows impossible rates too.
        Raises: DataError: no rows, different lengths, or no word in any reference.
        """
        words = word_counts(references, hypotheses, self.normalizer)
        plain = word_counts(references, hypotheses, PLAIN)
        block_ids, blocks = find_blocks(groups, len(references))
        wer, wer_plain = error_rate(words), error_rate(plain)  # first: no words, no interval
        low, high = self.bootstrap.interval(_errors(words), _words(words), block_ids)
        plain_low, plain_high = self.bootstrap.interval(_errors(plain), _words(plain), block_ids)
        total = sum_counts(words)
        empty_references, hallucinated_words = invented_words(words)
        return ErrorRates(
            n=len(references),
            normalizer=self.normalizer,
            wer=wer,
            wer_low=low,
            wer_high=high,
            cer=error_rate(character_counts(references, hypotheses, self.normalizer)),
            wer_plain=wer_plain,
            wer_plain_low=plain_low,
            wer_plain_high=plain_high,
            cer_plain=error_rate(character_counts(references, hypotheses, PLAIN)),
            substitutions=total.substitutions,
            deletions=total.deletions,
            insertions=total.insertions,
            reference_words=total.reference,
            mer=total.errors / (total.hits + total.errors),
            wil=_information_lost(total),
            sentence_error_rate=sum(1 for count in words if count.errors) / len(words),
            loop_rate=self._loops(references, hypotheses, durations_sec, num_tokens) / len(words),
            empty_rate=empty_outputs(words) / (len(words) - empty_references),
            empty_references=empty_references,
            hallucinated_words=hallucinated_words,
            blocks=blocks,
            num_blocks=int(block_ids.max()) + 1,
            confidence=self.bootstrap.confidence,
            bootstrap_samples=self.bootstrap.samples,
            bootstrap_seed=self.bootstrap.seed,
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
        return compare_counts(a, b, groups, self.bootstrap)

    def _loops(
        self,
        references: Sequence[str],
        hypotheses: Sequence[str],
        durations_sec: Sequence[float] | None,
        num_tokens: Sequence[int | None] | None,
    ) -> int:
        normalize = get_normalizer(self.normalizer)
        unknown = [None] * len(references)
        rows = zip(references, hypotheses, durations_sec or unknown, num_tokens or unknown, strict=True)
        return sum(
            is_loop(normalize(reference), normalize(hypothesis), duration_sec=duration_sec, num_tokens=tokens)
            for reference, hypothesis, duration_sec, tokens in rows
        )


def compare_counts(
    first: Sequence[EditCounts],
    second: Sequence[EditCounts],
    groups: Sequence[str | None] | None = None,
    bootstrap: Bootstrap | None = None,
) -> PairedComparison:
    """Compare two systems by the counts of their rows, which must be of the same references in the same order.

    Raises: DataError: the references differ, or hold no word.
    """
    if [a.reference for a in first] != [b.reference for b in second]:
        raise DataError("the two systems have other references; compare them on the same rows, in the same order")
    difference = error_rate(second) - error_rate(first)
    block_ids, blocks = find_blocks(groups, len(first))
    low, high = (bootstrap or Bootstrap()).interval(_errors(second) - _errors(first), _words(first), block_ids)
    verdict: Verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"  # nan: neither
    return PairedComparison(difference, low, high, verdict, blocks, int(block_ids.max()) + 1)


def rate_interval(
    counts: Sequence[EditCounts], groups: Sequence[str | None] | None, bootstrap: Bootstrap
) -> tuple[float, float]:
    """Return the interval of `error_rate(counts)`; nan where there is one row only."""
    return bootstrap.interval(_errors(counts), _words(counts), find_blocks(groups, len(counts))[0])


def _information_lost(total: EditCounts) -> float:
    return 1 - (total.hits / total.reference) * (total.hits / total.hypothesis) if total.hypothesis else 1.0


def _errors(counts: Sequence[EditCounts]) -> FloatArray:
    return np.array([c.errors for c in counts], dtype=float)  # (n,)


def _words(counts: Sequence[EditCounts]) -> FloatArray:
    return np.array([c.reference for c in counts], dtype=float)  # (n,)


def find_blocks(groups: Sequence[str | None] | None, n: int) -> tuple[NDArray[np.int64], Blocks]:
    """Number the rows by what is resampled: speakers where two are known, else clips."""
    if groups is not None and len(groups) != n:
        raise DataError(f"{n} rows but {len(groups)} groups; every row needs one, or None")
    if groups is None or len({group for group in groups if group is not None}) < 2:
        return np.arange(n), "clip"
    names = [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64), "speaker"
