"""State of a training run as tensors and JSON: taken from its parts, and put back bit for bit.

Only trained parameters are saved; the others come with the model, and a checksum proves that they are the same. All
processes of a sharded model must call these functions, and only the main one gets the tensors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from src.evaluation.evaluator import EvaluationResult
from src.models.loading import not_finite
from src.utils.errors import CheckpointError, listed_problems

HISTORY_KEYS = ("epoch", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate", "val_rate")
_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, strict=False)


@dataclass
class Progress:
    """How far a training has come, and its results so far."""

    training_id: str = field(default_factory=lambda: secrets.token_hex(8))  # stays when it is resumed in another run
    step: int = 0  # updates made, including skipped ones
    applied: int = 0  # updates; the schedule counts these
    epochs_done: int = 0  # validation included
    next_batch: int = 0  # of the current epoch, in this process
    best_epoch: int | None = None  # of the model on disk
    best_rate: float = math.inf  # its headline on the validation set
    metric: str = "WER"  # of the headline
    last_rate: float = math.nan  # learning rate of the last update
    totals: dict[str, float] = field(default_factory=lambda: {"loss_sum": 0.0, "tokens": 0})  # of the epoch, applied
    history: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in HISTORY_KEYS})

    @property
    def best_is_last(self) -> bool:
        """Whether the model in training is that of the best epoch."""
        return self.best_epoch is not None and self.best_epoch == self.epochs_done and not self.next_batch

    def finish_epoch(self, result: EvaluationResult) -> bool:
        """Add an epoch's results; return whether its headline is the lowest."""
        self.epochs_done += 1
        self.next_batch = 0
        loss_sum, tokens = self.totals.values()
        train_loss = loss_sum / tokens if tokens else math.nan  # every update was skipped
        self.totals = {"loss_sum": 0.0, "tokens": 0}
        row = (self.epochs_done, train_loss, result.loss, result.wer, result.cer, self.last_rate, result.rate)
        for key, value in zip(HISTORY_KEYS, row, strict=True):
            self.history[key].append(value)
        self.metric = result.metric
        is_best = result.rate < self.best_rate
        if is_best:
            self.best_epoch, self.best_rate = self.epochs_done, result.rate
        return is_best

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return the progress that `state_dict` was taken from; `state` does not change when it continues."""
        values = copy.deepcopy(dict(state))
        if "best_wer" in values:  # before 2026-12 the WER was the headline of every language
            values["best_rate"] = values.pop("best_wer")
        values["history"].setdefault("val_rate", list(values["history"]["val_wer"]))
        progress = cls(**values)
        TypeAdapter(cls).validate_json(json.dumps(asdict(progress)), strict=True)
        counts = (progress.step, progress.applied, progress.epochs_done, progress.next_batch)
        lengths = {len(progress.history[key]) for key in HISTORY_KEYS}
        if min(counts) < 0 or len(lengths) > 1 or progress.totals.keys() != cls().totals.keys():
            raise ValueError("its progress contradicts itself")
        return progress

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return asdict(self)


class _Loader(BaseModel):
    epoch: NonNegativeInt
    batches: NonNegativeInt
    made_from: dict[str, Any]


class _Updater(BaseModel):
    pieces: PositiveInt
    largest: NonNegativeInt
    norms: list[float]
    skipped_in_row: list[Any]


class _Values(BaseModel):
    """What a checkpoint's JSON must have, besides progress and random generators."""

    run: str
    saved_at: float
    loader: _Loader
    updater: _Updater
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    frozen_parameters: str
    config: dict[str, Any]
    data_version: str


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse the JSON of a checkpoint that this code did not write, before anything is taken from it.

    Raises ValueError, KeyError, TypeError, AttributeError or OverflowError.
    """
    try:
        run = _Values.model_validate(dict(values)).run
        Progress.from_state(values["progress"])
    except ValidationError as err:
        raise ValueError(listed_problems(err.errors())) from err
    if run != Path(run).name:
        raise ValueError(f"run: {run!r} is not a name")
    _restore_generators(values["rng"], random.Random(), np.random.RandomState())


def _restore_generators(values: Mapping[str, Any], python: Any, numpy: Any) -> None:
    version, numbers, gauss = values["python"]
    python.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = values["numpy"]
    numpy.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, on the CPU; tied ones once."""
    tensors: Any = get_model_state_dict(model, options=_SAVE)
    return {name: tensors[name] for name in _trained_shapes(model) if name in tensors}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained parameters back; `CheckpointError`, and no change, if names or shapes differ."""
    here = _trained_shapes(model)
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in {**here, **saved} if here.get(name) != saved.get(name)]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} trained parameters differ from this model's, first {wrong[0]}: {saved.get(wrong[0])} in "
            f"the checkpoint, {here.get(wrong[0])} here; take the same model.variant and training.method"
        )
    if wrong := not_finite(tensors):
        raise CheckpointError(
            f"{len(wrong)} parameters have nan or infinity, first {wrong[0]}; take an older checkpoint"
        )
    load_weights(model, tensors)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a model, sharded or not."""
    set_model_state_dict(model, dict(tensors), options=_LOAD)


def frozen_digest(model: nn.Module) -> str:
    """Return a checksum over the parameters that are not trained."""
    frozen = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    return tensors_digest((name, p.full_tensor() if isinstance(p, DTensor) else p) for name, p in frozen)


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum over names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors as "parameter/key", and its other values as JSON.

    Parameters are named, not numbered: their order may change. The learning rate is the schedule's.
    """
    if not optimizer.state:  # torch would make a state by a step of its own, which later steps would count
        return {}, {}
    state: Any = get_optimizer_state_dict(model, optimizer, options=_SAVE).get("state", {})
    flat = {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put the optimizer's state back; `CheckpointError` if it is of other parameters or of another optimizer."""
    state: dict[str, dict[str, Any]] = {}
    for full_name, value in {**tensors, **values}.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(name, {})[key] = value.clone() if isinstance(value, Tensor) else value
    unknown = sorted(state.keys() - _trained_shapes(model).keys())
    if unknown:
        raise CheckpointError(f"the optimizer's state has {unknown[0]}, which is not trained here")
    optimizer.state.clear()
    if not state:
        return
    optimizer.zero_grad(set_to_none=True)  # torch makes no state while an interrupted update has left gradients
    here: Any = get_optimizer_state_dict(model, optimizer)  # of a step of zeros, which makes every entry
    for name, entries in state.items():
        if entries.keys() != here["state"][name].keys():
            raise CheckpointError(
                f"the optimizer's state of {name} has {', '.join(entries)} instead of "
                f"{', '.join(here['state'][name])}; take the same training.optimizer"
            )
        ours = here["state"][name]
        wrong = [key for key, value in entries.items() if getattr(value, "shape", 0) != getattr(ours[key], "shape", 0)]
        if wrong:
            raise CheckpointError(f"the optimizer's state {name}/{wrong[0]} has another shape than here")
    here["state"] = state
    set_optimizer_state_dict(model, optimizer, here, options=_LOAD)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in state:  # had no gradient yet
            optimizer.state.pop(parameter, None)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global random generator: torch's as tensors, Python's and NumPy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda-{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put every global random generator back, except those of GPUs that this machine lacks."""
    try:
        torch.set_rng_state(tensors["torch"])
        for number in range(torch.cuda.device_count()):
            if f"cuda-{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda-{number}"], number)
    except (RuntimeError, KeyError, TypeError) as err:
        raise CheckpointError(f"the state of torch's random generator is absent or another's: {err}") from err
    _restore_generators(values, random, np.random)


def _trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
