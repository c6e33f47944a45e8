from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.utterance import Utterance
from src.models.export.huggingface import read_provenance
from src.training.checkpoint import CheckpointStore, TrainingState, list_checkpoints, load_checkpoint
from src.training.progress import Progress
from src.training.resume import config_differences, find_checkpoint
from src.training.trainer import WhisperTrainer
from src.utils.config import Config
from src.utils.errors import CheckpointError

Configure = Callable[..., Config]
TrainerFactory = Callable[..., WhisperTrainer]


def train_until(trainer: WhisperTrainer, step: int) -> None:
    """Train, and stop as Ctrl-C does before the update after this one."""
    update = trainer._updater.update

    def interrupted(*args: Any) -> Any:
        if trainer._progress.step == step:
            raise KeyboardInterrupt
        return update(*args)

    trainer._updater.update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._updater.update = update  # type: ignore[method-assign]


def put(root: Path, run: str, step: int, config: Config, *, saved_at: float, **values: Any) -> Path:
    """Save a checkpoint that holds just what a search looks at."""
    state = TrainingState(
        {"model": {}, "optimizer": {}, "rng": {}},
        {"saved_at": saved_at, "config": config.model_dump(mode="json"), **values},
    )
    return CheckpointStore(root / run, save_total_limit=9).save(state, step)


def damage(checkpoint: Path, file: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[-1] ^= 1
    (checkpoint / file).write_bytes(content)


# the search


def test_the_newest_whole_one_is_taken_whatever_its_run_and_step(tmp_path: Path, configure: Configure) -> None:
    config = configure()
    put(tmp_path, "a", 900, config, saved_at=1.0)
    newest = put(tmp_path, "b", 5, config, saved_at=3.0)
    put(tmp_path, "c", 70, config, saved_at=2.0)
    report = find_checkpoint([tmp_path], config)
    assert (report.checkpoint, report.refused, report.searched) == (newest, (), (tmp_path,))
    assert str(report) == f"going on from {newest}"


def test_newer_ones_that_cannot_be_used_are_refused_with_reasons(tmp_path: Path, configure: Configure) -> None:
    config = configure()
    put(tmp_path, "a", 1, config, saved_at=1.0)
    wanted = put(tmp_path, "a", 2, config, saved_at=2.0)
    other = put(tmp_path, "b", 3, configure(training__learning_rate=0.5), saved_at=3.0)
    damaged = put(tmp_path, "a", 4, config, saved_at=4.0)
    damage(damaged)
    unfinished = put(tmp_path, "a", 5, config, saved_at=5.0)
    (unfinished / "manifest.json").unlink()
    report = find_checkpoint([tmp_path], config)
    assert report.checkpoint == wanted
    reasons = dict(report.refused)
    assert list(reasons) == [unfinished, damaged, other]
    assert "never finished" in reasons[unfinished]
    assert "model.safetensors is damaged" in reasons[damaged]
    assert "training.learning_rate: 0.5 then, None now" in reasons[other]
    assert f"refused {damaged}: " in str(report)


def test_nothing_usable_is_said_with_where_was_searched(tmp_path: Path, configure: Configure) -> None:
    report = find_checkpoint([tmp_path, tmp_path / "absent"], configure())
    assert report.checkpoint is None
    assert str(report) == f"no checkpoint to go on from in {tmp_path}, {tmp_path / 'absent'}"


def test_the_copy_stands_in_for_a_damaged_or_absent_original(tmp_path: Path, configure: Configure) -> None:
    config, (local, mirror) = configure(), (tmp_path / "local", tmp_path / "mirror")
    path = put(local, "a", 2, config, saved_at=2.0)
    shutil.copytree(local, mirror)
    assert find_checkpoint([local, mirror], config).checkpoint == path
    damage(path)
    assert find_checkpoint([local, mirror], config).checkpoint == mirror / "a" / path.name
    shutil.rmtree(local)
    assert find_checkpoint([local, mirror], config).checkpoint == mirror / "a" / path.name


@pytest.mark.parametrize("word", ["saved_at", "config", "training", "format"])
def test_a_damaged_byte_in_the_state_never_ends_the_search(tmp_path: Path, configure: Configure, word: str) -> None:
    config = configure()
    wanted = put(tmp_path, "a", 1, config, saved_at=1.0)
    newer = put(tmp_path, "a", 2, config, saved_at=2.0)
    state = newer / "state.json"
    state.write_text(state.read_text().replace(f'"{word}"', f'"{word[:-1]}~"', 1))
    report = find_checkpoint([tmp_path], config)
    assert report.checkpoint == wanted
    assert [path for path, _ in report.refused] == [newer]


def test_left_overs_of_a_killed_process_are_cleaned_up_here_but_not_in_the_mirror(
    tmp_path: Path, configure: Configure
) -> None:
    config, (local, mirror) = configure(), (tmp_path / "local", tmp_path / "mirror")
    for root in (local, mirror):
        put(root, "a", 1, config, saved_at=1.0)
        (root / "a" / ".checkpoint-00000002.4194305.0a0b.partial").mkdir()
    find_checkpoint([local, mirror], config)
    assert [path.name for path in (local / "a").iterdir()] == ["checkpoint-00000001"]
    assert len(list((mirror / "a").iterdir())) == 2


def test_only_what_decides_what_is_learnt_must_be_the_same(configure: Configure) -> None:
    saved = configure().model_dump(mode="json")
    free = configure(
        training__epochs=9, training__patience=2, training__mix_shares=(0.5,), data__num_workers=3,
        checkpoints__save_minutes=1.0, tracking__trackers=("tensorboard",), inference__num_beams=5,
    )  # fmt: skip
    assert config_differences(saved, free) == []
    for key, value in [
        ("training__batch_size", 3), ("training__lora", {"rank": 4}), ("augmentation__enabled", True), ("seed", 1),
        ("model__audio_context", "full"), ("composition__timestamp_prob", 0.5), ("data__max_train", 3),
    ]:  # fmt: skip
        (difference,) = config_differences(saved, configure(**{key: value}))
        assert difference.startswith(key.replace("__", "."))
    renamed = json.loads(json.dumps(saved))
    renamed["training"]["of_an_older_version"] = 1
    assert config_differences(renamed, configure()) == ["training.of_an_older_version: 1 then, None now"]


def test_progress_survives_json_with_its_infinities() -> None:
    fresh = Progress()
    again = Progress.from_state(json.loads(json.dumps(fresh.state_dict())))
    assert again.best_wer == float("inf")
    assert str(again) == str(fresh)


# a resumed run against a straight one

SCENARIOS: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulation, frozen": {
        "training__gradient_accumulation_steps": 2, "training__freeze_encoder": 1,
        "training__gradient_checkpointing": True,
    },
    "lora with dropout": {"training__method": "lora", "training__lora": {"rank": 4, "dropout": 0.3}},
    "augmentation, composed": {
        "augmentation__enabled": True, "augmentation__noise_prob": 1.0, "augmentation__spec_augment_prob": 1.0,
        "training__full_context_prob": 0.3, "composition__concatenate_prob": 0.5,
        "composition__max_concatenated_sec": 6.0, "composition__no_speech_fraction": 0.2,
    },
}  # fmt: skip


