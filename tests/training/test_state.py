from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from src.training.methods import prepare_model
from src.training.state import (
    Progress,
    frozen_digest,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    random_state,
    restore_random_state,
)
from src.training.updates import build_optimizer
from src.utils.config import TrainingConfig
from src.utils.errors import CheckpointError


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(4, width), second=nn.Linear(width, 4)))


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def through_json(values: dict[str, Any]) -> Any:
    return json.loads(json.dumps(values))


def test_weights_and_optimizer_continue_bit_for_bit() -> None:
    straight = net()
    optimizer = build_optimizer(straight, learning_rate=0.01, weight_decay=0.1)
    assert optimizer_tensors(optimizer, straight) == ({}, {})  # before the first step
    for seed in range(3):
        step(straight, optimizer, seed)
    weights = {name: tensor.clone() for name, tensor in model_tensors(straight).items()}
    tensors, values = optimizer_tensors(optimizer, straight)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert set(tensors) == {f"{name}/{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}

    resumed = net()
    other = build_optimizer(resumed, learning_rate=0.01, weight_decay=0.1)
    for seed in (99, 98):
        step(resumed, other, seed)  # forgotten
        load_optimizer_tensors(other, resumed, {}, {})
        assert not other.state
    for parameter in resumed.parameters():  # of an interrupted update
        parameter.grad = torch.ones_like(parameter)
    load_model_tensors(resumed, weights)
    load_optimizer_tensors(other, resumed, tensors, through_json(values))
    for seed in range(3, 6):
        step(straight, optimizer, seed)
        step(resumed, other, seed)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tensors["first.weight/step"], torch.tensor(3.0))  # the saved tensors are not those in training


def test_other_shapes_names_and_parameters_are_refused_before_anything_changes() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    fewer = {name: tensor + 1 for name, tensor in model_tensors(model).items() if name != "second.bias"}
    for tensors, name in ((model_tensors(net(5)), "first.weight"), (fewer, "second.bias")):
        with pytest.raises(CheckpointError, match=name):
            load_model_tensors(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"infinity.*first\.weight"):
        load_model_tensors(model, {name: tensor / 0 for name, tensor in model_tensors(model).items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    optimizer = build_optimizer(model, learning_rate=1.0, weight_decay=0.0)
    for name in ("third", "first.weight"):  # unknown here; of another kind of optimizer
        with pytest.raises(CheckpointError, match=name):
            load_optimizer_tensors(optimizer, model, {f"{name}/step": torch.zeros(())}, {})


def test_parameters_are_named_so_their_order_may_change_and_some_may_have_no_state() -> None:
    model = net()
    model.first.bias.requires_grad_(False)
    optimizer = build_optimizer(model, learning_rate=0.01, weight_decay=0.1)
    step(model, optimizer, 0)
    tensors, values = optimizer_tensors(optimizer, model)
    model.first.bias.requires_grad_(True)
    other = AdamW([*reversed(list(model.parameters()))], lr=0.1)
    load_optimizer_tensors(other, model, tensors, values)
    assert set(other.state) == set(model.parameters()) - {model.first.bias}
    for parameter, state in other.state.items():
        assert torch.equal(state["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_only_trained_parameters_are_saved_once_and_the_others_have_a_checksum(small: tuple[Any, Any]) -> None:
    model, _ = small
    names = set(model_tensors(model))
    assert "model.decoder.embed_tokens.weight" in names
    assert "proj_out.weight" not in names  # tied
    prepare_model(model, TrainingConfig(method="lora"))
    saved = model_tensors(model)
    assert saved
    assert all(".lora_" in name for name in saved)
    digest = frozen_digest(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_" in name).add_(1)
        assert frozen_digest(model) == digest
        model.model.decoder.layer_norm.bias[3] += 1e-6
    assert frozen_digest(model) != digest


def test_a_checkpoint_from_before_the_headline_goes_on_with_its_wer() -> None:
    state = Progress(epochs_done=1, best_epoch=1).state_dict()
    for new in ("best_rate", "metric"):
        del state[new]
    history = {key: [0.25] for key in state["history"] if key != "val_rate"}
    progress = Progress.from_state(through_json(state | {"best_wer": 0.25, "history": history}))
    assert (progress.best_rate, progress.metric, progress.history["val_rate"]) == (0.25, "WER", [0.25])


def test_progress_survives_json_with_its_infinities() -> None:
    fresh = Progress()
    again = Progress.from_state(through_json(fresh.state_dict()))
    assert again.best_rate == float("inf")
    assert str(again) == str(fresh)
    state = fresh.state_dict()
    for values in Progress.from_state(state).history.values():
        values.append(1.0)
    assert state == fresh.state_dict()  # a verified checkpoint can be resumed from twice


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
        if torch.cuda.is_available():
            (tensors, values), drawn = random_state(), torch.rand(4, device="cuda")
            restore_random_state(tensors, through_json(values))
            assert torch.equal(torch.rand(4, device="cuda"), drawn)
    finally:
        restore_random_state(*before)
