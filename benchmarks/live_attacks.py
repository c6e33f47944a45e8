"""Attacks on the caption server, and its load test.

The model is scripted: it hears numbered words in numbered samples and sleeps a little for each call, so that two cores
can serve 24 sessions. What is measured is the server's own work: turns, limits and memory, not a model's speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from benchmarks.attacks import FORK, BrokenError, WeakError, attack

TOKEN = "a token of the drill"
RATE = 16_000
WORD_SEC, SEC_PER_UNIT = 0.4, 200.0  # of the numbered words; of the fraction of a numbered sample
GOOD, LOAD_SEC, BLOCK_SEC = 20, 60.0, 0.1
CALL_SEC = 0.003  # that a call of the model sleeps
MAX_LAG_SEC, MAX_GROWTH_MB = 0.5, 16.0


def speech(speaker: int, duration_sec: float) -> np.ndarray:
    """Return samples that are their speaker and their own position."""
    return (speaker + np.arange(round(duration_sec * RATE)) / RATE / SEC_PER_UNIT).astype(np.float32)


def said(speaker: int, duration_sec: float) -> list[str]:
    """Return the words of `speech`."""
    return [f"{speaker}.{i}" for i in range(round(duration_sec / WORD_SEC))]


class NumberedEngine:
    """An engine that hears a word of `said` for each 0.4 s."""

    name, device, precision, workers, audio_context, language = "numbered", "cpu", "float32", 1, "full", None
    vocabulary: Any = SimpleNamespace(encode=str.split, languages=("en",))

    def __init__(self, call_sec: float = CALL_SEC) -> None:
        self._call_sec = call_sec

    def encode(self, audios: Sequence[np.ndarray], trailing_silence_sec: float) -> Any:
        return audios

    def decode(self, encoded: Any, audios: Sequence[np.ndarray], options: Any) -> list[Any]:
        from src.inference.engine_base import DecodingResult
        from src.inference.words import Word, join_words

        time.sleep(self._call_sec)
        results = []
        for audio in audios:
            speaker, place = divmod(float(audio[0]), 1.0)
            begin, end = place * SEC_PER_UNIT, place * SEC_PER_UNIT + len(audio) / RATE
            words = []
            for i in range(round((begin + 0.1) / WORD_SEC), round((end - 0.1) / WORD_SEC + 0.5)):
                start, stop = i * WORD_SEC, (i + 1) * WORD_SEC
                text = f"{speaker:.0f}.{i}" if stop <= end + 0.05 else "unclear"
                words.append(Word(text, max(0.0, start - begin), min(stop, end) - begin, 0.9))
            results.append(DecodingResult(join_words(words), (), -0.1, tuple(words), options.language))
        return results

    def max_tokens_per_sec(self, language: str | None) -> float:
        return 10.0


def make_server(*, call_sec: float = CALL_SEC, token: str | None = TOKEN, **limits: Any) -> Any:
    from src.inference.server.host import ServerLimits
    from src.inference.server.server import CaptionServer
    from src.inference.streaming.session import StreamingASR
    from src.utils.config import load_config

    config = load_config(None, overrides={"streaming": {"policy": "local_agreement", "min_chunk_sec": 0.8}})
    engine: Any = NumberedEngine(call_sec)
    return CaptionServer(
        lambda language: StreamingASR(engine=engine, config=config), limits=ServerLimits(**limits), token=token
    )


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[str]:
    """Serve in this process."""
    async with make_server(**options).listen(port=0) as url:
        yield url


async def transcript(url: str, audio: np.ndarray, **options: Any) -> str:
    """Return what the server hears in audio that is sent at once."""
    from src.inference.server.client import stream_to_server

    blocks = np.split(audio, range(0, len(audio), RATE)[1:])
    async for message in stream_to_server(url, blocks, **{"token": TOKEN, **options}):
        last = message
    return getattr(last, "text", "")


async def must_serve(url: str, **options: Any) -> None:
    """Check that a client with the token gets all of its words."""
    heard = await asyncio.wait_for(transcript(url, speech(1, 4.0), **options), 20.0)
    if heard.split() != said(1, 4.0):
        raise BrokenError(f"another client heard {heard!r}")


def connected(url: str, *, token: str | None = TOKEN, **options: Any) -> Any:
    from websockets.asyncio.client import connect

    headers = {"Authorization": f"Bearer {token}"} if token else None
    return connect(url, additional_headers=headers, compression=None, ping_interval=None, **options)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@attack()
async def silent_strangers(folder: Path) -> None:
    """Hold sockets without a word, and connections without the token."""
    async with serving() as url:
        mute = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(200)]
        silent = [await connected(url, token=None) for _ in range(40)]
        await must_serve(url)
        last = await connected(url, token=None)  # a browser's, with the token in its hello
        await last.send(f'{{"type": "hello", "token": "{TOKEN}"}}')
        if '"ready"' not in await last.recv():
            raise BrokenError("a browser with the token was kept out")
        for _, writer in mute:
            writer.close()
        await asyncio.gather(last.close(), *(client.close() for client in silent))


@attack()
async def wrong_tokens(folder: Path) -> None:
    """Send no token, empty ones, wrong ones, and audio without asking."""
    from websockets.exceptions import InvalidStatus

    hellos = ['{"type":"hello"}', '{"type":"hello","token":""}', '{"type":"hello","token":"wrong"}', bytes(6400)]
    async with serving() as url:
        for token in ("wrong", " ", TOKEN[:-1], TOKEN + "x", "\u00e4"):
            with contextlib.suppress(InvalidStatus):
                await connected(url, token=token.encode().decode("latin-1"))
                raise BrokenError(f"token {token!r} was let in")
        for hello in hellos:
            async with connected(url, token=None) as client:
                await client.send(hello)
                if "unauthorized" not in (answer := await client.recv()):
                    raise BrokenError(f"{hello[:40]!r} was answered with {answer[:80]!r}")
        await must_serve(url)


@attack()
async def foreign_pages(folder: Path) -> None:
    """Connect as web pages of other origins do."""
    from websockets.exceptions import InvalidStatus
    from websockets.typing import Origin

    async with serving(token=None) as url:
        for origin in ("https://evil.example", "null", url.replace("ws", "http"), "http://localhost"):
            with contextlib.suppress(InvalidStatus):
                await connected(url, token=None, origin=Origin(origin))
                raise BrokenError(f"a page of {origin} was let in")


@attack()
async def garbage_messages(folder: Path) -> None:
    """Send what is no message of the protocol; each gets its error, and the next client is served."""
    from websockets.exceptions import ConnectionClosed

    hello = '{"type":"hello"}'
    given: list[list[str | bytes]] = [
        ["garbage"], ["[" * 100_000], ["\0"], ['{"type":"end"}'], [hello, hello], ["9" * 100_000], [b"\0"],
        [hello, b"\xff" * 40_000], [hello, b"\0\0\xc0\x7f" * 100], ['{"type":"hello","sample_rate":1e999}'],
        ['{"type":"hello","sample_rate":-1}'], ['{"type":"hello","speed":' + "1" * 100_000 + "}"],
    ]  # fmt: skip

    async with serving(token=None) as url:
        for messages in given:
            async with connected(url, token=None) as client:
                answers = []
                with contextlib.suppress(ConnectionClosed):
                    for message in messages:
                        await client.send(message)
                    while True:
                        answers.append(await asyncio.wait_for(client.recv(), 10.0))
                if not answers or '"error"' not in str(answers[-1]) or client.close_code != 1007:
                    raise BrokenError(f"{messages[-1][:40]!r}: {answers[-1:]} and code {client.close_code}")
                if len(str(answers[-1])) > 10_000:
                    raise WeakError(f"{messages[-1][:40]!r}: an answer of {len(str(answers[-1]))} characters")
        await must_serve(url, token=None)


@attack()
async def large_messages(folder: Path) -> None:
    """Send a message beyond the limit, at once and in a thousand fragments."""
    async with serving() as url:
        for message in (bytes(1 << 24), [bytes(1 << 14)] * 1000, [b""] * 5000):
            client = await connected(url)
            with contextlib.suppress(Exception):  # of the client, whose server hangs up
                await client.send(message)
            await asyncio.wait_for(client.wait_closed(), 20.0)
        await must_serve(url)


@attack()
async def trickle(folder: Path) -> None:
    """Keep a place with a sample now and then."""
    from websockets.exceptions import ConnectionClosed

    async with serving(max_sessions=1, idle_sec=1.0) as url:
        client = await connected(url)
        with contextlib.suppress(ConnectionClosed):
            for _ in range(40):
                await client.send(bytes(4))
                await asyncio.sleep(0.1)
            raise BrokenError("a client that sends 10 samples per second keeps its place")
        await must_serve(url)


@attack()
async def close_after_a_flood(folder: Path) -> None:
    """Send a minute of audio, and leave: nobody waits for it to be heard."""
    async with serving(max_sessions=1, call_sec=0.5) as url:
        for leave in ("close", "abort"):
            client = await connected(url)
            for block in np.split(speech(2, 50.0), 50):
                await client.send(block.tobytes())
            await (client.close() if leave == "close" else asyncio.sleep(0))
            client.transport.abort()
            began = time.monotonic()
            while True:
                with contextlib.suppress(Exception):
                    await must_serve(url)
                    break
            if time.monotonic() - began > 15.0:
                raise WeakError(f"after {leave} the place was free in {time.monotonic() - began:.0f} s")


@attack()
async def ping_flood(folder: Path) -> None:
    """Send nothing but pings, whose answers nobody reads."""
    async with serving() as url:
        client = await connected(url)
        await client.send('{"type":"hello"}')
        client.transport.pause_reading()
        for _ in range(200):
            client.transport.write(b"\x89\xfd\0\0\0\0" + bytes(125))
            if _ % 20 == 0:
                await asyncio.sleep(0)
        client.transport.write((b"\x89\xfd\0\0\0\0" + bytes(125)) * 50_000)
        await must_serve(url)
        client.transport.abort()


@attack()
async def page_messages(folder: Path) -> None:
    """Send 80 messages of one tab of the page at once, and some of other tabs that are none."""
    import base64

    from src.inference.server.host import LiveHost, ServerLimits
    from src.inference.server.page import LiveTabs
    from src.inference.streaming.session import StreamingASR
    from src.utils.config import load_config

    engine: Any = NumberedEngine(0.05)
    config = load_config(None, overrides={"streaming.policy": "local_agreement"})
    pcm = base64.b64encode(bytes(16_000)).decode()  # half a second

    host = LiveHost(ServerLimits())
    tabs = LiveTabs(host, lambda model: StreamingASR(engine=engine, config=config))

    async def send(tab: str, **fields: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"tab": tab, "model": "m", "rate": RATE, "pcm": pcm, **fields}
        return await asyncio.wait_for(tabs.answer(message), 20.0)

    await send("a", first=True)
    answers = await asyncio.gather(*(send("a") for _ in range(80)), send("b", first=True))
    if sum("error" not in each for each in answers[:-1]) != 1 or "error" in answers[-1]:
        raise BrokenError("messages of one tab take the turns of others")
    for fields in ({"pcm": "A" * (1 << 20)}, {"pcm": "!"}, {"rate": 1}, {"x": 1}, {"model": 7}):
        if "error" not in await send("c", **{"first": True, **fields}):
            raise BrokenError(f"{list(fields)} was taken")
    if len(host.sessions) != 2:
        raise WeakError(f"{len(host.sessions)} sessions are open")
    host.worker.shutdown()


# the load: processes of their own for the server, the good clients and the hostile ones


def load(load_sec: float = LOAD_SEC) -> tuple[dict[str, Any], list[str]]:
    """Stream `GOOD` clients in real time together with the hostile ones; return figures, and what is wrong."""
    load_sec = WORD_SEC * round(load_sec / WORD_SEC)  # ends with a whole word
    address, server = start(serve_until_told)
    url, pid = address.recv()
    alone = asyncio.run(good_client(url, 99, 8.0))
    usual = statistics.median(alone[1])
    stop, hostile = start(attack_until_told, url)
    began, memory = time.monotonic(), list[tuple[float, float]]()
    results, good = start(stream_all, url, load_sec)
    while not results.poll(1.0):
        memory.append((time.monotonic() - began, psutil.Process(pid).memory_info().rss / 2**20))
        if time.monotonic() - began > 2 * load_sec + 60:
            break
    heard = results.recv() if results.poll() else []
    for pipe, process in ((stop, hostile), (address, server), (results, good)):
        with contextlib.suppress(OSError):
            pipe.send("stop")
        process.join(10.0)
        process.kill()
    expected = [" ".join(said(speaker, load_sec)) for speaker in range(GOOD)]
    whole = sum(text == wanted for (text, _), wanted in zip(heard, expected, strict=False))
    added = sorted(lag - usual for _, lags in heard for lag in lags) or [float("nan")]
    late = [mb for at, mb in memory if at > load_sec / 3]
    figures = {
        "clients": GOOD,
        "hostile": len(HOSTILE),
        "seconds": load_sec,
        "whole": whole,
        "events": len(added),
        "alone_lag_sec": round(usual, 3),
        "added_lag_p50_sec": round(added[len(added) // 2], 3),
        "added_lag_p95_sec": round(added[int(0.95 * len(added))], 3),
        "memory_mb": round(max(late, default=0.0)),
        "memory_growth_mb": round(max(late, default=0.0) - (late or [0.0])[0], 1),
    }
    faults = []
    if whole < GOOD:
        faults.append(f"{GOOD - whole} of {GOOD} clients lost words")
    if not figures["added_lag_p95_sec"] <= MAX_LAG_SEC:
        faults.append(f"p95 of the added lag is {figures['added_lag_p95_sec']} s")
    if figures["memory_growth_mb"] > MAX_GROWTH_MB:
        faults.append(f"memory grew by {figures['memory_growth_mb']} MB")
    return figures, faults


def start(target: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    return ours, process


def serve_until_told(pipe: Connection) -> None:
    import logging
    import os

    async def run() -> None:
        async with serving(max_sessions=GOOD + len(HOSTILE)) as url:
            pipe.send((url, os.getpid()))
            while not pipe.poll():
                await asyncio.sleep(0.5)

    logging.disable(logging.CRITICAL)
    asyncio.run(run())


async def good_client(url: str, speaker: int, duration_sec: float) -> tuple[str, list[float]]:
    """Speak in real time; return the text, and the lag of each event: since its audio was sent."""
    from src.inference.server.client import stream_to_server
    from src.inference.server.protocol import Done, LiveEvent

    audio, lags, began = speech(speaker, duration_sec), list[float](), [0.0]

    def in_real_time() -> Iterator[np.ndarray]:
        began[0] = time.monotonic()
        for at in range(0, len(audio), round(BLOCK_SEC * RATE)):
            time.sleep(max(0.0, began[0] + at / RATE + BLOCK_SEC - time.monotonic()))
            yield audio[at : at + round(BLOCK_SEC * RATE)]

    text = ""
    with contextlib.suppress(Exception):
        async for message in stream_to_server(url, in_real_time(), token=TOKEN):
            if isinstance(message, LiveEvent):
                lags.append(time.monotonic() - began[0] - message.audio_sec)
            elif isinstance(message, Done):
                text = message.text
    return text, lags


def stream_all(pipe: Connection, url: str, duration_sec: float) -> None:
    async def run() -> list[tuple[str, list[float]]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * GOOD))
        return await asyncio.gather(*(good_client(url, speaker, duration_sec) for speaker in range(GOOD)))

    pipe.send(asyncio.run(run()))
    pipe.recv()


async def flood(url: str) -> None:
    """Send audio as fast as the server takes it."""
    async with connected(url) as client:
        reading = asyncio.create_task(read_all(client))
        while True:
            await client.send(speech(50, 4.0).tobytes())
            await asyncio.sleep(0)
            if reading.done():
                return


async def flood_of_frames(url: str) -> None:
    """Send samples one by one, empty messages and pings."""
    async with connected(url) as client:
        reading = asyncio.create_task(read_all(client))
        while not reading.done():
            for _ in range(200):
                await client.send(bytes(4))
                await client.send(b"")
            await client.ping()
            await asyncio.sleep(0)


async def churn(url: str) -> None:
    """Begin sessions, send a little, and cut the line."""
    client = await connected(url)
    await client.send(speech(51, 2.0).tobytes())
    await client.recv()
    client.transport.abort()


async def strangers(url: str) -> None:
    """Hold connections without the token, and try some."""
    clients = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(50)]
    with contextlib.suppress(Exception):
        await connected(url, token="wrong")
    await asyncio.sleep(0.5)
    for _, writer in clients:
        writer.transport.abort()


async def read_all(client: Any) -> None:
    with contextlib.suppress(Exception):
        while True:
            await client.recv()


HOSTILE: tuple[Callable[[str], Awaitable[None]], ...] = (flood, flood_of_frames, churn, strangers)


def attack_until_told(pipe: Connection, url: str) -> None:
    async def again(hostile: Callable[[str], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(Exception):
                await hostile(url)
            await asyncio.sleep(0.01)

    async def run() -> None:
        tasks = [asyncio.create_task(again(each)) for each in HOSTILE]
        while not pipe.poll():
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()

    asyncio.run(run())
