"""Measure context adaptation: stock and adapted weights, each padded to 30 s and at the audio's own length.

    python benchmarks/adaptation.py [--train FILE.parquet --dev FILE.parquet] [--variant tiny.en] [--quick]

The model is adapted to the training clips without their transcripts, and all four are measured on the same clips of
other speakers, against theirs. The last line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.benchmarking import append_table, read, recased, strided
from scripts.command_line import path_argument
from src.data.loader import create_loader
from src.data.preparation import find_shared_speakers
from src.data.sources.catalog import load_utterances
from src.data.utterance import Utterance
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator, compare_predictions
from src.models.whisper_model import WhisperModelManager
from src.training.adapt import AdaptationResult, adapt_context
from src.utils.config import Config, load_config
from src.utils.errors import DataError
from src.utils.runtime import set_seed

QUICK_TRAIN_CLIPS, QUICK_DEV_CLIPS, QUICK_STEPS = 16, 8, 6
Results = dict[str, EvaluationResult]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train", type=path_argument, help="Parquet in the Hugging Face audio layout; default: bundled sample"
    )
    parser.add_argument("--dev", type=path_argument, help="likewise, of other speakers")
    parser.add_argument("--variant", default="tiny.en")
    parser.add_argument("--train-clips", type=int, default=200, help="clips to adapt on, at a stride over all")
    parser.add_argument("--dev-clips", type=int, default=100, help="clips to measure on, at a stride over all")
    parser.add_argument("--steps", type=int, default=None, help="updates; default: that of adapt_context")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips and updates, nothing recorded")
    arguments = parser.parse_args()
    if (arguments.train is None) != (arguments.dev is None):
        parser.error("give both --train and --dev, or neither")
    if arguments.quick:
        arguments.train_clips, arguments.dev_clips, arguments.steps = QUICK_TRAIN_CLIPS, QUICK_DEV_CLIPS, QUICK_STEPS
    results, adaptation = run(arguments)
    rows = table(results)
    for row in rows:
        print("  ".join(f"{value:<28}" for value in row.values()))
    if not arguments.quick:
        append_table(f"Context adaptation of {arguments.variant}", rows, note=describe(results, adaptation))
    print(json.dumps({f"wer_{name}": result.wer for name, result in results.items()}))
    return 0


def run(arguments: argparse.Namespace) -> tuple[Results, AdaptationResult]:
    """Measure, adapt, measure again."""
    config = load_config(None, overrides={"model.variant": arguments.variant, "model.language": "en"})
    set_seed(config.seed)
    train, dev = load_sets(arguments)
    model, processor = WhisperModelManager(config).initialize_model()
    loader = create_loader([recased(utterance, config.data) for utterance in dev], processor, config)
    evaluator = ModelEvaluator(model, processor, config)
    stock = measure(evaluator, model, loader, "stock")
    chosen: dict[str, Any] = {} if arguments.steps is None else {"steps": arguments.steps}
    adaptation = adapt_context(model, train, processor=processor, config=config, seed=config.seed, **chosen)
    return {**stock, **measure(evaluator, model, loader, "adapted")}, adaptation


def load_sets(arguments: argparse.Namespace) -> tuple[list[Utterance], list[Utterance]]:
    """Return clips to adapt on and clips to measure on, whose speakers are others."""
    if arguments.train is None:
        listed = load_utterances(Config().data)
        train = [utterance for utterance in listed if utterance.meta["split"] == "train"]
        dev = [utterance for utterance in listed if utterance.meta["split"] != "train"]
    else:
        train, dev = (read(path) for path in (arguments.train, arguments.dev))
    train, dev = strided(train, arguments.train_clips), strided(dev, arguments.dev_clips)
    shared = find_shared_speakers([train, dev])
    if shared:
        raise DataError(f"speakers {', '.join(shared)} are in both sets; measure on speakers that were not adapted to")
    return train, dev


def measure(evaluator: ModelEvaluator, model: Any, loader: Any, weights: str) -> Results:
    """Evaluate weights at both contexts, whatever they were made for; leave the model's own context as it was."""
    before = model.audio_context
    results = {}
    for context in ("full", "dynamic"):
        model.audio_context = context
        results[f"{weights}_{context}"] = evaluator.evaluate_dataset(loader, name=f"{weights}_{context}")
    model.audio_context = before
    return results


def table(results: Results) -> list[dict[str, str]]:
    """Lay the results out."""
    return [
        {
            "weights": name.split("_")[0],
            "audio context": {"full": "padded to 30 s", "dynamic": "own length + 0.5 s"}[result.audio_context],
            "WER [95% interval]": f"{result.wer:.3f} [{result.wer_low:.3f}, {result.wer_high:.3f}]",
            "CER": f"{result.cer:.3f}",
            "insertions": str(result.insertions),
            "RTF": f"{result.rtf:.3f}",
        }
        for name, result in results.items()
    ]


def describe(results: Results, adaptation: AdaptationResult) -> str:
    """Say in words what the table was measured on, and whether the adapted model is as good as the stock one."""
    stock = results["stock_full"]
    compared = [
        f"{name.replace('_', ', ')} less stock, full: {difference.difference:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}], {difference.verdict}"
        for name in ("adapted_dynamic", "adapted_full")
        for difference in [compare_predictions(stock.rows, results[name].rows)]
    ]
    return (
        f"{stock.n} clips of {stock.num_blocks} {stock.blocks}s, {stock.reference_words} words, {stock.normalizer}. "
        f"Adapted without transcripts on {adaptation.clips} clips of other speakers: {adaptation.steps} updates, "
        f"{adaptation.seconds:.0f} s, of which {adaptation.teacher_sec:.0f} s the padded teacher. "
        "Stock and adapted weights compute the same at 30 s: where their RTF differs, others used the machine. "
        f"Differences in WER: {'; '.join(compared)}."
    )


if __name__ == "__main__":
    sys.exit(main())
