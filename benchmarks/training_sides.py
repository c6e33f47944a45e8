"""Our side of benchmarks/training.py, in a process of its own; and the measurements of both sides."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.training_measures import FlopCounter, peak_memory_mb, side_figures, update_rows
from src.data import SpeechLoader, Utterance, create_loader, prepare_datasets
from src.data.labels import apply_case, resolve_case
from src.data.preparation import RecordingChecker
from src.data.sources.catalog import load_utterances
from src.evaluation import ModelEvaluator
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.utils import Config, load_config
from src.utils.config import DataConfig
from src.utils.tracking import ExperimentLogger

REAL_DEV_STRIDE = 4
TINY_VALIDATION = 2  # clips that our trainer validates on in the short run, whose weights are measured at its end
SAVE_MINUTES = 5.0  # between two states of the real run
_TIMED = ("begin", "train_step")

Figures = dict[str, Any]


def train_ours(job: Any) -> Figures:
    """Train by `WhisperTrainer`."""
    config = job_config(job)
    began = time.perf_counter()
    train, dev = read_clips(job.train, config), read_clips(job.dev, config)
    prep_sec = time.perf_counter() - began
    model, processor = WhisperModelManager(config).initialize_model()
    evaluated = create_loader(dev, processor, config)
    validated = evaluated if job.resumable else create_loader(dev[:TINY_VALIDATION], processor, config)
    experiment = ExperimentLogger(config, run_id="ours-augmented" if job.augment else "ours")
    trainer = WhisperTrainer(
        model,
        processor,
        create_loader(train, processor, config, shuffle=True),
        validated,
        config,
        experiment=experiment,
    )
    flops = FlopCounter(model)
    if job.resumable:
        _watch_epochs(experiment, model, processor, evaluated, job)
        trainer.resume("auto")
    cpu_sec: list[float] = []
    experiment.subscribe(lambda row: cpu_sec.append(time.process_time()) if row["event"] in _TIMED else None)
    experiment.log("begin")
    trainer.train()
    peak_mb = peak_memory_mb(job.device)
    events = [json.loads(line) for line in experiment.metrics_path.read_bytes().splitlines()]  # bytes: no U+2028
    rows = update_rows(events, batch_size=job.batch_size)
    if not job.resumable:  # else there are evaluations in between
        for row, before, after in zip(rows, cpu_sec, cpu_sec[1:], strict=False):
            row["cpu_sec"] = after - before
    figures = side_figures(job, rows, flops, peak_mb)
    figures |= {"prep_sec": prep_sec, "prep_bytes": 0}
    if job.resumable:
        figures["by_epoch"] = _epochs(events, figures["update_sec"], job)
    elif job.evaluate:
        figures |= word_error_rates(model, processor, evaluated, job, ("dynamic", "full"))
    return figures


def measure_stock(job: Any) -> Figures:
    """Measure the weights that both sides begin with; they know the full context only."""
    config = job_config(job)
    model, processor = WhisperModelManager(config).initialize_model()
    loader = create_loader(read_clips(job.dev, config), processor, config)
    return word_error_rates(model, processor, loader, job, ("full",))


def job_config(job: Any) -> Config:
    """Return our configuration of a job."""
    folder = Path(job.folder)
    overrides = {
        "seed": job.seed,
        "device": job.device,
        "precision": job.precision,
        "model": {"variant": job.weights, "language": job.language},
        "data.label_case": "keep",  # texts were recased when the clips were chosen
        "augmentation.enabled": job.augment,
        "training": {
            "epochs": job.epochs,
            "batch_size": job.batch_size,
            "batch_seconds": job.batch_seconds,
            "method": "full",
            "learning_rate": job.learning_rate,
            "warmup_ratio": job.warmup_updates / job.planned_updates,
            "full_context_prob": job.full_context_prob,
        },
        "checkpoints.save_minutes": SAVE_MINUTES if job.resumable else None,
        "guard.source": "none",
        "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
    }
    return load_config(None, overrides=overrides)


def choose_clips(
    train: Path | None, dev: Path | None, counts: tuple[int, int] | None, wanted: int, *, targets: tuple[Path, Path]
) -> int:
    """Choose clips at a stride, recase their texts, and write them to two Parquet files.

    Args:
        train, dev: Parquet files; the training and validation clips of the bundled sample where None.
        counts: of training and dev clips; None takes all training clips, and every fourth of dev.
        wanted: of the training clips, those that are trained on.
    Returns: training clips written.
    """
    if train is None or dev is None:
        splits = prepare_datasets(load_config(None, overrides={"data.label_case": "keep"}))
        parts = [splits.train, splits.validation]
    else:
        parts = [load_utterances(DataConfig(source="parquet", path=path)) for path in (train, dev)]
    if counts is None:
        parts[1] = parts[1][::REAL_DEV_STRIDE]
    else:
        parts = [_stride(part, count) for part, count in zip(parts, counts, strict=True)]
        parts[0] = _stride(parts[0], wanted)
    case = resolve_case([utterance.text for utterance in parts[0]], "auto")
    for part, target in zip(parts, targets, strict=True):
        rows = [
            {
                "id": f"{index:05d}",
                "audio": {"bytes": read_recording(utterance), "path": None},
                "text": apply_case(utterance.text, case),
                "speaker": utterance.speaker,
            }
            for index, utterance in enumerate(part)
        ]
        pq.write_table(pa.Table.from_pylist(rows), target, row_group_size=100)
    return len(parts[0])


def read_clips(path: str, config: Config) -> list[Utterance]:
    """List and check the clips of a file, as `prepare_datasets` does."""
    listed = load_utterances(DataConfig(source="parquet", path=Path(path)))
    return RecordingChecker(config).take(Path(path).stem, listed, None)


def word_error_rates(
    model: Any, processor: Any, loader: SpeechLoader, job: Any, contexts: Sequence[str]
) -> dict[str, float]:
    """Return `wer_own` and `wer_full`, with their intervals, by the contexts asked for.

    The texts are written to the job's predictions.jsonl, by the name of the side and the context.
    """
    evaluator, before = ModelEvaluator(model, processor, job_config(job)), model.audio_context
    found: dict[str, float] = {}
    for context in contexts:
        model.audio_context = context
        result = evaluator.evaluate_dataset(loader, name=f"{job.name} {context}")
        result.write_predictions(Path(job.folder, "predictions.jsonl"))
        key = "wer_own" if context == "dynamic" else "wer_full"
        found |= {key: result.wer, f"{key}_low": result.wer_low, f"{key}_high": result.wer_high}
    model.audio_context = before
    return found


def _watch_epochs(experiment: ExperimentLogger, model: Any, processor: Any, loader: SpeechLoader, job: Any) -> None:
    """After each epoch, whose validation is at own length, measure at full context too, into the run's metrics."""

    def measure(row: Mapping[str, Any]) -> None:
        if row["event"] == "epoch":
            rates = word_error_rates(model, processor, loader, job, ("full",))
            experiment.log("epoch_full_context", epoch=row["epoch"], **rates)

    experiment.subscribe(measure)


def _epochs(events: Sequence[Mapping[str, Any]], update_sec: Sequence[float], job: Any) -> list[Figures]:
    """Return one row per epoch: updates and seconds of training so far, error rates; of a repeated epoch the last."""
    updates = math.ceil(job.clips / job.batch_size)
    own = {int(event["epoch"]): event["val_wer"] for event in events if event["event"] == "epoch"}
    full = {int(event["epoch"]): event["wer_full"] for event in events if event["event"] == "epoch_full_context"}
    return [
        {
            "epoch": epoch,
            "updates": epoch * updates,
            "train_sec": sum(update_sec[: epoch * updates]),
            "wer_own": own[epoch],
            "wer_full": full[epoch],
        }
        for epoch in sorted(own)
    ]


def _stride(items: list[Utterance], count: int) -> list[Utterance]:
    """Take `count` at equal distances; all if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_recording(utterance: Utterance) -> bytes:
    """Return the encoded file, wherever it is."""
    audio = utterance.audio
    return audio if isinstance(audio, bytes) else audio.read_bytes() if isinstance(audio, Path) else audio.read()
