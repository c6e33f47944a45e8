"""Shared by the tests of training: short real speech, and a random Whisper of which only the state is of interest."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.models.export import huggingface
from src.training.trainer import WhisperTrainer
from src.utils.config import Config, load_config
from src.utils.tracking import ExperimentLogger

Configure = Callable[..., Config]
TrainerFactory = Callable[..., WhisperTrainer]


@pytest.fixture(scope="session")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """13 clips of several speakers, the shortest of every ninth."""
    train = [u for u in sample if u.meta["split"] == "train"]
    checked = [check_utterance(u, Config().data) for u in train[::9]]
    return sorted(checked, key=lambda u: u.duration_sec or 0)[:13]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Make a configuration for tests: small batches, no augmentation, checkpoints at the end of epochs alone."""

    def make(**overrides: Any) -> Config:
        base = {
            "device": "cpu",
            "paths.runs_dir": str(tmp_path / "runs"),
            "paths.checkpoints_dir": str(tmp_path / "checkpoints"),
            "augmentation.enabled": False,
            "training.batch_size": 2,
            "training.epochs": 2,
            "training.full_context_prob": 0.0,
            "checkpoints.save_minutes": None,
            "evaluation.bootstrap_samples": 100,
            "inference.max_tokens_per_sec": 2.0,
        }
        return load_config(None, overrides={**base, **{key.replace("__", "."): v for key, v in overrides.items()}})

    return make


@pytest.fixture
def quick_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save best models without tokenizer and comparison of transcripts: two thirds of the seconds of a short run."""
    monkeypatch.setattr(huggingface, "_verify_huggingface", lambda *given: None)
    monkeypatch.setattr(huggingface, "save_processor", lambda *given: None)


@pytest.fixture
def make_trainer(
    _small: tuple[Any, Any], clips: list[Utterance], configure: Configure, request: pytest.FixtureRequest
) -> TrainerFactory:
    """Make a trainer in a run of its own, of a fresh small model unless one is given, which is exported in full."""
    count = itertools.count()

    def make(
        *,
        model: tuple[Any, Any] | None = None,
        train: Sequence[Utterance] = clips[:6],
        run_id: str | None = None,
        **overrides: Any,
    ) -> WhisperTrainer:
        config = configure(**overrides)
        if model is None:
            request.getfixturevalue("quick_exports")
        network, processor = model or (copy.deepcopy(_small[0]), _small[1])
        return WhisperTrainer(
            network,
            processor,
            create_loader(train, processor, config, shuffle=True),
            create_loader(clips[:1], processor, config),
            config,
            experiment=ExperimentLogger(config, run_id=run_id or f"run-{next(count):03d}"),
        )

    return make


@pytest.fixture
def with_rates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let validations give these rates, one after another, then the last one; the loss falls all the time."""

    def use(*wers: float) -> None:
        rates, losses = itertools.chain(wers, itertools.repeat(wers[-1])), itertools.count(9.0, -0.1)
        monkeypatch.setattr(
            ModelEvaluator,
            "evaluate_dataset",
            lambda *args, **options: SimpleNamespace(
                loss=next(losses), metric="CER", rate=next(rates), wer=math.nan, cer=0.1
            ),
        )

    return use


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let one call of a function end as Ctrl-C ends it."""
    original, calls = getattr(owner, name), itertools.count()

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(owner, name, interrupted)


def train_until(trainer: WhisperTrainer, step: int) -> None:
    """Train, and stop as Ctrl-C does before the update after this one."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, trainer._updater, "update", step - trainer._progress.step)
        trainer.train()


def run_folder(trainer: WhisperTrainer) -> Path:
    """Where its checkpoints are."""
    assert trainer.experiment is not None
    return trainer.config.paths.checkpoints_dir / trainer.experiment.run_id


def rows_of(trainer: WhisperTrainer, event: str) -> list[dict[str, Any]]:
    """What it logged."""
    assert trainer.experiment is not None
    rows = [json.loads(line) for line in trainer.experiment.read_rows().splitlines()]
    return [row for row in rows if row["event"] == event]


def damage(file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
