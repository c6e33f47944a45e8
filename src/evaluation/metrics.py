"""Word and character error rates over jiwer, with bootstrap intervals that respect speakers.

    WER = sum(S + D + I) / sum(N) over the corpus; CER likewise over characters
    MER = sum(S + D + I) / sum(H + S + D + I), WIL = 1 - sum(H)^2 / (sum(N) sum(P)), with H hits and P words put out
    (Morris, Maier & Green, Interspeech 2004)

The headline is the WER; for languages written without spaces the CER, since a sentence would be one word; for rows in
several languages the mean of their headlines, each language counting alike. An empty reference has N = 0 and its
insertions count: a hallucination on silence is an error. Clips of one speaker are not independent, so intervals
resample speakers (Bisani & Ney, ICASSP 2004, with speakers as blocks). Without two known speakers, clips are resampled:
the interval then speaks of this voice's next clips, not of other voices.

Percentiles of resamples of n blocks are too narrow: by sqrt((n - 1) / n), and as the normal quantile is to Student's
(Hesterberg, What Teachers Should Know About the Bootstrap, 2015). Both ends are moved away from the estimate by the
inverse of these; his own way, percentiles further out, stops at the extremes of the blocks, of which there are few. Of
the verdicts on equal systems 5 to 7 % are then false, with 5 speakers as with 40; of plain percentiles 16 and 7 %.

Rates are measured under two normalisers, because they disagree: the plain one changes case and punctuation only, and
keeps combining marks, which are vowels in many scripts; Whisper's own, kept as published, joins English digit words
(`one five` is `15`), reads `BOB'S` as `bob is`, and drops combining marks. The headline of English is Whisper's, that
of all other languages is plain. A normaliser's name says what its units are, words or characters.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import jiwer
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from src.data.labels import MIN_NEW_TOKENS
from src.inference.streaming.commit import CALM_PER_SEC, find_loop
from src.inference.words import Word, word_ranges
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, MissingDependencyError, did_you_mean
from src.utils.files import load_english_spelling
from src.utils.languages import (
    UNSPACED,
    code_of_language,
    is_unspaced_text,
    max_tokens_per_sec,
    normalize_plain,
    text_language,
)

PLAIN = "plain-v2"
PLAIN_TURKIC = "plain-v2-tr"  # of Turkish and Azerbaijani: the dotless i is a letter of its own
PLAIN_UNSPACED = "plain-v2-unspaced"  # units are characters
PLAIN_CHINESE = "plain-v2-zh"  # likewise, in simplified characters
WHISPER_ENGLISH = "whisper-english-v1"
WHISPER_BASIC = "whisper-basic-v1"
WHISPER_UNSPACED = "whisper-basic-v1-unspaced"
_SECOND = {
    WHISPER_ENGLISH: PLAIN,
    **dict.fromkeys((PLAIN, PLAIN_TURKIC), WHISPER_BASIC),
    **dict.fromkeys((PLAIN_UNSPACED, PLAIN_CHINESE), WHISPER_UNSPACED),
}
NORMALIZERS = tuple(dict.fromkeys([*_SECOND, *_SECOND.values()]))
_OF_CHARACTERS = frozenset({PLAIN_UNSPACED, PLAIN_CHINESE, WHISPER_UNSPACED})
_OLD_NAMES = {"plain-v1": PLAIN}  # in the files of older runs
UNKNOWN = "unknown"  # name of the language of rows that say none
_KEPT_TEXTS = 16_384  # per normaliser: words, characters, loops and alignments of a test set use the same texts
_SLOWEST_WORD_SEC = 0.99 / CALM_PER_SEC  # no repetition that the reference lacks is a verse
_CHUNK_CELLS = 5_000_000  # resampled cells held at once: 40 MB
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Marks = Sequence[str | None] | None  # a speaker or a language of each row, where there is one
Blocks = Literal["speaker", "clip"]
Metric = Literal["WER", "CER", "mean"]
Verdict = Literal["better", "no difference shown", "worse", "too few to tell"]
MIN_BLOCKS = 5  # for a verdict: four that agree do so by chance one time in eight


def headline_normalizer(language: str | None, texts: Iterable[str] = ()) -> str:
    """Return the name of the headline's normaliser: by Whisper's code, else plain, for the script of the references."""
    if language == "en":
        return WHISPER_ENGLISH
    if language in ("zh", "yue"):
        return PLAIN_CHINESE
    if language in UNSPACED or (language is None and is_unspaced_text(" ".join(texts))):
        return PLAIN_UNSPACED
    return PLAIN_TURKIC if language in ("tr", "az") else PLAIN


def second_normalizer(language: str | None, texts: Iterable[str] = ()) -> str:
    """Return the name of the normaliser of the second column: plain for English, else Whisper's basic one."""
    return _SECOND[headline_normalizer(language, texts)]


