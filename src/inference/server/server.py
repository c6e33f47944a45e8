"""A WebSocket server of live captions: an adapter between sockets and `host`. `protocol` has the wire format.

Each connection has a reader, which moves audio into the session's backlog, and a loop that sends the events of each
turn. While the backlog is full the socket is not read, TCP holds the client back, and no audio is dropped. A session is
freed when its client leaves, stalls or breaks the rules, after the model call that is running.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from src.inference.server import protocol
from src.inference.server.host import LOOPBACK, LiveHost, LiveSession, ServerLimits, idle_error
from src.inference.server.protocol import StreamError
from src.inference.streaming.session import StreamingASR
from src.utils.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8765
MAX_WAITING = 16  # connections that have not begun a session
MAX_FRAMES = 4  # messages that the library holds before it stops reading
CLOSE_OK, CLOSE_GOING_AWAY = 1000, 1001
CLOSE_SEC = 5.0  # for the client to answer a close
LEFT = ConnectionClosed, ConnectionAbortedError  # the second: the client takes no events

SessionFactory = Callable[[str | None], StreamingASR]


class CaptionServer:
    """Serves live captions.

    Args:
        make_session: makes a session for a language, None for the server's own; runs in the worker. A `ConfigError`
            of it is the client's mistake: its hello asked for something unavailable.
        limits: what a client may use.
        token: that clients must know; None admits everyone who reaches the port.
        origins: of web pages that may connect, such as "https://captions.example"; a page of any other is refused,
            as browsers let every page connect to the user's own machine. Programs send no origin.

    Raises:
        ConfigError: an empty token.
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
        self._make_session, self._host = make_session, LiveHost(limits)
        self._limits, self._token, self._origins = self._host.limits, token, frozenset(origins)
        self._waiting: set[ServerConnection] = set()  # have not begun a session

    @asynccontextmanager
    async def listen(self, host: str = LOOPBACK, port: int = DEFAULT_PORT) -> AsyncIterator[str]:
        """Serve inside the block, once, at the address that it gets; at its end every session is decoded to its end.

        Port 0 takes a free one; a host or port that is unavailable is a ConfigError.
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
        if host not in (LOOPBACK, "::1", "localhost"):
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
            for live in self._host.sessions:
                live.end("shutdown", drop=True)
            await asyncio.gather(*(websocket.close(CLOSE_GOING_AWAY) for websocket in self._waiting))
            await server.wait_closed()
            self._host.worker.shutdown()

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
        expected = (self._token or "").encode()
        given = [token.encode(errors="surrogateescape") for token in tokens]
        return self._token is None or any(hmac.compare_digest(token, expected) for token in given)

    async def _handle(self, websocket: ServerConnection) -> None:
        """Serve one connection, whatever happens on it."""
        try:
            done = await self._converse(websocket)
            last: protocol.ServerMessage = done
            code = CLOSE_OK if done.reason == "end" else CLOSE_GOING_AWAY
        except StreamError as err:
            logger.warning("%s: %s: %s", websocket.remote_address, err.code, err)
            last = protocol.Failure(code=err.code, message=err.message, fix=err.fix, audio_sec=err.audio_sec)
            code = protocol.CLOSE_CODES[err.code]
            traceback.clear_frames(err.__traceback__)  # they hold the session, in a cycle with the error
        except LEFT as err:
            logger.info("%s: left: %s", websocket.remote_address, err)
            traceback.clear_frames(err.__traceback__)
            return
        with suppress(*LEFT):
            await self._send(websocket, last)
            await _close(websocket, code)

    async def _converse(self, websocket: ServerConnection) -> protocol.Done:
        """Hold one session, and return what to say last; a StreamError says why it was refused or failed."""
        self._waiting.add(websocket)
        try:
            async with asyncio.timeout(self._limits.idle_sec):
                first = await websocket.recv()
        except TimeoutError as err:
            raise idle_error(self._limits) from err
        finally:
            self._waiting.remove(websocket)
        hello = protocol.Hello() if isinstance(first, bytes) else protocol.read_client(first, protocol.Hello)
        if not self._is_known([hello.token or "", *_bearer_tokens(websocket.request)]):
            fix = "send Authorization: Bearer TOKEN, or token in hello"
            raise StreamError("unauthorized", "no token, or a wrong one", fix=fix)
        live = await self._host.open(partial(self._make_session, hello.language), hello.sample_rate)
        try:
            ready = asdict(self._limits) | hello.model_dump()
            ready = {name: value for name, value in ready.items() if name in protocol.Ready.model_fields}
            await self._send(websocket, protocol.Ready(**ready))
            logger.info("%s: session begun, %d at once", websocket.remote_address, len(self._host.sessions))
            reader = asyncio.create_task(_read_audio(websocket, first, hello, live))
            try:
                while (events := await live.next_events()) is not None:
                    for event in events:
                        await self._send(websocket, protocol.LiveEvent.of(event, lag_sec=live.waiting_sec))
                if isinstance(live.ending, StreamError):
                    raise live.ending
                heard = live.session
                return protocol.Done(
                    reason=live.ending or "end",
                    text=heard.transcript,
                    audio_sec=heard.audio_sec,
                    language=heard.language,
                )
            except StreamError as err:
                err.audio_sec = live.session.audio_sec
                raise
            finally:
                reader.cancel()
                await asyncio.wait([reader])  # two may not read
        finally:
            live.close()

    async def _send(self, websocket: ServerConnection, message: protocol.ServerMessage) -> None:
        try:
            async with asyncio.timeout(self._limits.send_sec):
                await websocket.send(message.to_text())
        except TimeoutError as err:
            websocket.transport.abort()
            raise ConnectionAbortedError(f"took no event for {self._limits.send_sec:g} s") from err


async def _read_audio(
    websocket: ServerConnection, message: str | bytes, hello: protocol.Hello, live: LiveSession
) -> None:
    """Move what the client sends into the backlog, from its first message to its end or a failure."""
    try:
        if isinstance(message, str):
            message = await websocket.recv()
        while isinstance(message, bytes):
            await live.put(protocol.read_samples(message, hello.format))
            message = await websocket.recv()
        protocol.read_client(message, protocol.End)
        live.end("end")
    except Exception as err:  # noqa: BLE001 - nobody awaits this task; `next_events` raises it
        live.fail(err)


async def _close(websocket: ServerConnection, code: int) -> None:
    """Close, and read on until the client has answered: with audio unread TCP would discard what was sent last."""
    try:
        async with asyncio.timeout(CLOSE_SEC), asyncio.TaskGroup() as tasks:
            tasks.create_task(websocket.close(code))
            with suppress(ConnectionClosed):
                while True:
                    await websocket.recv()
    except TimeoutError:
        websocket.transport.abort()


def _bearer_tokens(request: Request | None) -> list[str]:
    return [] if request is None else [v.removeprefix("Bearer ") for v in request.headers.get_all("Authorization")]
