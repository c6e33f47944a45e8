"""A client of the caption server: audio in, events out, both at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.server import protocol
from src.inference.server.protocol import SampleFormat, StreamError

MAX_SERVER_MESSAGE = 1 << 24  # bytes; the last final of hours without a pause has some megabytes


async def stream_to_server(
    url: str,
    blocks: Iterable[Waveform],
    *,
    sample_rate: int = SAMPLE_RATE,
    sample_format: SampleFormat = "f32le",
    language: str | None = None,
    model: str | None = None,
    token: str | None = None,
) -> AsyncIterator[protocol.Ready | protocol.LiveEvent | protocol.Done]:
    """Send audio to a caption server, and yield its answers as they come.

    Args:
        url: such as "ws://127.0.0.1:8765".
        blocks: (T,) float32 in [-1, 1], any T. Taken in a thread, so that it may wait: for a microphone, or for the
            time that a recording takes (`in_real_time`).
        sample_rate: of the blocks, Hz.
        sample_format: on the wire; "s16le" is half as large.
        language: code or name, or "auto": the checkpoint's own, else detected; None leaves it to the server.
        model: a name of one that the server has; None for its first.
        token: that the server asks for.

    Yields:
        `Ready`, the session's events, and `Done`; its reason is "shutdown" where the server stopped before the end.

    Raises:
        StreamError: no caption server there, or it refused or failed. What `blocks` raises passes through.
    """
    hello = protocol.Hello(sample_rate=sample_rate, format=sample_format, language=language, model=model)
    sender: asyncio.Task[None] | None = None
    source_errors: list[Exception] = []
    source, step = iter(blocks), 0
    websocket = await _connect(url, token)

    async def send() -> None:
        """Send all blocks, in messages of `step` samples, and the end."""
        try:
            while (block := await asyncio.to_thread(next, source, None)) is not None:
                for at in range(0, len(block), step):
                    await websocket.send(protocol.write_samples(block[at : at + step], sample_format))
            await websocket.send(protocol.End().to_text())
        except ConnectionClosed:
            pass  # the receiving side learns why
        except Exception as err:  # noqa: BLE001 - nobody awaits this task; the receiving side raises it
            source_errors.append(err)
            await websocket.close()

    async with websocket:
        try:
            await websocket.send(hello.to_text())
            while True:
                message = protocol.read_server(await websocket.recv(decode=True))
                if isinstance(message, protocol.Failure):
                    raise StreamError(message.code, message.message, fix=message.fix, audio_sec=message.audio_sec)
                if isinstance(message, protocol.Ready):
                    step = message.max_message_bytes // np.dtype(protocol.DTYPES[sample_format]).itemsize
                    sender = asyncio.create_task(send())
                yield message
                if isinstance(message, protocol.Done):
                    return
        except ConnectionClosed as err:
            lost = f"{url}: the connection ended before the captions did: {err}"
            raise next(iter(source_errors), StreamError("lost", lost, fix="stream the rest again")) from err
        finally:
            if sender is not None:
                sender.cancel()
                await asyncio.wait([sender])


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
