"""The caption server on loopback, with scripted engines."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile as sf
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from scripts import serve, stream_client
from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.options import DecodingOptions
from src.inference.server import server
from src.inference.server.client import stream_to_server
from src.inference.server.host import BURST_SEC, PACE, TURN_SEC, LiveHost, LiveSession, ServedModel, ServerLimits
from src.inference.server.protocol import CLOSE_CODES, Done, End, Hello, LiveEvent, Ready, StreamError, read_server
from src.inference.server.server import MAX_OF_ADDRESS, CaptionServer
from src.inference.streaming.commit import Event
from src.inference.streaming.session import StreamingASR
from src.inference.words import Word
from src.utils.config import load_config
from src.utils.errors import AudioError, ConfigError
from tests.inference.scripted import Hear, ScriptedEngine
from tests.inference.server.conftest import GIVE_UP_SEC

CONFIG = load_config(None, overrides={"streaming": {"policy": "local_agreement", "min_chunk_sec": 0.8}})
WORD_SEC = 0.4
SEC_PER_UNIT = 200.0  # of the fraction of a scripted sample
BROKEN_SPEAKER = 90  # the engine fails once it has heard three seconds of him
HELLO, END = Hello().to_text(), End().to_text()


def speech(speaker: int, duration_sec: float) -> Waveform:
    """Audio whose samples are their speaker and their own position, so that a decoder knows what it was given."""
    return (speaker + np.arange(round(duration_sec * SAMPLE_RATE)) / SAMPLE_RATE / SEC_PER_UNIT).astype(np.float32)


def hear(audio: Waveform, options: DecodingOptions | None = None) -> list[Word]:
    """Hear a numbered word of the speaker every 0.4 s; the last one is garbled while it is being said."""
    speaker, place = divmod(float(audio[0]), 1.0)
    begin, end = place * SEC_PER_UNIT, place * SEC_PER_UNIT + len(audio) / SAMPLE_RATE
    if speaker == BROKEN_SPEAKER and end > 3.0:
        raise RuntimeError("CUDA error: device-side assert\nmore of it")
    words = []
    for i in range(round((begin + 0.1) / WORD_SEC), round((end - 0.1) / WORD_SEC + 0.5)):
        start, stop = i * WORD_SEC, (i + 1) * WORD_SEC
        text = f"{speaker:.0f}.{i}" if stop <= end + 0.05 else "garbled"
        words.append(Word(text, max(0.0, start - begin), min(stop, end) - begin, 0.9))
    return words


def hear_when_free() -> tuple[Hear, list[int], threading.Event]:
    """Return what hears as `hear` does, but not before it is free; the speakers of its calls; and what frees it."""
    calls: list[int] = []
    free = threading.Event()

    def busy(audio: Waveform, options: DecodingOptions) -> list[Word]:
        calls.append(int(audio[0]))
        assert free.wait(GIVE_UP_SEC)
        return hear(audio)

    return busy, calls, free


def expected_events(audio: Waveform) -> list[Event]:
    session = StreamingASR(engine=ScriptedEngine(hear), config=CONFIG, clock=lambda: 0.0)
    return session.feed(audio) + session.flush()


class Sessions:
    """Makes sessions, and knows when they are freed."""

    def __init__(self, decode: Hear = hear) -> None:
        self.decode = decode
        self.alive: weakref.WeakSet[StreamingASR] = weakref.WeakSet()

    def session(self, language: str | None) -> StreamingASR:
        if language == "xx":
            raise ConfigError("language 'xx' is not known to this model; known: en")
        session = StreamingASR(engine=ScriptedEngine(self.decode), config=CONFIG, clock=lambda: 0.0)
        self.alive.add(session)
        return session

    async def all_freed(self) -> None:
        while self.alive:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    decode: Hear = hear, *, token: str | None = None, origins: Sequence[str] = (), **limits: Any
) -> AsyncIterator[tuple[str, Sessions]]:
    sessions = Sessions(decode)
    models: Any = {"scripted": sessions}
    made = CaptionServer(models, limits=ServerLimits(**limits), token=token, origins=origins)
    async with made.listen(port=0) as url:
        yield url, sessions


async def captions(url: str, blocks: Iterable[Waveform], **options: Any) -> list[Ready | LiveEvent | Done]:
    return [message async for message in stream_to_server(url, blocks, **options)]


async def exchange(url: str, *messages: str | bytes, **options: Any) -> tuple[list[Any], int | None]:
    """Send messages as they are; return all answers, and the code that the connection was closed with."""
    async with connect(url, **options) as client:
        await send_all(client, messages)
        return await answers(client), client.close_code


async def send_all(client: ClientConnection, messages: Sequence[str | bytes]) -> None:
    with contextlib.suppress(ConnectionClosed):
        for message in messages:
            await client.send(message)


async def answers(client: ClientConnection) -> list[Any]:
    received = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            received.append(read_server(await client.recv(decode=True)))
    return received


async def assert_serves(url: str, **options: Any) -> None:
    audio = speech(1, 2.0)
    assert events_of(await captions(url, [audio], **options)) == expected_events(audio)


def events_of(messages: Sequence[Any]) -> list[Event]:
    return [message.event for message in messages if isinstance(message, LiveEvent)]


def committed(events: Sequence[Event]) -> str:
    return " ".join(event.text for event in events if event.kind == "commit")


def in_blocks(audio: Waveform, block_sec: float) -> list[Waveform]:
    return np.split(audio, range(0, len(audio), round(block_sec * SAMPLE_RATE))[1:])


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_every_client_gets_the_events_of_its_own_audio_whatever_its_blocks() -> None:
    audios = [speech(speaker, 3.0 + speaker) for speaker in range(1, 5)]
    threads: set[threading.Thread] = set()

    def watched(audio: Waveform, options: DecodingOptions) -> list[Word]:
        threads.add(threading.current_thread())
        return hear(audio)

    async with serving(watched) as (url, _):
        blocks = [in_blocks(audio, sec) for audio, sec in zip(audios, (0.02, 0.3, 1.1, 9.0), strict=True)]
        received = await asyncio.gather(*(captions(url, each) for each in blocks))
    for audio, messages in zip(audios, received, strict=True):
        events = expected_events(audio)
        assert isinstance(messages[0], Ready)
        assert events_of(messages) == events
        assert messages[-1] == Done(reason="end", text=committed(events), audio_sec=len(audio) / SAMPLE_RATE)
    assert len(threads) == 1
    assert threading.main_thread() not in threads


async def test_audio_is_float32_at_16_khz_without_hello_and_whatever_hello_says() -> None:
    audio, silence = speech(1, 2.0), np.zeros(44_100 * 3, dtype=np.float32)
    async with serving() as (url, _):
        received, code = await exchange(url, audio.tobytes(), END)
        *_, done = await captions(url, [silence], sample_rate=44_100, sample_format="s16le", language="en")
    assert (events_of(received), code) == (expected_events(audio), 1000)
    assert isinstance(done, Done)
    assert done.audio_sec == pytest.approx(3.0, abs=0.01)


async def test_a_client_with_much_to_say_does_not_keep_the_worker_from_others() -> None:
    slow, calls, arrived = hear_when_free()
    async with serving(slow, queue_sec=60) as (url, _):
        long = asyncio.create_task(captions(url, [speech(1, 40.0)]))
        async with connect(url) as client:
            await send_all(client, [speech(2, 4.0).tobytes(), END])
            arrived.set()
            await answers(client)
        await long
    short = [at for at, speaker in enumerate(calls) if speaker == 2]
    assert max(calls[a:b].count(1) for a, b in itertools.pairwise(short)) <= 3
    assert calls[short[-1] :].count(1) >= 20  # the short one was served before the long one was done


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The server's sides of its connections, with the smallest buffers."""
    connections: list[Any] = []
    captions = CaptionServer._captions

    async def watched(self: CaptionServer, request: Any, connection: Any, **options: Any) -> Any:
        connections.append(connection)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        return await captions(self, request, connection, **options)

    monkeypatch.setattr(CaptionServer, "_captions", watched)
    return connections


