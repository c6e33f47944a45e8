"""Commit policies: hypotheses over a moving window of audio in, an append-only transcript and its events out. Pure.

AlignAtt (Papi et al. 2023) commits the words that the decoder has heard to their end; LocalAgreement-2 (Liu et al.
2020; Macháček et al. 2023) the common beginning of two successive hypotheses. Every hypothesis begins with words that
are committed already, perhaps respelt or shifted: one alignment by text and time finds them, so that none is committed
twice.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from src.inference.words import Word, cut_words, whole_tokens
from src.utils.config import StreamingConfig
from src.utils.languages import is_unspaced_character

TIME_SLACK_SEC = 0.2  # how far word times move between hypotheses
EDIT_COST = 2  # compared with 1 for a word at the wrong time: text is the better evidence
UNCONFIRMED_SEC = 2.0  # audio after a word that makes it final although the last hypothesis had another
CHUNK_SEC = 2.0
CHUNK_OVERLAP_SEC = 0.5
LOOP_MIN_COPIES = 3


@dataclass(frozen=True)
class LoopLimits:
    """Which repetitions no speaker makes, in words or in characters of a script without spaces."""

    ngram: int  # longest phrase
    calm_ngram: int  # likewise, below `CALM_PER_SEC`: a long one may be a verse
    span: int  # of all copies together: people say "no, no, no, no"; nobody says twelve words of it
    fast_span: int  # likewise, if they pass faster than `per_sec`
    per_sec: float  # beyond fast speech, which has 4 to 5 words, 8 Chinese or 18 Thai characters


WORD_LOOPS = LoopLimits(ngram=4, calm_ngram=4, span=12, fast_span=LOOP_MIN_COPIES, per_sec=8.0)
CHARACTER_LOOPS = LoopLimits(ngram=24, calm_ngram=12, span=30, fast_span=8, per_sec=24.0)
CALM_PER_SEC = 5.0  # characters; slower is an ordinary pace


@dataclass(frozen=True)
class Event:
    """Something that a listener should show.

    "commit": words that are now part of the transcript for good; they replace the last partial. "partial": the tail
    after them, replaced as a whole by the next partial. "final": all words committed since the last final, at a pause
    or at the end.
    """

    kind: Literal["partial", "commit", "final"]
    words: tuple[Word, ...]  # in seconds since the stream began
    text: str
    audio_sec: float  # heard when it was emitted
    emitted_at: float  # by the session's clock, seconds
    sequence: int  # 0, 1, 2, ... over the session
    language: str | None = None  # that the words were decoded in; None for an English-only model

    @property
    def space(self) -> bool:
        """Whether a space separates the text from the commits before it; at the beginning there is nothing before."""
        return bool(self.words) and self.words[0].space


class CommitPolicy:
    """Decides which words of a hypothesis are final. Nothing committed is ever retracted, and times never decrease.

    In scripts without spaces a word is a character, also where a hypothesis has a run of them as one; those that share
    a token are committed together: a decoder that is given a part of them goes on with another word. Words are compared
    without case and punctuation; the newer spelling and times are kept.
    """

    forces_prefix = False  # hypotheses must begin with the committed words whose audio is still held
    interval_sec: float | None = None  # audio between updates; None leaves it to `streaming.min_chunk_sec`
    window_sec = math.inf  # of the newest audio, to decode

    def __init__(self) -> None:
        self._committed: list[Word] = []  # those whose audio is still held, and a few before
        self._held_from_sec = self._last_end_sec = 0.0
        self._previous: tuple[str, ...] = ()  # keys of the last hypothesis after the committed words

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
        """Take a hypothesis for all audio held, in absolute time; return the words that became final, and the tail."""
        new = self._new_words(cut_words(words))
        keys = tuple(map(word_key, new))
        settled = whole_tokens(new, self._settled(new, keys, audio_end_sec))
        self._previous = keys[settled:]
        return self._commit(new[:settled], audio_end_sec), new[settled:]

    def _settled(self, new: Sequence[Word], keys: tuple[str, ...], audio_end_sec: float) -> int:
        """Return how many of the new words are final."""
        raise NotImplementedError

    def flush(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Commit every new word of a hypothesis; loops are dropped."""
        self._previous = ()
        return self._commit(self._new_words(cut_words(words)))

    def discard_before(self, sec: float) -> None:
        """Note that audio before `sec` is gone: coming hypotheses begin after it."""
        self._held_from_sec = max(self._held_from_sec, sec)
        held = sum(word.end_sec > self._held_from_sec for word in self._committed)
        self._committed = self._committed[-max(held, CHARACTER_LOOPS.span) :]  # a few before the cut: loops cross it

    def _new_words(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Return the words after the committed ones, without loops.

        The cut k minimises 2 x edit distance(committed words held, words[:k]) + words whose middle lies on the wrong
        side of the last committed time by more than `TIME_SLACK_SEC`. Of equals, the cut before the character that the
        last hypothesis had there wins (in scripts without spaces: times are off by a character), then the nearest to
        that time.
        """
        words = _without_loops((), words)  # committed words have none: a loop would shift the cut
        expected = [word_key(word) for word in self._committed if word.end_sec > self._held_from_sec]
        middles = [_middle_sec(word) for word in words]
        late = [middle > self._last_end_sec + TIME_SLACK_SEC for middle in middles]
        early = [middle < self._last_end_sec - TIME_SLACK_SEC for middle in middles]
        by_time = sum(middle < self._last_end_sec for middle in middles)
        keys = [word_key(word) for word in words]
        follows = [bool(key and is_unspaced_character(key[0])) and key in self._previous[:1] for key in keys]
        costs = [
            (EDIT_COST * d + sum(late[:k]) + sum(early[k:]), not any(follows[k : k + 1]), abs(k - by_time))
            for k, d in enumerate(_prefix_distances(expected, keys))
        ]
        return _without_loops(self._committed[-CHARACTER_LOOPS.span :], words[costs.index(min(costs)) :])

    def _commit(self, words: Sequence[Word], audio_end_sec: float = math.inf) -> tuple[Word, ...]:
        committed = []
        for word in words:
            start = max(word.start_sec, self._last_end_sec)
            self._last_end_sec = max(min(word.end_sec, audio_end_sec), start)
            committed.append(replace(word, start_sec=start, end_sec=self._last_end_sec))
        self._committed += committed
        return tuple(committed)


class LocalAgreement(CommitPolicy):
    """LocalAgreement-2: commits the longest common beginning of the last two hypotheses."""

    def _settled(self, new: Sequence[Word], keys: tuple[str, ...], audio_end_sec: float) -> int:
        pairs = enumerate(zip(keys, self._previous, strict=False))
        return next((i for i, (key, before) in pairs if key != before), min(len(keys), len(self._previous)))


class AlignAtt(CommitPolicy):
    """AlignAtt (Papi et al. 2023): commits the words whose attention ends `guard_sec` before the newest audio.

    The decoder attends to the audio that a word comes from: such a word was heard whole, with what follows it in view;
    a later one may still change. The committed words are forced as the beginning of the next hypothesis.

    Beyond the paper, the last hypothesis must have had the word at its place too, unless `UNCONFIRMED_SEC` have passed:
    with updates every 0.3 s this costs no latency in the median and halves what streaming adds to the error rate
    (tiny.en int8, 90 clips joined with pauses, 2026-11-28: WER 16.8 % with it, 18.4 without, 15.3 offline).
    """

    forces_prefix = True

    def __init__(self, guard_sec: float) -> None:
        super().__init__()
        self._guard_sec = guard_sec

    def _settled(self, new: Sequence[Word], keys: tuple[str, ...], audio_end_sec: float) -> int:
        for i, word in enumerate(new):
            confirmed = keys[i : i + 1] == self._previous[i : i + 1]
            wait_sec = self._guard_sec if confirmed else max(self._guard_sec, UNCONFIRMED_SEC)
            if word.end_sec > audio_end_sec - wait_sec:
                return i
        return len(new)


class ChunkMerge(CommitPolicy):
    """Independent chunks of 2 s that overlap by 0.5 s, merged at a word's middle: how live captions are often made.

    Kept for comparison: a word that a chunk's edge cuts is wrong in both chunks. In scripts without spaces the overlap
    is aligned by text, too: a character is no longer than times are wrong.
    """

    window_sec, interval_sec = CHUNK_SEC, CHUNK_SEC - CHUNK_OVERLAP_SEC

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
        """Commit the words of a chunk whose middle lies between the middles of its overlaps."""
        words, until_sec = cut_words(words), audio_end_sec - CHUNK_OVERLAP_SEC / 2
        new = self._new_words(words)
        count = whole_tokens(new, sum(_middle_sec(word) <= until_sec for word in new))
        committed, tail = self._commit(new[:count]), new[count:]
        self._last_end_sec = max(self._last_end_sec, until_sec)
        self._previous = tuple(map(word_key, tail))
        return committed, tail

    def _new_words(self, words: Sequence[Word]) -> tuple[Word, ...]:
        if words and is_unspaced_character(words[0].text[0]):
            self._held_from_sec = max(self._held_from_sec, words[0].start_sec)
            return super()._new_words(words)
        late = [word for word in words if _middle_sec(word) > self._last_end_sec]
        return _without_loops(self._committed[-CHARACTER_LOOPS.span :], late)


def make_policy(settings: StreamingConfig) -> CommitPolicy:
    """Make the policy that `streaming.policy` names."""
    if settings.policy == "alignatt":
        return AlignAtt(settings.guard_sec)
    return LocalAgreement() if settings.policy == "local_agreement" else ChunkMerge()


def word_key(word: Word) -> str:
    """Return a word without case, punctuation and invisible characters; the text itself if nothing else is in it."""
    key = "".join(c for c in word.text.casefold() if not unicodedata.category(c).startswith(("P", "S", "Cf")))
    return key or word.text


def find_loop(words: Sequence[Word], *, beyond: int = 0) -> range | None:
    """Find a repetition that no speaker makes: the decoder runs on while the audio does not.

    It is a phrase at least three times in a row that is as long as `WORD_LOOPS` or `CHARACTER_LOOPS` says, whichever
    its first word belongs to, and that reaches past index `beyond`. Returns the indices of the second and later copies
    of the earliest one, including a copy cut off at the end.
    """
    keys = [word_key(word) for word in words]
    for start, key in enumerate(keys):
        limits = CHARACTER_LOOPS if is_unspaced_character(key[:1]) else WORD_LOOPS
        for n in range(1, limits.ngram + 1):
            gram = keys[start : start + n]
            stop = start + n
            while keys[stop : stop + n] == gram:
                stop += n
            span = stop - start
            if span < LOOP_MIN_COPIES * n or stop <= beyond:
                continue
            duration_sec = words[stop - 1].end_sec - words[start].start_sec
            is_long = span >= limits.span and (n <= limits.calm_ngram or span > CALM_PER_SEC * duration_sec)
            if is_long or (span >= limits.fast_span and span > limits.per_sec * duration_sec):
                cut_off = len(keys) - stop < n and keys[stop:] == gram[: len(keys) - stop]
                return range(start + n, len(keys) if cut_off else stop)
    return None


def _without_loops(before: Sequence[Word], new: Sequence[Word]) -> tuple[Word, ...]:
    """Drop from `new` the copies of loops, which may have begun in `before`; what follows a loop is kept."""
    kept = list(new)
    while (loop := find_loop([*before, *kept], beyond=len(before))) is not None:
        del kept[max(0, loop.start - len(before)) : loop.stop - len(before)]
    return tuple(kept)


def _middle_sec(word: Word) -> float:
    return (word.start_sec + word.end_sec) / 2


def _prefix_distances(expected: Sequence[str], found: Sequence[str]) -> list[int]:
    """Return the edit distance of `expected` to every beginning of `found`, the empty one first."""
    row = list(range(len(found) + 1))
    for i, wanted in enumerate(expected, start=1):
        above, row = row, [i]
        for j, word in enumerate(found, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (wanted != word)))
    return row
