"""Attacks on the caption server, over its WebSocket and OpenAI's API, and its load test.

The model is scripted: it hears numbered words in numbered samples and sleeps a little for each call, so that two cores
can serve 24 sessions. What is measured is the server's own work: turns, limits and memory, not a model's speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import statistics
import struct
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
    vocabulary: Any = SimpleNamespace(encode=str.split, languages=("en",), multilingual=False)
    cap_rates: dict[str, float] = {}  # noqa: RUF012 - nobody changes it

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
    from src.inference.server.host import ServedModel, ServerLimits
    from src.inference.server.server import CaptionServer
    from src.utils.config import load_config

    streaming = {"policy": "local_agreement", "min_chunk_sec": 0.8}
    config = load_config(None, overrides={"streaming": streaming, "model.language": "en"})
    engine: Any = NumberedEngine(call_sec)
    return CaptionServer({"m": ServedModel(engine, config)}, limits=ServerLimits(**limits), token=token)


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


# files over OpenAI's API


def recording(duration_sec: float = 4.0, *, silent: bool = False, kind: str = "WAV") -> bytes:
    """Return a file of `speech`, or of silence."""
    import soundfile as sf

    file, samples = io.BytesIO(), speech(1, duration_sec)
    subtype = "FLOAT" if kind == "WAV" else None
    sf.write(file, samples * 0 if silent else samples, RATE, format=kind, subtype=subtype)
    return file.getvalue()


def form_part(name: str, content: bytes = b"", headers: str = "") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{headers}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(file: bytes, *fields: bytes, headers: str = "") -> bytes:
    return b"".join([form_part("model", b"m"), *fields, form_part("file", file, headers), b"--x--\r\n"])


async def post(url: str, body: bytes | AsyncIterator[bytes], *, token: str | None = TOKEN, **headers: str) -> Any:
    """Send a form as it is; return the answer, whole."""
    import httpx

    own = {"Content-Type": "multipart/form-data; boundary=x", **headers}
    own |= {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(timeout=30.0, verify=False) as client:  # else each reads all certificates
        return await client.post(url.replace("ws", "http", 1) + "/v1/audio/transcriptions", content=body, headers=own)


async def send_raw(url: str, request: bytes) -> bytes:
    """Send bytes; return the beginning of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(1000), 20.0)
    writer.transport.abort()
    return answer


