from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from src.data.loader import batch_generator, create_loader
from src.data.utterance import Utterance
from src.training import updates
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import prepare_model
from src.training.updates import (
    Updater,
    UpdateReport,
    build_optimizer,
    build_schedule,
    count_updates,
    default_learning_rate,
)
from src.utils.config import TrainingConfig
from src.utils.errors import DataError, DeviceError, MissingDependencyError

Batch = dict[str, Any]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.75 GiB"


class DoubleLoss(TokenLoss):
    """In float64, where the order of sums does not show: in float32 it moves gradients by 4e-5 of their length."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
        self.model.double()
        return super().forward(input_features.double(), decoder_input_ids, labels)


class Bench:
    """An updater with its parts, and the gradients of each update that was applied."""

    def __init__(self, model: Any, config: Any, *, loss: type[TokenLoss] = TokenLoss) -> None:
        AcceleratorState._reset_state()
        self.model = model
        model.audio_context = "dynamic"
        prepare_model(model, config.training)
        accelerator = Accelerator(cpu=True)
        optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
        self.loss, self.optimizer = accelerator.prepare(loss(model), optimizer)
        self.updater = Updater(self.loss, self.optimizer, accelerator, TrainingInputs(config, 80), config.training)
        self.gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(self._keep)
        self._calls = 0

    def _keep(self, *args: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))

    def update(self, *window: Batch) -> UpdateReport:
        self._calls += 1
        return self.updater.update(window, [batch_generator(1, 0, self._calls * 10 + i) for i in range(len(window))])

    def state(self) -> dict[str, Tensor]:
        found = {f"weight {name}": p.detach().clone() for name, p in self.model.named_parameters()}
        for index, state in enumerate(self.optimizer.optimizer.state.values()):
            found |= {f"{index} {key}": value.clone() for key, value in state.items()}
        return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(value, b[key]) for key, value in a.items())


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Some clips of a batch, with its padding."""
    return {key: value[first:last] for key, value in batch.items()}


def windows_of(batch: Batch, size: int) -> list[Batch]:
    count = len(batch["ids"])
    return [rows(batch, at, min(at + size, count)) for at in range(0, count, size)]


def with_nan(batch: Batch) -> Batch:
    return {**batch, "audio": torch.full_like(batch["audio"], math.nan)}


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the gradient's length."""
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.fixture
def batches(small: tuple[Any, Any], clips: list[Utterance], configure: Any) -> list[Batch]:
    """Two batches of four clips."""
    return list(create_loader(clips[:8], small[1], configure(inference__batch_size=4)))


def test_however_an_update_is_cut_its_gradients_are_those_of_all_clips_at_once(
    small: tuple[Any, Any], clips: list[Utterance], configure: Any
) -> None:
    model, processor = small
    batch = next(iter(create_loader(clips[:8], processor, configure(inference__batch_size=8))))
    # one length for all, so that padding is the same however the clips are put together
    eight = {**batch, "audio_lengths": torch.full_like(batch["audio_lengths"], batch["audio"].shape[1])}
    config = configure(training__max_trailing_silence_sec=0, training__max_grad_norm=1e9)
    bench = Bench(model, config, loss=DoubleLoss)
    before = copy.deepcopy(model.state_dict())

    def gradients(window: Sequence[Batch], pieces: int = 1) -> tuple[UpdateReport, Tensor]:
        model.load_state_dict(before)
        bench.updater.pieces = pieces
        report = bench.update(*window)
        return report, bench.gradients.pop()

    whole_report, whole = gradients([eight])
    assert whole_report.grad_norm == pytest.approx(float(whole.double().norm()), rel=1e-4)
    cuts = [(windows_of(eight, 4), 1), (windows_of(eight, 2), 1), (windows_of(eight, 5), 2)]
    cuts += [([eight], 2), ([eight], 8)]
    for window, pieces in cuts:
        report, split = gradients(window, pieces)
        assert report.loss == pytest.approx(whole_report.loss, rel=1e-5)
        assert (report.tokens, report.clips, report.ids) == (whole_report.tokens, 8, tuple(eight["ids"]))
        close(split, whole)


