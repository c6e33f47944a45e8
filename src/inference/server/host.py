"""Live sessions on one machine: who is admitted, whose audio is heard next, and when a session ends.

`server` and `page` carry audio in and events out; the host runs on their event loop. All model calls run in one worker
thread, first in, first out. A session has at most one turn of `TURN_SEC` of audio in that queue, so that a client with
a minute of audio waiting delays the others no more than one with a second.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import numpy as np

from src.data.audio import Waveform
from src.inference.server.protocol import StreamError
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingASR
from src.utils.errors import ConfigError, WhisperASRError, first_line

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # by default only this machine can connect
TURN_SEC = 0.5  # about the interval of updates, so that a turn is one model call, rarely a few
T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What a client may use."""

    max_sessions: int = 4  # at once; one more is refused
    max_message_bytes: int = 1 << 18  # 4 s of float32 at 16 kHz; a longer one closes the connection with code 1009
    queue_sec: float = 10.0  # audio that may wait for a session's turns; beyond it the client waits
    idle_sec: float = 30.0  # without audio, once all of it was heard; then the session is decoded to its end
    max_session_sec: float = 4 * 3600.0  # of audio, and of time
    send_sec: float = 10.0  # for a client to take an event; one that does not read is cut off

    def __post_init__(self) -> None:
        wrong = [f"{name} is {value}" for name, value in asdict(self).items() if not value > 0]
        if wrong:
            raise ConfigError(f"limits of the caption server: {', '.join(wrong)}; they must be above 0")


def idle_error(limits: ServerLimits) -> StreamError:
    """Return why a silent client is sent away."""
    nothing = f"nothing came for {limits.idle_sec:g} s"
    return StreamError("idle", nothing, fix="send audio, silence too, and then the end")


