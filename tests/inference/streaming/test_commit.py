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
    LocalAgreement,
    find_loop,
    word_key,
)
from src.inference.words import Word, join_words
from src.utils.languages import graphemes


def said(text: str, *, start_sec: float = 0.0, word_sec: float = 0.3) -> list[Word]:
    """Words evenly spaced from `start_sec`."""
    return [
        Word(word, start_sec + i * word_sec, start_sec + (i + 1) * word_sec, 0.9) for i, word in enumerate(text.split())
    ]


def spelled(text: str, *, second: float = 6.0) -> list[Word]:
    """Characters of a script without spaces, so many in a second."""
    return [Word(c, i / second, (i + 1) / second, 0.9) for i, c in enumerate(graphemes(text))]


def run(policy: CommitPolicy, *hypotheses: Sequence[Word], audio_end_sec: float = 100.0) -> list[tuple[str, str]]:
    """Return what each hypothesis commits, and its tail."""
    results = [policy.update(words, audio_end_sec=audio_end_sec) for words in hypotheses]
    return [(join_words(committed), join_words(tail)) for committed, tail in results]


def test_two_hypotheses_commit_what_they_begin_with_alike_in_the_newer_spelling() -> None:
    hypotheses = said("And so my fellow"), said("And so my fell Americans"), said("And so my fellow Americans ask")
    expected = [("", "And so my fellow"), ("And so my", "fell Americans"), ("", "fellow Americans ask")]
    assert run(LocalAgreement(), *hypotheses) == expected
    assert run(LocalAgreement(), said("and so my fellow"), said("And so, my fellow-"))[1][0] == "And so, my fellow-"


@pytest.mark.parametrize("shift_sec", [-0.25, 0.0, 0.25])
@pytest.mark.parametrize("spelling", ["i sink that", "I think, that", "sink that", "oh i sink that"])
def test_committed_words_are_not_committed_again_respelt_or_shifted(spelling: str, shift_sec: float) -> None:
    start = 0.9 - 0.3 * len(spelling.split())
    again = said(spelling, start_sec=start + shift_sec) + said("he is right", start_sec=0.9 + shift_sec)
    assert run(LocalAgreement(), said("i sink that"), said("i sink that"), again, again)[-1][0] == "he is right"


def test_a_word_said_twice_is_committed_twice_and_flush_commits_everything_new() -> None:
    policy = LocalAgreement()
    twice = said("ask my country my country said")
    assert run(policy, said("ask my country"), said("ask my country"), twice, twice)[-1][0] == "my country said"
    more = said("ask my country my country said and so")
    assert join_words(policy.flush(more)) == "and so"
    assert policy.flush(more) == policy.flush([]) == ()
    assert policy.update([], audio_end_sec=3.0) == ((), ())


def test_words_of_audio_that_left_are_not_expected() -> None:
    policy = LocalAgreement()
    run(policy, said("one two three four"), said("one two three four"))
    policy.discard_before(0.6)
    rest = said("three four five", start_sec=0.6)
    assert run(policy, rest, rest)[1][0] == "five"
    new = said("six", start_sec=1.6)  # without the old words
    assert run(policy, new, new)[1][0] == "six"


@pytest.mark.parametrize("gram", ["the", "that is", "thank you all", "I think it is"])
def test_a_loop_is_never_committed_and_what_follows_it_is(gram: str) -> None:
    policy = LocalAgreement()
    looping = said("we begin " + " ".join([gram] * 12) + " and then end")
    assert run(policy, looping, looping)[1][0] == f"we begin {gram} and then end"
    assert policy.flush(looping) == ()


@pytest.mark.parametrize(
    ("words", "loop"),
    [
        (said("no no no no he said"), None),  # emphasis
        (said("it is very very very good"), None),
        (said("ha ha ha ha", word_sec=0.15), None),
        (said("we know") + said("you you you you", start_sec=0.6, word_sec=0.02), range(3, 6)),  # faster than speech
        (said("well " + "that is " * 7 + "that"), range(3, 16)),  # with the copy that the token cap cut off
        (spelled("谢谢观看" * 20), range(4, 80)),
        (spelled("今天" + "请不吝点赞订阅转发打赏支持明镜栏目" * 3), range(19, 53)),
        (spelled("ご視聴ありがとうございました" * 3 + "ご視聴"), range(14, 45)),
        (spelled("ขอบคุณที่รับชม" * 4, second=12), range(10, 40)),
        (spelled("谢" * 12, second=40), range(1, 12)),
        (spelled("不不不不不，对对对对对对"), None),  # emphasis
        (spelled("请不吝点赞订阅转发打赏支持明镜栏目" * 5, second=4), None),  # a verse, at the pace of one
        (spelled("哈哈哈哈哈哈哈哈哈哈"), None),
        (spelled("頑張れ頑張れ頑張れ頑張れ"), None),
        (spelled("ขอบคุณครับ" * 3, second=15), None),
    ],
)
def test_a_loop_is_many_copies_or_fast_ones(words: list[Word], loop: range | None) -> None:
    assert find_loop(words) == loop