async def test_a_server_that_is_behind_stops_reading_and_says_its_lag(accepted: list[Any]) -> None:
    audio, (busy, _, free) = speech(1, 40.0), hear_when_free()
    async with serving(busy, queue_sec=1.5) as (url, _):
        streaming = asyncio.create_task(captions(url, in_blocks(audio, 1.0)))
        while not accepted or accepted[0]._wire.is_reading():
            await asyncio.sleep(0)
        free.set()
        messages = await streaming
    assert events_of(messages) == expected_events(audio)
    lags = [message.lag_sec for message in messages if isinstance(message, LiveEvent)]
    assert 1.0 <= max(lags) <= 1.5
    assert lags[-1] == 0.0


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What is freed is freed at once, not whenever a cycle is found."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(("given", "code"), [
    (["garbage"], "bad_message"), ([END], "bad_message"), ([HELLO, HELLO], "bad_message"),
    (['{"type": "hello", "sample_rate": 7}'], "bad_message"), (['{"type": "hello", "language": "xx"}'], "bad_message"),
    ([HELLO, b"\0\0\0\0", "garbage"], "bad_message"), ([b"\0"], "bad_audio"), ([HELLO, b"\xff" * 40_000], "bad_audio"),
])  # fmt: skip
async def test_garbage_is_answered_with_its_error_and_leaves_nothing_behind(
    given: list[str | bytes], code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "src.inference.server")  # pytest keeps records, and with them tracebacks
    async with serving() as (url, sessions):
        received, close_code = await exchange(url, *given)
        last = received[-1]
        assert (last.kind, last.code, close_code) == ("error", code, CLOSE_CODES[code])
        assert last.message and last.fix
        await assert_serves(url)
        await sessions.all_freed()


