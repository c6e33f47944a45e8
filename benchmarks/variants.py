"""Parameters, size, memory, speed and WER of model variants, on the same clips.

    python benchmarks/variants.py [--variant tiny.en --variant base] [--model FOLDER] [--data FILE] [--quick]

Stock weights are padded to 30 s, a tuned folder works as its checkpoint says. Each row is measured in a process of its
own, so that no memory of the previous one counts. A variant with unavailable weights is a row with the reason. The
last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import add_data, append_table, load_clips
from scripts.command_line import model_argument
from src.data.utterance import Utterance
from src.evaluation.variants import ENGINES, VariantComparison, VariantFigures, compare_models
from src.utils.config import Config, load_config

DEFAULT_VARIANTS = ("tiny.en", "base")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", action="append", help=f"may repeat; default: {', '.join(DEFAULT_VARIANTS)}")
    parser.add_argument(
        "--model", type=model_argument, action="append", default=[], help="folder of a tuned checkpoint; may repeat"
    )
    parser.add_argument("--engine", action="append", choices=ENGINES, help="may repeat; default: all")
    add_data(parser)
    parser.add_argument("--clips", type=int, default=100, help="at a stride")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="under a minute: six clips of tiny.en, nothing recorded")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    variants = [*(arguments.variant or DEFAULT_VARIANTS[: 1 if arguments.quick else None]), *arguments.model]
    clips = load_clips(arguments.data, 6 if arguments.quick else arguments.clips)
    configs = [  # all names are checked before the first is measured
        load_config(None, overrides={"device": arguments.device, "model": {"language": "en", "variant": variant}})
        for variant in variants
    ]
    found = measure_apart(configs, clips, arguments.engine or ENGINES)
    rows = [table_row(row) for row in found.rows]
    print(found.to_frame().to_string(index=False))
    if not (arguments.quick or arguments.no_record):
        note = f"{len(clips)} clips, in batches; memory is the peak of a process of its own."
        append_table("Variants", rows, note=note)
    print(json.dumps({f"{row.variant} {row.engine}": {"rtf": row.rtf, "wer": row.wer} for row in found.rows}))
    return 0


def measure_apart(configs: Sequence[Config], clips: Sequence[Utterance], engines: Sequence[str]) -> VariantComparison:
    """Call `compare_models` for each configuration's variant and each engine in a new process, one after the other."""
    rows: list[VariantFigures] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for config, engine in itertools.product(configs, engines):
            rows += pool.submit(compare_models, config, clips, engines=[engine]).result().rows
    return VariantComparison(tuple(rows))


def table_row(row: VariantFigures) -> dict[str, str]:
    """Lay one variant in one engine out; a figure that was not measured is blank."""

    def shown(value: float | None, layout: str) -> str:
        return "" if value is None else layout.format(value)

    interval = "" if row.wer_low is None or row.wer_high is None else f" [{row.wer_low:.3f}, {row.wer_high:.3f}]"
    return {
        "variant": row.variant,
        "engine": row.engine,
        "audio context": row.audio_context or "",
        "parameters": "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
        "weights": shown(row.disk_mb, "{:.0f} MB"),
        "memory": shown(row.peak_memory_mb, "{:.0f} MB"),
        "RTF": shown(row.rtf, "{:.3f}"),
        "WER": shown(row.wer, "{:.3f}") + interval,
        "not measured": row.reason or "",
    }


if __name__ == "__main__":
    sys.exit(main())
