"""Which words are final: hypotheses over a moving window of audio in, an append-only transcript out. Pure.

AlignAtt (Papi et al. 2023) commits what the decoder has heard to its end; LocalAgreement-2 (Liu et al. 2020; Macháček
et al. 2023) what two successive hypotheses begin with alike. Each hypothesis begins with words that are committed
already, perhaps spelt otherwise. whisper_streaming drops them by time and then by an n-gram match of at most five
words; here one alignment decides, whose cost counts both differing words and words on the wrong side of the last
committed time, so that neither a re-spelt word nor a shifted time commits a word twice.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from src.inference.words import Word
from src.utils.config import StreamingConfig

TIME_SLACK_SEC = 0.2  # how far word times move between hypotheses
EDIT_COST = 2  # against 1 for a word at the wrong time: text is the better witness
UNCONFIRMED_SEC = 2.0  # audio after a word that makes it final although the last hypothesis had another
CHUNK_SEC = 2.0
CHUNK_OVERLAP_SEC = 0.5
LOOP_MAX_NGRAM = 4  # words
LOOP_MIN_COPIES = 3
LOOP_MIN_WORDS = 12  # people say "no, no, no, no"; nobody says twelve words of it
MAX_WORDS_PER_SEC = 8.0  # of a repetition; fast speech has 4 to 5


@dataclass(frozen=True)
class CommitResult:
    """What one update decided.

    Attributes:
        committed: words that became final now, in absolute time, after all committed before.
        partial: the rest of the newest hypothesis; may change or vanish.
    """

    committed: tuple[Word, ...]
    partial: tuple[Word, ...]


class CommitPolicy(Protocol):
    """Decides which words of a hypothesis are final. Nothing committed is ever retracted, and times never decrease.

    Attributes:
        forces_prefix: hypotheses are to begin with the committed words that are still held.
        interval_sec: audio between updates; None leaves it to `streaming.min_chunk_sec`.
    """

    forces_prefix: bool
    interval_sec: float | None

    def window_start_sec(self, held_from_sec: float, audio_end_sec: float) -> float:
        """From where on the audio is to be decoded."""

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> CommitResult:
        """Take the hypothesis for all audio held, in absolute times, and the time at which that audio ends."""

    def flush(self, words: Sequence[Word]) -> CommitResult:
        """Commit all of a hypothesis, because its audio is complete."""

    def discard_before(self, sec: float) -> None:
        """Learn that audio before this time left the buffer: hypotheses begin after it."""


class _Transcript:
    """What every policy shares: the committed words, and which words of a hypothesis come after them.

    Words are compared without case and punctuation; the newer spelling and times are taken.
    """

    forces_prefix = False
    interval_sec: float | None = None

    def __init__(self) -> None:
        self._committed: list[Word] = []  # those whose audio is still held, and a few before
        self._held_from_sec = 0.0
        self._last_end_sec = 0.0
        self._previous: tuple[str, ...] = ()  # keys of the last hypothesis after what is committed, for who compares

    def window_start_sec(self, held_from_sec: float, audio_end_sec: float) -> float:
        """All audio held is decoded."""
        return held_from_sec

    def flush(self, words: Sequence[Word]) -> CommitResult:
        """Commit every word of a hypothesis; loops are dropped."""
        self._previous = ()
        return CommitResult(self._commit(self._new_words(words)), ())

    def discard_before(self, sec: float) -> None:
        """Stop expecting committed words that ended before `sec` in coming hypotheses."""
        self._held_from_sec = max(self._held_from_sec, sec)
        held = sum(word.end_sec > self._held_from_sec for word in self._committed)
        self._committed = self._committed[-max(held, LOOP_MIN_WORDS) :]  # the few before: loops cross the cut

    def _new_words(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Return the words after the committed ones, less loops.

        The cut k minimises 2 x edit distance(committed words held, words[:k]) + words whose middle lies on the wrong
        side of the last committed time by more than `TIME_SLACK_SEC`; of equals, the cut nearest to that time.
        """
        words = _without_loops((), words)  # what is committed has none: aligned first, they would shift the cut
        expected = [word_key(word) for word in self._committed if word.end_sec > self._held_from_sec]
        middles = [(word.start_sec + word.end_sec) / 2 for word in words]
        late = [middle > self._last_end_sec + TIME_SLACK_SEC for middle in middles]
        early = [middle < self._last_end_sec - TIME_SLACK_SEC for middle in middles]
        by_time = sum(middle < self._last_end_sec for middle in middles)
        distances = _prefix_distances(expected, [word_key(word) for word in words])
        costs = [EDIT_COST * distance + sum(late[:k]) + sum(early[k:]) for k, distance in enumerate(distances)]
        cut = min(range(len(costs)), key=lambda k: (costs[k], abs(k - by_time)))
        return _without_loops(self._committed[-LOOP_MIN_WORDS:], words[cut:])

    def _commit(self, words: Sequence[Word], audio_end_sec: float = float("inf")) -> tuple[Word, ...]:
        committed = []
        for word in words:
            start = max(word.start_sec, self._last_end_sec)
            end = max(min(word.end_sec, audio_end_sec), start)
            committed.append(replace(word, start_sec=start, end_sec=end))
            self._last_end_sec = end
        self._committed += committed
        return tuple(committed)


