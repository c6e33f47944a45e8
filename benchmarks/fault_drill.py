"""Break training on purpose, and show that nothing is lost.

    python benchmarks/fault_drill.py [--kills 20] [--quick]

A very small Whisper with random weights trains on bundled speech and saves its whole state after every update. It is
killed (SIGKILL) at random instants, half of them inside a save, and resumed each time; the end must equal the run that
nobody killed, bit for bit. Then: a disk that fills up, a damaged checkpoint, and a mirror that vanishes, is full,
stalls or cuts files off. The last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.faults import FAULTS, UPDATES, Outcome, make_stock_model, make_trainer
from scripts.benchmarking import append_table
from scripts.command_line import path_argument

START_LIMIT_SEC = 180.0  # until a worker trains
RUN_LIMIT_SEC = 300.0
LONGEST_WAIT_SEC = 2.0  # from the first update to a kill at a random instant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--quick", action="store_true", help="two kills; under a minute on an idle machine")
    parser.add_argument("--no-record", action="store_true", help="leave docs/BENCHMARKS.md as it is")
    parser.add_argument("--worker", type=path_argument, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return 0
    kills = 2 if arguments.quick else arguments.kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_stock_model(folder / "stock")
        outcomes, figures = drill_kills(folder, kills, random.Random(arguments.seed))
        logging.getLogger("src").addHandler(logging.NullHandler())
        for fault in FAULTS:
            place = folder / fault.__name__
            place.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                outcomes.append(fault(folder / "stock", place))
            print(*outcomes[-1], sep=" | ", flush=True)
    rows = [{"fault": what, "what happened": found, "survived": "yes" if ok else "NO"} for what, found, ok in outcomes]
    if not (arguments.no_record or arguments.quick):
        append_table("Faults survived", rows, note=f"{UPDATES} updates, the whole state saved after each.")
    print(json.dumps({**figures, "all_survived": all(ok for *_, ok in outcomes)}))
    return 0 if all(ok for *_, ok in outcomes) else 1


def worker(folder: Path) -> None:
    """Train to the end from wherever the last worker was killed."""
    logging.basicConfig(level="WARNING")
    trainer = make_trainer(folder.parent / "stock", folder)
    report = trainer.resume("auto")
    (folder / "resumed.json").write_text(
        json.dumps({"checkpoint": str(report.checkpoint), "refused": [str(path) for path, _ in report.refused]})
    )
    (folder / "trains").touch()
    history = trainer.train()
    (folder / "done.json").write_text(json.dumps(history))


def drill_kills(folder: Path, kills: int, instants: random.Random) -> tuple[list[Outcome], dict[str, Any]]:
    """Kill a run again and again, and compare its end with that of a run that nobody killed."""
    straight, killed = folder / "straight", folder / "killed"
    finish(start(straight))
    inside, refused, done, ends = 0, 0, 0, []
    for number in range(2 * kills):  # bounded: a worker may be through before its kill
        process = start(killed)
        wait_for(lambda: (killed / "trains").exists(), process, START_LIMIT_SEC)
        refused += len(json.loads((killed / "resumed.json").read_text())["refused"])
        wait_for_instant(killed, process, instants, inside_save=number % 2 == 0)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            inside += half_written(killed)
            where = ", inside a save" if half_written(killed) else ""
            print(f"kill {done}: at update {last_step(killed)}{where}", flush=True)
        if done == kills or last_step(killed) >= UPDATES - 2:  # at its end: compare, and kill another run
            finish(start(killed))
            ends.append(compare(straight, killed))
            print(f"end equals the straight run: {ends[-1]}", flush=True)
            shutil.rmtree(killed)
        if done == kills:
            break
    ok = all(ends) and refused == 0 and done == kills
    what = f"SIGKILL, {done} times in {len(ends)} runs, {inside} inside a save"
    found = f"every resume works, none refused; ends bit-identical to the straight run: {sum(ends)} of {len(ends)}"
    return [(what, found, ok)], {"kills": done, "kills_inside_save": inside, "runs": len(ends), "identical": all(ends)}


def wait_for_instant(
    folder: Path, process: subprocess.Popen[bytes], instants: random.Random, *, inside_save: bool
) -> None:
    """Wait a random time, or until a random one of the next saves is half written."""
    if not inside_save:
        time.sleep(instants.uniform(0, LONGEST_WAIT_SEC))
        return
    for _ in range(1 + instants.randrange(8)):
        wait_for(lambda: not half_written(folder), process, RUN_LIMIT_SEC)
        wait_for(lambda: half_written(folder), process, RUN_LIMIT_SEC)


def start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    for name in ("trains", "done.json"):
        (folder / name).unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "stderr.txt").open("ab"))


def finish(process: subprocess.Popen[bytes]) -> None:
    folder = Path(str(process.args[-1]))  # type: ignore[index]
    if process.wait(timeout=START_LIMIT_SEC + RUN_LIMIT_SEC) != 0:
        raise SystemExit(f"a worker failed:\n{(folder / 'stderr.txt').read_text()[-3000:]}")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_sec: float) -> None:
    """Poll until something is so, or the process ends well."""
    end = time.monotonic() + limit_sec
    while not condition() and process.poll() is None:
        if time.monotonic() > end:
            raise SystemExit(f"nothing happened for {limit_sec:.0f} s")
        time.sleep(0.0005)
    if process.poll() not in (None, 0):
        finish(process)


def half_written(folder: Path) -> bool:
    places = [folder / "checkpoints", folder / "checkpoints" / "drill"]
    return any(name.startswith(".") and name.endswith(".partial") for place in places for name in list_names(place))


def list_names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def last_step(folder: Path) -> int:
    found = sorted((folder / "checkpoints" / "drill").glob("checkpoint-*"))
    return int(found[-1].name.split("-")[1]) if found else 0


def compare(straight: Path, killed: Path) -> bool:
    """Whether both runs end with the same weights, optimizer state, best model and history."""
    from src.utils.files import sha256_of

    end = f"checkpoints/drill/checkpoint-{UPDATES:08d}"
    files = [f"{end}/model.safetensors", f"{end}/optimizer.safetensors", "checkpoints/best_model_hf/model.safetensors"]
    same = all(sha256_of(straight / name) == sha256_of(killed / name) for name in files)
    return same and (straight / "done.json").read_text() == (killed / "done.json").read_text()


if __name__ == "__main__":
    sys.exit(main())