def counts_characters(normalizer: str) -> bool:
    """Whether the units of a normaliser are characters, not words."""
    return normalizer in _OF_CHARACTERS


def metric_of(normalizer: str) -> Literal["WER", "CER"]:
    """Return what errors over the units of a normaliser are."""
    return "CER" if counts_characters(normalizer) else "WER"


@cache
def get_normalizer(name: str) -> Callable[[str], str]:
    """Return a normaliser by name; it remembers the texts of a test set."""
    name = _OLD_NAMES.get(name, name)
    if name not in NORMALIZERS:
        known = ", ".join(NORMALIZERS)
        raise ConfigError(f"unknown normaliser {name!r}{did_you_mean(name, NORMALIZERS)}; known: {known}")
    normalize: Callable[[str], str]
    if name in (PLAIN, PLAIN_TURKIC):
        normalize = partial(normalize_plain, language="tr" if name == PLAIN_TURKIC else None)
    elif name in (PLAIN_UNSPACED, PLAIN_CHINESE):
        normalize = partial(_normalize_unspaced, simplifier=_simplifier() if name == PLAIN_CHINESE else None)
    else:
        english = name == WHISPER_ENGLISH
        whisper = EnglishTextNormalizer(dict(load_english_spelling())) if english else BasicTextNormalizer()
        space = "" if name == WHISPER_UNSPACED else " "
        normalize = lambda text: space.join(whisper(text).split())  # noqa: E731
    return lru_cache(maxsize=_KEPT_TEXTS)(normalize)


def _normalize_unspaced(text: str, *, simplifier: Any) -> str:
    text = unicodedata.normalize("NFC", "".join(normalize_plain(text).split()))
    if simplifier is not None:
        # twice: the first time leaves characters of phrases (乾清宮) that simplified texts do not have
        text = simplifier.convert(simplifier.convert(text)).replace("著", "着")  # one character in Taiwan
    return text


def _simplifier() -> Any:
    try:
        from opencc import OpenCC  # loads dictionaries
    except ImportError as err:
        raise MissingDependencyError(
            f"Chinese is counted in simplified characters, which needs opencc ({err}): pip install opencc, and restart "
            "the runtime"
        ) from err
    return OpenCC("t2s")


@dataclass(frozen=True)
class EditCounts:
    """Edits of one row, or of a sum of rows, in units of its normaliser: words, or characters."""

    substitutions: int
    deletions: int
    insertions: int
    reference_words: int  # units of the reference

    @property
    def errors(self) -> int:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def hits(self) -> int:
        """Units that are right, N - S - D."""
        return self.reference_words - self.substitutions - self.deletions

    @property
    def hypothesis_words(self) -> int:
        """Units of the hypothesis, N - D + I."""
        return self.reference_words - self.deletions + self.insertions


