"""A WebSocket server of live captions: an adapter between sockets and `host`. `protocol` has the wire format.

Each connection has a reader, which moves audio into the session's backlog, and a loop that sends the events of each
turn. While the backlog is full the socket is not read, TCP holds the client back, and no audio is dropped. A session is
freed when its client leaves, stalls or breaks the rules, although a model call for it may still run.

Connections without a session are few, in all and of an address, and have little time; beyond that the oldest gives way
to the newest, so that who holds connections keeps nobody out. Those that showed the token do not count among them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State

from src.inference.server import protocol
from src.inference.server.host import LOOPBACK, LiveHost, LiveSession, ServerLimits, idle_error
from src.inference.server.protocol import StreamError
from src.inference.streaming.session import StreamingASR
from src.utils.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8765
MAX_WAITING, MAX_OF_ADDRESS = 128, 32  # connections without a session: in all, of an address
HELLO_SEC = 5.0  # for a handshake, and for a client without the token in it to send its first message
MAX_FRAMES = 4  # messages that the library holds before it stops reading
READ_BYTES = 1 << 14  # at a time; may hold thousands of frames, and all others wait while they are parsed
MESSAGE_SEC = 0.0005  # that a message takes at least: a client sends 2000 per second at most, after the first 2000
PING_SEC = 5.0  # between pings, which find out whether the client is still there; nobody waits for the pong
MAX_CONTROLS, CONTROLS_PER_SEC = 1000, 100  # frames that are no whole message: pings, fragments
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
        self._strangers, self._known = _Lobby(), _Lobby()

    @asynccontextmanager
    async def listen(self, host: str = LOOPBACK, port: int = DEFAULT_PORT) -> AsyncIterator[str]:
        """Serve inside the block, once, at the address that it gets; at its end every session is decoded to its end.

        Port 0 takes a free one; a host or port that is unavailable is a ConfigError.
        """
        try:
            server = await serve(
                self._handle,  # type: ignore[arg-type] # connections are of `create_connection`
                host,
                port,
                process_request=self._refusal,  # type: ignore[arg-type]
                create_connection=partial(_Connection, self._strangers),  # type: ignore[arg-type]
                open_timeout=HELLO_SEC,
                compression=None,  # audio hardly shrinks, and the event loop would do the work
                max_size=self._limits.max_message_bytes,
                max_queue=MAX_FRAMES,
                ping_interval=PING_SEC,
                ping_timeout=None,  # a pong waits behind the audio that TCP holds back; `idle_sec` finds the dead
                close_timeout=CLOSE_SEC,
            )
        except (OSError, OverflowError) as err:
            raise ConfigError(f"cannot listen on {host}:{port}: {err}; choose another port, or 0") from err
        if not all(ip_address(each.getsockname()[0]).is_loopback for each in server.sockets):
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
            for websocket in self._strangers.connections:
                if websocket.state is State.CONNECTING:
                    websocket.transport.abort()
            waiting = [*self._strangers.connections, *self._known.connections]
            await asyncio.gather(*(websocket.close(CLOSE_GOING_AWAY) for websocket in waiting))
            await server.wait_closed()
            self._host.worker.shutdown()

    def _refusal(self, websocket: _Connection, request: Request) -> Response | None:
        """Return the answer to a handshake that is refused; None accepts it."""
        origins, tokens = request.headers.get_all("Origin"), _bearer_tokens(request)
        if not self._origins.issuperset(origins):
            logger.warning("refused a web page of %s", origins)
            return websocket.respond(HTTPStatus.FORBIDDEN, "pages of this origin are not served; see --origin\n")
        if tokens and not self._is_known(tokens):
            logger.warning("refused a wrong token of %s", websocket.remote_address)
            return websocket.respond(HTTPStatus.UNAUTHORIZED, "wrong token; send Authorization: Bearer TOKEN\n")
        if tokens or self._token is None:
            websocket.lobby.leave(websocket)
            websocket.lobby = self._known
            websocket.lobby.enter(websocket)
        return None

    def _is_known(self, tokens: Sequence[str]) -> bool:
        expected = (self._token or "").encode()
        given = [token.encode(errors="surrogateescape") for token in tokens]
        return self._token is None or any(hmac.compare_digest(token, expected) for token in given)

    async def _handle(self, websocket: _Connection) -> None:
        """Serve one connection, whatever happens on it."""
        try:
            done = await self._converse(websocket)
            last: protocol.ServerMessage | None = done
            code = CLOSE_OK if done.reason == "end" else CLOSE_GOING_AWAY
        except StreamError as err:
            logger.warning("%s: %s: %s", websocket.remote_address, err.code, err)
            last = protocol.Failure(code=err.code, message=err.message, fix=err.fix, audio_sec=err.audio_sec)
            code = protocol.CLOSE_CODES[err.code]
            traceback.clear_frames(err.__traceback__)  # they hold the session, in a cycle with the error
        except LEFT as err:
            logger.info("%s: left: %s", websocket.remote_address, err)
            traceback.clear_frames(err.__traceback__)
            last, code = None, CLOSE_OK
        with suppress(*LEFT):
            if last is not None:
                await self._send(websocket, last)
            await _close(websocket, code)

    async def _converse(self, websocket: _Connection) -> protocol.Done:
        """Hold one session, and return what to say last; a StreamError says why it was refused or failed."""
        sec = self._limits.idle_sec if websocket.lobby is self._known else min(HELLO_SEC, self._limits.idle_sec)
        try:
            async with asyncio.timeout(sec):
                first = await websocket.recv()
        except TimeoutError as err:
            raise idle_error(sec) from err
        hello = protocol.Hello() if isinstance(first, bytes) else protocol.read_client(first, protocol.Hello)
        if not self._is_known([hello.token or "", *_bearer_tokens(websocket.request)]):
            fix = "send Authorization: Bearer TOKEN, or token in hello"
            raise StreamError("unauthorized", "no token, or a wrong one", fix=fix)
        live = await self._host.open(partial(self._make_session, hello.language), hello.sample_rate)
        try:
            websocket.begin(live)
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
            websocket.begin(None)
            live.close()

    async def _send(self, websocket: _Connection, message: protocol.ServerMessage) -> None:
        try:
            async with asyncio.timeout(self._limits.send_sec):
                await websocket.send(message.to_text())
        except TimeoutError as err:
            websocket.transport.abort()
            raise ConnectionAbortedError(f"took no event for {self._limits.send_sec:g} s") from err


class _Lobby:
    """Connections without a session, the oldest first; beyond a limit one is cut off."""

    def __init__(self) -> None:
        self.connections: dict[ServerConnection, str] = {}  # and their addresses

    def enter(self, connection: ServerConnection) -> None:
        """Count a connection; the oldest of its address, or of the address that has most, may have to leave."""
        address = str((connection.remote_address or [""])[0])
        self.connections[connection] = address
        crowds = Counter(self.connections.values())
        if len(self.connections) > MAX_WAITING:
            address = crowds.most_common(1)[0][0]
        elif crowds[address] <= MAX_OF_ADDRESS:
            return
        oldest = next(each for each, its in self.connections.items() if its == address)
        self.leave(oldest)
        oldest.transport.abort()

    def leave(self, connection: ServerConnection) -> None:
        """Count a connection no more."""
        self.connections.pop(connection, None)


class _Connection(ServerConnection):
    """A connection that is counted from its first byte, says at once that it ends, and sends no flood of frames."""

    def __init__(self, lobby: _Lobby, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lobby = lobby
        self._live: LiveSession | None = None
        self._controls = 0.0  # seconds of `CONTROLS_PER_SEC` used up, on the clock of the loop

    def begin(self, live: LiveSession | None) -> None:
        """Serve a session, or no more."""
        self._live = live
        if live is not None:
            self.lobby.leave(self)
        elif self.state is not State.CLOSED:
            self.lobby.enter(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        self.lobby.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lobby.leave(self)
        self._leave("the connection was lost")

    def process_event(self, event: Any) -> None:
        super().process_event(event)
        if isinstance(event, Frame) and (event.opcode not in (Opcode.TEXT, Opcode.BINARY) or not event.fin):
            now = self.loop.time()
            self._controls = max(self._controls, now - MAX_CONTROLS / CONTROLS_PER_SEC) + 1 / CONTROLS_PER_SEC
            if self._controls > now:
                self.transport.abort()
            if event.opcode is Opcode.CLOSE:
                self._leave("it said goodbye")

    def _leave(self, why: str) -> None:
        if self._live is not None:
            self._live.fail(ConnectionAbortedError(why))


async def _read_audio(
    websocket: ServerConnection, message: str | bytes, hello: protocol.Hello, live: LiveSession
) -> None:
    """Move what the client sends into the backlog, from its first message to its end or a failure."""
    loop = asyncio.get_running_loop()
    try:
        if isinstance(message, str):
            message = await websocket.recv()
        free_at = 0.0
        while isinstance(message, bytes):
            free_at = max(free_at, loop.time() - 1.0) + MESSAGE_SEC
            if free_at > loop.time():
                await asyncio.sleep(free_at - loop.time())
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