async def test_an_error_reaches_a_client_that_has_much_more_to_send(accepted: list[Any]) -> None:
    async with serving() as (url, _):
        received, close_code = await exchange(url, HELLO, b"\xff" * 400, *[bytes(200_000)] * 30)
        await assert_serves(url)
    assert (received[-1].code, close_code) == ("bad_audio", 1007)
    assert accepted[0].websocket.close_code == 1007  # its answer was read behind all that, and it was not cut off


async def test_without_the_token_or_from_pages_of_other_origins_nobody_is_served() -> None:
    async with serving(token="correct horse", origins=["https://captions.example"]) as (url, _):
        await assert_serves(url, token="correct horse")
        with pytest.raises(StreamError, match="HTTP 401"):
            await captions(url, [speech(1, 1.0)], token="wrong horse")
        for first in (HELLO, Hello(token="None").to_text(), Hello(token="").to_text(), bytes(4_000)):
            received, close_code = await exchange(url, first)
            assert ([each.code for each in received], close_code) == (["unauthorized"], 1008)
        for origin in ("https://evil.example", "null", "http://captions.example", url):
            with pytest.raises(InvalidStatus, match="403"):
                await connect(url, origin=Origin(origin))
        hello = Hello(token="correct horse").to_text()  # of a browser
        received, _ = await exchange(url, hello, END, origin=Origin("https://captions.example"))
        assert received[-1].kind == "done"


@pytest.mark.usefixtures("no_garbage_collection")
async def test_one_session_too_many_is_told_so_and_a_place_becomes_free() -> None:
    async with serving(max_sessions=1) as (url, sessions):
        async with connect(url) as first:
            await first.send(HELLO)
            assert read_server(await first.recv(decode=True)).kind == "ready"
            with pytest.raises(StreamError) as caught:
                await captions(url, [speech(2, 1.0)])
            assert caught.value.code == "too_many_sessions"
            await first.send(speech(2, 1.0).tobytes())
            first.transport.abort()
        await sessions.all_freed()
        await assert_serves(url)


@pytest.mark.parametrize("token", [None, "correct horse"])
async def test_who_holds_connections_without_a_session_keeps_nobody_out(token: str | None) -> None:
    hello = Hello(token=token).to_text()  # of a browser
    async with serving(token=token) as (url, _):
        mute = [await asyncio.open_connection("127.0.0.1", port_of(url)) for _ in range(MAX_OF_ADDRESS)]
        silent = [await connect(url) for _ in range(MAX_OF_ADDRESS)]
        if token:  # the oldest are cut off, before any handshake
            assert [await reader.read() for reader, _ in mute] == [b""] * len(mute)
        silent += [await connect(url)]
        await silent[0].wait_closed()
        assert all(client.close_code is None for client in silent[1:])
        await assert_serves(url, token=token)
        received, _ = await exchange(url, hello, END)
        assert received[-1].kind == "done"


