"""Load the server: live streams in real time, and files over OpenAI's API, against faster-whisper on the same route.

    python benchmarks/serving.py [--model FOLDER] [--streams 1,2,4,8,16] [--quick]

Both servers are processes of their own with the same weights in int8, greedy. More and more clients speak in real time
until the p95 of the lag that they add is 1 s; the lag is from when a client has sent the audio of an event to when it
gets the event, and what one client alone has is subtracted. Then files are sent, some at once, to one server and to the
other in turn, and to ours while half of the possible clients speak. The last line printed is one JSON object; the table
is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import numpy as np
import soundfile

from scripts.benchmarking import add_data, load_clips, number, require_peer, show
from scripts.command_line import model_argument
from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.evaluation.metrics import WHISPER_ENGLISH, error_rate, word_counts
from src.inference.ct2_engine import ct2_folder
from src.inference.server.client import stream_to_server
from src.inference.server.protocol import LiveEvent
from src.inference.streaming.microphone import in_real_time
from src.utils.config import load_config
from src.utils.runtime import usable_cores

MAX_LAG_SEC = 1.0
ROUTE = "/v1/audio/transcriptions"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=model_argument, default="tiny.en", help="default: %(default)s")
    add_data(parser)
    parser.add_argument("--streams", type=numbers, default=[1, 2, 4, 8, 16], help="clients that speak, by comma")
    parser.add_argument("--stream-sec", type=float, default=30.0, help="of each client; default: %(default)s")
    parser.add_argument("--files", type=int, default=60, help="of a round; default: %(default)s")
    parser.add_argument("--at-once", type=int, default=4, help="files; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of files; medians are reported")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clients, nothing recorded")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # be the peer's server
    arguments = parser.parse_args()
    if arguments.peer:
        serve_peer(arguments.peer)
        return 0
    require_peer()
    if arguments.quick:
        arguments.streams, arguments.stream_sec, arguments.files, arguments.rounds = [1, 2], 6.0, 4, 1
    config = load_config(None, overrides={"device": "cpu"})
    folder = str(ct2_folder(arguments.model, quantization="int8", cache_dir=config.paths.cache_dir))
    clips = load_clips(arguments.data, arguments.files)
    audios, texts = [decode_audio(clip) for clip in clips], [clip.text for clip in clips]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = [place / f"{i}.wav" for i in range(len(clips))]
        for file, audio in zip(files, audios, strict=True):
            soundfile.write(file, audio, SAMPLE_RATE)
        options = ["--max-sessions", "1000", "--max-files", "1000", "--set", "device=cpu", "--set", "model.language=en"]
        ours = stack.enter_context(served("scripts/serve.py", "--model", f"m={folder}", "--port", "0", *options))
        peer = stack.enter_context(served("benchmarks/serving.py", "--peer", folder))
        live = measure_live(ours, audios, arguments.streams, arguments.stream_sec)
        most = max((count for count, lags in live.items() if lags["p95"] < MAX_LAG_SEC), default=0)
        rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "faster-whisper": []}
        for _ in range(arguments.rounds):
            for name, url in (("ours", ours), ("faster-whisper", peer)):
                rounds[name].append(asyncio.run(send_files(url, files, texts, arguments.at_once)))
        mixed = measure_mixed(ours, audios, files, texts, max(1, most // 2), arguments.stream_sec, arguments.at_once)
    figures = {
        name: {key: statistics.median(each[key] for each in some) for key in some[0]} for name, some in rounds.items()
    }
    found = {
        "live": live,
        "streams_under_1_sec": most,
        "files": figures,
        "ratio": statistics.median(
            a["per_minute"] / b["per_minute"] for a, b in zip(rounds["ours"], rounds["faster-whisper"], strict=True)
        ),
        "mixed": mixed,
    }
    rows = [row(f"{count} stream(s)", lag=lags) for count, lags in live.items()]
    rows += [row(f"files, {arguments.at_once} at once: {name}", files=each) for name, each in figures.items()]
    rows += [row(f"files with {mixed['streams']} stream(s)", lag=mixed["lag"], files=mixed["files"])]
    mean_sec = sum(map(len, audios)) / SAMPLE_RATE / len(audios)
    note = (
        f"{arguments.model}, int8, {usable_cores()} cores; clients of {arguments.stream_sec:g} s, {len(files)} files "
    )
    note += f"of {mean_sec:.1f} s on average."
    show("Serving", rows, note, record=not (arguments.quick or arguments.no_record))
    print(json.dumps(found))
    return 0


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def row(load: str, *, lag: dict[str, float] | None = None, files: dict[str, float] | None = None) -> dict[str, str]:
    lag, files = lag or {}, files or {}
    return {
        "load": load,
        "added lag, p50": number(lag.get("p50"), " s"),
        "p95": number(lag.get("p95"), " s"),
        "files per minute": number(files.get("per_minute")),
        "a file, p50": number(files.get("p50"), " s"),
        "WER": number(100 * files["wer"], " %") if files else "-",
    }


@contextmanager
def served(*command: str) -> Iterator[str]:
    """Run a server, and give its address."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        raise RuntimeError(f"{' '.join(command)} does not serve: {line!r}; run it by itself to see why")
    try:
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def measure_live(url: str, audios: Sequence[Waveform], counts: Sequence[int], duration_sec: float) -> dict[int, Any]:
    """Return the added lag of clients that speak at once, by their number, until it is too long."""
    usual = statistics.median(asyncio.run(speak(url, audios, 1, duration_sec)))
    found: dict[int, Any] = {}
    for count in counts:
        found[count] = summary(asyncio.run(speak(url, audios, count, duration_sec)), usual)
        if found[count]["p95"] >= MAX_LAG_SEC:
            break
    return found


