"""Times of a stream's words: when each was said, first shown, shown for good and committed. Pure.

Committed words are aligned with the reference under "plain-v1", which normalises each word by itself, so that every
word keeps its times.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from src.evaluation.streams import SpeechStream, SpokenWord
from src.evaluation.text import PLAIN, align_words, normalize_plain
from src.inference.streaming.commit import Event, word_key
from src.inference.words import Word


@dataclass(frozen=True)
class CommittedWord:
    """A committed word, and the events that committed it, showed it for good, and first showed it at its place."""

    word: Word
    committed: Event
    stable: Event
    shown: Event


@dataclass(frozen=True)
class Display:
    """What a session showed.

    Attributes:
        words: those committed, in order.
        erased: words that were shown and then removed or changed, or that followed one that was.
        first: the event that showed the first word; None without one.
    """

    words: tuple[CommittedWord, ...]
    erased: int
    first: Event | None


def follow_words(events: Sequence[Event]) -> Display:
    """Follow each place of the shown text: the commits so far, then the last valid partial.

    Words are compared without case and punctuation, so that a comma that comes or goes changes nothing.
    """
    places: list[tuple[str, Event]] = []  # the word at each place, and the event since when
    first_at: dict[tuple[int, str], Event] = {}
    committed: list[tuple[Word, Event]] = []
    erased = 0
    for event, words in _changes(events):
        fixed = len(committed)
        keys, old = [word_key(word) for word in words], places[fixed:]
        same = [key == standing for key, (standing, _) in zip(keys, old, strict=False)]
        erased += len(old) - sum(itertools.takewhile(bool, same))
        places[fixed:] = [old[i] if i < len(same) and same[i] else (key, event) for i, key in enumerate(keys)]
        for place, key in enumerate(keys, start=fixed):
            first_at.setdefault((place, key), event)
        if event.kind == "commit":
            committed += [(word, event) for word in event.words]
    followed = [
        CommittedWord(word, event, places[place][1], first_at[place, places[place][0]])
        for place, (word, event) in enumerate(committed)
    ]
    return Display(tuple(followed), erased, next((event for event, words in _changes(events) if words), None))


def _changes(events: Sequence[Event]) -> Iterator[tuple[Event, tuple[Word, ...]]]:
    """Yield the words shown after those committed before, whenever they change.

    A commit voids the partial, and often the next partial follows at once: together they are one change.
    """
    showing = [event for event in events if event.kind != "final"]
    merged = False
    for event, following in itertools.zip_longest(showing, showing[1:]):
        if merged:
            merged = False
            continue
        merged = event.kind == "commit" and following is not None and following.kind == "partial"
        merged = merged and following.audio_sec == event.audio_sec
        yield event, event.words + (following.words if merged else ())


@dataclass(frozen=True)
class WordMatch:
    """An alignment of a reference and a hypothesis, by word index.

    Attributes:
        right: reference to hypothesis, where the whole word is the same.
        stands_for: hypothesis to reference, right or wrong; inserted words have none.
    """

    right: Mapping[int, int]
    stands_for: Mapping[int, int]


def match_words(reference: Sequence[str], hypothesis: Sequence[str]) -> WordMatch:
    """Align words under "plain-v1"; a word that the normaliser splits is right where all its parts are."""
    expected, found = _owners(reference), _owners(hypothesis)
    right: dict[int, int] = {}
    wrong: set[int] = set()
    stands_for: dict[int, int] = {}
    for step in align_words(" ".join(reference), " ".join(hypothesis), PLAIN):
        i = next(expected) if step.reference is not None else None
        j = next(found) if step.hypothesis is not None else None
        if i is not None and j is not None:
            stands_for.setdefault(j, i)
            if step.edit == "equal":
                right[i] = j
        if i is not None and step.edit != "equal":
            wrong.add(i)
    return WordMatch({i: j for i, j in right.items() if i not in wrong}, stands_for)


def _owners(words: Sequence[str]) -> Iterator[int]:
    """Yield the index of the word to which each word of the normalised text belongs."""
    for index, word in enumerate(words):
        for _ in normalize_plain(word).split():
            yield index


@dataclass(frozen=True)
class WordTiming:
    """A word that was committed right; times in seconds, those of the clock None where no replay's clock ran.

    Attributes:
        text: of the reference.
        clip: index into the stream's clips.
        start_sec, end_sec: when it was said.
        commit_audio_sec, commit_clock_sec: audio heard, and the clock, when it was committed.
        display_audio_sec, display_clock_sec: when it was shown for good.
        shown_audio_sec, shown_clock_sec: when it was first shown at its place.
    """

    text: str
    clip: int
    start_sec: float
    end_sec: float
    commit_audio_sec: float
    commit_clock_sec: float | None
    display_audio_sec: float
    display_clock_sec: float | None
    shown_audio_sec: float
    shown_clock_sec: float | None


def time_words(stream: SpeechStream, events: Sequence[Event], *, on_clock: bool) -> tuple[WordTiming, ...]:
    """Return the words that were committed right, in order.

    Args:
        stream: with the times of its words.
        events: of a session that heard it.
        on_clock: whether a `ReplayClock` stamped the events.
    """
    words = follow_words(events).words
    match = match_words([word.text for word in stream.words], [each.word.text for each in words])
    timings = []
    for index, place in match.right.items():
        said, heard = stream.words[index], words[place]
        times: list[float | None] = []
        for event in (heard.committed, heard.stable, heard.shown):
            times += [event.audio_sec, event.emitted_at if on_clock else None]
        timings.append(WordTiming(said.text, said.clip, said.start_sec, said.end_sec, *times))  # type: ignore[arg-type]
    return tuple(timings)


def texts_by_clip(stream: SpeechStream, hypothesis: Sequence[Word], match: WordMatch) -> list[str]:
    """Cut a transcript of the whole stream into those of its clips, as mwerSegmenter does (Matusov et al. 2005).

    Each word goes where the reference word is that it is aligned with. An inserted word goes to the nearer, in time, of
    the reference words around it.
    """
    texts: list[list[str]] = [[] for _ in stream.clips]
    anchored = sorted(match.stands_for)
    for place, word in enumerate(hypothesis):
        after = bisect.bisect_left(anchored, place)
        around = [stream.words[match.stands_for[j]] for j in anchored[max(0, after - 1) : after + 1]]
        if place in match.stands_for:
            around = [stream.words[match.stands_for[place]]]
        middle = (word.start_sec + word.end_sec) / 2
        nearest = min(around or stream.words, key=lambda w: max(w.start_sec - middle, middle - w.end_sec, 0.0))
        texts[nearest.clip].append(word.text)
    return [" ".join(words) for words in texts]


def find_turns(stream: SpeechStream, events: Sequence[Event], match: WordMatch) -> list[tuple[SpokenWord, Event]]:
    """Pair each `final` with the last word of the reference that it could contain.

    It is the last one, in the clip in which the final's text ends, that had been said when the final came. A final
    without any word of the reference is left out.
    """
    turns = []
    anchored = sorted(match.stands_for)
    begin = end = 0  # committed words
    for event in events:
        end += len(event.words) if event.kind == "commit" else 0
        if event.kind != "final":
            continue
        before = bisect.bisect_left(anchored, end)
        if before and anchored[before - 1] >= begin:
            last = match.stands_for[anchored[before - 1]]
            clip = stream.words[last].clip
            while last + 1 < len(stream.words) and stream.words[last + 1].clip == clip:
                if stream.words[last + 1].end_sec > event.audio_sec:
                    break
                last += 1
            turns.append((stream.words[last], event))
        begin = end
    return turns