class LocalAgreement(_Transcript):
    """LocalAgreement-2: commits the longest common beginning of the last two hypotheses."""

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> CommitResult:
        """Commit what this hypothesis and the last one agree on.

        Args:
            words: the hypothesis for all audio held, absolute times.
            audio_end_sec: end of that audio; words are clipped to it.
        Returns: words new in the transcript, and the tail.
        """
        new = self._new_words(words)
        keys = tuple(word_key(word) for word in new)
        agreed = 0
        while agreed < min(len(keys), len(self._previous)) and keys[agreed] == self._previous[agreed]:
            agreed += 1
        self._previous = keys[agreed:]
        return CommitResult(self._commit(new[:agreed], audio_end_sec), new[agreed:])


class AlignAtt(_Transcript):
    """AlignAtt (Papi et al. 2023): commits the words whose attention ends before the newest audio.

    The decoder looks at the audio that a word comes from. A word that ends at least `guard_sec` before the end of the
    audio was said whole, with what follows it in view; a later one may still change. The committed words are forced as
    the beginning of the next hypothesis, so that it goes on from them.

    Beyond the paper, the last hypothesis must have had the word at its place too, unless `UNCONFIRMED_SEC` have passed:
    with updates every 0.3 s this costs no latency in the median and takes back half of what streaming adds to the error
    rate (tiny.en int8, 90 clips joined with pauses, 2026-11-28: WER 16.8 % with it, 18.4 without, 15.3 offline).

    Args:
        guard_sec: between the end of a committed word and the end of the audio.
    """

    forces_prefix = True

    def __init__(self, guard_sec: float) -> None:
        super().__init__()
        self._guard_sec = guard_sec

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> CommitResult:
        """Commit the words that ended before the guard; see `LocalAgreement.update`."""
        new = self._new_words(words)
        keys = tuple(word_key(word) for word in new)
        settled = 0
        for word, key, before in itertools.zip_longest(new, keys, self._previous[: len(new)]):
            wait_sec = self._guard_sec if key == before else max(self._guard_sec, UNCONFIRMED_SEC)
            if word.end_sec > audio_end_sec - wait_sec:
                break
            settled += 1
        self._previous = keys[settled:]
        return CommitResult(self._commit(new[:settled], audio_end_sec), new[settled:])


