"""The training loop: own-length batches, token-weighted loss, validation by generation, the best model by WER.

The loop is written out, on Accelerate, because the library trainers get Whisper wrong where it matters: they scale its
loss by the accumulation count, pad to 30 s, and choose a checkpoint by loss.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from src.data.batching import batch_generator
from src.data.labels import IGNORE_INDEX
from src.data.loader import SpeechLoader
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator
from src.models.dynamic_context import DynamicWhisper
from src.models.export import export_huggingface
from src.training.inputs import TrainingInputs
from src.training.schedule import build_optimizer, build_schedule, count_updates, default_learning_rate
from src.training.waiting import WaitMeter
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.runtime import choose_precision, set_seed
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

BEST_MODEL_NAME = "best_model_hf"
_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
Batch = dict[str, Any]


class WhisperTrainer:
    """Fine-tunes one model.

    Args:
        model: in float32; changed in place. After `train` it holds the weights of the best epoch.
        processor: of the model.
        train_loader, val_loader: from `create_dataloaders`.
        config: `training`, `model.audio_context`, `precision`, `paths`.
        experiment: the run to write to; a new one under `paths.runs_dir` by default.

    Attributes:
        history: lists with one entry an epoch: epoch, train_loss, val_loss, val_wer, val_cer, learning_rate.
        best_model_dir: `checkpoints/best_model_hf`, in Hugging Face format; written when an epoch's WER is the lowest.
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
        self.config = config
        self.processor = processor
        self.experiment = experiment or ExperimentLogger(config)
        self.history: dict[str, list[float]] = {
            key: [] for key in ("epoch", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate")
        }
        self.best_model_dir: Path = config.paths.checkpoints_dir / BEST_MODEL_NAME
        self.best_epoch: int | None = None
        choice = choose_precision(config.precision, next(model.parameters()).device)
        logger.info("precision: %s (%s)", choice.precision, choice.reason)
        model.audio_context = config.model.audio_context
        set_seed(config.seed)
        self._inputs = TrainingInputs(config, model.config.num_mel_bins)
        AcceleratorState._reset_state()  # else a second trainer of another precision in the same session is refused
        self._accelerator = Accelerator(
            mixed_precision=_MIXED_PRECISION[choice.precision], cpu=next(model.parameters()).device.type == "cpu"
        )
        self.learning_rate = config.training.learning_rate or default_learning_rate(model.config.d_model)
        optimizer = build_optimizer(model, learning_rate=self.learning_rate, weight_decay=config.training.weight_decay)
        self.model = model
        # not the loader: it shares an epoch out itself, and Accelerate would do it again and repeat utterances
        self._wrapped, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._check_shard()
        self._step = 0
        self._epoch = 0  # from 0, as in the loader
        self._batch_index = 0  # of the next batch, within the epoch and this process

    def train(self, num_epochs: int | None = None) -> dict[str, list[float]]:
        """Run the loop.

        Args:
            num_epochs: `training.epochs` by default.
        Returns: `history`.
        Raises: DataError: a loss that is not finite, with the ids of its batch. KeyboardInterrupt passes through; the
            best model on disk is whole at every instant.
        """
        epochs = num_epochs or self.config.training.epochs
        steps = self.config.training.gradient_accumulation_steps
        # epochs of composed examples differ in their batches; one that cannot be planned fails here, not in hours
        total = sum(count_updates(self._train_loader.batches_in(epoch), steps, 1) for epoch in range(epochs))
        schedule = build_schedule(
            self._optimizer.optimizer, total_updates=total, warmup_ratio=self.config.training.warmup_ratio
        )
        logger.info(
            "training: %d epochs, %d updates, peak learning rate %.2e, context %r",
            epochs, total, self.learning_rate, self.config.model.audio_context,
        )  # fmt: skip
        with tqdm(total=total, desc="training", unit="update") as bar:
            for epoch in range(1, epochs + 1):
                train_loss, data_wait_share = self._train_epoch(epoch, schedule, bar)
                self._finish_epoch(epoch, train_loss, data_wait_share, self._validate(bar))
        self._restore_best()
        return self.history

    def _train_epoch(self, epoch: int, schedule: Any, bar: tqdm[Any]) -> tuple[float, float]:
        """Return the epoch's loss in nats a token (sums over sums, every batch stepped), and the share of waiting."""
        self._epoch = epoch - 1
        self._train_loader.set_epoch(self._epoch)  # each epoch has its own order
        self._batch_index = self._train_loader.start
        self._wrapped.train()
        loss_sum, token_sum = 0.0, 0
        meter = WaitMeter()
        for window in _windows(meter.watch(self._train_loader), self.config.training.gradient_accumulation_steps):
            began = time.perf_counter()
            window_loss, tokens, grad_norm = self._update(window)
            rate = schedule.get_last_lr()[0]
            if not self._accelerator.optimizer_step_was_skipped:
                schedule.step()
            self._step += 1
            loss_sum += window_loss
            token_sum += tokens
            clips = sum(len(batch["ids"]) for batch in window)
            speed = clips / (time.perf_counter() - began)
            bar.update()
            bar.set_postfix(loss=f"{window_loss / tokens:.3f}", lr=f"{rate:.1e}", samples_per_sec=f"{speed:.1f}")
            self.experiment.log(
                "train_step", step=self._step, epoch=epoch, loss=window_loss / tokens, learning_rate=rate,
                grad_norm=grad_norm, samples_per_sec=speed, data_wait_share=meter.lap(),
            )  # fmt: skip
        self._last_rate = rate
        return loss_sum / token_sum, meter.total()

    def _update(self, window: list[Batch]) -> tuple[float, int, float]:
        """One optimizer update over an accumulation window; the loss is weighted by tokens over all of it."""
        tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in window)
        loss_sum = 0.0
        for batch in window:
            loss = self._loss_sum(self._to_device(batch), self._next_generator())
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss of update {self._step + 1} is {loss.item()}; its utterances: {', '.join(batch['ids'])}. "
                    "Look at these recordings, lower training.learning_rate, or set precision: float32"
                )
            self._accelerator.backward(loss / tokens)
            loss_sum += loss.item()
        norm = self._accelerator.clip_grad_norm_(self._wrapped.parameters(), self.config.training.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss_sum, tokens, float(norm)

    def _next_generator(self) -> torch.Generator:
        """Make the next batch's generator, of which everything random about this batch is drawn."""
        index = self._batch_index * self._accelerator.num_processes + self._accelerator.process_index
        self._batch_index += 1
        return batch_generator(self.config.seed, self._epoch, index)

    def _to_device(self, batch: Batch) -> Batch:
        device = self._accelerator.device
        # non_blocking: from pinned memory, the copy runs while the CPU goes on
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _check_shard(self) -> None:
        shard = self._train_loader.batch_sampler.shard
        if shard.world_size != self._accelerator.num_processes:
            raise DataError(
                f"the training loader shares an epoch out to {shard.world_size} process(es), but "
                f"{self._accelerator.num_processes} train; create it in the processes that the launcher starts"
            )

    def _loss_sum(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Summed cross-entropy in nats over the text and end tokens of a batch."""
        features = self._inputs.features(batch, generator)
        logits = self._wrapped(
            input_features=features.to(self.model.dtype), decoder_input_ids=batch["decoder_input_ids"]
        ).logits  # (B, L, vocabulary)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _validate(self, bar: tqdm[Any]) -> EvaluationResult:
        bar.set_postfix_str("validating")
        evaluator = ModelEvaluator(self.model, self.processor, self.config)
        return evaluator.evaluate_dataset(self._val_loader, name="validation")

    def _finish_epoch(self, epoch: int, train_loss: float, data_wait_share: float, result: EvaluationResult) -> None:
        is_best = result.wer < min(self.history["val_wer"], default=math.inf)
        row = {
            "epoch": epoch, "train_loss": train_loss, "val_loss": result.loss, "val_wer": result.wer,
            "val_cer": result.cer, "learning_rate": self._last_rate,
        }  # fmt: skip
        for key, value in row.items():
            self.history[key].append(value)
        self.experiment.log("epoch", **row, data_wait_share=data_wait_share, is_best=is_best)
        logger.info(
            "epoch %d: train loss %.3f, val loss %.3f, WER %.3f, CER %.3f, waited for data %.1f%% of the time%s",
            epoch, train_loss, result.loss, result.wer, result.cer, 100 * data_wait_share, " (best)" if is_best else "",
        )  # fmt: skip
        if is_best:
            self.best_epoch = epoch
            with _stock_forward(self.model):
                export_huggingface(self.model, self.processor, self.best_model_dir)

    def _restore_best(self) -> None:
        """Put the best epoch's weights back into the model, where the last epoch is not the best."""
        if self.best_epoch is None or self.best_epoch == self.history["epoch"][-1]:
            return
        state = load_file(self.best_model_dir / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and all(name == "proj_out.weight" for name in missing)  # tied to the embedding
        logger.info("the model now holds the weights of epoch %d, the best by WER", self.best_epoch)


@contextmanager
def _stock_forward(model: DynamicWhisper) -> Iterator[None]:
    """Lift Accelerate's 16-bit autocast off a model: an export is verified in the precision that it is saved in."""
    autocast_forward = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if autocast_forward is not None:
            model.forward = autocast_forward


def _windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, size)):
        yield window
