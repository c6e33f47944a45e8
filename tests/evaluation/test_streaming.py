"""A replay's clock, words followed from the events to the reference, and what streaming costs against single clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE, Waveform
from src.evaluation import streaming
from src.evaluation.metrics import PLAIN, Bootstrap, MetricsCalculator, sum_counts, word_counts
from src.evaluation.streaming import ReplayClock, follow_words, match_words, measure_stream, replay, summarize_latency
from src.evaluation.streams import SpeechStream, SpokenWord, StreamClip
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingResult
from src.inference.words import Word
from src.utils.errors import DataError
from src.utils.languages import normalize_plain

WORD_SEC = 0.5
FEW = st.sampled_from(["a", "b", "c"])


def spoken(*texts: str, ids: Sequence[str] = (), no_speech: Sequence[tuple[float, float]] = ()) -> SpeechStream:
    """Clips of words of half a second each, with a pause of a second after each clip."""
    clips, words = [], []
    at = 0.0
    for index, text in enumerate(texts):
        start = at
        for word in text.split():
            words.append(SpokenWord(word, at, at + WORD_SEC, index))
            at += WORD_SEC
        clips.append(StreamClip(ids[index] if ids else f"clip-{index}", text, start, at))
        at += 1.0
    audio = np.zeros(round(at * SAMPLE_RATE), dtype=np.float32)
    return SpeechStream("by hand", audio, tuple(clips), tuple(words), tuple(no_speech))


def event(kind: str, text: str, audio_sec: float, clock_sec: float | None = None, *, at: float = 0.0) -> Event:
    """An event whose words follow each other from `at` on."""
    words = [Word(w, at + WORD_SEC * i, at + WORD_SEC * (i + 1), 0.9) for i, w in enumerate(text.split())]
    clock_sec = audio_sec if clock_sec is None else clock_sec
    return Event(kind, tuple(words), text, audio_sec, clock_sec, sequence=0)  # type: ignore[arg-type]


def result_of(*events: Event, compute_sec: float = 1.0) -> StreamingResult:
    return StreamingResult(events, 4.0, compute_sec, longest_update_sec=compute_sec / 2, updates=3)


class Listener:
    """A session that computes for a given time on each block, and then emits what it has heard."""

    def __init__(self, *compute_sec: float) -> None:
        self.timer = 100.0
        self.clock = ReplayClock(lambda: self.timer)
        self._compute, self._spent = list(compute_sec), compute_sec

    def reset(self) -> None:
        self.audio_sec = self.compute_sec = 0.0
        self.timer += 50.0  # loading, before the stream begins

    def feed(self, block: Waveform) -> list[Event]:
        self.audio_sec += len(block) / SAMPLE_RATE
        return self.flush()

    def flush(self) -> list[Event]:
        spent = self._compute.pop(0)
        self.timer += spent
        self.compute_sec += spent
        return [Event("commit", (), "", self.audio_sec, self.clock(), 0)]

    def result(self, events: list[Event]) -> StreamingResult:
        return StreamingResult(tuple(events), self.audio_sec, self.compute_sec, max(self._spent), len(self._spent))


@pytest.mark.parametrize(
    ("compute_sec", "emitted_at"),
    [
        ((0.5, 0.5, 0.5, 0.25), [1.5, 2.5, 3.0, 3.25]),  # hides behind the audio; the last block is half a second
        ((1.5, 1.5, 0.1, 0.1), [2.5, 4.0, 4.1, 4.2]),  # falls behind
        ((2.5, 0.1, 0.1, 0.0), [3.5, 3.6, 3.7, 3.7]),  # catches up
        ((0.0, 0.0, 0.0, 0.0), [1.0, 2.0, 2.5, 2.5]),  # free computing leaves the audio's time
    ],
)
def test_the_clock_of_a_replay_is_a_listeners(compute_sec: tuple[float, ...], emitted_at: list[float]) -> None:
    listener: Any = Listener(*compute_sec)
    audio = np.zeros(round(2.5 * SAMPLE_RATE), np.float32)
    heard, ended_at = replay(listener, audio, listener.clock, block_sec=1.0)
    assert [event.emitted_at for event in heard.events] == pytest.approx(emitted_at)
    assert ended_at == pytest.approx(emitted_at[-1])
    assert heard.rtf == pytest.approx(sum(compute_sec) / 2.5)


STREAM = spoken("the cat sat", "big mat")  # said from 0 to 1.5 s and from 2.5 to 3.5 s; 4.5 s in all
EVENTS = [
    event("partial", "the hat", 1.0, 1.25),
    event("commit", "the cat", 2.0, 2.5),
    event("partial", "sat", 2.0, 2.5, at=1.0),
    event("commit", "sat", 2.25, 3.0, at=1.0),
    event("final", "the cat sat", 2.25, 3.0),
    event("commit", "big rat", 4.25, 5.5, at=2.5),
    event("final", "big rat", 4.25, 5.5),
]


def test_the_figures_of_a_session_are_those_computed_by_hand() -> None:
    found = measure_stream(STREAM, result_of(*EVENTS), ended_at=5.75, offline=["the cat", "big mat"])
    expected = {
        # true ends 0.5, 1.0, 1.5, 3.0; committed at 2.0, 2.0, 2.25, 4.25 of audio and 2.5, 2.5, 3.0, 5.5 on the clock
        "commit_unaware_mean_sec": (1.5 + 1.0 + 0.75 + 1.25) / 4,
        "commit_aware_mean_sec": (2.0 + 1.5 + 1.5 + 2.5) / 4,
        "commit_aware_n": 4,
        "commit_aware_p50_sec": 1.75,
        "display_aware_mean_sec": (0.75 + 1.5 + 1.0 + 2.5) / 4,  # "the" at 1.25, "sat" at 2.5
        "end_of_turn_unaware_mean_sec": (0.75 + 0.75) / 2,  # after 1.5 and 3.5 s
        "normalized_erasure": 1 / 5,  # hat
        "lag_sec": 5.75 - 4.5,
        "wer_plain": 1 / 5,
        "substitutions": 1,
        "offline_wer_plain": 1 / 5,
        "offline_deletions": 1,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["commit_aware_p95_sec"] is None
    commits = measure_stream(STREAM, result_of(*(e for e in EVENTS if e.kind == "commit")), ended_at=5.75)
    assert (commits["normalized_erasure"], commits["end_of_turn_aware_n"]) == (0.0, None)
    assert commits["display_aware_mean_sec"] == commits["commit_aware_mean_sec"]


def test_what_was_not_measured_is_none_and_the_row_is_json() -> None:
    bare = measure_stream(spoken("the cat sat"), result_of(*EVENTS[:4], compute_sec=0.0))
    missing = {key for key, value in bare.items() if value is None}
    assert missing >= {"commit_aware_p50_sec", "display_aware_n", "end_of_turn_unaware_mean_sec", "lag_sec", "rtf",
                       "offline_wer", "words_without_speech", "wer_low", "commit_unaware_mean_low_sec"}  # fmt: skip
    assert bare["commit_unaware_p50_sec"] == 1.0
    full = measure_stream(STREAM, result_of(*EVENTS), ended_at=5.75, offline=["the cat", "big mat"])
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert full.keys() == bare.keys()
    silent = measure_stream(STREAM, result_of(), ended_at=4.5)
    assert (silent["wer"], silent["deletions"]) == (1.0, 5)
    for key in ("commit_unaware_n", "commit_aware_mean_sec", "normalized_erasure"):
        assert silent[key] is None


def test_a_stream_is_compared_with_its_clips_decoded_one_by_one() -> None:
    asr: Any = SimpleNamespace(stream_audio=lambda audio: result_of(*EVENTS))
    counts = {"substitutions": 0, "insertions": 0}
    rows = [SimpleNamespace(id="clip-0", deletions=1, reference_words=3, **counts),
            SimpleNamespace(id="clip-1", deletions=0, reference_words=2, **counts)]  # fmt: skip
    offline: Any = SimpleNamespace(rows=rows, normalizer="whisper-english-v1")
    found = streaming.evaluate_stream(asr, STREAM, offline).summary()
    assert (found["clips"], found["audio_sec"], found["wer"], found["offline_wer"]) == (2, 4.5, 1 / 5, 1 / 5)
    rows.pop()
    with pytest.raises(DataError, match="clip-1"):
        streaming.evaluate_stream(asr, STREAM, offline)


@pytest.mark.parametrize(("metric", "units"), [("WER", 4), ("CER", 12)])
def test_a_saved_evaluation_has_a_log_that_other_tools_score(metric: str, units: int, tmp_path: Path) -> None:
    rates: Any = SimpleNamespace(
        metric=metric, rate=0.0, low=0.0, high=0.0, wer=0.0, deletions=0, insertions=0, reference_words=5
    )
    events = event("commit", "the cat", 2.0, 10.0), event("commit", "big mat", 4.0, 11.0)
    found = streaming.StreamingEvaluation(STREAM, result_of(*events, compute_sec=2.0), rates, 0.0)
    experiment: Any = SimpleNamespace(log=lambda *_, **__: None, dir=tmp_path)
    found.save(experiment)
    row = json.loads((tmp_path / "simuleval" / "instances.log").read_text())
    assert (row["reference"], row["source_length"]) == (STREAM.text, 4_500)
    assert len(row["delays"]) == len(row["elapsed"]) == row["prediction_length"] == units
    # 2 s of computing, of which the first commit took one: its 2 s of audio, and that
    assert (row["delays"][0], row["elapsed"][0], row["elapsed"][-1]) == (2_000, 3_000, 6_000)
    references = (tmp_path / "simuleval" / "references.txt").read_text().splitlines()
    assert references == [clip.text for clip in STREAM.clips]


def characters(text: str, at: float = 0.0) -> tuple[Word, ...]:
    """Characters of half a second each, from `at` on."""
    return tuple(Word(c, at + WORD_SEC * i, at + WORD_SEC * (i + 1), 0.9, space=False) for i, c in enumerate(text))


def test_a_stream_without_spaces_is_measured_in_characters() -> None:
    clips = (StreamClip("a", "今天天气好。", 0.0, 2.5, "zh"), StreamClip("b", "我们去公园", 3.5, 6.0, "zh"))
    words = [SpokenWord(w.text, w.start_sec, w.end_sec, i) for i, text in enumerate(("今天天气好", "我们去公园"))
             for w in characters(text, 3.5 * i)]  # fmt: skip
    stream = SpeechStream("by hand", np.zeros(7 * SAMPLE_RATE, np.float32), clips, tuple(words))
    assert stream.text == "今天天气好。我们去公园"
    heard = (*characters("今天天氣好"), *characters("我去公园", 3.5))  # one in traditional spelling; one is missing
    result = result_of(Event("commit", heard, "", 6.5, 7.0, 0))
    found = measure_stream(stream, result, ended_at=7.0, offline=["今天天气好", "我们去公园了"])
    assert (found["metric"], found["rate"], found["offline_rate"]) == ("CER", 1 / 10, 1 / 10)
    assert (found["deletions"], found["reference_words"], found["wer"]) == (1, 10, None)
    assert found["commit_aware_n"] == 9
    assert found["commit_unaware_mean_sec"] == pytest.approx(
        6.5 - np.mean([w.end_sec for w in words if w.text != "们"])
    )
    match = streaming.match_stream(stream, heard)
    assert streaming.texts_by_clip(stream, heard, match) == ["今天天氣好", "我去公园"]
    asr: Any = SimpleNamespace(stream_audio=lambda audio: result)
    counts = {"substitutions": 0, "insertions": 0, "deletions": 0, "reference_words": 5}
    offline: Any = SimpleNamespace(rows=[SimpleNamespace(id=c.id, **counts) for c in clips], normalizer="plain-v2-zh")
    summary = streaming.evaluate_stream(asr, stream, offline).summary()
    assert (summary["metric"], summary["rate"], summary["offline_rate"], summary["wer"]) == ("CER", 1 / 10, 0.0, None)


def test_a_stream_of_translations_is_measured_as_english() -> None:
    clips = tuple(StreamClip(c, text, 0.0, 1.0, "zh") for c, text in (("a", "we won't go"), ("b", "at two")))
    stream = SpeechStream("by hand", np.zeros(2 * SAMPLE_RATE, np.float32), clips)
    asr: Any = SimpleNamespace(stream_audio=lambda audio: result_of(event("commit", "we will not go at 2", 2.0)))
    counts = {"substitutions": 0, "insertions": 0, "deletions": 0, "reference_words": 4}
    rows = [SimpleNamespace(id=c.id, **counts) for c in clips]
    offline: Any = SimpleNamespace(rows=rows, normalizer="whisper-english-v1")
    summary = streaming.evaluate_stream(asr, stream, offline).summary()
    assert (summary["metric"], summary["rate"], summary["offline_rate"]) == ("WER", 0.0, 0.0)


def test_turkish_words_of_a_stream_are_compared_in_their_case() -> None:
    assert streaming.match_words(["Işık", "İzmir"], ["ışık", "izmir"], language="tr").right == {0: 0, 1: 1}
    assert streaming.match_words(["Işık"], ["işık"], language="tr").right == {}


def test_clips_of_a_stream_keep_their_language() -> None:
    clips = (StreamClip("a", "今天好", 0.0, 1.5, "zh"), StreamClip("b", "the cat", 2.5, 3.5, "en"))
    words = [SpokenWord(w.text, w.start_sec, w.end_sec, 0) for w in characters("今天好")]
    words += [SpokenWord("the", 2.5, 3.0, 1), SpokenWord("cat", 3.0, 3.5, 1)]
    stream = SpeechStream("two", np.zeros(4 * SAMPLE_RATE, np.float32), clips, tuple(words))
    assert (stream.text, stream.language) == ("今天好the cat", None)
    events = Event(
        "commit", (*characters("今天"), Word("the", 2.5, 3.0, 0.9), Word("cat", 3.0, 3.5, 0.9)), "", 4.0, 4.0, 0
    )
    found = measure_stream(stream, result_of(events))
    assert (found["metric"], found["rate"]) == ("mean", pytest.approx((1 / 3 + 0) / 2))


def test_words_invented_where_nothing_is_said_count_and_words_that_slipped_do_not() -> None:
    stream = spoken("the cat", "sat", no_speech=[(1.0, 2.0)])
    said = [event("commit", "the cat", 1.0), event("commit", "thank you", 2.0, at=1.0)]
    late = event("commit", "sat", 3.0, at=1.4)
    assert measure_stream(stream, result_of(*said, late))["words_without_speech"] == 2
    assert measure_stream(stream, result_of(said[0], late))["words_without_speech"] == 0


def test_repeats_of_a_clip_are_one_row_and_one_block() -> None:
    stream = spoken("the cat", "a dog", "the cat", ids=["x", "y", "x"])
    commits = event("commit", "the cat a dog the hat", 6.0)
    found = measure_stream(stream, result_of(commits), offline=["the cat", "a dog", "the cat"])
    assert (found["clips"], found["repeats"], found["reference_words"]) == (2, 2, 6)
    by_clip = MetricsCalculator().compute(["the cat the cat", "a dog"], ["the cat the hat", "a dog"])
    assert (found["wer"], found["wer_low"], found["wer_high"]) == (by_clip.wer, by_clip.wer_low, by_clip.wer_high)
    with pytest.raises(DataError, match="2 offline texts for 3 clips"):
        measure_stream(stream, result_of(commits), offline=["the cat", "a dog"])
    with pytest.raises(DataError, match="no times"):  # as `make_stream` returns it
        measure_stream(replace(stream, words=()), result_of(commits))


def test_intervals_are_those_of_scipy_and_words_of_one_clip_are_drawn_together() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 80)
    found: Any = summarize_latency(values.tolist(), [f"clip-{i}" for i in range(80)], Bootstrap(samples=5000))
    statistics = {"mean": np.mean, "p50": np.median, "p95": lambda x, axis: np.percentile(x, 95, axis=axis)}
    for name, statistic in statistics.items():
        expected = scipy.stats.bootstrap(
            (values,), statistic, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        low, high, value = (found[f"{name}{end}_sec"] for end in ("_low", "_high", ""))
        factor = scipy.stats.t.ppf(0.975, 79) / scipy.stats.norm.ppf(0.975) * np.sqrt(80 / 79)
        widened = value + factor * (np.array([expected.low, expected.high]) - value)
        assert (low, high) == pytest.approx(widened.tolist(), rel=0.06)
        assert low < found[f"{name}_sec"] < high
    alike = [float(i // 20) for i in range(200)]  # within their clip
    by_word: Any = summarize_latency(alike, [str(i) for i in range(200)], Bootstrap())
    by_clip: Any = summarize_latency(alike, [str(i // 20) for i in range(200)], Bootstrap())
    for name, factor in (("mean", 3), ("p50", 2)):
        low, high = f"{name}_low_sec", f"{name}_high_sec"
        assert by_clip[high] - by_clip[low] > factor * (by_word[high] - by_word[low])


def test_a_correction_ends_what_was_shown_before() -> None:
    events = [
        event("partial", "the hat", 1.0),
        event("partial", "the cat", 1.6),
        event("commit", "the cat", 2.0),
        event("partial", "sad", 2.0),  # at once after the commit: one change of the text
        event("partial", "sat", 2.5),
        event("commit", "sat", 3.0),
        event("final", "the cat sat", 3.0),
    ]
    words, erased = follow_words(events)
    assert erased == 2  # hat, sad
    moments = [(w.word.text, w.committed.audio_sec, w.stable.audio_sec, w.shown.audio_sec) for w in words]
    assert moments == [("the", 2.0, 1.0, 1.0), ("cat", 2.0, 1.6, 1.6), ("sat", 3.0, 2.5, 2.5)]


def test_flicker_counts_each_time_and_case_and_commas_change_nothing() -> None:
    events = [event("partial", text, float(at)) for at, text in enumerate(["a b", "a", "a b", "x b", "a b"])]
    words, erased = follow_words([*events, event("commit", "a b", 9.0)])
    assert erased == 1 + 0 + 2 + 2  # b; nothing; a and what follows it; x and what follows it
    assert [(w.stable.audio_sec, w.shown.audio_sec) for w in words] == [(4.0, 0.0), (2.0, 0.0)]
    again = [event("partial", "a b c", 1.0), event("commit", "A,", 2.0), event("commit", "b. C", 3.0)]
    words, erased = follow_words(again)
    assert erased == 2  # a commit voids the partial
    assert [w.stable.audio_sec for w in words] == [1.0, 3.0, 3.0]
    assert follow_words([]) == follow_words([event("partial", "", 1.0)]) == ([], 0)


@given(st.lists(st.tuples(st.sampled_from(["commit", "partial"]), st.lists(FEW, max_size=4)), max_size=12))
def test_words_are_first_shown_then_stable_then_committed(kinds: list[tuple[str, list[str]]]) -> None:
    events = [event(kind, " ".join(words), float(at)) for at, (kind, words) in enumerate(kinds)]
    followed, _ = follow_words(events)
    assert [w.word.text for w in followed] == [w.text for e in events if e.kind == "commit" for w in e.words]
    for word in followed:
        assert word.shown.audio_sec <= word.stable.audio_sec <= word.committed.audio_sec
    commits, erased = follow_words([e for e in events if e.kind == "commit"])
    assert erased == 0
    assert all(word.stable is word.committed for word in commits)


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
    (the, sat) = streaming.time_words(spoken("the cat sat"), events, on_clock=True)
    assert (the.text, the.clip, the.start_sec, the.end_sec) == ("the", 0, 0.0, 0.5)
    moments = (the.commit_audio_sec, the.commit_clock_sec, the.display_clock_sec, the.shown_audio_sec)
    assert moments == (2.0, 2.5, 1.5, 1.2)
    assert (sat.text, sat.display_clock_sec) == ("sat", 2.5)
    (unaware, _) = streaming.time_words(spoken("the cat sat"), events, on_clock=False)
    assert (unaware.commit_audio_sec, unaware.commit_clock_sec, unaware.shown_clock_sec) == (2.0, None, None)


def cut(stream: SpeechStream, words: Sequence[Word]) -> list[str]:
    return streaming.texts_by_clip(stream, words, match_words([w.text for w in stream.words], [w.text for w in words]))


def test_a_word_put_in_goes_to_the_nearer_clip() -> None:
    stream = spoken("a b", "c d")  # b ends at 1.0 s, c begins at 2.0 s
    for middle, texts in ((1.3, ["a b um", "c d"]), (1.7, ["a b", "um c d"])):
        words = [Word("a", 0.0, 0.5, 1), Word("b", 0.5, 1.0, 1), Word("um", middle - 0.1, middle + 0.1, 1),
                 Word("c", 2.0, 2.5, 1), Word("d", 2.5, 3.0, 1)]  # fmt: skip
        assert cut(stream, words) == texts
    assert cut(stream, [Word("-", 2.4, 2.5, 1)]) == ["", "-"]


@given(
    st.lists(st.lists(FEW, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=4), st.lists(FEW, max_size=12)
)
def test_cutting_by_clip_keeps_the_text_and_its_errors(clips: list[str], said: list[str]) -> None:
    texts = cut(spoken(*clips), [Word(text, 0.4 * i, 0.4 * i + 0.4, 1.0) for i, text in enumerate(said)])
    assert " ".join(filter(None, texts)) == " ".join(said)
    whole = word_counts([" ".join(clips)], [" ".join(said)], PLAIN)[0]
    assert sum_counts(word_counts(clips, texts, PLAIN)).errors == whole.errors


def test_a_turn_ends_with_the_last_word_of_its_clip_that_had_been_said() -> None:
    stream = spoken("a b c", "d e")  # c ends at 1.5 s, d at 3.0, e at 3.5
    events = [
        event("commit", "uh", 0.2), event("final", "uh", 0.2),  # nothing of the reference
        event("commit", "a", 0.9), event("final", "a", 0.9),  # b has not ended
        event("commit", "b", 2.0), event("final", "b", 2.0),  # c is missing, and had ended
        event("commit", "d e", 4.0), event("final", "d e", 4.0),
    ]  # fmt: skip
    match = match_words([word.text for word in stream.words], ["uh", "a", "b", "d", "e"])
    turns = [(said.text, e.audio_sec) for said, e in streaming.find_turns(stream, events, match)]
    assert turns == [("a", 0.9), ("c", 2.0), ("e", 4.0)]
