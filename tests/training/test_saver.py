from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.data.utterance import Utterance
from src.models.dynamic_context import DynamicWhisper
from src.models.export.adapter import read_adapters
from src.models.export.huggingface import read_provenance
from src.models.export.verify import load_clips
from src.training import saver as saving
from src.training.checkpoint import TrainingState, list_checkpoints, verify_checkpoint
from src.training.trainer import WhisperTrainer
from src.training.updates import Measured, UpdateReport
from src.utils.errors import CheckpointError, WhisperASRError
from src.utils.memory import clean_up
from tests.training.conftest import TrainerFactory, damage, run_folder, train_until
from tests.utils.holder import held

pytestmark = pytest.mark.slow
Rates = Callable[..., None]
OFTEN = {"checkpoints__save_minutes": 0, "checkpoints__save_total_limit": 99}


def steps(trainer: WhisperTrainer) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(run_folder(trainer))]


@pytest.mark.parametrize(
    ("minutes", "limit", "expected"),
    [(None, 99, [3, 6]), (0, 2, [5, 6]), (2.5, 99, [3, 6]), (0.9, 99, [1, 2, 3, 4, 5, 6]), (1.5, 99, [2, 3, 5, 6])],
)
def test_checkpoints_come_by_the_clock_and_at_the_end_of_epochs(
    make_trainer: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float | None,
    limit: int,
    expected: list[int],
    with_rates: Rates,
) -> None:
    trainer = make_trainer(checkpoints__save_minutes=minutes, checkpoints__save_total_limit=limit)
    with_rates(0.5)
    now = [0.0]
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))

    def update(*args: Any) -> UpdateReport:
        now[0] += 60.0  # an update takes a minute
        trainer._optimizer.step()
        return UpdateReport((), Measured(1.0, 1, 1.0, True, 1, 1.0))

    monkeypatch.setattr(trainer._updater, "update", update)
    trainer.train()
    assert steps(trainer) == expected
    for path in list_checkpoints(run_folder(trainer)):
        verify_checkpoint(path)


def test_a_full_disk_costs_checkpoints_and_not_the_training(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, with_rates: Rates
) -> None:
    trainer = make_trainer(**OFTEN)
    with_rates(0.5)
    usage = shutil.disk_usage(trainer.config.paths.runs_dir)
    calls = iter(range(99))

    def disk_usage(path: Path) -> Any:
        return usage if path != run_folder(trainer) or next(calls) < 2 else SimpleNamespace(free=1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    trainer.train()
    assert trainer.history["epoch"] == [1, 2]
    assert steps(trainer) == [1, 2]
    refused = [message for message in caplog.messages if str(run_folder(trainer)) in message]
    assert len(refused) == 6  # four more updates, and the ends of two epochs


def test_a_disk_that_fills_up_while_the_best_is_written_leaves_the_older_best_and_the_last_checkpoint(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, with_rates: Rates
) -> None:
    trainer = make_trainer()
    with_rates(0.5, 0.4)
    export = saving.export_huggingface
    calls = iter(range(9))

    def export_once(*args: Any, **options: Any) -> Any:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return export(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "export_huggingface", export_once)
        with pytest.raises(CheckpointError, match=r"best_model_hf.*No space left"):
            trainer.train()
    assert read_provenance(trainer.best_model_dir)["epoch"] == 1
    assert steps(trainer) == [3, 6]

    resumed = make_trainer()  # there is space again
    resumed.resume()
    assert read_provenance(resumed.best_model_dir)["epoch"] == resumed.best_epoch == 2


def test_of_adapters_the_merged_model_is_saved_with_the_adapters_and_its_origin(make_trainer: TrainerFactory) -> None:
    lora = {"training__method": "lora", "training__lora": {"rank": 4}, "training__learning_rate": 0.01}
    trainer = make_trainer(run_id="mine", **lora)
    trainer.train(num_epochs=1)
    made = read_provenance(trainer.best_model_dir)
    assert set(made) == {
        "training",
        "run",
        "epoch",
        "step",
        "validation_metric",
        "validation_rate",
        "git_revision",
        "data_version",
    }
    assert (made["run"], made["epoch"], made["step"]) == ("mine", 1, 3)
    assert made["validation_rate"] == trainer.history["val_rate"][0]
    assert made["data_version"].startswith("6 (")
    (clip,) = load_clips(trainer.best_model_dir)  # of the validation set
    assert clip.language == "en"
    _, settings = read_adapters(trainer.best_model_dir)
    assert (settings["r"], settings["base_model_name_or_path"]) == (4, "openai/whisper-base")
    saved = DynamicWhisper.from_pretrained(trainer.best_model_dir).state_dict()
    merged = trainer.merged_model().state_dict()
    assert set(saved) == set(merged)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in saved.items())
    adapters = load_file(trainer.best_model_dir / "adapters.safetensors")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(adapters) == set(trained)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapters.items())


