"""Words with times, and the Whisper vocabulary: text to tokens, tokens to text and words, the special tokens.

Every engine uses them. They need only `tokenizers` and a `tokenizer.json`: transformers takes a second to import, which
would delay the first transcript of a process.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from src.data.labels import MAX_PROMPT_TOKENS, MULTILINGUAL_END_TOKEN, text_tokens
from src.utils.errors import DataError, ModelError
from src.utils.languages import UNSPACED, graphemes, is_unspaced_character, known_language, parse_language

logger = logging.getLogger(__name__)

BROKEN = "\ufffd"  # what bytes that are no character are decoded to
LEAST_PROBABILITY = 1e-10  # below it engines differ in rounding


@dataclass(frozen=True)
class Word:
    """A word with its place in the audio."""

    text: str  # without surrounding spaces, punctuation included
    start_sec: float  # from the start of the clip, recording or stream
    end_sec: float  # likewise, at least `start_sec`
    probability: float = math.nan  # mean of its tokens among all text tokens, as in openai/whisper; nan if unknown
    # that end with it, those of words before it in the same token included; 0 if unknown, or if its end is in a token
    tokens: int = field(default=0, compare=False, repr=False)
    space: bool = field(default=True, compare=False, repr=False)  # whether a space precedes it
    logprob: float = field(default=math.nan, compare=False, repr=False)  # mean natural logarithm of its tokens'
    token_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)  # those that `tokens` counts, if known


def shifted(words: Sequence[Word], by_sec: float) -> tuple[Word, ...]:
    """Return the words later by some seconds."""
    return tuple(replace(w, start_sec=w.start_sec + by_sec, end_sec=w.end_sec + by_sec) for w in words)


def join_words(words: Iterable[Word]) -> str:
    """Return the words as text, with spaces where they belong."""
    return "".join(" " * word.space + word.text for word in words).strip()


def whole_tokens(words: Sequence[Word], count: int) -> int:
    """Return how many of the first `count` words end with a token, so that none is cut between it and the next word."""
    while count and not words[count - 1].tokens and any(word.tokens for word in words[count:]):
        count -= 1
    return count


def cut_words(words: Iterable[Word]) -> tuple[Word, ...]:
    """Cut words at the characters of scripts without spaces, where a recogniser gave a run of them as one word.

    The parts share the word's time by their numbers of characters; the last one has its tokens.
    """
    parts: list[Word] = []
    for word in words:
        ranges = word_ranges(word.text) if any(map(is_unspaced_character, word.text)) else []
        if len(ranges) < 2:
            parts.append(word)
            continue
        sec = (word.end_sec - word.start_sec) / len(word.text)  # per character
        for start, stop, space in ranges:
            times = (word.start_sec + start * sec, word.start_sec + stop * sec)
            parts.append(Word(word.text[start:stop], *times, word.probability, space=space if start else word.space))
        parts[-1] = replace(parts[-1], end_sec=word.end_sec, tokens=word.tokens, token_ids=word.token_ids)
    return tuple(parts)


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
        self._replaced: set[str] = set()  # codes that were said to have no token

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

    def language_code(self, mark: str) -> str:
        """Return the code that this model uses for a mark of a language, as `parse_language` takes it."""
        if not self.multilingual and mark == "en":
            return mark
        try:
            code = parse_language(mark)
            known = known_language(code, self.languages) if self.multilingual else code
        except DataError as err:
            raise ModelError(str(err)) from err
        if known != code and code not in self._replaced:
            self._replaced.add(code)
            logger.info("language %r: this model has no token for it, %r is used", code, known)
        return known

    def encode(self, text: str, *, language: str | None = None) -> list[int]:
        """Return the tokens of a text as `text_tokens`, with the space that the language has and with all symbols."""
        space = None if language is None else language not in UNSPACED
        return list(text_tokens(self._tokenizer, text, space=space, whole=True))

    def spell(self, words: Sequence[Word], *, language: str | None = None) -> list[int]:
        """Return the tokens of words as they were heard; words without theirs, as part of a token, get those of text.

        The same text in other tokens, such as one character of a token of two, is not what the decoder would write.
        """
        tokens: list[int] = []
        part: list[Word] = []
        for at, word in enumerate(words):
            part.append(word)
            if not word.token_ids and at + 1 < len(words):
                continue
            text, heard = join_words(part), word.token_ids
            if "".join(self.decode(heard).split()) == "".join(text.split()):
                tokens += heard
            elif tokens:
                tokens += text_tokens(self._tokenizer, text, space=part[0].space, first=False, whole=True)
            else:
                tokens += self.encode(text, language=language)
            part = []
        return tokens

    def words_after(self, words: Sequence[Word], count: int) -> tuple[Word, ...]:
        """Return the words after the first `count` tokens; what these leave of a word is a word, joined to them."""
        for at, word in enumerate(words):
            if count <= 0:
                return tuple(words[at:])
            count -= word.tokens
            if count < 0:
                heard = word.token_ids[count:]
                text = self.decode(heard).rstrip(BROKEN)
                rest = replace(word, text=text.strip(), tokens=-count, token_ids=heard, space=text[:1].isspace())
                return (rest, *words[at + 1 :]) if rest.text else tuple(words[at + 1 :])
        return ()

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
        if language is None:
            raise ModelError("a multilingual model needs a language; detect it, or set one such as 'en'")
        code = self.language_code(language)
        if task not in ("transcribe", "translate"):
            raise ModelError(f"unknown task {task!r}; known: transcribe, translate")
        return [self.start, self.languages[code], self._id(f"<|{task}|>"), *ending]

    def prompt_tokens(self, prompt: str, *, language: str | None = None, room: int = MAX_PROMPT_TOKENS) -> list[int]:
        """Return the tokens before the start of transcript: the newest of the text before, and what starts them."""
        room = max(0, min(room, MAX_PROMPT_TOKENS))
        tokens = self.encode(prompt, language=language)
        tokens = tokens[max(0, len(tokens) - room) :]
        return [self.previous, *tokens] if tokens else []

    def _id(self, name: str) -> int:
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ModelError(f"not a Whisper tokenizer: it has no {name}")
        return int(token)


def place_words(
    vocabulary: Vocabulary,
    tokens: Sequence[int],
    *,
    entered_sec: Sequence[float] | None = None,
    probabilities: Sequence[float] | None = None,
) -> tuple[Word, ...]:
    """Cut tokens into words with the probabilities of their tokens, and times, which never decrease.

    `entered_sec` says when each token begins, and then the end token: one more than `tokens`, ascending. Words that
    share a token share its time by their numbers of characters.
    """
    # pieces of text: tokens that are whole characters together
    pieces: list[tuple[str, int, int]] = []  # text, first token, token after the last
    first = 0
    for at in range(1, len(tokens) + 1):
        piece = vocabulary.decode(tokens[first:at])
        if not piece.endswith(BROKEN):  # there, more bytes of the character may come
            pieces.append((piece, first, at))
            first = at
    if first < len(tokens):
        pieces.append((vocabulary.decode(tokens[first:]).rstrip(BROKEN), first, len(tokens)))
    text = "".join(piece for piece, _, _ in pieces)
    ends = list(itertools.accumulate(len(piece) for piece, _, _ in pieces))  # of the pieces, in characters
    owners = [i for i, (piece, _, _) in enumerate(pieces) for _ in piece]  # piece of each character

    def moment(index: int, *, after: bool) -> float:
        """Return when a character begins, or ends; a space before others takes no time."""
        if entered_sec is None:
            return math.nan
        piece, first, until = pieces[owners[index]]
        before = text[ends[owners[index]] - len(piece) : index + after]
        share = len(before.lstrip()) / max(1, len(piece.strip()))
        begin_sec, end_sec = float(entered_sec[first]), float(entered_sec[until])
        return begin_sec + share * (end_sec - begin_sec) if 0 < share < 1 else end_sec if share else begin_sec

    words: list[Word] = []
    counted = 0  # tokens given to words
    ranges = word_ranges(text)
    for i, (start, stop, space) in enumerate(ranges):
        last = owners[stop - 1] if i + 1 < len(ranges) else len(pieces) - 1
        _, _, until = pieces[last]
        size = 0 if text[stop : ends[last]].strip() else until - counted
        counted += size
        begin = start  # a space with a token of its own is the beginning of the word after it
        while begin and text[begin - 1].isspace() and owners[begin - 1] != owners[begin]:
            begin -= 1
        spelling = slice(pieces[owners[begin]][1], until)
        certain = list(probabilities[spelling]) if probabilities else [math.nan]
        certainty, logs = sum(certain) / len(certain), [math.log(max(p, LEAST_PROBABILITY)) for p in certain]
        begin_sec, end_sec = moment(begin, after=False), moment(stop - 1, after=True)
        times = begin_sec, max(begin_sec, end_sec)
        ids = tuple(tokens[counted - size : counted])
        words.append(Word(text[start:stop], *times, float(certainty), size, space, sum(logs) / len(logs), ids))
    return tuple(words)


def word_ranges(text: str) -> list[tuple[int, int, bool]]:
    """Return where each word of a text begins and ends, and whether a space precedes it."""
    ranges: list[tuple[int, int, bool]] = []
    space, unspaced, opening, at = True, False, False, 0
    for grapheme in graphemes(text):
        if grapheme.isspace():
            space = True
        else:
            category = unicodedata.category(grapheme[0])
            begins = (
                not ranges
                or space
                or (
                    not opening
                    and category not in ("Pe", "Pf", "Po", "Pd", "Cf")  # Cf: the invisible space of Khmer and Burmese
                    and (unspaced or is_unspaced_character(grapheme))
                )
            )
            if begins:
                ranges.append((at, at, bool(space and (ranges or not is_unspaced_character(grapheme)))))
                unspaced = False
            start, _, spaced = ranges[-1]
            ranges[-1] = (start, at + len(grapheme), spaced)
            unspaced |= is_unspaced_character(grapheme)
            opening, space = (begins or opening) and category in ("Ps", "Pi"), False
        at += len(grapheme)
    return ranges
