"""Measure the share of batches padded to 30 s that a model needs to keep working there: `training.full_context_prob`.

    python benchmarks/context_share.py [--quick] [--train FILE.parquet --dev FILE.parquet] [--device cuda ...]

Padded batches cost as much as in a usual recipe, so the share decides how much time training at own length saves. Runs
`benchmarks/training.py --real` once per share: word error rates at own length and at 30 s by epoch, and clips per
second. The last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md. On two cores each share
takes an hour; on a GPU, `--parallel` runs all shares at once, and no speed is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training import Figures, Job, add_shared_arguments, make_job, run_job
from scripts.benchmarking import append_table

SHARES = (0.0, 0.02, 0.05, 0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shared_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--parallel", action="store_true", help="all shares at once; no speed is reported")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    parser.set_defaults(full_context_prob=0.0)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch, arguments.clips, arguments.dev_clips, arguments.updates = 4, 8, 8, 2
        arguments.shares = arguments.shares[:2]
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(arguments, Path(folder), real=not arguments.quick)
        stock = run_job(replace(job, side="stock"))
        jobs = [share_job(job, share) for share in arguments.shares]
        with ThreadPoolExecutor(len(jobs) if arguments.parallel else 1) as runs:
            found = dict(zip(arguments.shares, runs.map(run_job, jobs), strict=True))
    rows = [row("before training", stock)]
    for share, figures in found.items():
        rows += [row(f"{share:g}", point, speed=figures, parallel=arguments.parallel) for point in figures["by_epoch"]]
    for line in rows:
        print("  ".join(f"{cell:>16}" for cell in line.values()))
    if not (arguments.quick or arguments.no_record):
        note = (
            f"{job.clips} clips an epoch, batch {job.batch_size}, {job.precision}, peak rate {job.learning_rate:.2e}."
        )
        append_table(f"Share of batches padded to 30 s, {Path(arguments.variant).name}", rows, note=note)
    last = {f"{share:g}": figures["by_epoch"][-1] for share, figures in found.items()}
    print(json.dumps({"wer_by_share": last, "wer_before_full": stock["wer_full"]}))
    return 0


def share_job(job: Job, share: float) -> Job:
    """Return one share's job, in a folder of its own."""
    folder = Path(job.folder, f"share-{share:g}")
    folder.mkdir()
    return replace(job, side="ours", folder=str(folder), full_context_prob=share, resumable=True)


def row(share: str, point: Figures, *, speed: Figures | None = None, parallel: bool = False) -> dict[str, str]:
    """Return one epoch's line; before training only the full context is known."""
    return {
        "share padded": share,
        "epoch": str(point.get("epoch", 0)),
        "WER, own length": f"{100 * point['wer_own']:.1f} %" if "wer_own" in point else "-",
        "WER, 30 s": f"{100 * point['wer_full']:.1f} %",
        "speed": "-" if speed is None or parallel else f"{speed['samples_per_sec']:.1f} clips/s",
    }


if __name__ == "__main__":
    sys.exit(main())
