"""Before a training: does it fit, how many updates, how long.

Time and memory are tried on a copy of the model, with real batches and with the probe's: true for this machine and
these clips, at the price of the copy. The model, every random generator and every loader of the caller stay as they
are.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.data.batching import batch_generator
from src.data.features import FRAMES_PER_SEC, HOP_SAMPLES
from src.data.labels import resolve_case
from src.data.loader import SpeechLoader, create_loader
from src.data.preparation import DatasetSplits
from src.models.dynamic_context import DynamicWhisper
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import has_adapters, prepare_model, trainable
from src.training.probe import propose_batch_seconds
from src.training.schedule import count_updates, count_warmup
from src.training.state import random_state, restore_random_state
from src.training.updates import CPU_FRAMES
from src.utils.config import MAX_AUDIO_SEC, Config
from src.utils.distributed import world_size
from src.utils.errors import DeviceError, first_line
from src.utils.memory import free_memory_mb, run_disk_mb, run_memory_mb
from src.utils.runtime import choose_precision, is_out_of_memory, release_memory
from src.utils.validation import Check, CheckReport, EnvironmentReport, check_disk, environment_report

logger = logging.getLogger(__name__)

FEW_UPDATES = 50  # fewer teach a model little beyond when to stop
MEASURED_BATCHES = 2
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Preflight(CheckReport):
    """What a training will take.

    Attributes:
        updates, warmup_updates: of all epochs.
        memory_mb: weights, gradients and optimizer state on the device; activations come on top.
        disk_mb: below `paths.checkpoints_dir`, at most.
        training_sec: forward and backward of all epochs, without validation and saving; None where memory ran out.
    """

    updates: int
    warmup_updates: int
    memory_mb: float
    disk_mb: float
    training_sec: float | None
    title = "Pre-flight"


def preflight(
    config: Config,
    splits: DatasetSplits,
    model: DynamicWhisper,
    processor: Any,
    *,
    environment: EnvironmentReport | None = None,
) -> Preflight:
    """Look at a training before it starts.

    Args:
        splits: as the training will see them, with their final label case.
        model: stock, or as a trainer has prepared it; on its device, with room for a copy.
        processor: of the model.
        environment: what was found before; by default the machine is looked at anew, which imports torch once more.
    Raises: DataError: the labels cannot be made. ModelError, DeviceError: as training would, for a method or precision
        that cannot be.
    """
    before = random_state()
    try:
        return _look_at(config, splits, model, processor, environment or environment_report(config))
    finally:
        restore_random_state(*before)
        release_memory()


def _look_at(
    config: Config, splits: DatasetSplits, model: DynamicWhisper, processor: Any, environment: EnvironmentReport
) -> Preflight:
    serial = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    loader = create_loader(splits.train, processor, serial, shuffle=True)
    trial = _prepared_copy(model, config)
    total = sum(parameter.numel() for parameter in trial.parameters())
    trained = sum(parameter.numel() for parameter in trainable(trial))
    training, kept = config.training, config.checkpoints.save_total_limit
    memory_mb = run_memory_mb(total, trained=trained, optimizer=training.optimizer)
    disk_mb = run_disk_mb(total, trained=trained, kept=kept, optimizer=training.optimizer)
    batches = [loader.batches_in(epoch) for epoch in range(training.epochs)]
    updates = sum(count_updates(number, training.gradient_accumulation_steps, 1) for number in batches)
    warmup = count_warmup(updates, training.warmup_ratio)
    seconds = _try_batches(trial, loader, config)
    checks = (
        *(check for check in environment.checks if check.status == "error"),
        _check_labels(splits),
        _check_updates(updates, warmup, loader, config),
        _check_memory(trial, memory_mb),
        *_try_largest_batch(trial, loader, config),
        check_disk("disk", config.paths.checkpoints_dir, disk_mb),
        _check_time(seconds, trial, updates),
    )
    return Preflight(checks, updates, warmup, memory_mb, disk_mb, seconds)


def _prepared_copy(model: DynamicWhisper, config: Config) -> DynamicWhisper:
    trial = copy.deepcopy(model)
    trial.audio_context = config.model.audio_context
    if not has_adapters(trial):
        prepare_model(trial, config.training)
    return trial


def _try_batches(model: DynamicWhisper, loader: SpeechLoader, config: Config) -> float | None:
    """Return the seconds of forward and backward of a whole training, from those of some batches; None if no memory."""
    try:
        return _measure_batches(model, loader, config)
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        logger.warning("no batch could be timed: %s", first_line(err))
        return None
    finally:
        model.zero_grad(set_to_none=True)


def _measure_batches(model: DynamicWhisper, loader: SpeechLoader, config: Config) -> float:
    training = config.training.model_copy(update={"full_context_prob": 0.0})  # these are reckoned below
    inputs = TrainingInputs(config.model_copy(update={"training": training}), model.config.num_mel_bins)
    loss = TokenLoss(model).train()
    dtype = getattr(torch, choose_precision(config.precision, model.device).precision)
    compute_sec = padded_sec = recorded_sec = 0.0
    batches = [_on_device(batch, model.device) for batch in itertools.islice(loader, MEASURED_BATCHES)]
    for number, batch in enumerate([batches[0], *batches]):
        began = time.perf_counter()
        features = inputs.features(batch, batch_generator(config.seed, 0, number))  # (B, mels, frames)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            total = loss(features, batch["decoder_input_ids"], batch["labels"])
        total.backward()
        float(total.detach())  # waits for the device
        if number:  # the first one allocates
            compute_sec += time.perf_counter() - began
            padded_sec += features.shape[0] * features.shape[2] / FRAMES_PER_SEC
            recorded_sec += sum(batch["durations"])
    clips = loader.dataset.utterances
    own_sec = sum(clip.duration_sec or 0.0 for clip in clips) * padded_sec / recorded_sec
    full = 1.0 if config.model.audio_context == "full" else config.training.full_context_prob
    audio_sec = (1 - full) * own_sec + full * MAX_AUDIO_SEC * len(clips)
    return config.training.epochs * audio_sec / world_size() * compute_sec / padded_sec


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rows = len(batch["ids"])
    if device.type == "cpu":
        rows = max(1, CPU_FRAMES * HOP_SAMPLES // batch["audio"].shape[1])
    cut = {key: value[:rows] for key, value in batch.items()}
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in cut.items()}


def _check_labels(splits: DatasetSplits) -> Check:
    texts = [utterance.text for utterance in splits.train]
    found = f"label case {splits.label_case!r}, for example {texts[0][:_SHOWN_CHARACTERS]!r}"
    if splits.label_case == "keep" and resolve_case(texts, "auto") != "keep":
        fix = "data.label_case: auto, or splits.with_label_case('sentence')"
        return Check("labels", "warning", f"{found}; Whisper finds capitals unlikely, and would learn them first", fix)
    return Check("labels", "ok", found)


def _check_updates(updates: int, warmup: int, loader: SpeechLoader, config: Config) -> Check:
    epochs = config.training.epochs
    found = (
        f"{updates} in {epochs} epoch(s), {warmup} of them warm-up; {len(loader.dataset)} clips in "
        f"{loader.batches_in(0)} batches"
    )
    if updates >= FEW_UPDATES:
        return Check("updates", "ok", found)
    return Check("updates", "warning", f"{found}: few", "raise training.epochs, or lower training.batch_size")


def _check_memory(trial: DynamicWhisper, needs_mb: float) -> Check:
    # the weights are there already, and their copy goes
    room_mb = free_memory_mb(trial.device) + 2 * sum(p.nbytes for p in trial.parameters()) / 1e6
    found = (
        f"{needs_mb:,.0f} MB of weights, gradients and optimizer state, {room_mb:,.0f} MB for them on {trial.device}"
    )
    if needs_mb <= room_mb:
        return Check("memory", "ok", found)
    return Check("memory", "error", found, "training.method: lora, or a smaller model.variant")


def _try_largest_batch(trial: DynamicWhisper, loader: SpeechLoader, config: Config) -> Iterator[Check]:
    """Let the probe try what the largest batch takes; not on a CPU, where batches go through in small pieces."""
    if trial.device.type == "cpu":
        return
    rows, clip_sec = max(map(len, loader.batch_sampler.batches(0))), _longest_sec(loader, config)
    largest_sec = max(clip_sec, min(rows * clip_sec, config.training.batch_seconds or math.inf))
    try:
        proposal = propose_batch_seconds(trial, config, clip_sec=clip_sec, max_seconds=largest_sec)
    except DeviceError as err:
        yield Check("largest batch", "error", first_line(err))
        return
    found = f"{proposal.fits_sec:.0f} s of audio fit at once, batches hold up to {largest_sec:.0f} s"
    if proposal.limit == "max_seconds":
        yield Check("largest batch", "ok", found)
    else:
        fix = f"training.batch_seconds: {proposal.batch_seconds:.0f}"
        yield Check("largest batch", "warning", f"{found}: they would go in pieces, slower", fix)


def _longest_sec(loader: SpeechLoader, config: Config) -> float:
    if config.model.audio_context == "full":
        return MAX_AUDIO_SEC
    if config.composition.concatenate_prob:
        return config.composition.max_concatenated_sec
    longest_sec = max(clip.duration_sec or 0.0 for clip in loader.dataset.utterances)
    return min(MAX_AUDIO_SEC, longest_sec + config.training.max_trailing_silence_sec)


def _check_time(seconds: float | None, trial: DynamicWhisper, updates: int) -> Check:
    if seconds is None:
        return Check("time", "warning", "unknown until the first update: memory ran out with the batches tried here")
    total = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    found = f"about {total} on {trial.device}, {seconds / updates:.2f} s an update"
    return Check("time", "ok", f"{found}, measured; validation and saving come on top")
