"""Live sessions on one machine: who is admitted, whose audio is heard next, and when a session ends.

`server` and `page` carry audio in and events out; the host runs on their event loop. All model calls run in one worker
thread, a turn of at most `TURN_SEC` of audio at a time; those that transcribe files run between the turns. The next
turn is that of the session that is due first, and a turn makes its session due later by the audio heard, at a pace of
`PACE` (VirtualClock: Zhang, SIGCOMM 1990). So a client that sends a recording waits for those that speak, and for
files. One that shares the host is at most `BURST_SEC` ahead of that pace; one alone is heard as fast as the model can.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from src.data.audio import Waveform
from src.data.vad import VoiceActivityDetector
from src.inference.engine_base import Engine
from src.inference.server.protocol import StreamError
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingASR
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, first_line
from src.utils.languages import known_language, parse_language

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # by default only this machine can connect
TURN_SEC = 0.5  # about the interval of updates, so that a turn is one model call, rarely a few
PACE = 1.25  # seconds of audio per second of a session that shares the host
BURST_SEC = 5.0  # that it may be ahead: audio that a network held back comes at once
IDLE_PACE = 0.1  # of a client that is idle, although some audio trickles in
T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What a client may use."""

    max_sessions: int = 4  # at once; one more is refused
    max_message_bytes: int = 1 << 18  # 4 s of float32 at 16 kHz; a longer one closes the connection with code 1009
    queue_sec: float = 60.0  # audio that may wait for a session's turns; beyond it the client waits
    idle_sec: float = 30.0  # without audio, or with next to none, once all was heard; then the session ends
    max_session_sec: float = 4 * 3600.0  # of audio, and of time
    send_sec: float = 10.0  # for a client to take an event; one that does not read is cut off
    max_files: int = 8  # requests that upload a file or wait for its text at once; one more is refused
    max_file_bytes: int = 25 << 20  # of an upload; as long as a session at most

    def __post_init__(self) -> None:
        wrong = [f"{name} is {value}" for name, value in asdict(self).items() if not value > 0]
        if wrong:
            raise ConfigError(f"limits of the caption server: {', '.join(wrong)}; they must be above 0")


def idle_error(sec: float) -> StreamError:
    """Return why a client that was silent for so long is sent away."""
    return StreamError(
        "idle", f"nothing came for {sec:g} s, or next to nothing", fix="send audio, silence too, and then the end"
    )


SessionFactory = Callable[[str | None], StreamingASR]  # makes a session for a language; None: the server's own


@dataclass(frozen=True)
class ServedModel:
    """A model that clients use, for live sessions and for files; the settings are those of its server."""

    engine: Engine
    config: Config
    vad: VoiceActivityDetector | None = None

    def language(self, mark: str | None) -> str | None:
        """Return the code of a client's mark: None for "auto", the server's own setting without a mark.

        Raises:
            DataError: no language, or one that the model does not know.
        """
        if mark is None:
            return self.config.model.language
        if mark.strip().lower() == "auto":
            return None
        return known_language(parse_language(mark), self.engine.vocabulary.languages or {"en"})

    def session(self, mark: str | None) -> StreamingASR:
        """Return a session in a language as `language` takes it; one that is unavailable is a ConfigError."""
        try:
            spoken = self.config.model.model_copy(update={"language": self.language(mark)})
        except DataError as err:
            raise ConfigError(str(err)) from err
        return StreamingASR(engine=self.engine, vad=self.vad, config=self.config.model_copy(update={"model": spoken}))


class EngineInTurns:
    """An engine whose calls of the model go to `run`, which waits for their turn in the host's worker."""

    workers = 1

    def __init__(self, engine: Engine, run: Callable[[Callable[[], Any]], Any]) -> None:
        self._engine, self._run = engine, run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._engine, name)
        if name not in ("encode", "decode", "align", "detect"):
            return value
        return lambda *arguments, **options: self._run(partial(value, *arguments, **options))


