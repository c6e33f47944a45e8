"""Measure the cost of evaluation compared with transcription: evaluation, intervals and the report of a run.

    python benchmarks/evaluation.py [--quick] [--model FOLDER] [--data FILE.parquet] [--clips 2500]

The same clips are transcribed (decoding of files, features, encoder, decoder) and evaluated (that, and the loss, the
counts, rates and intervals), in turn, by the same model in one process. Bootstrap and report are of the evaluated rows.
The last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.training_sides import read_recording
from scripts.benchmarking import append_table, median_sec, read, strided
from scripts.command_line import model_argument, path_argument
from src.data import Utterance, create_loader
from src.data.preparation import RecordingChecker
from src.data.sources.catalog import SAMPLE_PARQUET
from src.evaluation import EvaluationResult, ModelEvaluator
from src.evaluation.metrics import Bootstrap
from src.evaluation.report.html import write_html_report
from src.inference import BatchInference
from src.models import WhisperModelManager
from src.utils import Config, ExperimentLogger, load_config

RESAMPLES = 10_000
ROWS = 2_500  # of the bootstrap and the report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=path_argument, default=SAMPLE_PARQUET, help="Parquet in the Hugging Face audio layout"
    )
    parser.add_argument(
        "--model", type=model_argument, default="tiny.en", help="variant, or a folder with a tuned model"
    )
    parser.add_argument("--clips", type=int, default=100, help="at a stride; all where there are fewer")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of both; the median is reported")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, one pair, nothing recorded")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.repeats = 16, 1
    with tempfile.TemporaryDirectory() as folder:
        figures = run(arguments, Path(folder))
    rows = table(figures)
    for row in rows:
        print(f"{row['what']:<58} {row['figure']:>14}")
    if not (arguments.quick or arguments.no_record):
        note = f"{figures['clips']} clips, {figures['audio_sec']:.0f} s, context {figures['audio_context']!r}."
        append_table(f"Evaluation compared with transcription, {Path(arguments.model).name}", rows, note=note)
    print(json.dumps(figures))
    return 0


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything; return the figures by name."""
    config = load_config(
        None, overrides={"paths.runs_dir": str(folder / "runs"), "evaluation.bootstrap_samples": RESAMPLES}
    )
    model, processor = WhisperModelManager(config).initialize_model(arguments.model)
    utterances = as_files(choose(arguments.data, arguments.clips, config), folder)
    transcriber = BatchInference(model, processor, config)
    results: list[EvaluationResult] = []

    def evaluate() -> None:
        loader = create_loader(utterances, processor, config)
        results.append(ModelEvaluator(model, processor, config).evaluate_dataset(loader, name="stock"))

    def transcribe() -> None:
        transcriber.transcribe_batch([utterance.audio for utterance in utterances])

    pairs = [(seconds(transcribe), seconds(evaluate)) for _ in range(arguments.repeats + 1)][1:]  # the first warms up
    repeated = repeat_rows(results[-1])
    size_mb, report_sec = measure_report(repeated, config, folder)
    return {
        "evaluation_over_transcription": statistics.median(b / a for a, b in pairs),
        "transcription_sec": statistics.median(a for a, _ in pairs),
        "evaluation_sec": statistics.median(b for _, b in pairs),
        "bootstrap_sec": measure_bootstrap(repeated),
        "report_mb": size_mb,
        "report_sec": report_sec,
        "clips": len(utterances),
        "audio_sec": results[-1].audio_sec,
        "audio_context": results[-1].audio_context,
        "wer": results[-1].wer,
    }


def choose(data: Path, count: int, config: Config) -> list[Utterance]:
    """Take clips at equal distances, and check them."""
    return RecordingChecker(config).take("clips", strided(read(data), count), None)


def as_files(utterances: Sequence[Utterance], folder: Path) -> list[Utterance]:
    """Write the recordings to files, which both sides read."""
    found = []
    for index, utterance in enumerate(utterances):
        path = folder / f"{index:05d}.audio"
        path.write_bytes(read_recording(utterance))
        found.append(replace(utterance, id=f"{index:05d}", audio=path))
    return found


def repeat_rows(result: EvaluationResult) -> EvaluationResult:
    """Repeat rows, under ids of their own, until there are `ROWS`."""
    rows = [replace(result.rows[i % result.n], id=f"{i:05d}") for i in range(ROWS)]
    return replace(result, n=ROWS, rows=tuple(rows))


def measure_bootstrap(result: EvaluationResult) -> float:
    """Return the seconds of one interval, with clips as blocks: there are never more blocks than those."""
    errors = np.array([row.errors for row in result.rows], dtype=float)
    words = np.array([row.reference_words for row in result.rows], dtype=float)
    return median_sec(lambda: Bootstrap(RESAMPLES).interval(errors, words, np.arange(ROWS)), 3)


def measure_report(result: EvaluationResult, config: Config, folder: Path) -> tuple[float, float]:
    """Return MB and seconds of a report without audio."""
    with ExperimentLogger(config, run_id="report") as experiment:
        result.save(experiment)
    path = folder / "report.html"
    took = seconds(lambda: write_html_report(experiment.dir, path))
    return path.stat().st_size / 1e6, took


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of an action."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def table(figures: dict[str, Any]) -> list[dict[str, str]]:
    """Return the figures for reading."""
    rows = {
        "evaluation over transcription, median of pairs": f"{figures['evaluation_over_transcription']:.2f}",
        "transcription": f"{figures['transcription_sec']:.1f} s",
        "evaluation": f"{figures['evaluation_sec']:.1f} s",
        f"an interval: {RESAMPLES:,} resamples of {ROWS:,} clips": f"{figures['bootstrap_sec']:.2f} s",
        f"report of {ROWS:,} rows without audio": f"{figures['report_mb']:.1f} MB",
        "writing it": f"{figures['report_sec']:.1f} s",
    }
    return [{"what": what, "figure": figure} for what, figure in rows.items()]


if __name__ == "__main__":
    sys.exit(main())