def test_another_process_in_the_folder_of_checkpoints_is_named_before_anything_is_read_or_written(
    make_trainer: TrainerFactory, with_rates: Rates
) -> None:
    trainer = make_trainer()
    with_rates(0.5)
    folder = trainer.config.paths.checkpoints_dir
    with held(folder / ".lock") as process:
        for step in (trainer.resume, trainer.train):
            with pytest.raises(CheckpointError, match=rf"{folder}: process {process} "):
                step()
    assert not steps(trainer)
    trainer.train(num_epochs=1)  # that process was killed
    assert [path.name for path in folder.glob(".*")] == []
    with held(folder / ".lock"), pytest.raises(WhisperASRError, match="process"):
        clean_up(trainer.config, dry_run=False, checkpoints=list_checkpoints(run_folder(trainer)))
    other = trainer.config.paths.runs_dir / "other"
    with held(other / ".lock") as process, pytest.raises(WhisperASRError, match=rf"{other}: process {process} "):
        make_trainer(run_id="other")
    assert len(steps(trainer)) == 1


def test_a_best_model_that_another_training_has_replaced_is_not_taken_for_ones_own(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, with_rates: Rates
) -> None:
    with_rates(0.5, 0.6, 0.7)
    mine, other = make_trainer(), make_trainer()
    train_until(mine, 3)
    monkeypatch.setattr(mine._saver, "finish_export", lambda progress: None)  # as in the middle of the second epoch
    other.train(num_epochs=1)
    with pytest.raises(CheckpointError, match=r"best_model_hf.* epoch 1\b"):
        mine.train(num_epochs=2)


# a resumed run against a straight one

WITHIN_AN_EPOCH, AT_ITS_END, IN_THE_NEXT = range(3)
SCENARIOS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (AT_ITS_END, {}),
    "accumulation, frozen": (
        WITHIN_AN_EPOCH,
        {
            "training__gradient_accumulation_steps": 2, "training__freeze_encoder": 1,
            "training__gradient_checkpointing": True,
        },
    ),
    "lora with dropout": (IN_THE_NEXT, {"training__method": "lora", "training__lora": {"rank": 4, "dropout": 0.3}}),
    "augmentation, composed": (
        IN_THE_NEXT,
        {
            "augmentation__enabled": True, "augmentation__noise_prob": 1.0, "augmentation__spec_augment_prob": 1.0,
            "training__full_context_prob": 0.3, "composition__concatenate_prob": 0.5,
            "composition__max_concatenated_sec": 6.0, "composition__no_speech_fraction": 0.2,
        },
    ),
}  # fmt: skip


def final_state(trainer: WhisperTrainer) -> TrainingState:
    return verify_checkpoint(list_checkpoints(run_folder(trainer))[-1]).load()


def assert_same_end(found: TrainingState, expected: TrainingState) -> None:
    for file, tensors in expected.tensors.items():
        assert set(found.tensors[file]) == set(tensors)
        different = [name for name, tensor in tensors.items() if not torch.equal(found.tensors[file][name], tensor)]
        assert not different, (file, different)
    for key in ("progress", "loader", "updater", "optimizer", "rng", "frozen_parameters"):
        assert json.dumps(found.values[key]) == json.dumps(expected.values[key]), key


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_ends_bit_for_bit_as_a_straight_one_that_is_saved_more_often(
    make_trainer: TrainerFactory, clips: list[Utterance], name: str
) -> None:
    place, scenario = SCENARIOS[name]
    settings = {"train": clips[:7], **scenario}
    straight = make_trainer(run_id="straight", **settings, **OFTEN)
    straight.train()
    expected = final_state(straight)
    saved = list_checkpoints(run_folder(straight))
    assert len(saved) == expected.values["progress"]["step"] >= 4
    an_epoch = next(i for i, path in enumerate(saved) if verify_checkpoint(path).values["progress"]["epochs_done"])
    checkpoint = saved[(0, an_epoch, an_epoch + 1)[place]]
    resumed = make_trainer(**settings)
    torch.rand(7)  # generators are put back too
    assert resumed.resume(checkpoint).checkpoint == checkpoint
    resumed.train()
    assert_same_end(final_state(resumed), expected)
    assert resumed.history == straight.history


