"""How far a training run has come, as values that can be saved as JSON."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from src.evaluation.results import EvaluationResult
from src.training.updates import UpdateReport

HISTORY_KEYS = ("epoch", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate")


@dataclass
class EpochTotals:
    """Sums over the applied updates of the epoch that runs."""

    loss_sum: float = 0.0  # nats
    tokens: int = 0


@dataclass
class Progress:
    """Counters and results.

    Attributes:
        training_id: of the training, kept when it is resumed in another run's folder.
        step: updates made, the skipped ones included.
        applied: updates applied; the schedule counts these.
        epochs_done: finished, with their validation.
        next_batch: of the epoch that runs, in this process.
        best_epoch, best_wer: of the model on disk.
        last_rate: learning rate of the last update.
    """

    training_id: str = field(default_factory=lambda: secrets.token_hex(8))
    step: int = 0
    applied: int = 0
    epochs_done: int = 0
    next_batch: int = 0
    best_epoch: int | None = None
    best_wer: float = math.inf
    last_rate: float = math.nan
    totals: EpochTotals = field(default_factory=EpochTotals)
    history: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in HISTORY_KEYS})

    def count(self, report: UpdateReport, rate: float, batches: int) -> None:
        """Add one update over this many batches."""
        self.step += 1
        self.next_batch += batches
        self.last_rate = rate
        if report.applied:
            self.applied += 1
            self.totals.loss_sum += report.loss_sum
            self.totals.tokens += report.tokens

    def finish_epoch(self, result: EvaluationResult) -> bool:
        """Add an epoch's results; return whether its WER is the lowest."""
        self.epochs_done += 1
        totals, self.totals, self.next_batch = self.totals, EpochTotals(), 0
        row = {
            "epoch": self.epochs_done,
            # sums over sums; nan where every update was skipped
            "train_loss": totals.loss_sum / totals.tokens if totals.tokens else math.nan,
            "val_loss": result.loss,
            "val_wer": result.wer,
            "val_cer": result.cer,
            "learning_rate": self.last_rate,
        }
        for key, value in row.items():
            self.history[key].append(value)
        is_best = result.wer < self.best_wer
        if is_best:
            self.best_epoch, self.best_wer = self.epochs_done, result.wer
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Make the progress that a state was taken of."""
        return cls(**{**state, "totals": EpochTotals(**state["totals"])})
