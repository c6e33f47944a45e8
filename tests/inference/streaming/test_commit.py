"""The commit policy: append-only, monotone, no word twice, no loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.inference.streaming.commit import (
    AlignAtt,
    ChunkMerge,
    CommitPolicy,
    CommitResult,
    LocalAgreement,
    find_loop,
    word_key,
)
from src.inference.words import Word


def said(text: str, *, start_sec: float = 0.0, word_sec: float = 0.3) -> list[Word]:
    """Words evenly spaced from `start_sec`."""
    return [
        Word(word, start_sec + i * word_sec, start_sec + (i + 1) * word_sec, 0.9) for i, word in enumerate(text.split())
    ]


def texts(words: Sequence[Word]) -> str:
    return " ".join(word.text for word in words)


def run(policy: LocalAgreement, *hypotheses: Sequence[Word]) -> list[CommitResult]:
    return [policy.update(words, audio_end_sec=100.0) for words in hypotheses]


def test_two_hypotheses_commit_what_they_begin_with_alike_in_the_newer_spelling() -> None:
    first, second, third = run(
        LocalAgreement(),
        said("And so my fellow"),
        said("And so my fell Americans"),
        said("And so my fellow Americans ask"),
    )
    assert (texts(first.committed), texts(first.partial)) == ("", "And so my fellow")
    assert (texts(second.committed), texts(second.partial)) == ("And so my", "fell Americans")
    assert (texts(third.committed), texts(third.partial)) == ("", "fellow Americans ask")
    _, second = run(LocalAgreement(), said("and so my fellow"), said("And so, my fellow-"))
    assert texts(second.committed) == "And so, my fellow-"


@pytest.mark.parametrize("shift_sec", [-0.25, 0.0, 0.25])
@pytest.mark.parametrize("spelling", ["i sink that", "I think, that", "sink that", "oh i sink that"])
def test_committed_words_are_not_committed_again_respelt_or_shifted(spelling: str, shift_sec: float) -> None:
    policy = LocalAgreement()
    run(policy, said("i sink that"), said("i sink that"))
    start = 0.9 - 0.3 * len(spelling.split())
    again = said(spelling, start_sec=start + shift_sec) + said("he is right", start_sec=0.9 + shift_sec)
    results = run(policy, again, again)
    assert texts(results[1].committed) == "he is right"


def test_a_word_said_twice_is_committed_twice_and_flush_commits_everything_new() -> None:
    policy = LocalAgreement()
    run(policy, said("ask my country"), said("ask my country"))
    twice = said("ask my country my country said")
    assert texts(run(policy, twice, twice)[1].committed) == "my country said"
    more = said("ask my country my country said and so")
    assert texts(policy.flush(more).committed) == "and so"
    assert policy.flush(more) == policy.flush([]) == CommitResult((), ())
    assert policy.update([], audio_end_sec=3.0) == CommitResult((), ())


def test_words_of_audio_that_left_are_not_expected() -> None:
    policy = LocalAgreement()
    run(policy, said("one two three four"), said("one two three four"))
    policy.discard_before(0.6)
    rest = said("three four five", start_sec=0.6)
    assert texts(run(policy, rest, rest)[1].committed) == "five"
    new = said("six", start_sec=1.6)  # without the old words
    assert texts(run(policy, new, new)[1].committed) == "six"


@pytest.mark.parametrize("gram", ["the", "that is", "thank you all", "I think it is"])
def test_a_loop_is_never_committed_and_what_follows_it_is(gram: str) -> None:
    policy = LocalAgreement()
    looping = said("we begin " + " ".join([gram] * 12) + " and then end")
    run(policy, looping, looping)
    assert policy.flush(looping).committed == ()
    assert texts(policy._committed) == f"we begin {gram} and then end"


def test_a_loop_that_grows_one_copy_an_update_is_stopped() -> None:
    policy = LocalAgreement()
    for copies in range(2, 40):
        run(policy, said(" ".join(["so"] * copies), word_sec=0.4))
    assert len(policy._committed) < 12
    assert texts(policy.flush(said(" ".join(["so"] * 40) + " good bye", word_sec=0.4)).committed).endswith("good bye")


@pytest.mark.parametrize(
    ("words", "loop"),
    [
        (said("no no no no he said"), None),  # emphasis
        (said("it is very very very good"), None),
        (said("ha ha ha ha", word_sec=0.15), None),
        (said("we know") + said("you you you you", start_sec=0.6, word_sec=0.02), range(3, 6)),  # faster than speech
        (said("well " + "that is " * 7 + "that"), range(3, 16)),  # with the copy that the token cap cut off
    ],
)
def test_a_loop_is_many_copies_or_fast_ones(words: list[Word], loop: range | None) -> None:
    assert find_loop(words) == loop


def test_a_word_of_punctuation_keeps_its_text() -> None:
    assert word_key(Word("...", 0, 0, 1)) == "..."
    assert word_key(Word("Don't,", 0, 0, 1)) == "dont"


a_word = st.builds(
    lambda text, start, length: Word(text, start, start + length, 0.5),
    st.sampled_from(["a", "b", "c", "The", "the,", "no"]), st.floats(0, 12), st.floats(0, 2),
)  # fmt: skip
actions = st.sampled_from(["update", "update", "flush", "discard"])


@pytest.mark.parametrize("make", [LocalAgreement, lambda: AlignAtt(0.5), ChunkMerge])
@given(script=st.lists(st.tuples(actions, st.lists(a_word, max_size=25)), max_size=15))
def test_any_script_gives_an_append_only_monotone_transcript_without_loops(
    make: Callable[[], CommitPolicy], script: list[tuple[str, list[Word]]]
) -> None:
    policy = make()
    transcript: list[Word] = []
    for step, (action, words) in enumerate(script):
        hypothesis = sorted(words, key=lambda word: word.start_sec)
        if action == "discard":
            policy.discard_before(step * 0.7)
            continue
        result = policy.flush(hypothesis) if action == "flush" else policy.update(hypothesis, audio_end_sec=14.0)
        transcript += result.committed
        assert all(word.end_sec <= 14.0 for word in result.committed) or action == "flush"
        assert {word.text for word in [*result.committed, *result.partial]} <= {word.text for word in hypothesis}
    times = [time for word in transcript for time in (word.start_sec, word.end_sec)]
    assert times == sorted(times)
    slow = [Word(word.text, i, i + 1, 0.5) for i, word in enumerate(transcript)]  # so that only length counts
    assert find_loop(slow) is None


@given(
    st.lists(st.sampled_from(["one", "two", "three", "four", "five", "six", "seven", "eight"]), max_size=40),
    st.integers(1, 5),
)
def test_a_growing_perfect_hypothesis_is_committed_once_and_whole(spoken: list[str], step: int) -> None:
    full = said(" ".join(spoken))
    policy = LocalAgreement()
    transcript: list[Word] = []
    for end in range(step, len(full) + step, step):
        transcript += policy.update(full[:end], audio_end_sec=60.0).committed
    transcript += policy.flush(full).committed
    if find_loop(full) is None:
        assert transcript == full


def test_alignatt_commits_what_ended_before_the_guard_and_was_there_before() -> None:
    policy = AlignAtt(guard_sec=0.5)
    assert policy.update(said("ask not what", word_sec=0.4), audio_end_sec=1.3).committed == ()
    second = policy.update(said("ask not what your", word_sec=0.4), audio_end_sec=1.75)
    assert texts(second.committed) == "ask not what"
    assert texts(second.partial) == "your"
    third = policy.update(said("Ask not what you're country can", word_sec=0.4), audio_end_sec=2.6)
    assert third.committed == ()  # "your" became "you're": not yet
    fourth = policy.update(said("Ask not what you're country can", word_sec=0.4), audio_end_sec=2.6)
    assert texts(fourth.committed) == "you're country"
    assert texts(policy.flush(said("ask not what you're country can do", word_sec=0.4)).committed) == "can do"


def test_alignatt_does_not_wait_for_ever_and_never_commits_a_loop() -> None:
    policy = AlignAtt(guard_sec=0.5)
    assert policy.update(said("one two", word_sec=0.5), audio_end_sec=2.4).committed == ()
    assert texts(policy.update(said("won too", word_sec=0.5), audio_end_sec=2.9).committed) == "won"
    assert len(AlignAtt(guard_sec=0.5).update(said("no " * 30, word_sec=0.1), audio_end_sec=10.0).committed) == 1


def test_chunks_are_merged_at_the_middle_of_their_overlap() -> None:
    policy = ChunkMerge()
    assert policy.window_start_sec(0.0, 3.5) == 1.5
    first = policy.update(said("one two three four five", word_sec=0.4), audio_end_sec=2.0)
    assert texts(first.committed) == "one two three four"  # the middle of "five" is at 1.8 s, the cut at 1.75 s
    later = [Word("five", 1.6, 2.0, 0.9), Word("six", 2.0, 2.4, 0.9), Word("se", 3.3, 3.5, 0.9)]
    assert texts(policy.update(later, audio_end_sec=3.5).committed) == "five six"