class LiveHost:
    """Admits sessions, and runs their calls in turns; other work on the same models waits in `worker` too."""

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.limits = limits or ServerLimits()
        self.worker = ThreadPoolExecutor(1, "live")
        self.sessions: set[LiveSession] = set()  # those that are not closed
        self._waiting: dict[LiveSession, asyncio.Future[asyncio.Future[list[Event]]]] = {}  # for their turn to begin
        self._between: dict[asyncio.Future[Any], Callable[[], Any]] = {}  # calls that wait for a gap between turns
        self._hearing = False  # somebody's turn
        self._timer: asyncio.TimerHandle | None = None

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

    async def hear_turn(self, live: LiveSession) -> list[Event]:
        """Wait until a session is due, and return what its turn gave; a failure ends the waiting, not the call."""
        begun = self._waiting[live] = asyncio.get_running_loop().create_future()
        self.next_turn()
        try:
            call = await live.unless_failed(begun)
        finally:
            self._waiting.pop(live, None)
        return await live.unless_failed(call)

    async def between_turns(self, call: Callable[[], T]) -> T:
        """Run a call once no session is due that keeps its pace; if the waiting is cancelled, before it or in it."""
        begun: asyncio.Future[asyncio.Future[T]] = asyncio.get_running_loop().create_future()
        self._between[begun] = call
        self.next_turn()
        try:
            running = await begun
        finally:
            self._between.pop(begun, None)
        return await asyncio.shield(running)

    def next_turn(self) -> None:
        """Begin the turn that is due, if none goes on; with nobody due, a call that waits for a gap."""
        if self._hearing or not (self._waiting or self._between):
            return
        loop = asyncio.get_running_loop()
        live = min(self._waiting, key=lambda each: each.due, default=None)
        if self._timer is not None:
            self._timer.cancel()
        begun: asyncio.Future[Any]
        if self._between and (live is None or live.due > loop.time()):
            begun = next(iter(self._between))
            running = loop.run_in_executor(self.worker, self._between.pop(begun))
        elif live is not None and self.sharers() > 1 and live.due > loop.time() + BURST_SEC:
            self._timer = loop.call_at(live.due - BURST_SEC, self.next_turn)
            return
        elif live is not None:
            begun = self._waiting.pop(live)
            running = asyncio.ensure_future(self.in_worker(*live.begin_turn()))
        self._hearing = True
        running.add_done_callback(self._end_turn)
        begun.set_result(running)

    def _end_turn(self, call: asyncio.Future[Any]) -> None:
        self._hearing = False
        if not call.cancelled():
            call.exception()  # its session may have left
        self.next_turn()

    def sharers(self) -> int:
        """Return how many sessions were heard of late, or have audio that waits."""
        recent = asyncio.get_running_loop().time() - BURST_SEC
        return max(1, sum(live.due > recent or live.waiting_sec > 0 for live in self.sessions))

    async def in_worker(self, call: Callable[..., T], *arguments: object) -> T:
        """Run a call in the worker; what it raises becomes a StreamError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.worker, call, *arguments)
        except ConfigError as err:
            raise StreamError("bad_message", first_line(err), fix="correct the request") from err
        except Exception as err:  # the thread's boundary: one session fails, the others go on
            logger.exception("a session failed")
            notes = "".join(f", {note}" for note in getattr(err, "__notes__", ()))
            fix = "stream again from where the commits end; the server's log has the traceback"
            raise StreamError("engine_failed", f"{type(err).__name__}: {first_line(err)}{notes}", fix=fix) from err


class LiveSession:
    """A session on the host: its backlog, its turns and its limits."""

    session: StreamingASR  # `feed` and `flush` run in the worker
    language: str | None = None  # of the newest events that say theirs

    def __init__(self, host: LiveHost, sample_rate: int) -> None:
        limits, self._host, self.sample_rate = host.limits, host, sample_rate
        self._turn = round(TURN_SEC * sample_rate)
        self._max_waiting = max(round(limits.queue_sec * sample_rate), self._turn)
        self._left = round(limits.max_session_sec * sample_rate)  # samples that it may still take
        self._backlog: deque[Waveform] = deque()  # taken and not heard yet
        self._waiting = 0  # samples of it
        loop = asyncio.get_running_loop()
        self._now, self._failed = loop.time, loop.create_future()
        self.due = self._now()  # when its next turn may begin, were it to keep the pace
        self._ends_at, self._idle_at = self.due + limits.max_session_sec, math.inf
        self._patience = limits.idle_sec  # before it is idle; what it sends restores it
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._flushed = False
        # why no more audio is taken; what was taken before is still heard
        self.ending: Literal["end", "shutdown"] | StreamError | None = None

    @property
    def waiting_sec(self) -> float:
        """Audio taken and not heard yet."""
        return self._waiting / self.sample_rate

    async def put(self, samples: Waveform) -> None:
        """Take (T,) float32, as there is room; nothing after the end."""
        for piece in self._turns_of(samples):
            while not self.is_over() and self._waiting + len(piece) > self._max_waiting:
                await self._change()
            piece, now = piece[: self._left], self._now()
            if not len(piece):
                self._ends_at = now
            if self.is_over():
                return
            patience = min(self._patience, self._idle_at - now) + len(piece) / self.sample_rate / IDLE_PACE
            self._patience, self._idle_at = min(patience, self._host.limits.idle_sec), math.inf
            if not self._waiting:
                self.due = max(self.due, now)
            self._left -= len(piece)
            self._waiting += len(piece)
            self._backlog.append(piece)
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
        while not self.is_over() and not self._waiting and self._failure is None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(self._ends_at, self._idle_at)):
                    await self._change()
        self._check()
        if self._flushed:
            return None
        events = await self._host.hear_turn(self)
        if not self._waiting:
            self.wait_for_client()
        self.language = next((event.language for event in reversed(events) if event.language), self.language)
        return events

    def begin_turn(self) -> tuple[Any, ...]:
        """Return the call of a turn and its arguments: of the audio that waits, or of the end."""
        taken: list[Waveform] = []
        samples = min(self._waiting, self._turn)
        while (missing := samples - sum(map(len, taken))) > 0:
            block = self._backlog.popleft()
            taken.append(block[:missing])
            if len(block) > missing:
                self._backlog.appendleft(block[missing:])
        self._waiting -= samples
        self._changed.set()  # there is room
        self.due = min(self.due, self._now() + BURST_SEC) + samples / self.sample_rate / PACE
        self.session.sharers = self._host.sharers()
        if taken:
            return self.session.feed, np.concatenate(taken), self.sample_rate
        self._flushed = True
        return (self.session.flush,)

    def is_over(self) -> bool:
        """Return whether no more audio is taken; a session ends here that is idle or too long."""
        limits = self._host.limits
        if self._now() >= self._ends_at:
            lasts = f"a session lasts {limits.max_session_sec:g} s at most"
            self.end(StreamError("session_too_long", lasts, fix="begin another one, and continue there"))
        elif self._now() >= self._idle_at:
            self.end(idle_error(limits.idle_sec))
        return self.ending is not None

    def end(self, ending: Literal["end", "shutdown"] | StreamError, *, drop: bool = False) -> None:
        """Take no more audio; `drop` discards what waits. Only the first call counts."""
        if self.ending is None:
            self.ending = ending
            if drop:
                self._backlog.clear()
                self._waiting = 0
            self._changed.set()

    def fail(self, error: Exception) -> None:
        """Hear nothing more: `next_events` raises at once."""
        self._failure = self._failure or error
        self._changed.set()
        if not self._failed.done():
            self._failed.set_result(None)

    async def unless_failed(self, result: asyncio.Future[T]) -> T:
        """Wait for a result, or raise what `fail` was given."""
        await asyncio.wait([result, self._failed], return_when=asyncio.FIRST_COMPLETED)
        self._check()
        return result.result()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Free the place of the session."""
        self._host.sessions.discard(self)
        self._failure = None  # its traceback holds this session, in a cycle
        self._host.next_turn()  # somebody else may be alone now

    def wait_for_client(self) -> None:
        """End the session unless audio comes in time."""
        self._idle_at = self._now() + self._patience

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
