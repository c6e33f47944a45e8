"""Fill the disk at many bytes of every write: an error of this library, and what was there stays whole.

    python benchmarks/full_disk.py [--steps 12]

Every writer first writes an older version, then a newer one while a few bytes are free: on a small tmpfs where this
process may mount one, else with a limit on the size of files. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.faults import files_up_to, make_stock_model, make_trainer

DISK_MB = 64
PAGE_BYTES = 4096
Writer = Callable[[Path, int], object]  # folder, version


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="sizes of free space per writer; default: %(default)s")
    arguments = parser.parse_args()
    logging.getLogger("src").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as name:
        broken = fill_disks(Path(name), arguments.steps)
    print(json.dumps({"broken": broken}))
    return 1 if broken else 0


def fill_disks(folder: Path, steps: int) -> list[str]:
    """Try all writers; return what broke, with the writer and the free bytes."""
    make_stock_model(folder / "stock")
    with small_disk(folder / "disk") as disk:
        return [problem for name, write in make_writers(folder).items() for problem in fill(disk, name, write, steps)]


def fill(disk: Path, name: str, write: Writer, steps: int) -> list[str]:
    """Let one writer replace its older version on a disk with more and more space; return what broke."""
    from src.utils.errors import WhisperASRError

    place, failed, problems = disk / name, 0, []
    place.mkdir()
    write(place, 1)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    for step in range(steps):
        free = int(size * 1.5 * step / steps) // PAGE_BYTES * PAGE_BYTES if step > 1 else step * PAGE_BYTES
        before = snapshot(place)
        error: Exception | None = None
        with free_bytes(disk, free):
            try:
                write(place, 2 + step)
            except Exception as err:  # noqa: BLE001  every kind is looked at
                error = err
        failed += error is not None
        if error is not None and not isinstance(error, WhisperASRError):
            problems.append(f"{name}, {free} bytes free: {type(error).__name__}: {error}"[:300])
        after = snapshot(place)
        if halves := [path for path in after if ".partial" in path]:
            problems.append(f"{name}, {free} bytes free: left {halves[:3]}")
        for path, content in before.items() if error is not None else ():
            new = after.get(path, b"")
            if not new.startswith(content) and not _is_whole(path, new):  # rows are appended
                problems.append(f"{name}, {free} bytes free: changed {path}")
    write(place, 99)  # there is space again
    shutil.rmtree(place)  # for the next writer
    print(f"{name}: {size} bytes, {failed} of {steps} failed, {len(problems)} problems", flush=True)
    return problems


def _is_whole(path: str, content: bytes) -> bool:
    """Whether one of several files that are replaced one by one is a newer one in full."""
    if path.endswith(".json"):
        return bool(json.loads(content or b"null"))
    ends = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>\n", ".yaml": b"\n"}
    return content.endswith(ends.get(Path(path).suffix, b"\0"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of all files; of large ones a hash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            large = len(content) > 1 << 20
            found[str(path.relative_to(folder))] = hashlib.sha256(content).digest() if large else content
    return found


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Yield a folder on a small tmpfs, or an ordinary one where none can be mounted."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(place)]
    is_mounted = os.name == "posix" and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def free_bytes(disk: Path, free: int) -> Iterator[None]:
    """Leave this many bytes on a small disk for a block; elsewhere, let no file grow beyond them."""
    if disk.is_mount():
        filler, state = disk / ".filler", os.statvfs(disk)
        room = state.f_bavail * state.f_frsize - free
        with filler.open("wb") as file:
            if room > 0:
                os.posix_fallocate(file.fileno(), 0, room)
        try:
            yield
        finally:
            filler.unlink()
        return
    with files_up_to(free):
        yield


def make_writers(folder: Path) -> dict[str, Writer]:
    """Return everything of the library that writes, but for what only moves bytes of a server."""
    import torch
    from matplotlib.figure import Figure
    from transformers import WhisperProcessor

    from src.data.audio import AudioCache
    from src.data.sources.catalog import SAMPLE_CLIP
    from src.evaluation import ModelEvaluator, write_html_report, write_model_card
    from src.inference.captions import LiveCaptionWriter, make_cues, write_captions
    from src.inference.files import jobs
    from src.inference.files.transcribe import Transcription
    from src.inference.words import Word
    from src.models.dynamic_context import DynamicWhisper
    from src.models.export import ctranslate2, huggingface
    from src.models.weights import convert_once
    from src.training import checkpoint
    from src.training.checkpoint import CheckpointStore, TrainingState
    from src.utils import ExperimentLogger, ModelRegistry
    from src.utils.figures import save_figure
    from src.utils.mirror import copy_verified
    from src.utils.versioning import DataVersionManager

    stock = folder / "stock"
    trainer = make_trainer(stock, folder / "trained", save_minutes=None)
    trainer.train(1)
    run = trainer.experiment.dir
    evaluator = ModelEvaluator(trainer.model, trainer.processor, trainer.config)
    result = evaluator.evaluate_dataset(trainer._val_loader, name="tuned")
    result.save(trainer.experiment)
    model, processor = DynamicWhisper.from_pretrained(stock), WhisperProcessor.from_pretrained(stock)
    checkpoint._SPARE_BYTES = 0
    huggingface._verify_huggingface = lambda *given: None  # reads only
    ctranslate2.verify_transcripts = lambda *given, **options: 0.0
    words = [Word(f"word{at}", 0.3 * at, 0.3 * at + 0.2, 1.0, tokens=1) for at in range(2000)]

    def write_run(place: Path, version: int) -> None:
        paths = trainer.config.paths.model_copy(update={"runs_dir": place})
        config = trainer.config.model_copy(update={"paths": paths})
        with ExperimentLogger(config, run_id="run") as experiment:
            for step in range(200):
                experiment.log("train_step", step=200 * version + step, loss=1.0)

    def write_predictions(place: Path, version: int) -> None:
        result.write_predictions(place / "predictions.jsonl")

    def write_card(place: Path, version: int) -> None:
        if not (place / "config.json").exists():
            huggingface.export_huggingface(model, processor, place, provenance={"version": version})
        write_model_card(place, run)

    def write_live(place: Path, version: int) -> None:
        from src.inference.streaming.commit import Event

        with LiveCaptionWriter(place / "live.srt") as writer:
            for at in range(0, len(words), 50):
                writer.write(Event("commit", tuple(words[at : at + 50]), "", words[at].end_sec, 0.0, at))

    def draw(place: Path, version: int) -> None:
        figure = Figure()
        figure.subplots().plot(range(version + 100))
        save_figure(figure, place, "figure")

    def save_checkpoint(place: Path, version: int) -> None:
        tensors = {"model": {"a": torch.full((500_000,), float(version))}, "optimizer": {}, "rng": {}}
        store = CheckpointStore(place / "run", save_total_limit=2)
        try:
            store.save(TrainingState(tensors, {"saved_at": 0.0}, "x" * 10_000), version)
        finally:
            store.unlock()

    def log_data(place: Path, version: int) -> None:
        manager = DataVersionManager(place)
        manager.log_dataset_version(dataset_name="d", version="1", metadata={"of": str(version) * 9000})

    def convert(place: Path, version: int) -> None:
        def write(target: Path) -> None:
            huggingface._save(model, processor, target)

        convert_once("small", f"{version:064d}", "test", cache_dir=place, convert=write)

    def transcribe(place: Path, version: int) -> None:
        found = [Transcription(str(at), "word " * 50, 1.0) for at in range(100 * version)]
        sources = [each.source for each in found]
        jobs.run_job(place / "rows.jsonl", sources, lambda mine: found[-len(mine) :], settings={"model": "scripted"})

    return {
        "export": lambda place, version: huggingface.export_huggingface(
            model, processor, place / "hf", provenance={"version": version}
        ),
        "ctranslate2": lambda place, version: ctranslate2.export_ctranslate2(trainer.best_model_dir, place / "ct2"),
        "conversion": convert,
        "checkpoint": save_checkpoint,
        "run": write_run,
        "predictions": write_predictions,
        "report": lambda place, version: write_html_report(run, place / "report.html"),
        "card": write_card,
        "registry": lambda place, version: ModelRegistry(place).register_model(
            model_id=f"m{version}", metrics={"wer": 0.5}, git_revision=None, notes="n" * 9000
        ),
        "data version": log_data,
        "captions": lambda place, version: write_captions(place / "captions.srt", make_cues(words)),
        "live captions": write_live,
        "figure": draw,
        "copy": lambda place, version: copy_verified(stock, place / f"copy{version}"),
        "rows": transcribe,
        "decoded audio": lambda place, version: AudioCache(place / str(version)).load_audio(SAMPLE_CLIP),
    }


if __name__ == "__main__":
    sys.exit(main())
