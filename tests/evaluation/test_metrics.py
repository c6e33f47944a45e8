from __future__ import annotations

from typing import Any

import jiwer
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from src.evaluation import metrics
from src.evaluation.metrics import PLAIN, WHISPER_BASIC, WHISPER_ENGLISH, Bootstrap, EditCounts, MetricsCalculator
from src.utils.errors import ConfigError, DataError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "big", "red"]
LOOP = "and the " * 8
FEW_WORDS = st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat"]), max_size=8).map(" ".join)


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


def scipy_interval(errors: Any, words: Any) -> tuple[float, float]:
    found = scipy.stats.bootstrap(
        (errors, words), lambda e, w, axis: e.sum(axis) / w.sum(axis), paired=True, vectorized=True,
        n_resamples=9999, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    return pytest.approx((found.low, found.high), abs=0.005)


def test_rates_are_those_of_jiwer() -> None:
    references, hypotheses = corpus(200)
    counts = metrics.word_counts(references, hypotheses, PLAIN)
    output = jiwer.process_words(references, hypotheses)
    total = metrics.sum_counts(counts)
    found = (total.substitutions, total.deletions, total.insertions, metrics.error_rate(counts))
    assert found == (output.substitutions, output.deletions, output.insertions, pytest.approx(output.wer))
    rates = MetricsCalculator("en").compute(references, hypotheses)
    assert (rates.wer_plain, rates.cer_plain) == pytest.approx((output.wer, jiwer.cer(references, hypotheses)))
    normalize = metrics.get_normalizer(rates.normalizer)
    words = jiwer.process_words([normalize(text) for text in references], [normalize(text) for text in hypotheses])
    assert (rates.wer, rates.mer, rates.wil) == pytest.approx((words.wer, words.mer, words.wil))


def test_words_on_an_empty_reference_count_as_insertions() -> None:
    references, invented = ["the cat", ""], ["the cat", "thank you for watching"]
    rates = MetricsCalculator("en").compute(references, invented)
    assert (rates.wer, rates.insertions, rates.reference_words, rates.cer) == (2.0, 4, 2, 22 / 7)
    assert MetricsCalculator("en").compare(references, references, invented).difference == pytest.approx(4 / 2)
    assert np.isfinite([rates.wer_low, rates.wer_high]).all()  # draws without a word are left out


def test_shares_of_rows_that_are_wrong_empty_or_loop() -> None:
    rates = MetricsCalculator("en").compute(
        ["the cat", "a dog", "the mat", "", ""], ["the cat", "", "on the " * 9, "thank you", ""]
    )
    assert (rates.sentence_error_rate, rates.empty_rate, rates.loop_rate) == (3 / 5, 1 / 3, 1 / 5)
    assert (rates.empty_references, rates.hallucinated_words, rates.insertions) == (2, 2, 16 + 2)
    two = ["the cat", "a dog"]
    assert MetricsCalculator("en").compute(two, two, durations_sec=[1.0, 1.0], num_tokens=[2, 30]).loop_rate == 1 / 2
    silent = MetricsCalculator("en").compute(["the cat"], [""])
    assert (silent.wer, silent.mer, silent.wil, silent.empty_rate) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "duration_sec", "num_tokens", "expected"),
    [
        ("the cat sat", "the cat sat", 2.0, 4, False),
        ("the cat", LOOP, 10.0, 16, True),
        ("the cat", LOOP, None, None, True),
        (LOOP, LOOP, 10.0, 16, False),  # really said
        ("no", "no no no no", 2.0, 4, False),  # as people do
        ("no", "no no no no no no", 0.5, 6, True),  # twelve per second
        ("the cat", "a b c d e f g h", 1.0, 18, True),  # more tokens than anybody says
        ("the cat", "a b c d e f g h", 1.0, 17, False),
        ("the cat", "", 1.0, 0, False),
        ("", "", 1.0, 0, False),
    ],
)
def test_loops_and_impossible_rates_are_recognised(
    reference: str, hypothesis: str, duration_sec: float | None, num_tokens: int | None, expected: bool
) -> None:
    assert (
        metrics.is_loop(reference, hypothesis, duration_sec=duration_sec, num_tokens=num_tokens, language="en")
        is expected
    )


