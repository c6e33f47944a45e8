"""Word and character error rates over jiwer, with bootstrap intervals that respect speakers.

    WER = sum(S + D + I) / sum(N) over the corpus; CER likewise over characters
    MER = sum(S + D + I) / sum(H + S + D + I), WIL = 1 - sum(H)^2 / (sum(N) sum(P)), with H hits and P words put out
    (Morris, Maier & Green, Interspeech 2004)

An empty reference has N = 0 and its insertions count: a hallucination on silence is an error. Clips of one speaker are
not independent, so intervals resample speakers (Bisani & Ney, ICASSP 2004, with speakers as blocks). Without two known
speakers, clips are resampled: the interval then speaks of this voice's next clips, not of other voices.

Reports show rates under two normalisers, because they disagree: the plain one changes case and punctuation only;
Whisper's own, kept as published, joins digit words (`one five` is `15`), reads `BOB'S` as `bob is` and drops `uh`.
Neither cuts text that is written without spaces (Chinese, Japanese, Thai) into words: read the CER there.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Literal

import jiwer
import numpy as np
from numpy.typing import NDArray
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from src.inference.options import MIN_NEW_TOKENS
from src.inference.streaming.commit import find_loop
from src.inference.words import Word
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, did_you_mean
from src.utils.files import load_english_spelling

PLAIN = "plain-v1"
WHISPER_ENGLISH = "whisper-english-v1"
WHISPER_BASIC = "whisper-basic-v1"
NORMALIZERS = (PLAIN, WHISPER_ENGLISH, WHISPER_BASIC)
_KEPT_TEXTS = 16_384  # per normaliser: words, characters, loops and alignments of a test set use the same texts
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
MAX_TOKENS_PER_SEC = 8.0  # text tokens; fast speech has about 6
_UNKNOWN_WORD_SEC = 1.0  # if the duration is unknown: then only repetitions of many words count as a loop
_CHUNK_CELLS = 5_000_000  # resampled cells held at once: 40 MB
FloatArray = NDArray[np.float64]
Blocks = Literal["speaker", "clip"]
Verdict = Literal["better", "no difference shown", "worse"]


@cache
def get_normalizer(name: str) -> Callable[[str], str]:
    """Return a normaliser by name; it remembers the texts of a test set."""
    if name == PLAIN:
        return lru_cache(maxsize=_KEPT_TEXTS)(normalize_plain)
    if name not in NORMALIZERS:
        known = ", ".join(NORMALIZERS)
        raise ConfigError(f"unknown normaliser {name!r}{did_you_mean(name, NORMALIZERS)}; known: {known}")
    english = name == WHISPER_ENGLISH
    whisper = EnglishTextNormalizer(dict(load_english_spelling())) if english else BasicTextNormalizer()
    return lru_cache(maxsize=_KEPT_TEXTS)(lambda text: " ".join(whisper(text).split()))


def whisper_normalizer_for(language: str | None) -> str:
    """Return the name of Whisper's normaliser for a language; None means English."""
    return WHISPER_ENGLISH if language in (None, "en") else WHISPER_BASIC


