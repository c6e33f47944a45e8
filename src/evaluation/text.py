"""Text normalisers, named and versioned: a rate without its normaliser's name means nothing.

Two stand side by side in every report, because they disagree: the plain one changes case and punctuation only;
Whisper's own, kept as published so that rates compare with published ones, joins digit words (`one five` is `15`),
reads `BOB'S` as `bob is`, drops `uh`, and leaves a `.` of an ellipsis as a word. Neither cuts text that is written
without spaces (Chinese, Japanese, Thai) into words: read the CER there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from src.utils.errors import ConfigError, did_you_mean
from src.utils.files import load_english_spelling

PLAIN = "plain-v1"
WHISPER_ENGLISH = "whisper-english-v1"
WHISPER_BASIC = "whisper-basic-v1"
NORMALIZERS = (PLAIN, WHISPER_ENGLISH, WHISPER_BASIC)
Normalizer = Callable[[str], str]
_KEPT_TEXTS = 16_384  # a normaliser: words, characters, loops and alignments of a test set ask for the same texts

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'"})
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")


@cache
def get_normalizer(name: str) -> Normalizer:
    """Return a normaliser by name; it remembers the texts of a test set.

    Raises: ConfigError: unknown name.
    """
    return lru_cache(maxsize=_KEPT_TEXTS)(_make_normalizer(name))


def _make_normalizer(name: str) -> Normalizer:
    if name == PLAIN:
        return normalize_plain
    if name == WHISPER_ENGLISH:
        english: Normalizer = EnglishTextNormalizer(dict(load_english_spelling()))
        return lambda text: " ".join(english(text).split())
    if name == WHISPER_BASIC:
        basic: Normalizer = BasicTextNormalizer()
        return lambda text: " ".join(basic(text).split())
    raise ConfigError(f"unknown normaliser {name!r}{did_you_mean(name, NORMALIZERS)}; known: {', '.join(NORMALIZERS)}")


def whisper_normalizer_for(language: str | None) -> str:
    """Return the name of Whisper's normaliser for a language; None means English."""
    return WHISPER_ENGLISH if language in (None, "en") else WHISPER_BASIC


def normalize_plain(text: str) -> str:
    """Lower case, punctuation and symbols to spaces ("well-known" has two words), apostrophes inside words kept."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_APOSTROPHES)
    spaced = "".join(c if c == "'" or unicodedata.category(c)[0] not in "PS" else " " for c in text)
    return " ".join(_LOOSE_APOSTROPHE.sub(" ", spaced).split())
