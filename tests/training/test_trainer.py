from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from src.data.checking import check_utterance
from src.data.loader import create_loader
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.training.trainer import WhisperTrainer
from src.utils.config import Config
from src.utils.config_schema import AugmentationConfig, CompositionConfig
from src.utils.errors import DataError

pytestmark = pytest.mark.slow


def with_training(config: Config, **training: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def without_augmentation(config: Config) -> Config:
    return config.model_copy(update={"augmentation": AugmentationConfig(enabled=False)})


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """13 short training clips of several speakers."""
    train = [u for u in sample if u.meta["split"] == "train"]
    return [check_utterance(u, Config().data) for u in train[::27][:13]]


def make(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, val: int = 2) -> WhisperTrainer:
    model, processor = tiny_en
    train_loader = create_loader(clips, processor, config, shuffle=True)
    return WhisperTrainer(model, processor, train_loader, create_loader(clips[:val], processor, config), config)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (2, 4), (3, 3)])
def test_accumulation_gives_the_gradients_of_the_whole_batch(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, batch_size: int, steps: int
) -> None:
    settings = with_training(without_augmentation(config), max_trailing_silence_sec=0, batch_size=8)
    trainer = make(tiny_en, clips[:8], settings)
    trainer.model.eval()
    collate = trainer._train_loader.collate_fn
    items = [trainer._train_loader.dataset[i] for i in range(8)]
    # one length for all, so that padding is the same in every partition
    longest = max(len(item["audio"]) for item in items)
    for item in items:
        item["audio"] = torch.nn.functional.pad(item["audio"], (0, longest - len(item["audio"])))

    def gradients(window: list[list[dict[str, Any]]]) -> tuple[float, torch.Tensor]:
        trainer.model.zero_grad()
        captured: list[torch.Tensor] = []
        trainer._optimizer.step = lambda: captured.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        )
        trainer._accelerator.clip_grad_norm_ = lambda *a: torch.tensor(0.0)
        loss, tokens, _ = trainer._update([collate(part) for part in window])
        return loss / tokens, captured[0]

    whole_loss, whole = gradients([items])
    split_loss, split = gradients([items[at : at + batch_size] for at in range(0, 8, batch_size)][:steps])
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(split, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)


