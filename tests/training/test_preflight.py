from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.data.loader import create_loader
from src.data.preparation import DatasetSplits
from src.data.utterance import Utterance
from src.training import preflight as module
from src.training.loss import TokenLoss
from src.training.methods import prepare_model, trainable
from src.training.preflight import Preflight, preflight
from src.training.probe import BatchProposal
from src.training.state import random_state
from src.training.trainer import WhisperTrainer
from src.utils.config import Config
from src.utils.errors import DeviceError
from src.utils.memory import PARAMETERS_M, run_disk_mb, size_mb
from src.utils.validation import Check, EnvironmentReport

TrainerFactory = Callable[..., WhisperTrainer]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EnvironmentReport((Check("GPU", "absent", "none"), Check("jiwer", "error", "is not installed", "pip ...")))
    monkeypatch.setattr(module, "environment_report", lambda config: found)  # the real one imports torch anew


@pytest.fixture
def splits(clips: list[Utterance]) -> DatasetSplits:
    return DatasetSplits(clips[:6], clips[6:7], clips[7:8], label_case="sentence")


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def numbers(tree: Any) -> list[Any]:
    """Flatten a random state, tensors included, so that it can be compared."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [number for each in tree for number in numbers(each)]
    return tree.tolist() if isinstance(tree, torch.Tensor) else [tree]


def test_nothing_of_the_caller_changes(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config]
) -> None:
    model, processor = small
    config = configure(augmentation__enabled=True, training__method="lora", training__lora={"rank": 2})
    loader = create_loader(splits.train, processor, config, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    parameters = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    before = copy.deepcopy((numbers(random_state()), loader.state_dict(), model.training, model.audio_context))
    preflight(config, splits, model, processor)
    assert (numbers(random_state()), loader.state_dict(), model.training, model.audio_context) == before
    assert len(list(iterator)) == 2
    for name, parameter in model.named_parameters():
        value, trained = parameters.pop(name)
        assert torch.equal(parameter, value)
        assert (parameter.requires_grad, parameter.grad) == (trained, None)
    assert not parameters


@pytest.mark.slow  # trains
def test_its_figures_are_those_of_the_training(
    small: tuple[Any, Any], splits: DatasetSplits, make_trainer: TrainerFactory
) -> None:
    trainer = make_trainer(
        training__gradient_accumulation_steps=2, training__warmup_ratio=0.3, checkpoints__save_total_limit=1
    )
    report = preflight(trainer.config, splits, *small)
    assert (report.updates, report.warmup_updates) == (4, 2)  # 3 batches an epoch, of which one makes an update alone
    trainer.train()
    (checkpoint,) = (trainer.config.paths.checkpoints_dir / "run-000").iterdir()
    total, trained = trainer.model.num_parameters(), sum(p.numel() for p in trainable(trainer.model))
    one_mb = run_disk_mb(total, trained=trained, kept=1) - run_disk_mb(total, trained=trained, kept=0)
    assert size_mb(checkpoint) == pytest.approx(one_mb, rel=0.02)
    assert size_mb(trainer.config.paths.checkpoints_dir) < report.disk_mb
    assert report.memory_mb == pytest.approx((4 * total + 12 * trained) / 1e6)
    assert report.training_sec is not None
    assert report.training_sec > 0


def test_a_report_has_the_environments_errors_alone_and_warns(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config]
) -> None:
    shouted = [copy.copy(u) for u in splits.train]
    for utterance in shouted:
        object.__setattr__(utterance, "text", utterance.text.upper())
    report = preflight(configure(), DatasetSplits(shouted, shouted[:1], shouted[:1], "keep"), *small)
    checks = by_name(report.checks)
    assert list(checks) == ["jiwer", "labels", "updates", "memory", "disk", "time"]
    assert not report.ok
    assert checks["labels"].status == "warning"
    assert "sentence" in checks["labels"].fix
    assert "6 in 2 epoch(s), 1 of them warm-up; 6 clips in 3 batches: few" in checks["updates"].found
    assert "Pre-flight" in report.to_text()
    assert "<td" in report._repr_html_()


def test_adapters_take_a_fraction_of_the_memory_and_disk(
    tiny_en: tuple[Any, Any], configure: Callable[..., Config]
) -> None:
    def needs(**overrides: Any) -> tuple[int, int]:
        trial = module._prepared_copy(tiny_en[0], configure(**overrides))
        return sum(p.numel() for p in trial.parameters()), sum(p.numel() for p in trainable(trial))

    total, trained = needs()
    assert trained == total - 1500 * 384  # the position table stays
    assert total / 1e6 == pytest.approx(PARAMETERS_M["tiny"], rel=0.01)
    total_lora, trained_lora = needs(training__method="lora")
    assert trained_lora == total_lora - total < total / 10


def test_a_model_that_a_trainer_has_prepared_is_taken_as_it_is(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config]
) -> None:
    model, processor = small
    config = configure(training__method="lora", training__lora={"rank": 2})
    stock = preflight(config, splits, model, processor)
    prepare_model(model, config.training)
    assert preflight(config, splits, model, processor).memory_mb == stock.memory_mb


def test_time_is_unknown_where_memory_runs_out_and_other_errors_pass(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(message: str) -> Preflight:
        def fail(*_: Any) -> Any:
            raise RuntimeError(message)

        monkeypatch.setattr(TokenLoss, "forward", fail)
        return preflight(configure(), splits, *small)

    report = look("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert report.training_sec is None
    assert by_name(report.checks)["time"].found.startswith("unknown until the first update")
    with pytest.raises(RuntimeError, match="shapes differ"):
        look("shapes differ")


def test_too_little_memory_and_disk_show(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory_mb", lambda device: 1.0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    checks = by_name(preflight(configure(), splits, *small).checks)
    assert (checks["memory"].status, checks["disk"].status) == ("error", "warning")
    assert "lora" in checks["memory"].fix


@pytest.mark.parametrize(("fits_sec", "status"), [(40.0, "ok"), (4.0, "warning"), (0.0, "error")])
def test_the_probe_tries_the_largest_batch_on_a_gpu(
    small: tuple[Any, Any],
    splits: DatasetSplits,
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    fits_sec: float,
    status: str,
) -> None:
    asked: list[float] = []

    def propose(model: Any, config: Config, *, clip_sec: float, max_seconds: float) -> BatchProposal:
        asked.extend((clip_sec, max_seconds))
        if not fits_sec:
            raise DeviceError("not even one clip fits")
        return BatchProposal(6.8, fits_sec, "max_seconds" if fits_sec >= max_seconds else "memory")

    monkeypatch.setattr(module, "propose_batch_seconds", propose)
    config = configure()
    loader = create_loader(splits.train, small[1], config, shuffle=True)
    assert not list(module._try_largest_batch(small[0], loader, config))  # a CPU takes pieces
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    (check,) = module._try_largest_batch(on_gpu, loader, config)
    longest_sec = max(u.duration_sec or 0.0 for u in splits.train) + 1.0
    assert asked == [longest_sec, 2 * longest_sec]
    assert check.status == status
    assert check.fix == ("training.batch_seconds: 7" if status == "warning" else "")


def test_time_grows_with_epochs_and_with_the_share_at_30_s(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))  # a second a batch

    def seconds(**overrides: Any) -> float:
        found = preflight(configure(**overrides), splits, *small).training_sec
        assert found is not None
        return found

    once = seconds(training__epochs=1)
    assert 2 < once < 4  # three batches
    # half of the six clips as 30 s, of which the measured ones have some 2 s each
    assert seconds(training__epochs=2, training__full_context_prob=0.5) > 2 * 4 * once
