from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.loader import create_loader
from src.data.preparation import DatasetSplits
from src.data.utterance import Utterance
from src.training.loss import TokenLoss
from src.training.methods import prepare_model, trainable
from src.training.preflight import BatchProposal, Preflight, largest_that_fits, preflight, propose_batch_seconds
from src.training.state import random_state, restore_random_state
from src.utils import runtime
from src.utils.config import Config
from src.utils.errors import DeviceError
from src.utils.memory import run_disk_mb, size_mb
from src.utils.validation import Check, EnvironmentReport
from tests.training.conftest import Configure, TrainerFactory

module = importlib.import_module("src.training.preflight")  # its function has the same name in the package


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EnvironmentReport((Check("GPU", "absent", "none"), Check("jiwer", "error", "is not installed", "pip ...")))
    monkeypatch.setattr(module, "environment_report", lambda config: found)  # the real one imports torch again
    for each in (module, runtime):  # collecting garbage takes a second
        monkeypatch.setattr(each, "release_memory", lambda: None)


@pytest.fixture
def splits(clips: list[Utterance]) -> DatasetSplits:
    return DatasetSplits(clips[:6], clips[6:7], clips[7:8], label_case="sentence")


@pytest.fixture
def look(small: tuple[Any, Any], splits: DatasetSplits, configure: Configure) -> Callable[..., Preflight]:
    """Look at the small model and the splits with these settings."""
    return lambda **overrides: preflight(configure(**overrides), splits, *small)


def by_name(report: Preflight) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def test_nothing_of_the_caller_changes(small: tuple[Any, Any], splits: DatasetSplits, configure: Configure) -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.rand(), random.random()]

    model, processor = small
    config = configure(augmentation__enabled=True, training__method="lora", training__lora={"rank": 2})
    loader = create_loader(splits.train, processor, config, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    parameters = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    before = (loader.state_dict(), model.training, model.audio_context)
    generators = random_state()
    expected = draw()
    restore_random_state(*generators)
    preflight(config, splits, model, processor)
    assert draw() == expected
    assert (loader.state_dict(), model.training, model.audio_context) == before
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
    small: tuple[Any, Any], splits: DatasetSplits, configure: Configure
) -> None:
    shouted = [replace(u, text=u.text.upper()) for u in splits.train]
    report = preflight(configure(), DatasetSplits(shouted, shouted[:1], shouted[:1], "keep"), *small)
    checks = by_name(report)
    assert list(checks) == ["jiwer", "labels", "updates", "audio context", "memory", "disk", "time"]
    assert not report.ok
    assert (checks["labels"].status, checks["updates"].status, report.updates) == ("warning", "warning", 6)
    assert "sentence" in checks["labels"].fix


def test_labels_in_capitals_are_found_beside_another_language(splits: DatasetSplits) -> None:
    shouted = [replace(u, text=u.text.upper()) for u in splits.train]
    mixed = DatasetSplits(
        [*shouted, *(replace(u, text="今天天气很好" * 9, language="zh") for u in shouted)], [], [], "keep"
    )
    assert module._check_labels(mixed).status == "warning"


def test_memory_follows_the_method_and_a_prepared_model_is_taken_as_it_is(
    small: tuple[Any, Any], configure: Configure, look: Callable[..., Preflight]
) -> None:
    method: dict[str, Any] = {"training__method": "lora", "training__lora": {"rank": 2}}
    lora_mb = look(**method).memory_mb
    assert lora_mb < look().memory_mb / 3
    prepare_model(small[0], configure(**method).training)
    assert look(**method).memory_mb == lora_mb