async def test_addresses_have_places_of_their_own_and_who_shows_the_token_is_not_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 6)
    monkeypatch.setattr(server, "MAX_OF_ADDRESS", 4)
    async with serving(token="correct horse") as (url, _):
        member = await connect(url, additional_headers={"Authorization": "Bearer correct horse"})
        other = [await connect(url, local_addr=("127.0.0.2", 0)) for _ in range(2)]
        silent = [await connect(url) for _ in range(9)]
        last = await connect(url, local_addr=("127.0.0.3", 0))
        await asyncio.gather(*(client.wait_closed() for client in silent[:6]))
        for client in (*other, *silent[6:], last):
            assert client.close_code is None
            await client.send(HELLO)
            assert [each.code for each in await answers(client)] == ["unauthorized"]
        await member.send(HELLO)
        assert read_server(await member.recv(decode=True)).kind == "ready"
        await member.close()


async def test_a_client_without_the_token_has_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HELLO_SEC", 0.2)
    async with serving(token="correct horse") as (url, _):
        reader, _ = await asyncio.open_connection("127.0.0.1", port_of(url))
        assert await reader.read() == b""
        received, close_code = await exchange(url)
        assert ([each.code for each in received], close_code) == (["idle"], 1008)
        async with connect(url, additional_headers={"Authorization": "Bearer correct horse"}) as client:
            await asyncio.sleep(0.5)
            await send_all(client, [HELLO, END])
            assert [each.kind for each in await answers(client)] == ["ready", "done"]


async def test_a_flood_of_frames_that_are_no_messages_is_cut_off_and_one_of_empty_messages_is_slow() -> None:
    async def flood(client: ClientConnection, kind: str, count: int) -> None:
        await client.send(HELLO)
        with contextlib.suppress(ConnectionClosed):
            for _ in range(count if kind == "pings" else 0):
                await client.ping()
            await client.send(itertools.repeat(b"", count))

    async with serving() as (url, _):
        for kind in ("pings", "fragments"):
            client = await connect(url)
            await asyncio.gather(flood(client, kind, 2 * server.MAX_CONTROLS), client.wait_closed())
            assert client.close_code == 1006
        empty = await connect(url)
        sending = asyncio.create_task(send_all(empty, [HELLO, *[b""] * 5_000, END]))
        await assert_serves(url)
        assert empty.close_code is None
        sending.cancel()
        empty.transport.abort()


async def test_a_silent_connection_and_one_with_too_large_a_message_are_closed() -> None:
    async with serving(idle_sec=0.2, max_message_bytes=100_000) as (url, _):
        received, close_code = await exchange(url)
        assert ([each.code for each in received], close_code) == (["idle"], 1008)
        received, close_code = await exchange(url, bytes(100_004))
        assert ([each.code for each in received], close_code) == (["message_too_big"], 1009)
        client = await connect(url)
        await send_all(client, [bytes(2 * server.MAX_MESSAGE_BYTES)])
        await client.wait_closed()
        await assert_serves(url)  # 128,000 bytes: the client cuts them to what fits


@pytest.mark.parametrize(
    ("limits", "sent_sec", "code"),
    [({"max_session_sec": 3.0}, 4.0, "session_too_long"), ({"idle_sec": 0.5}, 3.0, "idle")],
)
async def test_a_session_that_is_too_long_or_idle_is_decoded_to_its_end(
    limits: dict[str, float], sent_sec: float, code: str
) -> None:
    async with serving(**limits) as (url, _):
        received, close_code = await exchange(url, *(block.tobytes() for block in in_blocks(speech(1, sent_sec), 1.0)))
    *before, last = received
    assert events_of(before) == expected_events(speech(1, 3.0))
    assert (last.code, last.audio_sec, close_code) == (code, 3.0, 1008)


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_client_that_reads_nothing_is_cut_off(accepted: list[Any]) -> None:
    def verbose(audio: Waveform, options: DecodingOptions) -> list[Word]:
        return [Word(w.text + "x" * 500, w.start_sec, w.end_sec, 0.9) for w in hear(audio)]

    async with serving(verbose, send_sec=0.1) as (url, sessions):
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        narrow.connect(("127.0.0.1", port_of(url)))
        client = await connect(url, sock=narrow, max_queue=1)
        blocks = [block.tobytes() for block in in_blocks(speech(1, 100.0), 1.0)]
        sending = asyncio.create_task(send_all(client, blocks))
        while not sessions.alive:
            await asyncio.sleep(0.01)
        await sessions.all_freed()
        sending.cancel()
        sessions.decode = hear
        await assert_serves(url)
        client.transport.abort()


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_failing_engine_ends_one_session_and_says_when(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "src.inference.server")
    healthy = speech(1, 8.0)
    received = []
    async with serving() as (url, sessions):
        other = asyncio.create_task(captions(url, in_blocks(healthy, 0.2)))
        with pytest.raises(StreamError) as caught:
            async for message in stream_to_server(url, in_blocks(speech(BROKEN_SPEAKER, 8.0), 0.2)):
                received.append(message)
        assert events_of(await other) == expected_events(healthy)
        await sessions.all_freed()
    assert caught.value.code == "engine_failed"
    assert caught.value.message.startswith("RuntimeError: CUDA error: device-side assert, while streaming 0.00 to 3.2")
    assert caught.value.audio_sec == pytest.approx(3.2, abs=0.1)
    assert committed(events_of(received)).startswith(f"{BROKEN_SPEAKER}.0 {BROKEN_SPEAKER}.1")


