from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from src.data.features import CONTEXT_SAMPLES, LogMel
from src.data.labels import LabelEncoder
from src.data.loader import create_loader
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode
from src.models.export.huggingface import read_provenance
from src.models.export.verify import CLIPS_FILE
from src.training import saver as saving
from src.training.trainer import WhisperTrainer
from src.training.updates import Updater, UpdateReport
from src.utils.config import Config
from src.utils.errors import DataError
from tests.training.conftest import Configure, TrainerFactory, interrupt, rows_of, train_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("variant", "start"), [("tiny_en", 50257), ("base", 50258)])
def test_training_feeds_the_decoder_what_generation_feeds_it(
    request: pytest.FixtureRequest, clips: list[Utterance], configure: Configure, jfk: Any, variant: str, start: int
) -> None:
    model, processor = request.getfixturevalue(variant)
    language = None if variant == "tiny_en" else "en"
    batch = next(iter(create_loader(clips[:4], processor, configure(model__variant="base", model__language="en"))))
    prefix = list(LabelEncoder(processor.tokenizer, language=language).prefix)
    audio = torch.nn.functional.pad(torch.from_numpy(jfk), (0, CONTEXT_SAMPLES - len(jfk)))
    spoken = {} if language is None else {"language": language, "task": "transcribe"}
    fed: list[list[int]] = []
    hook = model.model.decoder.embed_tokens.register_forward_pre_hook(lambda _, args: fed.append(args[0][0].tolist()))
    model.generate(LogMel(80)(audio[None]), max_new_tokens=1, **spoken)
    assert fed[0] == prefix
    fed.clear()
    decode(model, processor, [jfk], DecodingOptions(language="en", max_tokens_per_sec=0.1))
    hook.remove()
    assert fed[0] == prefix
    assert len(prefix) == (2 if language is None else 4)
    for row, labels, text in zip(batch["decoder_input_ids"], batch["labels"], batch["texts"], strict=True):
        assert row[: len(prefix)].tolist() == prefix
        assert row.tolist().count(start) == 1
        due = labels[labels != -100].tolist()
        assert due[-1] == processor.tokenizer.eos_token_id
        assert processor.tokenizer.decode(due[:-1]) == f" {text.strip()}"
        # each input is what was expected before it
        assert row[len(prefix) : len(prefix) + len(due) - 1].tolist() == due[:-1]


@pytest.mark.usefixtures("quick_exports")
def test_fine_tuning_learns_saves_the_best_and_reloads_the_same(
    tiny_en: tuple[Any, Any], make_trainer: TrainerFactory, clips: list[Utterance]
) -> None:
    table = tiny_en[0].model.encoder.embed_positions.weight.clone()
    trainer = make_trainer(
        model=tiny_en, train=clips[:6], training__batch_size=3, training__weight_decay=0.5,
        inference__max_tokens_per_sec=4.0,
    )  # fmt: skip
    history = trainer.train(num_epochs=2)
    assert list(history) == ["epoch", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate", "val_rate"]
    assert history["epoch"] == [1, 2]
    assert history["train_loss"][1] < history["train_loss"][0]
    assert trainer.best_epoch == 1 + history["val_wer"].index(min(history["val_wer"]))
    # the model in memory, and the saved one, are those of the best epoch
    evaluator = ModelEvaluator(trainer.model, trainer.processor, trainer.config)
    again = evaluator.evaluate_dataset(create_loader(clips[:1], trainer.processor, trainer.config))
    assert again.wer == pytest.approx(min(history["val_wer"]))
    assert trainer.model.audio_context == "dynamic"
    assert torch.equal(trainer.model.model.encoder.embed_positions.weight, table)
    stock_class = WhisperForConditionalGeneration.from_pretrained(trainer.best_model_dir)
    saved = stock_class.state_dict()
    assert [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, saved[name])] == []
    assert stock_class.config.audio_context == "dynamic"
    assert stock_class.generation_config.alignment_heads
    assert stock_class.generation_config.suppress_tokens == trainer.model.generation_config.suppress_tokens


