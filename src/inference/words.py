"""Words with times: the `Word` of every transcript, and the grouping of tokens into words."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from src.inference.tokens import Vocabulary

_CLOSING = string.punctuation.replace("'", "") + "。、，！？：”’)]}"  # joins the word before it
_OPENING = "\"'“¿([{-"  # joins the word after it


@dataclass(frozen=True)
class Word:
    """A word with its place in the audio.

    Attributes:
        text: without surrounding spaces, punctuation included.
        start_sec: seconds from the start of the clip, recording or stream.
        end_sec: likewise, at least `start_sec`.
        probability: mean probability of its tokens among all text tokens, in [0, 1], as in openai/whisper; nan where it
            is unknown.
        tokens: number of tokens that spell it; 0 where it is unknown.
    """

    text: str
    start_sec: float
    end_sec: float
    probability: float = math.nan
    tokens: int = field(default=0, compare=False, repr=False)


def split_words(vocabulary: Vocabulary, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Group tokens into words: a token starts one if it decodes to a leading space, else it extends the last.

    Returns:
        (text, number of tokens) per word; the numbers add up to all tokens.
    """
    words: list[tuple[str, int]] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        piece = vocabulary.decode(pending)
        if "\ufffd" in piece:  # half of a multi-byte character
            continue
        stripped = piece.strip()
        opens = piece.startswith(" ") or not words
        closes = bool(stripped) and all(c in _CLOSING for c in stripped) and not piece.startswith(" ")
        joins_opening = bool(words) and words[-1][0] != "" and all(c in _OPENING for c in words[-1][0])
        if words and (not opens or closes or (joins_opening and not piece.startswith(" "))):
            words[-1] = (words[-1][0] + piece.rstrip(), words[-1][1] + len(pending))
        else:
            words.append((stripped, len(pending)))
        pending = []
    if pending and words:
        words[-1] = (words[-1][0], words[-1][1] + len(pending))
    return words


def place_words(
    vocabulary: Vocabulary, tokens: Sequence[int], *, entered_sec: Sequence[float], probabilities: Sequence[float]
) -> tuple[Word, ...]:
    """Give words the times and probabilities of their tokens.

    Args:
        vocabulary: of the model.
        tokens: of a text.
        entered_sec: when each token begins, and then the end token: one more than `tokens`, ascending.
        probabilities: of each token, in [0, 1].

    Returns:
        Words in order; starts and ends never decrease.
    """
    words = []
    at = 0
    for text, size in split_words(vocabulary, tokens):
        start, end = float(entered_sec[at]), float(entered_sec[at + size])
        probability = float(sum(probabilities[at : at + size]) / size)
        words.append(Word(text, start, max(start, end), probability, size))
        at += size
    return tuple(word for word in words if word.text)


def shifted(words: Sequence[Word], by_sec: float) -> tuple[Word, ...]:
    """Return the words later by some seconds."""
    return tuple(replace(w, start_sec=w.start_sec + by_sec, end_sec=w.end_sec + by_sec) for w in words)
