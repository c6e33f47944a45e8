"""Labels: exactly what the decoder is fed at inference, with the loss on the text and the end token alone.

Measured (tiny.en, negative log-likelihood of a transcript in nats, mean per clip): `HELLO` 29.1, `hello` 16.6, ` hello`
8.7, ` Hello.` 7.0. So text gets the leading space that Whisper always writes, and corpora in capitals are recased.
Whisper writes no space before Chinese (base: 28.1 nats with it, 21.9 without), and never one that is a token by itself.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from src.data.utterance import TimedText, Utterance
from src.utils.config import REPLAY
from src.utils.errors import DataError
from src.utils.languages import (
    UNSPACED,
    WHISPER_LANGUAGES,
    is_unspaced_character,
    join_texts,
    known_language,
    language_name,
    lower,
    text_language,
)  # fmt: skip

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_LABEL_TOKENS = 448  # the decoder's position table
IGNORE_INDEX = -100
MULTILINGUAL_END_TOKEN = 50257  # English-only vocabularies end one token earlier
MAX_PROMPT_TOKENS = MAX_LABEL_TOKENS // 2 - 1  # 223 of previous text, after the token that starts it
MIN_NEW_TOKENS = 8  # of a text, at most, in a clip of any length: a short one may still hold a long word
RATE_MARGIN = 1.5  # of the highest rate in the training transcripts, for faster speech
TIMESTAMP_STEP_SEC = 0.02  # one encoder position
NUM_TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
MAX_FIRST_TIME_SEC = 1.0  # as `max_initial_timestamp` in openai/whisper, transformers and faster-whisper
LabelCase = Literal["auto", "keep", "lower", "sentence"]
Group = tuple[str | None, str | None]  # of transcripts: source of a mix, language

MAX_LATE_SEC = 0.5  # of a time after the end of its recording: many tools write whole seconds
_TIME = re.compile(r"<\|(\d+(?:\.\d+)?)\|>")
_TOKENS = "endoftext startoftranscript startofprev startoflm transcribe translate nospeech nocaptions notimestamps"
_SPECIAL = re.compile(rf"<\|(?:{'|'.join([*_TOKENS.split(), *WHISPER_LANGUAGES])})\|>")
CAPITAL_NOUNS = frozenset({"de", "lb"})  # written with capitals, which recasing cannot give back
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
    never = suppressed_first(tokenizer)
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
def suppressed_first(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that decoding never writes first: a space alone and, nowhere, symbols of no speech."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    spelled = [encode(space + symbol) for symbol in _SYMBOLS.split() for space in ("", " ")]
    single = [tokens[0] for tokens in spelled if len(tokens) == 1]
    notes = [encode(space + note)[0] for note in _NOTES for space in ("", " ")]
    return frozenset([*single, *notes, *(encode(f" {mark}")[0] for mark in _WORD_PARTS), encode(" ")[0]])


class LabelStyle(NamedTuple):
    """How the transcripts of a language are written in labels."""

    case: LabelCase
    space: bool | None = None  # whether they begin with a space; None is by language


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

    def shifted(self, by_sec: float) -> TimedTokens:
        """Return the same tokens, spoken later by some seconds."""
        return TimedTokens(self.tokens, self.start_sec + by_sec, self.end_sec + by_sec)


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

    def written_language(self, language: str | None = None) -> str | None:
        """Return the language of the transcript of speech in a language."""
        return text_language(language or self.language, self._task)

    def tokenize(
        self, text: str, language: str | None = None, *, space: bool | None = None, first: bool = True
    ) -> tuple[int, ...]:
        """Return the text's own tokens, none for an empty text; `text_tokens` with the space of the language."""
        written = self.written_language(language)
        if space is None and written is not None:
            space = written not in UNSPACED
        return text_tokens(self._tokenizer, text, space=space, first=first)

    def begins_with_space(self, tokens: Sequence[int]) -> bool:
        """Whether the text of tokens begins with a space."""
        return bool(tokens) and self._tokenizer.id_to_token(tokens[0]).startswith(_SPACE)

    def encode(self, text: str, language: str | None = None) -> EncodedLabel:
        """Encode one transcript; as `label`."""
        return self.label(self.tokenize(text, language), language=language)

    def timed_label(
        self, parts: Sequence[TimedTokens], *, previous: Sequence[int] = (), language: str | None = None
    ) -> EncodedLabel:
        """Make the label of a text with times, to 0.02 s, as `<|0.00|> one<|3.20|><|3.60|> two<|7.80|>`.

        The first time is at most 1 s: decoding never begins with a later one.
        """
        tokens: list[int] = []
        for part in parts:
            start_sec = part.start_sec if tokens else min(part.start_sec, MAX_FIRST_TIME_SEC)
            begin, end = (round(sec / TIMESTAMP_STEP_SEC) for sec in (start_sec, part.end_sec))
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
    """Choose the case for the texts of one language: "auto" gives "sentence" where all are in capitals, else "keep".

    Only scripts that have capitals can be all in capitals: not Chinese with some Latin letters.
    """
    if label_case != "auto":
        return label_case
    letters = [c for text in texts for c in text if c.isalpha()]
    cased = [c for c in letters if c.isupper() or c.islower()]
    capitals = sum(c.isupper() for c in cased)
    return "sentence" if 2 * len(cased) > len(letters) and capitals > _CAPS_SHARE * len(cased) else "keep"


