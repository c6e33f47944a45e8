"""Labels: exactly what the decoder is fed at inference, with the loss on the text and the end token alone.

Measured (tiny.en, negative log-likelihood of a transcript in nats, mean per clip): `HELLO` 29.1, `hello` 16.6, ` hello`
8.7, ` Hello.` 7.0. So text gets the leading space that Whisper always writes, and corpora in capitals are recased.
Whisper writes no space before Chinese (base: 28.1 nats with it, 21.9 without), and never one that is a token by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from src.utils.errors import DataError
from src.utils.languages import (
    UNSPACED,
    WHISPER_LANGUAGES,
    is_unspaced_character,
    known_language,
    language_name,
    text_language,
)  # fmt: skip

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_LABEL_TOKENS = 448  # the decoder's position table
IGNORE_INDEX = -100
MULTILINGUAL_END_TOKEN = 50257  # English-only vocabularies end one token earlier
MAX_PROMPT_TOKENS = MAX_LABEL_TOKENS // 2 - 1  # 223 of previous text, after the token that starts it
TIMESTAMP_STEP_SEC = 0.02  # one encoder position
NUM_TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
LabelCase = Literal["auto", "keep", "lower", "sentence"]
_CAPS_SHARE = 0.9  # of the cased letters; above it a corpus is written in capitals

# openai/whisper's `non_speech_tokens`: symbols that stand for no speech, which decoding never writes
_SYMBOLS = (
    '" # ( ) * + / : ; < = > @ [ \\ ] ^ _ ` { | } ~ 「 」 『 』 << >> <<< >>> -- --- '
    "-( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪"
)
_NOTES = "♩♪♫♬♭♮♯"
_WORD_PARTS = "-'"  # allowed within words, not with a space before


def text_tokens(
    tokenizer: Tokenizer, text: str, *, space: bool | None = None, first: bool = True, whole: bool = False
) -> tuple[int, ...]:
    """Return the tokens of a text; special tokens that are spelled in it are text.

    Args:
        tokenizer: of a Whisper model.
        text: surrounding spaces are no part of it.
        space: whether it begins with a space; by default where its first letter belongs to a script with spaces.
        first: it begins what the decoder writes, so that its first token must be one that decoding may choose: with
            the space, without it, or else without the symbols that it begins with. Otherwise it continues a text.
        whole: keep these symbols: for a text that is given to the decoder.
    """
    text = text.strip()
    never = _suppressed(tokenizer)
    while text:
        spaced = not is_unspaced_character(text[0]) if space is None else space
        for begins in (spaced, not spaced) if first else (spaced,):
            # cut inside `<|`: as a whole, the name of a special token would become that token
            pieces = re.split(r"(?<=<)(?=\|)", " " * begins + text)
            tokens = [t for piece in pieces for t in tokenizer.encode(piece, add_special_tokens=False).ids]
            lone_space = tokenizer.id_to_token(tokens[0]) == _SPACE
            if tokens[0] not in never or (not first if lone_space else whole):
                return tuple(tokens)
        text = text[1:].lstrip()
    return ()


_SPACE = "Ġ"  # in a vocabulary


@lru_cache(maxsize=8)
def _suppressed(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that decoding never writes first: a space alone and, nowhere, symbols of no speech."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    spelled = [encode(space + symbol) for symbol in _SYMBOLS.split() for space in ("", " ")]
    single = [tokens[0] for tokens in spelled if len(tokens) == 1]
    notes = [encode(space + note)[0] for note in _NOTES for space in ("", " ")]
    return frozenset([*single, *notes, *(encode(f" {mark}")[0] for mark in _WORD_PARTS), encode(" ")[0]])


@dataclass(frozen=True)
class EncodedLabel:
    """Both of length L: `decoder_input_ids[i]` is fed where `labels[i]` is expected."""

    decoder_input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class TimedTokens:
    """Text tokens that are spoken from `start_sec` to `end_sec` of their recording."""

    tokens: tuple[int, ...]
    start_sec: float
    end_sec: float


class LabelEncoder:
    """Text to decoder inputs and labels, with a Whisper tokenizer.

    Multilingual models need the language of each text; `language` is that of texts that do not say theirs. `task` is
    "transcribe" or "translate".

    Raises:
        DataError: a language that the model does not know, or no timestamp tokens.
    """

    def __init__(self, tokenizer: Any, *, language: str | None = None, task: str = "transcribe") -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._task = task
        self.language = language
        self.end_token = int(tokenizer.eos_token_id)
        token_of = self._tokenizer.token_to_id
        self._languages: dict[str, int] = {}
        if self.end_token == MULTILINGUAL_END_TOKEN:
            found = {code: token_of(f"<|{code}|>") for code in WHISPER_LANGUAGES}
            self._languages = {code: token for code, token in found.items() if token is not None}
        last_time = f"<|{(NUM_TIMESTAMPS - 1) * TIMESTAMP_STEP_SEC:.2f}|>"
        task_name = f"<|{task}|>" if self._languages else "<|transcribe|>"
        names = ["<|startoftranscript|>", task_name, "<|notimestamps|>", "<|startofprev|>", "<|0.00|>", last_time]
        for name in names:
            if token_of(name) is None:
                raise DataError(f"this model's tokenizer has no token {name}")
        self._start, self._task_token, self._no_timestamps, self._previous, self._first_timestamp, last = map(
            token_of, names
        )
        if last - self._first_timestamp != NUM_TIMESTAMPS - 1:
            raise DataError("this tokenizer's timestamps <|0.00|> to <|30.00|> are not 1,501 successive tokens")
        if language is not None:
            self.prefix_for(language)

    def prefix_for(self, language: str | None = None, *, timestamps: bool = False) -> tuple[int, ...]:
        """Return the special tokens before a text of a language.

        Raises:
            DataError: no language for a multilingual model, or one that the model does not know.
        """
        language = language or self.language
        spoken: tuple[int, ...] = ()
        if self._languages:
            if language is None:
                fix = "set model.language, add a column language, or call fill_languages"
                raise DataError(f"a multilingual model needs the transcript's language: {fix}")
            spoken = (self._languages[known_language(language, self._languages)], self._task_token)
        elif language not in (None, "en"):
            name = f"{language_name(language)} ({language})"
            raise DataError(f"this model knows English only, the speech is {name}; take a multilingual variant")
        return (self._start, *spoken, *(() if timestamps else (self._no_timestamps,)))

    @property
    def prefix(self) -> list[int]:
        """Special tokens before a text without times, in the encoder's own language."""
        return list(self.prefix_for())

    def tokenize(
        self, text: str, language: str | None = None, *, space: bool | None = None, first: bool = True
    ) -> tuple[int, ...]:
        """Return the text's own tokens, none for an empty text; `text_tokens` with the space of the language."""
        written = text_language(language or self.language, self._task)
        if space is None and written is not None:
            space = written not in UNSPACED
        return text_tokens(self._tokenizer, text, space=space, first=first)

    def encode(self, text: str, language: str | None = None) -> EncodedLabel:
        """Encode one transcript; as `label`."""
        return self.label(self.tokenize(text, language), language=language)

    def timed_label(
        self, parts: Sequence[TimedTokens], *, previous: Sequence[int] = (), language: str | None = None
    ) -> EncodedLabel:
        """Make the label of a text with times, to 0.02 s, as `<|0.00|> one<|3.20|><|3.60|> two<|7.80|>`."""
        tokens: list[int] = []
        for part in parts:
            begin, end = (round(sec / TIMESTAMP_STEP_SEC) for sec in (part.start_sec, part.end_sec))
            if begin < 0 or end >= NUM_TIMESTAMPS:
                span = f"{part.start_sec:.2f} to {part.end_sec:.2f} s"
                raise DataError(f"no timestamp tokens for {span}: Whisper's go from 0 to 30 s; cut the recording")
            tokens += [self._first_timestamp + begin, *part.tokens, self._first_timestamp + end]
        return self._label(tokens, previous, self.prefix_for(language, timestamps=True))

    def label(
        self, tokens: Sequence[int], *, previous: Sequence[int] = (), language: str | None = None
    ) -> EncodedLabel:
        """Make the label of a text without times; raise `DataError` for more than 448 tokens in all.

        `previous` are tokens of the text before, as a prompt without loss. The last 223 are taken, fewer where the
        label leaves less room in the 448 positions, none where it leaves no room.
        """
        return self._label(tokens, previous, self.prefix_for(language))

    def _label(self, tokens: Sequence[int], previous: Sequence[int], prefix: Sequence[int]) -> EncodedLabel:
        room = MAX_LABEL_TOKENS - len(prefix) - len(tokens) - 1  # 1: the end token
        if room < 0:
            text = self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()[:60]
            count = f"{MAX_LABEL_TOKENS - room} tokens, Whisper takes {MAX_LABEL_TOKENS}"
            raise DataError(f"the transcript has {count}; cut the recording at a pause or remove it: {text!r}...")
        kept = min(len(previous), MAX_PROMPT_TOKENS, room - 1)  # 1: the token that starts the prompt
        prompt = [self._previous, *previous[-kept:]] if kept > 0 else []
        sequence = [*prompt, *prefix, *tokens, self.end_token]
        context = len(prompt) + len(prefix)
        return EncodedLabel(tuple(sequence[:-1]), tuple([IGNORE_INDEX] * (context - 1) + sequence[context:]))


def resolve_case(texts: Sequence[str], label_case: LabelCase) -> LabelCase:
    """Choose the case for a corpus: "auto" gives "sentence" where the corpus is all capitals, else "keep"."""
    if label_case != "auto":
        return label_case
    cased = [c for text in texts for c in text if c.isupper() or c.islower()]
    return "sentence" if cased and sum(c.isupper() for c in cased) / len(cased) > _CAPS_SHARE else "keep"


def apply_case(text: str, label_case: LabelCase) -> str:
    """Recase one transcript; "sentence" is what the stock model writes, and costs the fewest updates to learn."""
    if label_case == "lower":
        return text.lower()
    if label_case != "sentence":
        return text
    words = ["I" + word[1:] if word == "i" or word.startswith(("i'", "i’")) else word for word in text.lower().split()]
    sentence = " ".join(words)
    sentence = sentence[:1].upper() + sentence[1:]
    return sentence + "." if sentence[-1:].isalnum() else sentence
