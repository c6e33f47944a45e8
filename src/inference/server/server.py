"""A server of captions on one port: live audio over a WebSocket, files over OpenAI's API (`speech_api`).

`protocol` has the wire format of live audio. Each session has a reader, which moves audio into the session's backlog,
and a loop that sends the events of each turn. While the backlog is full the socket is not read, TCP holds the client
back, and no audio is dropped. A session is freed when its client leaves, stalls or breaks the rules, although a model
call for it may still run.

Connections without a session or a request are few, in all and of an address, and have little time; beyond that the
oldest gives way to the newest, so that who holds connections keeps nobody out. Those that showed the token do not count
among them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from aiohttp import WSMsgType, web

from src.inference.server import protocol
from src.inference.server.host import (
    LOOPBACK,
    LiveHost,
    LiveSession,
    ServedModel,
    ServerLimits,
    SessionFactory,
    idle_error,
)
from src.inference.server.protocol import StreamError
from src.inference.server.speech_api import DEFAULT_MODEL, ApiError, SpeechApi, wrong_token
from src.utils.errors import ConfigError, first_line, visible

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8765
MAX_WAITING, MAX_OF_ADDRESS = 128, 32  # connections without a session or request: in all, of an address
HELLO_SEC = 5.0  # for a request, and for a client without the token in it to send its first message
READ_BYTES = 1 << 14  # at a time; may hold thousands of frames, and all others wait while they are parsed
MAX_MESSAGE_BYTES = 1 << 20  # of any message; a smaller one that is too big is still answered
MESSAGE_SEC = 0.0005  # that a message takes at least: a client sends 2000 per second at most, after the first 2000
PING_SEC = 5.0  # between pings, which find out whether the client is still there; nobody waits for the pong
MAX_CONTROLS, CONTROLS_PER_SEC = 1000, 100  # frames that are no whole message: pings, fragments
CLOSE_OK, CLOSE_GOING_AWAY = 1000, 1001
CLOSE_SEC = 5.0  # for the client to answer a close
ANSWER_SEC = 60.0  # for the client to take a text
KEEP_ALIVE_SEC = 60.0  # for the next request of a connection


class CaptionServer:
    """Serves live captions, and the texts of files.

    Args:
        models: by the names that clients may use; the first is that of clients who name none, and "whisper-1". Or a
            function that makes a live session for a language (None: its own): captions only, no texts of files.
        limits: what a client may use.
        token: that clients must know; None admits everyone who reaches the port.
        origins: of web pages that may connect, such as "https://captions.example"; a page of any other is refused,
            as browsers let every page connect to the user's own machine. Programs send no origin.

    Raises:
        ConfigError: an empty token, or no model.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel] | SessionFactory,
        *,
        limits: ServerLimits | None = None,
        token: str | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        if token == "":
            raise ConfigError("the token is empty; give at least 16 random characters, or None to admit everyone")
        if not models:
            raise ConfigError("no model to serve; give one as {'tiny.en': ServedModel(...)}")
        served = {} if callable(models) else dict(models)
        self._sessions: dict[str, SessionFactory] = {name: model.session for name, model in served.items()}
        if callable(models):
            self._sessions = {DEFAULT_MODEL: models}
        self._host = LiveHost(limits)
        self._limits, self._token, self._origins = self._host.limits, token, frozenset(origins)
        self.strangers, self._known = _Lobby(), _Lobby()
        self._busy: set[asyncio.Task[Any]] = set()
        self._api = SpeechApi(served, self._host)

    @asynccontextmanager
    async def listen(self, host: str = LOOPBACK, port: int = DEFAULT_PORT) -> AsyncIterator[str]:
        """Serve inside the block, once, at the address that it gets; at its end every session is decoded to its end.

        Port 0 takes a free one; a host or port that is unavailable is a ConfigError. Files are not transcribed to their
        end: their clients are told to send them again.
        """
        manager = web.Server(self.handle)
        connect = partial(_Connection, self.strangers, manager)
        try:
            server = await asyncio.get_running_loop().create_server(connect, host, port)
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
            server.close()
            self._api.stop()
            for live in self._host.sessions:
                live.end("shutdown", drop=True)
            await asyncio.gather(*(each.dismiss() for each in (*self.strangers, *self._known)))
            if self._busy:
                await asyncio.wait(self._busy)
            manager.pre_shutdown()
            await manager.shutdown(CLOSE_SEC)
            self._host.worker.shutdown()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request, whoever sent it."""
        connection, task = request.protocol, asyncio.current_task()
        assert isinstance(connection, _Connection)
        assert task is not None
        connection.hurry(None)
        self._busy.add(task)
        origins, tokens = request.headers.getall("Origin", ()), _bearer_tokens(request)
        upgrades = request.headers.get("Upgrade", "").strip().lower() == "websocket"
        headers = {"Access-Control-Allow-Origin": origins[0], "Vary": "Origin"} if origins else {}
        is_known, answer = False, web.StreamResponse()
        try:
            if not self._origins.issuperset(origins):
                headers = {}
                raise ApiError(403, "pages of this origin are not served; see --origin", code="origin_not_allowed")
            is_known = self._is_known(tokens)
            if tokens and not is_known:
                raise wrong_token("wrong token")
            if is_known:
                connection.admit(self._known, waits=upgrades)
            if upgrades:
                return await self._captions(request, connection, is_known=is_known)
            answer = await self._api.answer(request, headers, is_known=is_known, serve=connection.serve)
        except ApiError as err:
            logger.warning("%s: %d: %s", request.remote, err.status, err)
            answer = web.Response(status=err.status, text=f"{err}\n") if upgrades else err.response(headers)
        except ConnectionError as err:
            logger.info("%s: left: %s", request.remote, err)
            connection.abort()
        finally:
            self._busy.discard(task)
        if not is_known:
            answer.force_close()
        return answer

    def _is_known(self, tokens: Sequence[str]) -> bool:
        expected = (self._token or "").encode()
        given = [token.encode(errors="surrogateescape") for token in tokens]
        return self._token is None or any(hmac.compare_digest(token, expected) for token in given)

    async def _captions(
        self, request: web.BaseRequest, connection: _Connection, *, is_known: bool
    ) -> web.WebSocketResponse:
        """Serve a WebSocket, whatever happens on it."""
        websocket = web.WebSocketResponse(
            timeout=CLOSE_SEC,  # for the client to answer a close; what it sent before is read until then
            compress=False,  # audio hardly shrinks, and the event loop would do the work
            max_msg_size=MAX_MESSAGE_BYTES,
            writer_limit=0,
        )
        await websocket.prepare(request)
        connection.websocket = websocket
        pinging = asyncio.create_task(_ping(websocket))
        try:
            done = await self._converse(request, connection, websocket, is_known=is_known)
            last: protocol.ServerMessage | None = done
            code = CLOSE_OK if done.reason == "end" else CLOSE_GOING_AWAY
        except StreamError as err:
            logger.warning("%s: %s: %s", request.remote, err.code, err)
            last = protocol.Failure(code=err.code, message=err.message, fix=err.fix, audio_sec=err.audio_sec)
            code = protocol.CLOSE_CODES[err.code]
            traceback.clear_frames(err.__traceback__)  # they hold the session, in a cycle with the error
        except ConnectionError as err:
            logger.info("%s: left: %s", request.remote, err)
            traceback.clear_frames(err.__traceback__)
            last, code = None, CLOSE_OK
        finally:
            pinging.cancel()
        with suppress(ConnectionError):
            if last is not None:
                await self._send(connection, last)
            await websocket.close(code=code)
        return websocket

    async def _converse(
        self, request: web.BaseRequest, connection: _Connection, websocket: web.WebSocketResponse, *, is_known: bool
    ) -> protocol.Done:
        """Hold one session, and return what to say last; a StreamError says why it was refused or failed."""
        limits = self._limits
        receive = partial(_receive, websocket, limits.max_message_bytes)
        sec = limits.idle_sec if is_known else min(HELLO_SEC, limits.idle_sec)
        try:
            async with asyncio.timeout(sec):
                first = await receive()
        except TimeoutError as err:
            raise idle_error(sec) from err
        hello = protocol.Hello() if isinstance(first, bytes) else protocol.read_client(first, protocol.Hello)
        if not self._is_known([hello.token or "", *_bearer_tokens(request)]):
            fix = "send Authorization: Bearer TOKEN, or token in hello"
            raise StreamError("unauthorized", "no token, or a wrong one", fix=fix)
        make = self._sessions.get(hello.model) if hello.model else next(iter(self._sessions.values()))
        if make is None:
            known = f"name one of: {', '.join(self._sessions)}"
            raise StreamError("bad_message", f"no model {visible(hello.model)[:100]!r}", fix=known)
        live = await self._host.open(partial(make, hello.language), hello.sample_rate)
        try:
            connection.serve(live.fail)
            ready = asdict(limits) | hello.model_dump()
            ready = {name: value for name, value in ready.items() if name in protocol.Ready.model_fields}
            await self._send(connection, protocol.Ready(**ready))
            logger.info("%s: session begun, %d at once", request.remote, len(self._host.sessions))
            reader = asyncio.create_task(_read_audio(connection, receive, first, hello, live))
            try:
                while (events := await live.next_events()) is not None:
                    for event in events:
                        await self._send(connection, protocol.LiveEvent.of(event, lag_sec=live.waiting_sec))
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
            connection.serve(None)
            live.close()

    async def _send(self, connection: _Connection, message: protocol.ServerMessage) -> None:
        assert connection.websocket is not None
        try:
            async with asyncio.timeout(self._limits.send_sec):
                await connection.websocket.send_str(message.to_text())
        except TimeoutError as err:
            connection.abort()
            raise ConnectionAbortedError(f"took no event for {self._limits.send_sec:g} s") from err


class _Lobby(dict["_Connection", str]):
    """Connections without a session or request, the oldest first, and their addresses."""

    def enter(self, connection: _Connection) -> None:
        """Count a connection; the oldest of its address, or of the address that has most, may have to leave."""
        self[connection] = address = connection.address
        crowds = Counter(self.values())
        if len(self) > MAX_WAITING:
            address = crowds.most_common(1)[0][0]
        elif crowds[address] <= MAX_OF_ADDRESS:
            return
        oldest = next(each for each, its in self.items() if its == address)
        del self[oldest]
        oldest.abort()


class _Connection(web.RequestHandler):
    """A connection that is counted from its first byte, says at once that it ends, and sends no flood of frames."""

    websocket: web.WebSocketResponse | None = None
    address = ""

    def __init__(self, lobby: _Lobby, manager: web.Server) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=KEEP_ALIVE_SEC,
            lingering_time=CLOSE_SEC,  # what a refused client sends is read so long, or it would not see why
            auto_decompress=False,
        )
        self._lobby, self._wire = lobby, asyncio.Transport()
        self._timer: asyncio.TimerHandle | None = None
        self._fail: Callable[[Exception], object] | None = None
        self._controls = 0.0  # seconds of `CONTROLS_PER_SEC` used up, on the clock of the loop
        self._is_lost = False

    def admit(self, lobby: _Lobby, *, waits: bool) -> None:
        """Count in another lobby from now on: while it `waits`, else after its answer."""
        if not self._is_lost and (self._lobby is not lobby or not waits):
            self._lobby.pop(self, None)
            self._lobby = lobby
            if waits:
                lobby.enter(self)

    def serve(self, fail: Callable[[Exception], object] | None) -> None:
        """Serve what is to fail if the client leaves, or, with None, nothing any more."""
        self._fail = fail
        if fail is not None:
            self._lobby.pop(self, None)
        elif not self._is_lost and self not in self._lobby:
            self._lobby.enter(self)

    def hurry(self, sec: float | None) -> None:
        """Cut the client off unless it sends a request in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if sec is None else self._loop.call_later(sec, self.abort)

    def abort(self) -> None:
        """Cut the client off."""
        self._wire.abort()

    async def dismiss(self) -> None:
        """Say goodbye to a client that is not served."""
        if self.websocket is not None:
            await self.websocket.close(code=CLOSE_GOING_AWAY)
        elif self._timer is not None:
            self.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._wire, self.address = transport, str((transport.get_extra_info("peername") or [""])[0])
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        self.hurry(HELLO_SEC)
        self._lobby.enter(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        self.hurry(None)
        self._lobby.pop(self, None)
        super().connection_lost(exc)
        self._leave("the connection was lost")

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        super().set_parser(_Frames(parser, self._frame), data_received_cb)  # type: ignore[arg-type]

    def _frame(self, opcode: int, *, is_last: bool) -> None:
        """Take note of a frame that begins."""
        if opcode not in (WSMsgType.TEXT, WSMsgType.BINARY) or not is_last:
            now = self._loop.time()
            self._controls = max(self._controls, now - MAX_CONTROLS / CONTROLS_PER_SEC) + 1 / CONTROLS_PER_SEC
            if self._controls > now:
                self.abort()
            if opcode == WSMsgType.CLOSE:
                self._leave("it said goodbye")

    def _leave(self, why: str) -> None:
        if self._fail is not None:
            self._fail(ConnectionAbortedError(why))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of an answer, and wait for the next request."""
        try:
            async with asyncio.timeout(ANSWER_SEC):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            self.abort()
            return resp, True
        finally:
            self.serve(None)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what is no HTTP, and what failed."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was begun")
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            error = ApiError(status, f"not understood: {first_line(exc or Exception(message))[:200]}")
        else:
            logger.error("a request failed", exc_info=exc)
            error = ApiError(status, "the server failed; its log has the traceback")
        response = error.response({})
        response.force_close()
        return response


class _Frames:
    """Frames of a WebSocket on their way to their parser, which tells of whole messages only (RFC 6455, 5.2)."""

    def __init__(self, parser: Any, began: Callable[..., None]) -> None:
        self._parser, self._began = parser, began
        self._head, self._skip = b"", 0  # of a frame that is not whole; bytes left of its payload
        self.feed_eof = parser.feed_eof

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        at, heads = self._skip, self._head + data
        while len(heads) >= at + 2:
            first, second = heads[at], heads[at + 1]
            length = second & 127
            extra = {126: 2, 127: 8}.get(length, 0)
            begin = at + 2 + extra + (4 if second & 128 else 0)
            if len(heads) < begin:
                break
            self._began(first & 15, is_last=bool(first & 128))
            at = begin + (int.from_bytes(heads[at + 2 : at + 2 + extra]) if extra else length)
        self._head, self._skip = heads[at:], max(0, at - len(heads))
        done: tuple[bool, bytes] = self._parser.feed_data(data)
        return done


async def _ping(websocket: web.WebSocketResponse) -> None:
    with suppress(ConnectionError):
        while True:
            await asyncio.sleep(PING_SEC)
            await websocket.ping()


async def _receive(websocket: web.WebSocketResponse, max_bytes: int) -> str | bytes:
    message = await websocket.receive()
    if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
        raise ConnectionAbortedError(str(message.data or "it said goodbye"))
    if len(message.data) > max_bytes:
        too_big = f"a message of {len(message.data)} bytes or characters"
        raise StreamError("message_too_big", too_big, fix=f"send at most {max_bytes} in one")
    data: str | bytes = message.data
    return data


async def _read_audio(
    connection: _Connection,
    receive: Callable[[], Awaitable[str | bytes]],
    message: str | bytes,
    hello: protocol.Hello,
    live: LiveSession,
) -> None:
    """Move what the client sends into the backlog, from its first message to its end or a failure."""
    loop = asyncio.get_running_loop()
    try:
        if isinstance(message, str):
            message = await receive()
        free_at = 0.0
        while isinstance(message, bytes):
            connection.pause_reading()  # else empty messages would pile up
            try:
                free_at = max(free_at, loop.time() - 1.0) + MESSAGE_SEC
                if free_at > loop.time():
                    await asyncio.sleep(free_at - loop.time())
                await live.put(protocol.read_samples(message, hello.format))
            finally:
                connection.resume_reading()
            message = await receive()
        protocol.read_client(message, protocol.End)
        live.end("end")
    except Exception as err:  # noqa: BLE001 - nobody awaits this task; `next_events` raises it
        live.fail(err)


def _bearer_tokens(request: web.BaseRequest) -> list[str]:
    pairs = (value.partition(" ") for value in request.headers.getall("Authorization", ()))
    return [token.strip() if scheme.lower() == "bearer" else scheme for scheme, _, token in pairs]
