"""Compare a checkpoint with the stock model that it came from, on clips with transcripts.

    python scripts/evaluate.py --model checkpoints/best_model_hf
    python scripts/evaluate.py --model checkpoints/best_model_hf --data FILE.parquet --report report.html
    python scripts/evaluate.py --model checkpoints/best_model_hf --data FOLDER_WITH_METADATA_CSV --stock base.en

Without `--data` it is the test split of the bundled sample; of data with a column `split`, the rows of its test split.
Each row is measured in its own language (column `language`), else in `model.language`, else in the checkpoint's own,
else in the one that the stock model hears.

Writes the folder of a run, from which `--report` makes one HTML file. Prints rates with intervals and the verdict; the
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import (
    add_model,
    add_settings,
    check_model_path,
    model_argument,
    parse_settings,
    path_argument,
    reports_errors,
    run_main,
)
from src.data import create_loader
from src.data.preparation import DatasetSplits, RecordingChecker, enforce_skip_policy
from src.data.sources.catalog import load_utterances, unpack
from src.data.sources.manifest import find_manifests, is_manifest
from src.data.utterance import Utterance
from src.evaluation import EvaluationResult, ModelEvaluator, fill_languages
from src.evaluation.evaluator import compare_predictions
from src.evaluation.report.html import write_html_report
from src.evaluation.report.run_files import DATA_VERSIONS_DIR, MEASURED_EVENT, STOCK, TUNED, bootstrap_of
from src.evaluation.report.summary import format_comparison, headline
from src.inference import with_clips
from src.models import WhisperModelManager
from src.models.dynamic_context import get_language
from src.utils import DataVersionManager, ExperimentLogger, load_config, setup_logging
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from src.utils.languages import normalize_plain
from src.utils.runtime import set_seed

logger = logging.getLogger("evaluate")

QUICK = {"data.max_test": 8, "evaluation.bootstrap_samples": 200}
ENGLISH_VOCABULARY = 51_864  # tokens; multilingual models have one or two more
STOCK_BY_SHAPE = {  # (width, layers of the decoder)
    (384, 4): "tiny",
    (512, 6): "base",
    (768, 12): "small",
    (1024, 24): "medium",
    (1280, 4): "large-v3-turbo",
    (1280, 2): "distil",
}


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, and the name that it was loaded by."""

    variant: str
    model: Any
    processor: Any


@reports_errors
def main() -> int:
    arguments = parse_arguments()
    setup_logging("INFO")
    print(json.dumps(run(arguments)))
    return 0


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--stock", type=model_argument, help="to compare with; default: that of the checkpoint's size")
    parser.add_argument("--no-stock", action="store_true", help="measure the checkpoint alone: no verdict")
    parser.add_argument("--data", type=path_argument, help="Parquet file, or a folder with audio and metadata.csv")
    parser.add_argument("--max-clips", type=int, help="clips at most, chosen by hash")
    parser.add_argument(
        "--report", type=path_argument, metavar="FILE.html", help="write what was found as one HTML file"
    )
    parser.add_argument(
        "--run-dir", type=path_argument, help="for the run's files; default: a new one under paths.runs_dir"
    )
    add_settings(parser)
    parser.add_argument("--quick", action="store_true", help="a few clips: shows that everything runs")
    arguments = parser.parse_args(given)
    if arguments.stock and arguments.no_stock:
        parser.error("give --stock or --no-stock, not both")
    if arguments.max_clips is not None and arguments.max_clips < 1:
        parser.error("--max-clips: at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, compare, report; return the figures of the last line."""
    check_model_path(arguments.model)
    config = load_config(arguments.config, profile=arguments.profile, overrides=overrides_of(arguments))
    run_dir = arguments.run_dir or config.paths.runs_dir / time.strftime("evaluate-%Y%m%d-%H%M%S")
    if (run_dir / "metrics.jsonl").exists():  # its configuration would be replaced
        raise DataError(f"--run-dir {run_dir}: holds a run already; choose another folder, or remove that one")
    set_seed(config.seed)
    models = load_models(arguments, config)
    language = config.model.language or get_language(models[TUNED].model)
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"language": language}),
        "paths": config.paths.model_copy(update={"runs_dir": run_dir.parent}),
    })  # fmt: skip
    splits = DatasetSplits([], [], read_clips(config), label_case="keep", task=config.model.task)
    listener = models.get(STOCK, models[TUNED])
    clips = fill_languages(splits, listener.model, listener.processor, config).test
    with ExperimentLogger(config, run_id=run_dir.name) as experiment:
        log_origin(experiment, models, clips, arguments.data, config)
        results: dict[str, EvaluationResult] = {}
        for name, loaded in models.items():
            loader = create_loader(clips, loaded.processor, config)
            results[name] = ModelEvaluator(loaded.model, loaded.processor, config).evaluate_dataset(loader, name=name)
            results[name].save(experiment)
    print(format_comparison(results))
    print(f"run: {run_dir}")
    if arguments.report is not None:
        write_html_report(run_dir, arguments.report, audio=clips)
    return figures_of(results, arguments.report)


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the options mean; `--set` has the last word."""
    overrides: dict[str, Any] = {"model.variant": arguments.model, "data.source": "sample", "data.sources": []}
    if arguments.data is not None:
        overrides |= {"data.source": source_of(arguments.data), "data.path": str(arguments.data)}
    overrides |= QUICK if arguments.quick else {}
    overrides |= {} if arguments.max_clips is None else {"data.max_test": arguments.max_clips}
    return overrides | parse_settings(arguments)


def source_of(data: Path) -> str:
    """Return which adapter reads a path."""
    if not data.exists():
        raise DataError(f"--data {data}: no such file or folder; give a Parquet file, or a folder with metadata.csv")
    data = unpack(data)
    if data.is_file():
        return "folder" if is_manifest(data) else "parquet"
    return "parquet" if not find_manifests(data) and any(data.rglob("*.parquet")) else "folder"


def load_models(arguments: argparse.Namespace, config: Config) -> dict[str, Loaded]:
    """Load the stock model first, as it is measured first; before any clip is decoded, so that an error comes soon."""
    manager = WhisperModelManager(config)
    tuned = Loaded(arguments.model, *manager.initialize_model(arguments.model))
    if arguments.no_stock:
        return {TUNED: tuned}
    variant = arguments.stock or stock_variant(tuned.model.config)
    return {STOCK: Loaded(variant, *manager.initialize_model(variant)), TUNED: tuned}


def stock_variant(model_config: Any) -> str:
    """Return the stock model of a checkpoint's shape."""
    shape = model_config.d_model, model_config.decoder_layers
    if shape not in STOCK_BY_SHAPE:
        raise ModelError(
            f"the stock model of the checkpoint is unknown: width {shape[0]} with {shape[1]} decoder "
            "layers is no published size; name it with --stock, or measure alone with --no-stock"
        )
    return STOCK_BY_SHAPE[shape] + (".en" if model_config.vocab_size == ENGLISH_VOCABULARY else "")


