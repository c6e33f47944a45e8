"""Compare what two commits compute from the bundled speech and weights, in one run on one machine.

    python benchmarks/compare_commits.py OLD_COMMIT [--old-checkout DIR] [--only SECTION ...] [--keep DIR]

The old commit is checked out by `git worktree`, unless `--old-checkout` names a checkout that has it. Then
`tests/golden/behaviour.py` is run in both checkouts, one after the other, with the same interpreter and environment and
one thread. The new side is the working tree, uncommitted changes included. Each side runs the procedure of its own
commit, because module paths may differ; an old commit that lacks the file gets the one of the working tree, which
works as long as the names that it imports existed then.

Required for equality: splits, labels, rates, captions, texts and their times are the same; losses, speech probabilities
and all other numbers differ by at most 1e-4, absolute or relative. Public names may be added. The table has a row for
each section; the lines after it say what differs. Exit status: 0 if all is equal, 1 if a section differs, 2 if one side
could not be measured.

Takes about 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import path_argument
from tests.golden.comparison import EXACT, Comparison, Tolerance, compare

PROCEDURE = "tests/golden/behaviour.py"
NUMBERS = Tolerance(absolute=1e-4, relative=1e-4)
EXACT_SECTIONS = ("splits", "labels", "metrics", "rates", "exports")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
MAX_PROBLEMS = 10  # printed of each section


class MeasurementError(Exception):
    """One side could not be measured."""


@dataclass(frozen=True)
class Side:
    """A checkout and the procedure to run in it."""

    name: str
    checkout: Path
    procedure: Path


def main() -> int:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD_COMMIT", help="commit to compare the working tree with")
    parser.add_argument("--old-checkout", type=path_argument, help="folder in which OLD_COMMIT is checked out already")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="sections; all by default")
    parser.add_argument("--keep", type=path_argument, metavar="DIR", help="write old.json and new.json there")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch, checkout_of(arguments.old, arguments.old_checkout) as old_dir:
            kept = arguments.keep or Path(scratch)
            kept.mkdir(parents=True, exist_ok=True)
            old = Side("old", old_dir, procedure_of(arguments.old, Path(scratch)))
            new = Side("new", ROOT, ROOT / PROCEDURE)
            before, now = (run(side, kept / f"{side.name}.json", arguments.only) for side in (old, new))
    except MeasurementError as err:
        print(err, file=sys.stderr)
        return 2
    found = compare_sections(before, now)
    print(describe(found, sorted(set(before) ^ set(now))))
    return int(any(result.problems for result in found.values()) or set(before) > set(now))


@contextlib.contextmanager
def checkout_of(commit: str, given: Path | None) -> Iterator[Path]:
    """Yield a checkout of a commit: the given one after a check, else a worktree for as long as it is needed."""
    wanted = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    if given is not None:
        found = git("rev-parse", "HEAD", folder=given)
        if found != wanted:
            raise MeasurementError(f"{given} has {found[:12]} checked out, not {commit} ({wanted[:12]})")
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "old"
        git("worktree", "add", "--detach", str(folder), wanted)
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def procedure_of(commit: str, scratch: Path) -> Path:
    """Write the commit's own procedure into a scratch folder; return the working tree's where it has none."""
    shown = subprocess.run(["git", "show", f"{commit}:{PROCEDURE}"], cwd=ROOT, capture_output=True, check=False)
    if shown.returncode:
        print(f"{commit} has no {PROCEDURE}: running the one of the working tree in it", file=sys.stderr)
        return ROOT / PROCEDURE
    target = scratch / "behaviour.py"
    target.write_bytes(shown.stdout)
    return target


def run(side: Side, out: Path, only: Sequence[str]) -> dict[str, Any]:
    """Run the procedure in a checkout and return its sections."""
    print(f"measuring {side.name}: {side.checkout}", file=sys.stderr, flush=True)
    # -P keeps the folder of the script off sys.path; the procedure puts the current folder there
    command = [sys.executable, "-P", str(side.procedure), "--out", str(out.resolve())]
    command += ["--only", *only] if only else []
    environment = clean_environment() | ONE_THREAD
    done = subprocess.run(command, cwd=side.checkout, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MeasurementError(f"{side.name} side failed in {side.checkout}:\n{done.stderr[-4000:]}")
    sections: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return sections


def clean_environment() -> dict[str, str]:
    """Return the environment without PYTHONPATH: each side imports from its own checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def compare_sections(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Comparison]:
    """Compare the sections that both sides have."""
    return {
        name: compare(before[name], now[name], EXACT if name in EXACT_SECTIONS else NUMBERS)
        for name in before
        if name in now
    }


def describe(found: Mapping[str, Comparison], in_one_only: Sequence[str]) -> str:
    """Return the table, and after it what differs."""
    lines = [f"{'section':<14}{'result':<10}{'largest difference':>20}{'word error rate':>18}{'words moved':>14}"]
    for name, result in found.items():
        verdict = "differs" if result.problems else "equal"
        lines.append(
            f"{name:<14}{verdict:<10}{result.largest_difference:>20.3g}{result.word_error_rate:>18.2%}"
            f"{result.misplaced_words:>14.2%}"
        )
    lines += [f"{name:<14}in one only" for name in in_one_only]
    for name, result in found.items():
        lines += [f"{name}: {problem}" for problem in result.problems[:MAX_PROBLEMS]]
        if len(result.problems) > MAX_PROBLEMS:
            lines.append(f"{name}: {len(result.problems) - MAX_PROBLEMS} more")
    return "\n".join(lines)


def git(*arguments: str, folder: Path = ROOT) -> str:
    """Run git and return its output.

    Raises:
        MeasurementError: git failed; its message is kept.
    """
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeasurementError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
