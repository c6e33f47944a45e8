from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.evaluation.evaluator import ModelEvaluator
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import read_provenance
from src.training import saver as saving
from src.training.checkpoint import list_checkpoints, verify_checkpoint
from src.training.trainer import WhisperTrainer
from src.utils.errors import CheckpointError

pytestmark = pytest.mark.slow
TrainerFactory = Callable[..., WhisperTrainer]


def run_folder(trainer: WhisperTrainer) -> Path:
    assert trainer.experiment is not None
    return trainer.config.paths.checkpoints_dir / trainer.experiment.run_id


def steps(trainer: WhisperTrainer) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(run_folder(trainer))]


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [(None, [3, 6]), (0, [1, 2, 3, 4, 5, 6]), (2.5, [3, 6]), (0.9, [1, 2, 3, 4, 5, 6]), (1.5, [2, 3, 5, 6])],
)
def test_checkpoints_come_by_the_clock_and_at_the_end_of_epochs(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, minutes: float | None, expected: list[int]
) -> None:
    trainer = make_trainer(checkpoints__save_minutes=minutes, checkpoints__save_total_limit=99)
    now = [0.0]
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    on_update = trainer._updater.update

    def update(*args: Any) -> Any:
        now[0] += 60.0  # an update takes a minute
        return on_update(*args)

    monkeypatch.setattr(trainer._updater, "update", update)
    trainer.train()
    assert steps(trainer) == expected
    for path in list_checkpoints(run_folder(trainer)):
        verify_checkpoint(path)


def test_the_limit_holds_for_a_run(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(checkpoints__save_minutes=0, checkpoints__save_total_limit=2)
    trainer.train()
    assert steps(trainer) == [5, 6]


def test_a_full_disk_costs_checkpoints_and_not_the_training(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(checkpoints__save_minutes=0, checkpoints__save_total_limit=99)
    usage = shutil.disk_usage(trainer.config.paths.runs_dir)
    calls = iter(range(99))

    def disk_usage(path: Path) -> Any:
        return usage if path != run_folder(trainer) or next(calls) < 2 else SimpleNamespace(free=1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    trainer.train()
    assert trainer.history["epoch"] == [1, 2]
    assert steps(trainer) == [1, 2]
    told = [m for m in caplog.messages if m.startswith("no checkpoint was saved, training goes on") and "MB are" in m]
    assert len(told) == 6  # four more updates, and the ends of two epochs


def test_a_disk_that_fills_up_while_the_best_is_written_leaves_the_older_best_and_the_last_checkpoint(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    wers = iter([0.5, 0.4])
    monkeypatch.setattr(
        ModelEvaluator, "evaluate_dataset", lambda *a, **o: SimpleNamespace(loss=1.0, wer=next(wers), cer=0.1)
    )
    export = saving.export_huggingface
    calls = iter(range(9))

    def export_once(*args: Any, **options: Any) -> Any:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return export(*args, **options)

    monkeypatch.setattr(saving, "export_huggingface", export_once)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left.*the last checkpoint is whole"):
        trainer.train()
    assert read_provenance(trainer.best_model_dir)["epoch"] == 1
    assert steps(trainer) == [3, 6]

    monkeypatch.undo()  # there is space again
    resumed = make_trainer()
    resumed.resume()
    assert read_provenance(resumed.best_model_dir)["epoch"] == resumed.best_epoch == 2


def test_the_best_model_says_where_it_came_from(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(run_id="mine")
    trainer.train(num_epochs=1)
    made = read_provenance(trainer.best_model_dir)
    assert set(made) == {"training", "run", "epoch", "step", "validation_wer", "git_revision", "data_version"}
    assert (made["run"], made["epoch"], made["step"]) == ("mine", 1, 3)
    assert made["validation_wer"] == trainer.history["val_wer"][0]
    assert made["data_version"].startswith("6 (")


def test_of_adapters_the_merged_model_is_saved_and_the_adapters_beside_it(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(training__method="lora", training__lora={"rank": 4}, training__learning_rate=0.01)
    trainer.train(num_epochs=1)
    saved = DynamicWhisper.from_pretrained(trainer.best_model_dir).state_dict()
    merged = trainer.merged_model().state_dict()
    assert set(saved) == set(merged)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in saved.items())
    adapters = load_file(trainer.best_model_dir / "adapters.safetensors")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(adapters) == set(trained)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapters.items())


def test_a_best_model_that_another_training_has_replaced_is_not_taken_for_ones_own(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    wers = iter([0.5, 0.6, 0.7])
    monkeypatch.setattr(
        ModelEvaluator, "evaluate_dataset", lambda *a, **o: SimpleNamespace(loss=1.0, wer=next(wers), cer=0.1)
    )
    mine, other = make_trainer(), make_trainer()
    update = mine._updater.update

    def interrupted(*args: Any) -> Any:
        if mine.history["epoch"]:
            raise KeyboardInterrupt
        return update(*args)

    mine._updater.update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        mine.train()
    mine._updater.update = update  # type: ignore[method-assign]
    monkeypatch.setattr(mine._saver, "finish_export", lambda progress: None)  # as in the middle of the second epoch
    other.train(num_epochs=1)
    with pytest.raises(CheckpointError, match="the model of epoch 1, the best of this training, is not there any more"):
        mine.train(num_epochs=2)


def test_the_mirror_gets_the_checkpoints_and_the_best_model(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    trainer = make_trainer(
        run_id="run", checkpoints__mirror_dir=str(drive), checkpoints__save_total_limit=1,
        checkpoints__mirror_mb_per_sec=500.0,
    )  # fmt: skip
    trainer.train()
    assert [path.name for path in (drive / "run").iterdir()] == ["checkpoint-00000006"]
    verify_checkpoint(drive / "run" / "checkpoint-00000006")
    for file in trainer.best_model_dir.iterdir():
        assert (drive / "best_model_hf" / file.name).read_bytes() == file.read_bytes()


def test_left_overs_in_the_runs_folder_are_cleaned_up_at_the_start(
    make_trainer: TrainerFactory, tmp_path: Path
) -> None:
    dead = "4194305.0a0b"  # no process has this id
    for name in (f"run/.checkpoint-00000001.{dead}.partial", f".best_model_hf.{dead}.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / f".best_model_hf.{dead}.replaced").mkdir()
    make_trainer(run_id="run")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best_model_hf", "run"]
    assert not list((tmp_path / "checkpoints" / "run").iterdir())