def test_intervals_are_those_of_scipy() -> None:
    references, hypotheses = corpus(200)
    counts = metrics.word_counts(references, hypotheses, PLAIN)
    errors, words = np.array([c.errors for c in counts]), np.array([c.reference_words for c in counts])
    by_clip = metrics.estimate_rate(counts, None, Bootstrap(9999))
    assert (by_clip.low, by_clip.high) == scipy_interval(errors, words)
    assert by_clip.low < by_clip.rate < by_clip.high
    speakers = np.arange(200) // 10
    by_speaker = metrics.estimate_rate(counts, [f"s{i}" for i in speakers], Bootstrap(9999))
    assert (by_speaker.low, by_speaker.high) == scipy_interval(
        np.bincount(speakers, errors), np.bincount(speakers, words)
    )
    half = [EditCounts(c.substitutions // 2, c.deletions, c.insertions, c.reference_words) for c in counts]
    paired = metrics.compare_counts(counts, half, bootstrap=Bootstrap(9999))
    assert paired.difference == pytest.approx(metrics.error_rate(half) - metrics.error_rate(counts))
    assert (paired.low, paired.high) == scipy_interval(np.array([c.errors for c in half]) - errors, words)


def test_speakers_are_resampled_where_two_are_known() -> None:
    for speakers, *blocks in (
        (["anna"] * 5, "clip", 5),
        ([None] * 5, "clip", 5),
        (["anna"] * 2 + [None] * 3, "clip", 5),
        (["anna", "anna", "bob", None, None], "speaker", 4),  # clips without a speaker are blocks of their own
    ):
        rates = MetricsCalculator("en").compute(*corpus(5), speakers)
        assert [rates.blocks, rates.num_blocks] == blocks


def test_paired_comparison_names_better_worse_and_no_difference() -> None:
    references, noisy = corpus(300, error=0.5)
    calculator = MetricsCalculator("en")
    assert calculator.compare(references, noisy, references).verdict == "better"
    assert calculator.compare(references, references, noisy).verdict == "worse"
    same = calculator.compare(references, noisy, noisy)
    assert (same.verdict, same.difference) == ("no difference shown", 0.0)
    one = calculator.compare(["the cat"], ["a dog"], ["the cat"])
    assert (one.difference, one.verdict) == (-1.0, "no difference shown")
    assert np.isnan([one.low, calculator.compute(["the cat"], ["the dog"]).wer_low]).all()
    first, again, other = (MetricsCalculator("en", bootstrap=Bootstrap(seed=n)).compute(*corpus(40)) for n in (1, 1, 2))
    assert first == again != other  # the seed decides


def test_what_cannot_be_measured_is_an_error() -> None:
    for references, hypotheses, groups, reason in (
        ([], [], None, "no rows"),
        (["a"], ["a", "b"], None, "1 references but 2 hypotheses"),
        (["", "..."], ["x", "y"], None, "none of the 2 references"),
        (["a", "b"], ["a", "b"], ["s"], "2 rows but 1 groups"),
    ):
        with pytest.raises(DataError, match=reason):
            MetricsCalculator("en").compute(references, hypotheses, groups)
    with pytest.raises(DataError, match="other references"):
        metrics.compare_counts([EditCounts(0, 0, 0, 3)], [EditCounts(0, 0, 0, 4)])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PLAIN, "Well-known.", "well known"),
        (PLAIN, "BOB'S dog, isn't it?", "bob's dog isn't it"),
        (PLAIN, "the ‘quoted’ word’s", "the quoted word's"),
        (PLAIN, "  spaces\n\tand  tabs ", "spaces and tabs"),
        (PLAIN, "ÉTÉ, naïve — 5 €", "été naïve 5"),
        (PLAIN, "你好，世界", "你好 世界"),
        (PLAIN, "...", ""),
        (WHISPER_ENGLISH, "The colour of Mr. Smith's centre", "the color of mister smith is center"),
        (WHISPER_ENGLISH, "BOB'S one five nine", "bob is 159"),  # its published quirks
        (WHISPER_ENGLISH, "uh [noise] well-known", "well known"),
        (WHISPER_ENGLISH, "hello...", "hello ."),
        (WHISPER_BASIC, "Grüße, Welt!", "grüße welt"),
    ],
)
def test_texts_as_each_normaliser_reads_them(name: str, text: str, expected: str) -> None:
    assert metrics.get_normalizer(name)(text) == expected


def test_language_chooses_whispers_normaliser() -> None:
    assert metrics.headline_normalizer("en") == WHISPER_ENGLISH
    assert metrics.headline_normalizer("de") == metrics.headline_normalizer(None) == PLAIN
    with pytest.raises(ConfigError, match="'plain-v2'"):
        metrics.get_normalizer("plain")


@given(text=st.text(max_size=20))
@pytest.mark.parametrize("name", metrics.NORMALIZERS)
def test_any_text_becomes_words_between_single_spaces(name: str, text: str) -> None:
    normalized = metrics.get_normalizer(name)(text)
    assert normalized == " ".join(normalized.split())
    if name == PLAIN:
        assert metrics.get_normalizer(name)(normalized) == normalized


def test_an_alignment_done_by_hand() -> None:
    steps = metrics.align_words("The cat sat on the big mat.", "a cat sat the big mat now", PLAIN)
    assert [(step.edit[0], step.reference, step.hypothesis) for step in steps] == [
        ("s", "the", "a"), ("e", "cat", "cat"), ("e", "sat", "sat"), ("d", "on", None), ("e", "the", "the"),
        ("e", "big", "big"), ("e", "mat", "mat"), ("i", None, "now"),
    ]  # fmt: skip


@given(FEW_WORDS, FEW_WORDS)
def test_an_alignment_has_the_counts_of_its_row_and_both_texts(reference: str, hypothesis: str) -> None:
    steps = metrics.align_words(reference, hypothesis, PLAIN)
    (counts,) = metrics.word_counts([reference], [hypothesis], PLAIN)
    edits = [step.edit for step in steps]
    found = (counts.substitutions, counts.deletions, counts.insertions, counts.hits)
    assert tuple(edits.count(edit) for edit in ("substitute", "delete", "insert", "equal")) == found
    assert " ".join(step.reference for step in steps if step.reference is not None) == reference
    assert " ".join(step.hypothesis for step in steps if step.hypothesis is not None) == hypothesis
    assert counts.hypothesis_words == len(hypothesis.split())
