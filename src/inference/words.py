"""Words with times, and the Whisper vocabulary: text to tokens, tokens to text and words, the special tokens.

Every engine uses them. They need only `tokenizers` and a `tokenizer.json`: transformers takes a second to import, which
would delay the first transcript of a process.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from src.data.labels import MAX_PROMPT_TOKENS, MULTILINGUAL_END_TOKEN
from src.utils.errors import ModelError

_CLOSING = string.punctuation.replace("'", "") + "。、，！？：”’)]}"  # joins the word before it
_OPENING = "\"'“¿([{-"  # joins the word after it


@dataclass(frozen=True)
class Word:
    """A word with its place in the audio."""

    text: str  # without surrounding spaces, punctuation included
    start_sec: float  # from the start of the clip, recording or stream
    end_sec: float  # likewise, at least `start_sec`
    probability: float = math.nan  # mean of its tokens among all text tokens, as in openai/whisper; nan if unknown
    tokens: int = field(default=0, compare=False, repr=False)  # number that spell it; 0 if unknown


def shifted(words: Sequence[Word], by_sec: float) -> tuple[Word, ...]:
    """Return the words later by some seconds."""
    return tuple(replace(w, start_sec=w.start_sec + by_sec, end_sec=w.end_sec + by_sec) for w in words)


class Vocabulary:
    """Tokens of one model, from its `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end, self.start = self._id("<|endoftext|>"), self._id("<|startoftranscript|>")  # no text from `end` on
        self.no_timestamps, self.previous = self._id("<|notimestamps|>"), self._id("<|startofprev|>")
        self.timestamp_begin = self.no_timestamps + 1  # <|0.00|>; later times follow at 0.02 s
        self.multilingual = self.end == MULTILINGUAL_END_TOKEN
        names = tokenizer.get_vocab().items() if self.multilingual else ()
        codes = {name[2:-2]: token for name, token in names if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        self.languages = dict(sorted(codes.items()))  # code to token; none for English-only models

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary:
        """Read `tokenizer.json` of a checkpoint."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder}: no tokenizer.json; copy that of the same openai/whisper-* variant there")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as err:
            raise ModelError(f"{path}: not a Whisper tokenizer: {err}") from err

    @classmethod
    @lru_cache(maxsize=8)  # each decoded batch asks, and reading 50,000 names for the languages takes milliseconds
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Return the vocabulary of a tokenizer of transformers, made once."""
        return cls(tokenizer.backend_tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with the leading space that Whisper writes; none for an empty one."""
        return list(self._tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids) if text.strip() else []

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, leading space included; special tokens and timestamps have none."""
        text = [token for token in token_ids if token < self.end]
        return str(self._tokenizer.decode(text, skip_special_tokens=False))

    def start_sequence(self, language: str | None, task: str, *, timestamps: bool) -> list[int]:
        """Return the special tokens that begin a transcript."""
        ending = [] if timestamps else [self.no_timestamps]
        if not self.multilingual:
            if language not in (None, "en") or task != "transcribe":
                asked = f"language {language!r} and task {task!r}"
                raise ModelError(f"this is an English-only model, not for {asked}; use a multilingual variant")
            return [self.start, *ending]
        if language not in self.languages:
            raise ModelError(f"unknown language {language!r}; this model knows: {', '.join(self.languages)}")
        if task not in ("transcribe", "translate"):
            raise ModelError(f"unknown task {task!r}; known: transcribe, translate")
        return [self.start, self.languages[language], self._id(f"<|{task}|>"), *ending]

    def prompt_tokens(self, prompt: str, hotwords: str = "") -> list[int]:
        """Return the tokens before the start of transcript: hotwords, then the newest of the text before.

        Hotwords come first, as in faster-whisper, and take at most half of the room.
        """
        expected = self.encode(hotwords)[: MAX_PROMPT_TOKENS // 2]
        tokens = [*expected, *self.encode(prompt)[len(expected) - MAX_PROMPT_TOKENS :]]
        return [self.previous, *tokens] if tokens else []

    def _id(self, name: str) -> int:
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ModelError(f"not a Whisper tokenizer: it has no {name}")
        return int(token)


def split_words(vocabulary: Vocabulary, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Return the text and the number of tokens of each word: a token with a leading space starts one."""
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
    """Give words the probabilities of their tokens, and times, which never decrease.

    `entered_sec` says when each token begins, and then the end token: one more than `tokens`, ascending.
    """
    words, at = [], 0
    for text, size in split_words(vocabulary, tokens):
        start, end = float(entered_sec[at]), float(entered_sec[at + size])
        probability = float(sum(probabilities[at : at + size]) / size)
        if text:
            words.append(Word(text, start, max(start, end), probability, size))
        at += size
    return tuple(words)
