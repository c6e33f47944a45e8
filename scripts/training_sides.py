"""The processes of scripts/benchmark_training.py: each trains and measures one side, and writes what it found."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from scripts import hf_recipe
from scripts.training_measures import FlopCounter, measure_speed, peak_memory_mb, peak_tflops, update_rows
from src.data import SpeechLoader, Utterance, create_loader, prepare_datasets
from src.data.checking import check_listed
from src.data.labels import apply_case, resolve_case
from src.data.sources import load_utterances
from src.evaluation import ModelEvaluator
from src.models import WhisperModelManager
from src.models.dynamic_context import DynamicWhisper
from src.models.weights import resolve_weights
from src.training import WhisperTrainer
from src.utils import Config, load_config
from src.utils.config_schema import DataConfig
from src.utils.tracking import ExperimentLogger

REAL_DEV_STRIDE = 4
TINY_VALIDATION = 2  # clips that our trainer validates on in the short run, whose weights are measured at its end
SAVE_MINUTES, PEER_SAVE_UPDATES = 5.0, 50  # between two states of the real run
_TIMED = ("begin", "train_step")

Figures = dict[str, Any]


def run(job: Any) -> None:
    """Do a job and write its figures to `<folder>/<side>.json`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    torch.set_num_threads(job.threads)
    side = {"ours": train_ours, "hf": train_hf, "stock": measure_stock}[job.side]
    figures = side(job)
    name = f"{job.side}{'-augmented' if job.augment else ''}.json"
    Path(job.folder, name).write_text(json.dumps(figures), encoding="utf-8")


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
        _watch_epochs(experiment, model, processor, evaluated, config)
        trainer.resume("auto")
    cpu_sec: list[float] = []
    experiment.subscribe(lambda row: cpu_sec.append(time.process_time()) if row["event"] in _TIMED else None)
    experiment.log("begin")
    trainer.train()
    peak_mb = peak_memory_mb(job.device)
    events = [json.loads(line) for line in experiment.metrics_path.read_text(encoding="utf-8").splitlines()]
    rows = update_rows(events, batch_size=job.batch_size)
    if not job.resumable:  # else there are evaluations in between
        for row, before, after in zip(rows, cpu_sec, cpu_sec[1:], strict=False):
            row["cpu_sec"] = after - before
    figures = _figures(job, rows, flops, peak_mb)
    figures |= {"prep_sec": prep_sec, "prep_bytes": 0}
    if job.resumable:
        figures["by_epoch"] = _epochs(events, figures["update_sec"], job)
    elif job.evaluate:
        figures |= word_error_rates(model, processor, evaluated, config, ("dynamic", "full"))
    return figures


def train_hf(job: Any) -> Figures:
    """Train by the recipe; its weights are measured as ours are, at the full context that they were trained in."""
    config = job_config(job)
    weights = resolve_weights(job.variant, cache_dir=config.paths.cache_dir).path
    processor = WhisperProcessor.from_pretrained(weights)
    if not job.variant.endswith(".en"):
        processor.tokenizer.set_prefix_tokens(language="en", task="transcribe")
    folder = Path(job.folder, "hf")
    dataset, prep_sec, prep_bytes = hf_recipe.prepare_features(Path(job.train), processor, folder / "features")
    prepared = folder / "prepared.json"
    if job.resumable and prepared.exists():  # this time the features were there already
        prep_sec = json.loads(prepared.read_text(encoding="utf-8"))
    prepared.write_text(json.dumps(prep_sec), encoding="utf-8")
    model = WhisperForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    flops = FlopCounter(model)
    options = hf_recipe.RecipeOptions(
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        warmup_updates=job.warmup_updates,
        planned_updates=job.planned_updates,
        stop_after=job.stop_after,
        precision=job.precision,
        device=job.device,
        seed=job.seed,
        save_updates=PEER_SAVE_UPDATES if job.resumable else None,
    )
    rows = hf_recipe.fine_tune(model, processor, dataset, options, folder / "checkpoints")
    figures = _figures(job, rows, flops, peak_memory_mb(job.device))
    figures |= {"prep_sec": prep_sec, "prep_bytes": prep_bytes}
    if job.evaluate:
        model.save_pretrained(folder / "model")
        tuned = DynamicWhisper.from_pretrained(folder / "model", dtype=torch.float32).to(job.device).eval()
        loader = create_loader(read_clips(job.dev, config), processor, config)
        figures |= word_error_rates(tuned, processor, loader, config, ("full",))
    shutil.rmtree(folder / "features")  # 1 MB a clip
    return figures