def test_little_speech_keeps_a_stock_model_at_30_s(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(model__audio_context="auto")
    assert (trainer.model.audio_context, trainer.config.model.audio_context) == ("full", "full")


# the loop


def keep_updates(monkeypatch: pytest.MonkeyPatch) -> list[UpdateReport]:
    """Return the reports of the updates to come."""
    reports: list[UpdateReport] = []
    update = Updater.update

    def kept(*args: Any) -> UpdateReport:
        reports.append(update(*args))
        return reports[-1]

    monkeypatch.setattr(Updater, "update", kept)
    return reports


def weights(trainer: WhisperTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_every_clip_of_an_epoch_is_stepped_the_schedule_counts_updates_and_the_run_folder_has_it_all(
    make_trainer: TrainerFactory, clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = keep_updates(monkeypatch)
    trainer = make_trainer(train=clips, training__gradient_accumulation_steps=3, training__learning_rate=0.05)
    history = trainer.train()
    for epoch in (reports[:3], reports[3:]):  # 7 batches in windows of 3: the last is short
        assert [report.clips for report in epoch][-1] in (1, 2)
        assert sorted(name for report in epoch for name in report.ids) == sorted(clip.id for clip in clips)
    rows = rows_of(trainer, "train_step")
    assert [row["learning_rate"] / 0.05 for row in rows] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    # the epoch's loss is weighted by tokens
    first = reports[:3]
    assert history["train_loss"][0] == pytest.approx(sum(r.loss_sum for r in first) / sum(r.tokens for r in first))
    assert history["train_loss"][0] != pytest.approx(sum(r.loss for r in first) / 3, rel=1e-5)
    assert reports[0].ids != reports[3].ids  # each epoch has its own order
    epochs = rows_of(trainer, "epoch")
    assert all(0 <= row["data_wait_share"] <= 1 for row in rows + epochs)
    assert {key: [row[key] for row in epochs] for key in history} == history
    assert epochs[0]["is_best"]


def test_a_skipped_update_is_named_and_counted_out(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reports = keep_updates(monkeypatch)
    trainer = make_trainer()
    loss = trainer._loss.forward
    calls = iter(range(99))
    monkeypatch.setattr(trainer._loss, "forward", lambda *a: loss(*a) * (math.nan if next(calls) == 1 else 1.0))
    (found,) = trainer.train(num_epochs=1)["train_loss"]
    assert [report.applied for report in reports] == [True, False, True]
    good = [reports[0], reports[2]]
    assert found == pytest.approx(sum(r.loss_sum for r in good) / sum(r.tokens for r in good))
    assert any(all(name in m for name in reports[1].ids) for m in caplog.messages)
    rows = rows_of(trainer, "train_step")
    assert [row["applied"] for row in rows] == [True, False, True]
    assert rows[1]["loss"] is None
    assert rows[2]["learning_rate"] == rows[1]["learning_rate"]  # the schedule counts what was applied


def test_16_bit_training_keeps_float32_weights_and_a_verified_export(
    make_trainer: TrainerFactory, small: tuple[Any, Any]
) -> None:
    model = small[0].to(torch.float16)  # as some checkpoints come
    trainer = make_trainer(model=(model, small[1]), precision="bfloat16")
    computed: set[torch.dtype] = set()

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        if module.training:
            computed.add(output.dtype)

    assert trainer._half is not None
    trainer._half.model.model.decoder.layers[0].fc1.register_forward_hook(keep)
    trainer.train(num_epochs=1)
    assert computed == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    saved = WhisperForConditionalGeneration.from_pretrained(trainer.best_model_dir)
    assert saved.dtype == torch.float32


def test_a_model_trained_for_both_is_measured_at_30_s_too(make_trainer: TrainerFactory, clips: list[Utterance]) -> None:
    trainer = make_trainer(training__full_context_prob=0.5)
    trainer.train(num_epochs=1)
    assert trainer.model.audio_context == "dynamic"
    trainer.model.audio_context = "full"
    loader = create_loader(clips[:1], trainer.processor, trainer.config)
    expected = ModelEvaluator(trainer.model, trainer.processor, trainer.config).evaluate_dataset(loader)
    (row,) = rows_of(trainer, "full_context")
    assert (row["val_wer"], row["own_length_rate"]) == (expected.wer, trainer.history["val_wer"][0])


def test_loaders_without_clips_or_of_other_processes_are_refused(
    make_trainer: TrainerFactory, small: tuple[Any, Any], clips: list[Utterance], config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match="empty"):
        make_trainer(train=[])
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        loader = create_loader(clips, small[1], config, shuffle=True)
    with pytest.raises(DataError, match=r"2 process\(es\)"):
        WhisperTrainer(*small, loader, loader, config)


# the best epoch


@pytest.mark.parametrize(("method", "patience"), [("full", 2), ("lora", 1)])
def test_the_best_model_is_chosen_by_the_headline_kept_in_memory_and_waited_for_with_patience(
    make_trainer: TrainerFactory, clips: list[Utterance], monkeypatch: pytest.MonkeyPatch,
    with_rates: Callable[..., None], method: str, patience: int,
) -> None:  # fmt: skip
    with_rates(0.30, 0.20, 0.25, 0.20, 0.10)  # an equal rate is no better one
    trainer = make_trainer(
        train=clips[:2], training__method=method, training__learning_rate=0.01, training__patience=patience,
        training__epochs=5,
    )  # fmt: skip
    at_end: list[dict[str, torch.Tensor]] = []
    save = trainer._saver.save
    monkeypatch.setattr(trainer._saver, "save", lambda progress: (at_end.append(weights(trainer)), save(progress)))
    trainer.train()
    assert trainer.ended
    assert trainer.history["epoch"] == list(range(1, 3 + patience))
    assert trainer.best_epoch == read_provenance(trainer.best_model_dir)["epoch"] == 2
    found = weights(trainer)
    assert all(torch.equal(tensor, found[name]) for name, tensor in at_end[1].items())
    assert not all(torch.equal(tensor, found[name]) for name, tensor in at_end[-1].items())
    assert [row["is_best"] for row in rows_of(trainer, "epoch")] == [True, True] + [False] * patience


# Ctrl-C


def test_training_goes_on_after_ctrl_c_and_ends_as_if_nothing_had_happened(
    make_trainer: TrainerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_rates: Callable[..., None]
) -> None:
    def make(folder: str) -> WhisperTrainer:
        with_rates(0.5, 0.6)
        return make_trainer(
            training__gradient_accumulation_steps=2, training__learning_rate=1e-3,
            paths__checkpoints_dir=str(tmp_path / folder),
        )  # fmt: skip

    straight = make("straight")
    straight.train()
    for place in ("update", "validation", "checkpoint", "export"):
        trainer = make(place)
        owner, name, call = {
            "update": (trainer._loss, "forward", 4),  # the second batch of the second epoch, in the middle of a window
            "validation": (ModelEvaluator, "evaluate_dataset", 1),
            "checkpoint": (trainer._saver, "_collect", 0),
            "export": (saving, "export_huggingface", 0),
        }[place]
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert trainer.history["epoch"] in ([], [1]), place
            trainer.train()
        assert trainer.history == straight.history, place
        assert trainer.best_epoch == straight.best_epoch
        found = weights(trainer)
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(straight).items()), place
        assert read_provenance(trainer.best_model_dir)["epoch"] == trainer.best_epoch
        assert [row["step"] for row in rows_of(trainer, "train_step")] == [1, 2, 3, 4]
        assert {path.name for path in trainer.best_model_dir.parent.rglob(".*")} <= {CLIPS_FILE}


def test_a_run_that_was_stopped_in_a_later_epoch_still_ends_with_the_best_weights(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(training__learning_rate=0.01)
    train_until(trainer, 4)
    trainer.train(num_epochs=1)  # enough, says the user
    saved = WhisperForConditionalGeneration.from_pretrained(trainer.best_model_dir).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(trainer).items())