async def test_a_stopped_server_decodes_what_it_heard_and_says_done() -> None:
    received: list[Any] = []
    async with serving(queue_sec=1.0) as (url, _):
        silent, client = await connect(url), await connect(url)
        blocks = [block.tobytes() for block in in_blocks(speech(1, 100.0), 0.5)]
        sending = asyncio.create_task(send_all(client, blocks))
        while not received or received[-1].kind != "commit":
            received.append(read_server(await client.recv(decode=True)))
        reading = asyncio.create_task(answers(client))
    received += await reading
    await sending
    done = received[-1]
    assert (done.kind, done.reason, client.close_code) == ("done", "shutdown", 1001)
    assert done.audio_sec < 100.0
    assert events_of(received) == expected_events(speech(1, done.audio_sec))
    await silent.wait_closed()
    assert silent.close_code == 1001
    with pytest.raises(StreamError) as caught:
        await captions(url, [speech(1, 1.0)])
    assert caught.value.code == "unreachable"


async def test_a_close_is_noticed_before_the_audio_that_waits_is_heard() -> None:
    busy, calls, free = hear_when_free()
    async with serving(busy, max_sessions=1) as (url, _):
        async with connect(url) as client:
            await send_all(client, [block.tobytes() for block in in_blocks(speech(1, 50.0), 0.02)])
            while not calls:
                await asyncio.sleep(0.01)
        next_client = asyncio.create_task(captions(url, [speech(2, 2.0)]))
        free.set()
        assert events_of(await next_client) == expected_events(speech(2, 2.0))
    assert calls.count(1) == 1


async def test_a_client_that_trickles_samples_is_idle() -> None:
    async with serving(idle_sec=0.3) as (url, _):
        client = await connect(url)
        await client.send(HELLO)
        while client.close_code is None:
            await asyncio.sleep(0.02)
            await send_all(client, [bytes(4)])
        received = await answers(client)
    assert (received[-1].code, client.close_code) == ("idle", 1008)


class Recorder:
    """Stands for a session; remembers what it was fed."""

    def __init__(self, heard: list[Recorder] | None = None) -> None:
        self.turns: list[Waveform] = []
        self.heard = [] if heard is None else heard

    def feed(self, samples: Waveform, sample_rate: int) -> list[Event]:
        self.turns.append(samples)
        self.heard.append(self)
        return []

    def flush(self) -> list[Event]:
        return []


async def listen_to(live: LiveSession) -> None:
    while await live.next_events() is not None:
        pass