def test_the_report_counts_tokens_clips_and_seconds(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    report = Bench(small[0], configure()).update(*batches)
    assert report.applied
    assert report.tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert (report.clips, report.ids) == (8, tuple(name for batch in batches for name in batch["ids"]))
    assert report.audio_sec == pytest.approx(sum(sum(batch["durations"]) for batch in batches))
    assert report.loss == pytest.approx(report.loss_sum / report.tokens)
    assert report.loss == pytest.approx(math.log(51864), rel=0.05)  # a random model knows nothing


def test_gradients_are_clipped(small: tuple[Any, Any], batches: list[Batch], configure: Any) -> None:
    bench = Bench(small[0], configure(training__max_grad_norm=1e-3))
    assert bench.update(batches[0]).grad_norm > 1e-2
    assert float(bench.gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)


# memory


def cramped(limit: int) -> type[TokenLoss]:
    """A loss that has room for this many clips at a time."""

    class Cramped(TokenLoss):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
            loss = super().forward(input_features, decoder_input_ids, labels)
            if len(input_features) > limit:
                raise RuntimeError(OUT_OF_MEMORY)
            self.seen.append(len(input_features))
            return loss

    return Cramped


@pytest.mark.parametrize(("limit", "pieces"), [(4, 1), (3, 2), (2, 2), (1, 4)])
def test_out_of_memory_cuts_batches_until_they_fit_and_changes_nothing_else(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, limit: int, pieces: int, caplog: Any
) -> None:
    # pauses and augmentation are drawn: the repeated attempt must draw the same
    config = configure(augmentation__enabled=True, augmentation__noise_prob=1.0)
    roomy = Bench(copy.deepcopy(small[0]), config)
    expected = roomy.update(*batches)
    bench = Bench(small[0], config, loss=cramped(limit))
    report = bench.update(*batches)
    assert bench.updater.pieces == pieces
    assert report.ids == expected.ids
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    close(bench.gradients[0], roomy.gradients[0])
    assert sum(bench.loss.seen[-2 * pieces :]) == 8  # every clip, in the attempt that counted
    assert len(caplog.records) == pieces.bit_length() - 1


def test_smaller_pieces_stay_for_later_updates_and_are_saved(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, caplog: Any
) -> None:
    bench = Bench(small[0], configure(), loss=cramped(2))
    bench.update(batches[0])
    state = json.loads(json.dumps(bench.updater.state_dict()))
    caplog.clear()
    bench.update(batches[1])
    assert bench.loss.seen[-2:] == [2, 2]
    resumed = Bench(small[0], configure(), loss=cramped(2))
    resumed.updater.load_state_dict(state)
    resumed.update(batches[1])
    assert not caplog.records
    assert resumed.updater.state_dict() == state | {
        "norms": [*state["norms"], resumed.updater.state_dict()["norms"][-1]]
    }


def test_no_room_for_a_single_clip_stops_with_the_clips(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    bench = Bench(small[0], configure(), loss=cramped(0))
    before = bench.state()
    with pytest.raises(DeviceError, match=batches[0]["ids"][0]):
        bench.update(*batches)
    assert same(bench.state(), before)
    roomy = Bench(small[0], configure(), loss=cramped(9))
    roomy.updater.pieces = 8  # more than clips: single ones
    assert roomy.update(rows(batches[0], 0, 3), batches[1]).applied
    assert roomy.loss.seen == [1] * 7


# what an update must not leave behind


def test_an_interrupt_in_the_middle_of_an_update_leaves_no_gradient_to_the_next(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    class Interrupted(TokenLoss):
        calls = 0

        def forward(self, *args: Any) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().forward(*args)

    straight = Bench(copy.deepcopy(small[0]), configure())
    straight.update(*batches)
    bench = Bench(small[0], configure(), loss=Interrupted)
    before = bench.state()
    with pytest.raises(KeyboardInterrupt):
        bench.update(*batches)
    assert same(bench.state(), before)
    bench._calls = 0
    bench.update(*batches)
    assert torch.equal(bench.gradients[0], straight.gradients[0])


# numbers that are not finite


def test_an_update_with_a_loss_that_is_not_finite_is_left_out_and_its_clips_are_named(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, caplog: Any
) -> None:
    bench = Bench(small[0], configure())
    bench.update(*batches)
    before = bench.state()
    report = bench.update(batches[0], with_nan(batches[1]))
    assert not report.applied
    assert math.isnan(report.loss)
    assert same(bench.state(), before)
    (message,) = caplog.messages
    assert message.endswith(", ".join(batches[1]["ids"]))
    assert bench.update(*batches).applied


def test_a_gradient_that_is_not_finite_names_the_whole_window(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, caplog: Any
) -> None:
    class Overflowing(TokenLoss):
        def forward(self, *args: Any) -> Tensor:
            loss = super().forward(*args)
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss

    bench = Bench(small[0], configure(), loss=Overflowing)
    before = bench.state()
    report = bench.update(*batches)
    assert not report.applied
    assert math.isfinite(report.loss)
    assert same(bench.state(), before)
    (message,) = caplog.messages
    assert message.endswith(", ".join(report.ids))


def test_several_in_a_row_stop_training_with_all_their_clips_also_after_a_resume(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    config = configure(training__max_nonfinite_steps=3)
    bench = Bench(small[0], config)
    singles = [rows(batches[0], i, i + 1) for i in range(4)]
    bench.update(with_nan(singles[0]))
    bench.update(with_nan(singles[1]))
    bench.update(singles[2])  # a good one: the count starts again
    bench.update(with_nan(singles[1]))
    bench.update(with_nan(singles[2]))
    resumed = Bench(small[0], config)
    resumed.updater.load_state_dict(json.loads(json.dumps(bench.updater.state_dict())))
    with pytest.raises(DataError) as caught:
        resumed.update(with_nan(singles[3]))
    assert [name in str(caught.value) for name in batches[0]["ids"]] == [False, True, True, True]


def test_a_spike_of_the_gradient_is_told_with_its_clips_and_applied(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, caplog: Any
) -> None:
    class Spiking(TokenLoss):
        factor = 1.0

        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * self.factor

    bench = Bench(small[0], configure(), loss=Spiking)
    one = rows(batches[0], 0, 1)
    for number in range(10):
        bench.loss.factor = 50.0 if number == 3 else 1.0  # too early: ten norms must be known
        bench.update(one)
    assert not caplog.records
    before = bench.state()
    bench.loss.factor = 50.0
    assert bench.update(rows(batches[0], 1, 2)).applied
    assert not same(bench.state(), before)
    (message,) = caplog.messages
    assert message.endswith(batches[0]["ids"][1])
    bench.loss.factor = 1.0
    bench.update(one)
    assert len(caplog.messages) == 1


def test_a_batch_padded_to_30_s_goes_through_in_pieces_of_its_own_length(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    sizes: list[tuple[int, int]] = []

    class Watched(TokenLoss):
        def forward(self, features: Tensor, *args: Tensor) -> Tensor:
            sizes.append((features.shape[0], features.shape[2]))
            return super().forward(features, *args)

    for share, expected in ((0.0, 4), (1.0, 1)):
        sizes.clear()
        Bench(small[0], configure(training__full_context_prob=share), loss=Watched).update(batches[0])
        assert {size for size, _ in sizes} == {expected}
        assert sum(size for size, _ in sizes) == 4
        assert all(frames == 3_000 for _, frames in sizes) == (share == 1.0)


def test_a_padded_batch_may_take_the_memory_of_the_largest_batch_so_far(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "CPU_FRAMES", 10**6)  # as on a GPU
    bench = Bench(small[0], configure(training__full_context_prob=0.0))
    own, padded = batches[0], torch.zeros(4, 80, 3_000)

    def together() -> int:
        return bench.updater._rows_together(padded, own)

    assert together() == 1
    long = {**own, "audio": torch.zeros(4, 16 * 16_000)}
    assert bench.updater._rows_together(torch.zeros(4, 80, 1_600), long) == 4
    assert together() == 2  # 4 x 16 s hold 2 x 30 s
    again = Bench(copy.deepcopy(small[0]), configure(training__full_context_prob=0.0)).updater
    again.load_state_dict(json.loads(json.dumps(bench.updater.state_dict())))
    assert again._rows_together(padded, own) == 2
    bench.updater._halve([own], "out of memory")
    assert together() == 1


# optimizer and schedule


def rates(total: int, warmup_ratio: float, *, done: int = 0) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0)
    schedule = build_schedule(optimizer, total_updates=total, warmup_ratio=warmup_ratio, done_updates=done)
    seen = []
    for _ in range(total - done):
        seen.append(schedule.get_last_lr()[0])
        assert {group["lr"] for group in optimizer.param_groups} == {seen[-1]}
        optimizer.step()
        schedule.step()
    return seen


def test_rate_reaches_its_peak_and_comes_down_within_the_real_updates() -> None:
    seen = rates(100, 0.1)
    assert max(seen) == 1.0
    assert seen.index(1.0) == 9
    assert seen[0] == pytest.approx(0.1)
    assert seen[-1] == pytest.approx(1 / 90)
    assert all(a > b for a, b in itertools.pairwise(seen[10:]))

    assert rates(1, 0.1) == [1.0]
    assert rates(4, 0.0) == [1.0, 0.75, 0.5, 0.25]
    for done in (1, 10, 57, 99):
        assert rates(100, 0.1, done=done) == seen[done:]  # of a resumed run


def test_a_schedule_can_be_made_again_on_a_used_optimizer() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0)
    schedule = build_schedule(optimizer, total_updates=4, warmup_ratio=0.0)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for done, expected in [(3, 5 / 8), (0, 1.0)]:  # a run that is made longer; one that begins anew
        assert build_schedule(optimizer, total_updates=8, warmup_ratio=0.0, done_updates=done).get_last_lr() == [
            expected, expected
        ]  # fmt: skip


def test_updates_count_short_windows_at_the_end_of_an_epoch() -> None:
    assert [count_updates(*each) for each in ((45, 1), (45, 4), (3, 8))] == [45, 12, 1]


def test_of_whisper_matrices_and_filters_decay_and_each_weight_is_trained_once(small: tuple[Any, Any]) -> None:
    model, _ = small
    prepare_model(model, TrainingConfig())
    assert not model.model.encoder.embed_positions.weight.requires_grad  # neither trained nor decayed
    decayed, free = build_optimizer(model, learning_rate=1.0, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert not [names[p] for p in decayed["params"] if "layer_norm" in names[p]]
    assert all(names[p].endswith(".bias") or "layer_norm" in names[p] for p in free["params"])
    together = [*decayed["params"], *free["params"]]
    assert len(together) == len(set(together)) == len(names) - 1  # all but the encoder's positions


def test_default_rate_goes_by_size_and_is_ten_times_that_for_adapters() -> None:
    for d_model, rate in ((384, 3.75e-5), (512, 2.5e-5), (768, 1.25e-5), (1024, 6.25e-6), (1280, 5e-6)):
        assert default_learning_rate(d_model) == rate
        assert default_learning_rate(d_model, lora=True) == pytest.approx(10 * rate)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_adam_without_its_package_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, kind="adamw_8bit")
