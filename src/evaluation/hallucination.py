"""Text that no speaker said: loops, impossible rates of tokens, words on silence; and nothing where somebody spoke.

A rate over the corpus hides them: one clip that loops adds as many errors as a hundred that are slightly wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from src.evaluation.edits import EditCounts
from src.inference.options import MIN_NEW_TOKENS
from src.inference.streaming.commit import find_loop
from src.inference.words import Word

MAX_TOKENS_PER_SEC = 8.0  # text tokens; fast speech has about 6
_SEC_A_WORD = 1.0  # where the duration is not known: then only repetitions of many words count


def is_loop(
    reference: str, hypothesis: str, *, duration_sec: float | None = None, num_tokens: int | None = None
) -> bool:
    """Whether a hypothesis repeats itself as no speaker does, or holds more tokens than fit into its audio.

    A repetition is what `find_loop` calls one, with the words spread evenly over the clip, unless the reference has one
    too: some people are recorded counting.

    Args:
        reference, hypothesis: normalised alike.
        duration_sec: of the clip, without padding; None where it is not known.
        num_tokens: text tokens of the hypothesis; None where they are not known.
    """
    if num_tokens is not None and num_tokens > _most_tokens(duration_sec):
        return True
    repeats = find_loop(_spread(hypothesis, duration_sec)) is not None
    return repeats and find_loop(_spread(reference, duration_sec)) is None


def empty_outputs(counts: Sequence[EditCounts]) -> int:
    """Count the rows that have words in their reference and none in their hypothesis."""
    return sum(1 for count in counts if count.reference and not count.hypothesis)


def invented_words(counts: Sequence[EditCounts]) -> tuple[int, int]:
    """Return the rows whose reference is empty, and the words that were put out on them."""
    silent = [count for count in counts if not count.reference]
    return len(silent), sum(count.insertions for count in silent)


def _most_tokens(duration_sec: float | None) -> float:
    return math.inf if duration_sec is None else MIN_NEW_TOKENS + MAX_TOKENS_PER_SEC * duration_sec


def _spread(text: str, duration_sec: float | None) -> list[Word]:
    words = text.split()
    step_sec = _SEC_A_WORD if duration_sec is None else duration_sec / max(1, len(words))
    return [Word(word, i * step_sec, (i + 1) * step_sec, 1.0) for i, word in enumerate(words)]
