"""Press Ctrl-C at random moments of all work, and show that nothing is left behind and the next run works.

    python benchmarks/interrupts.py [--moments 20] [--only check,train]

Each kind of work is done once, then interrupted (SIGINT) at random moments, each time in the same folder, then done to
its end. After each interrupt there is no half-written file, no lock and no process of it. Processes are forked from one
that has imported everything. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads of its parent

from benchmarks.faults import make_stock_model, make_trainer

END_LIMIT_SEC = 60.0  # for the whole work, and from an interrupt to the end of the process
REMAINS = (".partial", ".replaced", ".removed", ".lock")
Work = Callable[[Path], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="interrupts of each kind of work; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="kinds of work, by comma")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # not TemporaryDirectory: each forked process would remove it at its end
    only = (arguments.only or ",".join(WORKS)).split(",")
    problems = interrupt_all(folder, arguments.moments, random.Random(arguments.seed), only=only)
    if not problems:
        shutil.rmtree(folder)
    print(json.dumps({"moments": arguments.moments, "broken": problems}))
    return 1 if problems else 0


def interrupt_all(folder: Path, moments: int, draw: random.Random, *, only: Sequence[str]) -> list[str]:
    """Interrupt each kind of work at random moments; return what was left or broke."""
    code, _ = run(lambda place: make_stock_model(place / "stock"), folder)  # in a fork: it computes with threads
    if code:
        return ["the stock model cannot be made"]
    import src.inference.files.transcribe
    import src.models.export.ctranslate2
    import src.training  # noqa: F401  all that a fork needs

    problems = []
    for name, (work, again) in WORKS.items():
        if name not in only:
            continue
        place = folder / name
        place.mkdir()
        began = time.monotonic()
        code, left = run(work, place)
        whole_sec, ended = time.monotonic() - began, 0
        if code or left:
            problems.append(f"{name}: without an interrupt: code {code}, left {left}")
        for _ in range(moments):
            again(place)
            moment = draw.uniform(0, whole_sec)
            code, left = run(work, place, interrupt_after_sec=moment)
            ended += code == 0
            if code not in (0, 130) or left:
                problems.append(f"{name}, {moment:.2f} of {whole_sec:.2f} s: code {code}, left {left}")
        code, left = run(work, place)
        if code or left:
            problems.append(f"{name}: at the end: code {code}, left {left}")
        print(f"{name}: {moments} interrupts within {whole_sec:.1f} s, {ended} ended well", flush=True)
    return problems


def run(work: Work, place: Path, *, interrupt_after_sec: float | None = None) -> tuple[int, list[str]]:
    """Work in a forked process, interrupted after a time; return its exit code and what it left."""
    before = {*place.rglob("*")}
    process = os.fork()
    if process == 0:
        _work_and_exit(work, place)
    started = time.monotonic()
    if interrupt_after_sec is not None:
        while (
            time.monotonic() - started < interrupt_after_sec
            and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        os.kill(process, signal.SIGINT)
    end = time.monotonic() + END_LIMIT_SEC
    while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(process, signal.SIGABRT)  # faulthandler says where it stands
            os.waitpid(process, 0)
            return -1, ["a process that did not end"]
        time.sleep(0.005)
    left = [str(path.relative_to(place)) for path in {*place.rglob("*")} - before if _is_remains(path)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
        left.append("a process")
    return os.waitstatus_to_exitcode(found[1]), left


def _is_remains(path: Path) -> bool:
    return path.name.startswith("tmp") or (path.name.startswith(".") and path.name.endswith(REMAINS))


def _work_and_exit(work: Work, place: Path) -> None:
    os.setpgid(0, 0)
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # folders of the parent stay
        each.atexit = False
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with (place.parent / f"{place.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tempfile.tempdir = str(place)  # what it leaves there is seen
        work(place)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is not the work's
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  the boundary of the process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        atexit._run_exitfuncs()  # as at the end of a process
        os._exit(code)


# the works


def check_data(place: Path) -> None:
    """Decode, check and cache the bundled speech, and write its report."""
    from src.data import prepare_datasets
    from src.utils import load_config

    prepare_datasets(load_config(None, overrides={"device": "cpu", **_paths(place), "data.cache_decoded": True}))


def train(place: Path) -> None:
    """Train, with a checkpoint after each update, from wherever the last one was interrupted."""
    trainer = make_trainer(place.parent / "stock", place)
    trainer.resume("auto")
    trainer.train(1)


def save(place: Path) -> None:
    """Replace a checkpoint and an export again and again."""
    import torch
    from transformers import WhisperProcessor

    from src.models.dynamic_context import DynamicWhisper
    from src.models.export import huggingface
    from src.training.checkpoint import CheckpointStore, TrainingState, list_checkpoints, verify_checkpoint

    stock = place.parent / "stock"
    model, processor = DynamicWhisper.from_pretrained(stock), WhisperProcessor.from_pretrained(stock)
    huggingface._verify_huggingface = lambda *given: None
    for path in list_checkpoints(place / "run"):
        verify_checkpoint(path)
    if (place / "hf").exists():
        DynamicWhisper.from_pretrained(place / "hf")
    store = CheckpointStore(place / "run", save_total_limit=2)
    tensors: dict[str, dict[str, Any]] = {"model": {"a": torch.zeros(1_000_000)}, "optimizer": {}, "rng": {}}
    for step in range(10):
        store.save(TrainingState(tensors, {"saved_at": 0.0}), step % 3)
        huggingface.export_huggingface(model, processor, place / "hf")


def transcribe(place: Path) -> None:
    """Transcribe recordings to rows and to captions."""
    from scripts.transcribe import main as transcribe_main
    from src.data.sources.catalog import SAMPLE_CLIP

    recordings = place.parent / "recordings"
    if not recordings.exists():  # a recording that is newer than its row would be read again
        recordings.mkdir()
        for number in range(8):
            shutil.copy(SAMPLE_CLIP, recordings / f"{number}.flac")
    options = ["--model", "tiny.en", "--device", "cpu", "--workers", "2"]
    for more in (["--output", str(place / "rows.jsonl")], ["--output", str(place / "srt"), "--format", "srt,json"]):
        if code := transcribe_main([str(recordings), *options, *more]):
            raise SystemExit(code) if code != 130 else KeyboardInterrupt
    rows = (place / "rows.jsonl").read_text().split("\n")[:-1]
    assert len({json.loads(row)["source"] for row in rows}) == len(rows) == 8


def serve(place: Path) -> None:
    """Serve live captions to a client that writes them."""
    from scripts import serve as server
    from scripts import stream_client
    from src.data.sources.catalog import SAMPLE_CLIP
    from src.data.vad import VoiceActivityDetector
    from src.inference.engines import load_engine
    from src.inference.server.host import ServedModel
    from src.inference.server.server import CaptionServer
    from src.utils import load_config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = load_config(None, overrides={"device": "cpu", "model.variant": "tiny.en"})
    model = ServedModel(load_engine("tiny.en", config), config, VoiceActivityDetector(config.vad))

    def listen() -> None:
        options = ["--file", str(SAMPLE_CLIP), "--fast", "--url", f"ws://127.0.0.1:{port}"]
        arguments = stream_client.parse_arguments([*options, "--captions", str(place / "live.srt")])
        with contextlib.suppress(Exception):  # the server may have gone
            asyncio.run(stream_client.run(arguments, threading.Event()))
        if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # told once already: a second time, it stops at once
            os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.5, listen).start()
    asyncio.run(server.serve(CaptionServer({"tiny.en": model}), "127.0.0.1", port))
    assert (place / "live.srt").read_text().count("\n\n") == (place / "live.srt").read_text().count("-->")


def convert(place: Path) -> None:
    """Convert packaged weights into a cold cache, and export them."""
    from src.models.export import ctranslate2
    from src.models.weights import resolve_weights

    found = resolve_weights("tiny.en", cache_dir=place / "cache")
    ctranslate2.verify_transcripts = lambda *given, **options: 0.0  # reads only
    ctranslate2.export_ctranslate2(found.path, place / "ct2")


def _paths(place: Path) -> dict[str, str]:
    return {f"paths.{name}_dir": str(place / name) for name in ("runs", "checkpoints", "cache")}


def _forget(*names: str) -> Work:
    """Return what removes results before the next run, else it would have nothing to do."""

    def forget(place: Path) -> None:
        for name in names:
            shutil.rmtree(place / name, ignore_errors=True)

    return forget


def _forget_a_training_that_ended(place: Path) -> None:
    last = max(place.glob("checkpoints/drill/checkpoint-*"), default=None)
    if last is not None and json.loads((last / "state.json").read_text())["progress"]["epochs_done"]:
        _forget("checkpoints", "runs")(place)


def _forget_texts(place: Path) -> None:
    if len(list(place.glob("srt/*"))) == 16:
        _forget("srt")(place)
        (place / "rows.jsonl").unlink(missing_ok=True)


WORKS: dict[str, tuple[Work, Work]] = {
    "check": (check_data, _forget("cache")),
    "train": (train, _forget_a_training_that_ended),
    "save": (save, _forget()),
    "transcribe": (transcribe, _forget_texts),
    "serve": (serve, _forget()),
    "convert": (convert, _forget("cache", "ct2")),
}

if __name__ == "__main__":
    sys.exit(main())
