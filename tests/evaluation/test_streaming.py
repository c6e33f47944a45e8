"""A replay's clock, and what streaming costs against decoding the clips one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from src.data.audio import SAMPLE_RATE, Waveform
from src.evaluation.metrics import Bootstrap, MetricsCalculator
from src.evaluation.streaming import ReplayClock, measure_stream, replay, summarize_latency
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingResult
from src.utils.errors import DataError
from tests.evaluation.stream_scripts import event, result_of, spoken


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
        return self._spend()

    def flush(self) -> list[Event]:
        return self._spend()

    def result(self, events: list[Event]) -> StreamingResult:
        return StreamingResult(tuple(events), self.audio_sec, self.compute_sec, max(self._spent), len(self._spent))

    def _spend(self) -> list[Event]:
        spent = self._compute.pop(0)
        self.timer += spent
        self.compute_sec += spent
        return [Event("commit", (), "", self.audio_sec, self.clock(), 0)]


@pytest.mark.parametrize(
    ("compute_sec", "emitted_at"),
    [
        ((0.5, 0.5, 0.5, 0.25), [1.5, 2.5, 3.0, 3.25]),  # hides behind the audio; the last block is half a second
        ((1.5, 1.5, 0.1, 0.1), [2.5, 4.0, 4.1, 4.2]),  # falls behind
        ((2.5, 0.1, 0.1, 0.0), [3.5, 3.6, 3.7, 3.7]),  # catches up
    ],
)
def test_the_clock_of_a_replay_is_a_listeners(compute_sec: tuple[float, ...], emitted_at: list[float]) -> None:
    listener: Any = Listener(*compute_sec)
    heard = replay(listener, np.zeros(round(2.5 * SAMPLE_RATE), np.float32), listener.clock, block_sec=1.0)
    assert [event.emitted_at for event in heard.result.events] == pytest.approx(emitted_at)
    assert heard.ended_at == pytest.approx(emitted_at[-1])
    assert heard.result.audio_sec == 2.5
    assert heard.result.rtf == pytest.approx(sum(compute_sec) / 2.5)


def test_waiting_never_turns_the_clock_back_and_free_computing_leaves_the_audios_time() -> None:
    clock = ReplayClock(lambda: 7.0)
    for sec, now in ((1.0, 1.0), (0.5, 1.0), (3.0, 3.0)):
        clock.wait_until(sec)
        assert clock() == now


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
        "first_word_unaware_sec": 1.0,
        "first_word_aware_sec": 1.25,
        "end_of_turn_unaware_mean_sec": (0.75 + 0.75) / 2,  # after 1.5 and 3.5 s
        "normalized_erasure": 1 / 5,  # hat
        "lag_sec": 5.75 - 4.5,
        "wer_plain": 1 / 5,
        "substitutions": 1,
        "offline_wer_plain": 1 / 5,
        "offline_deletions": 1,
        "wer_difference": 0.0,
        "edge_deletions": 0,
        "offline_edge_deletions": 1,  # "sat", next to a pause
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["commit_aware_p95_sec"] is None


def test_what_was_not_measured_is_none_and_the_row_is_json() -> None:
    bare = measure_stream(spoken("the cat sat"), result_of(*EVENTS[:4], compute_sec=0.0))
    missing = {key for key, value in bare.items() if value is None}
    for name in ("commit_aware_p50_sec", "display_aware_n", "end_of_turn_unaware_mean_sec", "first_word_aware_sec"):
        assert name in missing
    assert {"lag_sec", "rtf", "longest_update_sec", "offline_wer", "wer_difference", "words_without_speech"} <= missing
    assert {"wer_low", "commit_unaware_mean_low_sec", "commit_unaware_p50_high_sec"} <= missing  # one clip
    assert bare["commit_unaware_p50_sec"] == 1.0
    full = measure_stream(STREAM, result_of(*EVENTS), ended_at=5.75, offline=["the cat", "big mat"])
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert full.keys() == bare.keys()
    assert full["commit_aware_p50_low_sec"] <= full["commit_aware_p50_sec"] <= full["commit_aware_p50_high_sec"]


def test_a_session_that_commits_nothing_has_no_latency_and_all_words_missing() -> None:
    found = measure_stream(STREAM, result_of(), ended_at=4.5)
    assert (found["wer"], found["deletions"], found["edge_deletions"]) == (1.0, 5, 4)
    for key in ("commit_unaware_n", "commit_aware_mean_sec", "normalized_erasure", "first_word_aware_sec"):
        assert found[key] is None


def test_words_invented_where_nothing_is_said_count_and_words_that_slipped_do_not() -> None:
    stream = spoken("the cat", "sat", no_speech=[(1.0, 2.0)])
    said = [event("commit", "the cat", 1.0, 1.0), event("commit", "thank you", 2.0, 2.0, at=1.0)]
    late = event("commit", "sat", 3.0, 3.0, at=1.4)
    assert measure_stream(stream, result_of(*said, late))["words_without_speech"] == 2
    assert measure_stream(stream, result_of(said[0], late))["words_without_speech"] == 0


def test_repeats_of_a_clip_are_one_row_and_one_block() -> None:
    stream = spoken("the cat", "a dog", "the cat", ids=["x", "y", "x"])
    commits = event("commit", "the cat a dog the hat", 6.0, 6.0)
    found = measure_stream(stream, result_of(commits), offline=["the cat", "a dog", "the cat"])
    assert (found["clips"], found["repeats"], found["reference_words"]) == (2, 2, 6)
    by_clip = MetricsCalculator().compute(["the cat the cat", "a dog"], ["the cat the hat", "a dog"])
    assert (found["wer"], found["wer_low"], found["wer_high"]) == (by_clip.wer, by_clip.wer_low, by_clip.wer_high)
    with pytest.raises(DataError, match="2 offline texts for 3 clips"):
        measure_stream(stream, result_of(commits), offline=["the cat", "a dog"])
    with pytest.raises(DataError, match="no times"):  # as `make_stream` returns it
        measure_stream(replace(stream, words=()), result_of(commits))


def test_intervals_are_those_of_scipy_over_clips() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 80)
    found: Any = summarize_latency(values.tolist(), [f"clip-{i}" for i in range(80)], Bootstrap(samples=5000))
    statistics = {"mean": np.mean, "p50": np.median, "p95": lambda x, axis: np.percentile(x, 95, axis=axis)}
    for name, statistic in statistics.items():
        expected = scipy.stats.bootstrap(
            (values,), statistic, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        low, high = found[f"{name}_low_sec"], found[f"{name}_high_sec"]
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.06)
        assert low < found[f"{name}_sec"] < high


def test_words_of_one_clip_are_drawn_together() -> None:
    values = [float(i // 20) for i in range(200)]  # alike within their clip
    by_word: Any = summarize_latency(values, [str(i) for i in range(200)], Bootstrap())
    by_clip: Any = summarize_latency(values, [str(i // 20) for i in range(200)], Bootstrap())
    for name, factor in (("mean", 3), ("p50", 2)):
        low, high = f"{name}_low_sec", f"{name}_high_sec"
        assert by_clip[high] - by_clip[low] > factor * (by_word[high] - by_word[low])


def test_commits_alone_are_shown_as_they_are_committed() -> None:
    commits: list[Event] = [each for each in EVENTS if each.kind == "commit"]
    found = measure_stream(STREAM, result_of(*commits), ended_at=5.75)
    assert found["normalized_erasure"] == 0.0
    assert found["display_aware_mean_sec"] == found["commit_aware_mean_sec"]
    assert found["end_of_turn_aware_n"] is None
