"""Shared by the benchmarks: clips to measure on, medians, and dated tables in docs/BENCHMARKS.md."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a peer measures its own memory: nothing of this library is imported before it ends
    from src.data.utterance import Utterance
    from src.evaluation.metrics import PairedComparison
    from src.utils.config import DataConfig

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "BENCHMARKS.md"
_HEADER = """# Benchmarks

Each table was appended by the script that its command names; anyone can run it. The machines are shared, so ratios and
medians mean more than absolute times.
"""


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the file of `load_clips`."""
    from scripts.command_line import path_argument

    parser.add_argument(
        "--data", type=path_argument, help="Parquet in the Hugging Face audio layout; default: bundled test set"
    )


def load_clips(data: Path | None, count: int) -> list[Utterance]:
    """Return clips at a stride over a Parquet file in the Hugging Face audio layout, or over the bundled test set."""
    from src.data.sources.catalog import load_utterances
    from src.utils.config import Config

    if data is not None:
        return strided(read(data), count)
    return strided([u for u in load_utterances(Config().data) if u.meta["split"] == "test"], count)


def read(path: Path) -> list[Utterance]:
    """List a Parquet file."""
    from src.data.sources.catalog import load_utterances
    from src.utils.config import load_config

    return load_utterances(load_config(None, overrides={"data": {"source": "parquet", "path": str(path)}}).data)


def strided(utterances: list[Utterance], count: int) -> list[Utterance]:
    """Take clips from all over a corpus, which is often in order of its speakers."""
    count = min(count, len(utterances))
    return [utterances[index * len(utterances) // count] for index in range(count)]


def recased(clip: Utterance, data: DataConfig) -> Utterance:
    """Return a checked clip with its duration, and with its text as a sentence where that is all capitals."""
    from src.data.labels import apply_case, resolve_case
    from src.data.preparation import check_utterance

    known = check_utterance(clip, data)
    return dataclasses.replace(known, text=apply_case(known.text, resolve_case([known.text], "auto")))


def require_peer(module: str = "faster_whisper") -> None:
    """Raise an ImportError that says how to install a peer, before anything is measured without it."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed: pip install -r requirements-bench.txt -c constraints.txt")


def median_sec(action: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of an action in seconds, after one run that does not count."""
    action()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def describe_machine() -> str:
    """Return processor, cores and GPU in words."""
    import torch

    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{processor}, {os.cpu_count()} cores, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def show(title: str, rows: Sequence[Mapping[str, str]], note: str, *, record: bool) -> None:
    """Print a table, and append it to docs/BENCHMARKS.md if it is to be recorded."""
    widths = {column: max(len(column), *(len(line[column]) for line in rows)) for column in rows[0]}
    for line in (dict(zip(rows[0], rows[0], strict=True)), *rows):
        print("  ".join(f"{cell:>{widths[column]}}" for column, cell in line.items()))
    if record:
        append_table(title, rows, note=note)


def number(value: float | None, unit: str = "") -> str:
    """Return three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}{unit}"


def percent(value: float | None, sign: str = "-") -> str:
    """Return a fraction in percent, or a dash for what was not measured; `sign` is that of a format."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def percent_interval(rate: float | None, low: float | None, high: float | None, sign: str = "-") -> str:
    """Return a rate in percent with its interval."""
    return f"{percent(rate, sign)} [{percent(low, sign)}, {percent(high, sign)}]"


def points(comparison: PairedComparison) -> str:
    """Return a difference in points of percent with its interval."""
    return percent_interval(comparison.difference, comparison.low, comparison.high, sign="+")


def append_table(title: str, rows: Sequence[Mapping[str, str]], *, note: str = "") -> None:
    """Append a table with date, machine and command to docs/BENCHMARKS.md."""
    script = Path(sys.argv[0]).resolve()
    named = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    lines = [
        f"\n## {title}",
        f"\n{time.strftime('%Y-%m-%d')}; {describe_machine()}",
        f"\n`python {' '.join([named, *sys.argv[1:]])}`",
        *([f"\n{note}"] if note else []),
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row[column] for column in rows[0]) + " |" for row in rows),
    ]
    text = BENCHMARKS.read_text(encoding="utf-8") if BENCHMARKS.exists() else _HEADER
    BENCHMARKS.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
