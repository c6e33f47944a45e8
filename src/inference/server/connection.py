"""One client of the caption server: its socket, within limits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, fields

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from src.inference.server.audio_queue import AudioQueue
from src.inference.server.protocol import Hello, ServerMessage, StreamError, read_end, read_samples
from src.utils.errors import ConfigError

CLOSE_SEC = 5.0  # for the client to answer a close


@dataclass(frozen=True)
class ServerLimits:
    """What a client may use.

    Attributes:
        max_sessions: at once; one more is refused.
        max_message_bytes: of one message; a longer one closes the connection with code 1009.
        queue_sec: audio that may wait for a session's turns.
        idle_sec: without a message, after which a session is decoded to its end and closed.
        max_session_sec: of audio, and of time.
        send_sec: for a client to take an event; one that does not read is cut off.
    Raises: ConfigError: a limit is not above 0.
    """

    max_sessions: int = 4
    max_message_bytes: int = 1 << 18  # 4 s of float32 at 16 kHz
    queue_sec: float = 10.0
    idle_sec: float = 30.0
    max_session_sec: float = 4 * 3600.0
    send_sec: float = 10.0

    def __post_init__(self) -> None:
        wrong = [f"{f.name} is {getattr(self, f.name)}" for f in fields(self) if not getattr(self, f.name) > 0]
        if wrong:
            raise ConfigError(f"limits of the caption server: {', '.join(wrong)}; they must be above 0")


class ClientConnection:
    """One connection, within its limits."""

    def __init__(self, websocket: ServerConnection, limits: ServerLimits) -> None:
        self._websocket, self._limits = websocket, limits
        self.peer = str(websocket.remote_address)

    async def receive(self) -> str | bytes:
        """Raises: StreamError: nothing came for too long. ConnectionClosed: the client left."""
        try:
            async with asyncio.timeout(self._limits.idle_sec):
                return await self._websocket.recv()
        except TimeoutError as err:
            raise StreamError(
                "idle", f"nothing came for {self._limits.idle_sec:g} s", fix="send audio, silence too, and then the end"
            ) from err

    async def send(self, message: ServerMessage) -> None:
        """Raises: ConnectionAbortedError: the client takes nothing. ConnectionClosed: it left."""
        try:
            async with asyncio.timeout(self._limits.send_sec):
                await self._websocket.send(message.to_text())
        except TimeoutError as err:
            self._websocket.transport.abort()
            raise ConnectionAbortedError(f"took no event for {self._limits.send_sec:g} s") from err

    async def read_audio(self, first: bytes | None, hello: Hello, audio: AudioQueue) -> None:
        """Move what the client sends into the queue, until the queue's end or failure says why no more comes."""
        left = round(self._limits.max_session_sec * hello.sample_rate)
        try:
            async with asyncio.timeout(self._limits.max_session_sec):
                message = await self.receive() if first is None else first
                while isinstance(message, bytes):
                    samples = read_samples(message, hello.format)
                    left -= len(samples)
                    if left < 0:
                        raise TimeoutError
                    await audio.put(samples)
                    message = await self.receive()
            read_end(message)
            audio.end("end")
        except TimeoutError:
            audio.end(_too_long(self._limits.max_session_sec))
        except Exception as err:  # noqa: BLE001 - nobody awaits this task; the queue's other side raises it
            if isinstance(err, StreamError) and err.code == "idle":
                audio.end(err)
            else:
                audio.fail(err)

    async def close(self, code: int) -> None:
        """Close, and read on until the client has answered.

        Without that, a socket that is not read would never show the answer, and TCP would discard what was sent last
        when it is cut off with audio unread.
        """
        try:
            async with asyncio.timeout(CLOSE_SEC), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._websocket.close(code))
                with suppress(ConnectionClosed):
                    while True:
                        await self._websocket.recv()
        except TimeoutError:
            self._websocket.transport.abort()


def _too_long(max_session_sec: float) -> StreamError:
    return StreamError(
        "session_too_long", f"a session lasts {max_session_sec:g} s at most", fix="open another connection, and go on"
    )
