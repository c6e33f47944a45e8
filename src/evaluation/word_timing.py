"""When a stream's words were committed and shown, beside when they were said. Pure.

Events are followed over the display; the committed words are aligned with the reference under "plain-v1", which
normalises each word by itself, so that every word keeps its times.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from src.evaluation.edits import align_words
from src.evaluation.streams import SpokenWord, TimedStream
from src.evaluation.text import PLAIN, normalize_plain
from src.inference.streaming.commit import word_key
from src.inference.streaming.events import Event
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
        erased: words that were shown and then taken away or changed, or stood after one that was.
        first: the event that showed the first word; None without one.
    """

    words: tuple[CommittedWord, ...]
    erased: int
    first: Event | None


@dataclass(frozen=True)
class WordMatch:
    """An alignment by word index.

    Attributes:
        right: reference to hypothesis, where the whole word is the same.
        stands_for: hypothesis to reference, right or wrong; words put in have none.
    """

    right: Mapping[int, int]
    stands_for: Mapping[int, int]


@dataclass(frozen=True)
class WordTiming:
    """A word that was committed right, in seconds; the clock's are None where the events carry no replay's clock.

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


def time_words(stream: TimedStream, events: Sequence[Event], *, on_clock: bool) -> tuple[WordTiming, ...]:
    """Return the words that were committed right, in order.

    Args:
        on_clock: the events were stamped by a `ReplayClock`.
    """
    words = follow_words(events).words
    match = match_stream(stream, [each.word for each in words])
    timings = []
    for index, place in match.right.items():
        said, heard = stream.words[index], words[place]
        timing = WordTiming(
            text=said.text,
            clip=said.clip,
            start_sec=said.start_sec,
            end_sec=said.end_sec,
            commit_audio_sec=heard.committed.audio_sec,
            commit_clock_sec=heard.committed.emitted_at if on_clock else None,
            display_audio_sec=heard.stable.audio_sec,
            display_clock_sec=heard.stable.emitted_at if on_clock else None,
            shown_audio_sec=heard.shown.audio_sec,
            shown_clock_sec=heard.shown.emitted_at if on_clock else None,
        )
        timings.append(timing)
    return tuple(timings)


def follow_words(events: Sequence[Event]) -> Display:
    """Follow each place of the text over what is shown: the commits so far, then the last partial, if not void.

    A word is its text without case and punctuation, so that a comma that comes or goes changes nothing.
    """
    places: list[tuple[str, Event]] = []  # the word that stands there, and the event since when
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


def match_stream(stream: TimedStream, hypothesis: Sequence[Word]) -> WordMatch:
    """Align a transcript of the whole stream with its reference."""
    return match_words([word.text for word in stream.words], [word.text for word in hypothesis])


def match_words(reference: Sequence[str], hypothesis: Sequence[str]) -> WordMatch:
    """Align words; one that the normaliser splits is right where all its parts are."""
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


def texts_by_clip(stream: TimedStream, hypothesis: Sequence[Word], match: WordMatch) -> list[str]:
    """Cut a transcript of the whole stream into those of its clips.

    As mwerSegmenter does (Matusov et al. 2005): each word goes where the reference word is that it is aligned with. A
    word put in goes to the nearer, in time, of the reference words around it.

    Args:
        hypothesis: times in seconds of the stream.
        match: of both, as `match_stream` gives it.
    """
    texts: list[list[str]] = [[] for _ in stream.clips]
    anchored = sorted(match.stands_for)
    for place, word in enumerate(hypothesis):
        after = bisect.bisect_left(anchored, place)
        around = [stream.words[match.stands_for[j]] for j in anchored[max(0, after - 1) : after + 1]]
        if place in match.stands_for:
            around = [stream.words[match.stands_for[place]]]
        nearest = min(around or stream.words, key=lambda said: _distance_sec(word, said))
        texts[nearest.clip].append(word.text)
    return [" ".join(words) for words in texts]


def find_turns(stream: TimedStream, events: Sequence[Event], match: WordMatch) -> list[tuple[SpokenWord, Event]]:
    """Pair each `final` with the last word that it could hold.

    That is the last word of the reference, in the clip in which the final's text ends, that had been said when it came.
    A final without any word of the reference has none and is left out.
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


def _changes(events: Sequence[Event]) -> Iterator[tuple[Event, tuple[Word, ...]]]:
    """Yield what is shown after the words committed before, whenever it changes.

    A commit voids the partial, and often the next partial follows at once: together they are one change.
    """
    showing = [event for event in events if event.kind != "final"]
    together = False
    for event, following in itertools.zip_longest(showing, showing[1:]):
        if together:
            together = False
            continue
        together = event.kind == "commit" and following is not None and following.kind == "partial"
        together = together and following.audio_sec == event.audio_sec
        yield event, event.words + (following.words if together else ())


def _owners(words: Sequence[str]) -> Iterator[int]:
    """Yield the index of the word to which each word of the normalised text belongs."""
    for index, word in enumerate(words):
        for _ in normalize_plain(word).split():
            yield index


def _distance_sec(word: Word, said: SpokenWord) -> float:
    middle = (word.start_sec + word.end_sec) / 2
    return max(said.start_sec - middle, middle - said.end_sec, 0.0)
