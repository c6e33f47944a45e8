"""Optimizer updates: AdamW, its learning rate, and what one update does whatever happens in it.

An update is weighted by tokens over all batches and processes, repeated in smaller pieces when memory runs out, and
skipped, with the names of its clips, when a loss or gradient is not finite.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.data.features import FRAMES_PER_SEC, HOP_SAMPLES
from src.data.labels import IGNORE_INDEX
from src.training.inputs import TrainingInputs
from src.training.methods import trainable
from src.utils.config import TrainingConfig
from src.utils.errors import DataError, DeviceError, MissingDependencyError, OutOfMemoryError
from src.utils.memory import return_freed_memory
from src.utils.runtime import gather_objects, in_memory, sum_over_processes, world_size

logger = logging.getLogger(__name__)

# pre-training rate / 40 (Jong Wook Kim's advice for full fine-tuning), by width of the model
LEARNING_RATES = {384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}  # tiny .. large
LORA_RATE_FACTOR = 10  # of the rate for full fine-tuning (Schulman et al. 2025, "LoRA without regret")
BETAS, EPS = (0.9, 0.98), 1e-6
CPU_FRAMES = 2600  # of the rows that go through at once; more take memory and are no faster there
OWN_LENGTH_SLACK = 1.2  # slower speech is longer than its recording: not yet a reason to cut a batch
_RECENT_NORMS = 50  # updates that the median gradient norm is taken over
_FEW_NORMS = 10  # fewer say nothing yet

Batch = dict[str, Any]
Piece = tuple[Tensor, Tensor, Tensor]  # features, decoder inputs, labels


def default_learning_rate(d_model: int, *, lora: bool = False) -> float:
    """Return the peak rate for full fine-tuning of a model of this width, or for adapters on it."""
    nearest = min(LEARNING_RATES, key=lambda width: abs(width - d_model))
    return LEARNING_RATES[nearest] * (LORA_RATE_FACTOR if lora else 1)


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, kind: Literal["adamw", "adamw_8bit"] = "adamw"
) -> Optimizer:
    """Make AdamW with weight decay on matrices only; LayerNorm and biases (one dimension) have none."""
    trained = trainable(model)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    devices = {p.device.type for p in trained}
    if kind == "adamw":
        fused = devices <= {"cuda", "cpu", "mps"}  # one pass over the weights
        return AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPS, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]
    except ImportError as err:
        raise MissingDependencyError(
            "training.optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes, or set it to adamw"
        ) from err
    if devices != {"cuda"}:
        raise DeviceError(f"adamw_8bit needs CUDA, the model is on {', '.join(sorted(devices))}; set optimizer: adamw")
    optimizer: Optimizer = AdamW8bit(groups, lr=learning_rate, betas=BETAS, eps=EPS)
    return optimizer


def count_updates(num_batches: int, accumulation_steps: int) -> int:
    """Return the optimizer updates of an epoch: its last window may be short, and is stepped too."""
    return math.ceil(num_batches / accumulation_steps)


def count_warmup(total_updates: int, warmup_ratio: float) -> int:
    """Return the updates of the warm-up; at least one if its share is not zero."""
    return math.ceil(warmup_ratio * total_updates)


def build_schedule(optimizer: Optimizer, *, total_updates: int, warmup_ratio: float, done_updates: int = 0) -> LambdaLR:
    """Make a linear warm-up over a share of the updates, then a linear decay to zero; a resumed run has done some."""
    warmup = count_warmup(total_updates, warmup_ratio)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        return max(0.0, (total_updates - update) / max(1, total_updates - warmup))

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=done_updates - 1)


@dataclass(frozen=True)
class UpdateReport:
    """One update, over all processes."""

    loss_sum: float  # nats
    tokens: int
    grad_norm: float  # before clipping
    applied: bool  # False if it was skipped because something was not finite
    clips: int
    audio_sec: float  # without padding
    ids: tuple[str, ...]  # of its clips, in this process

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens


class Updater:
    """Makes updates; `loss` is a `TokenLoss` and, like the optimizer, prepared by the accelerator or sharded."""

    def __init__(
        self, loss: nn.Module, optimizer: Any, accelerator: Accelerator, inputs: TrainingInputs, config: TrainingConfig
    ) -> None:
        self._loss, self._optimizer, self._accelerator = loss, optimizer, accelerator
        self._inputs, self._config = inputs, config
        self._is_sharded = isinstance(loss, FSDPModule)
        self.pieces = 1  # that each batch is cut into since memory last ran out
        self._largest = 0  # rows x frames that went through at once, of a batch at its own length
        self._norms: deque[float] = deque(maxlen=_RECENT_NORMS)
        self._skipped_in_row: list[str] = []  # one text per update

    def update(self, window: Sequence[Batch], generators: Sequence[torch.Generator]) -> UpdateReport:
        """Accumulate gradients over a window of batches and step.

        Args:
            window: batches from the loader, on the CPU.
            generators: one per batch; everything random about the batch is drawn from it.

        Raises:
            DataError: `max_nonfinite_steps` updates in a row had to be skipped; all their clips are named.
            DeviceError: not even a single clip fits into memory.
        """
        device = self._accelerator.device
        self._optimizer.zero_grad(set_to_none=True)  # an interrupted update may have left some
        window = [self._inputs.cut(batch, draws) for batch, draws in zip(window, generators, strict=True)]
        counted = (
            (int((batch["labels"] != IGNORE_INDEX).sum()), len(batch["ids"]), sum(batch["durations"]))
            for batch in window
        )
        tokens, clips, audio_sec = sum_over_processes([sum(each) for each in zip(*counted, strict=True)], device)
        draws = [generator.get_state() for generator in generators]
        while (losses := self._accumulate_in_memory(window, draws, tokens)) is None:
            pass  # once more, in smaller pieces
        norm = self._accelerator.clip_grad_norm_(self._loss.parameters(), self._config.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        (loss_sum,) = sum_over_processes([sum(losses)], device)
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            self._optimizer.step()
        elif self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # lowers the scale where the gradients overflowed
        applied = finite and not self._accelerator.optimizer_step_was_skipped
        self._optimizer.zero_grad(set_to_none=True)
        if device.type == "cpu":
            return_freed_memory()
        ids = tuple(name for batch in window for name in batch["ids"])
        self._watch(norm, ids) if applied else self._count_skipped(window, losses, loss_sum, norm)
        return UpdateReport(loss_sum, int(tokens), norm, applied, int(clips), audio_sec, ids)

    def state_dict(self) -> dict[str, Any]:
        """Return what later updates depend on; it can be saved as JSON."""
        return {
            "pieces": self.pieces,
            "largest": self._largest,
            "norms": list(self._norms),
            "skipped_in_row": list(self._skipped_in_row),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.pieces, self._largest = int(state["pieces"]), int(state["largest"])
        self._norms = deque(state["norms"], maxlen=_RECENT_NORMS)
        self._skipped_in_row = list(state["skipped_in_row"])

    def _accumulate_in_memory(
        self, window: Sequence[Batch], draws: Sequence[Tensor], tokens: float
    ) -> list[float] | None:
        """Accumulate; if memory runs out, forget the attempt, halve the pieces and return None."""
        try:
            return in_memory(lambda: self._accumulate(window, draws, tokens))
        except OutOfMemoryError as err:
            problem = str(err)
        self._optimizer.zero_grad(set_to_none=True)
        largest = max(window, key=lambda batch: batch["audio"].numel())
        if world_size() > 1:  # the other processes wait in an exchange of gradients that this one has left
            raise DeviceError(
                f"out of memory on one of {world_size()} processes ({problem}); lower training.batch_size or "
                "batch_seconds, raise gradient_accumulation_steps by as much, and resume from the last checkpoint"
            )
        if self.pieces >= max(len(batch["ids"]) for batch in window):
            raise DeviceError(
                f"out of memory with a single clip ({problem}), among {', '.join(largest['ids'])}; lower "
                "data.max_duration_sec, set training.gradient_checkpointing: true, or take a smaller model"
            )
        self.pieces *= 2
        self._largest = 0
        logger.warning(
            "out of memory with %d clip(s) of up to %.1f s: from now on each batch goes through the model in %d "
            "pieces, and an update is still over all of them (%s)",
            len(largest["ids"]), max(largest["durations"]), self.pieces, problem,
        )  # fmt: skip
        return None

    def _accumulate(self, window: Sequence[Batch], draws: Sequence[Tensor], tokens: float) -> list[float]:
        """Return each batch's summed loss in nats, with the gradients of the window's mean in place."""
        losses: list[Tensor] = []
        device = self._accelerator.device
        for number, (batch, state) in enumerate(zip(window, draws, strict=True)):
            generator = torch.Generator()
            generator.set_state(state)  # a repeated window draws what the first attempt drew
            # non_blocking: from pinned memory, the copy runs while the CPU goes on
            moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
            features = self._inputs.features(moved, generator)
            size = self._rows_together(features, batch)
            # pieces keep their padding, so that the sums stay the same
            parts = (each.split(size) for each in (features, moved["decoder_input_ids"], moved["labels"]))
            pieces: list[Piece] = list(zip(*parts, strict=True))
            if self._is_sharded:
                pieces = fill_up(pieces)
            batch_loss = torch.zeros((), device=features.device)
            for piece, (part, inputs, labels) in enumerate(pieces):
                # processes sum gradients in the last backward pass of an update, and keep them in the others
                last = number == len(window) - 1 and piece == len(pieces) - 1
                if isinstance(self._loss, FSDPModule):
                    self._loss.set_requires_gradient_sync(last)
                alone = last or self._is_sharded or world_size() == 1
                with nullcontext() if alone else self._accelerator.no_sync(self._loss):
                    loss = self._loss(part, inputs, labels)
                    # gradients are averaged over processes: times their number gives the sum over all tokens
                    self._accelerator.backward(loss * (world_size() / tokens))
                batch_loss += loss.detach()
            losses.append(batch_loss)
        return [float(loss) for loss in losses]  # here, so that the host does not wait after each batch

    def _rows_together(self, features: Tensor, batch: Batch) -> int:
        """Return how many rows go through the model at once.

        A batch that is padded to 30 s goes in pieces that take the memory of the largest batch at its own length:
        gradients add up to the same, and a share of full context costs only time.
        """
        rows, _, frames = features.shape
        own_frames = batch["audio"].shape[1] / HOP_SAMPLES + self._config.max_trailing_silence_sec * FRAMES_PER_SEC
        size = math.ceil(rows / self.pieces)
        if frames <= own_frames * OWN_LENGTH_SLACK:
            self._largest = max(self._largest, size * frames)
        else:
            size = min(size, int(max(rows * own_frames * OWN_LENGTH_SLACK, self._largest) / frames))
        if features.device.type == "cpu":
            size = min(size, CPU_FRAMES // frames)
        return math.ceil(rows / math.ceil(rows / max(1, size)))  # as many pieces, of equal size

    def _watch(self, norm: float, ids: Sequence[str]) -> None:
        """Log a spike of the gradient norm; its update is applied, clipped, like any other."""
        self._skipped_in_row.clear()
        usual = statistics.median(self._norms) if len(self._norms) >= _FEW_NORMS else math.inf
        if norm > self._config.grad_spike_factor * usual:
            logger.warning(
                "gradient norm %.1f, usually %.1f (clipped to %.1f and applied); its clips: %s",
                norm, usual, self._config.max_grad_norm, ", ".join(ids),
            )  # fmt: skip
        self._norms.append(norm)

    def _count_skipped(self, window: Sequence[Batch], losses: Sequence[float], loss_sum: float, norm: float) -> None:
        broken = [batch for batch, loss in zip(window, losses, strict=True) if not math.isfinite(loss)]
        # a sum that is not finite may come from another process, which then names its clips
        suspect = broken or (window if math.isfinite(loss_sum) else [])
        mine = [name for batch in suspect for name in batch["ids"]]
        clips = ", ".join(name for names in gather_objects(mine) for name in names)
        reason = f"loss {loss_sum}" if not math.isfinite(loss_sum) else f"gradient norm {norm}"
        self._skipped_in_row.append(f"{reason}: {clips}")
        logger.warning("update skipped, %s; its clips: %s", reason, clips)
        if len(self._skipped_in_row) >= self._config.max_nonfinite_steps:
            raise DataError(
                f"{len(self._skipped_in_row)} updates in a row had no finite loss and gradient, so training stops.\n  "
                + "\n  ".join(self._skipped_in_row)
                + "\nListen to these recordings, lower training.learning_rate, or set precision: float32"
            )


def fill_up(pieces: Sequence[Piece]) -> list[Piece]:
    """Add pieces without a loss until all processes have as many: each pass is an exchange of parameters."""
    missing = max(gather_objects(len(pieces))) - len(pieces)
    features, inputs, labels = (tensor[:1] for tensor in pieces[-1])
    return [*pieces, *[(features, inputs, torch.full_like(labels, IGNORE_INDEX))] * missing]