class ChunkMerge(_Transcript):
    """Independent chunks of 2 s that overlap by 0.5 s, merged at a word's middle: how live captions are often made.

    Kept for comparison: a word that a chunk's edge cuts is wrong in both.
    """

    interval_sec: float | None = CHUNK_SEC - CHUNK_OVERLAP_SEC

    def window_start_sec(self, held_from_sec: float, audio_end_sec: float) -> float:
        """Decode the newest chunk alone."""
        return max(held_from_sec, audio_end_sec - CHUNK_SEC)

    def update(self, words: Sequence[Word], *, audio_end_sec: float) -> CommitResult:
        """Commit the words of a chunk whose middle lies between the middles of its overlaps."""
        until_sec = audio_end_sec - CHUNK_OVERLAP_SEC / 2
        committed = self._commit([word for word in self._unheard(words) if _middle_sec(word) <= until_sec])
        self._last_end_sec = max(self._last_end_sec, until_sec)
        return CommitResult(committed, tuple(word for word in words if _middle_sec(word) > until_sec))

    def flush(self, words: Sequence[Word]) -> CommitResult:
        """Commit the rest of the last chunk."""
        return CommitResult(self._commit(self._unheard(words)), ())

    def _unheard(self, words: Sequence[Word]) -> tuple[Word, ...]:
        late = [word for word in words if _middle_sec(word) > self._last_end_sec]
        return _without_loops(self._committed[-LOOP_MIN_WORDS:], late)


def make_policy(settings: StreamingConfig) -> CommitPolicy:
    """Make the policy that `streaming.policy` names."""
    if settings.policy == "alignatt":
        return AlignAtt(settings.guard_sec)
    return LocalAgreement() if settings.policy == "local_agreement" else ChunkMerge()


def _middle_sec(word: Word) -> float:
    return (word.start_sec + word.end_sec) / 2


def word_key(word: Word) -> str:
    """Return a word without case and punctuation; the text itself where nothing else is in it."""
    key = "".join(c for c in word.text.casefold() if not unicodedata.category(c).startswith(("P", "S")))
    return key or word.text


def find_loop(words: Sequence[Word], *, beyond: int = 0) -> range | None:
    """Find a repetition that no speaker makes.

    A loop is an n-gram (n from 1 to 4 words) said at least three times in a row that spans at least 12 words, or goes
    by at more than 8 words a second: the decoder runs on while the audio does not.

    Args:
        beyond: only loops that reach past this index count.
    Returns: the indices of the second and later copies of the earliest loop, with a copy cut off at the end; or None.
    """
    keys = [word_key(word) for word in words]
    for start in range(len(keys)):
        for n in range(1, LOOP_MAX_NGRAM + 1):
            gram = keys[start : start + n]
            stop = start + n
            while keys[stop : stop + n] == gram:
                stop += n
            looping = stop - start >= LOOP_MIN_COPIES * n and stop > beyond
            if looping and _implausible(words[start:stop]):
                cut_off = len(keys) - stop < n and keys[stop:] == gram[: len(keys) - stop]
                return range(start + n, len(keys) if cut_off else stop)
    return None


def _without_loops(before: Sequence[Word], new: Sequence[Word]) -> tuple[Word, ...]:
    """Drop from `new` the copies of loops, which may have begun in `before`: what follows a loop is kept."""
    kept = list(new)
    while (loop := find_loop([*before, *kept], beyond=len(before))) is not None:
        del kept[max(0, loop.start - len(before)) : loop.stop - len(before)]
    return tuple(kept)


def _implausible(repetition: Sequence[Word]) -> bool:
    duration_sec = repetition[-1].end_sec - repetition[0].start_sec
    return len(repetition) >= LOOP_MIN_WORDS or len(repetition) > MAX_WORDS_PER_SEC * duration_sec


def _prefix_distances(expected: Sequence[str], found: Sequence[str]) -> list[int]:
    """Return the edit distance of `expected` to every beginning of `found`, the empty one first."""
    row = list(range(len(found) + 1))
    for i, wanted in enumerate(expected, start=1):
        above, row = row, [i]
        for j, word in enumerate(found, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (wanted != word)))
    return row