def test_time_is_unknown_where_memory_runs_out_and_other_errors_pass(
    look: Callable[..., Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenLoss, "forward", Mock(side_effect=RuntimeError("CUDA out of memory. Tried to allocate")))
    report = look()
    assert report.training_sec is None
    assert by_name(report)["time"].status == "warning"
    monkeypatch.setattr(TokenLoss, "forward", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        look()


@pytest.mark.parametrize(
    ("known", "asked", "status", "found"),
    [
        ("full", "dynamic", "warning", "own length"), ("full", "auto", "ok", "30 s"), ("full", "full", "ok", "30 s"),
        ("dynamic", "auto", "ok", "own length"), ("dynamic", "dynamic", "ok", "own length"),
    ],
)  # fmt: skip
def test_a_few_clips_do_not_teach_a_stock_model_its_own_length(
    small: tuple[Any, Any], look: Callable[..., Preflight], known: Any, asked: str, status: str, found: str
) -> None:
    small[0].audio_context = known
    check = by_name(look(model__audio_context=asked))["audio context"]
    assert (check.status, found in check.found, "auto" in check.fix) == (status, True, status == "warning")


def test_too_little_memory_and_disk_show(look: Callable[..., Preflight], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory_mb", lambda device: 1.0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    checks = by_name(look())
    assert (checks["memory"].status, checks["disk"].status) == ("error", "warning")
    assert "lora" in checks["memory"].fix


@pytest.mark.parametrize(("fits_sec", "status"), [(40.0, "ok"), (4.0, "warning"), (0.0, "error")])
def test_the_probe_tries_the_largest_batch_on_a_gpu(
    small: tuple[Any, Any], splits: DatasetSplits, configure: Configure, monkeypatch: pytest.MonkeyPatch,
    fits_sec: float, status: str,
) -> None:  # fmt: skip
    asked: list[float] = []

    def propose(model: Any, config: Config, *, clip_sec: float, max_seconds: float, label_tokens: int) -> BatchProposal:
        asked.extend((clip_sec, max_seconds))
        assert label_tokens == loader.longest_label
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
    assert ("training.batch_seconds: 7" in check.fix) == (status == "warning")


def test_time_grows_with_epochs_and_with_the_share_at_30_s(
    look: Callable[..., Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))  # a second a batch
    once = look(training__epochs=1).training_sec or 0.0
    assert 2 < once < 4  # three batches
    # half of the six clips as 30 s, of which the measured ones have some 2 s each
    assert (look(training__epochs=2, training__full_context_prob=0.5).training_sec or 0.0) > 2 * 4 * once


# the largest batch


@given(st.integers(0, 300), st.integers(1, 200))
def test_the_search_finds_what_fits_within_a_tenth(room: int, most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    found, limit = largest_that_fits(fits, most=most)
    best = min(room, most)
    assert found <= best <= found + max(1, found // 10)
    assert limit == ("memory" if room < most and found < most else "max_seconds")
    assert max(tried) <= most
    assert len(tried) <= 20


def test_a_small_model_is_tried_and_not_changed(small: tuple[Any, Any], config: Config) -> None:
    model, _ = small
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proposal = propose_batch_seconds(model, config, clip_sec=2.0, max_seconds=8.0)
    assert (proposal.fits_sec, proposal.limit) == (8.0, "max_seconds")
    assert proposal.batch_seconds == pytest.approx(0.85 * 8.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_padded_to_30_s_are_tried_in_the_pieces_that_training_cuts_them_into(
    small: tuple[Any, Any], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, float]] = []
    monkeypatch.setattr(module, "_update_on_noise", lambda loss, optimizer, *size: tried.append(size[:2]))
    for share, expected in ((0.0, {10.0}), (0.1, {10.0, 30.0})):
        tried.clear()
        propose_batch_seconds(small[0], configure(training__full_context_prob=share), clip_sec=10.0, max_seconds=80.0)
        assert {clip_sec for _, clip_sec in tried} == expected
        assert tried[-1] == ((3, 30.0) if share else (8, 10.0))  # 80 s, and a fifth more


def test_memory_ends_the_search_and_other_errors_pass(
    small: tuple[Any, Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(loss: Any, optimizer: Any, clips: int, *size: Any) -> None:
        if clips > room:
            raise RuntimeError(message)

    monkeypatch.setattr(module, "_update_on_noise", update)
    room, message = 5, "CUDA out of memory. Tried to allocate 2.00 GiB"
    proposal = propose_batch_seconds(small[0], config, clip_sec=10.0, max_seconds=100.0)
    assert (proposal.fits_sec, proposal.limit) == (50.0, "memory")
    room = 0
    with pytest.raises(DeviceError, match="gradient_checkpointing"):
        propose_batch_seconds(small[0], config)
    message = "shapes differ"
    with pytest.raises(RuntimeError, match=message):
        propose_batch_seconds(small[0], config)
