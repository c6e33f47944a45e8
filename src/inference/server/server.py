"""A WebSocket server of live captions: several sessions on one model. `protocol` has the wire format.

All model calls run in one worker thread, whose queue is first in, first out. A session has at most one turn of
`TURN_SEC` of audio in it, so turns go round: a client with a minute of audio waiting delays the others no more than one
with a second. Audio that waits is bounded by `ServerLimits.queue_sec`; beyond that the socket is not read, TCP holds
the client back, and nothing is dropped.

A session is freed when its client leaves, stalls or breaks the rules, and the server goes on. A model call cannot be
interrupted: its session ends after it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import TypeVar

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from src.inference.server.audio_queue import AudioQueue
from src.inference.server.connection import CLOSE_SEC, ClientConnection, ServerLimits
from src.inference.server.protocol import (
    CLOSE_CODES,
    Done,
    Failure,
    Hello,
    LiveEvent,
    Ready,
    StreamError,
    read_hello,
)
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingSession
from src.utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8765
MAX_WAITING = 16  # connections that have not begun a session
MAX_FRAMES = 4  # messages that the library holds before it stops reading
CLOSE_OK, CLOSE_GOING_AWAY = 1000, 1001

SessionFactory = Callable[[str | None], StreamingSession]
T = TypeVar("T")


class CaptionServer:
    """Serves live captions.

    Args:
        make_session: makes a session for a language, None for the server's own; runs in the worker. A `ConfigError`
            of it is the client's: what its hello asked for cannot be had.
        limits: what a client may use.
        token: that clients must know; None admits everyone who reaches the port.
        origins: of web pages that may connect, such as "https://captions.example"; a page of any other is refused,
            as browsers let every page connect to the user's own machine. Programs send no origin.
    Raises: ConfigError: an empty token.
    """

    def __init__(
        self,
        make_session: SessionFactory,
        *,
        limits: ServerLimits | None = None,
        token: str | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        if token == "":
            raise ConfigError("the token is empty; give at least 16 random characters, or None to admit everyone")
        self._make_session, self._limits = make_session, limits or ServerLimits()
        self._token, self._origins = token, frozenset(origins)
        self._worker = ThreadPoolExecutor(1, "captions")
        self._waiting: set[ServerConnection] = set()  # have not begun a session
        self._sessions: set[AudioQueue] = set()

    @asynccontextmanager
    async def listen(self, host: str = LOOPBACK, port: int = DEFAULT_PORT) -> AsyncIterator[str]:
        """Serve inside the block, once; at its end decode every session to its end, say done, and close.

        Args:
            port: 0 takes a free one.
        Yields: the address, such as "ws://127.0.0.1:8765".
        Raises: ConfigError: the host or port cannot be had.
        """
        try:
            server = await serve(
                self._handle,
                host,
                port,
                process_request=self._refusal,
                compression=None,  # audio hardly shrinks, and the event loop would do the work
                max_size=self._limits.max_message_bytes,
                max_queue=MAX_FRAMES,
                ping_interval=None,  # a pong waits behind the audio that TCP holds back; `idle_sec` finds the dead
                close_timeout=CLOSE_SEC,
            )
        except (OSError, OverflowError) as err:
            raise ConfigError(f"cannot listen on {host}:{port}: {err}; choose another port, or 0") from err
        if not is_loopback(host):
            logger.warning(
                "listening on %s: whoever reaches this machine can connect%s, and nothing is encrypted; put a proxy "
                "with TLS before it",
                host,
                "" if self._token else " without a token",
            )
        try:
            yield f"ws://{f'[{host}]' if ':' in host else host}:{next(iter(server.sockets)).getsockname()[1]}"
        finally:
            server.close(close_connections=False)
            for audio in self._sessions:
                audio.end("shutdown", drop=True)
            await asyncio.gather(*(websocket.close(CLOSE_GOING_AWAY) for websocket in self._waiting))
            await server.wait_closed()
            self._worker.shutdown()

    def _refusal(self, websocket: ServerConnection, request: Request) -> Response | None:
        """Return the answer to a handshake that is refused; None accepts it."""
        origins, tokens = request.headers.get_all("Origin"), _bearer_tokens(request)
        if not self._origins.issuperset(origins):
            logger.warning("refused a web page of %s", origins)
            return websocket.respond(HTTPStatus.FORBIDDEN, "pages of this origin are not served; see --origin\n")
        if tokens and not self._is_known(tokens):
            logger.warning("refused a wrong token of %s", websocket.remote_address)
            return websocket.respond(HTTPStatus.UNAUTHORIZED, "wrong token; send Authorization: Bearer TOKEN\n")
        if len(self._waiting) >= MAX_WAITING:
            return websocket.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later\n")
        return None

    def _is_known(self, tokens: Sequence[str]) -> bool:
        if self._token is None:
            return True
        expected = self._token.encode()
        return any(hmac.compare_digest(token.encode(errors="surrogateescape"), expected) for token in tokens)

    async def _handle(self, websocket: ServerConnection) -> None:
        """Serve one connection, whatever happens on it."""
        client = ClientConnection(websocket, self._limits)
        try:
            done = await self._converse(websocket, client)
            last: Done | Failure = done
            code = CLOSE_GOING_AWAY if done.reason == "shutdown" else CLOSE_OK
        except StreamError as err:
            logger.warning("%s: %s: %s", client.peer, err.code, err)
            last, code = Failure.of(err), CLOSE_CODES[err.code]
            traceback.clear_frames(err.__traceback__)  # they hold the session, in a cycle with the error
        except (ConnectionClosed, ConnectionAbortedError) as err:
            logger.info("%s: left: %s", client.peer, err)
            traceback.clear_frames(err.__traceback__)
            return
        with suppress(ConnectionClosed, ConnectionAbortedError):
            await client.send(last)
            await client.close(code)

    async def _converse(self, websocket: ServerConnection, client: ClientConnection) -> Done:
        """Hold one session; return what to say last.

        Raises: StreamError: it was refused, or failed. ConnectionClosed, ConnectionAbortedError: the client left, or
            takes no events.
        """
        self._waiting.add(websocket)
        try:
            first = await client.receive()
        finally:
            self._waiting.remove(websocket)
        hello = Hello() if isinstance(first, bytes) else read_hello(first)
        self._admit(websocket, hello)
        audio = AudioQueue(hello.sample_rate, self._limits.queue_sec)
        self._sessions.add(audio)
        try:
            session = await self._in_worker(self._make_session, hello.language)
            await client.send(_ready(hello, self._limits))
            logger.info("%s: session begun, %d at once", client.peer, len(self._sessions))
            reader = asyncio.create_task(client.read_audio(first if isinstance(first, bytes) else None, hello, audio))
            try:
                return await self._transcribe(client, session, audio)
            except StreamError as err:
                err.audio_sec = session.audio_sec
                raise
            finally:
                reader.cancel()
                await asyncio.wait([reader])  # two may not read
        finally:
            self._sessions.remove(audio)

    def _admit(self, websocket: ServerConnection, hello: Hello) -> None:
        tokens = [] if hello.token is None else [hello.token]
        if not self._is_known(tokens + _bearer_tokens(websocket.request)):
            raise StreamError(
                "unauthorized", "no token, or a wrong one", fix="send Authorization: Bearer TOKEN, or token in hello"
            )
        if len(self._sessions) >= self._limits.max_sessions:
            raise StreamError(
                "too_many_sessions", f"all {self._limits.max_sessions} sessions are taken", fix="try again later"
            )

    async def _transcribe(self, client: ClientConnection, session: StreamingSession, audio: AudioQueue) -> Done:
        """Feed the session turn by turn, until its audio has ended."""
        while (samples := await audio.get()) is not None:
            session.sharers = len(self._sessions)
            events = await self._in_worker(session.feed, samples, audio.sample_rate)
            await _send_events(client, events, audio.waiting_sec)
        await _send_events(client, await self._in_worker(session.flush), audio.waiting_sec)
        if isinstance(audio.ending, StreamError):
            raise audio.ending
        reason = audio.ending or "end"
        return Done(reason=reason, text=session.transcript, audio_sec=session.audio_sec)

    async def _in_worker(self, call: Callable[..., T], *arguments: object) -> T:
        """Run a call in its turn.

        Raises: StreamError: it failed.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, call, *arguments)
        except ConfigError as err:
            raise StreamError("bad_message", first_line(err), fix="change the hello message") from err
        except Exception as err:  # the thread's boundary: one session fails, the others go on
            logger.exception("a session failed")
            notes = "".join(f", {note}" for note in getattr(err, "__notes__", ()))
            raise StreamError(
                "engine_failed",
                f"{type(err).__name__}: {first_line(err)}{notes}",
                fix="stream again from where the commits end; the server's log has the traceback",
            ) from err


def _bearer_tokens(request: Request | None) -> list[str]:
    return [] if request is None else [v.removeprefix("Bearer ") for v in request.headers.get_all("Authorization")]


async def _send_events(client: ClientConnection, events: Sequence[Event], lag_sec: float) -> None:
    for event in events:
        await client.send(LiveEvent.of(event, lag_sec=lag_sec))


def _ready(hello: Hello, limits: ServerLimits) -> Ready:
    return Ready(
        sample_rate=hello.sample_rate,
        format=hello.format,
        max_message_bytes=limits.max_message_bytes,
        queue_sec=limits.queue_sec,
        idle_sec=limits.idle_sec,
        max_session_sec=limits.max_session_sec,
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host; a name other than localhost counts as reachable."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
