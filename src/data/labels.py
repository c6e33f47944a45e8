"""Labels: exactly what the decoder is fed at inference, with the loss on the text and the end token alone.

Measured (tiny.en, negative log-likelihood of a transcript in nats, mean per clip): `HELLO` 29.1, `hello` 16.6, ` hello`
8.7, ` Hello.` 7.0. So text gets the leading space that Whisper always writes, and corpora in capitals are recased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.utils.errors import DataError

MAX_LABEL_TOKENS = 448  # the decoder's position table
IGNORE_INDEX = -100
MULTILINGUAL_END_TOKEN = 50257  # English-only vocabularies end one token earlier
MAX_PROMPT_TOKENS = MAX_LABEL_TOKENS // 2 - 1  # 223 of previous text, after the token that starts it
TIMESTAMP_STEP_SEC = 0.02  # one encoder position
NUM_TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
LabelCase = Literal["auto", "keep", "lower", "sentence"]
_CAPS_SHARE = 0.9  # of the cased letters; above it a corpus is written in capitals


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

    Multilingual models need a `language` code, and a `task`: "transcribe" or "translate".

    Raises:
        DataError: no language for a multilingual model, one that it does not know, or no timestamp tokens.
    """

    def __init__(self, tokenizer: Any, *, language: str | None = None, task: str = "transcribe") -> None:
        self._tokenizer = tokenizer
        self.end_token = int(tokenizer.eos_token_id)
        spoken = []
        if self.end_token == MULTILINGUAL_END_TOKEN:
            if language is None:
                raise DataError(
                    "a multilingual model needs the transcripts' language: set model.language, such as 'en'"
                )
            spoken = [f"<|{language}|>", f"<|{task}|>"]
        last_time = f"<|{(NUM_TIMESTAMPS - 1) * TIMESTAMP_STEP_SEC:.2f}|>"
        names = ["<|startoftranscript|>", *spoken, "<|notimestamps|>", "<|startofprev|>", "<|0.00|>", last_time]
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        for name, token in zip(names, ids, strict=True):
            if token is None or token == tokenizer.unk_token_id:
                raise DataError(f"this model's tokenizer has no token {name}; check model.language ({language!r})")
        *self.prefix, self._previous_token, self._first_timestamp, last = ids  # prefix: before a text without times
        self.timestamp_prefix = self.prefix[:-1]  # without <|notimestamps|>
        if last - self._first_timestamp != NUM_TIMESTAMPS - 1:
            raise DataError("this tokenizer's timestamps <|0.00|> to <|30.00|> are not 1,501 successive tokens")

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return the text's own tokens, with the leading space; none for an empty text."""
        stripped = text.strip()
        return tuple(self._tokenizer.encode(" " + stripped, add_special_tokens=False)) if stripped else ()

    def encode(self, text: str) -> EncodedLabel:
        """Encode one transcript; as `label`."""
        return self.label(self.tokenize(text))

    def timed_label(self, parts: Sequence[TimedTokens], *, previous: Sequence[int] = ()) -> EncodedLabel:
        """Make the label of a text with times, to 0.02 s, as `<|0.00|> one<|3.20|><|3.60|> two<|7.80|>`."""
        tokens: list[int] = []
        for part in parts:
            begin, end = (round(sec / TIMESTAMP_STEP_SEC) for sec in (part.start_sec, part.end_sec))
            if begin < 0 or end >= NUM_TIMESTAMPS:
                span = f"{part.start_sec:.2f} to {part.end_sec:.2f} s"
                raise DataError(f"no timestamp tokens for {span}: Whisper's go from 0 to 30 s; cut the recording")
            tokens += [self._first_timestamp + begin, *part.tokens, self._first_timestamp + end]
        return self.label(tokens, previous=previous, prefix=self.timestamp_prefix)

    def label(
        self, tokens: Sequence[int], *, previous: Sequence[int] = (), prefix: Sequence[int] | None = None
    ) -> EncodedLabel:
        """Make the label of a text, by default without times; raise `DataError` for more than 448 tokens in all.

        `previous` are tokens of the text before, as a prompt without loss. The last 223 are taken, fewer where the
        label leaves less room in the 448 positions, none where it leaves no room.
        """
        prefix = self.prefix if prefix is None else prefix
        room = MAX_LABEL_TOKENS - len(prefix) - len(tokens) - 1  # 1: the end token
        if room < 0:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()[:60]
            count = f"{MAX_LABEL_TOKENS - room} tokens, Whisper takes {MAX_LABEL_TOKENS}"
            raise DataError(f"the transcript has {count}; cut the recording at a pause or remove it: {text!r}...")
        kept = min(len(previous), MAX_PROMPT_TOKENS, room - 1)  # 1: the token that starts the prompt
        prompt = [self._previous_token, *previous[-kept:]] if kept > 0 else []
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
