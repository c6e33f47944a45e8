from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from src.data.loader import create_loader
from src.data.utterance import Utterance
from src.training.inputs import TrainingInputs
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


# the trainer


@pytest.mark.slow
def test_a_resumed_epoch_draws_the_pauses_of_a_straight_one(
    make_trainer: Callable[..., WhisperTrainer], clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[tuple[str, ...], int]] = []
    audio = TrainingInputs.audio

    def kept(self: TrainingInputs, batch: dict[str, Any], generator: Any) -> Any:
        found = audio(self, batch, generator)
        drawn.append((tuple(batch["ids"]), found[0].shape[1]))
        return found

    monkeypatch.setattr(TrainingInputs, "audio", kept)
    settings = {"train": clips[:9], "training__full_context_prob": 0.3, "checkpoints__save_minutes": 0}
    straight = make_trainer(run_id="straight", **settings, checkpoints__save_total_limit=99)
    straight.train()
    whole, drawn[:] = drawn[:], []
    assert len({samples for _, samples in whole[:5]}) > 2
    assert [samples for _, samples in whole[:5]] != [samples for _, samples in whole[5:]]
    resumed = make_trainer(**settings)
    resumed.resume(straight.config.paths.checkpoints_dir / "straight" / "checkpoint-00000003")
    resumed.train()
    assert drawn == whole[3:]


@pytest.mark.slow
def test_the_share_of_waiting_is_in_every_row_and_in_the_log(
    make_trainer: Callable[..., WhisperTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    with caplog.at_level("INFO"):
        trainer.train(num_epochs=1)
    assert trainer.experiment is not None
    rows = [json.loads(line) for line in trainer.experiment.metrics_path.read_text().splitlines()]
    shares = [row["data_wait_share"] for row in rows]
    assert [row["event"] for row in rows] == ["train_step"] * 3 + ["epoch"]
    assert all(0 <= share <= 1 for share in shares)
    assert any(f"waited for data {100 * shares[-1]:.1f}% of the time" in message for message in caplog.messages)


@pytest.mark.slow
def test_a_loader_of_another_number_of_processes_is_refused(
    small: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = create_loader(clips, processor, config, shuffle=True)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(DataError, match=r"shares an epoch out to 2 process\(es\), but 1 train"):
        WhisperTrainer(model, processor, loader, loader, config)
