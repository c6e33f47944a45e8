"""OpenAI's API of the server: its own client and curl with real weights, hostile clients with a scripted model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile as sf
from openai import OpenAI

from benchmarks.live_attacks import send_endless
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.sources.catalog import SAMPLE_CLIP, load_utterances
from src.data.vad import VoiceActivityDetector
from src.inference.captions import to_srt, to_vtt
from src.inference.engine_base import Engine
from src.inference.engines import load_engine
from src.inference.files.transcribe import BatchInference, Transcription
from src.inference.server import speech_api
from src.inference.server.host import TURN_SEC, LiveHost, ServedModel, ServerLimits
from src.inference.server.server import CaptionServer
from src.inference.words import Word
from src.utils.config import load_config
from tests.inference.scripted import Hear, ScriptedEngine

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "correct horse"
CONFIG = load_config(None, overrides={"device": "cpu"})
BEARER = {"Authorization": f"Bearer {TOKEN}"}
FORM = {"model": (None, "whisper-1")}
URL = "/v1/audio/transcriptions"
GIVE_UP_SEC, PATIENCE_SEC = 30.0, 120.0  # of scripted answers, of programs


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine("tiny.en", CONFIG)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    """A server of real weights, in a thread of its own."""
    addresses: list[str] = []
    is_up, loop = threading.Event(), asyncio.new_event_loop()
    stopped = asyncio.Event()
    model = ServedModel(engine, CONFIG, VoiceActivityDetector(CONFIG.vad))

    async def serve() -> None:
        server = CaptionServer(
            {"stock": model, "tuned": model}, token=TOKEN, limits=ServerLimits(max_file_bytes=1 << 22)
        )
        async with server.listen(port=0) as url:
            addresses.append(url.replace("ws", "http", 1))
            is_up.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert is_up.wait(GIVE_UP_SEC)
    yield addresses[0]
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)


@pytest.fixture(scope="module")
def talk(jfk: Waveform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of two segments, whose texts differ: one that repeats itself would be taken for a loop."""
    clips = [load_audio(u.audio) for u in load_utterances(CONFIG.data) if u.meta["split"] == "test"][:6]
    pause = np.zeros(SAMPLE_RATE, dtype=np.float32)
    path = tmp_path_factory.mktemp("talk") / "talk.flac"
    sf.write(path, np.concatenate([part for clip in (jfk, *clips) for part in (clip, pause)]), SAMPLE_RATE)
    return path


def expected(engine: Engine, source: Any) -> Transcription:
    """Return what the project's file transcription makes of a file."""
    config = CONFIG.model_copy(update={"inference": CONFIG.inference.model_copy(update={"batch_size": 1})})
    return BatchInference(config=config, engine=engine).transcribe_batch([source], word_timestamps=True)[0]


def test_openais_client_gets_the_text_of_file_transcription_in_every_format(client: OpenAI, engine: Engine) -> None:
    def ask(**options: Any) -> Any:
        return client.audio.transcriptions.create(file=SAMPLE_CLIP, model="whisper-1", **options)

    own, text = expected(engine, SAMPLE_CLIP), ask()
    assert (text.text, text.usage.type, text.usage.seconds) == (own.text, "duration", 11)
    assert ask(response_format="text") == f"{own.text}\n"
    assert ask(response_format="srt") == to_srt(own.cues())
    assert ask(response_format="vtt") == to_vtt(own.cues())
    words = ask(response_format="verbose_json", timestamp_granularities=["word"])
    assert (words.segments, words.text) == (None, own.text)
    assert [(w.word, w.start, w.end) for w in words.words] == [
        (w.text, round(w.start_sec, 3), round(w.end_sec, 3)) for w in own.words or ()
    ]


