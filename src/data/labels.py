"""Labels: exactly what the decoder is fed at inference, with the loss on the text and the end token alone.

Measured (tiny.en, negative log-likelihood of a transcript a clip): `HELLO` 29.1, `hello` 16.6, ` hello` 8.7,
` Hello.` 7.0 nats. So text gets the leading space that Whisper always writes, and capitals-only corpora are recased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.utils.errors import DataError

MAX_LABEL_TOKENS = 448  # the decoder's position table
IGNORE_INDEX = -100
MULTILINGUAL_END_TOKEN = 50257
LabelCase = Literal["auto", "keep", "lower", "sentence"]
_CAPS_SHARE = 0.9  # of the cased letters; above it a corpus is written in capitals


@dataclass(frozen=True)
class EncodedLabel:
    """Both of length L: `decoder_input_ids[i]` is fed where `labels[i]` is expected."""

    decoder_input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class LabelEncoder:
    """Text to decoder inputs and labels.

    Args:
        tokenizer: a Whisper tokenizer; its end token tells multilingual (50257) from English-only (50256) vocabularies.
        language: code; needed by multilingual models.
        task: "transcribe" or "translate"; unused by English-only models.
    Raises: DataError: no language for a multilingual model, or one that it does not know.
    """

    def __init__(self, tokenizer: Any, *, language: str | None = None, task: str = "transcribe") -> None:
        self._tokenizer = tokenizer
        self.end_token = int(tokenizer.eos_token_id)
        self.prefix = _prefix(tokenizer, language, task)

    def encode(self, text: str) -> EncodedLabel:
        """Encode one transcript.

        Raises: DataError: more than 448 tokens with the prefix and the end token.
        """
        stripped = text.strip()
        tokens = self._tokenizer.encode(" " + stripped, add_special_tokens=False) if stripped else []
        sequence = [*self.prefix, *tokens, self.end_token]
        if len(sequence) > MAX_LABEL_TOKENS:
            raise DataError(
                f"the transcript has {len(sequence)} tokens, Whisper's decoder takes {MAX_LABEL_TOKENS}; "
                f"cut the recording at a pause or remove it: {stripped[:60]!r}..."
            )
        masked = [IGNORE_INDEX] * (len(self.prefix) - 1)
        return EncodedLabel(tuple(sequence[:-1]), tuple(masked + sequence[len(self.prefix) :]))


def resolve_case(texts: Sequence[str], label_case: LabelCase) -> LabelCase:
    """Choose the case for a corpus: "auto" gives "sentence" where the corpus is all capitals, else "keep"."""
    if label_case != "auto":
        return label_case
    cased = [c for text in texts for c in text if c.isupper() or c.islower()]
    return "sentence" if cased and sum(c.isupper() for c in cased) / len(cased) > _CAPS_SHARE else "keep"


def apply_case(text: str, label_case: LabelCase) -> str:
    """Recase one transcript.

    "sentence" is lower case with a capital first letter, the English pronoun I, and a full stop: the style that the
    stock model writes and so the one that costs the fewest updates to learn.
    """
    if label_case == "lower":
        return text.lower()
    if label_case == "sentence":
        words = [_pronoun(word) for word in text.lower().split()]
        joined = " ".join(words)
        sentence = joined[:1].upper() + joined[1:]
        return sentence + "." if sentence[-1:].isalnum() else sentence
    return text


def _pronoun(word: str) -> str:
    return "I" + word[1:] if word == "i" or word.startswith(("i'", "i’")) else word


def _prefix(tokenizer: Any, language: str | None, task: str) -> list[int]:
    if int(tokenizer.eos_token_id) != MULTILINGUAL_END_TOKEN:
        names = ["<|startoftranscript|>", "<|notimestamps|>"]
    elif language is None:
        raise DataError(
            "a multilingual model needs the language of the transcripts: set model.language, for example 'en'"
        )
    else:
        names = ["<|startoftranscript|>", f"<|{language}|>", f"<|{task}|>", "<|notimestamps|>"]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    for name, token in zip(names, ids, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            raise DataError(f"this model's tokenizer has no token {name}; check model.language ({language!r})")
    return ids
