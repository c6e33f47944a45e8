"""A client of the caption server: audio in, events out, both at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Self

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.server.protocol import (
    DTYPES,
    Done,
    End,
    Failure,
    Hello,
    LiveEvent,
    Ready,
    SampleFormat,
    StreamError,
    read_server,
    write_samples,
)

MAX_SERVER_MESSAGE = 1 << 24  # bytes; the last final of hours without a pause has some megabytes


async def stream_to_server(
    url: str,
    blocks: Iterable[Waveform],
    *,
    sample_rate: int = SAMPLE_RATE,
    sample_format: SampleFormat = "f32le",
    language: str | None = None,
    token: str | None = None,
) -> AsyncIterator[Ready | LiveEvent | Done]:
    """Send audio to a caption server, and yield what it answers, as it comes.

    Args:
        url: such as "ws://127.0.0.1:8765".
        blocks: (T,) float32 in [-1, 1], any T. Taken in a thread, so that it may wait: for a microphone, or for the
            time that a recording takes (`in_real_time`).
        sample_rate: of the blocks, Hz.
        sample_format: on the wire; "s16le" is half as large.
        language: code such as "en"; None leaves it to the server.
        token: that the server asks for.
    Yields: `Ready`, the session's events, and `Done`; its reason is "shutdown" where the server stopped before the end.
    Raises: StreamError: no caption server there, or it refused or failed. What `blocks` raises.
    """
    hello = Hello(sample_rate=sample_rate, format=sample_format, language=language)
    websocket = await _connect(url, token)
    async with websocket, _Sender(websocket, blocks, sample_format) as sender:
        try:
            await websocket.send(hello.to_text())
            while True:
                message = read_server(await websocket.recv(decode=True))
                if isinstance(message, Failure):
                    raise message.error
                if isinstance(message, Ready):
                    sender.start(message.max_message_bytes)
                yield message
                if isinstance(message, Done):
                    return
        except ConnectionClosed as err:
            lost = f"{url}: the connection ended before the captions did: {err}"
            raise sender.error or StreamError("lost", lost, fix="stream the rest again") from err


class _Sender:
    """Sends blocks and the end, from its start until the end of its `async with` block.

    Attributes:
        error: what their source raised; the connection is closed then.
    """

    def __init__(self, websocket: ClientConnection, blocks: Iterable[Waveform], sample_format: SampleFormat) -> None:
        self._websocket, self._blocks, self._format = websocket, iter(blocks), sample_format
        self._task: asyncio.Task[None] | None = None
        self.error: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def start(self, max_message_bytes: int) -> None:
        self._task = asyncio.create_task(self._send(max_message_bytes))

    async def _send(self, max_message_bytes: int) -> None:
        step = max_message_bytes // np.dtype(DTYPES[self._format]).itemsize
        try:
            while (block := await asyncio.to_thread(next, self._blocks, None)) is not None:
                for at in range(0, len(block), step):
                    await self._websocket.send(write_samples(block[at : at + step], self._format))
            await self._websocket.send(End().to_text())
        except ConnectionClosed:
            pass  # the receiving side learns why
        except Exception as err:  # noqa: BLE001 - nobody awaits this task; the receiving side raises it
            self.error = err
            await self._websocket.close()


async def _connect(url: str, token: str | None) -> ClientConnection:
    headers = None if token is None else {"Authorization": f"Bearer {token}"}
    try:
        return await connect(
            url, additional_headers=headers, compression=None, max_size=MAX_SERVER_MESSAGE, ping_interval=None
        )
    except InvalidStatus as err:
        status, body = err.response.status_code, (err.response.body or b"").decode(errors="replace").strip()
        raise StreamError("refused", f"{url}: HTTP {status}", fix=body or "check the address") from err
    except (OSError, InvalidHandshake, InvalidURI) as err:  # a timeout is an OSError
        raise StreamError("unreachable", f"{url}: {err}", fix="start scripts/serve.py, or correct the address") from err
