"""Shared by the tests of training: short real speech, and a random Whisper of which only the state is of interest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.models.export import huggingface
from src.training.trainer import WhisperTrainer
from src.utils.config import Config, load_config
from src.utils.tracking import ExperimentLogger

TrainerFactory = Callable[..., WhisperTrainer]


@pytest.fixture(scope="session")
def clips(sample: list[Utterance]) -> list[Utterance]:
    """13 clips of several speakers, the shortest of every ninth."""
    train = [u for u in sample if u.meta["split"] == "train"]
    checked = [check_utterance(u, Config().data) for u in train[::9]]
    return sorted(checked, key=lambda u: u.duration_sec or 0)[:13]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    """Make a configuration for tests: small batches, no augmentation, checkpoints at the end of epochs alone."""

    def make(**overrides: Any) -> Config:
        base = {
            "device": "cpu",
            "paths.runs_dir": str(tmp_path / "runs"),
            "paths.checkpoints_dir": str(tmp_path / "checkpoints"),
            "augmentation.enabled": False,
            "training.batch_size": 2,
            "training.full_context_prob": 0.0,
            "training.epochs": 2,
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
    _small: tuple[Any, Any], clips: list[Utterance], configure: Callable[..., Config], request: pytest.FixtureRequest
) -> TrainerFactory:
    """Make a trainer in a run of its own, of a fresh small model unless one is given, which is exported in full."""
    count = iter(range(1_000_000))

    def make(
        *,
        model: tuple[Any, Any] | None = None,
        train: Sequence[Utterance] = clips[:6],
        validation: Sequence[Utterance] = clips[:1],
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
            create_loader(validation, processor, config),
            config,
            experiment=ExperimentLogger(config, run_id=run_id or f"run-{next(count):03d}"),
        )

    return make
