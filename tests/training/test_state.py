from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from src.training.methods import prepare_model
from src.training.schedule import build_optimizer
from src.training.state import (
    frozen_digest,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    random_state,
    restore_random_state,
)
from src.utils.config import TrainingConfig
from src.utils.errors import CheckpointError


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def through_json(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values))


def test_weights_and_optimizer_go_on_bit_for_bit() -> None:
    straight = Net()
    optimizer = build_optimizer(straight, learning_rate=0.01, weight_decay=0.1)
    for seed in range(3):
        step(straight, optimizer, seed)
    weights = {name: tensor.clone() for name, tensor in model_tensors(straight).items()}
    tensors, values = optimizer_tensors(optimizer, straight)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert set(tensors) == {f"{name}/{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}

    resumed = Net()
    other = build_optimizer(resumed, learning_rate=0.01, weight_decay=0.1)
    step(resumed, other, 99)  # what it holds is forgotten
    load_model_tensors(resumed, weights)
    load_optimizer_tensors(other, resumed, tensors, through_json(values))
    for seed in range(3, 6):
        step(straight, optimizer, seed)
        step(resumed, other, seed)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    # the saved tensors are not those that are trained on
    assert torch.equal(tensors["first.weight/step"], torch.tensor(3.0))


def test_parameters_are_named_so_their_order_may_change() -> None:
    model = Net()
    optimizer = build_optimizer(model, learning_rate=0.01, weight_decay=0.1)
    step(model, optimizer, 0)
    tensors, values = optimizer_tensors(optimizer, model)
    other = SGD([*reversed(list(model.parameters()))], lr=0.1)
    load_optimizer_tensors(other, model, tensors, values)
    assert torch.equal(other.state[model.second.bias]["exp_avg"], optimizer.state[model.second.bias]["exp_avg"])


def test_other_shapes_names_and_parameters_are_refused_before_anything_changes() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"3 trained parameters differ .* first first\.weight: \(5, 4\) in the"):
        load_model_tensors(model, model_tensors(Net(5)))
    fewer = model_tensors(model)
    del fewer["second.bias"]
    with pytest.raises(CheckpointError, match=r"second\.bias: None in the checkpoint"):
        load_model_tensors(model, {name: tensor + 1 for name, tensor in fewer.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="has third, which is not trained here"):
        load_optimizer_tensors(SGD(model.parameters(), lr=1.0), model, {"third/step": torch.zeros(())}, {})


def test_only_trained_parameters_are_saved_and_the_others_have_a_checksum(small: tuple[Any, Any]) -> None:
    model, _ = small
    prepare_model(model, TrainingConfig(method="lora"))
    saved = model_tensors(model)
    assert saved
    assert all(".lora_" in name for name in saved)
    digest = frozen_digest(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_" in name).add_(1)
    assert frozen_digest(model) == digest
    with torch.no_grad():
        model.model.decoder.layer_norm.bias[3] += 1e-6
    assert frozen_digest(model) != digest


def test_tied_weights_are_saved_once(small: tuple[Any, Any]) -> None:
    names = set(model_tensors(small[0]))
    assert "model.decoder.embed_tokens.weight" in names
    assert "proj_out.weight" not in names


def draw() -> list[Any]:
    numbers = np.random.normal(size=3).tolist()  # an odd count leaves half a pair behind
    return [torch.rand(3).tolist(), numbers, random.random(), random.gauss(0, 1), float(np.random.rand())]


def test_every_generator_draws_again_what_it_drew() -> None:
    before = random_state()
    try:
        draw()
        tensors, values = random_state()
        first, values = draw(), through_json(values)
        draw()
        restore_random_state(tensors, values)
        assert draw() == first
    finally:
        restore_random_state(*before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_generator_draws_again_what_it_drew() -> None:
    tensors, values = random_state()
    first = torch.rand(4, device="cuda")
    restore_random_state(tensors, through_json(values))
    assert torch.equal(torch.rand(4, device="cuda"), first)
