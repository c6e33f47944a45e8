from __future__ import annotations

import jiwer
import numpy as np
import pytest
import scipy.stats

from src.evaluation.metrics import MetricsCalculator, error_rate, sum_counts, word_counts
from src.evaluation.text import PLAIN
from src.utils.errors import DataError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "big", "red"]


def corpus(n: int, seed: int = 0, error: float = 0.3) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(n)]
    hypotheses = [
        " ".join(
            str(rng.choice(WORDS)) if rng.random() < error else word
            for word in reference.split()
            if rng.random() > 0.05
        )
        for reference in references
    ]
    return references, hypotheses


@pytest.mark.parametrize(
    ("reference", "hypothesis", "s", "d", "i", "n"),
    [
        ("the cat sat", "the cat sat", 0, 0, 0, 3),
        ("the cat sat", "the dog sat", 1, 0, 0, 3),
        ("the cat sat", "the sat", 0, 1, 0, 3),
        ("the cat sat", "the big cat sat", 0, 0, 1, 3),
        ("the cat sat", "", 0, 3, 0, 3),
        ("a b c d", "b x d e", 1, 1, 1, 4),
    ],
)
def test_counts_of_cases_aligned_by_hand(reference: str, hypothesis: str, s: int, d: int, i: int, n: int) -> None:
    (counts,) = word_counts([reference], [hypothesis], PLAIN)
    assert (counts.substitutions, counts.deletions, counts.insertions, counts.reference) == (s, d, i, n)


def test_words_on_an_empty_reference_count_as_insertions() -> None:
    clean = MetricsCalculator().compare(["the cat", ""], ["the cat", ""], ["the cat", "thank you for watching"])
    assert clean.difference == pytest.approx(4 / 2)
    rates = MetricsCalculator().compute(["the cat", ""], ["the cat", "thank you for watching"])
    assert (rates.wer, rates.insertions, rates.reference_words) == (2.0, 4, 2)
    assert rates.cer > 0


def test_rates_are_those_of_jiwer() -> None:
    references, hypotheses = corpus(200)
    counts = word_counts(references, hypotheses, PLAIN)
    output = jiwer.process_words(references, hypotheses)
    total = sum_counts(counts)
    assert error_rate(counts) == pytest.approx(output.wer)
    assert (total.substitutions, total.deletions, total.insertions) == (
        output.substitutions,
        output.deletions,
        output.insertions,
    )
    rates = MetricsCalculator().compute(references, hypotheses)
    assert rates.cer_plain == pytest.approx(jiwer.cer(references, hypotheses))
    assert rates.wer_plain == pytest.approx(output.wer)


def test_interval_by_clip_is_that_of_scipy() -> None:
    references, hypotheses = corpus(150)
    counts = word_counts(references, hypotheses, PLAIN)
    errors, words = np.array([c.errors for c in counts]), np.array([c.reference for c in counts])
    expected = scipy.stats.bootstrap(
        (errors, words), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    rates = MetricsCalculator(bootstrap_samples=9999).compute(references, hypotheses)
    assert rates.wer_plain_low == pytest.approx(expected.low, abs=0.005)
    assert rates.wer_plain_high == pytest.approx(expected.high, abs=0.005)
    assert rates.wer_plain_low < rates.wer_plain < rates.wer_plain_high


def test_interval_by_speaker_is_wider_where_speakers_differ() -> None:
    good, bad = corpus(100, seed=1, error=0.05), corpus(100, seed=2, error=0.7)
    references, hypotheses = good[0] + bad[0], good[1] + bad[1]
    speakers = [f"s{i // 20}" for i in range(200)]
    by_clip = MetricsCalculator().compute(references, hypotheses)
    by_speaker = MetricsCalculator().compute(references, hypotheses, speakers)
    assert (by_speaker.blocks, by_speaker.num_blocks) == ("speaker", 10)
    assert (by_clip.blocks, by_clip.num_blocks) == ("clip", 200)
    assert by_speaker.wer_high - by_speaker.wer_low > 1.5 * (by_clip.wer_high - by_clip.wer_low)


def test_paired_comparison_names_better_worse_and_no_difference() -> None:
    references, noisy = corpus(300, error=0.5)
    _, similar = corpus(300, error=0.5, seed=0)
    calculator = MetricsCalculator()
    assert calculator.compare(references, noisy, references).verdict == "better"
    assert calculator.compare(references, references, noisy).verdict == "worse"
    same = calculator.compare(references, noisy, similar)
    assert (same.verdict, same.difference) == ("no difference shown", 0.0)


def test_one_row_has_a_rate_and_no_interval() -> None:
    rates = MetricsCalculator().compute(["the cat"], ["the dog"])
    assert rates.wer == 0.5
    assert np.isnan(rates.wer_low)


@pytest.mark.parametrize(
    ("references", "hypotheses", "groups", "reason"),
    [
        ([], [], None, "no rows"),
        (["a"], ["a", "b"], None, "1 references but 2 hypotheses"),
        (["", "..."], ["x", "y"], None, "none of the 2 references has a word"),
        (["a", "b"], ["a", "b"], ["s"], "2 rows but 1 groups"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    references: list[str], hypotheses: list[str], groups: list[str] | None, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        MetricsCalculator().compute(references, hypotheses, groups)
