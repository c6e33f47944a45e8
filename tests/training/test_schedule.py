from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
from torch import nn

from src.training.methods import prepare_model
from src.training.schedule import build_optimizer, build_schedule, count_updates, default_learning_rate
from src.utils.config import TrainingConfig
from src.utils.errors import MissingDependencyError


def rates(total: int, warmup_ratio: float, *, done: int = 0) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0)
    schedule = build_schedule(optimizer, total_updates=total, warmup_ratio=warmup_ratio, done_updates=done)
    seen = []
    for _ in range(total - done):
        seen.append(schedule.get_last_lr()[0])
        assert {group["lr"] for group in optimizer.param_groups} == {seen[-1]}
        optimizer.step()
        schedule.step()
    return seen


def test_rate_reaches_its_peak_and_comes_down_within_the_real_updates() -> None:
    seen = rates(100, 0.1)
    assert max(seen) == 1.0
    assert seen.index(1.0) == 9
    assert seen[0] == pytest.approx(0.1)
    assert seen[-1] == pytest.approx(1 / 90)
    assert all(a > b for a, b in itertools.pairwise(seen[10:]))


def test_short_runs_and_no_warm_up_work() -> None:
    assert rates(1, 0.1) == [1.0]
    assert rates(4, 0.0) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("done", [1, 3, 10, 57, 99])
def test_a_resumed_schedule_goes_on_where_the_straight_one_is(done: int) -> None:
    assert rates(100, 0.1, done=done) == rates(100, 0.1)[done:]


def test_a_schedule_can_be_made_again_on_a_used_optimizer() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0)
    schedule = build_schedule(optimizer, total_updates=4, warmup_ratio=0.0)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for done, expected in [(3, 5 / 8), (0, 1.0)]:  # a run that is made longer; one that begins anew
        assert build_schedule(optimizer, total_updates=8, warmup_ratio=0.0, done_updates=done).get_last_lr() == [
            expected, expected
        ]  # fmt: skip


@pytest.mark.parametrize(("batches", "steps", "epochs", "updates"), [(45, 1, 2, 90), (45, 4, 2, 24), (3, 8, 5, 5)])
def test_updates_count_short_windows_at_the_end_of_an_epoch(
    batches: int, steps: int, epochs: int, updates: int
) -> None:
    assert count_updates(batches, steps, epochs) == updates


def test_norms_and_biases_have_no_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, free = build_optimizer(model, learning_rate=1.0, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 3)}
    assert sum(p.numel() for p in free["params"]) == 12


def test_of_whisper_matrices_and_filters_decay_and_each_weight_is_trained_once(small: tuple[Any, Any]) -> None:
    model, _ = small
    prepare_model(model, TrainingConfig())
    decayed, free = build_optimizer(model, learning_rate=1.0, weight_decay=0.1).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert not [names[p] for p in decayed["params"] if "layer_norm" in names[p]]
    assert all(names[p].endswith(".bias") or "layer_norm" in names[p] for p in free["params"])
    together = [*decayed["params"], *free["params"]]
    assert len(together) == len(set(together)) == len(names) - 1  # all but the encoder's positions


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    groups = build_optimizer(model, learning_rate=1.0, weight_decay=0.1).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


@pytest.mark.parametrize(
    ("d_model", "rate"), [(384, 3.75e-5), (512, 2.5e-5), (768, 1.25e-5), (1024, 6.25e-6), (1280, 5e-6)]
)
def test_default_rate_goes_by_size_and_is_ten_times_that_for_adapters(d_model: int, rate: float) -> None:
    assert default_learning_rate(d_model) == rate
    assert default_learning_rate(d_model, lora=True) == pytest.approx(10 * rate)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_adam_without_its_package_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes, or set it to adamw"):
        build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, kind="adamw_8bit")
