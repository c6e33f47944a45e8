"""Measure how the work before and around training grows with the rows of a data set, without decoding the recordings.

    python benchmarks/scaling.py [--rows 10000 100000 1000000] [--quick]

The bundled clips are listed many times, with a name, a text and measured values of its own for each row, and a speaker
for every 20 rows, in a manifest of one folder. Each size runs in a process of its own, whose memory is read after each
step: listing, preparing (splitting by speaker and checking, without decoding), the loader with its first batch, the
plan of the next epoch, resuming in its middle, and the data report. The last line is one JSON object; the table is
appended to docs/BENCHMARKS.md. `--quick` takes 1,000 and 4,000 rows and records nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil

from scripts.benchmarking import show
from src.data.audio import DecodedAudio, decode
from src.data.loader import create_loader
from src.data.preparation import check_utterance, prepare_datasets
from src.data.preprocessing import ClipStats, measure_clip
from src.data.report.report import build_data_report
from src.data.sources.catalog import load_utterances, read_folder
from src.data.utterance import Utterance
from src.models.loading import load_checkpoint
from src.models.weights import resolve_weights
from src.utils.config import Config, DataConfig, load_config
from src.utils.memory import return_freed_memory

T = TypeVar("T")
CLIPS = 200  # bundled ones that are listed again and again
ROWS_PER_SPEAKER = 20
MAX_KB_PER_ROW, MAX_STEP_SEC = 1.0, 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="1,000 and 4,000 rows, nothing recorded")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    found: dict[str, dict[str, Any]] = {}
    for size in [1_000, 4_000] if arguments.quick else arguments.rows:
        done = subprocess.run([sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, check=True)
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
    steps = list(next(iter(found.values()))["seconds"])
    rows = [
        {"rows": f"{int(size):,}"}
        | {f"{name}, s": f"{each['seconds'][name]:.2f}" for name in steps}
        | {"kB per row": f"{each['kb_per_row']:.2f}"}
        for size, each in found.items()
    ]
    note = "Bundled clips listed again and again; nothing is decoded but the first batch."
    show("Growth with the rows of a data set", rows, note, record=not arguments.quick)
    sizes = sorted(map(int, found))
    growth = {}
    if len(sizes) > 1:  # exponents: 1 is linear
        few, many = (found[str(size)]["seconds"] for size in (sizes[-2], sizes[-1]))
        ratio = math.log(sizes[-1] / sizes[-2])
        growth = {name: round(math.log(max(many[name], 1e-3) / max(few[name], 1e-3)) / ratio, 2) for name in steps}
    largest = found[str(sizes[-1])]
    kept = largest["kb_per_row"] <= MAX_KB_PER_ROW and max(largest["seconds"].values()) <= MAX_STEP_SEC
    print(json.dumps({"rows": found, "growth": growth, "within_limits": kept}))
    return 0


def measure(rows: int) -> dict[str, Any]:
    """Return the seconds of each step, and the memory that all of them keep."""
    config = load_config(
        None,
        overrides={
            "device": "cpu",
            "data.num_workers": 0,
            "data.source": "folder",
            "data.path": ".",
            "model.variant": "tiny.en",
        },
    )
    processor = load_checkpoint(resolve_weights("tiny.en", cache_dir=config.paths.cache_dir).path)[1]
    seconds: dict[str, float] = {}
    memory_kb: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        gc.collect()
        return_freed_memory()
        memory_kb[name] = psutil.Process().memory_info().rss / 1e3
        return result

    with tempfile.TemporaryDirectory() as place:
        clips = write_set(Path(place), rows)
        load_batch(clips[:32], processor, config)  # what is imported and cached once
        recordings = [decode(clip.audio) for clip in clips]
        measures = [asdict(measure_clip(recording)) for recording in recordings]

        def decode_row(audio: Any, **_: Any) -> DecodedAudio:
            return recordings[int(audio.stem) % len(clips)]

        numbers = iter(range(rows))

        def measure_row(_: DecodedAudio, *, vad: Any) -> ClipStats:
            number = next(numbers)  # a copy of each value, as a recording of its own has them
            own = {name: v * (1 + 1e-9 * number) if isinstance(v, float) else v for name, v in measures[0].items()}
            return ClipStats(**own | {"audio_sha256": hashlib.sha256(str(number).encode()).hexdigest()})

        gc.collect()
        return_freed_memory()
        before_kb = psutil.Process().memory_info().rss / 1e3
        listed = [timed("listing", lambda: read_folder(Path(place)))]
        with (
            patch("src.data.preparation.open_source", lambda *_: listed.pop()),
            patch("src.data.preparation.decode", decode_row),
            patch("src.data.preparation.measure_clip", measure_row),
        ):
            splits = timed("preparing", lambda: prepare_datasets(config))

        def first_batch() -> Any:
            made = create_loader(splits.train, processor, config, shuffle=True)
            next(iter(made))
            return made

        loader = timed("first batch", first_batch)
        timed("an epoch's plan", lambda: loader.batches_in(1))

        def resume() -> None:
            loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batches": loader.batches_in(1) // 2})
            next(iter(loader))

        timed("resume", resume)
        timed("report", lambda: build_data_report(splits, config, tokenizer=processor.tokenizer))
    kept_kb = max(memory_kb[name] for name in ("preparing", "first batch", "an epoch's plan", "resume")) - before_kb
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "kb_per_row": round(kept_kb / rows, 3),
        "kb_per_row_after": {name: round((value - before_kb) / rows, 3) for name, value in memory_kb.items()},
    }


def write_set(folder: Path, rows: int) -> list[Utterance]:
    """Write the clips, a link to one for each row, and their manifest; return the clips."""
    bundled = [u for u in load_utterances(DataConfig()) if u.meta["split"] == "train"][:CLIPS]
    for at, clip in enumerate(bundled):
        audio: Any = clip.audio
        (folder / f"{at}.ogg").write_bytes(audio.read())
    (folder / "clips").mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "file_name", "text", "speaker", "language"])
        for number in range(rows):
            at, name = number % len(bundled), f"clips/{number:07d}.ogg"
            (folder / name).symlink_to(f"../{at}.ogg")
            text, speaker = f"{bundled[at].text.lower()} {number}", f"s{number // ROWS_PER_SPEAKER}"
            table.writerow([f"row-{number:07d}", name, text, speaker, "en"])
    return bundled


def load_batch(clips: list[Utterance], processor: Any, config: Config) -> None:
    """Take one batch of a few clips."""
    checked = [check_utterance(clip, config.data) for clip in clips]
    next(iter(create_loader(checked, processor, config, shuffle=True)))


if __name__ == "__main__":
    sys.exit(main())
