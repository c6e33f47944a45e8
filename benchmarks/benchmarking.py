"""What every benchmark script shares: the machine in words, medians, and a dated table in docs/BENCHMARKS.md."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "BENCHMARKS.md"
_HEADER = """# Benchmarks

Each table was appended by the script that its command names; anyone can run it. The machines are shared, so ratios and
medians mean more than absolute times.
"""


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

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{_processor()}, {os.cpu_count()} cores, {gpu}, {versions}"


def append_table(title: str, rows: Sequence[Mapping[str, str]], *, note: str = "") -> None:
    """Append a table with date, machine and command to docs/BENCHMARKS.md."""
    columns = list(rows[0])
    lines = [
        f"\n## {title}",
        f"\n{time.strftime('%Y-%m-%d')}; {describe_machine()}",
        f"\n`python {' '.join([_relative(sys.argv[0]), *sys.argv[1:]])}`",
        *([f"\n{note}"] if note else []),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row[column] for column in columns) + " |" for row in rows),
    ]
    text = BENCHMARKS.read_text(encoding="utf-8") if BENCHMARKS.exists() else _HEADER
    BENCHMARKS.parent.mkdir(exist_ok=True)
    BENCHMARKS.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _relative(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
