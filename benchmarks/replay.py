"""Measure what general speech among the training examples keeps: `data.replay` of 0, 5, 10 and 20 %.

    python benchmarks/replay.py [--train FILE.parquet] [--general FOLDER] [--shares 0 0.05 0.1 0.2] [--quick]

Each share tunes a model of its own (`--variant`, tiny.en) on the same clips, the bundled ones by default, for the same
number of epochs; the test set and a guard set are measured with each and with the stock model, the guard set against
stock with an interval of the difference by speaker. `--general` is a folder of general speech: `--guard-clips` of it
are measured and the others replayed; without it both come from the Hub, and offline from what is bundled. The last line
printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import percent_interval, points, show
from scripts.command_line import path_argument
from src.data import Utterance, create_dataloaders, create_loader, prepare_datasets
from src.data.preparation import DatasetSplits
from src.evaluation import EvaluationResult, ModelEvaluator, fill_languages, prepare_guard_set
from src.evaluation.evaluator import compare_predictions
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.utils import Config, load_config, set_seed

SHARES = (0.0, 0.05, 0.1, 0.2)
STOCK = "stock"
Results = dict[str, EvaluationResult]


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        configs = {f"{share:g}": settings(arguments, share, Path(folder)) for share in arguments.shares}
        prepared = {name: prepare_datasets(config) for name, config in configs.items()}
        first = next(iter(configs.values()))
        everything = [clip for splits in prepared.values() for clip in splits.train]
        guard = prepare_guard_set(first, exclude=everything)
        if guard is None:
            raise SystemExit("no guard set in the language of the data: give --general FOLDER")
        test = next(iter(prepared.values())).test
        found = {STOCK: measure(arguments.variant, test, guard.utterances, first)}
        seconds: dict[str, float] = {}
        for name, config in configs.items():
            began = time.perf_counter()
            tuned = train(config, prepared[name])
            seconds[name] = time.perf_counter() - began
            found[name] = measure(tuned, test, guard.utterances, config)
            print(row(name, prepared[name], found, seconds), flush=True)
    note = (
        f"{arguments.variant}, {arguments.epochs} epochs of {len(next(iter(prepared.values())).train)} clips and the "
        f"replayed ones; test {len(test)} clips, guard set {len(guard.utterances)} clips of {Path(guard.name).name}."
    )
    rows = [row(name, prepared.get(name), found, seconds) for name in found]
    show("Replay of general speech", rows, note, record=not (arguments.quick or arguments.no_record))
    print(json.dumps({name: {key: each.rate for key, each in results.items()} for name, results in found.items()}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=path_argument, help="a Parquet file in the Hugging Face audio layout")
    parser.add_argument("--general", type=path_argument, help="a folder source of general speech")
    parser.add_argument("--guard-clips", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--variant", default="tiny.en")
    parser.add_argument("--language", default="en")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-clips", type=int, help="at most so many training clips")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shares, arguments.epochs, arguments.max_clips = (0.0, 0.2), 1, 12
    return arguments


def settings(arguments: argparse.Namespace, share: float, folder: Path) -> Config:
    data: dict[str, Any] = {"max_train": arguments.max_clips, "num_workers": 0, "replay": {"share": share}}
    guard: dict[str, Any] = {"max_clips": arguments.guard_clips}
    if arguments.quick:
        data |= {"max_validation": 4, "max_test": 8}
    if arguments.train is not None:
        data |= {"source": "parquet", "path": arguments.train}
    if arguments.general is not None:
        general = {"source": "folder", "path": arguments.general}
        data["replay"] |= general
        guard |= general
    return load_config(
        None,
        overrides={
            "model": {"variant": arguments.variant, "language": arguments.language},
            "data": data,
            "guard": guard,
            "training": {
                "epochs": arguments.epochs, "batch_size": 8, "full_context_prob": 0.0,
                "learning_rate": arguments.learning_rate,
            },
            "checkpoints.save_minutes": None,
            "paths": {key: folder / f"{share:g}" / key for key in ("runs_dir", "checkpoints_dir")},
        },
    )  # fmt: skip


def train(config: Config, splits: DatasetSplits) -> str:
    """Tune a model and return the folder of the best one."""
    set_seed(config.seed)
    model, processor = WhisperModelManager(config).initialize_model()
    loaders = create_dataloaders(fill_languages(splits, model, processor, config), processor, config)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
    trainer.train()
    return str(trainer.best_model_dir)


def measure(folder: str, test: Sequence[Utterance], guard: Sequence[Utterance], config: Config) -> Results:
    model, processor = WhisperModelManager(config).initialize_model(folder)
    evaluator = ModelEvaluator(model, processor, config)
    return {
        name: evaluator.evaluate_dataset(create_loader(clips, processor, config), name=name)
        for name, clips in (("test", test), ("guard", guard))
    }


def row(
    name: str, splits: DatasetSplits | None, found: dict[str, Results], seconds: dict[str, float]
) -> dict[str, str]:
    """Lay one model out."""
    against = "-"
    if name != STOCK:
        against = points(compare_predictions(found[STOCK]["guard"].rows, found[name]["guard"].rows))
    replayed = sum(clip.id.startswith("replay/") for clip in splits.train) if splits else 0
    return {
        "replay": name if name == STOCK else f"{100 * float(name):g} %",
        "its clips": str(replayed),
        **{f"{key} WER": percent_interval(each.rate, each.low, each.high) for key, each in found[name].items()},
        "guard, against stock": against,
        "training": f"{seconds[name]:.0f} s" if name in seconds else "-",
    }


if __name__ == "__main__":
    sys.exit(main())
