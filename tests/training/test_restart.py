from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml

from src.data.audio import load_audio
from src.data.loader import create_dataloaders
from src.data.preparation import prepare_datasets
from src.data.utterance import Utterance
from src.models.whisper_model import WhisperModelManager
from src.training import checkpoint
from src.training.restart import restart, spare_checkpoints, stored_checkpoints, stored_report
from src.training.trainer import WhisperTrainer
from src.utils.config import Config, load_config
from src.utils.errors import CheckpointError
from src.utils.files import sha256_of
from src.utils.memory import clean_up
from src.utils.tracking import ExperimentLogger
from src.utils.validation import Check
from tests.training.conftest import Configure, TrainerFactory, damage, train_until

PROFILE = "tried"
pytestmark = pytest.mark.usefixtures("quick_exports")


@pytest.fixture
def config_path(small: tuple[Any, Any], clips: list[Utterance], tmp_path: Path) -> Path:
    """A config.yaml with one profile, that trains a small random model on nine clips of three speakers in capitals."""
    model, processor = small
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    lines = ["file_name,text,speaker,split"]
    for number, clip in enumerate(clips[:9]):
        split = ("train", "validation", "test")[max(0, number - 6)]
        soundfile.write(data / f"{number}.wav", load_audio(clip.audio), 16_000)
        lines.append(f"{number}.wav,{clip.text.upper()},{split},{split}")
    (data / "metadata.csv").write_text("\n".join(lines))
    tree = {
        "device": "cpu",
        "model": {"variant": str(tmp_path / "model"), "language": "en"},
        "data": {"source": "folder", "path": str(data), "num_workers": 0},
        "paths": {"runs_dir": str(tmp_path / "runs"), "cache_dir": str(tmp_path / "cache")},
        "augmentation": {"enabled": False},
        "training": {"batch_size": 2, "epochs": 2},
        "checkpoints": {"save_minutes": None, "mirror_dir": str(tmp_path / "mirror")},
        "inference": {"max_tokens_per_sec": 2.0},
        "profiles": {PROFILE: {"paths": {"checkpoints_dir": str(tmp_path / "checkpoints")}}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def begin(config_path: Path, **overrides: Any) -> WhisperTrainer:
    """Do what the notebook's cells do, up to the training."""
    config = load_config(config_path, profile=PROFILE, overrides=overrides)
    splits = prepare_datasets(config).with_label_case("lower")
    model, processor = WhisperModelManager(config).initialize_model()
    loaders = create_dataloaders(splits, processor, config)
    experiment = ExperimentLogger(config, run_id="first")
    return WhisperTrainer(model, processor, loaders.train, loaders.validation, config, experiment=experiment)


def test_a_run_continues_and_each_file_of_its_checkpoint_is_hashed_once(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = begin(config_path)
    through.train()
    weights = {name: tensor.clone() for name, tensor in through.model.state_dict().items()}
    for name in ("checkpoints", "mirror", "runs"):
        shutil.rmtree(tmp_path / name)
    train_until(begin(config_path), 5)  # in the second epoch

    hashed: Counter[Path] = Counter()
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: hashed.update([path]) or sha256_of(path))
    run = restart(config_path=config_path)
    assert {path.name for path in hashed} >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(hashed.values()) == {1}
    assert run.config.model_dump(exclude={"checkpoints"}) == through.config.model_dump(exclude={"checkpoints"})
    assert run.config.checkpoints.mirror_dir is None
    assert run.experiment.run_id == "first"
    assert (run.splits.label_case, run.labelled_splits.label_case) == ("sentence", "lower")
    assert run.data_version.clips == 9
    assert len(run.trainer.history["epoch"]) == 1
    assert not run.trainer.ended
    assert run.trainer.train() == through.history
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())


def test_the_mirror_stands_in_for_a_lost_disk_and_the_best_weights_are_in_the_model(
    config_path: Path, tmp_path: Path
) -> None:
    trainer = begin(config_path, **{"training.learning_rate": 1e-9})  # two equal rates: the first epoch is the best
    trainer.train()
    assert trainer.best_epoch == 1
    rows = trainer.experiment.read_rows() if trainer.experiment else ""
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(CheckpointError, match=str(tmp_path / "checkpoints")):
        restart(config_path=config_path)

    run = restart(tmp_path / "mirror", config_path=config_path)
    assert run.trainer.ended
    assert run.trainer.history == trainer.history
    assert all(line in run.experiment.read_rows().splitlines() for line in rows.splitlines() if '"epoch"' in line)
    best = trainer.model.state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in run.model.state_dict().items())
    assert len(run.trainer.train(3)["epoch"]) == 3  # the last epoch's weights are in the mirror alone


