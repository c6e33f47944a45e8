"""Attack the project on purpose, and show that nothing is lost, nobody is let in, and every error names its cause.

    python benchmarks/attack_drill.py [NAME ...] [--no-load]

Each attack of benchmarks/attacks.py and benchmarks/live_attacks.py runs in a process of its own, with an empty folder,
a limit of time and one of file size, and reaches nothing but this machine. Afterwards 20 clients stream in real time
to a caption server together with 4 hostile ones. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # the processes below are forked

from benchmarks import live_attacks
from benchmarks.attacks import ATTACKS, FORK, AttackFunction, BrokenError, WeakError

MAX_FILE_BYTES = 2 << 30
DRILL_SEC = 500.0  # for all attacks; with the load, less than 10 minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of attacks; default: all of them, and the load")
    parser.add_argument("--no-load", action="store_true", help="leave out the clients in real time")
    parser.add_argument("--load-sec", type=float, default=live_attacks.LOAD_SEC, help="default: %(default)s")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ATTACKS):
        parser.error(f"no such attacks: {', '.join(sorted(unknown))}; known: {', '.join(ATTACKS)}")
    import torch

    torch.set_num_threads(1)
    end = time.monotonic() + DRILL_SEC
    outcomes: dict[str, tuple[str, str]] = {}
    figures: dict[str, Any] = {}
    for name in arguments.names or ATTACKS:
        outcomes[name] = run_apart(ATTACKS[name].call, min(ATTACKS[name].limit_sec, end - time.monotonic()))
        print(f"{outcomes[name][0]:6} | {name} | {outcomes[name][1]}", flush=True)
    if not (arguments.names or arguments.no_load):
        figures, faults = live_attacks.load(arguments.load_sec)
        outcomes["load"] = ("broken" if faults else "held", "; ".join(faults))
        print(f"{outcomes['load'][0]:6} | load | {figures} {outcomes['load'][1]}", flush=True)
    found = {what: sum(each == what for each, _ in outcomes.values()) for what in ("held", "broken", "weak")}
    not_held = {name: f"{what}: {why}" for name, (what, why) in outcomes.items() if what != "held"}
    print(
        json.dumps({"attacks": len(outcomes), **found, "not_held": not_held, **({"load": figures} if figures else {})})
    )
    return 0 if not not_held else 1


def run_apart(attack: AttackFunction, limit_sec: float) -> tuple[str, str]:
    """Run an attack in a process group of its own; return "held", "weak" or "broken", and why."""
    ours, theirs = FORK.Pipe()
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as name:
        process = FORK.Process(target=child, args=(attack, Path(name), theirs))
        process.start()
        theirs.close()
        outcome = "broken", f"no end after {limit_sec:.0f} s"
        with contextlib.suppress(EOFError):
            if ours.poll(max(limit_sec, 0.0)):
                outcome = "broken", "the process died"
                outcome = ours.recv()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return outcome


def child(attack: AttackFunction, folder: Path, pipe: Connection) -> None:
    """Run an attack, and send what came of it."""
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tempfile.tempdir = str(folder)
    logging.disable(logging.CRITICAL)
    with (
        (folder / ".output").open("w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            outcome = attack(folder)
            if asyncio.iscoroutine(outcome):
                asyncio.run(outcome)
            pipe.send(("held", ""))
        except WeakError as err:
            pipe.send(("weak", str(err)))
        except BrokenError as err:
            pipe.send(("broken", str(err)))
        except BaseException as err:  # noqa: BLE001 - whatever the attack lets out is a fault
            pipe.send(("broken", f"{type(err).__name__}: {str(err)[:300]}"))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
