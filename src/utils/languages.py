"""Languages: Whisper's codes, other marks of a language, and what depends on the language or its script."""

from __future__ import annotations

import contextlib
import logging
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

import regex

from src.utils.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Codes of Whisper's language tokens, in their order; `yue` exists since large-v3.
WHISPER_LANGUAGES = _codes(
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml "
    "cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am "
    "yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue"
)
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my", "bo"})  # written without spaces between words
_OWN_CODES = {"nb": "no", "fil": "tl", "jv": "jw"}  # BCP 47 to Whisper's
_UNSPACED_SCRIPTS = "".join(
    rf"\p{{scx={name}}}" for name in ("Hani", "Hira", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")
)
_UNSPACED_CHARACTER = regex.compile(rf"[{_UNSPACED_SCRIPTS}\uFF00-\uFFEF--\p{{Hangul}}]", regex.VERSION1)
_OTHER_DIGITS = regex.compile(r"[\p{Nd}--[0-9]]", regex.VERSION1)
_SPACING_ACCENTS = regex.compile(r"[\p{Sk}\u2017\u203E]")  # NFKC would leave a space and a combining mark
_DROPPED = regex.compile(  # characters without a glyph; Armenian writes the marks of a question inside the word
    r"[\p{Default_Ignorable_Code_Point}\u055B\u055C\u055E--[\u200C\u200D]]", regex.VERSION1
)
_LOOSE_JOINERS = regex.compile(r"(?<![\p{L}\p{M}])[\u200C\u200D]|\u200C(?![\p{L}\p{M}])")
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘‛ʼ´`′＇՚\u05f3", "'"))
_INNER_OKINA = regex.compile(r"(?<=[\p{L}\p{M}])\u02BB")  # Uzbek oʻ is typed with any apostrophe; first it is a letter
_LOOSE_APOSTROPHE = regex.compile(r"(?<![\p{L}\p{M}\p{N}])'|'(?![\p{L}\p{M}\p{N}])")

# Tokens per second of ordinary speech, with the multilingual tokenizer: espeak-ng at 175 words per minute, 2026-11-30;
# a language without a voice as others of its script.
_TOKENS_PER_SEC = {
    "en": 4.0,
    **dict.fromkeys(_codes("ar az ba be bg el fa fi he ja kk mk mn ps ru sd sr tg tk tr tt uk ur uz vi yi"), 8.0),
    **dict.fromkeys(_codes("hi hy mr ne sa ta th"), 17.0),
    **dict.fromkeys(_codes("am as bn km kn si te"), 30.0),
    **dict.fromkeys(_codes("gu ka lo ml pa"), 39.0),
    **dict.fromkeys(_codes("bo my"), 46.0),
}
_OTHER_TOKENS_PER_SEC = 6.0
FAST_SPEECH = 1.5  # times the ordinary rate: what must have room in the decoder
CAP_FACTOR = 2.5  # times the ordinary rate ends a text: the fastest speech is below, a loop is soon above


def parse_language(mark: str) -> str:
    """Return Whisper's code for a mark of a language.

    Args:
        mark: a code of ISO 639-1, 639-2 or 639-3, a tag such as `zh-TW` or `de_AT`, or an English name, in any case.
            Deprecated codes and members of a macrolanguage are followed: `iw` is `he`, `arz` is `ar`, `nb` is `no`.

    Raises:
        DataError: no language, or one without a token in Whisper.
    """
    code = code_of_language(mark)
    if code is None:
        names = [language_name(code).lower() for code in WHISPER_LANGUAGES]
        near = did_you_mean(mark.strip().lower(), [*names, *WHISPER_LANGUAGES])
        raise DataError(f"language {mark!r} is unknown to Whisper{near}; write a code such as 'de', or auto")
    return code


@lru_cache(maxsize=4096)
def code_of_language(mark: str) -> str | None:
    """Return what `parse_language` does, None for a language without a token in Whisper."""
    mark = mark.strip()
    if mark.lower() in WHISPER_LANGUAGES:
        return mark.lower()
    import langcodes  # here and below: a tenth of a cold process that transcribes, which needs none of it
    from langcodes.data_dicts import MACROLANGUAGES

    tag = mark.partition(".")[0].replace("_", "-")  # `de_DE.UTF-8` of a locale
    try:
        code = langcodes.Language.get(langcodes.standardize_tag(tag, macro=True)).language or ""
    except (langcodes.LanguageTagError, ValueError):
        code = ""
    if len(tag) > 3 and code not in {*WHISPER_LANGUAGES, *_OWN_CODES, *MACROLANGUAGES}:
        code = _code_of_name(mark.partition("(")[0].strip().lower())  # `Chinese (China)`
    code = _OWN_CODES.get(code, code)
    code = code if code in WHISPER_LANGUAGES else MACROLANGUAGES.get(code)  # Egyptian Arabic has Arabic's token
    return code if code in WHISPER_LANGUAGES else None


def _code_of_name(name: str) -> str:
    """Return the code of an English name, or of words that name one language; else nothing."""
    import langcodes

    def find(words: str) -> str:
        """Return the tag of a name; langcodes also takes what begins with one, such as `malayalm` for Malay."""
        tags = []
        for spelled in (words, words[:-1]):
            with contextlib.suppress(LookupError):
                tags.append(langcodes.find(spelled, language="en").to_tag())
        return tags[0] if len(set(tags)) == len(tags) and tags else ""

    found = [find(name)] if find(name) else [tag for word in re.split(r"\W+", name) if (tag := find(word))]
    codes = {langcodes.Language.get(langcodes.standardize_tag(tag, macro=True)).language or "" for tag in found}
    return codes.pop() if len(codes) == 1 else ""


def language_name(code: str) -> str:
    """Return the English name of a code of Whisper, such as `Chinese`."""
    import langcodes

    return str(langcodes.Language.get(code).display_name())


def known_language(code: str, known: Collection[str]) -> str:
    """Return the code that a model uses for a language: vocabularies before large-v3 have `zh` for `yue`.

    Raises:
        DataError: the model does not know the language.
    """
    if code == "yue" and code not in known and "zh" in known:
        return "zh"
    if code not in known:
        raise DataError(f"language {code!r} is unknown to this model; it knows {', '.join(sorted(known))}")
    return code


def tokens_per_sec(language: str | None) -> float:
    """Return the tokens per second of ordinary speech in a language; None is taken for English."""
    return _TOKENS_PER_SEC.get(language or "en", _OTHER_TOKENS_PER_SEC)


def max_tokens_per_sec(language: str | None, trained: Mapping[str, float]) -> float:
    """Return the rate that ends a text: 2.5 times the ordinary one, or by language what a checkpoint was trained on."""
    return max(CAP_FACTOR * tokens_per_sec(language), trained.get(language or "en", 0.0))


def text_language(language: str | None, task: str) -> str | None:
    """Return the language of the transcripts: translations are English."""
    return "en" if task == "translate" else language


def is_unspaced_text(text: str) -> bool:
    """Whether most letters of a text belong to scripts that have no spaces between words."""
    letters = [c for c in text if unicodedata.category(c)[0] == "L"]
    return 2 * sum(is_unspaced_character(c) for c in letters) > len(letters)


@lru_cache(maxsize=8192)
def is_unspaced_character(character: str) -> bool:
    """Whether a character, or a grapheme cluster, belongs to a script that has no spaces between words."""
    return _UNSPACED_CHARACTER.match(character) is not None


def graphemes(text: str) -> list[str]:
    """Cut a text into grapheme clusters: characters with their combining marks."""
    return list(regex.findall(r"\X", text))


def join_texts(texts: Iterable[str]) -> str:
    """Join stripped texts: with a space, but nothing where a script without spaces meets the seam."""
    joined = ""
    for text in texts:
        joined += space_between(joined, text) + text
    return joined


def space_between(left: str, right: str) -> str:
    """Return what separates two stripped texts, either of which may be empty: a space, or nothing."""
    apart = left and right and not (is_unspaced_character(left[-1]) or is_unspaced_character(right[0]))
    return " " if apart else ""


def lower(text: str, language: str | None = None) -> str:
    """Return a text in lower case: Turkish and Azerbaijani keep the dotless i apart, no stray U+0307 is left."""
    text = unicodedata.normalize("NFC", text)  # files of macOS have I and U+0307 for İ
    if language in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    return unicodedata.normalize("NFC", text.replace("İ", "i").lower())


def normalize_plain(text: str, language: str | None = None) -> str:
    """Lower case, punctuation and symbols to spaces, apostrophes inside words and combining marks kept.

    "well-known" has two words. Characters without a glyph are dropped (soft hyphens, marks of direction), but joiners
    between letters, which are spelling in Persian, Malayalam and Sinhala, are kept. The result is in NFKC, but for the
    Thai and Lao vowel am, which stays one character. Digits of any script are those from 0 to 9: they are spoken alike,
    Whisper writes either (५ and 5), and which one a transcript has is its style, not what was said.
    """
    text = _SPACING_ACCENTS.sub(" ", _INNER_OKINA.sub("'", text.translate(_APOSTROPHES)))
    text = lower(unicodedata.normalize("NFKC", _DROPPED.sub("", text)), language).translate(_APOSTROPHES)
    text = _OTHER_DIGITS.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    spaced = "".join(c if c == "'" or unicodedata.category(c)[0] not in "PS" else " " for c in text)
    spaced = _LOOSE_APOSTROPHE.sub(" ", _LOOSE_JOINERS.sub("", spaced))
    composed = unicodedata.normalize("NFC", " ".join(spaced.split()))
    return composed.replace("\u0e4d\u0e32", "\u0e33").replace("\u0ecd\u0eb2", "\u0eb3")
