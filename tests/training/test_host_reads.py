"""A GPU does not wait for the host: updates run on torch's meta device, where every read of a value raises."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from src.data import features
from src.data.loader import create_loader
from src.data.training_batches import TrainingBatches
from src.data.utterance import Utterance
from src.evaluation.evaluator import sum_loss
from src.inference.torch_engine import Encoded
from src.models.dynamic_context import DynamicWhisper
from src.training import updates
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import HalfCopy, prepare_model
from src.training.updates import READ_EVERY, Updater, build_optimizer, learning_rates

READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")
DEVICE = torch.device("meta")


class Reads(TorchDispatchMode):
    """Counts operators by which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name.startswith("aten.index.Tensor") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name.startswith(READS) or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def accelerator(device: torch.device) -> Any:
    return SimpleNamespace(
        device=device, scaler=None, backward=lambda loss: loss.backward(), clip_grad_norm_=nn.utils.clip_grad_norm_
    )


@pytest.fixture
def batches(small: tuple[Any, Any], clips: list[Utterance], configure: Any) -> list[dict[str, Any]]:
    """Training batches with every effect, at their own length and padded to 30 s."""
    config = configure(augmentation__enabled=True, augmentation__noise_prob=0.5, training__full_context_prob=0.3)
    loader = create_loader(clips[:8], small[1], config, shuffle=True)
    loader.prepare_with(TrainingBatches(config, 80, durations_sec=loader.durations_sec(0)))
    return list(loader)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_update_on_a_gpu_is_read_every_10_updates_and_nowhere_else(
    small: tuple[Any, Any], batches: list[dict[str, Any]], configure: Any, monkeypatch: pytest.MonkeyPatch,
    precision: torch.dtype,
) -> None:  # fmt: skip
    config = configure(augmentation__enabled=True)
    with torch.device(DEVICE):
        model = DynamicWhisper(copy.deepcopy(small[0].config))
    model.audio_context = "dynamic"
    prepare_model(model, config.training)
    model.train()
    half = None if precision == torch.float32 else HalfCopy(model, precision)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
    skipped: list[Tensor] = []
    monkeypatch.setattr(optimizer, "step", lambda: skipped.append(optimizer.found_inf))  # torch's kernel reads nothing
    monkeypatch.setattr(updates, "READ_SEC", float("inf"))  # a loaded machine would read earlier
    monkeypatch.setattr(torch, "autocast", lambda **given: nullcontext())  # there is none for the pretended device
    copied: list[list[str]] = []

    def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        copied.append(list(batch))  # one buffer; a pretended device has no pinned memory
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    reads: list[int] = []

    def read(updater: Updater) -> None:
        reads.append(len(updater._unread))
        with pytest.raises(NotImplementedError):  # a value was really asked for
            torch.cat([each.values for each in updater._unread]).tolist()
        updater._unread.clear()

    monkeypatch.setattr(updates, "to_device", to_device)
    monkeypatch.setattr(Updater, "read", read)
    holder = SimpleNamespace(optimizer=optimizer, zero_grad=optimizer.zero_grad)
    loss, inputs = TokenLoss(model if half is None else half.model), TrainingInputs(config, 80)
    updater = Updater(loss, holder, accelerator(DEVICE), inputs, config.training, half=half)
    updater._skips_on_device = True
    updater.start(learning_rates(1e-4, total_updates=30, warmup_ratio=0.1), applied=0)
    for number in range(2 * READ_EVERY):
        report = updater.update([batches[number % len(batches)]])
        assert report.measured is None
    features._constants.cache_clear()  # has constants of the pretended device
    assert reads == [READ_EVERY, READ_EVERY]
    assert len(copied) == 2 * READ_EVERY  # one copy per batch
    assert {each.device for each in skipped} == {DEVICE}


def test_reading_and_the_decision_to_skip_leave_no_read_on_a_cpu_either(
    small: tuple[Any, Any], batches: list[dict[str, Any]], configure: Any
) -> None:
    model, config = small[0], configure(augmentation__enabled=True)
    model.audio_context = "dynamic"
    prepare_model(model, config.training)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
    holder = SimpleNamespace(optimizer=optimizer, zero_grad=optimizer.zero_grad)
    updater = Updater(
        TokenLoss(model), holder, accelerator(torch.device("cpu")), TrainingInputs(config, 80), config.training
    )
    updater.start(learning_rates(1e-4, total_updates=30, warmup_ratio=0.1), applied=0)
    with Reads() as mode:
        reports = [updater.update([batches[n % len(batches)]]) for n in range(READ_EVERY)]
    assert sum(mode.found.values()) <= 2, mode.found
    assert all(report.measured is not None and report.applied for report in reports)


def test_the_loss_of_a_validation_batch_is_read_once(small: tuple[Any, Any], batches: list[dict[str, Any]]) -> None:
    model = small[0]
    model.audio_context = "dynamic"
    batch = min(batches, key=lambda batch: batch["audio"].shape[1])
    with torch.inference_mode():
        encoded = Encoded(model.get_encoder()(features.LogMel(80)(batch["audio"])).last_hidden_state)
        with Reads() as mode:
            loss = sum_loss(model, encoded, batch["decoder_input_ids"], batch["labels"])
    assert not mode.found
    assert float(loss) > 0
