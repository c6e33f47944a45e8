"""Measure what general speech among the training examples keeps: `data.replay` of 0, 5, 10 and 20 %.

    python benchmarks/replay.py --general prompts --guard-clips 60 --epochs 2
    python benchmarks/replay.py [--train FILE.parquet] [--general FOLDER] [--shares 0 0.05 0.1 0.2] [--quick]

Each share tunes a model of its own (`--variant`, tiny.en) on the same clips, the bundled ones by default, for the same
number of epochs; the test set and a guard set are measured with each and with the stock model, the guard set against
stock with an interval of the difference by speaker. So are mixes of the stock weights and those tuned without replay,
on the same axes: the figure shows WER gained on the test set against WER lost on the guard set. `--general` is a folder
of general speech, or `prompts` of Debian's telephone exchange: `--guard-clips` of it are measured and the others
replayed; without it both come from the Hub, and offline from what is bundled. The last line printed is one JSON object;
the table is appended to docs/BENCHMARKS.md, the figure is docs/images/replay.png.
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

import pandas as pd

from benchmarks.recipe import PROMPTS, read_english_prompts
from scripts.benchmarking import percent_interval, points, show
from scripts.command_line import path_argument
from src.data import Utterance, create_dataloaders, create_loader, prepare_datasets
from src.data.preparation import DatasetSplits
from src.evaluation import EvaluationResult, ModelEvaluator, fill_languages, prepare_guard_set
from src.evaluation.evaluator import compare_predictions
from src.evaluation.visualization.style import new_figure
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.training.mixing import load_mix
from src.utils import Config, load_config, set_seed
from src.utils.figures import BLUE, ORANGE, save_figure

SHARES, MIXES = (0.0, 0.05, 0.1, 0.2), (0.25, 0.5, 0.75)
STOCK, MIX = "stock", "mix "
Results = dict[str, EvaluationResult]


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        if str(arguments.general) == PROMPTS:
            arguments.general = write_prompts(Path(folder))
        configs = {f"{share:g}": settings(arguments, share, Path(folder)) for share in arguments.shares}
        prepared = {name: prepare_datasets(config) for name, config in configs.items()}
        first = next(iter(configs.values()))
        everything = [clip for splits in prepared.values() for clip in splits.train]
        guard = prepare_guard_set(first, exclude=everything)
        if guard is None:
            raise SystemExit("no guard set in the language of the data: give --general FOLDER")
        test = next(iter(prepared.values())).test
        found = {STOCK: measure(arguments.variant, None, test, guard.utterances, first)}
        seconds: dict[str, float] = {}
        for name, config in configs.items():
            began = time.perf_counter()
            tuned = str(train(config, prepared[name]).best_model_dir)
            seconds[name] = time.perf_counter() - began
            shares = arguments.mixes if name == "0" else ()
            for share in (*shares, 1.0):
                named = name if share == 1 else f"{MIX}{share:g}"
                found[named] = measure(tuned, share, test, guard.utterances, config)
                print(row(named, prepared.get(named), found, seconds), flush=True)
    note = (
        f"{arguments.variant}, {arguments.epochs} epochs of {len(next(iter(prepared.values())).train)} clips and the "
        f"replayed ones; test {len(test)} clips, guard set {len(guard.utterances)} clips of {Path(guard.name).name}."
    )
    rows = [row(name, prepared.get(name), found, seconds) for name in found]
    record = not (arguments.quick or arguments.no_record)
    show("Replay of general speech", rows, note, record=record)
    draw(found, ROOT / "docs" / "images" if record else Path(tempfile.mkdtemp()))
    print(json.dumps({name: {key: each.rate for key, each in results.items()} for name, results in found.items()}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=path_argument, help="a Parquet file in the Hugging Face audio layout")
    parser.add_argument("--general", type=path_argument, help=f"a folder of general speech, or {PROMPTS}")
    parser.add_argument("--guard-clips", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--mixes", type=float, nargs="*", default=MIXES, help="shares of the tuned weights")
    parser.add_argument("--variant", default="tiny.en")
    parser.add_argument("--language", default="en")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-clips", type=int, help="at most so many training clips")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shares, arguments.mixes, arguments.epochs, arguments.max_clips = (0.0, 0.2), (0.5,), 1, 12
    return arguments


def write_prompts(folder: Path) -> Path:
    """Write the prompts of a telephone exchange as a folder source."""
    general = folder / PROMPTS
    general.mkdir()
    rows = []
    for prompt in read_english_prompts(Config().paths.cache_dir / "speech"):
        rows.append({"file_name": f"{prompt.id.replace('/', '_')}.flac", "text": prompt.text})
        Path(general, rows[-1]["file_name"]).write_bytes(prompt.audio)  # type: ignore[arg-type]
    pd.DataFrame(rows).to_csv(general / "metadata.csv", index=False)
    return general


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


def train(config: Config, splits: DatasetSplits) -> WhisperTrainer:
    """Tune a model; the trainer has the folder of the best one."""
    set_seed(config.seed)
    model, processor = WhisperModelManager(config).initialize_model()
    loaders = create_dataloaders(fill_languages(splits, model, processor, config), processor, config)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
    trainer.train()
    return trainer


def measure(
    folder: str, share: float | None, test: Sequence[Utterance], guard: Sequence[Utterance], config: Config
) -> Results:
    """Measure a model, with a share of its weights and the rest of stock."""
    model, processor = WhisperModelManager(config).initialize_model(folder)
    if share not in (None, 1.0):
        stock, _ = WhisperModelManager(config).initialize_model()
        tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_mix(model, stock.state_dict(), tuned, share)
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
    named = name
    if name.startswith(MIX):
        named = f"none, {100 * float(name.removeprefix(MIX)):g} % of the weights tuned"
    elif name != STOCK:
        named = f"{100 * float(name):g} %"
    return {
        "replay": named,
        "its clips": str(sum(clip.id.startswith("replay/") for clip in splits.train)) if splits else "-",
        **{f"{key} WER": percent_interval(each.rate, each.low, each.high) for key, each in found[name].items()},
        "guard, against stock": against,
        "training": f"{seconds[name]:.0f} s" if name in seconds else "-",
    }


def draw(found: dict[str, Results], folder: Path) -> Path:
    """Draw what replay and mixing gain on the test set against what they lose on the guard set, in points of WER."""
    stock = found[STOCK]
    shares = [name for name in found if name != STOCK and not name.startswith(MIX)]
    mixes = [STOCK, *(name for name in found if name.startswith(MIX)), *(name for name in shares if name == "0")]
    with new_figure(6, 4) as figure:
        axes = figure.subplots()
        for names, color, marker, label in (
            (mixes, BLUE, "o", "mixes: share of the tuned weights"),
            (shares, ORANGE, "^", "tuned with replay: its share"),
        ):
            gained = [100 * (stock["test"].rate - found[name]["test"].rate) for name in names]
            lost = [100 * (found[name]["guard"].rate - stock["guard"].rate) for name in names]
            axes.plot(gained, lost, marker=marker, color=color, label=label)
            for name, x, y in zip(names, gained, lost, strict=True):
                share = 0.0 if name == STOCK else float(name.removeprefix(MIX))
                text = f"{100 * (1 - (name == STOCK) if names is mixes and name in (STOCK, '0') else share):g} %"
                below = names is shares
                axes.annotate(text, (x, y), (0, -14 if below else 7), textcoords="offset points", ha="center",
                              color=color)  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("WER gained on the target speech, points")
        axes.set_ylabel("WER lost on general speech, points")
        axes.legend(loc="best")
        return save_figure(figure, folder, "replay")[0]


if __name__ == "__main__":
    sys.exit(main())