def test_a_text_streams_segment_by_segment_and_has_their_times(client: OpenAI, engine: Engine, talk: Path) -> None:
    own = expected(engine, talk)
    assert len(own.segments) > 1
    *deltas, done = client.audio.transcriptions.create(file=talk, model="tuned", stream=True)
    assert len(deltas) == len(own.segments)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert (done.type, done.text) == ("transcript.text.done", own.text)
    assert "".join(event.delta for event in deltas) == own.text
    verbose = client.audio.transcriptions.create(
        file=talk, model="tuned", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert (verbose.task, verbose.language, verbose.text) == ("transcribe", "english", own.text)
    assert verbose.duration == pytest.approx(own.duration_sec, abs=1e-3)
    assert verbose.segments is not None
    assert verbose.words is not None
    assert "".join(segment.text for segment in verbose.segments) == own.text
    assert [s.start for s in verbose.segments] == [round(s.start_sec, 3) for s in own.segments]
    assert all(segment.tokens and segment.avg_logprob < 0 for segment in verbose.segments)
    assert len(verbose.words) == len(own.words or ())


def test_models_are_listed_and_found_by_their_names(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stock", "tuned", "whisper-1"]
    assert client.models.retrieve("tuned").object == "model"
    assert client.models.retrieve("whisper-1").id == "whisper-1"
    for name in ("other", "../stock", "stock/x"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(("options", "kind", "param"), [
    ({"model": "other"}, openai.NotFoundError, "model"),
    ({"model": ""}, openai.BadRequestError, "model"),
    ({"language": "klingon"}, openai.BadRequestError, "language"),
    ({"language": "de"}, openai.BadRequestError, "language"),
    ({"response_format": "yaml"}, openai.BadRequestError, "response_format"),
    ({"response_format": "srt", "stream": True}, openai.BadRequestError, "stream"),
    ({"temperature": 1.5}, openai.BadRequestError, "temperature"),
    ({"temperature": float("nan")}, openai.BadRequestError, "temperature"),
    ({"timestamp_granularities": ["word"]}, openai.BadRequestError, "timestamp_granularities"),
    ({"timestamp_granularities": ["phone"], "response_format": "verbose_json"}, openai.BadRequestError,
     "timestamp_granularities"),
    ({"prompt": "x" * 20_000}, openai.BadRequestError, "prompt"),
    ({"include": ["logprobs"]}, openai.BadRequestError, "include"),
    ({"file": b""}, openai.BadRequestError, "file"),
    ({"file": b"no recording at all" * 100}, openai.BadRequestError, "file"),
    ({"file": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"}, openai.BadRequestError, "file"),
    ({"file": bytes((1 << 22) + 1)}, openai.APIStatusError, "file"),
])  # fmt: skip
def test_a_mistake_is_named_with_its_field(
    client: OpenAI, options: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        client.audio.transcriptions.create(**{"file": SAMPLE_CLIP, "model": "whisper-1", **options})
    assert caught.value.param == param
    assert len(str(caught.value)) < 1_000
    assert "upload" not in str(caught.value)  # no path of ours


def test_settings_of_a_request_reach_the_decoder_and_english_is_not_translated(client: OpenAI) -> None:
    text = client.audio.transcriptions.create(
        file=SAMPLE_CLIP, model="stock", language="English", prompt="JFK", temperature=0.4,
        response_format="verbose_json", extra_body={"keywords": ["Americans"]},
    )  # fmt: skip
    assert {segment.temperature for segment in text.segments or ()} == {0.4}
    with pytest.raises(openai.BadRequestError, match="translates nothing"):
        client.audio.translations.create(file=SAMPLE_CLIP, model="stock")


def curl(*arguments: str) -> tuple[str, str]:
    """Return the head and the body of the last answer."""
    done = subprocess.run(["curl", "-sS", "-i", *arguments], capture_output=True, text=True, timeout=PATIENCE_SEC)
    assert done.returncode == 0, done.stderr
    *_, head, body = done.stdout.split("\n\n", done.stdout.count("HTTP/1.1"))
    return head, body


def test_curl_sends_a_form_and_only_health_needs_no_token(address: str, tmp_path: Path) -> None:
    form = ["-F", f"file=@{SAMPLE_CLIP};filename=../../../etc/passwd", "-F", "model=stock"]
    token = ["-H", f"Authorization: Bearer {TOKEN}"]
    head, body = curl(*token, *form, "-F", "response_format=text", address + URL)
    assert head.startswith("HTTP/1.1 200")
    assert "ask what you can do for your country" in body.lower()
    head, body = curl(*token, *form, "-F", "stream=true", "-N", address + URL)
    assert "text/event-stream" in head
    assert json.loads(body.split("data: ")[-1])["type"] == "transcript.text.done"
    head, body = curl(f"{address}/health")
    assert (head.split()[1], json.loads(body)) == ("200", {"status": "ok"})
    for path in ("/v1/models", "/v1/models/stock", URL, "/", "/docs", "/v1/../etc/passwd"):
        head, body = curl("--path-as-is", address + path)
        assert head.split()[1] == "401"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    for path, status in (("/nothing", "404"), (URL, "405"), ("/v1/models/%2e%2e%2fstock", "404")):
        assert curl(*token, address + path)[0].split()[1] == status
    head, body = curl(*token, "-H", "Content-Type: application/json", "-d", "{}", address + URL)
    assert head.split()[1] == "415"


def test_the_examples_of_the_documentation_work(address: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8765", address)
    sf.write(tmp_path / "talk.wav", load_audio(SAMPLE_CLIP), SAMPLE_RATE)
    environment = {**os.environ, "CAPTION_TOKEN": TOKEN}
    python, lines = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S), re.findall(r"^curl .*$", text, re.M)
    commands = [[sys.executable, "-c", code] for code in python] + [["bash", "-c", line] for line in lines]
    answers = [
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_SEC)
        for command in commands
    ]
    assert [answer.returncode for answer in answers] == [0] * 4, answers
    assert [answer.stdout.count("what you can do") for answer in answers] == [2, 1, 0, 2]
    assert "-->" in (tmp_path / "talk.srt").read_text()


def test_the_image_of_the_documentation_has_what_the_server_reads_and_asks_for_its_health(
    address: str, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```dockerfile\n(.*?)^```$", text, re.M | re.S)
    for copied in re.findall(r"^COPY (.+) \S+$", lines, re.M):
        for name in copied.split():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, tmp_path / name)
    entry, default, health = (
        json.loads(re.search(rf"^{name} (?:CMD )?(\[.*\])$", lines, re.M)[1])  # type: ignore[index]
        for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK")
    )
    served = [sys.executable, *entry[1:], *default, "--port", "0"]
    environment = {**os.environ, "CAPTION_TOKEN": TOKEN}
    done = subprocess.run(served, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_SEC)
    assert (done.returncode, "ModelError: " in done.stderr, "/model" in done.stderr) == (1, True, True), done.stderr
    health = [sys.executable, *health[1:-1], health[-1].replace("http://127.0.0.1:8765", address)]
    assert subprocess.run(health, timeout=PATIENCE_SEC).returncode == 0
    (install,) = re.findall(r"^RUN (if .*?[^\\])$", lines, re.M | re.S)
    torch = {"cpu": "--extra-index-url https://download.pytorch.org/whl/cpu", "cuda": "nvidia-cublas-cu12"}
    for device, arguments in torch.items():
        script = f'pip() {{ echo "$@"; }}\n{install}'
        shell = subprocess.run(["sh", "-ec", script], env={"DEVICE": device}, capture_output=True, text=True)
        assert shell.stdout == f"install --no-cache-dir -r requirements.txt -c constraints.txt {arguments}\n"


# hostile clients


def hear(audio: Waveform, options: Any) -> list[Word]:
    return [Word("heard", 0.0, 0.5, 0.9)]


@contextlib.asynccontextmanager
async def serving(
    decode: Hear = hear, *, token: str | None = TOKEN, origins: tuple[str, ...] = (), **limits: Any
) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    engine: Any = ScriptedEngine(decode, languages=("en", "de"))
    engine.vocabulary.multilingual, engine.cap_rates = False, {}
    server = CaptionServer(
        {"m": ServedModel(engine, CONFIG)}, token=token, origins=origins, limits=ServerLimits(**limits)
    )
    async with server.listen(port=0) as url:
        url = url.replace("ws", "http", 1)
        async with httpx.AsyncClient(base_url=url, headers=BEARER if token else {}, timeout=GIVE_UP_SEC) as client:
            yield url, client


def recording(duration_sec: float = 2.0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, round(duration_sec * SAMPLE_RATE))
    sf.write(file, noise, SAMPLE_RATE, format="WAV")
    return file.getvalue()


async def post(client: httpx.AsyncClient, url: str = URL, **fields: str) -> httpx.Response:
    return await client.post(url, files={"file": recording(), **FORM, **{k: (None, v) for k, v in fields.items()}})


async def assert_serves(client: httpx.AsyncClient) -> None:
    response = await post(client)
    assert (response.status_code, response.json()["text"]) == (200, "heard"), response.text


def hear_when_free() -> tuple[Hear, list[int], threading.Event]:
    """Return what hears once it is free; its calls; and what frees it."""
    calls: list[int] = []
    free = threading.Event()

    def busy(audio: Waveform, options: Any) -> list[Word]:
        calls.append(len(audio))
        assert free.wait(GIVE_UP_SEC)
        return hear(audio, options)

    return busy, calls, free


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def test_beyond_the_limit_of_files_a_client_is_told_when_to_come_again() -> None:
    busy, calls, free = hear_when_free()
    async with serving(busy, max_files=2) as (_, client):
        first = [asyncio.create_task(post(client)) for _ in range(2)]
        await until(lambda: calls)
        while (refused := await post(client)).status_code == 200:
            raise AssertionError("a third file was taken")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        free.set()
        assert [response.status_code for response in await asyncio.gather(*first)] == [200, 200]
        await assert_serves(client)


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_client_that_leaves_frees_the_engine_and_its_place(stream: str) -> None:
    busy, calls, free = hear_when_free()
    async with serving(busy, max_files=1) as (_, client):
        leaving = asyncio.create_task(post(client, stream=stream))
        await until(lambda: calls)
        leaving.cancel()
        await asyncio.wait([leaving])
        while (response := await client.post(URL, files=FORM)).status_code == 429:
            await asyncio.sleep(0.01)
        assert response.status_code == 400  # the place was free although the call goes on
        free.set()
        await assert_serves(client)
    assert len(calls) == 2


async def test_a_live_session_goes_first_and_a_recording_does_not_keep_files_out() -> None:
    host, heard = LiveHost(), list[str]()

    class Session:
        sharers = 1

        def feed(self, samples: Waveform, rate: int) -> list[Any]:
            heard.append("live")
            return []

    live = await host.open(Session, SAMPLE_RATE)  # type: ignore[arg-type]
    await live.put(np.zeros(round(TURN_SEC * SAMPLE_RATE), dtype=np.float32))
    host._hearing = True  # somebody's turn goes on
    file = asyncio.create_task(host.between_turns(lambda: heard.append("file")))
    turn = asyncio.create_task(live.next_events())
    await asyncio.sleep(0)
    host._hearing = False
    host.next_turn()
    await asyncio.gather(file, turn)
    assert heard == ["live", "file"]
    await live.put(np.zeros(SAMPLE_RATE, dtype=np.float32))
    live.due = asyncio.get_running_loop().time() + 3.0  # it is ahead of its pace
    file = asyncio.create_task(host.between_turns(lambda: heard.append("file")))
    turn = asyncio.create_task(live.next_events())
    await asyncio.gather(file, turn)
    assert heard[2:] == ["file", "live"]
    waiting = asyncio.create_task(host.between_turns(lambda: heard.append("never")))
    host._hearing = True
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    host._hearing = False
    await host.between_turns(lambda: None)
    assert "never" not in heard


async def test_a_failing_model_is_an_error_of_the_server_and_the_next_request_is_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("CRITICAL", "src.inference.server")
    fails = [True]

    def failing(audio: Waveform, options: Any) -> list[Word]:
        if fails.pop() if fails else False:
            raise RuntimeError("secret of the machine")
        return hear(audio, options)

    async with serving(failing) as (_, client):
        response = await post(client)
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in response.text
        await assert_serves(client)


async def test_a_stopped_server_sends_files_away() -> None:
    busy, calls, free = hear_when_free()
    async with httpx.AsyncClient(headers=BEARER, timeout=GIVE_UP_SEC) as client:
        async with serving(busy) as (url, _):
            reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n"
            writer.write(head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n")
            await writer.drain()
            waiting = asyncio.create_task(post(client, url + URL))
            await until(lambda: calls)
            free.set()
            writer.write(bytes(99))
        assert (await waiting).status_code in (200, 503)
    assert b"503 Service Unavailable" in await reader.read()
    writer.close()


def part(name: str, content: bytes, headers: str = "") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n{headers}\r\n'
    return head.encode() + content + b"\r\n"


async def send_form(client: httpx.AsyncClient, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    headers = {"Content-Type": "multipart/form-data; boundary=x", **headers}
    return await client.post(URL, content=body, headers=headers)


async def test_hostile_forms_are_refused_and_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = part("model", b"m"), part("file", recording())
    nested = part("a", b"--y\r\n\r\n--y--", "Content-Type: multipart/mixed; boundary=y\r\n")

    monkeypatch.setattr(speech_api, "BODY_SEC", 0.3)
    async with serving(max_file_bytes=100_000) as (url, client):
        for body, status in (
            (model + file + b"--x--", 200),
            (b"a preamble\r\n" + model + file + b"--x--\r\nan epilogue", 200),
            (b"", 400), (b"--x--", 400), (b"no form", 400), (model + b"--x--", 400), (file + b"--x--", 400),
            (model + file, 400), (model + file[:-100], 400), (model + file + file + b"--x--", 400),
            (model + model + file + b"--x--", 400), (part("", b"m") + b"--x--", 400), (nested + b"--x--", 400),
            (part("a", b"") * 40 + b"--x--", 400), (part("a" * 5_000, b"") + file + b"--x--", 400),
            (part("prompt", bytes(20_000)) + b"--x--", 400), (part("prompt", b"\xff") + model + file + b"--x--", 400),
            (part("model", b"m", "X: y\r\n" * 500) + file + b"--x--", 400),
            (part("model", b"m", f"X: {'y' * 20_000}\r\n") + file + b"--x--", 400),
            (part("file", bytes(100_001)) + b"--x--", 413), (part("file", bytes(2_000_000)), 413),
        ):  # fmt: skip
            response = await send_form(client, body)
            assert response.status_code == status, (body[:100], response.text)
            assert len(response.text) < 1_000
        for begin, piece, status in (
            (b"", b"a preamble\r\n", 408), (b"", part("a", b""), 400), (part("file", b"")[:-2], bytes(9999), 413),
        ):  # fmt: skip
            answer = await send_endless(url, begin, piece, token=TOKEN)
            assert answer.startswith(f"HTTP/1.1 {status}".encode()), (piece[:20], answer)
        assert (await send_form(client, model + file, **{"Content-Encoding": "gzip"})).status_code == 415
        assert (await send_form(client, model, **{"Content-Type": "multipart/form-data"})).status_code == 400
        assert (await send_form(client, model, **{"Content-Type": "text/plain"})).status_code == 415
        await assert_serves(client)


async def test_a_slow_form_is_cut_off_and_one_that_is_refused_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_api, "BODY_SEC", 0.2)

    async def slow() -> AsyncIterator[bytes]:
        for byte in part("model", b"m"):
            yield bytes([byte])
            await asyncio.sleep(0.01)

    async with serving() as (url, client):
        response = await send_form(client, slow())
        assert (response.status_code, response.json()["error"]["param"]) == (408, None)
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Origin": "null", **BEARER}, 403),
        ):
            async with httpx.AsyncClient(base_url=url, headers=headers) as stranger:
                response = await send_form(stranger, part("file", bytes(5 << 20)))
            assert (response.status_code, response.json()["error"]["code"] is not None) == (status, True)
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        for head, status in (
            (f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n", b"200"),
            ("GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b"401"),  # the token is shown with each request
        ):
            writer.write(head.encode())
            assert (await reader.read(1000)).split()[1] == status
        assert await reader.read() == b""  # strangers are not kept
        writer.close()
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"NO HTTP\r\n\r\n")
        assert (await reader.read()).split()[1] == b"400"
        writer.close()
        await assert_serves(client)


async def test_pages_of_named_origins_may_ask_and_others_may_not() -> None:
    origin = {"Origin": "https://captions.example"}
    async with serving(token=None, origins=("https://captions.example",)) as (_, client):
        asked = await client.options(URL, headers={**origin, "Access-Control-Request-Method": "POST"})
        assert asked.status_code == 204
        assert "Authorization" in asked.headers["Access-Control-Allow-Headers"]
        for response in (asked, await client.get("/v1/models", headers=origin), await client.get("/x", headers=origin)):
            assert response.headers["Access-Control-Allow-Origin"] == origin["Origin"]
        for other in ("https://evil.example", "null"):
            for method in ("GET", "OPTIONS", "POST"):
                response = await client.request(method, URL, headers={"Origin": other})
                assert response.status_code == 403
                assert "Access-Control-Allow-Origin" not in response.headers
        assert "Access-Control-Allow-Origin" not in (await client.get("/v1/models")).headers


async def test_translations_are_english_and_languages_reach_the_model() -> None:
    asked: list[Any] = []

    def note(audio: Waveform, options: Any) -> list[Word]:
        asked.append((options.task, options.language, options.prompt, options.hotwords, options.temperature))
        return hear(audio, options)

    async with serving(note) as (_, client):
        await post(client, language="German", prompt="p", **{"keywords[]": "/srv/k.txt"})
        response = await post(
            client, "/v1/audio/translations", language="de", response_format="verbose_json", temperature="0.6"
        )
    assert asked == [("transcribe", "de", "p", ("/srv/k.txt",), 0.0), ("translate", "de", "", (), 0.6)]
    assert response.json()["task"] == "translate"