def test_every_clip_of_an_epoch_is_stepped_and_the_schedule_counts_updates(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    settings = with_training(config, batch_size=2, gradient_accumulation_steps=3)
    trainer = make(tiny_en, clips, settings)
    seen: list[str] = []
    original = trainer._loss_sum

    def spy(batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        seen.extend(batch["ids"])
        return original(batch, generator)

    trainer._loss_sum = spy  # type: ignore[method-assign]
    trainer.train(num_epochs=1)
    assert sorted(seen) == sorted(u.id for u in clips)
    rows = [json.loads(line) for line in trainer.experiment.metrics_path.read_text().splitlines()]
    updates = [row for row in rows if row["event"] == "train_step"]
    assert len(updates) == 3  # 7 batches in windows of 3
    assert max(row["learning_rate"] for row in updates) == pytest.approx(3.75e-5)
    assert updates[-1]["learning_rate"] < 3.75e-5


def test_each_epoch_has_its_own_order(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> None:
    trainer = make(tiny_en, clips, with_training(config, batch_size=2))
    orders = []
    for epoch in (1, 2, 1):
        trainer._train_loader.set_epoch(epoch - 1)
        orders.append([batch["ids"] for batch in trainer._train_loader])
    assert orders[0] == orders[2] != orders[1]


def test_fine_tuning_learns_saves_the_best_and_reloads_the_same(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    trainer = make(tiny_en, clips, with_training(config, batch_size=4), val=13)
    history = trainer.train(num_epochs=3)
    assert history is trainer.history
    assert set(history) == {"epoch", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate"}
    assert history["epoch"] == [1, 2, 3]
    assert history["train_loss"][2] < history["train_loss"][0]
    assert trainer.best_epoch == 1 + history["val_wer"].index(min(history["val_wer"]))
    # the model in memory, and the saved one, are those of the best epoch
    loader = create_loader(clips, trainer.processor, config)
    again = ModelEvaluator(trainer.model, trainer.processor, config).evaluate_dataset(loader)
    assert again.wer == pytest.approx(min(history["val_wer"]))
    assert trainer.model.audio_context == "dynamic"
    stock_class = WhisperForConditionalGeneration.from_pretrained(trainer.best_model_dir)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, stock_class.state_dict()[name]), name
    assert stock_class.config.audio_context == "dynamic"
    assert stock_class.generation_config.alignment_heads


def test_the_best_model_is_chosen_by_wer_and_not_by_loss(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_en, clips[:4], config)
    results = iter([(0.5, 0.30), (0.4, 0.20), (0.1, 0.25)])  # (loss, WER): the loss goes on falling

    class Result:
        def __init__(self, loss: float, wer: float) -> None:
            self.loss, self.wer, self.cer = loss, wer, wer / 2

    monkeypatch.setattr(trainer, "_validate", lambda bar: Result(*next(results)))
    trainer.train(num_epochs=3)
    assert trainer.best_epoch == 2


def test_ctrl_c_leaves_the_last_best_model_whole(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_en, clips[:4], with_training(config, batch_size=2))
    original = trainer._update
    calls: Iterator[int] = iter(range(99))

    def interrupted(window: list[dict[str, Any]]) -> tuple[float, int, float]:
        if next(calls) == 3:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return original(window)

    monkeypatch.setattr(trainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(num_epochs=3)
    assert WhisperForConditionalGeneration.from_pretrained(trainer.best_model_dir)
    assert sorted(p.name for p in trainer.best_model_dir.parent.iterdir()) == ["best_model_hf"]


def test_a_loss_that_is_not_finite_stops_with_the_clips_ids(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    trainer = make(tiny_en, clips[:2], config)
    with torch.no_grad():
        trainer.model.model.encoder.conv1.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=clips[0].id):
        trainer.train(num_epochs=1)


def test_composed_examples_are_trained_on(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> None:
    """No-speech clips, joined neighbours, timestamps and previous text, with all augmentation on."""
    composition = CompositionConfig(
        no_speech_fraction=0.2, concatenate_prob=0.5, timestamp_prob=0.5, previous_text_prob=0.5
    )
    augmentation = AugmentationConfig(pitch_prob=1, noise_prob=1, room_prob=1, codec_prob=1, spec_augment_prob=1)
    config = config.model_copy(update={"composition": composition, "augmentation": augmentation})
    one_speaker = [replace(clip, speaker="s") for clip in clips[:10]]
    trainer = make(tiny_en, one_speaker, with_training(config, batch_size=4))
    seen: list[dict[str, Any]] = []
    original = trainer._loss_sum

    def spy(batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        seen.append(batch)
        loss = original(batch, generator)
        assert torch.isfinite(loss)
        return loss

    trainer._loss_sum = spy  # type: ignore[method-assign]
    trainer.train(num_epochs=1)
    ids = [part for batch in seen for name in batch["ids"] for part in name.split("+")]
    assert sorted(ids) == sorted([*(clip.id for clip in one_speaker), "no-speech-0001", "no-speech-0002"])
    assert any("+" in name for batch in seen for name in batch["ids"])
    assert any(bool(batch["timed"].any()) for batch in seen)


def test_16_bit_training_keeps_float32_weights_and_a_verified_export(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    trainer = make(tiny_en, clips[:4], config.model_copy(update={"precision": "bfloat16"}))
    trainer.train(num_epochs=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "forward" in trainer.model.__dict__  # autocast is still on
    assert (trainer.best_model_dir / "model.safetensors").exists()


def test_the_run_folder_tells_the_whole_story(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> None:
    trainer = make(tiny_en, clips[:4], config)
    trainer.train(num_epochs=1)
    folder: Path = trainer.experiment.dir
    assert {"config.yaml", "env.json", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["torch"]
    events = [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert events[-1] == "epoch"
