"""The state of a training run as tensors and JSON: taken from its parts, and put back into them bit for bit.

Only trained parameters are saved: frozen ones, such as the base of LoRA adapters, come with the model, and a checksum
proves that they are the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.training.sharding import collect_on_cpu, shard_like, whole_tensor
from src.utils.errors import CheckpointError

_DIGEST_CHARACTERS = 16


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, on the CPU; tied ones once.

    Where the model is shared out to processes, all of them must call it, and only the main one gets them; so with
    `optimizer_tensors`.
    """
    return collect_on_cpu(_trained(model))


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained parameters back.

    Raises: CheckpointError: other names or shapes: another variant or method.
    """
    mine = dict(_trained(model))
    _require_same(
        {name: tuple(p.shape) for name, p in mine.items()}, {name: tuple(t.shape) for name, t in tensors.items()}
    )
    for name, parameter in mine.items():
        parameter.copy_(shard_like(tensors[name], parameter))


def frozen_digest(model: nn.Module) -> str:
    """Return a checksum over the parameters that are not trained."""
    return tensors_digest((name, whole_tensor(p)) for name, p in model.named_parameters() if not p.requires_grad)


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum over names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors as "parameter/key", and its other values as JSON.

    Parameters are named, not numbered: their order may change. The learning rate is the schedule's.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in _trained(model)}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{key}"] = value
            else:
                values[f"{names[parameter]}/{key}"] = value
    return collect_on_cpu(tensors.items()), values


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put the optimizer's state back.

    Raises: CheckpointError: a state of other parameters, or of another kind of optimizer.
    """
    parameters = dict(_trained(model))
    optimizer.state.clear()
    for full_name, value in [*tensors.items(), *values.items()]:
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"the optimizer's state has {name}, which is not trained here")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            # fused AdamW keeps its step count beside the weights, the plain one on the CPU
            value = shard_like(value, parameter).to(parameter.device).clone()
        optimizer.state[parameter][key] = value


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global random generator: torch's as tensors, Python's and NumPy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda-{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    values = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return tensors, values


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Put every global random generator back; those of GPUs that are not here are left out."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda-{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda-{number}"], number)
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} trained parameters differ from this model's, first {wrong[0]}: {theirs.get(wrong[0])} in "
            f"the checkpoint, {ours.get(wrong[0])} here; take the same model.variant and training.method"
        )
