"""Audio between a socket and its session: bounded in seconds, taken in turns."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Literal

import numpy as np

from src.data.audio import Waveform
from src.inference.server.protocol import StreamError

TURN_SEC = 0.5  # about the interval of updates, so that a turn is one model call, seldom a few


class AudioQueue:
    """One writer, one reader, both on the event loop.

    Args:
        sample_rate: of the samples, Hz.
        max_sec: that may wait; at least a turn.

    Attributes:
        sample_rate: Hz.
        ending: why no more comes; an error is raised once all has been heard. None while more may come.
    """

    def __init__(self, sample_rate: int, max_sec: float) -> None:
        self.sample_rate = sample_rate
        self._turn = round(TURN_SEC * sample_rate)
        self._max = max(round(max_sec * sample_rate), self._turn)
        self._pieces: deque[Waveform] = deque()  # none longer than a turn
        self._waiting = 0  # samples in them
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self.ending: Literal["end", "shutdown"] | StreamError | None = None

    @property
    def waiting_sec(self) -> float:
        """Audio that waits."""
        return self._waiting / self.sample_rate

    async def put(self, samples: Waveform) -> None:
        """Add (T,) float32 of any length, turn by turn as there is room; nothing after the end."""
        for at in range(0, len(samples), self._turn):
            piece = samples[at : at + self._turn]
            while self.ending is None and self._waiting + len(piece) > self._max:
                await self._change()
            if self.ending is not None:
                return
            self._pieces.append(piece)
            self._waiting += len(piece)
            self._changed.set()

    async def get(self) -> Waveform | None:
        """Take what waits, at most a turn; None when all was taken and no more comes.

        Raises: what `fail` was given.
        """
        while not self._pieces and self.ending is None and self._failure is None:
            await self._change()
        if self._failure is not None:
            raise self._failure
        if not self._pieces:
            return None
        taken = [self._pieces.popleft()]
        size = len(taken[0])
        while self._pieces and size + len(self._pieces[0]) <= self._turn:
            taken.append(self._pieces.popleft())
            size += len(taken[-1])
        self._waiting -= size
        self._changed.set()
        return np.concatenate(taken)

    def end(self, ending: Literal["end", "shutdown"] | StreamError, *, drop: bool = False) -> None:
        """No more comes; `drop` takes away what waits."""
        self.ending = ending
        if drop:
            self._pieces.clear()
            self._waiting = 0
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """No more is wanted: the next `get` raises."""
        self._failure = error
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
