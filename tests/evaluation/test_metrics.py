from __future__ import annotations

import jiwer
import numpy as np
import pytest
import scipy.stats

from src.evaluation.edits import EditCounts, error_rate, sum_counts, word_counts
from src.evaluation.metrics import Bootstrap, MetricsCalculator, compare_counts, rate_interval
from src.evaluation.text import PLAIN, get_normalizer
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
    words = jiwer.process_words(
        [get_normalizer(rates.normalizer)(text) for text in references],
        [get_normalizer(rates.normalizer)(text) for text in hypotheses],
    )
    assert (rates.mer, rates.wil) == (pytest.approx(words.mer), pytest.approx(words.wil))


def test_shares_of_rows_that_are_wrong_empty_or_loop() -> None:
    references = ["the cat", "a dog", "the mat", "", ""]
    hypotheses = ["the cat", "", "on the " * 9, "thank you", ""]
    rates = MetricsCalculator().compute(references, hypotheses)
    assert (rates.sentence_error_rate, rates.empty_rate, rates.loop_rate) == (3 / 5, 1 / 3, 1 / 5)
    assert (rates.empty_references, rates.hallucinated_words) == (2, 2)
    assert rates.insertions == 16 + 2
    many = MetricsCalculator().compute(
        ["the cat", "a dog"], ["the cat", "a dog"], durations_sec=[1.0, 1.0], num_tokens=[2, 30]
    )
    assert many.loop_rate == 1 / 2
    silent = MetricsCalculator().compute(["the cat"], [""])
    assert (silent.wer, silent.mer, silent.wil, silent.empty_rate) == (1.0, 1.0, 1.0, 1.0)


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


def test_one_clip_proves_nothing_about_two_systems() -> None:
    comparison = MetricsCalculator().compare(["the cat"], ["a dog"], ["the cat"])
    assert (comparison.difference, comparison.verdict) == (-1.0, "no difference shown")
    assert np.isnan(comparison.low)


@pytest.mark.parametrize("speakers", [["anna"] * 50, [None] * 50, ["anna"] * 25 + [None] * 25])
def test_clips_are_resampled_where_no_two_speakers_are_known(speakers: list[str | None]) -> None:
    rates = MetricsCalculator().compute(*corpus(50), speakers)
    assert (rates.blocks, rates.num_blocks) == ("clip", 50)
    assert rates.wer_low < rates.wer < rates.wer_high


def test_clips_without_a_speaker_are_blocks_of_their_own() -> None:
    rates = MetricsCalculator().compute(*corpus(5), ["a", "a", "b", None, None])
    assert (rates.blocks, rates.num_blocks) == ("speaker", 4)


def test_draws_without_a_word_leave_the_interval_finite() -> None:
    rates = MetricsCalculator().compute(["the cat", "", ""], ["the dog", "you", ""])
    assert np.isfinite([rates.wer_low, rates.wer_high]).all()


def test_interval_by_speaker_is_that_of_scipy_over_speakers() -> None:
    counts = word_counts(*corpus(200), PLAIN)
    speakers = np.arange(200) // 10
    errors = np.bincount(speakers, [c.errors for c in counts])
    words = np.bincount(speakers, [c.reference for c in counts])
    expected = scipy.stats.bootstrap(
        (errors, words), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    low, high = rate_interval(counts, [f"s{i}" for i in speakers], Bootstrap(samples=9999))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_paired_interval_is_that_of_scipy() -> None:
    references, first = corpus(150, error=0.5)
    a = word_counts(references, first, PLAIN)
    b = [EditCounts(c.substitutions // 2, c.deletions, c.insertions, c.reference) for c in a]
    gain = np.array([y.errors - x.errors for x, y in zip(a, b, strict=True)])
    words = np.array([c.reference for c in a])
    expected = scipy.stats.bootstrap(
        (gain, words), lambda g, w, axis: g.sum(axis) / w.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    comparison = compare_counts(a, b, bootstrap=Bootstrap(samples=9999))
    assert comparison.difference == pytest.approx(error_rate(b) - error_rate(a))
    assert (comparison.low, comparison.high) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_other_references_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="other references"):
        compare_counts([EditCounts(0, 0, 0, 3)], [EditCounts(0, 0, 0, 4)])


def test_the_seed_decides_the_interval() -> None:
    rows = corpus(40)
    assert MetricsCalculator(seed=1).compute(*rows) == MetricsCalculator(seed=1).compute(*rows)
    assert MetricsCalculator(seed=1).compute(*rows).wer_low != MetricsCalculator(seed=2).compute(*rows).wer_low