def read_clips(config: Config) -> list[Utterance]:
    """List, check and recase the clips to measure on."""
    listed = load_utterances(with_clips(config).data)
    tested = [clip for clip in listed if clip.split == "test"]
    if not tested:
        logger.info("no test split in the data: all %d rows are measured", len(listed))
        tested = listed
    if not any(normalize_plain(clip.text) for clip in tested):
        raise DataError(
            f"none of the {len(tested)} references has a word, so there is nothing to measure against; give data with "
            "transcripts in a column text, sentence, transcription or transcript"
        )
    checker = RecordingChecker(config)
    checked = checker.take("test", tested, config.data.max_test)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), config.data.max_skip_fraction)
    splits = DatasetSplits(
        [], [], checked, label_case="keep", task=config.model.task, label_cases=config.data.label_cases
    )
    return splits.with_label_case(config.data.label_case).test


def log_origin(
    experiment: ExperimentLogger,
    models: Mapping[str, Loaded],
    clips: Sequence[Utterance],
    data: Path | None,
    config: Config,
) -> None:
    """Log what is measured, so that a report can give the command to repeat it."""
    stock = models.get(STOCK)
    experiment.log(
        MEASURED_EVENT,
        model=models[TUNED].variant,
        stock=None if stock is None else stock.variant,
        data=data,
        max_clips=config.data.max_test,
        clips=len(clips),
    )
    name = "bundled sample" if data is None else data.name
    versions = DataVersionManager(experiment.dir / DATA_VERSIONS_DIR)
    versions.log_dataset_version(dataset_name=name, version=experiment.run_id, metadata={}, utterances=clips)


def figures_of(results: Mapping[str, EvaluationResult], report: Path | None) -> dict[str, Any]:
    """Return the last line: the headline by its name ("wer", "cer", "mean"), clips, verdict, where the report is."""
    tuned, stock = results[TUNED], results.get(STOCK)
    metric, languages = headline(tuned).key, tuned.rates_by_language
    by_language = {code: {headline(vars(rate)).key: round(rate.rate, 4)} for code, rate in languages.items()}
    return {
        metric: round(tuned.rate, 4),
        f"stock_{metric}": None if stock is None else round(stock.rate, 4),
        **({"languages": by_language} if len(languages) > 1 else {}),
        "n": tuned.n,
        "verdict": None if stock is None else compare_predictions(stock.rows, tuned.rows, bootstrap_of(tuned)).verdict,
        "report": None if report is None else str(report),
    }


if __name__ == "__main__":
    run_main(main)
