"""The peer's side of benchmarks/training.py, in a process of its own.

Nothing of this library is imported before the peer has been measured, so that its memory is its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from benchmarks import hf_recipe
from benchmarks.training_measures import FlopCounter, peak_memory_mb, side_figures

SAVE_UPDATES = 50  # between two states of the real run


def train_hf(job: Any) -> dict[str, Any]:
    """Train by the recipe; its weights are measured as ours are, at the full context that they were trained in."""
    processor = WhisperProcessor.from_pretrained(job.weights)
    if job.language is not None:
        processor.tokenizer.set_prefix_tokens(language=job.language, task="transcribe")
    folder = Path(job.folder, "hf")
    dataset, prep_sec, prep_bytes = hf_recipe.prepare_features(Path(job.train), processor, folder / "features")
    prepared = folder / "prepared.json"
    if job.resumable and prepared.exists():  # this time the features were there already
        prep_sec = json.loads(prepared.read_text(encoding="utf-8"))
    prepared.write_text(json.dumps(prep_sec), encoding="utf-8")
    model = WhisperForConditionalGeneration.from_pretrained(job.weights, dtype=torch.float32)
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
        workers=job.peer_workers,
        save_updates=SAVE_UPDATES if job.resumable else None,
    )
    rows = hf_recipe.fine_tune(model, processor, dataset, options, folder / "checkpoints")
    figures = side_figures(job, rows, flops, peak_memory_mb(job.device))
    figures |= {"prep_sec": prep_sec, "prep_bytes": prep_bytes}
    if job.evaluate:
        model.save_pretrained(folder / "model")
        figures |= measure_tuned(folder / "model", processor, job)
    shutil.rmtree(folder / "features")  # 1 MB a clip
    return figures


def measure_tuned(folder: Path, processor: Any, job: Any) -> dict[str, float]:
    """Return the error rate of saved weights, by the other side's evaluator."""
    from benchmarks import training_sides
    from src.data import create_loader
    from src.models.dynamic_context import DynamicWhisper

    config = training_sides.job_config(job)
    tuned = DynamicWhisper.from_pretrained(folder, dtype=torch.float32).to(job.device).eval()
    loader = create_loader(training_sides.read_clips(job.dev, config), processor, config)
    return training_sides.word_error_rates(tuned, processor, loader, job, ("full",))