def summary(lags: Sequence[float], usual: float) -> dict[str, float]:
    added = [lag - usual for lag in lags]
    return {"alone_sec": usual, "p50": float(np.quantile(added, 0.5)), "p95": float(np.quantile(added, 0.95))}


async def speak(url: str, audios: Sequence[Waveform], count: int, duration_sec: float) -> list[float]:
    """Speak in real time, each client something else; return the lags of all events."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2 * count + 8))  # each waits for its next block
    lags = await asyncio.gather(*(listen(url, talk(audios, 7 * i, duration_sec)) for i in range(count)))
    return [lag for each in lags for lag in each]


def talk(audios: Sequence[Waveform], first: int, duration_sec: float) -> Waveform:
    """Return clips from one on, with pauses between them."""
    pieces: list[Waveform] = []
    while sum(map(len, pieces)) < duration_sec * SAMPLE_RATE:
        pieces += [audios[(first + len(pieces)) % len(audios)], np.zeros(SAMPLE_RATE // 2, dtype=np.float32)]
    return np.concatenate(pieces)[: round(duration_sec * SAMPLE_RATE)]


async def listen(url: str, audio: Waveform) -> list[float]:
    began, lags = time.monotonic(), list[float]()
    async for message in stream_to_server(url, in_real_time(audio)):
        if isinstance(message, LiveEvent):
            lags.append(time.monotonic() - began - message.audio_sec)
    return lags


async def send_files(url: str, files: Sequence[Path], texts: Sequence[str], at_once: int) -> dict[str, float]:
    """Send files, some at once; return how many per minute, how long one takes, and their error rate."""
    limit, heard, seconds = asyncio.Semaphore(at_once), [""] * len(files), [0.0] * len(files)

    async def send(client: httpx.AsyncClient, i: int) -> None:
        async with limit:
            began = time.perf_counter()
            form = {"file": (files[i].name, files[i].read_bytes()), "model": (None, "whisper-1")}
            answer = await client.post(url.replace("ws:", "http:") + ROUTE, files=form)
            heard[i], seconds[i] = answer.raise_for_status().json()["text"], time.perf_counter() - began

    async with httpx.AsyncClient(timeout=600.0) as client:
        await send(client, 0)  # warms up
        began = time.perf_counter()
        await asyncio.gather(*(send(client, i) for i in range(len(files))))
        per_minute = 60 * len(files) / (time.perf_counter() - began)
    wer = error_rate(word_counts(texts, heard, WHISPER_ENGLISH))
    return {"per_minute": per_minute, "p50": statistics.median(seconds), "wer": wer}


def measure_mixed(
    url: str,
    audios: Sequence[Waveform],
    files: Sequence[Path],
    texts: Sequence[str],
    streams: int,
    duration_sec: float,
    at_once: int,
) -> dict[str, Any]:
    """Send files while clients speak."""

    async def both() -> tuple[list[float], dict[str, float]]:
        speaking = asyncio.create_task(speak(url, audios, streams, duration_sec))
        figures: list[dict[str, float]] = []
        while not speaking.done():
            figures.append(await send_files(url, files, texts, at_once))
        return await speaking, {key: statistics.median(each[key] for each in figures) for key in figures[0]}

    usual = statistics.median(asyncio.run(speak(url, audios, streams, duration_sec)))
    lags, figures = asyncio.run(both())
    return {"streams": streams, "lag": summary(lags, usual), "files": figures}


def serve_peer(folder: str) -> None:
    """Serve faster-whisper on the same route, as its own users would: each file as it comes, in a thread."""
    from aiohttp import web
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=usable_cores())

    def transcribe(file: Any) -> str:
        segments, _ = model.transcribe(file, language="en", beam_size=1, vad_filter=True)
        return "".join(segment.text for segment in segments).strip()

    async def answer(request: web.Request) -> web.Response:
        form = await request.post()
        return web.json_response({"text": await asyncio.to_thread(transcribe, getattr(form["file"], "file", None))})

    async def run() -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post(ROUTE, answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