@pytest.mark.parametrize("last_sec", [2.8, 3.2])
@pytest.mark.parametrize("make", [LocalAgreement, lambda: AlignAtt(0.55)])
def test_a_run_without_spaces_is_not_one_word(make: Callable[[], CommitPolicy], last_sec: float) -> None:
    policy = make()
    first, both = "今天天气很好", "今天天气很好我们去公园"
    heard = [(first, 1.5, 2.3), (first, 1.5, 2.6), (both, last_sec, last_sec + 0.3)]
    committed: list[Word] = []
    for text, end_sec, audio_end_sec in heard:
        committed += policy.update([Word(text, 0.0, end_sec, 1.0)], audio_end_sec=audio_end_sec)[0]
    assert join_words(committed) == first
    committed += policy.flush([Word(both, 0.0, last_sec, 1.0)])
    assert join_words(committed) == both


@pytest.mark.parametrize("make", [LocalAgreement, lambda: AlignAtt(0.55), ChunkMerge])
def test_characters_of_one_token_are_committed_together(make: Callable[[], CommitPolicy]) -> None:
    def heard(until_sec: float) -> list[Word]:
        words = [(char, tokens) for token in ("我", "爸爸", "昨天", "晚上") for char, tokens in _counted(token)]
        timed = [Word(char, i * 0.25, i * 0.25 + 0.25, 0.9, n, space=False) for i, (char, n) in enumerate(words)]
        return [word for word in timed if word.end_sec <= until_sec]

    policy, committed = make(), ""
    for end_sec in (0.75, 1.0, 1.25, 1.5, 1.75, 2.0):  # hypotheses with a half of the last token, too
        committed += join_words(policy.update(heard(end_sec), audio_end_sec=end_sec)[0])
        assert committed in ("", "我", "我爸爸", "我爸爸昨天", "我爸爸昨天晚上")
    if isinstance(policy, AlignAtt):
        assert committed == "我爸爸昨天"[: len(committed)] != ""
    assert committed + join_words(policy.flush(heard(2.0))) == "我爸爸昨天晚上"


def _counted(token: str) -> list[tuple[str, int]]:
    return [(char, int(i + 1 == len(token))) for i, char in enumerate(token)]


def test_a_word_of_punctuation_keeps_its_text() -> None:
    assert [word_key(Word(text, 0, 0, 1)) for text in ("...", "Don't,", "ន\u200b")] == ["...", "dont", "ន"]


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
        update = (policy.flush(hypothesis), ()) if action == "flush" else policy.update(hypothesis, audio_end_sec=14.0)
        committed, tail = update
        transcript += committed
        assert all(word.end_sec <= 14.0 for word in committed) or action == "flush"
        assert {word.text for word in [*committed, *tail]} <= {word.text for word in hypothesis}
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
        transcript += policy.update(full[:end], audio_end_sec=60.0)[0]
    transcript += policy.flush(full)
    if find_loop(full) is None:
        assert transcript == full


def test_alignatt_commits_what_ended_before_the_guard_and_was_there_before() -> None:
    policy = AlignAtt(guard_sec=0.5)
    assert run(policy, said("ask not what", word_sec=0.4), audio_end_sec=1.3) == [("", "ask not what")]
    second = said("ask not what your", word_sec=0.4)
    assert run(policy, second, audio_end_sec=1.75) == [("ask not what", "your")]
    respelt = said("Ask not what you're country can", word_sec=0.4)  # "your" became "you're": not yet
    committed = [done for done, _ in run(policy, respelt, respelt, audio_end_sec=2.6)]
    assert committed == ["", "you're country"]
    assert join_words(policy.flush(said("ask not what you're country can do", word_sec=0.4))) == "can do"


def test_alignatt_does_not_wait_for_ever_and_never_commits_a_loop() -> None:
    policy = AlignAtt(guard_sec=0.5)
    assert run(policy, said("one two", word_sec=0.5), audio_end_sec=2.4)[0][0] == ""
    assert run(policy, said("won too", word_sec=0.5), audio_end_sec=2.9)[0][0] == "won"
    assert run(AlignAtt(guard_sec=0.5), said("no " * 30, word_sec=0.1), audio_end_sec=10.0)[0][0] == "no"


def test_chunks_are_merged_at_the_middle_of_their_overlap() -> None:
    policy = ChunkMerge()
    first = said("one two three four five", word_sec=0.4)
    assert run(policy, first, audio_end_sec=2.0)[0][0] == "one two three four"  # "five" at 1.8 s, the cut at 1.75 s
    later = [Word("five", 1.6, 2.0, 0.9), Word("six", 2.0, 2.4, 0.9), Word("se", 3.3, 3.5, 0.9)]
    assert run(policy, later, audio_end_sec=3.5)[0][0] == "five six"
