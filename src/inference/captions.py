"""Captions: timed words to cues of a few short lines, and cues to SRT, WebVTT, TSV or JSON, at the end or live.

A cut is free at the end of a sentence, costs more after a comma and most after a short word: articles, prepositions
and conjunctions are short in most languages and belong to what follows, so that no list of them is needed. The squared
share of a line or cue that stays empty is added and balances them (Knuth & Plass 1981, Breaking Paragraphs into Lines).
Lines are the cheapest of all; a cue is the cheaper beginning of two, since a live file cannot wait for more.

Scripts without spaces are cut between grapheme clusters: Han and kana as if each were a word (never before closing
punctuation or a small kana), Thai, Lao, Khmer and Burmese rather at the spaces between their phrases, and never inside
a syllable. `Word.space` says where spaces are. Texts stay in logical order: the player lays out Arabic and Hebrew.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from src.inference.words import Word, join_words
from src.utils.errors import ConfigError, DataError, did_you_mean
from src.utils.files import write_text_atomic, writing
from src.utils.languages import graphemes, is_unspaced_character, join_texts, space_between

if TYPE_CHECKING:
    from src.data.vad import SpeechSegment
    from src.inference.streaming.commit import Event

SHORT_WORD_COLUMNS = 3
CLAUSE_PAUSE_SEC = 0.3  # as good as a comma, for text without punctuation
_CLAUSE_COST, _PLAIN_COST, _SHORT_WORD_COST = 0.25, 1.0, 1.5  # of a cut after it; an empty line would cost 1
_INSIDE_COST = 4.0  # in Thai, Lao, Khmer or Burmese without a space, most likely inside a word
_FLASH_COST = 2.0  # a cue that the next one replaces before `min_cue_sec`
_LINE_COST = 100.0  # above all others: no more lines than needed
_SENTENCE_END = frozenset(".!?…。！？｡؟۔।॥։።။།")
_CLAUSE_END = frozenset(",;:—–、，；：،؛၊፣፤")
_TITLES = frozenset({"Mr.", "Mrs.", "Ms.", "Dr.", "St.", "Sr.", "Sra."})
_CLOSING = "\"'”’»›)]}」』）】》〉"  # may follow either
_OPENS = "「『（《〈【〔“‘([{"  # stays with the character after it, as vowels that Thai and Lao write first
_FIRST_VOWELS = "เแโใไເແໂໃໄ"
_JOINS = (  # stays with the character before it, as all combining marks
    "。、，！？；：」』）》〉】〕”’…・ー々ゝゞヽヾぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ％,.!?;:)]}\"'—%"
    "ะาำๅๆฯະາຳໆຯ།་"
)
_JOINS_AFTER_SPACE = "ๆໆ"  # repetition in Thai and Lao
_INVISIBLE_SPACE = "\u200b"  # marks where a word ends, in some texts of Khmer, Burmese and Thai
_SUBJOINERS = "\u17d2\u1039"  # Khmer and Burmese: the next consonant is written below
_BURMESE_FINAL = re.compile(r"[\u1000-\u1021]\u103a")  # a consonant that ends a syllable
_TIBETAN = re.compile(r"[\u0f00-\u0fff]")
_TIBETAN_LETTER = re.compile(r"[\u0f40-\u0fbc]$")  # a syllable of several ends with a sign
_KANA_WORD = re.compile(r".[\u3041-\u309f]|[\u30a1-\u30fc]{2}")  # Japanese words end in hiragana
_HEADERS = {".srt": "", ".vtt": "WEBVTT\n\n"}  # of live files
# Columns of a line and per second, of Netflix' guides for Chinese (16 characters, 9 per second), Japanese (13, 4) and
# Korean (16, 12), whose characters have two columns; other languages are read at 17.
_LINE_COLUMNS = {"zh": 32, "yue": 32, "ja": 26, "ko": 32}
_COLUMNS_PER_SEC = {"en": 20.0, "zh": 18.0, "yue": 18.0, "ja": 8.0, "ko": 24.0}
_OTHER_COLUMNS_PER_SEC = 17.0


@dataclass(frozen=True)
class CaptionOptions:
    """Size and duration of a cue. "chars" are columns: a wide character, such as a Chinese one, has 2.

    Sources: Netflix, Timed Text Style Guide; BBC, Subtitle Guidelines; Karamitroglou (1998), A Proposed Set of
    Subtitling Standards in Europe.
    """

    max_line_chars: int = 42  # Netflix; a longer word has a line of its own
    max_lines: int = 2  # Netflix, BBC
    min_cue_sec: float = 1.0  # Netflix: 5/6 s; a shorter cue stays on into the silence after it
    max_cue_sec: float = 6.0  # Karamitroglou; Netflix: 7 s. A longer word keeps its time
    max_chars_per_sec: float = 20.0  # Netflix, adults; a faster cue stays on, at most `max_cue_sec` or to the next
    max_gap_sec: float = 0.8  # a pause that ends a cue
    min_gap_sec: float = 1.0  # BBC: after a shorter silence the next cue follows at once, so that nothing flickers
    # Word times from attention have no gaps: a longer word holds a pause, after it if it ends in punctuation, else
    # before it (openai/whisper's timing.py cuts alike). Of 18 pauses of 1.2 s between sentences, stock tiny.en gave 17
    # to the word with the full stop; without punctuation a median of 65% to the word after (sample clips, 2026-11-28).
    max_word_sec: float = 1.0

    def __post_init__(self) -> None:
        wrong = [f"{name} is {value}, not above 0" for name, value in asdict(self).items() if not value > 0]
        if self.min_cue_sec > self.max_cue_sec:
            wrong.append(f"min_cue_sec {self.min_cue_sec} exceeds max_cue_sec {self.max_cue_sec}")
        if wrong:
            raise ConfigError("caption options: " + "; ".join(wrong))

    @classmethod
    def of(cls, language: str | None) -> CaptionOptions:
        """Return the options for text in a language, a code of Whisper; the default ones where it is unknown."""
        if language is None:
            return DEFAULT_OPTIONS
        speed = _COLUMNS_PER_SEC.get(language, _OTHER_COLUMNS_PER_SEC)
        columns = _LINE_COLUMNS.get(language, DEFAULT_OPTIONS.max_line_chars)
        return replace(DEFAULT_OPTIONS, max_line_chars=columns, max_chars_per_sec=speed)


DEFAULT_OPTIONS = CaptionOptions()


@dataclass(frozen=True)
class Cue:
    """The lines shown at one time."""

    start_sec: float  # whole milliseconds, as the end
    end_sec: float
    lines: tuple[str, ...]
    words: tuple[Word, ...] = ()  # empty where only segment times are known
    text: str = field(default="", compare=False, repr=False)  # on one line, with the space before it, if known


def make_cues(words: Sequence[Word], options: CaptionOptions = DEFAULT_OPTIONS) -> tuple[Cue, ...]:
    """Lay words out, whose starts may not decrease, as cues that do not overlap: every word once and in order."""
    builder = CueBuilder(options)
    return builder.add(words) + builder.finish()


def cues_of_segments(segments: Sequence[Any], options: CaptionOptions = DEFAULT_OPTIONS) -> tuple[Cue, ...]:
    """Lay out text without word times: each segment opens a cue; a long one is cut, its time shared by character.

    Segments have a `text` without spaces around it, `start_sec` and `end_sec` from the start of the recording.
    """
    builder, words = CueBuilder(options, segments=True), []
    for before, segment in zip(["", *(segment.text for segment in segments)], segments, strict=False):
        space = bool(space_between(before, segment.text))
        words.append(Word(segment.text, segment.start_sec, segment.end_sec, space=space))
    found = builder.add(words)
    return tuple(replace(cue, words=()) for cue in found + builder.finish())


class _Piece(NamedTuple):
    """Words that no cut may separate, their columns if all text stood on one line, and whether they must open a cue."""

    words: tuple[Word, ...]
    start_column: int
    end_column: int
    opens_cue: bool

    @property
    def text(self) -> str:
        return join_words(self.words)


class CueBuilder:
    """Makes cues of words as they arrive, each once no later word can change it: at a pause, or when two are full."""

    def __init__(self, options: CaptionOptions = DEFAULT_OPTIONS, *, segments: bool = False) -> None:
        self._options = options
        # a segment opens a cue whatever the pause before it, and all of its time is speech
        limits = (-math.inf, math.inf) if segments else (options.max_gap_sec, options.max_word_sec)
        self._max_gap_sec, self._max_word_sec = limits
        self._pieces: list[_Piece] = []
        self._before, self._knows_spaces = "", False  # the last word; whether words say where there is no space
        self._shown_sec = 0.0  # end of the last cue

    def add(self, words: Iterable[Word]) -> tuple[Cue, ...]:
        """Take more words, in absolute time and in order, and return the cues that they complete."""
        earliest_sec = -math.inf
        for word in words:
            if not earliest_sec <= word.start_sec <= word.end_sec < math.inf:
                raise DataError(
                    f"word {word.text!r} ({word.start_sec} to {word.end_sec} s) follows one from {earliest_sec} s: "
                    "captions need times in order; sort the words, and drop those without times"
                )
            earliest_sec = word.start_sec
            self._knows_spaces |= not word.space
            if not self._knows_spaces and columns_of(word.text[:1]) == 2 and _touch(self._before, word.text):
                word = replace(word, space=False)
            self._before = word.text or self._before
            for index, part in enumerate(_divide(word, self._max_word_sec)):
                self._append(part, begins_word=index == 0)
        return self._take(complete=False)

    def _append(self, part: Word, *, begins_word: bool) -> None:
        """Take a part of a word, as a new piece if there may be a cut before it."""
        column, opens_cue = 0, False
        if self._pieces:
            last = self._pieces[-1]
            column = last.end_column + part.space
            opens_cue = begins_word and part.start_sec - last.words[-1].end_sec >= self._max_gap_sec
            may_part = part.text[0] not in _JOINS_AFTER_SPACE if part.space else _may_part(last.text, part.text)
            if not (opens_cue or may_part):
                end_column = column + columns_of(part.text)
                self._pieces[-1] = last._replace(words=(*last.words, part), end_column=end_column)
                return
        self._pieces.append(_Piece((part,), column, column + columns_of(part.text), opens_cue))

    def finish(self, until_sec: float = math.inf) -> tuple[Cue, ...]:
        """Return all that is left; the last cue stays at most until `until_sec`, and coming ones begin no earlier."""
        return self._take(complete=True, until_sec=until_sec)

    def _take(self, *, complete: bool, until_sec: float = math.inf) -> tuple[Cue, ...]:
        """Cut off cues from the start; of incomplete text only what no later word can move."""
        cues, start = [], 0
        while start < len(self._pieces):
            end = self._cue_end(start)
            seen = end if self._is_closed(end) else self._cue_end(end)
            if seen == len(self._pieces) and not complete:
                break
            stop = min(range(start + 1, end + 1), key=lambda at: self._cost_of_two(start, at))
            cues.append(self._cue(start, stop, until_sec))
            self._shown_sec, start = cues[-1].end_sec, stop
        del self._pieces[:start]
        return tuple(cues)

    def _is_closed(self, at: int) -> bool:
        return at == len(self._pieces) or self._pieces[at].opens_cue

    def _width(self, start: int, stop: int) -> int:
        return self._pieces[stop - 1].end_column - self._pieces[start].start_column

    def _cue_end(self, start: int) -> int:
        """Return the furthest end of a cue that begins at `start`, as lines, time and pauses allow."""
        line_start, lines = start, 1
        for at in range(start + 1, len(self._pieces)):
            sec = self._pieces[at].words[-1].end_sec - self._pieces[start].words[0].start_sec
            if self._width(line_start, at + 1) > self._options.max_line_chars:
                line_start, lines = at, lines + 1
            if self._is_closed(at) or sec > self._options.max_cue_sec or lines > self._options.max_lines:
                return at
        return len(self._pieces)

    def _cost_of_two(self, start: int, stop: int) -> float:
        """Return the cost of a cue, and the least of the cue after it, which is 0 after a pause."""
        cost = self._cue_cost(start, stop)
        if self._is_closed(stop):
            return cost
        return cost + min(self._cue_cost(stop, end) for end in range(stop + 1, self._cue_end(stop) + 1))

    def _cue_cost(self, start: int, stop: int) -> float:
        next_sec = self._pieces[stop].words[0].start_sec if stop < len(self._pieces) else math.inf
        flashes = next_sec - self._pieces[start].words[0].start_sec < self._options.min_cue_sec
        columns = self._options.max_lines * self._options.max_line_chars
        return self._part_cost(start, stop, columns) + flashes * _FLASH_COST

    def _part_cost(self, start: int, stop: int, columns: int) -> float:
        """Return the cost of a part with room for `columns`: what stays empty, and the cut at its end."""
        empty = max(0.0, 1 - self._width(start, stop) / columns) ** 2
        last = self._pieces[stop - 1]
        text, mark = last.text, _mark(last.text)
        if self._is_closed(stop) or (mark in _SENTENCE_END and text not in _TITLES):
            return empty
        following = self._pieces[stop].words[0]
        touch = _touch(text, following.text)
        if (
            mark in _CLAUSE_END
            or following.start_sec - last.words[-1].end_sec >= CLAUSE_PAUSE_SEC
            or (touch and following.space)  # between phrases
        ):
            return empty + _CLAUSE_COST
        if touch:
            is_narrow = columns_of(following.text[:1]) < 2 and not _TIBETAN.match(following.text)
            is_inside = text[-1] != _INVISIBLE_SPACE and (is_narrow or _KANA_WORD.match(text[-1] + following.text))
            return empty + (_INSIDE_COST if is_inside else _PLAIN_COST)
        is_short = self._width(stop - 1, stop) <= SHORT_WORD_COLUMNS and not _ends_unspaced(text)
        return empty + (_SHORT_WORD_COST if is_short else _PLAIN_COST)

    def _cue(self, start: int, stop: int, until_sec: float) -> Cue:
        """Time a cue: not before the last one ends, and the last of all text at most to `until_sec`."""
        options, words = self._options, tuple(word for piece in self._pieces[start:stop] for word in piece.words)
        next_sec = self._pieces[stop].words[0].start_sec if stop < len(self._pieces) else until_sec
        start_sec = round(max(self._shown_sec, words[0].start_sec), 3)
        reading_sec = max(options.min_cue_sec, self._width(start, stop) / options.max_chars_per_sec)
        end_sec = max(words[-1].end_sec, start_sec + min(reading_sec, options.max_cue_sec))
        end_sec = end_sec if next_sec - end_sec >= options.min_gap_sec else next_sec
        end_sec = round(max(end_sec, start_sec + 0.001), 3)
        return Cue(start_sec, end_sec, self._lines(start, stop), words, "".join(map(_spelt, words)))

    def _lines(self, start: int, stop: int) -> tuple[str, ...]:
        """Break a cue into as few lines as it needs, at the least cost."""
        columns = self._options.max_line_chars
        best = {start: (0.0, [start])}  # up to each piece: cost and cuts
        for end in range(start + 1, stop + 1):
            fitting = [at for at in range(start, end) if at == end - 1 or self._width(at, end) <= columns]
            cost, at = min((best[at][0] + _LINE_COST + self._part_cost(at, end, columns), at) for at in fitting)
            best[end] = cost, [*best[at][1], end]
        return tuple(
            join_words(word for piece in self._pieces[a:b] for word in piece.words)
            for a, b in itertools.pairwise(best[stop][1])
        )


def _divide(word: Word, max_word_sec: float) -> list[Word]:
    """Cut a word where a line may end, and share out its time, less a pause inside it, by character."""
    texts: list[str] = []
    spaces: list[bool] = []
    for chunk in word.text.split():
        at = 0
        for grapheme in graphemes(chunk):
            if at and not _may_part(texts[-1], chunk[at:]):
                texts[-1] += grapheme
            else:
                texts.append(grapheme)
                spaces.append(at == 0 and (bool(spaces) or word.space))
            at += len(grapheme)
    if not texts:
        return []
    start_sec, end_sec, longest_sec = word.start_sec, word.end_sec, max_word_sec * len(texts)
    if _mark(texts[-1]) in _SENTENCE_END | _CLAUSE_END:
        end_sec = min(end_sec, start_sec + longest_sec)
    else:
        start_sec = max(start_sec, end_sec - longest_sec)
    ends = list(itertools.accumulate(map(len, texts)))
    inner_sec = [start_sec + (end_sec - start_sec) * end / ends[-1] for end in ends[:-1]]
    times = itertools.pairwise([start_sec, *inner_sec, end_sec])
    parts = zip(texts, spaces, times, strict=True)
    return [replace(word, text=text, space=space, start_sec=a, end_sec=b) for text, space, (a, b) in parts]


def _ends_unspaced(text: str) -> bool:
    return is_unspaced_character((text.rstrip(_JOINS + _INVISIBLE_SPACE) or text)[-1:])


def _touch(left: str, right: str) -> bool:
    """Whether two texts meet within a script without spaces."""
    return _ends_unspaced(left) and is_unspaced_character((right.lstrip(_OPENS) or right)[:1])


def _may_part(left: str, right: str) -> bool:
    """Whether a line may end between two texts without a space between them."""
    return _touch(left, right) and not (
        left[-1] in _OPENS + _FIRST_VOWELS + _SUBJOINERS
        or right[0] in _JOINS
        or unicodedata.category(right[0])[0] == "M"
        or _BURMESE_FINAL.match(right)
        or _TIBETAN_LETTER.search(left)
    )


def columns_of(text: str) -> int:
    """Return the width of a text: 2 for a wide character, 0 for a mark on another (UAX #11)."""
    text = unicodedata.normalize("NFC", text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def _mark(text: str) -> str:
    """Return the last character before closing quotes and brackets."""
    return text.rstrip(_CLOSING)[-1:]


def _spelt(word: Word) -> str:
    return " " * word.space + word.text


def write_captions(
    path: str | Path,
    cues: Sequence[Cue],
    *,
    language: str | None = None,
    truncated: bool = False,
    uncovered: Sequence[SpeechSegment] = (),
) -> Path:
    """Write cues in the format of the suffix: .json (see `to_json`), .srt, .tsv or .vtt, all or nothing."""
    path = Path(path)
    writers: dict[str, Callable[[Sequence[Cue]], str]] = {
        ".json": partial(to_json, language=language, truncated=truncated, uncovered=uncovered),
        ".srt": to_srt,
        ".tsv": to_tsv,
        ".vtt": to_vtt,
    }
    write_text_atomic(path, writers[_known_suffix(path, list(writers))](cues))
    return path


def to_srt(cues: Sequence[Cue]) -> str:
    """Return SubRip text."""
    return "".join(_block(".srt", number, cue) for number, cue in enumerate(cues, start=1))


def to_vtt(cues: Sequence[Cue]) -> str:
    """Return WebVTT text (W3C)."""
    return _HEADERS[".vtt"] + "".join(_block(".vtt", number, cue) for number, cue in enumerate(cues, start=1))


def to_tsv(cues: Sequence[Cue]) -> str:
    """Return rows of start and end in ms and the text on one line, as openai/whisper writes them."""
    rows = [(round(cue.start_sec * 1000), round(cue.end_sec * 1000), _text(cue).strip()) for cue in cues]
    return "".join(f"{start}\t{end}\t{text}\n" for start, end, text in [("start", "end", "text"), *rows])


def to_json(
    cues: Sequence[Cue],
    *,
    language: str | None = None,
    truncated: bool = False,
    uncovered: Sequence[SpeechSegment] = (),
) -> str:
    """Return JSON in openai/whisper's format: one segment per cue, with words where they are known.

    Each text and word begins with the space before it, if any: segments, and words, concatenated give the text.
    `truncated`, a text that ended at a limit of tokens, and `uncovered`, the speech that it leaves out, are said only
    where it is so.
    """
    segments: list[dict[str, Any]] = []
    for number, cue in enumerate(cues):
        text = _text(cue)
        segments.append(
            {"id": number, "start": cue.start_sec, "end": cue.end_sec, "text": text if number else text.lstrip()}
        )
        words: list[dict[str, Any]] = []
        for word in cue.words:
            probability = None if math.isnan(word.probability) else word.probability
            times = {"start": round(word.start_sec, 3), "end": round(word.end_sec, 3)}
            spelt = _spelt(word) if number or words else word.text
            words.append({"word": spelt, **times, "probability": probability})
        if words:
            segments[-1]["words"] = words
    text = "".join(segment["text"] for segment in segments)
    content = {"text": text, "language": language, "segments": segments, **({"truncated": True} if truncated else {})}
    if uncovered:
        content["uncovered"] = [{"start": gap.start_sec, "end": gap.end_sec} for gap in uncovered]
    return json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


class LiveCaptionWriter:
    """Appends the cues of a live session to a file, .srt or .vtt, that is valid whenever it is read.

    A "final" event writes everything said so far; its last cue stays at most for as long as audio was heard. Without a
    final before the end the file is that of `make_cues`. The options are by default those of the first words' language.
    An older file is replaced. On a full disk `WriteError` is raised; the cues are written with the next event.
    """

    def __init__(self, path: str | Path, options: CaptionOptions | None = None) -> None:
        path, self._written = Path(path), 0
        self._builder = CueBuilder(options or DEFAULT_OPTIONS)
        self._is_open = options is None  # until the language is known
        self._suffix = _known_suffix(path, list(_HEADERS))
        write_text_atomic(path, _HEADERS[self._suffix])
        self._waiting = b""  # what a full disk has refused
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, event: Event) -> None:
        """Take an event; partial ones change nothing."""
        if self._file.closed:
            raise DataError(f"{self._file.name}: these captions are closed; open another LiveCaptionWriter")
        if event.kind == "commit":
            if self._is_open:
                self._builder, self._is_open = CueBuilder(CaptionOptions.of(event.language)), False
            self._show(self._builder.add(event.words))
        elif event.kind == "final":
            self._show(self._builder.finish(event.audio_sec))

    def close(self) -> None:
        """Write the remaining words. A second call does nothing."""
        if not self._file.closed:
            with self._file:
                self._show(self._builder.finish())

    def _show(self, cues: Sequence[Cue]) -> None:
        for cue in cues:
            self._written += 1
            self._waiting += _block(self._suffix, self._written, cue).encode("utf-8", "backslashreplace")
        with writing(Path(self._file.name)):
            whole = self._file.seek(0, os.SEEK_END)
            rest = self._waiting
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(whole)  # no half of a cue
                raise
        self._waiting = b""


def _block(suffix: str, number: int, cue: Cue) -> str:
    """Return a cue as SubRip, which has no escapes ("-->" becomes "->", as in openai/whisper), or as WebVTT."""
    text = "\n".join(_clean_lines(cue))
    if suffix == ".srt":
        text = re.sub("--+>", "->", text)
        return f"{number}\n{_clock(cue.start_sec, ',')} --> {_clock(cue.end_sec, ',')}\n{text}\n\n"
    return f"{_clock(cue.start_sec, '.')} --> {_clock(cue.end_sec, '.')}\n{html.escape(text, quote=False)}\n\n"


def _text(cue: Cue) -> str:
    """Return a cue on one line, with the space before it."""
    if not cue.text:
        return f" {join_texts(_clean_lines(cue))}"
    return " " * cue.text[0].isspace() + _clean(cue.text)


def _clean_lines(cue: Cue) -> list[str]:
    """Return the lines without anything that would end a cue or a row: line ends, tabs, blank lines."""
    return [text for line in cue.lines if (text := _clean(line))]


def _clean(text: str) -> str:
    """Return a text on one line, without control characters and lone surrogates, which no file of captions may hold."""
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")).split())


def _clock(sec: float, mark: str) -> str:
    minutes, ms = divmod(round(sec * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{mark}{ms % 1000:03}"


def _known_suffix(path: Path, known: Sequence[str]) -> str:
    suffix = path.suffix.lower()
    if suffix not in known:
        raise DataError(f"{path}: captions are written as {', '.join(known)}{did_you_mean(suffix, known)}")
    return suffix