def word_counts(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str, *, characters: bool = False
) -> list[EditCounts]:
    """Count the edits of each row; units on an empty reference are insertions.

    `characters` counts characters under a normaliser of words too, with single spaces between the words.
    """
    pairs = _normalized(references, hypotheses, normalizer)
    characters = characters or counts_characters(normalizer)
    units: Callable[[str], Sequence[str]] = list if characters else str.split
    counts = [EditCounts(0, 0, len(units(hypothesis)), 0) for _, hypothesis in pairs]
    spoken = [i for i, (reference, _) in enumerate(pairs) if reference]
    if not spoken:
        return counts
    align: Callable[..., Any] = jiwer.process_characters if characters else jiwer.process_words
    output = align([pairs[i][0] for i in spoken], [pairs[i][1] for i in spoken])
    for i, expected, alignment in zip(spoken, output.references, output.alignments, strict=True):
        edits: Counter[str] = Counter()
        for chunk in alignment:
            edits[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        counts[i] = EditCounts(edits["substitute"], edits["delete"], edits["insert"], len(expected))
    return counts


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
    """One step of an alignment, a word or a character; the side that lacks one is None."""

    edit: Literal["equal", "substitute", "delete", "insert"]
    reference: str | None
    hypothesis: str | None


def align_words(reference: str, hypothesis: str, normalizer: str) -> tuple[AlignedWord, ...]:
    """Align two texts unit by unit, as `word_counts` counts them; the units are those of the normalised texts."""
    ((reference, hypothesis),) = _normalized([reference], [hypothesis], normalizer)
    units: Callable[[str], Sequence[str]] = list if counts_characters(normalizer) else str.split
    expected, found = units(reference), units(hypothesis)
    if not expected:
        return tuple(AlignedWord("insert", None, unit) for unit in found)
    align: Callable[..., Any] = jiwer.process_characters if counts_characters(normalizer) else jiwer.process_words
    (chunks,) = align(reference, hypothesis).alignments
    return tuple(
        AlignedWord(chunk.type, *units)
        for chunk in chunks
        for units in zip_longest(
            expected[chunk.ref_start_idx : chunk.ref_end_idx], found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        )
    )


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: number of resamples, confidence, seed."""

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    @classmethod
    def from_config(cls, config: Config) -> Bootstrap:
        """Return the settings of a configuration."""
        return cls(config.evaluation.bootstrap_samples, config.evaluation.confidence, config.seed)

    def interval(
        self, errors: FloatArray, words: FloatArray, block_ids: IntArray, strata: IntArray | None = None
    ) -> tuple[float, float]:
        """Return the interval of the mean over strata of sum(errors) / sum(words), drawing blocks with replacement.

        Args:
            errors: (n,) of each row; may be differences of two systems.
            words: (n,) of each row.
            block_ids: (n,) in 0..blocks - 1. A block is drawn among those of the stratum of its first row.
            strata: (n,) in 0..strata - 1, such as languages; one by default.

        Returns:
            Low and high; nan with fewer than two blocks in a stratum. A draw in which a stratum has no word is left
            out.
        """
        strata = np.zeros_like(block_ids) if strata is None else strata
        each_stratum, count = range(int(strata.max()) + 1), int(block_ids.max()) + 1
        if min(len(np.unique(block_ids[strata == each])) for each in each_stratum) < 2:
            return math.nan, math.nan
        homes = strata[np.unique(block_ids, return_index=True)[1]]  # (blocks,)
        members = [np.flatnonzero(homes == home) for home in np.unique(homes)]
        sums = [
            [np.bincount(block_ids, np.where(strata == each, values, 0), minlength=count) for values in (errors, words)]
            for each in each_stratum
        ]
        rng = np.random.default_rng(self.seed)
        step = max(1, _CHUNK_CELLS // count)
        rates = []
        for at in range(0, self.samples, step):
            size = min(step, self.samples - at)
            drawn = np.hstack([own[rng.integers(0, len(own), size=(size, len(own)))] for own in members])
            denominators = [block_words[drawn].sum(axis=1) for _, block_words in sums]
            spoken = np.all([each > 0 for each in denominators], axis=0)
            parts = [
                block_errors[drawn].sum(axis=1)[spoken] / denominator[spoken]
                for (block_errors, _), denominator in zip(sums, denominators, strict=True)
            ]
            rates.append(np.mean(parts, axis=0))
        whole = [(of_errors.sum() / of_words.sum(), of_words.sum()) for of_errors, of_words in sums]
        pulls = np.sum(  # (blocks,): of each block on the mean
            [(each[0] - rate * each[1]) / total for each, (rate, total) in zip(sums, whole, strict=True)], axis=0
        )
        moved = [own for own in members if len(own) > 1]
        variances = [len(own) * float(pulls[own].var(ddof=1)) for own in moved]
        estimate = float(np.mean([rate for rate, _ in whole]))
        return self.ends(np.concatenate(rates), estimate, [len(own) for own in moved], variances)

    def ends(
        self, drawn: Sequence[float] | FloatArray, estimate: float, blocks: Sequence[int],
        variances: Sequence[float] = (1.0,),
    ) -> tuple[float, float]:  # fmt: skip
        """Return the ends of the interval, given resampled values and the value of the whole; nan without any.

        Each stratum has `blocks` blocks, at least two; `variances`, what it adds to that of the estimate in any unit,
        weigh the strata's degrees of freedom (Satterthwaite).
        """
        if not len(drawn):
            return math.nan, math.nan
        sizes, weights = np.array(blocks, dtype=float), np.array(variances)
        weights = weights / weights.sum() if weights.sum() else np.full(len(sizes), 1 / len(sizes))
        freedom = 1 / (weights**2 / (sizes - 1)).sum()
        tail = (1 - self.confidence) / 2
        widening = stdtrit(freedom, 1 - tail) / ndtri(1 - tail) / math.sqrt((weights * (sizes - 1) / sizes).sum())
        low, high = estimate + widening * (np.quantile(drawn, [tail, 1 - tail]) - estimate)
        return float(low), float(high)


class Kind(NamedTuple):
    """What decides how a row is counted."""

    language: str  # `UNKNOWN` for rows that say none
    normalizer: str


_POOLED = Kind(UNKNOWN, PLAIN)  # of rows that are counted together whatever their language


@dataclass(frozen=True, kw_only=True)
class RateEstimate:
    """A headline with its bootstrap interval, which is nan with one block."""

    metric: Metric  # "mean": of the headlines of several languages, each counting alike
    rate: float
    low: float
    high: float
    blocks: Blocks  # what was resampled
    num_blocks: int


def estimate_rate(
    counts: Sequence[EditCounts], groups: Marks = None, bootstrap: Bootstrap | None = None, *,
    kinds: Sequence[Kind] | None = None,
) -> RateEstimate:  # fmt: skip
    """Return the headline of rows with its interval.

    `groups` has the speaker of each row, or None; without `kinds` all rows count words in one language.
    Rows in a language without any unit in its references count with the largest language: what a model invents on
    silence is an error, whatever it takes the silence for. Without a unit in any reference the rate is nan.
    """
    strata, _, metric = _find_strata(counts, kinds)
    block_ids, blocks = _find_blocks(groups, strata)
    errors, words = _columns(counts)
    rate = low = high = math.nan
    if words.any():
        rate = _mean_rate(errors, words, strata)
        low, high = (bootstrap or Bootstrap()).interval(errors, words, block_ids, strata)
        low = 0.0 if low < 0 else low  # no rate is below
    return RateEstimate(
        metric=metric, rate=rate, low=low, high=high, blocks=blocks, num_blocks=int(block_ids.max()) + 1
    )


def _mean_rate(errors: FloatArray, words: FloatArray, strata: IntArray) -> float:
    return float(np.mean(np.bincount(strata, errors) / np.bincount(strata, words)))


@dataclass(frozen=True)
class PairedComparison:
    """Difference in the headline, second minus first, on the same rows, with its paired bootstrap interval."""

    difference: float  # negative is better
    low: float
    high: float
    verdict: Verdict  # "better" or "worse" only if zero is outside the interval, of `MIN_BLOCKS` or more
    blocks: Blocks
    num_blocks: int
    metric: Metric = "WER"


def compare_counts(
    first: Sequence[EditCounts], second: Sequence[EditCounts], groups: Marks = None,
    bootstrap: Bootstrap | None = None, *, kinds: Sequence[Kind] | None = None,
) -> PairedComparison:  # fmt: skip
    """Compare two systems by the counts of their rows, which must be of the same references in the same order."""
    if [a.reference_words for a in first] != [b.reference_words for b in second]:
        raise DataError("the two systems have other references; compare them on the same rows, in the same order")
    if not any(count.reference_words for count in first):
        raise _no_rate(len(first))
    strata, _, metric = _find_strata(first, kinds)
    block_ids, blocks = _find_blocks(groups, strata)
    (errors, words), (second_errors, _) = _columns(first), _columns(second)
    difference = _mean_rate(second_errors, words, strata) - _mean_rate(errors, words, strata)
    low, high = (bootstrap or Bootstrap()).interval(second_errors - errors, words, block_ids, strata)
    num_blocks = int(block_ids.max()) + 1
    verdict: Verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"  # nan: neither
    if num_blocks < MIN_BLOCKS:
        verdict = "too few to tell"
    return PairedComparison(difference, low, high, verdict, blocks, num_blocks, metric)


def _find_strata(counts: Sequence[EditCounts], kinds: Sequence[Kind] | None) -> tuple[IntArray, list[Kind], Metric]:
    """Number the rows by language; those in a language without a unit join the largest."""
    kinds = [_POOLED] * len(counts) if kinds is None else kinds
    sizes: Counter[Kind] = Counter()
    for count, kind in zip(counts, kinds, strict=True):
        sizes[kind] += count.reference_words
    largest = max(sizes, key=lambda kind: sizes[kind])
    ordered = sorted(kind for kind in sizes if sizes[kind] or kind == largest)
    strata = [ordered.index(kind if sizes[kind] else largest) for kind in kinds]
    metric: Metric = "mean" if len(ordered) > 1 else metric_of(largest.normalizer)
    return np.array(strata, dtype=np.int64), ordered, metric


def _find_blocks(groups: Marks, strata: IntArray) -> tuple[IntArray, Blocks]:
    """Number the rows by what is resampled: a language's speakers if two are known, otherwise its clips."""
    if groups is not None and len(groups) != len(strata):
        raise DataError(f"{len(strata)} rows but {len(groups)} groups; every row needs one, or None")
    speakers: dict[int, set[str]] = {int(stratum): set() for stratum in strata}
    for group, stratum in zip(groups or (), strata, strict=groups is not None):
        speakers[int(stratum)] |= set() if group is None else {group}
    few = {stratum for stratum, known in speakers.items() if len(known) < 2}
    if groups is None or len(few) == len(speakers):
        return np.arange(len(strata)), "clip"
    names = [
        f"row {i}" if group is None or int(stratum) in few else f"group {group}"
        for i, (group, stratum) in enumerate(zip(groups, strata, strict=True))
    ]
    return np.unique(names, return_inverse=True)[1].astype(np.int64), "clip" if few else "speaker"


def _columns(counts: Sequence[EditCounts]) -> FloatArray:
    return np.array([(c.errors, c.reference_words) for c in counts], dtype=float).T  # (2, n)


@dataclass(frozen=True, kw_only=True)
class LanguageRate(RateEstimate):
    """The headline of the rows in one language."""

    n: int  # rows
    reference_words: int  # units
    normalizer: str


@dataclass(frozen=True, kw_only=True)
class ErrorRates(EditCounts):
    """Corpus rates of one set of rows; rates are fractions, and a WER may exceed 1.

    The counts are those of the headline: in several languages, the sums of words and characters.
    """

    n: int  # rows
    metric: Metric  # of the headline
    rate: float  # the headline
    low: float  # ends of the bootstrap interval: nan with one block
    high: float
    rates_by_language: Mapping[str, LanguageRate]  # `UNKNOWN` for rows that say none
    normalizer: str  # of the headline, the counts, `wer` and `cer`; of several languages all, joined by " + "
    second_normalizer: str  # likewise, of the headline's metric in the `second_` rates
    second_rate: float
    second_low: float
    second_high: float
    wer: float  # of the rows in languages with spaces, nan without any
    wer_low: float
    wer_high: float
    cer: float  # with the spaces between words, but of characters alone in languages without spaces
    cer_low: float
    cer_high: float
    wer_plain: float  # under the plain normaliser of each language
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
    truncated: int  # rows whose text ended at a limit
    blocks: Blocks  # what was resampled
    num_blocks: int
    confidence: float  # of the `Bootstrap`, like the next two: the interval can be drawn again
    bootstrap_samples: int
    bootstrap_seed: int


class MetricsCalculator:
    """Rates with intervals.

    Args:
        language: Whisper's code, or another mark, of rows without one of their own. None: their headline follows their
            script, under the plain normaliser.
        task: the texts of "translate" are English, whatever is spoken.
        bootstrap: how intervals are drawn.
    """

    def __init__(
        self, language: str | None = None, *, task: str = "transcribe", bootstrap: Bootstrap | None = None
    ) -> None:
        self.language, self.task = language and (code_of_language(language) or language), task
        self.bootstrap = bootstrap or Bootstrap()

    @classmethod
    def from_config(cls, config: Config) -> MetricsCalculator:
        """Take language and task from the model section, and the settings of intervals."""
        return cls(config.model.language, task=config.model.task, bootstrap=Bootstrap.from_config(config))

    def kinds_of(self, references: Sequence[str], languages: Marks = None) -> list[Kind]:
        """Return the language and the headline's normaliser of each row."""
        given = languages or [None] * len(references)
        codes = [(mark and (code_of_language(mark) or mark)) or self.language for mark in given]
        if len(codes) != len(references):
            raise DataError(f"{len(references)} references but {len(codes)} languages; every row needs one, or None")
        texts = [text for text, code in zip(references, codes, strict=True) if code is None]
        names = {code: headline_normalizer(text_language(code, self.task), texts) for code in set(codes)}
        return [Kind(code or UNKNOWN, names[code]) for code in codes]

    def count(
        self, references: Sequence[str], hypotheses: Sequence[str], kinds: Sequence[Kind], *, characters: bool = False
    ) -> list[EditCounts]:
        """Return `word_counts` of each row under its own normaliser."""
        rows: dict[str, list[int]] = {}
        for i, kind in enumerate(kinds):
            rows.setdefault(kind.normalizer, []).append(i)
        if len(rows) < 2:  # or none, which is an error there
            return word_counts(references, hypotheses, next(iter(rows), PLAIN), characters=characters)
        found: dict[int, EditCounts] = {}
        for name, own in rows.items():
            texts = [references[i] for i in own], [hypotheses[i] for i in own]
            found |= zip(own, word_counts(*texts, name, characters=characters), strict=True)
        return [found[i] for i in range(len(kinds))]

    def compute(
        self, references: Sequence[str], hypotheses: Sequence[str], groups: Marks = None, *, languages: Marks = None,
        durations_sec: Sequence[float] | None = None, num_tokens: Sequence[int | None] | None = None,
        truncated: int = 0,
    ) -> ErrorRates:  # fmt: skip
        """Compute rates over rows of raw texts, which are normalised here.

        `groups` has the speaker of each row; rows without one are blocks of their own. With durations and numbers of
        tokens, `loop_rate` counts impossible rates of tokens too. Without any word in the references there is no rate.
        """
        kinds = self.kinds_of(references, languages)
        units = self.count(references, hypotheses, kinds)
        if not any(count.reference_words for count in units):
            raise _no_rate(len(units))
        seconds = [kind._replace(normalizer=_SECOND[kind.normalizer]) for kind in kinds]
        plains = [b if a.normalizer == WHISPER_ENGLISH else a for a, b in zip(kinds, seconds, strict=True)]
        headline = estimate_rate(units, groups, self.bootstrap, kinds=kinds)
        second = estimate_rate(self.count(references, hypotheses, seconds), groups, self.bootstrap, kinds=seconds)

        def wer_under(those: Sequence[Kind]) -> RateEstimate:
            for known, estimate in ((kinds, headline), (seconds, second)):
                if those == known and estimate.metric == "WER":
                    return estimate
            counts = self.count(references, hypotheses, those)
            spaced = [i for i, kind in enumerate(those) if not counts_characters(kind.normalizer)]
            if not spaced:
                return replace(headline, rate=math.nan, low=math.nan, high=math.nan)
            speakers = None if groups is None else [groups[i] for i in spaced]
            return estimate_rate([counts[i] for i in spaced], speakers, self.bootstrap)

        wer, plain = wer_under(kinds), wer_under(plains)
        cer = estimate_rate(self.count(references, hypotheses, kinds, characters=True), groups, self.bootstrap)
        total = sum_counts(units)
        spoken = [count for count in units if count.reference_words]
        silent = [count for count in units if not count.reference_words]
        unknown = [None] * len(kinds)
        rows = zip(references, hypotheses, kinds, durations_sec or unknown, num_tokens or unknown, strict=True)
        loops = [
            is_loop(reference, hypothesis, kind.normalizer, duration_sec=sec, num_tokens=tokens,
                    language=None if kind.language == UNKNOWN else text_language(kind.language, self.task))
            for reference, hypothesis, kind, sec, tokens in rows
        ]  # fmt: skip
        return ErrorRates(
            **vars(total), n=len(units), metric=headline.metric, rate=headline.rate, low=headline.low,
            high=headline.high, rates_by_language=self._by_language(units, kinds, groups, headline),
            normalizer=_join_names(kinds), second_normalizer=_join_names(seconds),
            second_rate=second.rate, second_low=second.low, second_high=second.high,
            wer=wer.rate, wer_low=wer.low, wer_high=wer.high,
            cer=cer.rate, cer_low=cer.low, cer_high=cer.high,
            wer_plain=plain.rate, wer_plain_low=plain.low, wer_plain_high=plain.high,
            cer_plain=error_rate(self.count(references, hypotheses, plains, characters=True)),
            mer=total.errors / (total.hits + total.errors),
            wil=1 - (total.hits / total.reference_words) * (total.hits / max(1, total.hypothesis_words)),
            sentence_error_rate=sum(count.errors > 0 for count in units) / len(units),
            loop_rate=sum(loops) / len(units),
            empty_rate=sum(count.hypothesis_words == 0 for count in spoken) / len(spoken),
            empty_references=len(silent),
            hallucinated_words=sum(count.insertions for count in silent), truncated=truncated,
            blocks=headline.blocks, num_blocks=headline.num_blocks, confidence=self.bootstrap.confidence,
            bootstrap_samples=self.bootstrap.samples, bootstrap_seed=self.bootstrap.seed,
        )  # fmt: skip

    def _by_language(
        self, units: Sequence[EditCounts], kinds: Sequence[Kind], groups: Marks, headline: RateEstimate
    ) -> dict[str, LanguageRate]:
        strata, names, _ = _find_strata(units, kinds)
        found = {}
        for number, kind in enumerate(names):
            own = [i for i, stratum in enumerate(strata) if stratum == number]
            counts, rate = [units[i] for i in own], headline
            if len(names) > 1:
                speakers = None if groups is None else [groups[i] for i in own]
                rate = estimate_rate(counts, speakers, self.bootstrap, kinds=[kind] * len(own))
            words = sum_counts(counts).reference_words
            found[kind.language] = LanguageRate(
                **vars(rate), n=len(own), reference_words=words, normalizer=kind.normalizer
            )
        return found

    def compare(
        self, references: Sequence[str], first: Sequence[str], second: Sequence[str], groups: Marks = None, *,
        languages: Marks = None,
    ) -> PairedComparison:  # fmt: skip
        """Compare two systems on the same rows by a paired bootstrap; errors are those of `compute`."""
        kinds = self.kinds_of(references, languages)
        before, after = (self.count(references, texts, kinds) for texts in (first, second))
        return compare_counts(before, after, groups, self.bootstrap, kinds=kinds)


def _join_names(kinds: Sequence[Kind]) -> str:
    return " + ".join(dict.fromkeys(kind.normalizer for kind in kinds))


def is_loop(
    reference: str, hypothesis: str, normalizer: str = PLAIN, *, duration_sec: float | None = None,
    num_tokens: int | None = None, language: str | None = None,
) -> bool:  # fmt: skip
    """Whether a hypothesis repeats itself as no speaker does, or has more tokens than fit into its audio.

    A repetition is what `find_loop` calls one, with the words spread evenly over the clip, unless the reference has one
    too: some people are recorded counting. More tokens than the fastest speech in `language` has are a loop too; where
    it is None, ASCII is taken for English, and other texts have their repetitions only. A corpus rate hides loops: one
    such clip adds as many errors as a hundred that are slightly wrong. The duration is without padding.
    """
    # characters: under the one that keeps the words of other scripts apart
    normalize = get_normalizer(PLAIN if counts_characters(normalizer) else normalizer)
    reference, hypothesis = normalize(reference), normalize(hypothesis)
    is_known = language is not None or hypothesis.isascii()
    if duration_sec is not None and num_tokens is not None and is_known:
        fastest = MIN_NEW_TOKENS + max_tokens_per_sec(language, {}) * duration_sec
        if num_tokens >= fastest:
            return True

    def repeats(said: str) -> bool:
        words = [said[start:stop] for start, stop, _ in word_ranges(said)]
        step_sec = min(_SLOWEST_WORD_SEC, (math.inf if duration_sec is None else duration_sec) / max(1, len(words)))
        timed = [Word(word, i * step_sec, (i + 1) * step_sec, 1.0) for i, word in enumerate(words)]
        return find_loop(timed) is not None

    return repeats(hypothesis) and not repeats(reference)
