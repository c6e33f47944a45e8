from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.data.checking import check_utterance
from src.data.loader import create_loader
from src.data.utterance import Utterance
from src.training.trainer import WhisperTrainer
from src.training.waiting import WaitMeter
from src.utils.config import Config
from src.utils.errors import DataError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def slow(clock: Clock, delays: list[float]) -> Iterator[int]:
    for number, delay in enumerate(delays):
        clock.now += delay
        yield number
    clock.now += 1.0  # the end comes late too


def test_waiting_is_the_time_until_an_item_comes() -> None:
    clock = Clock()
    meter = WaitMeter(clock)
    laps = []
    for _ in meter.watch(slow(clock, [3.0, 0.0, 1.0])):
        clock.now += 1.0  # work
        laps.append(meter.lap())
    assert laps == [0.75, 0.0, 0.5]
    assert meter.total() == pytest.approx(5 / 8)


def test_a_lap_of_several_items_counts_them_all() -> None:
    clock = Clock()
    meter = WaitMeter(clock)
    items = meter.watch(slow(clock, [1.0, 2.0]))
    assert [next(items), next(items)] == [0, 1]
    clock.now += 7.0
    assert meter.lap() == 0.3


def test_no_time_is_no_waiting() -> None:
    assert WaitMeter(Clock()).lap() == WaitMeter(Clock()).total() == 0.0


def test_an_error_passes_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("x")

    with pytest.raises(KeyError):
        list(WaitMeter(Clock()).watch(broken()))


# the trainer, without its forward pass

Rows = list[dict[str, Any]]


@pytest.fixture
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[:9]]


@pytest.fixture
def idle(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> WhisperTrainer:
    """A trainer whose loss costs nothing and whose pauses are recorded in `drawn`."""
    model, processor = tiny_en
    training = config.training.model_copy(update={"batch_size": 2, "full_context_prob": 0.3})
    config = config.model_copy(update={"training": training})
    trainer = WhisperTrainer(
        model,
        processor,
        create_loader(clips, processor, config, shuffle=True),
        create_loader(clips[:1], processor, config),
        config,
    )
    trainer.drawn = []  # type: ignore[attr-defined]
    weight = next(model.parameters())

    def loss(batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        trainer.drawn.append((batch["ids"], trainer._inputs.audio(batch, generator)[0].shape[1]))  # type: ignore[attr-defined]
        return 0 * weight.sum() + 1

    trainer._loss_sum = loss  # type: ignore[method-assign]
    trainer._validate = lambda bar: SimpleNamespace(loss=1.0, wer=1.0, cer=1.0)  # type: ignore[method-assign, assignment, return-value]
    return trainer


def drawn(trainer: Any) -> list[tuple[list[str], int]]:
    found: list[tuple[list[str], int]] = trainer.drawn[:]
    trainer.drawn.clear()
    return found


@pytest.mark.slow
def test_a_resumed_epoch_draws_the_pauses_of_a_straight_one(idle: WhisperTrainer) -> None:
    bar = SimpleNamespace(update=lambda: None, set_postfix=lambda **_: None)
    schedule = SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None)
    idle._train_epoch(2, schedule, bar)  # type: ignore[arg-type]
    straight = drawn(idle)
    assert len({samples for _, samples in straight}) > 2
    loader = idle._train_loader
    loader.set_epoch(0)
    loader.set_epoch(1)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    loader.load_state_dict(loader.state_dict())
    idle._train_epoch(2, schedule, bar)  # type: ignore[arg-type]
    assert drawn(idle) == straight[3:]
    idle._train_epoch(3, schedule, bar)  # type: ignore[arg-type]
    assert [samples for _, samples in drawn(idle)] != [samples for _, samples in straight]


@pytest.mark.slow
def test_the_share_of_waiting_is_in_every_row_and_in_the_log(
    idle: WhisperTrainer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.training.trainer.export_huggingface", lambda *a: None)
    with caplog.at_level("INFO"):
        idle.train(num_epochs=1)
    rows = [json.loads(line) for line in idle.experiment.metrics_path.read_text().splitlines()]
    shares = [row["data_wait_share"] for row in rows]
    assert [row["event"] for row in rows] == ["train_step"] * 5 + ["epoch"]
    assert all(0 <= share <= 1 for share in shares)
    assert any(f"waited for data {100 * shares[-1]:.1f}% of the time" in message for message in caplog.messages)


@pytest.mark.slow
def test_a_loader_of_another_number_of_processes_is_refused(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = create_loader(clips, processor, config, shuffle=True)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(DataError, match=r"shares an epoch out to 2 process\(es\), but 1 train"):
        WhisperTrainer(model, processor, loader, loader, config)
