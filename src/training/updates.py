"""Optimizer updates: AdamW, its learning rate, and what one update does whatever happens in it.

An update is weighted by tokens over all batches and processes, repeated in smaller pieces when memory runs out, and
skipped, with the names of its clips, when a loss or gradient is not finite.

The host gives work to the device and does not wait for it: whether an update is skipped, and its learning rate, is
decided on the device, and what it computed is read every `READ_EVERY` updates; on a CPU, where it is there, after each.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.data.features import FRAMES_PER_SEC, HOP_SAMPLES
from src.data.labels import IGNORE_INDEX
from src.training.inputs import TrainingInputs, to_device
from src.training.methods import HalfCopy, trainable
from src.utils.config import TrainingConfig
from src.utils.errors import DataError, DeviceError, MissingDependencyError, OutOfMemoryError
from src.utils.memory import free_memory_mb, return_freed_memory
from src.utils.runtime import gather_objects, in_memory, world_size

logger = logging.getLogger(__name__)

# pre-training rate / 40 (Jong Wook Kim's advice for full fine-tuning), by width of the model
LEARNING_RATES = {384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}  # tiny .. large
LORA_RATE_FACTOR = 10  # of the rate for full fine-tuning (Schulman et al. 2025, "LoRA without regret")
BETAS, EPS = (0.9, 0.98), 1e-6
CPU_FRAMES = 2600  # of the rows that go through at once; more take memory and are no faster there
READ_EVERY = 10  # updates; each read lets the device run dry
READ_SEC = 10.0  # in one process; slow updates are read earlier
MEMORY_SHARE = 0.8  # of what is free on a GPU is for a piece of a batch that is padded to 30 s
OWN_LENGTH_SLACK = 1.2  # slower speech is longer than its recording: not yet a reason to cut a batch
_RECENT_NORMS = 50  # updates that the median gradient norm is taken over
_FEW_NORMS = 10  # fewer say nothing yet
_ON_DEVICE = ("audio", "audio_lengths", "decoder_input_ids", "labels", "masks")  # of a batch

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


def learning_rates(peak: float, *, total_updates: int, warmup_ratio: float) -> list[float]:
    """Return the rate of each update: a linear warm-up over a share of them, then a linear decay to zero."""
    warmup = count_warmup(total_updates, warmup_ratio)
    decay = max(1, total_updates - warmup)
    return [
        peak * ((update + 1) / warmup if update < warmup else (total_updates - update) / decay)
        for update in range(total_updates)
    ]


def build_schedule(optimizer: Optimizer, *, total_updates: int, warmup_ratio: float, done_updates: int = 0) -> LambdaLR:
    """Make the schedule of `learning_rates` for an optimizer whose host steps it; a resumed run has done some."""
    factors = [*learning_rates(1.0, total_updates=total_updates, warmup_ratio=warmup_ratio), 0.0]
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda update: factors[min(update, total_updates)], last_epoch=done_updates - 1)


class Measured(NamedTuple):
    """One update, over all processes."""

    loss_sum: float  # nats
    tokens: int
    grad_norm: float  # before clipping
    applied: bool  # False if it was skipped because something was not finite
    clips: int
    audio_sec: float  # without padding


@dataclass
class UpdateReport:
    """One update, with the fields of `Measured`, which are read when one is first asked for."""

    ids: tuple[str, ...]  # of its clips, in this process
    measured: Measured | None = None  # not read yet if None
    read: Callable[[], object] = lambda: None  # sets `measured`

    def __getattr__(self, name: str) -> Any:
        if name not in Measured._fields:
            raise AttributeError(name)
        if self.measured is None:
            self.read()
        return getattr(self.measured, name)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.loss_sum / self.tokens)


class _Unread(NamedTuple):
    report: UpdateReport
    ids: list[list[str]]  # of the clips of each batch, in this process
    values: Tensor  # those of `Measured` but for their order, and each batch's loss


class Updater:
    """Makes updates; `loss` is a `TokenLoss` and, like the optimizer, prepared by the accelerator or sharded.

    With `half`, the model of `loss` is a copy in 16 bits, and the optimizer has the float32 weights.
    """

    def __init__(
        self, loss: nn.Module, optimizer: Any, accelerator: Accelerator, inputs: TrainingInputs, config: TrainingConfig,
        *, half: HalfCopy | None = None,
    ) -> None:  # fmt: skip
        self._loss, self._optimizer, self._accelerator = loss, optimizer, accelerator
        self._inputs, self._config, self._half = inputs, config, half
        self._is_sharded = isinstance(loss, FSDPModule)
        fused = isinstance(optimizer.optimizer, AdamW) and optimizer.optimizer.defaults["fused"]
        # torch's fused AdamW leaves out an update by itself, where its kernels know how to
        self._skips_on_device = fused and not self._is_sharded and accelerator.device.type in ("cuda", "cpu")
        self._rates: Tensor | None = None  # learning rate of each update that is applied, on the device
        self._applied = torch.zeros(1, dtype=torch.long, device=accelerator.device)  # updates, likewise
        self._unread: list[_Unread] = []
        self._read_at_sec = time.monotonic()
        self._bytes_per_frame = 0.0  # of activations on a GPU
        self.pieces = 1  # that each batch is cut into since memory last ran out
        self._largest = 0  # rows x frames that went through at once, of a batch at its own length
        self._norms: deque[float] = deque(maxlen=_RECENT_NORMS)
        self._skipped_in_row: list[str] = []  # one text per update

    def start(self, rates: Sequence[float], *, applied: int) -> None:
        """Take the learning rates of all updates, of which some are applied already; skipped updates take none."""
        device = self._accelerator.device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # as torch's kernels read them
        self._rates = torch.tensor([*rates, 0.0], dtype=dtype, device=device)
        self._applied = torch.tensor([min(applied, len(rates))], device=device)

    def update(self, window: Sequence[Batch]) -> UpdateReport:
        """Accumulate gradients over a window of batches and step.

        Args:
            window: batches on the CPU, as `TrainingBatches` prepares them.

        Raises:
            DataError: `max_nonfinite_steps` updates in a row had to be skipped; all their clips are named.
            DeviceError: not even a single clip fits into memory.
        """
        device = self._accelerator.device
        self._forget_gradients()  # an interrupted update may have left some
        tokens = sum(int(np.count_nonzero(batch["labels"].numpy() != IGNORE_INDEX)) for batch in window)
        audio_sec = sum(sum(batch["durations"]) for batch in window)
        counts = torch.tensor([tokens, sum(len(batch["ids"]) for batch in window), audio_sec], device=device)
        per_token: float | Tensor = 1 / tokens
        if world_size() > 1:
            distributed.all_reduce(counts)
            per_token = world_size() / counts[0]  # gradients are averaged over processes
        while (losses := self._accumulate_in_memory(window, per_token)) is None:
            pass  # once more, in smaller pieces
        parameters = self._loss.parameters() if self._half is None else self._half.weights
        norm = self._accelerator.clip_grad_norm_(parameters, self._config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss_sum = torch.stack(losses).sum()
        if world_size() > 1:
            distributed.all_reduce(loss_sum)
        finite = torch.isfinite(loss_sum) & torch.isfinite(norm)
        self._step(finite)
        self._forget_gradients()
        if device.type == "cpu":
            return_freed_memory()
        ids = [list(batch["ids"]) for batch in window]
        report = UpdateReport(tuple(itertools.chain(*ids)), read=self.read)
        found = torch.stack([norm, finite.to(norm.dtype), loss_sum, *losses])
        self._unread.append(_Unread(report, ids, torch.cat([counts, found])))
        # processes read together; one alone also after some time, so that the progress of slow updates is seen
        late = world_size() == 1 and time.monotonic() - self._read_at_sec > READ_SEC
        most = 1 if device.type == "cpu" else READ_EVERY  # a CPU has computed already
        if late or len(self._unread) >= min(most, self._config.max_nonfinite_steps - len(self._skipped_in_row)):
            self.read()
        return report

    def read(self) -> None:
        """Read what the device computed since the last time, and judge it; may raise as `update` does."""
        unread, self._unread = self._unread, []
        self._read_at_sec = time.monotonic()
        if not unread:
            return
        values = iter(torch.cat([each.values for each in unread]).tolist())
        for each in unread:
            tokens, clips, audio_sec, norm, applied, loss_sum = itertools.islice(values, 6)
            losses = list(itertools.islice(values, len(each.ids)))
            each.report.measured = Measured(loss_sum, int(tokens), norm, bool(applied), int(clips), audio_sec)
            self._watch(norm, each.report.ids) if applied else self._count_skipped(each.ids, losses, loss_sum, norm)
        if len(self._skipped_in_row) >= self._config.max_nonfinite_steps:
            raise DataError(
                f"{len(self._skipped_in_row)} updates in a row had no finite loss and gradient, so training stops.\n  "
                + "\n  ".join(self._skipped_in_row)
                + "\nListen to these recordings, lower training.learning_rate, or set precision: float32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what later updates depend on; it can be saved as JSON."""
        self.read()
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

    def _step(self, finite: Tensor) -> None:
        """Step the optimizer if loss and gradient are finite; the device decides if it can."""
        optimizer = self._optimizer.optimizer
        if self._rates is not None:
            rate = self._rates.index_select(0, self._applied).squeeze(0)
            for group in optimizer.param_groups:
                group["lr"] = rate if self._skips_on_device else float(rate)
        if self._skips_on_device:
            optimizer.found_inf = (~finite).float()
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        elif bool(finite):
            optimizer.step()
        self._applied += finite
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # lowers the scale where the gradients overflowed
        if self._half is not None:
            self._half.refresh()

    def _forget_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss.zero_grad(set_to_none=True)  # those of a copy

    def _accumulate_in_memory(self, window: Sequence[Batch], per_token: float | Tensor) -> list[Tensor] | None:
        """Accumulate; if memory runs out, forget the attempt, halve the pieces and return None."""
        try:
            return in_memory(lambda: self._accumulate(window, per_token))
        except OutOfMemoryError as err:
            problem = str(err)
        self._forget_gradients()
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

    def _accumulate(self, window: Sequence[Batch], per_token: float | Tensor) -> list[Tensor]:
        """Return each batch's summed loss in nats, with the gradients of the window's mean in place."""
        losses: list[Tensor] = []
        device = self._accelerator.device
        for number, batch in enumerate(window):
            moved = to_device({key: batch[key] for key in _ON_DEVICE}, device)
            features = self._inputs.features(moved)
            # pieces keep their padding, so that the sums stay the same
            size = self._rows_together(features, batch)
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
                with nullcontext() if alone else self._accelerator.no_sync(self._loss), self._watched(part):
                    if self._config.compile:
                        torch.compiler.cudagraph_mark_step_begin()
                    loss = self._loss(part if self._half is None else part.to(self._half.model.dtype), inputs, labels)
                    self._accelerator.backward(loss * per_token)
                if self._half is not None and alone:
                    self._half.collect()
                batch_loss += loss.detach()
            losses.append(batch_loss)
        return losses

    @contextmanager
    def _watched(self, part: Tensor) -> Iterator[None]:
        """Note what a pass takes on a GPU when it takes more than any before."""
        if part.device.type != "cuda":
            yield
            return
        before, peak = (ask(part.device) for ask in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
        yield
        taken = torch.cuda.max_memory_allocated(part.device)
        if taken > peak:
            self._bytes_per_frame = (taken - before) / (part.shape[0] * part.shape[2])

    def _rows_together(self, features: Tensor, batch: Batch) -> int:
        """Return how many rows go through the model at once.

        A batch that is padded to 30 s goes in pieces that fit into the free memory of a GPU, as the passes before tell,
        elsewhere into that of the largest batch at its own length: gradients add up to the same, and a share of full
        context costs only time.
        """
        rows, _, frames = features.shape
        longest = max(batch["audio_lengths"].tolist())
        own_frames = longest / HOP_SAMPLES + self._config.max_trailing_silence_sec * FRAMES_PER_SEC
        size = math.ceil(rows / self.pieces)
        if frames <= own_frames * OWN_LENGTH_SLACK:
            self._largest = max(self._largest, size * frames)
        else:
            room = max(rows * own_frames * OWN_LENGTH_SLACK, self._largest)
            if self._bytes_per_frame and self.pieces == 1:
                free = MEMORY_SHARE * 1e6 * free_memory_mb(features.device)
                room = max(room, free / self._bytes_per_frame)
            size = min(size, int(room / frames))
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

    def _count_skipped(self, ids: list[list[str]], losses: Sequence[float], loss_sum: float, norm: float) -> None:
        broken = [batch for batch, loss in zip(ids, losses, strict=True) if not math.isfinite(loss)]
        # a sum that is not finite may come from another process, which then names its clips
        mine = list(itertools.chain(*(broken or (ids if math.isfinite(loss_sum) else []))))
        clips = ", ".join(name for names in gather_objects(mine) for name in names)
        reason = f"loss {loss_sum}" if not math.isfinite(loss_sum) else f"gradient norm {norm}"
        self._skipped_in_row.append(f"{reason}: {clips}")
        logger.warning("update skipped, %s; its clips: %s", reason, clips)


def fill_up(pieces: Sequence[Piece]) -> list[Piece]:
    """Add pieces without a loss until all processes have as many: each pass is an exchange of parameters."""
    missing = max(gather_objects(len(pieces))) - len(pieces)
    features, inputs, labels = (tensor[:1] for tensor in pieces[-1])
    return [*pieces, *[(features, inputs, torch.full_like(labels, IGNORE_INDEX))] * missing]
