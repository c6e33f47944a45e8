"""Checks before a training: whether it fits, how many updates it makes, how long it takes, and the largest batch.

Time and memory are tried on a copy of the model, with real batches and with batches of noise: true for this machine and
these clips, at the price of the copy. The model, every random generator and every loader of the caller stay as they
are.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from src.data.audio import SAMPLE_RATE
from src.data.features import CONTEXT_SAMPLES, FRAMES_PER_SEC, HOP_SAMPLES, LogMel, padded_samples
from src.data.labels import IGNORE_INDEX, MAX_LABEL_TOKENS, resolve_case
from src.data.loader import OWN_LENGTH_SEC, SpeechLoader, create_loader, learns_own_length, settle_audio_context
from src.data.preparation import DatasetSplits
from src.data.training_batches import TrainingBatches
from src.models.dynamic_context import DynamicWhisper, get_cap_rates
from src.training.inputs import TrainingInputs, to_device
from src.training.loss import TokenLoss
from src.training.methods import HalfCopy, has_adapters, prepare_model, trainable
from src.training.state import random_state, restore_random_state
from src.training.updates import CPU_FRAMES, OWN_LENGTH_SLACK, build_optimizer, count_updates, count_warmup
from src.utils.config import MAX_AUDIO_SEC, Config
from src.utils.errors import DeviceError, OutOfMemoryError, first_line
from src.utils.languages import text_language, tokens_per_sec
from src.utils.memory import free_memory_mb, run_disk_mb, run_memory_mb
from src.utils.runtime import choose_precision, in_memory, release_memory, world_size
from src.utils.validation import Check, CheckReport, EnvironmentReport, Status, check_disk, environment_report

logger = logging.getLogger(__name__)

FEW_UPDATES = 50  # fewer teach a model little beyond when to stop
MEASURED_BATCHES = 2
SAFETY = 0.85  # of what fits: fragments, longer labels and validation need room too
_CONTEXT_SEC = CONTEXT_SAMPLES / SAMPLE_RATE  # 30


@dataclass(frozen=True)
class Preflight(CheckReport):
    """Estimated cost of a training."""

    updates: int  # of all epochs
    warmup_updates: int
    memory_mb: float  # weights, gradients and optimizer state on the device, without activations
    disk_mb: float  # below `paths.checkpoints_dir`, at most
    training_sec: float | None  # forward and backward of all epochs, without validation; None if memory ran out
    title = "Pre-flight"


def preflight(
    config: Config,
    splits: DatasetSplits,
    model: DynamicWhisper,
    processor: Any,
    *,
    environment: EnvironmentReport | None = None,
) -> Preflight:
    """Estimate time, memory and disk of a training before it starts, and check what could stop it.

    Args:
        config: of the training.
        splits: as the training will see them, with their final label case.
        model: stock, or as a trainer has prepared it; on its device, with room for a copy.
        processor: of the model.
        environment: found before; by default the machine is examined again, which imports torch once more.

    Raises:
        DataError: the labels cannot be made.
        ModelError, DeviceError: as training would raise them, for a method or precision that is impossible.
    """
    before = random_state()
    try:
        # the training's own loader, and a copy of the model as it will be trained
        serial = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
        loader = create_loader(splits.train, processor, serial, shuffle=True)
        trial = copy.deepcopy(model)
        clips = loader.dataset.utterances
        config, trial.audio_context = settle_audio_context(config, clips, model.audio_context)
        if not has_adapters(trial):
            prepare_model(trial, config.training)
        # what it takes
        training, kept = config.training, config.checkpoints.save_total_limit
        total, trained = (sum(p.numel() for p in each) for each in (trial.parameters(), trainable(trial)))
        half = _compute_dtype(config, trial.device) != torch.float32
        memory_mb = run_memory_mb(total, trained=trained, optimizer=training.optimizer, half_copy=half)
        disk_mb = run_disk_mb(total, trained=trained, kept=kept, optimizer=training.optimizer)
        batches = [loader.batches_in(epoch) for epoch in range(training.epochs)]
        updates = sum(count_updates(number, training.gradient_accumulation_steps) for number in batches)
        warmup = count_warmup(updates, training.warmup_ratio)
        seconds = None
        try:
            seconds = in_memory(lambda: _measure_batches(trial, loader, config))
        except OutOfMemoryError as err:
            logger.warning("no batch could be timed: %s", err)
        trial.zero_grad(set_to_none=True)
        # and whether that is a problem; the weights are there already, and their copy will be freed
        room_mb = free_memory_mb(trial.device) + 2 * sum(p.nbytes for p in trial.parameters()) / 1e6
        cost = "unknown until the first update: memory ran out with the batches tried here"
        if seconds is not None:
            total_time, each_sec = timedelta(seconds=round(seconds)), seconds / updates
            cost = f"about {total_time} h:min:s on {trial.device}, {each_sec:.2f} s per update; validation comes on top"
        checks = (
            *(check for check in (environment or environment_report(config)).checks if check.status == "error"),
            _check_labels(splits),
            _judge(
                "updates",
                updates >= FEW_UPDATES,
                f"{updates} in {training.epochs} epoch(s), {warmup} of them warm-up; {len(loader.dataset)} clips in "
                f"{batches[0]} batches",
                "raise training.epochs, or lower training.batch_size",
            ),
            _judge(
                "audio context",
                trial.audio_context == "full" or learns_own_length(clips, model.audio_context),
                "the audio's own length" if trial.audio_context == "dynamic" else "clips are padded to 30 s",
                f"less than {OWN_LENGTH_SEC / 60:g} min of speech do not teach a stock model its own length, and it "
                "would end longer audio early: model.audio_context: auto, or ADAPT_CONTEXT of the notebook",
            ),
            _judge(
                "memory",
                memory_mb <= room_mb,
                f"weights, gradients and optimizer state take {memory_mb:,.0f} of {room_mb:,.0f} MB on {trial.device}",
                "training.method: lora, or a smaller model.variant",
                otherwise="error",
            ),
            *_try_largest_batch(trial, loader, config),
            check_disk("disk", config.paths.checkpoints_dir, disk_mb),
            _judge("time", seconds is not None, cost),
        )
        return Preflight(checks, updates, warmup, memory_mb, disk_mb, seconds)
    finally:
        restore_random_state(*before)
        release_memory()


def _measure_batches(model: DynamicWhisper, loader: SpeechLoader, config: Config) -> float:
    """Return the seconds of forward and backward of a whole training, from those of some batches."""
    mels, training = model.config.num_mel_bins, config.training.model_copy(update={"full_context_prob": 0.0})
    own_length = config.model_copy(update={"training": training})  # batches of 30 s are added below
    loader.prepare_with(TrainingBatches(own_length, mels, durations_sec=loader.durations_sec(0)))
    inputs = TrainingInputs(config, mels)
    loss, half = _computing(model, config)
    compute_sec = padded_sec = recorded_sec = 0.0
    batches = list(itertools.islice(loader, MEASURED_BATCHES))
    if model.device.type == "cpu":  # as many rows as go through at once
        for batch in batches:
            rows = max(1, CPU_FRAMES * HOP_SAMPLES // batch["audio"].shape[1])
            batch.update({key: value if value is None else value[:rows] for key, value in batch.items()})
    for number, batch in enumerate([batches[0], *batches]):
        began = time.perf_counter()
        batch = to_device(batch, model.device)
        features = inputs.features(batch)  # (B, mels, frames)
        total = loss(features.to(loss.model.dtype), batch["decoder_input_ids"], batch["labels"])
        total.backward()
        if half is not None:
            half.collect()
        float(total.detach())  # waits for the device
        if number:  # the first one allocates
            compute_sec += time.perf_counter() - began
            padded_sec += features.shape[0] * features.shape[2] / FRAMES_PER_SEC
            recorded_sec += float(batch["audio_lengths"].sum()) / SAMPLE_RATE
    examples = [loader.durations_sec(epoch) for epoch in range(config.training.epochs)]
    own_sec = sum(map(sum, examples)) * padded_sec / recorded_sec
    full = 1.0 if config.model.audio_context == "full" else config.training.full_context_prob
    audio_sec = (1 - full) * own_sec + full * MAX_AUDIO_SEC * sum(map(len, examples))
    return audio_sec / world_size() * compute_sec / padded_sec


def _judge(name: str, is_ok: bool, found: str, fix: str = "", *, otherwise: Status = "warning") -> Check:
    return Check(name, "ok", found) if is_ok else Check(name, otherwise, found, fix)


def _check_labels(splits: DatasetSplits) -> Check:
    languages = {utterance.language for utterance in splits.train}
    texts = [[utterance.text for utterance in splits.train if utterance.language == code] for code in languages]
    is_odd = splits.label_case == "keep" and any(resolve_case(each, "auto") != "keep" for each in texts)
    return _judge(
        "labels",
        not is_odd,
        f"label case {splits.label_case!r}, for example {splits.train[0].text[:60]!r}",
        "Whisper finds capitals unlikely, and would learn them first: data.label_case: auto, or "
        "splits.with_label_case('sentence')",
    )


def _try_largest_batch(trial: DynamicWhisper, loader: SpeechLoader, config: Config) -> Iterator[Check]:
    """Try whether the largest batch fits; not on a CPU, where batches go through in small pieces."""
    if trial.device.type == "cpu":
        return
    if config.model.audio_context == "full":
        clip_sec: float = MAX_AUDIO_SEC
    elif config.composition.concatenate_prob:
        clip_sec = config.composition.max_concatenated_sec
    else:
        longest_sec = max(clip.duration_sec or 0.0 for clip in loader.dataset.utterances)
        clip_sec = min(MAX_AUDIO_SEC, longest_sec + config.training.max_trailing_silence_sec)
    rows = max(map(len, loader.batch_sampler.batches(0)))
    largest_sec = max(clip_sec, min(rows * clip_sec, loader.batch_sampler.batch_seconds or math.inf))
    try:
        proposal = propose_batch_seconds(
            trial, config, clip_sec=clip_sec, max_seconds=largest_sec, label_tokens=loader.longest_label
        )
    except DeviceError as err:
        yield Check("largest batch", "error", first_line(err))
        return
    found = f"{proposal.fits_sec:.0f} s of audio fit at once, batches hold up to {largest_sec:.0f} s"
    fix = f"they would go in pieces, slower: training.batch_seconds: {proposal.batch_seconds:.0f}"
    yield _judge("largest batch", proposal.limit == "max_seconds", found, fix)


@dataclass(frozen=True)
class BatchProposal:
    """Batch size that fits into memory."""

    batch_seconds: float  # for `training.batch_seconds`, with a margin
    fits_sec: float  # the largest that was tried and fitted; padding included
    limit: str  # what stopped the search: "memory", or "max_seconds"


def propose_batch_seconds(
    model: DynamicWhisper, config: Config, *, clip_sec: float = 10.0, max_seconds: float = 1_920.0,
    label_tokens: int | None = None,
) -> BatchProposal:  # fmt: skip
    """Try updates on larger and larger batches of noise until memory ends; the model does not change.

    A copy of the model takes the updates, so its memory and its optimizer's are included. On a CPU batches go through
    in small pieces, here as in training.

    Args:
        model: as it will be trained; on its device.
        config: `precision` and `training` (optimizer, gradient checkpointing).
        clip_sec: length of the clips; the longest of the data is the careful choice.
        max_seconds: audio per batch at which the search ends.
        label_tokens: length of the labels, such as `longest_label` of a loader; by default at the highest rate of the
            data that the model was prepared for, else of ordinary speech in `model.language`, or in English.

    Raises:
        DeviceError: not even one clip of this length fits.
    """
    try:
        written = text_language(config.model.language, config.model.task)
        rate = max(get_cap_rates(model.config).values(), default=tokens_per_sec(written))  # of the data, if it is known
        tokens = label_tokens or min(MAX_LABEL_TOKENS, math.ceil(clip_sec * rate))
        clips, limit = _search_batch(model, config, clip_sec, tokens, most=max(1, int(max_seconds // clip_sec)))
    finally:
        release_memory()
    if not clips:
        raise DeviceError(
            f"not even one clip of {clip_sec:.0f} s fits on {model.device}; set training.gradient_checkpointing: true, "
            "lower data.max_duration_sec, or take a smaller model"
        )
    proposal = BatchProposal(max(clip_sec, SAFETY * clips * clip_sec), clips * clip_sec, limit)
    logger.info("%s", proposal)
    return proposal


def _search_batch(model: DynamicWhisper, config: Config, clip_sec: float, tokens: int, *, most: int) -> tuple[int, str]:
    trial = copy.deepcopy(model)
    if config.model.audio_context != "auto":
        trial.audio_context = config.model.audio_context
    optimizer = build_optimizer(trial, learning_rate=0.0, weight_decay=0.0, kind=config.training.optimizer)
    loss, half = _computing(trial, config)
    own_length = trial.audio_context != "full"

    def fits(clips: int) -> bool:
        batches = [(clips, clip_sec if own_length else _CONTEXT_SEC)]
        if own_length and config.training.full_context_prob:  # goes in pieces, as `Updater` cuts it
            batches.append((max(1, int(clips * clip_sec * OWN_LENGTH_SLACK / _CONTEXT_SEC)), _CONTEXT_SEC))
        try:
            for rows, seconds in batches:
                in_memory(partial(_update_on_noise, loss, optimizer, rows, seconds, tokens, half))
            return True
        except OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            release_memory()

    return largest_that_fits(fits, most=most)


def largest_that_fits(fits: Callable[[int], bool], *, most: int) -> tuple[int, str]:
    """Find the largest number up to `most` that fits, by doubling and then halving the gap, within a tenth.

    Returns:
        The number, 0 if not even 1 fits; and what stopped the search: "memory" or "max_seconds".
    """
    good, bad = 0, most + 1
    size = 1
    while size < bad:
        if fits(size):
            good, size = size, min(2 * size, most) if size < most else bad
        else:
            bad = size
    while bad - good > max(1, good // 10):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good, "memory" if bad <= most else "max_seconds"


def _update_on_noise(
    loss: TokenLoss, optimizer: Optimizer, clips: int, clip_sec: float, num_tokens: int, half: HalfCopy | None
) -> None:
    generator, device = torch.Generator().manual_seed(0), loss.model.device
    samples = padded_samples(round(clip_sec * SAMPLE_RATE))
    if device.type == "cpu":
        clips = min(clips, max(1, CPU_FRAMES * HOP_SAMPLES // samples))
    audio = torch.randn(clips, samples, generator=generator).to(device)
    features = LogMel(loss.model.config.num_mel_bins)(audio)
    tokens = torch.randint(0, 1_000, (clips, num_tokens), generator=generator).to(device)
    labels = tokens.clone()
    labels[:, 0] = IGNORE_INDEX
    loss(features.to(loss.model.dtype), tokens, labels).backward()
    if half is not None:
        half.collect()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.zero_grad(set_to_none=True)


def _computing(model: DynamicWhisper, config: Config) -> tuple[TokenLoss, HalfCopy | None]:
    """Return the loss of a model, and its copy in 16 bits where the training makes one."""
    dtype = _compute_dtype(config, model.device)
    half = None if dtype == torch.float32 else HalfCopy(model, dtype)
    return TokenLoss(model if half is None else half.model).train(), half


def _compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, choose_precision(config.precision, device).precision)
    return dtype
