"""A replay's clock, and what streaming costs against decoding the clips one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.utterance import Utterance
from src.evaluation.streaming import ReplayClock, make_stream, replay
from src.inference.streaming.events import Event
from src.utils.errors import DataError


class Listener:
    """A session that computes for a given time on each block, and then emits what it has heard."""

    def __init__(self, *compute_sec: float) -> None:
        self.timer = 100.0
        self.clock = ReplayClock(lambda: self.timer)
        self._compute = list(compute_sec)
        self.longest_update_sec, self.updates = max(compute_sec), len(compute_sec)

    def reset(self) -> None:
        self.audio_sec = self.compute_sec = 0.0
        self.timer += 50.0  # loading, before the stream begins

    def feed(self, block: Waveform) -> list[Event]:
        self.audio_sec += len(block) / SAMPLE_RATE
        return self._spend()

    def flush(self) -> list[Event]:
        return self._spend()

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


def test_a_stream_takes_clips_from_all_over_and_pauses_between(sample: list[Utterance]) -> None:
    stream = make_stream(sample, num_clips=3, seed=1)
    assert stream.ids == (sample[0].id, sample[250].id, sample[-1].id)
    assert stream.text == " ".join(sample[i].text for i in (0, 250, -1))
    paused_sec = stream.duration_sec - sum(sample[i].meta["duration"] for i in (0, 250, -1))
    assert 3 * 0.3 < paused_sec < 3 * 0.8
    with pytest.raises(DataError, match="no utterance"):
        make_stream([], num_clips=3, seed=1)
