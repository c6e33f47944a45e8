"""The host of live sessions: backlog, turns and endings of one session; what clients see is in test_server.py."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.server.host import TURN_SEC, LiveHost, LiveSession, ServerLimits
from src.inference.streaming.commit import Event
from tests.inference.server.test_server import in_blocks, speech


class Recorder:
    """Stands for a session; remembers what it was fed."""

    sharers = 1

    def __init__(self) -> None:
        self.turns: list[Waveform] = []

    def feed(self, samples: Waveform, sample_rate: int) -> list[Event]:
        self.turns.append(samples)
        return []

    def flush(self) -> list[Event]:
        return []


async def opened(**limits: Any) -> tuple[LiveSession, list[Waveform]]:
    """Return a session on a host of its own, and the turns that it hears."""
    recorder = Recorder()
    live = await LiveHost(ServerLimits(**limits)).open(lambda: recorder, SAMPLE_RATE)  # type: ignore[arg-type,return-value]
    return live, recorder.turns


async def test_a_full_backlog_takes_no_more_until_a_turn_was_heard() -> None:
    live, turns = await opened(queue_sec=2.0)
    writer = asyncio.create_task(live.put(speech(1, 7.3)))
    writer.add_done_callback(lambda _: live.end("end"))
    while await live.next_events() is not None:
        assert live.waiting_sec <= 2.0
    assert max(map(len, turns)) <= TURN_SEC * SAMPLE_RATE
    assert np.array_equal(np.concatenate(turns), speech(1, 7.3))


async def test_a_writer_that_waits_goes_on_when_nobody_wants_more() -> None:
    live, turns = await opened(queue_sec=2.0)
    writer = asyncio.create_task(live.put(speech(1, 7.3)))
    await live.next_events()
    live.end("shutdown", drop=True)
    await writer
    assert (await live.next_events(), await live.next_events()) == ([], None)  # what flush gives, and no more
    assert len(turns) == 1


async def test_small_blocks_that_wait_make_one_turn() -> None:
    live, turns = await opened(queue_sec=2.0)
    for block in in_blocks(speech(1, 1.0), TURN_SEC / 5):
        await live.put(block)
    await live.next_events()
    await live.next_events()
    assert [len(turn) for turn in turns] == [TURN_SEC * SAMPLE_RATE] * 2


async def test_audio_that_was_complete_before_a_shutdown_is_heard() -> None:
    live, turns = await opened()
    await live.put(speech(1, 1.0))
    live.end("end")
    live.end("shutdown", drop=True)
    while await live.next_events() is not None:
        pass
    assert (live.ending, sum(map(len, turns))) == ("end", SAMPLE_RATE)
