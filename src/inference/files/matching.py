"""Matching of a long recording with its transcript: which words are spoken where, and which are not.

The recording is transcribed, and the words that both texts have are anchors; times of subtitles may be wrong by seconds
and only say what is next to what. Between anchors that lie next to a silence the transcript is aligned with the audio,
so that a passage that was never spoken, or never written, costs itself alone.

A word that the recogniser did not hear is judged in the audio of its clip alone: the log-probability of the text as it
is written, less that with what is heard there, divided by the square root of the number of words that differ: in a
mumbled sentence many do, where one is wrong it does. Of 18 places with a wrong word 16 are below `MIN_SCORE`, of 61
that are right 2 are (tiny.en int8, a recording of learners of benchmarks/subtitles.py, 2026-11-30).
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import regex

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES
from src.data.labels import MAX_LABEL_TOKENS, apply_case, resolve_case
from src.data.sources.subtitles import Passage
from src.data.vad import VoiceActivityDetector
from src.inference.engine_base import Engine
from src.inference.files.anchors import hear, match_words
from src.inference.files.segmentation import PAD_SEC, SPECIAL_TOKENS
from src.inference.files.transcribe import BatchInference
from src.inference.options import DecodingOptions
from src.inference.words import Word, cut_words, join_words, shifted, word_ranges
from src.utils.config import Config
from src.utils.languages import join_texts, language_name, normalize_plain, space_between

MIN_SCORE = -12.0  # of the word that the audio speaks for least
EDGE_SCORE = -6.0  # of one at an end for which nothing is heard: it is the neighbour's
MIN_GAP_SEC = 0.1  # a shorter silence is within a word
PAUSE_SEC = 0.8  # ends a sentence in a transcript without punctuation; between two cues 0.3 s do
CUE_PAUSE_SEC = 0.3
MAX_WINDOW_TOKENS = MAX_LABEL_TOKENS - SPECIAL_TOKENS - 20
ROOM_WORDS, CROWDED = 3, 1.8  # words on either side; times the rate of the recording
EDGE_WORDS = 2  # of a clip may belong to its neighbour
KEPT_WORDS = 3  # fewer are no clip where the others of it are wrong
UNSPOKEN_WORDS = 6  # so many in a row that nobody heard may not have been spoken
FAST, SLOW = 2.5, 0.2  # times the usual number of characters of the recording in such a time, and
FEW_CHARS = 3  # more or less: a short word is slow by nature
MIN_WORD_SEC, CHARACTER_SEC = 0.3, 0.08  # the room of a word
LATE_SEC = 0.2  # that words seem to begin after they do, at most
MORE_HEARD, MORE_HEARD_CHARS = 1.5, 10  # characters
SURE_LANGUAGE = 0.8  # probability
MOVE_GAIN, MOVE_HEARD_GAIN = 1.0, 5.0  # of log-probability, for a word to move to the other side of a silence
_QUIET = np.zeros(5 * SAMPLE_RATE, dtype=np.float32)  # tells how likely words are without audio
_END = regex.compile(r"[\p{Sentence_Terminal}…][\p{Pe}\p{Pf}\p{Po}\"']*$")


@dataclass(frozen=True)
class Excerpt:
    """A piece of a transcript with its place in the recording: a clip to train on, unless there is a reason not to."""

    text: str
    start_sec: float  # of its first word; where a passage was not found, of its surroundings
    end_sec: float
    cut_start_sec: float = math.nan  # with the silence around it
    cut_end_sec: float = math.nan
    speaker: str | None = None
    heard: str = ""  # what the model transcribed there
    score: float = math.nan  # of its least certain word, at most 0: 0 where the model heard all of them
    reason: str | None = None  # why it is no clip


@dataclass(frozen=True)
class MatchedRecording:
    """All of a transcript, in order, and what the recording is."""

    excerpts: tuple[Excerpt, ...]
    duration_sec: float
    speech_sec: float
    covered_sec: float  # of speech, by the excerpts without a reason
    language: str | None


class _Gap(NamedTuple):
    """A silence."""

    start: float
    end: float


@dataclass
class _Said:
    """A word of the transcript."""

    start: int  # in the joined text
    stop: int
    passage: int
    key: str  # what it has in common with other spellings; empty for punctuation
    position: float  # grows with the transcript: seconds by its own times, or characters
    anchor: int | None = None  # the word of the recogniser that it is
    is_dropped: bool = False  # a passage that was not spoken
    word: Word | None = None  # where it was aligned
    certainty: float = 0.0  # see `Excerpt.score`
    foreign: str | None = None  # the language that is heard there, if it is another
    before: _Gap | None = None  # the silence next to it
    after: _Gap | None = None


class _Island(NamedTuple):
    """Words from `first` until `stop` of the transcript, which are spoken between two silences."""

    first: int
    stop: int
    before: _Gap
    after: _Gap


@dataclass
class _Unit:
    """A clip to be: words from `first` until `stop`."""

    first: int
    stop: int
    clip: Any = None  # its audio, (T,) float32, once it was heard by itself
    encoded: Any = None
    heard: list[str] | None = None  # the words in it
    logprobs: dict[tuple[int, int], float] = field(default_factory=dict)  # of written words in it, by place


def match_transcript(
    audio: Waveform,
    passages: Sequence[Passage],
    engine: Engine,
    config: Config,
    *,
    language: str | None = None,
    min_score: float = MIN_SCORE,
) -> MatchedRecording:
    """Find a transcript, its passages in order, in its recording, (T,) float32 at 16 kHz of any length.

    The settings are `inference`, of which clips have at most `max_segment_sec`, and `vad`. The language is by default
    that of the settings or the checkpoint, else what the model hears. A word below `min_score` is taken for wrong, see
    `Excerpt.score`.
    """
    detector = VoiceActivityDetector(config.vad.model_copy(update={"min_silence_sec": MIN_GAP_SEC, "pad_sec": 0.0}))
    speech = [(span.start_sec, span.end_sec) for span in detector.speech_segments(audio)]
    heard, language = hear(audio, speech, BatchInference(config=config, engine=engine).transcribe_iter, language)
    matcher = _Matcher(audio, passages, speech, heard, engine, config, language, min_score)
    excerpts = tuple(sorted(matcher.run(), key=lambda e: e.start_sec))
    covered_sec = sum(matcher.speech_sec(e.start_sec, e.end_sec) for e in excerpts if e.reason is None)
    speech_sec = sum(end - start for start, end in speech)
    known = matcher.language if engine.vocabulary.multilingual else "en"
    return MatchedRecording(excerpts, len(audio) / SAMPLE_RATE, speech_sec, covered_sec, known)


class _Matcher:
    def __init__(
        self, audio: Waveform, passages: Sequence[Passage], speech: Sequence[tuple[float, float]],
        heard: Sequence[Word], engine: Engine, config: Config, language: str | None, min_score: float,
    ) -> None:  # fmt: skip
        self.language = language or config.model.language
        self._audio, self._passages, self._engine, self._min_score = audio, passages, engine, min_score
        self._max_sec = config.inference.max_segment_sec
        self._options = DecodingOptions(self.language, trailing_silence_sec=config.inference.trailing_silence_sec)
        edges = [0.0, *itertools.chain.from_iterable(speech), len(audio) / SAMPLE_RATE]
        self._gaps = [_Gap(*edges[i : i + 2]) for i in range(0, len(edges), 2)]
        self._speech, self._rate = speech, 1.0
        self._starts, self._ends = [start for start, _ in speech], [end for _, end in speech]
        self._gap_starts = [gap.start for gap in self._gaps]
        self._heard = cut_words(heard)
        self._heard_keys = [self._key(word.text) for word in self._heard]
        self._heard_mids = self._middles(self._heard)
        self._text = join_texts(passage.text for passage in passages)
        self._said = self._words()
        self._case = resolve_case([self._text], "auto")
        self._silence = engine.encode([_QUIET], self._options.trailing_silence_sec)
        ends = sum(_END.search(self._text[word.start : word.stop]) is not None for word in self._said)
        self._is_punctuated = ends * 40 > len(self._said)

    def run(self) -> Iterator[Excerpt]:
        """Find anchors, cut at safe places, align, and judge what was found."""
        for i, j in match_words([word.key for word in self._said], self._heard_keys):
            self._said[i].anchor = j
        if all(word.anchor is None for word in self._said):
            yield self._excerpt(0, len(self._said), reason="nothing of the transcript was heard in the recording")
            return
        yield from self._drop_unspoken()
        for window in self._windows():
            if self._align(window):
                units = [_Unit(*unit) for unit in self._units(window[0].first, window[-1].stop)]
                for left, right in itertools.pairwise(units):
                    self._settle(left, right)
                for unit, following in itertools.zip_longest(units, units[1:]):
                    yield from self._judge(unit, following)
            else:
                sec = window[-1].after.start - window[0].before.end
                reason = f"hardly a word was recognised for {sec:.0f} s, which is too long to align"
                yield self._excerpt(window[0].first, window[-1].stop, reason=reason)

    # the transcript and what was heard

    def _words(self) -> list[_Said]:
        """Cut the transcript into words, each with its place in it."""
        begins, length, last = [], 0, ""
        for passage in self._passages:
            begins.append(length + len(space_between(last, passage.text)))
            length, last = begins[-1] + len(passage.text), passage.text
        is_timed = not any(math.isnan(passage.start_sec) for passage in self._passages)
        words: list[_Said] = []
        for start, stop, _ in word_ranges(self._text):
            at = bisect.bisect_right(begins, (start + stop) // 2) - 1
            passage, position = self._passages[at], float(start)
            if is_timed:
                share = (start - begins[at]) / len(passage.text)
                end_sec = passage.start_sec if math.isnan(passage.end_sec) else passage.end_sec
                position = passage.start_sec + share * (end_sec - passage.start_sec)
            words.append(_Said(start, stop, at, self._key(self._text[start:stop]), position))
        return words

    def _key(self, text: str) -> str:
        return normalize_plain(text, self.language).replace(" ", "")

    def _spelt(self, first: int, stop: int) -> str:
        """Return a part of the transcript, without what was dropped."""
        runs: list[list[int]] = []
        for word in self._said[first:stop]:
            if word.is_dropped:
                continue
            if runs and not self._text[runs[-1][1] : word.start].strip():
                runs[-1][1] = word.stop
            else:
                runs.append([word.start, word.stop])
        return join_texts(self._text[start:stop] for start, stop in runs)

    def _active(self, first: int, stop: int) -> list[int]:
        return [i for i in range(first, stop) if not self._said[i].is_dropped]

    def _gap(self, from_sec: float, to_sec: float) -> _Gap | None:
        """Return the silence that takes most of a stretch of time; None if there is hardly any."""
        at = max(0, bisect.bisect_right(self._gap_starts, from_sec) - 1)
        best, most = None, MIN_GAP_SEC / 2
        for gap in itertools.takewhile(lambda gap: gap.start < to_sec, self._gaps[at:]):
            shared = min(gap.end, to_sec) - max(gap.start, from_sec)
            if shared > most:
                best, most = gap, shared
        return best

    def _middles(self, words: Sequence[Word]) -> list[float]:
        """Return a time within each word, in speech and ascending: alignment gives silence to the words next to it.

        As in openai/whisper, a word that is too long keeps its beginning where a sentence ends, its end where one
        begins; else it is on the side of the silence where it has enough room.
        """
        middles: list[float] = []
        for before, word in zip(itertools.chain([None], words), words, strict=False):
            start_sec, end_sec = word.start_sec, word.end_sec
            room = max(MIN_WORD_SEC, len(word.text) * CHARACTER_SEC)
            if end_sec - start_sec > room:
                gap = self._gap(start_sec, end_sec)
                if _END.search(word.text):
                    is_early = True
                elif before is None or _END.search(before.text):
                    is_early = False
                else:
                    left, right = (gap.start - start_sec, end_sec - gap.end) if gap else (room, 0.0)
                    is_early = left >= room / 2 or (right < room / 2 and left > -LATE_SEC)
                start_sec, end_sec = (start_sec, start_sec + room) if is_early else (end_sec - room, end_sec)
            middle = (start_sec + end_sec) / 2
            gap = self._gap(middle - MIN_GAP_SEC, middle + MIN_GAP_SEC)
            if gap and gap.start < middle < gap.end:  # to the nearer end of a silence
                middle = gap.start if middle - gap.start < gap.end - middle else gap.end
            middles.append(max([middle, *middles[-1:]]))
        return middles

    def _gap_in_heard(self, j: int) -> _Gap | None:
        """Return the silence before a word that was heard."""
        return self._gap(self._heard_mids[j - 1], self._heard_mids[j])

    def _heard_in(self, start_sec: float, end_sec: float) -> slice:
        """Return the place of the words that were heard between two times."""
        return slice(*(bisect.bisect_left(self._heard_mids, at) for at in (start_sec - 0.1, end_sec + 0.1)))

    # from anchors to windows

    def _drop_unspoken(self) -> Iterator[Excerpt]:
        """Drop passages of which nothing was heard, and for which there is no room between what was."""
        anchored = [i for i, word in enumerate(self._said) if word.anchor is not None]
        heard = [self._heard[self._said[i].anchor or 0] for i in anchored]
        self._rate = sum(len(self._said[i].key) for i in anchored) / max(
            0.1, sum(self.speech_sec(word.start_sec, word.end_sec) for word in heard)
        )
        edges = [(-1, 0.0), *((i, self._heard_mids[self._said[i].anchor or 0]) for i in anchored)]
        edges.append((len(self._said), self._gaps[-1].end))
        for at, ((before, _), (after, _)) in enumerate(itertools.pairwise(edges)):
            if after - before <= UNSPOKEN_WORDS:
                continue
            # with a few of the words around: they seem to take the time of speech that the recogniser passed over
            (first, start_sec), (last, end_sec) = (
                edges[max(0, at - ROOM_WORDS)],
                edges[at + 1 : at + 2 + ROOM_WORDS][-1],
            )
            characters = sum(len(word.key) for word in self._said[first + 1 : last])
            if characters > CROWDED * self._rate * self.speech_sec(start_sec, end_sec):
                start_sec, end_sec = edges[at][1], edges[at + 1][1]
                yield self._excerpt(before + 1, after, reason="nobody says it there", around=(start_sec, end_sec))
                for word in self._said[before + 1 : after]:
                    word.is_dropped = True

    def speech_sec(self, start_sec: float, end_sec: float) -> float:
        """Return how much speech lies between two times."""
        first, last = bisect.bisect_right(self._ends, start_sec), bisect.bisect_left(self._starts, end_sec)
        return sum(min(end_sec, end) - max(start_sec, start) for start, end in self._speech[first:last])

    def _islands(self) -> Iterator[_Island]:
        """Cut where the words on both sides of a silence were heard, and leave out speech that was not written."""
        active = self._active(0, len(self._said))
        first, before = active[0], self._gaps[0]
        if j := self._said[first].anchor:
            before = self._gap_in_heard(j) or before
        for i, following in itertools.pairwise(active):
            j, k = self._said[i].anchor, self._said[following].anchor
            if (
                j is None
                or k is None
                or not (left := self._gap_in_heard(j + 1))
                or not (right := self._gap_in_heard(k))
            ):
                continue
            yield _Island(first, i + 1, before, left)
            first, before = following, right
        last, after = self._said[active[-1]].anchor, self._gaps[-1]
        if last is not None and last + 1 < len(self._heard):
            after = self._gap_in_heard(last + 1) or after
        yield _Island(first, active[-1] + 1, before, after)

    def _windows(self) -> Iterator[list[_Island]]:
        """Join islands that follow each other to as much as the encoder and the decoder take."""
        anchored = [(word.position, self._heard_mids[word.anchor]) for word in self._said if word.anchor is not None]
        places, times = zip(*anchored, strict=True)
        self._expected_sec = np.interp([word.position for word in self._said], places, times)
        window: list[_Island] = []
        for island in itertools.chain.from_iterable(map(self._split, self._islands())):
            if window and (window[-1].after != island.before or not self._fits([*window, island])):
                yield window
                window = []
            window.append(island)
        yield window

    def _fits(self, islands: Sequence[_Island]) -> bool:
        if islands[-1].after.start - islands[0].before.end > self._max_sec:
            return False
        return len(self._tokens(islands)) <= MAX_WINDOW_TOKENS

    def _tokens(self, islands: Sequence[_Island]) -> list[int]:
        texts = [apply_case(self._spelt(i.first, i.stop), self._case, self.language) for i in islands]
        return self._engine.vocabulary.encode(join_texts(texts), language=self.language)

    def _split(self, island: _Island) -> Iterator[_Island]:
        """Cut an island that is too long where a silence near its middle is expected to lie in the text."""
        start_sec, end_sec = island.before.end, island.after.start
        middle, quarter = (start_sec + end_sec) / 2, (end_sec - start_sec) / 4
        inside = [gap for gap in self._gaps if abs((gap.start + gap.end) / 2 - middle) < quarter]
        active = self._active(island.first, island.stop)
        if self._fits([island]) or not inside or len(active) < 2:
            yield island
            return
        gap = max(inside, key=lambda gap: gap.end - gap.start)
        expected = np.abs(self._expected_sec[active[1:]] - (gap.start + gap.end) / 2)
        ends = [self._ends_sentence(i, following) for i, following in itertools.pairwise(active)]
        at = active[1 + int((expected + np.where(ends, 0.0, 1.0)).argmin())]  # rather between sentences
        yield from self._split(_Island(island.first, at, island.before, gap))
        yield from self._split(_Island(at, island.stop, gap, island.after))

    # alignment, and its cutting into clips

    def _align(self, window: Sequence[_Island]) -> bool:
        """Place the words of a window in the audio; False if it is too long, or the words cannot be told apart."""
        start_sec, end_sec = _padded(window[0].before, window[-1].after)
        clip = self._audio[round(start_sec * SAMPLE_RATE) : round(end_sec * SAMPLE_RATE)]
        tokens = self._tokens(window)
        if len(clip) > CONTEXT_SAMPLES or len(tokens) > MAX_WINDOW_TOKENS:
            return False
        engine, options = self._engine, self._options
        encoded = engine.encode([clip], options.trailing_silence_sec)
        (words,) = engine.align(encoded, [clip], [tokens], options)
        active = self._active(window[0].first, window[-1].stop)
        if len(words) != len(active):
            return False
        foreign = self._foreign(encoded)
        for i, word in zip(active, shifted(words, start_sec), strict=True):
            self._said[i].word, self._said[i].foreign = word, foreign

        # the silences between them
        edges = {island.first: island.before for island in window}
        mids = self._middles(shifted(words, start_sec))
        for island in window:  # what was heard by itself had punctuation, and is where the island was cut
            for at in range(bisect.bisect_left(active, island.first), bisect.bisect_left(active, island.stop)):
                anchor = self._said[active[at]].anchor
                middle = mids[at] if anchor is None else self._heard_mids[anchor]
                mids[at] = min(max(middle, island.before.end), island.after.start)
        mids = list(itertools.accumulate(reversed(mids), min))[::-1]
        for (i, following), (left, right) in zip(itertools.pairwise(active), itertools.pairwise(mids), strict=True):
            gap = edges.get(following) or self._gap(left, right)
            self._said[i].after = self._said[following].before = gap
        self._said[active[0]].before, self._said[active[-1]].after = window[0].before, window[-1].after
        return True

    def _foreign(self, encoded: Any) -> str | None:
        """Return the language that is spoken instead of that of the transcript."""
        if not self._engine.vocabulary.multilingual or self.language is None:
            return None
        ((heard, probability),) = self._engine.detect(encoded)
        is_other = heard != self._engine.vocabulary.language_code(self.language)
        return heard if is_other and probability >= SURE_LANGUAGE else None

    def _units(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a window at the silences between sentences, or at pauses where there is no punctuation."""
        active = self._active(first, stop)
        begin = active[0]
        for i, following in itertools.pairwise(active):
            if self._said[i].after is not None and self._ends_sentence(i, following):
                yield from self._halves(begin, i + 1)
                begin = following
        yield from self._halves(begin, active[-1] + 1)

    def _ends_sentence(self, i: int, following: int) -> bool:
        left, right = self._said[i], self._said[following]
        one, other = self._passages[left.passage], self._passages[right.passage]
        if _END.search(self._text[left.start : left.stop]) or one.speaker != other.speaker:
            return True
        pause_sec = left.after.end - left.after.start if left.after else 0.0
        return not self._is_punctuated and pause_sec >= (PAUSE_SEC if one is other else CUE_PAUSE_SEC)

    def _halves(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a clip that is too long at its longest silences."""
        start_sec, end_sec = self._span(first, stop)
        inner = [i for i in self._active(first, stop)[1:] if self._said[i].before is not None]
        if end_sec - start_sec <= self._max_sec or not inner:
            yield first, stop
            return
        at = max(inner, key=lambda i: _length(self._said[i].before))
        yield from self._halves(first, at)
        yield from self._halves(at, stop)

    def _span(self, first: int, stop: int) -> tuple[float, float]:
        """Return where speech begins and ends."""
        active = self._active(first, stop)
        left, right = self._said[active[0]], self._said[active[-1]]
        assert left.word is not None and right.word is not None
        start_sec = left.word.start_sec if left.before is None else left.before.end
        end_sec = right.word.end_sec if right.after is None else right.after.start
        return start_sec, max(start_sec, end_sec)

    # judgement of single clips

    def _settle(self, left: _Unit, right: _Unit) -> None:
        """Move words to the other side of a silence, where the audio speaks more for them there."""
        gap = self._said[right.first].before
        while gap is not None:
            sure = self._logprob(left, left.first, left.stop) + self._logprob(right, right.first, right.stop)
            choices = []
            for at in self._active(left.first, left.stop)[-1:] + self._active(right.first, right.stop)[1:2]:
                moved = range(min(at, right.first), max(at, right.first))
                if left.first < at < right.stop:
                    total = self._logprob(left, left.first, at) + self._logprob(right, at, right.stop)
                    is_heard = any(self._said[i].anchor is not None for i in moved)
                    choices.append((total - (MOVE_HEARD_GAIN if is_heard else MOVE_GAIN), at))
            best, at = max(choices, default=(-math.inf, 0))
            if best <= sure:
                return
            for i in self._active(left.first, right.stop):
                if self._said[i].before is gap:
                    self._said[i].before = None
                if self._said[i].after is gap:
                    self._said[i].after = None
            left.stop = right.first = at
            self._said[self._active(left.first, at)[-1]].after = self._said[at].before = gap

    def _logprob(self, unit: _Unit, first: int, stop: int) -> float:
        """Return the log-probability of words in the audio of a clip, which stays that of its first words."""
        if unit.clip is None:
            active = self._active(unit.first, unit.stop)
            start_sec, end_sec = self._span(unit.first, unit.stop)
            before, after = self._said[active[0]].before, self._said[active[-1]].after
            cut = _padded(before or _Gap(start_sec, start_sec), after or _Gap(end_sec, end_sec))
            unit.clip = self._audio[slice(*(round(sec * SAMPLE_RATE) for sec in cut))][:CONTEXT_SAMPLES]
            unit.encoded = self._engine.encode([unit.clip], self._options.trailing_silence_sec)
        if (first, stop) not in unit.logprobs:
            unit.logprobs[first, stop] = self._logprob_of(unit, self._spelt(first, stop))
        return unit.logprobs[first, stop]

    def _logprob_of(self, unit: _Unit, text: str) -> float:
        """Return the log-probability of a text in the audio of a clip."""
        return sum(word.logprob * max(1, word.tokens) for word in self._place(unit.encoded, unit.clip, text))

    def _place(self, encoded: Any, clip: Waveform, text: str) -> Sequence[Word]:
        """Align a text with any audio that was encoded."""
        text = apply_case(text, self._case, self.language)
        tokens = self._engine.vocabulary.encode(text, language=self.language)[:MAX_WINDOW_TOKENS]
        return self._engine.align(encoded, [clip], [tokens], self._options)[0] if tokens else ()

    def _doubt(self, unit: _Unit, first: int, stop: int) -> tuple[int, int]:
        """Compare words that were not heard with what is heard of the clip by itself.

        Return how many more words are written than heard at its beginning and at its end; negative where fewer are.
        """
        words = [self._said[i] for i in self._active(first, stop)]
        if all(word.anchor is not None or not word.key for word in words):
            return 0, 0
        likely = self._logprob(unit, first, stop)
        if unit.heard is None:
            (result,) = self._engine.decode(unit.encoded, [unit.clip], self._options)
            unit.heard = [result.text[start:end] for start, end, _ in word_ranges(result.text)]
        written = [self._text[word.start : word.stop] for word in words]
        keys = [word.key for word in words], [self._key(text) for text in unit.heard]
        pairs = difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes()
        for tag, i1, i2, j1, j2 in pairs:
            unheard = [word for word in words[i1:i2] if word.anchor is None and word.key]
            if tag == "equal" or not unheard:
                continue
            other = join_texts([*written[:i1], *unit.heard[j1:j2], *written[i2:]])
            gain = likely - self._logprob_of(unit, other)
            for word in unheard:
                word.certainty = min(0.0, gain / math.sqrt(sum(bool(said.key) for said in words[i1:i2])))
        # of texts that have little in common the audio must speak for each word more than silence does
        if sum(word.anchor is not None or word.certainty == 0.0 for word in words) * 2 < len(words):
            text = self._spelt(first, stop)
            placed, priors = self._place(unit.encoded, unit.clip, text), self._place(self._silence, _QUIET, text)
            for said, there, prior in zip(words, placed, priors, strict=False):
                if said.anchor is None and said.key:
                    said.certainty = min(said.certainty, 2 * there.logprob - prior.logprob)
        lead, rest = (i2 - i1 - (j2 - j1) for _, i1, i2, j1, j2 in (pairs[0], pairs[-1]))
        return lead, rest

    def _trim(self, unit: _Unit, following: _Unit | None, surplus: tuple[int, int]) -> Iterator[Excerpt]:
        """Leave out words at an end of a clip for which nothing is heard; the clip that follows has them to judge."""
        active = self._active(unit.first, unit.stop)
        certainties = [self._said[i].certainty for i in active]
        for at_end, count in enumerate(surplus):
            if not 0 < count <= min(EDGE_WORDS, len(active) - 2):
                continue
            cut, kept = (active[-count:], active[:-count]) if at_end else (active[:count], active[count:])
            first, stop = kept[0], cut[0] if at_end else unit.stop
            doubtful = min((self._said[i] for i in cut), key=lambda word: word.certainty)
            score = doubtful.certainty
            if score < EDGE_SCORE and min(self._doubt(unit, first, stop)) >= 0 and self._are_right(first, stop):
                gap = self._said[active[-1]].after
                self._said[kept[0]].before = self._said[active[0]].before
                self._said[kept[-1]].after = gap
                unit.first, unit.stop = first, stop
                if at_end and following is not None and gap is self._said[following.first].before:
                    self._said[cut[0]].before, self._said[cut[-1]].after = gap, None
                    self._said[following.first].before, following.first = None, cut[0]
                    return
                edge_sec = self._span(first, stop)[at_end]
                reason = self._not_heard(doubtful)
                yield self._excerpt(cut[0], cut[-1] + 1, reason=reason, score=score, around=(edge_sec, edge_sec))
                return
            for i, certainty in zip(active, certainties, strict=True):
                self._said[i].certainty = certainty

    def _are_right(self, first: int, stop: int) -> bool:
        return all(self._said[i].certainty >= self._min_score for i in self._active(first, stop))

    def _judge(self, unit: _Unit, following: _Unit | None) -> Iterator[Excerpt]:
        """Judge a clip; where only some of its words are wrong, what silences part from them stays."""
        yield from self._trim(unit, following, self._doubt(unit, unit.first, unit.stop))
        active = self._active(unit.first, unit.stop)
        stops = [j for i, j in itertools.pairwise(active) if _length(self._said[i].after) >= MIN_GAP_SEC]
        runs = itertools.pairwise([unit.first, *stops, unit.stop])  # of words, between silences
        joined = [(*group,) for _, group in itertools.groupby(runs, lambda run: self._are_right(*run))]
        pieces = [(piece[0][0], piece[-1][1]) for piece in joined]

        def stays(piece: tuple[int, int]) -> bool:
            if len(pieces) == 1:
                return self._are_right(*piece)
            heard = sum(self._said[i].anchor is not None for i in self._active(*piece))
            long = piece[1] - piece[0] >= KEPT_WORDS
            return self._are_right(*piece) and long and heard * 2 >= piece[1] - piece[0]

        for _, group in itertools.groupby(pieces, stays):
            first, *_, stop = itertools.chain.from_iterable(group)
            yield self._check(first, stop)

    def _check(self, first: int, stop: int) -> Excerpt:
        """Return a clip, with the reason if it is none."""
        start_sec, end_sec = self._span(first, stop)
        words = [self._said[i] for i in self._active(first, stop)]
        heard = sum(map(len, self._heard_keys[self._heard_in(start_sec, end_sec)]))
        written = sum(len(word.key) for word in words)
        usual = max(0.1, self.speech_sec(start_sec, end_sec) * self._rate)
        worst = min(words, key=lambda word: word.certainty)
        reason = None
        if end_sec - start_sec > self._max_sec:
            reason = f"longer than {self._max_sec:g} s without a pause"
        elif words[0].foreign is not None:
            reason = f"sounds like {language_name(words[0].foreign)}"
        elif not SLOW * usual - FEW_CHARS < written < FAST * usual + FEW_CHARS:
            reason = f"{written / usual:.1f} times as many characters per second as in the whole recording"
        elif worst.certainty < self._min_score:
            reason = self._not_heard(worst)
        elif heard > MORE_HEARD * written + MORE_HEARD_CHARS:
            reason = "more is heard than is written"
        return self._excerpt(first, stop, reason=reason, score=worst.certainty, around=(start_sec, end_sec))

    def _not_heard(self, word: _Said) -> str:
        return f"{self._text[word.start : word.stop]!r} is not what is heard"

    def _excerpt(
        self, first: int, stop: int, *, reason: str | None, score: float = math.nan,
        around: tuple[float, float] | None = None,
    ) -> Excerpt:  # fmt: skip
        words = self._said[first:stop]
        start_sec, end_sec = around or (0.0, math.inf)
        start_sec, end_sec = min(start_sec, self._gaps[-1].end), min(end_sec, self._gaps[-1].end)
        cut_start_sec, cut_end_sec = _padded(
            words[0].before or _Gap(start_sec, start_sec), words[-1].after or _Gap(end_sec, end_sec)
        )
        heard = join_words(self._heard[self._heard_in(start_sec, end_sec)])
        return Excerpt(
            self._spelt(first, stop), start_sec, end_sec, cut_start_sec, cut_end_sec,
            self._passages[words[0].passage].speaker, heard, score, reason,
        )  # fmt: skip


def _padded(before: _Gap, after: _Gap) -> tuple[float, float]:
    """Return where to cut: in the silences, at most half of them and `PAD_SEC`."""
    return before.end - min(PAD_SEC, _length(before) / 2), after.start + min(PAD_SEC, _length(after) / 2)


def _length(gap: _Gap | None) -> float:
    return 0.0 if gap is None else gap.end - gap.start