class LiveHost:
    """Admits sessions, and runs their calls in turn; other work on the same models takes turns in `worker` too."""

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.limits = limits or ServerLimits()
        self.worker = ThreadPoolExecutor(1, "live")
        self.sessions: set[LiveSession] = set()  # those that are not closed

    async def open(self, make_session: Callable[[], StreamingASR], sample_rate: int) -> LiveSession:
        """Admit a client with audio of a rate in Hz, or raise StreamError; `close` what is returned.

        `make_session` runs in the worker; a `ConfigError` of it is the client's mistake.
        """
        if len(self.sessions) >= self.limits.max_sessions:
            taken = f"all {self.limits.max_sessions} sessions are taken"
            raise StreamError("too_many_sessions", taken, fix="try again later")
        live = LiveSession(self, sample_rate)
        self.sessions.add(live)
        try:
            live.session = await self.in_worker(make_session)
        except BaseException:
            live.close()
            raise
        live.wait_for_client()
        return live

    async def in_worker(self, call: Callable[..., T], *arguments: object) -> T:
        """Run a call in its turn; what it raises becomes a StreamError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.worker, call, *arguments)
        except ConfigError as err:
            raise StreamError("bad_message", first_line(err), fix="correct the request") from err
        except Exception as err:  # the thread's boundary: one session fails, the others go on
            logger.exception("a session failed")
            notes = "".join(f", {note}" for note in getattr(err, "__notes__", ()))
            fix = "stream again from where the commits end; the server's log has the traceback"
            raise StreamError("engine_failed", f"{type(err).__name__}: {first_line(err)}{notes}", fix=fix) from err


def complaint(err: Exception) -> str:
    """Return an error in a line; log the traceback of one that no user has caused."""
    if isinstance(err, WhisperASRError):
        return first_line(err)
    logger.error("a request failed", exc_info=err)
    return f"{type(err).__name__}: {first_line(err)}; the server's log has the traceback"


class LiveSession:
    """A session on the host: its backlog, its turns and its limits."""

    session: StreamingASR  # `feed` and `flush` run in the worker
    language: str | None = None  # of the newest events that say theirs

    def __init__(self, host: LiveHost, sample_rate: int) -> None:
        limits, self._host, self.sample_rate = host.limits, host, sample_rate
        self._turn = round(TURN_SEC * sample_rate)
        self._max_waiting = max(round(limits.queue_sec * sample_rate), self._turn)
        self._left = round(limits.max_session_sec * sample_rate)  # samples that it may still take
        self._backlog: Waveform = np.zeros(0, np.float32)  # taken and not heard yet
        self._now = asyncio.get_running_loop().time
        self._ends_at, self._idle_at = self._now() + limits.max_session_sec, math.inf
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._flushed = False
        # why no more audio is taken; what was taken before is still heard
        self.ending: Literal["end", "shutdown"] | StreamError | None = None

    @property
    def waiting_sec(self) -> float:
        """Audio taken and not heard yet."""
        return len(self._backlog) / self.sample_rate

    async def put(self, samples: Waveform) -> None:
        """Take (T,) float32, as there is room; nothing after the end."""
        for piece in self._turns_of(samples):
            while not self.is_over() and len(self._backlog) + len(piece) > self._max_waiting:
                await self._change()
            piece = piece[: self._left]
            if not len(piece):
                self._ends_at = self._now()
            if self.is_over():
                return
            self._idle_at = math.inf
            self._left -= len(piece)
            self._backlog = np.concatenate([self._backlog, piece])
            self._changed.set()

    async def hear(self, samples: Waveform) -> list[Event]:
        """Take (T,) float32 and hear it at once, for a client that waits for the answer before it sends more."""
        events: list[Event] = []
        for piece in self._turns_of(samples):
            await self.put(piece)
            events += await self.next_events() or []
        return events

    def _turns_of(self, samples: Waveform) -> Iterator[Waveform]:
        return (samples[at : at + self._turn] for at in range(0, len(samples), self._turn))

    async def next_events(self) -> list[Event] | None:
        """Wait for audio, hear a turn of it, and return what that gave; None once all was heard to its end.

        It raises a StreamError if the session failed, and what `fail` was given.
        """
        while not self.is_over() and not len(self._backlog) and self._failure is None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(self._ends_at, self._idle_at)):
                    await self._change()
        if self._failure is not None:
            raise self._failure
        if len(self._backlog):
            samples, self._backlog = np.split(self._backlog, [self._turn])
            self._changed.set()  # there is room
            self.session.sharers = len(self._host.sessions)
            events = await self._host.in_worker(self.session.feed, samples, self.sample_rate)
            if not len(self._backlog):
                self.wait_for_client()
        elif self._flushed:
            return None
        else:
            self._flushed = True
            events = await self._host.in_worker(self.session.flush)
        self.language = next((event.language for event in reversed(events) if event.language), self.language)
        return events

    def is_over(self) -> bool:
        """Return whether no more audio is taken; a session ends here that is idle or too long."""
        limits = self._host.limits
        if self._now() >= self._ends_at:
            lasts = f"a session lasts {limits.max_session_sec:g} s at most"
            self.end(StreamError("session_too_long", lasts, fix="begin another one, and continue there"))
        elif self._now() >= self._idle_at:
            self.end(idle_error(limits))
        return self.ending is not None

    def end(self, ending: Literal["end", "shutdown"] | StreamError, *, drop: bool = False) -> None:
        """Take no more audio; `drop` discards what waits. Only the first call counts."""
        if self.ending is None:
            self.ending = ending
            self._backlog = self._backlog[:0] if drop else self._backlog
            self._changed.set()

    def fail(self, error: Exception) -> None:
        """Hear nothing more: the next `next_events` raises."""
        self._failure = error
        self._changed.set()

    def close(self) -> None:
        """Free the place of the session."""
        self._host.sessions.discard(self)
        self._failure = None  # its traceback holds this session, in a cycle

    def wait_for_client(self) -> None:
        """End the session unless audio comes in time."""
        self._idle_at = self._now() + self._host.limits.idle_sec

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