async def send_endless(url: str, begin: bytes, piece: bytes, *, token: str = TOKEN) -> bytes:
    """Send a form that goes on with a piece again and again, in chunks; return the beginning of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode())

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for content in itertools.chain([begin] if begin else [], itertools.repeat(piece)):
                writer.write(b"%x\r\n%b\r\n" % (len(content), content))
                await writer.drain()
                await asyncio.sleep(0)

    sending = asyncio.create_task(send())
    answer = await asyncio.wait_for(reader.read(1000), 20.0)
    sending.cancel()
    writer.transport.abort()
    return answer


async def must_transcribe(url: str) -> None:
    """Check that a client with the token gets the text of its file."""
    answer = await post(url, form(recording()))
    if answer.status_code != 200 or answer.json()["text"].split() != said(1, 4.0):
        raise BrokenError(f"another client's file: {answer.status_code} {answer.text[:200]!r}")


async def must_answer(url: str, body: bytes | AsyncIterator[bytes], *statuses: int, what: str, **options: Any) -> None:
    """Check that a form is refused, shortly, as OpenAI does."""
    answer = await post(url, body, **options)
    if answer.status_code not in statuses:
        raise BrokenError(f"{what}: {answer.status_code} {answer.text[:200]!r}")
    if set(answer.json()["error"]) != {"message", "type", "param", "code"} or len(answer.text) > 2_000:
        raise WeakError(f"{what}: {answer.text[:300]!r}")


@attack(limit_sec=120.0)
async def api_forms(folder: Path) -> None:
    """Send files and fields without end, parts by the thousand, nested and broken forms: nothing is kept of them."""

    file, process = recording(), psutil.Process()
    tries = {
        "a huge file": (form(bytes(30 << 20)), 413),
        "a field of megabytes": (form(file, form_part("prompt", bytes(8 << 20))), 400),
        "a header of megabytes": (form_part("a", b"", "; a=" + "b" * (4 << 20)), 400),
        "nested forms": (form_part("a", b"", "\r\nContent-Type: multipart/mixed; boundary=x") * 1000, 400),
        "two files": (form(file, form_part("file", file)), 400),
        "two models": (form(file, form_part("model", b"m")), 400),
        "an unknown field": (form(file, form_part("__class__", b"x")), 400),
        "no end": (form(file)[:-100], 400),
        "nothing": (b"", 400),
    }
    endless = {
        "a file without end": (form_part("file")[:-2], bytes(1 << 16), 413),
        "a preamble without end": (b"", b"preamble\r\n" * 100, 408),
        "parts without end": (b"", form_part("a"), 400),
        "a field without end": (form_part("prompt")[:-2], bytes(1 << 16), 400),
        "headers without end": (form_part("a")[:-4], b"X: y\r\n", 400),
    }
    async with serving() as url:
        await must_transcribe(url)
        before = process.memory_info().rss
        for what, (body, status) in tries.items():
            await must_answer(url, body, status, what=what)
        for what, (begin, piece, status) in endless.items():
            if not (answer := await send_endless(url, begin, piece)).startswith(f"HTTP/1.1 {status}".encode()):
                raise BrokenError(f"{what}: {answer[:200]!r}")
        if (grown := (process.memory_info().rss - before) / 2**20) > 150:  # of the client's own bodies, too
            raise WeakError(f"memory grew by {grown:.0f} MB")
        await must_answer(url, form(file), 415, what="compressed", **{"Content-Encoding": "gzip"})
        await must_answer(url, form(file), 400, what="no boundary", **{"Content-Type": "multipart/form-data"})
        await must_answer(url, form(file), 415, what="no form", **{"Content-Type": "application/json"})
        for length in (10, 1 << 40, -1):  # less and more than there is
            head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n"
            if (answer := await send_raw(url, head.encode() + form(file))).split()[1][:1] != b"4":
                raise BrokenError(f"Content-Length {length}: {answer[:200]!r}")
        await must_transcribe(url)


@attack()
async def api_paths(folder: Path) -> None:
    """Write elsewhere by the names of files and fields, and read files by the addresses of models."""
    import tempfile

    names = [
        "../VICTIM",
        str(folder / "VICTIM"),
        "a/../../VICTIM",
        "..\\VICTIM",
        "\0VICTIM",
        "n" * 5000,
        "",
        "%2e%2e/VICTIM",
    ]
    (folder / "VICTIM").write_text("original")
    async with serving() as url:
        for name in names:
            for header in (f'; filename="{name}"', f"; filename*=UTF-8''{name}"):
                await post(url, form(recording(), headers=header))
                await post(url, form(recording(), form_part(name, b"x")))
        await must_transcribe(url)
        left = sorted(
            each.name
            for each in Path(tempfile.gettempdir()).rglob("*")
            if "VICTIM" in each.name or "upload" in each.name
        )
        if left != ["VICTIM"] or (folder / "VICTIM").read_text() != "original":
            raise BrokenError(f"there are now {left}")
        for path in (
            "/v1/models/../../etc/passwd",
            "/v1/models/%2e%2e%2fetc%2fpasswd",
            "//etc/passwd",
            "/v1/models/%00",
        ):
            answer = await send_raw(
                url, f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
            )
            if not answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")):
                raise BrokenError(f"{path}: {answer[:200]!r}")


@attack(limit_sec=120.0)
async def api_bombs(folder: Path) -> None:
    """Upload playlists, damaged files, silence of days in some kilobytes, and headers that promise more."""
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    long, header = recording(3600.0, silent=True, kind="FLAC"), bytearray(recording())
    header[4:8] = header[40:44] = struct.pack("<I", 0xFFFFFFF0)
    tries = {
        "a playlist": playlist.encode(),
        "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "a picture": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "an archive": b"PK\3\4" + bytes(1000),
        "noise": np.random.default_rng(0).bytes(1 << 20),
        "zeros": bytes(10 << 20),
        "hours of silence": long,
        "nothing": b"",
    }
    async with serving(max_session_sec=600.0) as url:
        for what, content in tries.items():
            await must_answer(url, form(content), 400, what=what)
        answer = await post(url, form(bytes(header)))
        if answer.status_code not in (200, 400):
            raise BrokenError(f"a header that promises more: {answer.status_code}")
        await must_transcribe(url)


@attack()
async def api_strangers(folder: Path) -> None:
    """Ask for everything without the token, with wrong ones, and on a connection that showed it before."""
    import httpx

    async with serving() as url:
        address = url.replace("ws", "http", 1)
        for token in (None, "wrong", TOKEN[:-1], TOKEN + "x"):
            await must_answer(url, form(recording()), 401, what=f"token {token!r}", token=token)
            await must_answer(url, form(bytes(20 << 20)), 401, what=f"token {token!r}, a huge file", token=token)
        async with httpx.AsyncClient() as client:
            known = {"Authorization": f"Bearer {TOKEN}"}
            for path in ("/v1/models", "/v1/models/m", "/v1/audio/translations", "/", "/v1/other"):
                await client.get(address + "/v1/models", headers=known)
                if (answer := await client.get(address + path)).status_code != 401:
                    raise BrokenError(f"{path} was answered with {answer.status_code}")
            for origin in ("https://evil.example", "null", address):
                answer = await client.get(address + "/v1/models", headers={"Origin": origin, **known})
                if answer.status_code != 403 or "Access-Control-Allow-Origin" in answer.headers:
                    raise BrokenError(f"a page of {origin} was let in")
        await must_transcribe(url)


@attack(limit_sec=120.0)
async def api_slow_loris(folder: Path) -> None:
    """Hold connections with headers and forms that come byte by byte; take all places with forms that never end."""
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n"

    async def drip(begin: bytes) -> float:
        """Return how long the server bears it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(begin)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and time.monotonic() - began < 60.0:
                writer.write(b"a")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), 0.2)
        writer.transport.abort()
        return time.monotonic() - began

    async with serving(max_files=4) as url:
        for count, begin in ((100, b"GET /"), (100, head.encode()), (3, (head + "\r\n").encode() + form_part("a"))):
            slow = [asyncio.create_task(drip(begin)) for _ in range(count)]
            await asyncio.sleep(1.0)
            await must_transcribe(url)
            await must_serve(url)
            if (longest := max(await asyncio.gather(*slow))) > 25.0:
                raise BrokenError(f"{begin[:20]!r} was borne for {longest:.0f} s")
        await must_transcribe(url)


