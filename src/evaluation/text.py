"""Text normalisers, and word edits between reference and hypothesis under one of them.

Reports show two rates, because normalisers disagree: the plain one changes case and punctuation only; Whisper's own,
kept as published, joins digit words (`one five` is `15`), reads `BOB'S` as `bob is` and drops `uh`. Neither cuts text
that is written without spaces (Chinese, Japanese, Thai) into words: read the CER there.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Literal

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from src.utils.errors import ConfigError, DataError, did_you_mean
from src.utils.files import load_english_spelling

PLAIN = "plain-v1"
WHISPER_ENGLISH = "whisper-english-v1"
WHISPER_BASIC = "whisper-basic-v1"
NORMALIZERS = (PLAIN, WHISPER_ENGLISH, WHISPER_BASIC)
_KEPT_TEXTS = 16_384  # per normaliser: words, characters, loops and alignments of a test set use the same texts
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")


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