def measure_stock(job: Any) -> Figures:
    """Measure the weights that both sides begin with; they know the full context only."""
    config = job_config(job)
    model, processor = WhisperModelManager(config).initialize_model()
    loader = create_loader(read_clips(job.dev, config), processor, config)
    return word_error_rates(model, processor, loader, config, ("full",))


def job_config(job: Any) -> Config:
    """Return our configuration of a job."""
    folder = Path(job.folder)
    multilingual = not job.variant.endswith(".en")
    overrides = {
        "seed": job.seed,
        "device": job.device,
        "precision": job.precision,
        "model": {"variant": job.variant, "language": "en" if multilingual else None},
        "data.label_case": "keep",  # texts were recased when the clips were chosen
        "augmentation.enabled": job.augment,
        "training": {
            "epochs": job.epochs,
            "batch_size": job.batch_size,
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
                "audio": {"bytes": _read(utterance), "path": None},
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
    return check_listed(Path(path).stem, listed, None, config, {}, [])


def word_error_rates(
    model: Any, processor: Any, loader: SpeechLoader, config: Config, contexts: Sequence[str]
) -> dict[str, float]:
    """Return `wer_own` and `wer_full`, with their intervals, by the contexts asked for."""
    before = model.audio_context
    found: dict[str, float] = {}
    for context in contexts:
        model.audio_context = context
        result = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name=context)
        key = "wer_own" if context == "dynamic" else "wer_full"
        found |= {key: result.wer, f"{key}_low": result.wer_low, f"{key}_high": result.wer_high}
    model.audio_context = before
    return found


def _watch_epochs(
    experiment: ExperimentLogger, model: Any, processor: Any, loader: SpeechLoader, config: Config
) -> None:
    """After each epoch, whose validation is at own length, measure at full context too, into the run's metrics."""

    def measure(row: Mapping[str, Any]) -> None:
        if row["event"] == "epoch":
            rates = word_error_rates(model, processor, loader, config, ("full",))
            experiment.log("epoch_full_context", epoch=row["epoch"], **rates)

    experiment.subscribe(measure)


def _epochs(events: Sequence[Mapping[str, Any]], update_sec: Sequence[float], job: Any) -> list[Figures]:
    """Return one row an epoch: updates and seconds of training so far, error rates; of a repeated epoch the last."""
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


def _figures(job: Any, rows: Sequence[Mapping[str, Any]], flops: FlopCounter, peak_mb: float) -> Figures:
    per_epoch = math.ceil(job.clips / job.batch_size)
    speed = measure_speed(rows, clips=round(job.clips * job.stop_after / per_epoch), batch_size=job.batch_size)
    peak = job.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if job.device == "cuda" else None)
    # of this session alone, where a stopped run went on
    tflop_per_update = flops.total / flops.updates / 1e12 if flops.updates else None
    return {
        **asdict(speed),
        "update_sec": [row["sec"] for row in rows],
        "peak_mb": peak_mb,
        "tflop_per_update": tflop_per_update,
        "mfu": tflop_per_update * len(rows) / speed.train_sec / peak if peak and tflop_per_update else None,
    }


def _stride(items: list[Utterance], count: int) -> list[Utterance]:
    """Take `count` at equal distances; all where there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _read(utterance: Utterance) -> bytes:
    audio = utterance.audio
    return audio if isinstance(audio, bytes) else audio.read_bytes() if isinstance(audio, Path) else audio.read()