async def test_who_speaks_is_heard_before_a_recording_that_is_held_to_its_pace_until_it_is_alone() -> None:
    host, heard = LiveHost(), list[Recorder]()
    recording, speaker = Recorder(heard), Recorder(heard)
    fast, live = [await host.open(lambda: each, SAMPLE_RATE) for each in (recording, speaker)]  # type: ignore[arg-type, return-value] # noqa: B023
    began = asyncio.get_running_loop().time()
    await fast.put(speech(1, 40.0))
    listening = [asyncio.create_task(listen_to(each)) for each in (fast, live)]
    while len(recording.turns) < 3:
        await asyncio.sleep(0)
    heard.clear()
    await live.put(speech(2, 1.0))
    while len(speaker.turns) < 2:
        await asyncio.sleep(0)
    assert heard.count(recording) <= 1  # the turn that went on
    while host.next_turn() or not host._timer or host._timer.cancelled():
        await asyncio.sleep(0)
    elapsed = asyncio.get_running_loop().time() - began
    assert len(recording.turns) * TURN_SEC <= (BURST_SEC + elapsed) * PACE + TURN_SEC
    for each in (live, fast):
        each.end("end")
    await asyncio.gather(*listening[1:])
    live.close()
    await asyncio.gather(*listening)
    assert sum(map(len, recording.turns)) == 40 * SAMPLE_RATE


async def test_a_session_that_fails_is_over_although_its_call_goes_on() -> None:
    host, free = LiveHost(), threading.Event()
    recorder: Any = Recorder()
    recorder.feed = lambda *_: free.wait(GIVE_UP_SEC) and []
    live, other = await host.open(lambda: recorder, SAMPLE_RATE), await host.open(Recorder, SAMPLE_RATE)  # type: ignore[arg-type]
    await live.put(speech(1, 1.0))
    await other.put(speech(1, 1.0))
    listening = [asyncio.create_task(listen_to(each)) for each in (live, other)]
    await asyncio.sleep(0)
    live.fail(ConnectionAbortedError("gone"))
    with pytest.raises(ConnectionAbortedError):
        await listening[0]
    live.close()
    assert not listening[1].done()
    free.set()
    other.end("end")
    await listening[1]


async def test_small_blocks_that_wait_make_one_turn_and_are_heard_although_a_shutdown_follows_their_end() -> None:
    recorder: Any = Recorder()
    live = await LiveHost().open(lambda: recorder, SAMPLE_RATE)
    for block in in_blocks(speech(1, 1.0), TURN_SEC / 5):
        await live.put(block)
    live.end("end")
    live.end("shutdown", drop=True)
    await listen_to(live)
    assert [len(turn) for turn in recorder.turns] == [TURN_SEC * SAMPLE_RATE] * 2
    assert live.ending == "end"


async def test_the_client_raises_what_its_source_raises_and_names_a_server_of_something_else() -> None:
    def failing() -> Iterator[Waveform]:
        yield speech(1, 1.0)
        raise AudioError("the microphone delivered nothing for 5 s")

    async with serving() as (url, _):
        with pytest.raises(AudioError):
            await captions(url, failing())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(StreamError, match=f"{port}: HTTP 404"):
            await captions(f"ws://127.0.0.1:{port}", [])


async def test_a_server_refuses_what_it_cannot_serve_with_and_warns_of_an_open_host(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as (url, sessions):
        models: Any = {"scripted": sessions}
        with pytest.raises(ConfigError):
            async with CaptionServer(models).listen(port=port_of(url)):
                pass
    with pytest.raises(ConfigError):
        CaptionServer(models, token="")
    with pytest.raises(ConfigError, match="no model"):
        CaptionServer({})
    with pytest.raises(ConfigError, match="max_sessions is 0"):
        ServerLimits(max_sessions=0)
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("127.0.0.2", False), ("0.0.0.0", True)):
        caplog.clear()
        async with CaptionServer(models).listen(host, port=0):
            assert ("without a token" in caplog.text) == warned


