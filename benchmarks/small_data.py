"""Measure what to expect from how much data: 5 to 60 minutes of speech, by method of training.

    python benchmarks/small_data.py [--train FILE.parquet --test FILE.parquet] [--minutes 5 15 30 60] [--seeds 1 2 3]
        [--methods full "encoder frozen"] [--state FILE.jsonl [--report]] [--quick]

Each model is tuned (`--variant`, tiny.en) on as many minutes, taken at a stride over the training clips, with the
settings of one method and those of the profile `demo` for the rest, for `--epochs`. The best epoch by validation is
measured on the test set and on general speech (`--guard prompts`: Debian's telephone exchange), as is the mean of its
weights and the stock ones. What is in `--state` is not measured again, so that an interrupted run goes on. The last
line printed is one JSON object; the table is appended to docs/BENCHMARKS.md, the figure is docs/images/small_data.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipe import PROMPTS, guard_clips
from benchmarks.replay import Results, measure, train
from scripts.benchmarking import load_clips, percent, points, recased, show, strided
from scripts.command_line import path_argument
from src.data import Utterance, prepare_datasets
from src.data.preparation import DatasetSplits
from src.evaluation.evaluator import compare_predictions
from src.evaluation.visualization.style import new_figure
from src.utils import Config, load_config
from src.utils.figures import save_figure

METHODS: dict[str, dict[str, Any]] = {
    "full": {"training.method": "full"},
    "encoder frozen": {"training.method": "full", "training.freeze_encoder": True},
    "LoRA": {"training.method": "lora"},
    "full, padded to 30 s": {"training.method": "full", "model.audio_context": "full"},
    "full, not augmented": {"training.method": "full", "augmentation.enabled": False},
}
STOCK = "stock"
FIGURES = ("wer", "guard", "mixed_wer", "mixed_guard")


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        state = arguments.state or Path(folder) / "state.jsonl"
        found = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
        done = {(each["method"], each["minutes"], each["seed"]) for each in found}
        config = settings(arguments, {}, 0, Path(folder))
        test = [recased(clip, config.data) for clip in load_clips(arguments.test, arguments.test_clips)]
        guard = guard_clips(arguments, config)[: arguments.guard_clips]
        splits = prepare_datasets(config)
        stock = measure(arguments.variant, None, test, guard, config)
        for seed, minutes, method in itertools.product(arguments.seeds, arguments.minutes, arguments.methods):
            if not arguments.report and (method, minutes, seed) not in done:
                config = settings(arguments, METHODS[method], seed, Path(folder) / f"{len(found)}")
                row = run(config, part_of(splits, minutes), stock, test, guard)
                found.append({"method": method, "minutes": minutes, "seed": seed, **row})
                with state.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
                print(json.dumps(found[-1]), flush=True)
    rows = table(found, arguments)
    note = (
        f"{arguments.variant}; at most {arguments.epochs} epochs, the best by validation; WER in percent, means of the "
        f"seeds {', '.join(map(str, arguments.seeds))} that were run. Stock: {percent(stock['test'].rate)} on "
        f"{stock['test'].n} test clips, {percent(stock['guard'].rate)} on {stock['guard'].n} clips of general speech. "
        "Mixed: the mean of the tuned and the stock weights."
    )
    record = not (arguments.quick or arguments.no_record)
    show("What to expect from how much data", rows, note, record=record)
    draw(found, stock, ROOT / "docs" / "images" if record else Path(tempfile.mkdtemp()))
    figures: dict[str, Any] = {STOCK: {"wer": stock["test"].rate, "guard": stock["guard"].rate}}
    for method in arguments.methods:
        figures[method] = {f"{m:g}": {key: mean(found, method, m, key) for key in FIGURES} for m in arguments.minutes}
    print(json.dumps(figures))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train", type=path_argument, help="Parquet in the Hugging Face audio layout; default: bundled sample"
    )
    parser.add_argument("--test", type=path_argument, help="likewise, of other speakers; default: bundled test set")
    parser.add_argument("--guard", type=path_argument, default=Path(PROMPTS), help=f"folder, or {PROMPTS} (default)")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0, 30.0, 60.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="the first one is done first, for all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test-clips", type=int, default=150)
    parser.add_argument("--guard-clips", type=int, default=60)
    parser.add_argument("--variant", default="tiny.en")
    parser.add_argument("--language", default="en")
    parser.add_argument("--state", type=path_argument, metavar="FILE", help="of what is measured; default: not kept")
    parser.add_argument("--report", action="store_true", help="train nothing more, lay out what --state has")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes, arguments.methods, arguments.epochs = [0.5], ["full", "LoRA"], 1
        arguments.test_clips, arguments.guard_clips = 8, 4
    return arguments


def settings(arguments: argparse.Namespace, own: dict[str, Any], seed: int, folder: Path) -> Config:
    data = {"data.source": "sample"}
    if arguments.train is not None:
        data = {"data.source": "parquet", "data.path": str(arguments.train)}
    return load_config(
        ROOT / "config.yaml",
        profile="demo",  # the recipe, in batches of 8
        overrides={
            **data, "seed": seed, "model.variant": arguments.variant, "model.language": arguments.language,
            "data.max_validation": 4 if arguments.quick else 60, "training.epochs": arguments.epochs,
            "checkpoints.save_minutes": None,
            **{f"paths.{key}": str(folder / key) for key in ("runs_dir", "checkpoints_dir")}, **own,
        },
    )  # fmt: skip


def part_of(splits: DatasetSplits, minutes: float) -> DatasetSplits:
    """Return splits with clips of so many minutes at a stride over the training set."""
    clips = splits.train
    total = sum(clip.duration_sec or 0.0 for clip in clips) / 60
    if total < minutes:
        raise SystemExit(f"the training set has {total:.1f} min; give --train more, or --minutes less")
    return replace(splits, train=strided(clips, round(len(clips) * minutes / total)))


def run(
    config: Config, splits: DatasetSplits, stock: Results, test: Sequence[Utterance], guard: Sequence[Utterance]
) -> dict[str, Any]:
    """Tune one model and measure it, and its mean with stock."""
    began = time.perf_counter()
    trainer = train(config, splits)
    seconds = time.perf_counter() - began
    tuned, mixed = (measure(str(trainer.best_model_dir), share, test, guard, config) for share in (1.0, 0.5))
    against = compare_predictions(stock["test"].rows, tuned["test"].rows)
    return {
        "clips": len(splits.train), "best_epoch": trainer.best_epoch, "val_rates": trainer.history["val_rate"],
        "wer": tuned["test"].rate, "guard": tuned["guard"].rate, "against_stock": points(against),
        "mixed_wer": mixed["test"].rate, "mixed_guard": mixed["guard"].rate, "training_sec": seconds,
    }  # fmt: skip


def mean(found: Sequence[dict[str, Any]], method: str, minutes: float, key: str) -> float | None:
    """Return the mean over the seeds, None without any."""
    values = [each[key] for each in found if (each["method"], each["minutes"]) == (method, minutes)]
    return statistics.mean(values) if values else None


def table(found: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Lay out one row per method and amount."""
    rows = []
    for minutes, method in itertools.product(arguments.minutes, arguments.methods):
        own = [each for each in found if (each["method"], each["minutes"]) == (method, minutes)]
        if own:
            rates = [percent(mean(own, method, minutes, key)) for key in FIGURES]
            rows.append(
                {
                    "minutes (clips)": f"{minutes:g} ({own[0]['clips']})",
                    "method": method,
                    "WER": rates[0],
                    "by seed": " ".join(percent(each["wer"]) for each in own),
                    "against stock, first seed": own[0]["against_stock"],
                    "general speech": rates[1],
                    "mixed: WER": rates[2],
                    "mixed: general speech": rates[3],
                    "best epoch": " ".join(str(each["best_epoch"]) for each in own),
                    "training": f"{statistics.median(each['training_sec'] for each in own):.0f} s",
                }
            )
    return rows


def draw(found: Sequence[dict[str, Any]], stock: Results, folder: Path) -> Path:
    """Draw WER on the target and on general speech by minutes of training speech, one line per method."""
    with new_figure(9, 4) as figure:
        for axes, key, name, title in zip(
            figure.subplots(1, 2), ("wer", "guard"), ("test", "guard"), ("test set", "general speech"), strict=True
        ):
            for method in dict.fromkeys(each["method"] for each in found):
                amounts = sorted({each["minutes"] for each in found if each["method"] == method})
                rates = [100 * (mean(found, method, minutes, key) or 0.0) for minutes in amounts]
                axes.plot(amounts, rates, marker="o", label=method)
            axes.axhline(100 * stock[name].rate, color="black", linewidth=0.8, label=STOCK)
            axes.set_xscale("log")
            ticks = sorted({each["minutes"] for each in found})
            axes.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks])
            axes.minorticks_off()
            axes.set_title(title)
            axes.set_xlabel("minutes of training speech")
            axes.set_ylabel("WER, %")
        axes.legend(loc="best")
        return save_figure(figure, folder, "small_data")[0]


if __name__ == "__main__":
    sys.exit(main())