@attack()
async def api_leavers(folder: Path) -> None:
    """Leave in the middle of uploads, texts and streams: places and the model are free at once."""
    import httpx

    async def half() -> AsyncIterator[bytes]:
        yield form(bytes(1 << 20))[:-100]
        await asyncio.sleep(60.0)

    stream = form_part("stream", b"true")
    async with serving(max_files=2, call_sec=0.5) as url:
        for body in (lambda: form(recording(25.0)), lambda: form(recording(25.0), stream), half):
            for _ in range(6):
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(post(url, body()), 0.3)
        began = time.monotonic()
        await must_transcribe(url)
        await must_serve(url)
        if time.monotonic() - began > 15.0:
            raise WeakError(f"the next client waited {time.monotonic() - began:.0f} s")


@attack(limit_sec=120.0)
async def api_crowd(folder: Path) -> None:
    """Send 30 files at once: some are told to come later, and who speaks keeps all of its words, in time."""
    async with serving(max_files=6, call_sec=0.05) as url:
        alone = statistics.median((await good_client(url, 9, 4.0))[1])
        body = form(recording(20.0))
        files = [asyncio.create_task(post(url, body)) for _ in range(30)]
        text, lags = await good_client(url, 7, 8.0)
        answers = await asyncio.gather(*files)
        if text.split() != said(7, 8.0):
            raise BrokenError(f"who speaks lost words: {text[:200]!r}")
        if (late := sorted(lags)[int(0.95 * len(lags))] - alone) > 1.0:
            raise BrokenError(f"who speaks waited {late:.1f} s more")
        refused = [answer for answer in answers if answer.status_code == 429]
        if len(refused) < 20 or any("Retry-After" not in answer.headers for answer in refused):
            raise BrokenError(f"{len(refused)} of 30 were told to come later")
        if {answer.status_code for answer in answers} != {200, 429}:
            raise BrokenError(f"{ {answer.status_code for answer in answers} }")


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