def test_the_scripts_stream_a_file_until_the_server_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = speech(3, 5.0)
    sf.write(tmp_path / "talk.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    ended: list[str] = []

    def talk(url: str) -> None:
        given = ["--file", str(tmp_path / "talk.wav"), "--fast", "--format", "f32le", "--url", url]
        given += ["--captions", str(tmp_path / "talk.srt"), "--simuleval", str(tmp_path / "log")]
        arguments = stream_client.parse_arguments(given)
        try:
            ended.append(asyncio.run(stream_client.run(arguments, threading.Event())))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def announce(line: str, **_: Any) -> None:
        if line.startswith("listening on "):
            threading.Thread(target=talk, args=(line.removeprefix("listening on "),)).start()

    engine: Any = ScriptedEngine(hear)
    monkeypatch.setattr(serve, "print", announce, raising=False)
    monkeypatch.setattr(serve, "setup_logging", lambda level: None)  # it would last
    monkeypatch.setattr(
        serve, "make_server", lambda arguments: CaptionServer({"scripted": ServedModel(engine, CONFIG)})
    )
    monkeypatch.setattr("sys.argv", ["serve.py", "--model", "tiny.en", "--port", "0"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert serve.main() == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    assert ended == ["end"]
    assert capsys.readouterr().out.split() == committed(expected_events(audio)).split()
    assert (tmp_path / "talk.srt").read_text().splitlines()[2].startswith("3.0 3.1")
    logged = json.loads((tmp_path / "log" / "instances.log").read_text())
    assert (logged["prediction"].split(), logged["source"]) == (committed(expected_events(audio)).split(), ["talk.wav"])


def test_a_client_names_its_language_by_any_mark_or_has_it_detected() -> None:
    engine: Any = ScriptedEngine(hear, languages=("de", "en", "zh"))
    for own, marks in (
        ("en", {None: "en", "German": "de", "deu": "de", "yue": "zh", "auto": None}),
        (None, {None: None}),
    ):
        model = ServedModel(engine, load_config(None, overrides={"model.language": own}))
        assert {mark: model.session(mark).language for mark in marks} == marks
        for unknown in ("xx", "fr"):
            with pytest.raises(ConfigError, match=unknown):
                model.session(unknown)


async def test_a_client_names_its_model_and_one_that_is_not_there_is_refused() -> None:
    first, second = Sessions(), Sessions(lambda audio, options: [Word("other", 0.0, 0.4, 0.9)])
    models: Any = {"first": first, "second": second}
    async with CaptionServer(models).listen(port=0) as url:
        texts = {name: (await captions(url, [speech(1, 2.0)], model=name))[-1] for name in (None, "first", "second")}
        with pytest.raises(StreamError, match="first, second"):
            await captions(url, [speech(1, 1.0)], model="third")
    heard = [getattr(done, "text", "").split() for done in texts.values()]
    assert heard[0] == heard[1] == committed(expected_events(speech(1, 2.0))).split()
    assert set(heard[2]) == {"other"}


def test_models_are_named_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve.named_model("tiny.en") == ("tiny.en", "tiny.en")
    assert serve.named_model("tuned=runs/demo/best") == ("tuned", "runs/demo/best")
    assert serve.named_model("runs/a=b/best") == ("best", "runs/a=b/best")
    with pytest.raises(argparse.ArgumentTypeError, match="name it"):
        serve.named_model("/")
    monkeypatch.setattr("sys.argv", ["serve.py", "--model", "tiny.en", "--model", "tiny.en"])
    with pytest.raises(ConfigError, match=r"tiny\.en is given twice"):
        serve.make_server(serve.parse_arguments())


def test_a_terminal_shows_what_may_change_dim_and_clears_it() -> None:
    kinds = ("commit", "partial", "final")
    events = [Event(kind, (Word("so", 0.0, 0.4, 0.9),), "s\x1bo", 1.0, 0.0, 0) for kind in kinds]
    assert [stream_client.render(event, terminal=False) for event in events] == ["so", "", "\n"]
    assert stream_client.render(events[0], terminal=False, follows=True) == " so"
    unspaced = Event("commit", (Word("天", 0.0, 0.4, space=False),), "天", 1.0, 0.0, 0)
    assert stream_client.render(unspaced, terminal=False, follows=True) == "天"
    commit, partial, final = (stream_client.render(event, terminal=True) for event in events)
    assert (commit, final) == ("\x1b[Jso", "\x1b[J\n")
    assert "\x1b[2mso\x1b[0m" in partial


async def test_a_factory_of_sessions_serves_live_captions_and_no_files() -> None:
    token = "right-token-0123456789"
    async with CaptionServer(Sessions().session, token=token).listen(port=0) as url:
        assert isinstance((await captions(url, [speech(1, 2.0)], token=token))[-1], Done)
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=url.replace("ws://", "http://"), headers=headers) as client:
            assert (await client.get("/v1/models")).json()["data"] == []
            given = {"data": {"model": "whisper-1"}, "files": {"file": b"RIFF"}}
            answer = await client.post("/v1/audio/transcriptions", **given)
            assert answer.status_code == 404
            assert "live captions only" in answer.json()["error"]["message"]
