"""Words followed from the events to the reference, on cases done by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from src.evaluation.text import PLAIN, normalize_plain, sum_counts, word_counts
from src.evaluation.word_timing import (
    find_turns,
    follow_words,
    match_words,
    texts_by_clip,
    time_words,
)
from src.inference.streaming.commit import Event
from src.inference.words import Word
from tests.evaluation.stream_scripts import event, spoken

FEW = st.sampled_from(["a", "b", "c"])


def test_a_correction_ends_what_was_shown_before() -> None:
    events = [
        event("partial", "the hat", 1.0, 1.1),
        event("partial", "the cat", 1.6, 1.8),
        event("commit", "the cat", 2.0, 2.3),
        event("partial", "sad", 2.0, 2.3),  # at once after the commit: one change of the text
        event("partial", "sat", 2.5, 2.9),
        event("commit", "sat", 3.0, 3.6),
        event("final", "the cat sat", 3.0, 3.6),
    ]
    display = follow_words(events)
    assert display.erased == 2  # hat, sad
    assert display.first is events[0]
    moments = [(w.word.text, w.committed.audio_sec, w.stable.audio_sec, w.shown.audio_sec) for w in display.words]
    assert moments == [("the", 2.0, 1.0, 1.0), ("cat", 2.0, 1.6, 1.6), ("sat", 3.0, 2.5, 2.5)]


def test_flicker_counts_each_time_and_the_last_return_is_the_stable_one() -> None:
    texts = ["a b", "a", "a b", "x b", "a b"]
    events = [event("partial", text, float(at), float(at)) for at, text in enumerate(texts)]
    display = follow_words([*events, event("commit", "a b", 9.0, 9.0)])
    assert display.erased == 1 + 0 + 2 + 2  # b; nothing; a and what follows it; x and what follows it
    assert [(w.stable.audio_sec, w.shown.audio_sec) for w in display.words] == [(4.0, 0.0), (2.0, 0.0)]


def test_a_commit_voids_the_partial_and_case_and_commas_change_nothing() -> None:
    again = [event("partial", "a b c", 1.0, 1.0), event("commit", "A,", 2.0, 2.0), event("commit", "b. C", 3.0, 3.0)]
    display = follow_words(again)
    assert display.erased == 2
    assert [w.stable.audio_sec for w in display.words] == [1.0, 3.0, 3.0]
    assert follow_words([]) == follow_words([event("partial", "", 1.0, 1.0)])


@st.composite
def sessions(draw: st.DrawFn) -> list[Event]:
    """Any commits and partials, a second apart."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(["commit", "partial"]), st.lists(FEW, max_size=4)), max_size=12))
    return [event(kind, " ".join(words), float(at), float(at)) for at, (kind, words) in enumerate(kinds)]


@given(sessions())
def test_words_are_first_shown_then_stable_then_committed(events: list[Event]) -> None:
    display = follow_words(events)
    assert [w.word.text for w in display.words] == [w.text for e in events if e.kind == "commit" for w in e.words]
    for word in display.words:
        assert word.shown.audio_sec <= word.stable.audio_sec <= word.committed.audio_sec
    commits = follow_words([e for e in events if e.kind == "commit"])
    assert commits.erased == 0
    assert all(word.stable is word.committed for word in commits.words)


@given(st.lists(st.text(max_size=6).map(str.split).filter(bool).map(lambda parts: parts[0]), max_size=6))
def test_the_normaliser_takes_words_one_by_one(words: list[str]) -> None:
    """What lets every word keep its times."""
    assert normalize_plain(" ".join(words)).split() == [part for w in words for part in normalize_plain(w).split()]


def test_a_word_that_is_split_is_right_where_all_its_parts_are() -> None:
    match = match_words(["a", "well-known", "cat"], ["A", "well", "known", "-", "cat"])
    assert match.right == {0: 0, 1: 2, 2: 4}
    assert match.stands_for == {0: 0, 1: 1, 2: 1, 4: 2}
    assert match_words(["well-known"], ["well", "done"]).right == {}
    assert match_words(["a"], []).stands_for == {}


def test_words_that_are_right_are_timed_and_the_clock_only_where_there_is_one() -> None:
    events = [event("partial", "the cat", 1.2, 1.5), event("commit", "the hat sat", 2.0, 2.5)]
    (the, sat) = time_words(spoken("the cat sat"), events, on_clock=True)
    assert (the.text, the.clip, the.start_sec, the.end_sec) == ("the", 0, 0.0, 0.5)
    moments = (the.commit_audio_sec, the.commit_clock_sec, the.display_clock_sec, the.shown_audio_sec)
    assert moments == (2.0, 2.5, 1.5, 1.2)
    assert (sat.text, sat.display_clock_sec) == ("sat", 2.5)
    (unaware, _) = time_words(spoken("the cat sat"), events, on_clock=False)
    assert (unaware.commit_audio_sec, unaware.commit_clock_sec, unaware.shown_clock_sec) == (2.0, None, None)


def test_a_word_put_in_goes_to_the_nearer_clip() -> None:
    stream = spoken("a b", "c d")  # b ends at 1.0 s, c begins at 2.0 s
    for middle, texts in ((1.3, ["a b um", "c d"]), (1.7, ["a b", "um c d"])):
        words = [Word("a", 0.0, 0.5, 1), Word("b", 0.5, 1.0, 1), Word("um", middle - 0.1, middle + 0.1, 1),
                 Word("c", 2.0, 2.5, 1), Word("d", 2.5, 3.0, 1)]  # fmt: skip
        assert (
            texts_by_clip(stream, words, match_words([w.text for w in stream.words], [w.text for w in words])) == texts
        )
    alone = [Word("-", 2.4, 2.5, 1)]
    assert texts_by_clip(stream, alone, match_words([w.text for w in stream.words], ["-"])) == ["", "-"]


@given(
    st.lists(st.lists(FEW, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=4), st.lists(FEW, max_size=12)
)
def test_cutting_by_clip_keeps_the_text_and_its_errors(clips: list[str], said: list[str]) -> None:
    stream = spoken(*clips)
    words = [Word(text, 0.4 * i, 0.4 * i + 0.4, 1.0) for i, text in enumerate(said)]
    texts = texts_by_clip(stream, words, match_words([w.text for w in stream.words], [w.text for w in words]))
    assert " ".join(filter(None, texts)) == " ".join(said)
    whole = word_counts([" ".join(clips)], [" ".join(said)], PLAIN)[0]
    assert sum_counts(word_counts(clips, texts, PLAIN)).errors == whole.errors


def test_a_turn_ends_with_the_last_word_of_its_clip_that_had_been_said() -> None:
    stream = spoken("a b c", "d e")  # c ends at 1.5 s, d at 3.0, e at 3.5
    events = [
        event("commit", "uh", 0.2, 0.3), event("final", "uh", 0.2, 0.3),  # nothing of the reference
        event("commit", "a", 0.9, 1.0), event("final", "a", 0.9, 1.0),  # b has not ended
        event("commit", "b", 2.0, 2.1), event("final", "b", 2.0, 2.1),  # c is missing, and had ended
        event("commit", "d e", 4.0, 4.1), event("final", "d e", 4.0, 4.1),
    ]  # fmt: skip
    words = [each.word.text for each in follow_words(events).words]
    match = match_words([word.text for word in stream.words], words)
    assert [(said.text, e.audio_sec) for said, e in find_turns(stream, events, match)] == [
        ("a", 0.9), ("c", 2.0), ("e", 4.0),
    ]  # fmt: skip