def test_other_data_are_refused_and_settings_of_another_version_named(config_path: Path, tmp_path: Path) -> None:
    begin(config_path).train(1)
    metadata = tmp_path / "data" / "metadata.csv"
    before = metadata.read_text()
    first, _, *others = before.splitlines()
    metadata.write_text("\n".join([first, "0.wav,SOMETHING ELSE,train,train", *others]))
    with pytest.raises(CheckpointError, match=r"7 \(\w+\) then, 7 \(\w+\) or .* now"):
        restart(config_path=config_path)
    metadata.write_text(before)

    state = next((tmp_path / "checkpoints").rglob("state.json"))
    manifest, digest = state.parent / "manifest.json", sha256_of(state)
    state.write_text(state.read_text().replace('"label_case"', '"label_kase"', 1))
    manifest.write_text(manifest.read_text().replace(digest, sha256_of(state)))
    with pytest.raises(CheckpointError, match="label_kase"):
        restart(config_path=config_path)


# what is stored


def by_name(config: Config) -> dict[str, Check]:
    return {check.name: check for check in stored_report(config).checks}


@pytest.mark.slow  # trains
def test_checkpoints_are_whole_stale_or_damaged_and_the_newest_whole_one_is_not_spare(
    make_trainer: TrainerFactory, configure: Configure, tmp_path: Path
) -> None:
    trainer = make_trainer(
        training__epochs=1, checkpoints__save_minutes=0, checkpoints__save_total_limit=3,
        paths__cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    trainer.train()
    config = trainer.config
    first, second, third = stored_checkpoints(config)
    assert [each.update for each in (first, second, third)] == [1, 2, 3]
    assert {each.problem for each in (first, second, third)} == {""}
    assert stored_report(config).ok
    stale = by_name(configure(training__batch_size=4))
    assert "training.batch_size: 2 then, 4 now" in stale[f"checkpoint run-000/{third.path.name}"].found

    damage(third.path / "model.safetensors")
    (first.path / "state.json").write_text("{")
    checks = by_name(config)
    assert "model.safetensors" in checks[f"checkpoint run-000/{third.path.name}"].found
    assert "state.json" in checks[f"checkpoint run-000/{first.path.name}"].found
    assert checks[f"checkpoint run-000/{second.path.name}"].status == "ok"
    assert "run-000" in checks["best model"].found
    assert set(spare_checkpoints(config)) == {first.path, third.path}
    clean_up(config, dry_run=False, checkpoints=spare_checkpoints(config))
    assert [each.path for each in stored_checkpoints(config)] == [second.path]


def test_weights_and_data_that_need_no_network_are_named(configure: Configure) -> None:
    checks = by_name(configure())
    assert checks["weights"].status == "ok"
    assert checks["weights"].found.endswith("tiny.en, base")
    assert "speechocean762-mini.parquet" in checks["bundled data"].found
    assert checks["checkpoints"].status == "absent"
    small = by_name(configure(model__variant="small"))["weights"]
    assert (small.status, small.fix) == ("absent", "hf download openai/whisper-small")
