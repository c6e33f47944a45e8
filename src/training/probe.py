"""The largest batch that fits: found by trying, before hours depend on it."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from src.data.audio import SAMPLE_RATE
from src.data.features import CONTEXT_SAMPLES
from src.data.labels import IGNORE_INDEX
from src.data.mel import padded_samples
from src.inference.decoding import log_mel_for
from src.models.dynamic_context import DynamicWhisper
from src.training.loss import TokenLoss
from src.training.schedule import build_optimizer
from src.training.updates import OWN_LENGTH_SLACK
from src.utils.config import Config
from src.utils.errors import DeviceError
from src.utils.runtime import choose_precision, is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

SAFETY = 0.85  # of what fits: fragments, longer labels and validation need room too
TOKENS_PER_SEC = 4.0  # of a label; fast speech
_CPU_SHARE = 0.7  # of the memory that is available: beyond it the machine swaps
_POLL_SEC = 0.01
_CONTEXT_SEC = CONTEXT_SAMPLES / SAMPLE_RATE  # 30


@dataclass(frozen=True)
class BatchProposal:
    """What fits into memory.

    Attributes:
        batch_seconds: for `training.batch_seconds`, with a margin.
        fits_sec: the largest that was tried and fitted; padding included.
        limit: what stopped the search: "memory", or "max_seconds".
    """

    batch_seconds: float
    fits_sec: float
    limit: str


def propose_batch_seconds(
    model: DynamicWhisper, config: Config, *, clip_sec: float = 10.0, max_seconds: float = 1_920.0
) -> BatchProposal:
    """Try updates on ever larger batches of noise until memory ends; the model is not changed.

    A copy of the model takes the updates, so its memory and its optimizer's are in the measure. On a CPU, where no
    allocation fails before the machine swaps, 70% of the available memory is the limit.

    Args:
        model: as it will be trained; on its device.
        config: `precision` and `training` (optimizer, gradient checkpointing).
        clip_sec: length of the clips; the longest of the data is the careful choice.
        max_seconds: audio a batch, at which the search ends.
    Raises: DeviceError: not even one clip of this length fits.
    """
    trial = _Trial(model, config, clip_sec)
    try:
        clips, limit = largest_that_fits(trial.fits, most=max(1, int(max_seconds // clip_sec)))
    finally:
        trial.release()
    if not clips:
        raise DeviceError(
            f"not even one clip of {clip_sec:.0f} s fits on {trial.device}; set training.gradient_checkpointing: true, "
            "lower data.max_duration_sec, or take a smaller model"
        )
    fits_sec = clips * clip_sec
    proposal = BatchProposal(max(clip_sec, SAFETY * fits_sec), fits_sec, limit)
    logger.info(
        "batches of up to %.0f s fit (limit: %s); proposed: training.batch_seconds: %.0f", fits_sec, limit,
        proposal.batch_seconds,
    )  # fmt: skip
    return proposal


def largest_that_fits(fits: Callable[[int], bool], *, most: int) -> tuple[int, str]:
    """Return the largest number that fits, by doubling and then halving the gap, within a tenth; 0 if not even 1 does.

    Args:
        fits: grows harder with the number.
        most: never asked for more.
    Returns: the number, and "memory" or "max_seconds": what stopped the search.
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


class _Trial:
    """Updates of a copy of a model on noise."""

    def __init__(self, model: DynamicWhisper, config: Config, clip_sec: float) -> None:
        self.device = next(model.parameters()).device
        self._clip_sec = clip_sec
        self._dtype = getattr(torch, choose_precision(config.precision, self.device).precision)
        self._copy: DynamicWhisper | None = copy.deepcopy(model)
        self._copy.audio_context = config.model.audio_context
        self._optimizer: torch.optim.Optimizer | None = build_optimizer(
            self._copy, learning_rate=0.0, weight_decay=0.0, kind=config.training.optimizer
        )
        self._loss: TokenLoss | None = TokenLoss(self._copy).train()
        self._full = config.model.audio_context == "full"
        self._some_full = config.training.full_context_prob > 0

    def fits(self, clips: int) -> bool:
        """Whether one update on this many clips fits."""
        try:
            with _CpuMemory(self.device) as memory:
                self._update(clips, _CONTEXT_SEC if self._full else self._clip_sec)
                if self._some_full and not self._full:  # such a batch goes in pieces, as `Updater` cuts it
                    self._update(max(1, int(clips * self._clip_sec * OWN_LENGTH_SLACK / _CONTEXT_SEC)), _CONTEXT_SEC)
            fitted = not memory.exceeded
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            fitted = False
        self._clear()
        return fitted

    def release(self) -> None:
        """Give the memory back."""
        self._loss = self._copy = self._optimizer = None
        self._clear()

    def _update(self, clips: int, clip_sec: float) -> None:
        assert self._loss is not None and self._optimizer is not None and self._copy is not None
        generator = torch.Generator().manual_seed(0)
        samples = padded_samples(round(clip_sec * SAMPLE_RATE))
        audio = torch.randn(clips, samples, generator=generator).to(self.device)
        features = log_mel_for(self._copy.config.num_mel_bins, self.device)(audio)
        length = max(4, round(self._clip_sec * TOKENS_PER_SEC))
        tokens = torch.randint(0, 1_000, (clips, length), generator=generator).to(self.device)
        labels = tokens.clone()
        labels[:, 0] = IGNORE_INDEX
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            loss = self._loss(features, tokens, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _clear(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        release_memory()


class _CpuMemory:
    """Watches this process's memory while something runs on a CPU; does nothing for another device."""

    def __init__(self, device: torch.device) -> None:
        self.exceeded = False
        self._process = psutil.Process()
        self._limit = self._process.memory_info().rss + _CPU_SHARE * psutil.virtual_memory().available
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device.type == "cpu" else None

    def __enter__(self) -> _CpuMemory:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SEC):
            self.exceeded |= self._process.memory_info().rss > self._limit
