"""Edits between reference and hypothesis, over jiwer: counted a row, or listed word by word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer

from src.evaluation.text import get_normalizer
from src.utils.errors import DataError

Edit = Literal["equal", "substitute", "delete", "insert"]


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

    @property
    def hits(self) -> int:
        """Words that are right, N - S - D."""
        return self.reference - self.substitutions - self.deletions

    @property
    def hypothesis(self) -> int:
        """Words of the hypothesis, N - D + I."""
        return self.reference - self.deletions + self.insertions


@dataclass(frozen=True)
class AlignedWord:
    """One step of an alignment; the side that lacks a word is None."""

    edit: Edit
    reference: str | None
    hypothesis: str | None


def align_words(reference: str, hypothesis: str, normalizer: str) -> tuple[AlignedWord, ...]:
    """Align two texts word by word, as `word_counts` counts them.

    Args:
        normalizer: both texts are normalised by it; the words are those of the normalised texts.
    """
    normalize = get_normalizer(normalizer)
    expected, found = normalize(reference).split(), normalize(hypothesis).split()
    if not expected:
        return tuple(AlignedWord("insert", None, word) for word in found)
    (chunks,) = jiwer.process_words(" ".join(expected), " ".join(found)).alignments
    steps: list[AlignedWord] = []
    for chunk in chunks:
        a = expected[chunk.ref_start_idx : chunk.ref_end_idx]
        b = found[chunk.hyp_start_idx : chunk.hyp_end_idx]
        width = max(len(a), len(b))
        pairs = zip([*a, *[None] * (width - len(a))], [*b, *[None] * (width - len(b))], strict=True)
        steps += [AlignedWord(chunk.type, *pair) for pair in pairs]
    return tuple(steps)


def word_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[EditCounts]:
    """Count word edits a row.

    Raises: DataError: no rows, or different lengths.
    """
    normalize = get_normalizer(normalizer)
    return _edit_counts([normalize(r) for r in references], [normalize(h) for h in hypotheses], by_word=True)


def character_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> list[EditCounts]:
    """Count character edits a row, spaces included; `EditCounts.reference` is in characters.

    Raises: DataError: no rows, or different lengths.
    """
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
    """Return sum(S + D + I) / sum(N).

    Raises: DataError: no word in any reference: there is no rate, neither 0 nor 1.
    """
    total = sum_counts(counts)
    if not total.reference:
        raise DataError(
            f"none of the {len(counts)} references has a word left after normalising, so no rate is defined; "
            "measure on rows with a transcript"
        )
    return total.errors / total.reference


def _edit_counts(references: list[str], hypotheses: list[str], *, by_word: bool) -> list[EditCounts]:
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references but {len(hypotheses)} hypotheses; every row needs both")
    if not references:
        raise DataError("no rows: there is nothing to measure")
    sizes = [len(h.split()) if by_word else len(h) for h in hypotheses]
    counts = [EditCounts(0, 0, size, 0) for size in sizes]  # of an empty reference: all insertions
    spoken = [i for i, reference in enumerate(references) if reference]
    if not spoken:
        return counts
    process = jiwer.process_words if by_word else jiwer.process_characters
    output = process([references[i] for i in spoken], [hypotheses[i] for i in spoken])
    for i, reference, alignment in zip(spoken, output.references, output.alignments, strict=True):
        edits = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in alignment:
            edits[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        counts[i] = EditCounts(edits["substitute"], edits["delete"], edits["insert"], len(reference))
    return counts