def test_auto_continues_the_newest_and_a_finished_training_is_only_looked_up(
    make_trainer: TrainerFactory, with_rates: Rates
) -> None:
    with_rates(0.5)
    first = make_trainer()
    assert first.resume("auto").checkpoint is None  # the training starts from the beginning
    train_until(first, 3)
    second = make_trainer()
    assert second.resume().checkpoint == run_folder(first) / "checkpoint-00000003"
    pd.testing.assert_frame_equal(
        pd.DataFrame(second.train(num_epochs=1)), pd.DataFrame(first.history)
    )  # nothing to do
    second.train()
    assert second.history["epoch"] == [1, 2]

    third = make_trainer()
    third.resume()
    third.train()
    pd.testing.assert_frame_equal(pd.DataFrame(third.history), pd.DataFrame(second.history))
    assert not list_checkpoints(run_folder(third))


@pytest.fixture
def trained(make_trainer: TrainerFactory) -> Path:
    """The checkpoint of one epoch of full training."""
    trainer = make_trainer(run_id="trained")
    trainer.train(num_epochs=1)
    return list_checkpoints(run_folder(trainer))[0]


def refuse(trainer: WhisperTrainer, checkpoint: Path, reason: str) -> None:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(CheckpointError, match=reason) as caught:
        trainer.resume(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.history["epoch"] == []


def test_a_named_checkpoint_that_does_not_fit_is_an_error_and_changes_nothing(
    make_trainer: TrainerFactory, clips: list[Utterance], trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for reason, other in (
        ("loader", {"train": clips[:5]}),
        ("not trained", {"training__freeze_encoder": True}),
        ("not trained", {"training__method": "lora"}),
    ):
        refuse(make_trainer(**other), trained, reason)
    refuse(make_trainer(), trained.parent, "manifest")
    damage(trained / "optimizer.safetensors")
    refuse(make_trainer(), trained, r"optimizer\.safetensors")
    damage(trained / "optimizer.safetensors")  # back again
    caplog.clear()
    make_trainer(training__weight_decay=0.5).resume(trained)  # by name another setting is allowed, and told
    assert any("training.weight_decay: 0.01 then, 0.5 now" in message for message in caplog.messages)


# the best model


def test_everything_is_in_the_mirror_when_the_disk_is_gone(
    make_trainer: TrainerFactory, tmp_path: Path, with_rates: Rates
) -> None:
    with_rates(0.5)
    drive = tmp_path / "drive"
    mirror = {"checkpoints__mirror_dir": str(drive), "checkpoints__mirror_mb_per_sec": 500.0}
    first = make_trainer(run_id="first", **mirror, checkpoints__save_total_limit=1)
    train_until(first, 3)
    first._saver.flush()
    assert first.best_epoch == 1
    assert load_clips(first.best_model_dir)
    for file in first.best_model_dir.iterdir():
        assert (drive / "best_model_hf" / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(first.config.paths.checkpoints_dir)

    second = make_trainer(run_id="second", **mirror, checkpoints__save_total_limit=1)
    assert second.resume("auto").checkpoint == drive / "first" / "checkpoint-00000003"
    assert read_provenance(second.best_model_dir)["epoch"] == second.best_epoch == 1
    second.train()
    assert second.history["epoch"] == [1, 2]
    assert [path.name for path in (drive / "first").iterdir()] == ["checkpoint-00000006"]
    verify_checkpoint(drive / "first" / "checkpoint-00000006")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_killed_before_the_best_was_exported_exports_it_when_resumed(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, method: str, with_rates: Rates
) -> None:
    with_rates(0.5)
    first = make_trainer(training__method=method)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "export_huggingface", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            first.train()
    assert not first.best_model_dir.exists()
    second = make_trainer(training__method=method)
    second.resume()
    made = read_provenance(second.best_model_dir)
    assert (made["epoch"], made["run"]) == (1, first.experiment.run_id)  # type: ignore[union-attr]
    second.train()  # the best weights are found at the end
    assert second.best_epoch == 1


def test_a_best_model_that_is_nowhere_is_told_and_the_next_best_is_kept(
    make_trainer: TrainerFactory, with_rates: Rates, caplog: pytest.LogCaptureFixture
) -> None:
    with_rates(0.5)
    first = make_trainer(**OFTEN)
    first.train()
    in_epoch_2 = list_checkpoints(run_folder(first))[3]
    shutil.rmtree(first.best_model_dir)
    second = make_trainer()
    second.resume(in_epoch_2)
    assert any("the model of epoch 1" in message for message in caplog.messages)
    assert second.best_epoch is None
    second.train()
    assert read_provenance(second.best_model_dir)["epoch"] == second.best_epoch == 2
