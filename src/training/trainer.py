"""The training loop: own-length batches, token-weighted loss, validation by generation, the best model by error rate.

The loop is written out, on Accelerate, because the library trainers get Whisper wrong where it matters: they scale its
loss by the accumulation count, pad to 30 s, and choose a checkpoint by loss.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs

from src.data.loader import OWN_LENGTH_SEC, SpeechLoader, settle_audio_context
from src.data.training_batches import TrainingBatches
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator
from src.models.dynamic_context import DynamicWhisper
from src.models.export.verify import choose_clips
from src.training.checkpoint import ResumeReport, WholeCheckpoint
from src.training.inputs import TrainingInputs, load_or_time_words
from src.training.loss import TokenLoss
from src.training.methods import HalfCopy, has_adapters, merged_model, prepare_model, record_languages, shard_model
from src.training.saver import RunSaver
from src.training.state import Progress
from src.training.updates import (
    Updater,
    UpdateReport,
    build_optimizer,
    count_updates,
    default_learning_rate,
    learning_rates,
)
from src.utils import runtime
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.logging_config import ProgressBar
from src.utils.memory import measure_memory
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Made(NamedTuple):
    """An update that is not logged yet."""

    report: UpdateReport
    step: int
    host_sec: float  # until the host had given all its work to the device
    waited_sec: float  # for its batches


class WhisperTrainer:
    """Fine-tunes one model.

    Args:
        model: changed in place: float32, with adapters if the method is LoRA. After `train` it holds the weights of
            the best epoch.
        processor: of the model.
        train_loader: from `create_dataloaders`.
        val_loader: likewise.
        config: `training`, `checkpoints`, `model.audio_context`, `precision`, `paths`.
        experiment: the run to write to; a new one under `paths.runs_dir` by default. If several processes train, only
            the main one writes.

    Raises:
        DataError: an empty loader, or one made for another number of processes.
    """

    def __init__(
        self,
        model: DynamicWhisper,
        processor: Any,
        train_loader: SpeechLoader,
        val_loader: Any,
        config: Config,
        *,
        experiment: ExperimentLogger | None = None,
    ) -> None:
        if not len(train_loader):
            raise DataError("the training loader is empty")
        is_auto = config.model.audio_context == "auto"
        clips = train_loader.dataset.utterances
        config, model.audio_context = settle_audio_context(config, clips, model.audio_context)
        self.config, self.processor, self.model = config, processor, model
        self._train_loader, self._val_loader = train_loader, val_loader
        if is_auto:
            logger.info(
                "audio context %r (model.audio_context: auto, dynamic from %g minutes of training speech on)",
                model.audio_context, OWN_LENGTH_SEC / 60,
            )  # fmt: skip
        record_languages(model, train_loader.dataset, config.model.task)
        runtime.set_seed(config.seed)
        self._accelerator = _make_accelerator(model, config)
        words, mels = None, model.config.num_mel_bins
        if config.training.prefix_prob:  # with the initial weights, before adapters are added
            words = load_or_time_words(model, processor.tokenizer, train_loader.dataset, config.paths.cache_dir)
        durations_sec = train_loader.durations_sec(0)
        train_loader.prepare_with(TrainingBatches(config, mels, durations_sec=durations_sec, words=words))
        prepare_model(model, config.training)
        default_rate = default_learning_rate(model.config.d_model, lora=has_adapters(model))
        self.learning_rate = config.training.learning_rate or default_rate
        # what computes: the model itself, or a copy in 16 bits; FSDP casts its shards by itself
        precision = self._accelerator.mixed_precision
        is_sharded = config.training.shard_model and runtime.world_size() > 1
        self._half = None if precision == "no" or is_sharded else HalfCopy(model, _DTYPES[precision])
        self._loss: Any = TokenLoss(model if self._half is None else self._half.model)
        self._shards = shard_model(self._loss, config.training, mixed_precision=precision)
        if config.training.compile:
            # a GPU replays captured kernels for each shape, where no gradient stays in their memory after a pass
            captured = self._half is not None and runtime.world_size() == 1 and model.device.type == "cuda"
            self._loss.compile(dynamic=True, mode="reduce-overhead" if captured else None)
            logger.info("torch.compile is on: the first batches of each length take minutes, the later ones are faster")
        optimizer = build_optimizer(
            model,
            learning_rate=self.learning_rate,
            weight_decay=config.training.weight_decay,
            kind=config.training.optimizer,
        )
        # not the loader: it divides an epoch itself, and Accelerate would do it again and repeat utterances
        self._optimizer = self._accelerator.prepare(optimizer)
        if self._shards is None:  # Accelerate would wrap shards for DDP
            self._loss = self._accelerator.prepare(self._loss)
        made_for = train_loader.batch_sampler.world_size
        if made_for != runtime.world_size():
            raise DataError(
                f"the training loader shares an epoch out to {made_for} process(es), but {runtime.world_size()} train; "
                "create it in the processes that the launcher starts"
            )
        self.experiment = (experiment or ExperimentLogger(config)) if runtime.is_main_process() else None
        self._progress = runtime.broadcast_object(Progress())  # its training_id is drawn: one for all processes
        self._updater = Updater(
            self._loss, self._optimizer, self._accelerator, TrainingInputs(config, mels), config.training,
            half=self._half,
        )  # fmt: skip
        self._saver = RunSaver(
            config, model, processor, self._optimizer, self._updater, self._accelerator, train_loader,
            cache(partial(choose_clips, val_loader, config.seed)), self.experiment, self._whole_model,
        )  # fmt: skip

    @property
    def history(self) -> dict[str, list[float]]:
        """Lists with one entry per epoch: epoch, train_loss, val_loss, val_wer, val_cer, learning_rate, val_rate.

        `val_rate` is the headline, by which the best epoch is chosen.
        """
        return self._progress.history

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation error rate, the headline."""
        return self._progress.best_epoch

    @property
    def best_model_dir(self) -> Path:
        """`checkpoints/best_model_hf`, in Hugging Face format; written after each best epoch."""
        return self._saver.best_model_dir

    @property
    def ended(self) -> bool:
        """Whether `train` has nothing left to do: all epochs of the configuration are done, or patience ran out."""
        return self._has_ended(self.config.training.epochs)

    def resume(self, checkpoint: str | Path | WholeCheckpoint = "auto") -> ResumeReport:
        """Resume from a checkpoint; call it before `train`.

        Args:
            checkpoint: a folder; "auto", the newest whole checkpoint of this configuration in `paths.checkpoints_dir`
                or `checkpoints.mirror_dir`, or none, so that training starts from the beginning; or one that
                `find_checkpoint` has verified.

        Returns:
            What was found, and each refused checkpoint with the reason; both are logged too.

        Raises:
            CheckpointError: the named folder is damaged, or belongs to other data or another model.
        """
        report, progress = self._saver.resume(checkpoint)
        self._progress = progress or self._progress
        return report

    def train(self, num_epochs: int | None = None) -> dict[str, list[float]]:
        """Train until this many epochs are done, resumed ones included, and return `history`.

        `KeyboardInterrupt` passes through; checkpoints and the best model are whole at every instant.

        Args:
            num_epochs: `training.epochs` by default.

        Raises:
            DataError: `max_nonfinite_steps` updates in a row without a finite loss, with their clips.
            DeviceError: not even one clip fits into memory.
            CheckpointError: the best model cannot be saved, or another process trains into `paths.checkpoints_dir`.
        """
        training, progress = self.config.training, self._progress
        epochs = num_epochs or training.epochs
        # epochs of composed examples differ in their batches; one that cannot be planned fails here, not hours later
        batches = [self._train_loader.batches_in(epoch) for epoch in range(epochs)]
        total = sum(count_updates(number, training.gradient_accumulation_steps) for number in batches)
        rates = learning_rates(self.learning_rate, total_updates=total, warmup_ratio=training.warmup_ratio)
        self._updater.start(rates, applied=progress.applied)
        logger.info(
            "training: %d epochs, %d updates (%d done), peak learning rate %.2e, context %r",
            epochs, total, progress.step, self.learning_rate, self.config.model.audio_context,
        )  # fmt: skip
        with self._saver.locked():
            self._saver.start_clock()
            self._saver.finish_export(progress)  # an interrupt may have come between an epoch's end and its export
            self._saver.restore_last(progress)
            hidden = not runtime.is_main_process()
            with ProgressBar(total=total, initial=progress.step, desc="training", unit="update", disable=hidden) as bar:
                while not self._has_ended(epochs):
                    waiting = self._train_epoch(rates, bar)
                    bar.set_postfix_str("validating")
                    self._finish_epoch(self._validate(), waiting)
            if progress.epochs_done < epochs:
                patience, best = training.patience, progress.best_epoch
                logger.info("stopped early: no lower error rate in the %d epoch(s) since epoch %d", patience, best)
            self.restore_best()
            self._report_full_context()
            self._saver.flush()
        return self.history

    def restore_best(self) -> None:
        """Put the best epoch's weights into the model, for use; `train` restores the last ones before it continues.

        Raises:
            CheckpointError: the best model is not on the disk any more.
        """
        self._saver.restore_best(self._progress)
        self.model.eval()  # dropout is for training

    def merged_model(self) -> DynamicWhisper:
        """Return the plain model: the trained one itself, or a copy with its adapters merged.

        With `training.shard_model` it is always a copy, and all processes must call this.
        """
        return merged_model(self._whole_model())

    def _whole_model(self) -> DynamicWhisper:
        return self.model if self._shards is None else self._shards.whole()

    def _train_epoch(self, rates: Sequence[float], bar: ProgressBar) -> float:
        """Step the remaining batches of the epoch; return the share of time spent waiting for data."""
        progress, loader = self._progress, self._train_loader
        # each epoch has its own order; a resumed or interrupted one continues after its last update
        loader.load_state_dict({**loader.state_dict(), "epoch": progress.epochs_done, "batches": progress.next_batch})
        self._loss.train()
        if self._half is not None:
            self._half.refresh()  # weights may have been loaded
        unnoted: list[_Made] = []
        note = self._saver.before_save = partial(self._note, unnoted, rates, bar)
        batches, steps = iter(loader), self.config.training.gradient_accumulation_steps
        epoch_began, waited_sec = time.perf_counter(), 0.0
        try:
            for window, window_waited_sec in with_waits(iter(lambda: list(itertools.islice(batches, steps)), [])):
                began = time.perf_counter()
                report = self._updater.update(window)  # the batches of one update
                progress.step += 1
                progress.next_batch += len(window)
                waited_sec += window_waited_sec
                unnoted.append(_Made(report, progress.step, time.perf_counter() - began, window_waited_sec))
                if report.measured is not None:
                    note()
                if report.measured is not None or self._accelerator.device.type != "cuda":  # processes agree on it
                    self._saver.save_if_due(progress)
        finally:  # also of an interrupted epoch
            note()
        return waited_sec / (time.perf_counter() - epoch_began)

    def _note(self, made: list[_Made], rates: Sequence[float], bar: ProgressBar) -> None:
        """Count and log updates when their values are read; their speed is that of all of them together."""
        began = time.perf_counter()
        self._updater.read()
        progress, experiment, updates = self._progress, self.experiment, list(made)
        made.clear()
        update_sec = sum(each.host_sec for each in updates) + time.perf_counter() - began
        speed, audio_speed = (
            sum(getattr(each.report, name) for each in updates) / update_sec for name in ("clips", "audio_sec")
        )
        waits = sum(each.waited_sec for each in updates)
        for report, step, *_ in updates:
            progress.last_rate = rates[min(progress.applied, len(rates) - 1)]
            if report.applied:
                progress.applied += 1
                progress.totals["loss_sum"] += report.loss_sum
                progress.totals["tokens"] += report.tokens
            if experiment is not None:
                experiment.log(
                    "train_step", step=step, epoch=progress.epochs_done + 1, loss=report.loss,
                    learning_rate=progress.last_rate, grad_norm=report.grad_norm, applied=report.applied,
                    samples_per_sec=speed, audio_sec_per_sec=audio_speed, data_wait_share=waits / (waits + update_sec),
                    **measure_memory(experiment.dir, self._accelerator.device).fields(),
                )  # fmt: skip
        if updates:
            bar.update(len(updates))
            loss, rate = updates[-1].report.loss, progress.last_rate
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", samples_per_sec=f"{speed:.1f}")

    def _validate(self) -> EvaluationResult:
        model = self._whole_model()
        if self._half is not None:
            self._half.refresh()
            model = self._half.model
        with self._accelerator.autocast():  # of shards, which have no copy in 16 bits
            evaluator = ModelEvaluator(model, self.processor, self.config)
            return evaluator.evaluate_dataset(self._val_loader, name="validation")

    def _finish_epoch(self, result: EvaluationResult, data_wait_share: float) -> None:
        is_best = self._progress.finish_epoch(result)
        row = {key: values[-1] for key, values in self.history.items()}
        if self.experiment is not None:
            self.experiment.log("epoch", **row, metric=result.metric, data_wait_share=data_wait_share, is_best=is_best)
        logger.info(
            "epoch %d: train loss %.3f, val loss %.3f, %s %.3f, CER %.3f, waited for data %.1f%% of the time%s",
            row["epoch"], row["train_loss"], result.loss, result.metric, result.rate, result.cer, 100 * data_wait_share,
            " (best)" if is_best else "",
        )  # fmt: skip
        self._saver.save(self._progress)  # before the export: a crash in between finds the best weights in there
        if is_best:
            self._saver.export_best(self._progress)

    def _has_ended(self, epochs: int) -> bool:
        done, best, patience = self._progress.epochs_done, self._progress.best_epoch, self.config.training.patience
        return done >= epochs or (patience is not None and best is not None and done - best >= patience)

    def _report_full_context(self) -> None:
        """Measure the validation set at 30 s too if the model was trained for both lengths."""
        if not self.config.training.full_context_prob or self.model.audio_context == "full":
            return
        self.model.audio_context = "full"
        try:
            result = self._validate()
        finally:
            self.model.audio_context = "dynamic"
        own = min(self.history["val_rate"], default=math.nan)
        logger.info("validation %s padded to 30 s: %.3f (at own length: %.3f)", result.metric, result.rate, own)
        if self.experiment is not None:
            self.experiment.log(
                "full_context", metric=result.metric, val_rate=result.rate, val_wer=result.wer, val_cer=result.cer,
                own_length_rate=own,
            )  # fmt: skip


def _make_accelerator(model: DynamicWhisper, config: Config) -> Accelerator:
    choice = runtime.choose_precision(config.precision, model.device)
    logger.info("precision: %s (%s); %s", choice.precision, choice.reason, runtime.allow_tf32(model.device))
    AcceleratorState._reset_state()  # else a second trainer of another precision in the same session is refused
    scaler = GradScalerKwargs(
        init_scale=config.training.fp16_initial_scale, growth_interval=config.training.fp16_growth_interval
    )
    # a model in 16 bits needs no casts; only the shards of FSDP are float32 when they compute
    casts = AutocastKwargs(enabled=config.training.shard_model and runtime.world_size() > 1)
    return Accelerator(
        mixed_precision=_MIXED_PRECISION[choice.precision],
        cpu=model.device.type == "cpu",
        kwargs_handlers=[scaler, casts, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def with_waits(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds until it came: long waits call for more loader processes."""
    iterator = iter(items)
    while True:
        asked_sec = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - asked_sec