def apply_case(text: str, label_case: LabelCase, language: str | None = None) -> str:
    """Recase one transcript; "sentence" is what the stock model writes, and costs the fewest updates to learn.

    Letters, the pronoun I and the full stop are those of the `language`, by default of English and of the script.
    """
    return recase_parts([text], label_case, language)[0]


def recase_parts(texts: Sequence[str], label_case: LabelCase, language: str | None = None) -> list[str]:
    """Recase the successive parts of one transcript."""
    if label_case not in ("lower", "sentence"):
        return list(texts)
    parts = [lower(text, language) for text in texts]
    if label_case == "lower":
        return parts
    for at, part in enumerate(parts):
        words = part.split()
        if language in (None, "en"):
            words = ["I" + w[1:] if w == "i" or w.startswith(("i'", "i’")) else w for w in words]
        parts[at] = " ".join(words)
    if written := [at for at, part in enumerate(parts) if part]:
        parts[written[0]] = _capitalise(parts[written[0]], language)
        last = parts[written[-1]]
        if unicodedata.category(last[-1])[0] in "LMN":  # no punctuation
            parts[written[-1]] = last + _full_stop("".join(parts), language)
    return parts


def _capitalise(text: str, language: str | None) -> str:
    at = len(text) - len(text.lstrip("¿¡«„"))
    first, rest = text[at : at + 1], text[at + 1 :]
    if language in ("tr", "az") and first == "i":
        return f"{text[:at]}İ{rest}"
    if language == "nl" and first + rest[:1] == "ij":
        return f"{text[:at]}IJ{rest[1:]}"
    return text[:at] + first.title() + rest  # not upper: Georgian has capitals, but no sentence begins with one


# what ends a sentence, by the script of most of its letters; others have a full stop, and Urdu its own
_FULL_STOPS = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "。"),
    **dict.fromkeys(("DEVANAGARI", "BENGALI", "GURMUKHI", "ORIYA"), "।"),
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), ""),
    "ARMENIAN": "։", "ETHIOPIC": "።",
}  # fmt: skip


def _full_stop(text: str, language: str | None) -> str:
    scripts = [unicodedata.name(c, "").split(" ")[0] for c in text if unicodedata.category(c)[0] in "LM"]
    stops = [_FULL_STOPS.get(script, "۔" if (language, script) == ("ur", "ARABIC") else ".") for script in scripts]
    return max(stops, key=stops.count, default=".")