def final_state(trainer: WhisperTrainer) -> TrainingState:
    assert trainer.experiment is not None
    return load_checkpoint(list_checkpoints(trainer.config.paths.checkpoints_dir / trainer.experiment.run_id)[-1])


def assert_same_end(found: TrainingState, expected: TrainingState) -> None:
    for file, tensors in expected.tensors.items():
        assert set(found.tensors[file]) == set(tensors)
        different = [name for name, tensor in tensors.items() if not torch.equal(found.tensors[file][name], tensor)]
        assert not different, (file, different)
    for key in ("progress", "loader", "updater", "optimizer", "rng", "frozen_parameters"):
        assert json.dumps(found.values[key]) == json.dumps(expected.values[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_ends_bit_for_bit_as_a_straight_one(
    make_trainer: TrainerFactory, clips: list[Utterance], name: str
) -> None:
    settings = {"train": clips[:7], **SCENARIOS[name]}
    often = {"checkpoints__save_minutes": 0, "checkpoints__save_total_limit": 99}
    straight = make_trainer(run_id="straight", **settings, **often)
    straight.train()
    expected = final_state(straight)
    saved = list_checkpoints(straight.config.paths.checkpoints_dir / "straight")
    assert len(saved) == expected.values["progress"]["step"] >= 4
    an_epoch = next(i for i, path in enumerate(saved) if load_checkpoint(path).values["progress"]["epochs_done"])
    for index in (0, an_epoch, an_epoch + 1):  # within an epoch, at its end, within the next
        resumed = make_trainer(**settings)
        torch.rand(7)  # generators are put back too
        assert resumed.resume(saved[index]).checkpoint == saved[index]
        resumed.train()
        assert_same_end(final_state(resumed), expected)
        assert resumed.history == straight.history


@pytest.mark.slow
def test_a_straight_run_does_not_depend_on_how_often_it_is_saved(make_trainer: TrainerFactory) -> None:
    often, seldom = make_trainer(checkpoints__save_minutes=0), make_trainer(checkpoints__save_minutes=None)
    often.train(num_epochs=1)
    seldom.train(num_epochs=1)
    mine, other = final_state(often), final_state(seldom)
    assert all(torch.equal(tensor, other.tensors["model"][name]) for name, tensor in mine.tensors["model"].items())


@pytest.mark.slow
def test_auto_goes_on_with_the_newest_and_a_finished_training_is_only_looked_up(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_trainer()
    train_until(first, 3)
    straight = make_trainer(run_id="straight", paths__checkpoints_dir=str(first.config.paths.runs_dir / "elsewhere"))
    straight.train()

    second = make_trainer()
    with caplog.at_level(logging.INFO):
        report = second.resume()
    assert report.checkpoint is not None
    assert report.checkpoint.parent.name == first.experiment.run_id  # type: ignore[union-attr]
    assert any(message.startswith("resumed at update 3, epoch 2, from") for message in caplog.messages)
    assert second.train(num_epochs=1) == first.history  # nothing to do
    second.train()
    assert second.history == straight.history

    third = make_trainer()
    third.resume()
    third.train()
    assert third.history == second.history
    assert not list_checkpoints(third.config.paths.checkpoints_dir / third.experiment.run_id)  # type: ignore[union-attr]


def test_auto_without_any_checkpoint_begins_anew(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    assert trainer.resume("auto").checkpoint is None
    assert trainer.history["epoch"] == []


@pytest.fixture
def trained(make_trainer: TrainerFactory) -> Path:
    """The checkpoint of one epoch of full training."""
    trainer = make_trainer(run_id="trained")
    trainer.train(num_epochs=1)
    (path,) = list_checkpoints(trainer.config.paths.checkpoints_dir / "trained")
    return path


def refuse(trainer: WhisperTrainer, checkpoint: Path, reason: str) -> None:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(CheckpointError, match=reason) as caught:
        trainer.resume(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.history["epoch"] == []


@pytest.mark.slow
def test_a_named_checkpoint_that_does_not_fit_is_an_error_and_changes_nothing(
    make_trainer: TrainerFactory, clips: list[Utterance], trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(make_trainer(train=clips[:5]), trained, "loader's state belongs to other batches")
    refuse(make_trainer(training__freeze_encoder=True), trained, "parameters that were not trained differ")
    refuse(make_trainer(training__method="lora"), trained, "parameters that were not trained differ")
    refuse(make_trainer(), trained.parent, "has no manifest")
    damage(trained, "optimizer.safetensors")
    refuse(make_trainer(), trained, r"optimizer\.safetensors is damaged")
    damage(trained, "optimizer.safetensors")  # back again
    caplog.clear()
    make_trainer(training__weight_decay=0.5).resume(trained)  # by name another setting is allowed, and told
    assert "resuming with another setting: training.weight_decay: 0.01 then, 0.5 now" in caplog.messages


# the best model


@pytest.mark.slow
def test_everything_is_found_in_the_mirror_when_the_disk_is_gone(
    make_trainer: TrainerFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = {"checkpoints__mirror_dir": str(tmp_path / "drive"), "checkpoints__mirror_mb_per_sec": 500.0}
    first = make_trainer(run_id="first", **mirror)
    train_until(first, 3)
    first._saver.flush()
    assert first.best_epoch == 1
    shutil.rmtree(first.config.paths.checkpoints_dir)

    second = make_trainer(run_id="second", **mirror)
    report = second.resume("auto")
    assert report.checkpoint == tmp_path / "drive" / "first" / "checkpoint-00000003"
    assert read_provenance(second.best_model_dir)["epoch"] == second.best_epoch == 1
    second.train()
    straight = make_trainer(run_id="straight", paths__checkpoints_dir=str(tmp_path / "elsewhere"))
    straight.train()
    assert second.history == straight.history


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_killed_before_the_best_was_exported_exports_it_when_resumed(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    class KilledError(BaseException):
        pass

    def kill(*args: Any, **options: Any) -> Any:
        raise KilledError

    first = make_trainer(training__method=method)
    with monkeypatch.context() as patch:
        patch.setattr("src.training.saver.export_huggingface", kill)
        with pytest.raises(KilledError):
            first.train()
    assert not first.best_model_dir.exists()
    second = make_trainer(training__method=method)
    second.resume()
    made = read_provenance(second.best_model_dir)
    assert (made["epoch"], made["run"]) == (1, first.experiment.run_id)  # type: ignore[union-attr]
    second.train()  # the best weights are found at the end
    assert second.best_epoch == 1


@pytest.mark.slow
def test_a_best_model_that_is_nowhere_is_told_and_the_next_best_is_kept(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"checkpoints__save_minutes": 0, "checkpoints__save_total_limit": 9}
    first = make_trainer(run_id="first", **settings)
    first.train()
    in_epoch_2 = list_checkpoints(first.config.paths.checkpoints_dir / "first")[3]
    shutil.rmtree(first.best_model_dir)
    second = make_trainer(**settings)
    second.resume(in_epoch_2)
    assert any("the model of epoch 1, the best until now, is not there" in message for message in caplog.messages)
    assert second.best_epoch is None
    second.train()
    assert second.best_epoch == 2
    assert read_provenance(second.best_model_dir)["epoch"] == 2