def normalize_plain(text: str) -> str:
    """Lower case, punctuation and symbols to spaces ("well-known" has two words), apostrophes inside words kept."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_APOSTROPHES)
    spaced = "".join(c if c == "'" or unicodedata.category(c)[0] not in "PS" else " " for c in text)
    return " ".join(_LOOSE_APOSTROPHE.sub(" ", spaced).split())


@dataclass(frozen=True)
class EditCounts:
    """Word edits of one row, or of a sum of rows."""

    substitutions: int
    deletions: int
    insertions: int
    reference_words: int

    @property
    def errors(self) -> int:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def hits(self) -> int:
        """Words that are right, N - S - D."""
        return self.reference_words - self.substitutions - self.deletions

    @property
    def hypothesis_words(self) -> int:
        """Words of the hypothesis, N - D + I."""
        return self.reference_words - self.deletions + self.insertions


def word_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[EditCounts]:
    """Count the word edits of each row; words on an empty reference are insertions."""
    pairs = _normalized(references, hypotheses, normalizer)
    counts = [EditCounts(0, 0, len(hypothesis.split()), 0) for _, hypothesis in pairs]
    spoken = [i for i, (reference, _) in enumerate(pairs) if reference]
    if not spoken:
        return counts
    output = jiwer.process_words([pairs[i][0] for i in spoken], [pairs[i][1] for i in spoken])
    for i, words, alignment in zip(spoken, output.references, output.alignments, strict=True):
        edits: Counter[str] = Counter()
        for chunk in alignment:
            edits[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        counts[i] = EditCounts(edits["substitute"], edits["delete"], edits["insert"], len(words))
    return counts


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> float:
    """Return the corpus CER, spaces included; characters on an empty reference are insertions."""
    pairs = _normalized(references, hypotheses, normalizer)
    spoken = [pair for pair in pairs if pair[0]]
    if not spoken:
        raise _no_rate(len(pairs))
    output = jiwer.process_characters([reference for reference, _ in spoken], [hypothesis for _, hypothesis in spoken])
    invented = sum(len(hypothesis) for reference, hypothesis in pairs if not reference)
    errors: int = output.substitutions + output.deletions + output.insertions + invented
    return errors / sum(len(reference) for reference, _ in spoken)


def _normalized(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[tuple[str, str]]:
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references but {len(hypotheses)} hypotheses; every row needs both")
    if not references:
        raise DataError("no rows: there is nothing to measure")
    normalize = get_normalizer(normalizer)
    return [(normalize(a), normalize(b)) for a, b in zip(references, hypotheses, strict=True)]


def sum_counts(counts: Sequence[EditCounts]) -> EditCounts:
    """Add rows up."""
    names = ("substitutions", "deletions", "insertions", "reference_words")
    return EditCounts(*(sum(getattr(count, name) for count in counts) for name in names))


def error_rate(counts: Sequence[EditCounts]) -> float:
    """Return sum(S + D + I) / sum(N); without a word in any reference that is an error, neither 0 nor 1."""
    total = sum_counts(counts)
    if not total.reference_words:
        raise _no_rate(len(counts))
    return total.errors / total.reference_words


def _no_rate(rows: int) -> DataError:
    return DataError(
        f"none of the {rows} references has a word left after normalising, so no rate is defined; "
        "measure on rows with a transcript"
    )


@dataclass(frozen=True)
class AlignedWord:
    """One step of an alignment; the side that lacks a word is None."""

    edit: Literal["equal", "substitute", "delete", "insert"]
    reference: str | None
    hypothesis: str | None


def align_words(reference: str, hypothesis: str, normalizer: str) -> tuple[AlignedWord, ...]:
    """Align two texts word by word, as `word_counts` counts them; the words are those of the normalised texts."""
    ((reference, hypothesis),) = _normalized([reference], [hypothesis], normalizer)
    expected, found = reference.split(), hypothesis.split()
    if not expected:
        return tuple(AlignedWord("insert", None, word) for word in found)
    (chunks,) = jiwer.process_words(reference, hypothesis).alignments
    return tuple(
        AlignedWord(chunk.type, *words)
        for chunk in chunks
        for words in zip_longest(
            expected[chunk.ref_start_idx : chunk.ref_end_idx], found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        )
    )


@dataclass(frozen=True)
class Bootstrap:
    """How percentile intervals are drawn: number of resamples, confidence, seed."""

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    @classmethod
    def from_config(cls, config: Config) -> Bootstrap:
        """Return the settings of a configuration."""
        return cls(config.evaluation.bootstrap_samples, config.evaluation.confidence, config.seed)

    def interval(self, errors: FloatArray, words: FloatArray, block_ids: NDArray[np.int64]) -> tuple[float, float]:
        """Return the interval of sum(errors) / sum(words) when blocks are drawn with replacement.

        Args:
            errors: (n,) of each row; may be differences of two systems.
            words: (n,) of each row.
            block_ids: (n,) in 0..blocks - 1.

        Returns:
            Low and high; nan with fewer than two blocks. A draw without a word has no rate and is left out.
        """
        count = int(block_ids.max()) + 1
        if count < 2:
            return math.nan, math.nan
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
        return self.percentiles(np.concatenate(rates))

    def percentiles(self, drawn: Sequence[float] | FloatArray) -> tuple[float, float]:
        """Return the ends of the interval, given resampled values."""
        tail = 100 * (1 - self.confidence) / 2
        low, high = np.percentile(drawn, [tail, 100 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class WerEstimate:
    """A corpus WER with its bootstrap interval, which is nan with one block and too narrow under about ten."""

    wer: float
    low: float
    high: float
    blocks: Blocks  # what was resampled
    num_blocks: int


def estimate_wer(
    counts: Sequence[EditCounts], groups: Sequence[str | None] | None, bootstrap: Bootstrap
) -> WerEstimate:
    """Return `error_rate` with its interval; `groups` has the speaker of each row, or None."""
    block_ids, blocks = _find_blocks(groups, len(counts))
    wer = error_rate(counts)  # first: without words there is no interval either
    errors, words = _columns(counts)
    low, high = bootstrap.interval(errors, words, block_ids)
    return WerEstimate(wer, low, high, blocks, int(block_ids.max()) + 1)


@dataclass(frozen=True)
class PairedComparison:
    """Difference in WER, second minus first, on the same rows, with its paired bootstrap interval."""

    difference: float  # negative is better
    low: float
    high: float
    verdict: Verdict  # "better" or "worse" only if zero is outside the interval
    blocks: Blocks
    num_blocks: int


def compare_counts(
    first: Sequence[EditCounts],
    second: Sequence[EditCounts],
    groups: Sequence[str | None] | None = None,
    bootstrap: Bootstrap | None = None,
) -> PairedComparison:
    """Compare two systems by the counts of their rows, which must be of the same references in the same order."""
    if [a.reference_words for a in first] != [b.reference_words for b in second]:
        raise DataError("the two systems have other references; compare them on the same rows, in the same order")
    difference = error_rate(second) - error_rate(first)
    block_ids, blocks = _find_blocks(groups, len(first))
    (errors, words), (second_errors, _) = _columns(first), _columns(second)
    low, high = (bootstrap or Bootstrap()).interval(second_errors - errors, words, block_ids)
    verdict: Verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"  # nan: neither
    return PairedComparison(difference, low, high, verdict, blocks, int(block_ids.max()) + 1)


def _find_blocks(groups: Sequence[str | None] | None, n: int) -> tuple[NDArray[np.int64], Blocks]:
    """Number the rows by what is resampled: speakers if two are known, otherwise clips."""
    if groups is not None and len(groups) != n:
        raise DataError(f"{n} rows but {len(groups)} groups; every row needs one, or None")
    if groups is None or len(set(groups) - {None}) < 2:
        return np.arange(n), "clip"
    names = [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64), "speaker"


def _columns(counts: Sequence[EditCounts]) -> FloatArray:
    return np.array([(c.errors, c.reference_words) for c in counts], dtype=float).T  # (2, n)


@dataclass(frozen=True, kw_only=True)
class ErrorRates(EditCounts):
    """Corpus rates of one set of rows; rates are fractions, and a WER may exceed 1."""

    n: int  # rows
    normalizer: str  # of `wer`, `cer` and the counts; the `_plain` rates use "plain-v1"
    wer: float
    wer_low: float  # ends of the bootstrap interval: nan with one block
    wer_high: float
    cer: float
    wer_plain: float
    wer_plain_low: float
    wer_plain_high: float
    cer_plain: float
    mer: float  # match error rate
    wil: float  # word information lost
    sentence_error_rate: float  # share of rows with any error
    loop_rate: float  # share of rows that `is_loop` finds
    empty_rate: float  # share of the rows with a spoken reference whose hypothesis is empty
    empty_references: int  # rows whose reference has no word
    hallucinated_words: int  # put out on them; these count in `insertions` too
    blocks: Blocks  # what was resampled
    num_blocks: int  # under about ten the interval is too narrow
    confidence: float  # of the `Bootstrap`, like the next two: the interval can be drawn again
    bootstrap_samples: int
    bootstrap_seed: int


class MetricsCalculator:
    """Rates with intervals; `language` chooses Whisper's normaliser, and None means English."""

    def __init__(self, language: str | None = "en", *, bootstrap: Bootstrap | None = None) -> None:
        self.normalizer = whisper_normalizer_for(language)
        self.bootstrap = bootstrap or Bootstrap()

    def compute(
        self,
        references: Sequence[str],
        hypotheses: Sequence[str],
        groups: Sequence[str | None] | None = None,
        *,
        durations_sec: Sequence[float] | None = None,
        num_tokens: Sequence[int | None] | None = None,
    ) -> ErrorRates:
        """Compute rates over rows of raw texts, which are normalised here.

        `groups` has the speaker of each row; rows without one are blocks of their own. With durations and numbers of
        tokens, `loop_rate` counts impossible rates of tokens too. Without any word in the references there is no rate.
        """
        words = word_counts(references, hypotheses, self.normalizer)
        wer = estimate_wer(words, groups, self.bootstrap)
        plain = estimate_wer(word_counts(references, hypotheses, PLAIN), groups, self.bootstrap)
        total = sum_counts(words)
        spoken = [count for count in words if count.reference_words]
        silent = [count for count in words if not count.reference_words]
        normalize, unknown = get_normalizer(self.normalizer), [None] * len(references)
        rows = zip(references, hypotheses, durations_sec or unknown, num_tokens or unknown, strict=True)
        loops = [is_loop(normalize(a), normalize(b), duration_sec=sec, num_tokens=tokens) for a, b, sec, tokens in rows]
        return ErrorRates(
            **vars(total), n=len(words), normalizer=self.normalizer,
            wer=wer.wer, wer_low=wer.low, wer_high=wer.high,
            cer=character_error_rate(references, hypotheses, self.normalizer),
            wer_plain=plain.wer, wer_plain_low=plain.low, wer_plain_high=plain.high,
            cer_plain=character_error_rate(references, hypotheses, PLAIN),
            mer=total.errors / (total.hits + total.errors),
            wil=1 - (total.hits / total.reference_words) * (total.hits / max(1, total.hypothesis_words)),
            sentence_error_rate=sum(count.errors > 0 for count in words) / len(words),
            loop_rate=sum(loops) / len(words),
            empty_rate=sum(count.hypothesis_words == 0 for count in spoken) / len(spoken),
            empty_references=len(silent),
            hallucinated_words=sum(count.insertions for count in silent),
            blocks=wer.blocks, num_blocks=wer.num_blocks, confidence=self.bootstrap.confidence,
            bootstrap_samples=self.bootstrap.samples, bootstrap_seed=self.bootstrap.seed,
        )  # fmt: skip

    def compare(
        self,
        references: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        groups: Sequence[str | None] | None = None,
    ) -> PairedComparison:
        """Compare two systems on the same rows by a paired bootstrap; errors are those of `compute`."""
        before, after = (word_counts(references, texts, self.normalizer) for texts in (first, second))
        return compare_counts(before, after, groups, self.bootstrap)


def is_loop(
    reference: str, hypothesis: str, *, duration_sec: float | None = None, num_tokens: int | None = None
) -> bool:
    """Whether a hypothesis repeats itself as no speaker does, or has more tokens than fit into its audio.

    A repetition is what `find_loop` calls one, with the words spread evenly over the clip, unless the reference has one
    too: some people are recorded counting. A corpus rate hides loops: one such clip adds as many errors as a hundred
    that are slightly wrong. Both texts are normalised alike; the duration is that of the clip without padding.
    """
    most_tokens = math.inf if duration_sec is None else MIN_NEW_TOKENS + MAX_TOKENS_PER_SEC * duration_sec
    if num_tokens is not None and num_tokens > most_tokens:
        return True

    def repeats(said: str) -> bool:
        words = said.split()
        step_sec = _UNKNOWN_WORD_SEC if duration_sec is None else duration_sec / max(1, len(words))
        timed = [Word(word, i * step_sec, (i + 1) * step_sec, 1.0) for i, word in enumerate(words)]
        return find_loop(timed) is not None

    return repeats(hypothesis) and not repeats(reference)