def special_token(text: str) -> str | None:
    """Return the first name of a special token, other than a time, that a transcript spells; None without one."""
    found = _SPECIAL.search(text)
    return found and found[0]


def timed_parts(text: str, duration_sec: float) -> list[TimedText]:
    """Return the parts of a transcript with times, such as `<|0.00|> one<|3.20|><|3.60|> two<|7.80|>`; else none.

    A last part without its end lasts to the end of the recording.

    Raises:
        DataError: text before the first time, or times that go back or beyond the recording.
    """
    before, *rest = _TIME.split(text)
    if not rest:
        return []
    if before.strip():
        raise DataError(f"the transcript begins before its first time: {before.strip()[:40]!r}; add <|0.00|> before it")
    times = [float(time) for time in rest[::2]]
    if falling := next((pair for pair in itertools.pairwise(times) if pair[1] < pair[0]), None):
        raise DataError(f"the transcript's times go back, from {falling[0]:.2f} to {falling[1]:.2f} s; sort its parts")
    if times[-1] > duration_sec + MAX_LATE_SEC:
        what = f"the transcript's last time is {times[-1]:.2f} s, the recording ends at {duration_sec:.2f} s"
        raise DataError(f"{what}; times begin at 0 in each recording")
    spans = itertools.pairwise([min(time, duration_sec) for time in (*times, duration_sec)])
    return [TimedText(part.strip(), *span) for part, span in zip(rest[1::2], spans, strict=True) if part.strip()]


def source_text(utterance: Utterance) -> str:
    """Return the transcript in its source's case, without its times."""
    text, *rest = _TIME.split(str(utterance.meta.get("source_text", utterance.text)))
    return join_texts(part.strip() for part in (text, *rest[1::2])) if rest else text


def letters_of(text: str) -> str:
    """Return the letters and digits of a transcript in lower case, by which one is recognised in any style."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] in "LMN")  # vowel signs are marks


def group_of(utterance: Utterance, sources: Container[str]) -> Group:
    """Return which transcripts are styled with an utterance's: those of its source, if mixed, and its language."""
    source = utterance.meta.get("source")
    return (source if source in sources else None, utterance.language)


def group_texts(utterances: Iterable[Utterance], sources: Container[str]) -> dict[Group, list[str]]:
    """Return the transcripts of each group in their source's case."""
    texts: dict[Group, list[str]] = {}
    for utterance in utterances:
        texts.setdefault(group_of(utterance, sources), []).append(source_text(utterance))
    return texts


def case_in(group: Group, label_case: LabelCase, label_cases: Mapping[str, LabelCase]) -> LabelCase:
    """Return the configured case of a group: its source's own, else the general one.

    General speech is not written as the data's transcripts are, except in lower case: "auto".
    """
    own = label_cases.get(group[0] or "", "auto")
    return label_case if own == "auto" and (group[0] != REPLAY or label_case == "lower") else own


def restyle(utterance: Utterance, style: LabelStyle, task: str = "transcribe") -> Utterance:
    """Return the utterance with its source's transcript in a style; times in it are in `parts`.

    Raises:
        DataError: as `timed_parts`.
    """
    source = str(utterance.meta.get("source_text", utterance.text))
    parts = timed_parts(source, utterance.duration_sec or math.inf)
    texts = recase_parts([part.text for part in parts] or [source], style.case, text_language(utterance.language, task))
    text = join_texts(texts) if parts else texts[0]
    styled: dict[str, Any] = {
        "text": text,
        "label_space": style.space,
        "parts": tuple(replace(part, text=text) for part, text in zip(parts, texts, strict=False)),
    }
    if text != source:
        styled["meta"] = {**utterance.meta, "source_text": source}
    is_styled = all(getattr(utterance, name) == value for name, value in styled.items())
    return utterance if is_styled else replace(utterance, **styled)
