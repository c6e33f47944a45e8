from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from src.data.loader import batch_generator, create_loader
from src.data.training_batches import TrainingBatches
from src.data.utterance import Utterance
from src.training import updates
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import prepare_model
from src.training.updates import Updater, UpdateReport, build_optimizer, build_schedule, count_updates
from src.utils import runtime
from src.utils.errors import DataError, DeviceError, MissingDependencyError

Batch = dict[str, Any]
Change = Callable[[Tensor, int], Tensor]  # of the loss of a pass with so many rows


class WatchedLoss(TokenLoss):
    """Notes rows and frames of each pass, and lets a test change its loss."""

    change: Change | None = None
    dtype = torch.float32

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.seen: list[tuple[int, int]] = []

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
        self.model.to(self.dtype)
        loss = super().forward(input_features.to(self.dtype), decoder_input_ids, labels)
        rows, _, frames = input_features.shape
        if self.change is not None:
            loss = self.change(loss, rows)
        self.seen.append((rows, frames))
        return loss


class Bench:
    """An updater of a copy of a model with its parts, and the gradients of each update that was applied."""

    def __init__(self, model: Any, config: Any, change: Change | None = None) -> None:
        AcceleratorState._reset_state()
        self.model = model = copy.deepcopy(model)
        model.audio_context = "dynamic"
        prepare_model(model, config.training)
        accelerator = Accelerator(cpu=True)
        optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
        self.loss, self.optimizer = accelerator.prepare(WatchedLoss(model), optimizer)
        self.loss.change = change
        self.prepare = TrainingBatches(config, 80)
        self.updater = Updater(self.loss, self.optimizer, accelerator, TrainingInputs(config, 80), config.training)
        self.gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(self._keep)
        self.calls = 0

    def _keep(self, *args: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))

    def update(self, *window: Batch) -> UpdateReport:
        self.calls += 1
        numbered = enumerate(window, start=self.calls * 10)
        return self.updater.update([self.prepare(batch, batch_generator(1, 0, number)) for number, batch in numbered])

    def state(self) -> list[Tensor]:
        """Weights and moments."""
        moments = (value for state in self.optimizer.optimizer.state.values() for value in state.values())
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *moments)]

    def hand_over(self, other: Bench) -> None:
        other.updater.load_state_dict(json.loads(json.dumps(self.updater.state_dict())))


def room_for(limit: int) -> Change:
    def change(loss: Tensor, rows: int) -> Tensor:
        if rows > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    return change


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def windows_of(batch: Batch, size: int) -> list[Batch]:
    """Parts of a batch, with its padding."""
    return [{k: v[at : at + size] for k, v in batch.items()} for at in range(0, len(batch["ids"]), size)]


def with_nan(batch: Batch) -> Batch:
    return {**batch, "audio": torch.full_like(batch["audio"], math.nan)}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes a second."""
    monkeypatch.setattr(runtime, "release_memory", lambda: None)


@pytest.fixture
def model(small: tuple[Any, Any]) -> Any:
    return small[0]


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
    bench = Bench(model, configure(training__max_trailing_silence_sec=0, training__max_grad_norm=1e9))
    bench.loss.dtype = torch.float64  # in float32 the order of sums moves gradients by 4e-5 of their length
    before = copy.deepcopy(model.state_dict())
    found = []
    windows = [([eight], 1), (windows_of(eight, 4), 1), (windows_of(eight, 5), 2), ([eight], 2), ([eight], 8)]
    for window, bench.updater.pieces in windows:
        bench.model.load_state_dict(before)
        found.append(bench.update(*window))
        assert found[-1].loss == pytest.approx(found[0].loss, rel=1e-5)
        assert (found[-1].tokens, found[-1].clips, found[-1].ids) == (found[0].tokens, 8, tuple(eight["ids"]))
        assert close(bench.gradients[-1], bench.gradients[0])
    assert found[0].grad_norm == pytest.approx(float(bench.gradients[0].double().norm()), rel=1e-4)


def test_the_report_counts_tokens_clips_and_seconds_and_gradients_are_clipped(
    model: Any, batches: list[Batch], configure: Any
) -> None:
    bench = Bench(model, configure(training__max_grad_norm=1e-3))
    report = bench.update(*batches)
    assert report.applied
    assert report.tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert (report.clips, report.ids) == (8, tuple(name for batch in batches for name in batch["ids"]))
    assert report.audio_sec == pytest.approx(sum(sum(batch["durations"]) for batch in batches))
    assert report.loss == pytest.approx(math.log(51864), rel=0.05)  # a random model knows nothing
    assert report.grad_norm > 1e-2
    assert float(bench.gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)


# memory


@pytest.mark.parametrize(("limit", "pieces"), [(4, 1), (3, 2), (1, 4)])
def test_out_of_memory_cuts_batches_until_they_fit_and_changes_nothing_else(
    model: Any, batches: list[Batch], configure: Any, limit: int, pieces: int, caplog: Any
) -> None:
    # pauses and augmentation are drawn: the repeated attempt must draw the same
    config = configure(augmentation__enabled=True, augmentation__noise_prob=1.0)
    roomy, bench, resumed = (Bench(model, config, change) for change in (None, room_for(limit), room_for(limit)))
    expected, report = (each.update(*batches) for each in (roomy, bench))
    assert (bench.updater.pieces, report.ids) == (pieces, expected.ids)
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    assert close(bench.gradients[0], roomy.gradients[0])
    assert sum(size for size, _ in bench.loss.seen[-2 * pieces :]) == 8  # every clip, in the attempt that counted
    assert len(caplog.records) == pieces.bit_length() - 1
    bench.hand_over(resumed)  # smaller pieces stay, also after a resume
    resumed.update(batches[0])
    assert [size for size, _ in resumed.loss.seen] == [4 // pieces] * pieces
    assert len(caplog.records) == pieces.bit_length() - 1


def test_no_room_for_a_single_clip_stops_with_the_clips(model: Any, batches: list[Batch], configure: Any) -> None:
    bench = Bench(model, configure(), room_for(0))
    before = bench.state()
    with pytest.raises(DeviceError, match=batches[0]["ids"][0]):
        bench.update(*batches)
    assert same(bench.state(), before)
    bench.loss.change = None
    bench.updater.pieces = 8  # more than clips: single ones
    assert bench.update(windows_of(batches[0], 3)[0], batches[1]).applied
    assert [size for size, _ in bench.loss.seen] == [1] * 7


def test_a_batch_padded_to_30_s_goes_through_in_pieces_that_take_the_memory_of_the_largest_batch_so_far(
    model: Any, batches: list[Batch], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_length, padded = (Bench(model, configure(training__full_context_prob=share)) for share in (0.0, 1.0))
    monkeypatch.setattr(updates, "CPU_FRAMES", 10**6)  # as on a GPU
    two, samples = windows_of(batches[0], 2)[0], 30 * 16_000
    audio = torch.nn.functional.pad(two["audio"], (0, samples - two["audio"].shape[1]))
    own_length.update(two)
    own_length.update({**two, "audio": audio, "audio_lengths": torch.full((2,), samples)})
    assert [size for size, _ in own_length.loss.seen] == [2, 2]
    assert own_length.loss.seen[0][1] < own_length.loss.seen[1][1] == 3_000
    own_length.hand_over(padded)
    padded.update(two)
    padded.loss.change = room_for(1)
    padded.update(two)
    assert (padded.loss.seen, padded.updater.pieces) == ([(2, 3_000), (1, 3_000), (1, 3_000)], 2)
    padded.updater.pieces = 1
    padded.update(two)
    assert padded.loss.seen[3:] == [(1, 3_000)] * 2  # the largest batch so far did not fit


def test_an_interrupt_in_the_middle_of_an_update_leaves_no_gradient_to_the_next(
    model: Any, batches: list[Batch], configure: Any
) -> None:
    passes = iter(range(9))

    def interrupt(loss: Tensor, rows: int) -> Tensor:
        if next(passes) == 1:
            raise KeyboardInterrupt
        return loss

    straight, bench = Bench(model, configure()), Bench(model, configure(), interrupt)
    straight.update(*batches)
    before = bench.state()
    with pytest.raises(KeyboardInterrupt):
        bench.update(*batches)
    assert same(bench.state(), before)
    bench.calls = 0
    bench.update(*batches)
    assert torch.equal(bench.gradients[0], straight.gradients[0])


# numbers that are not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_left_out_and_its_clips_are_named(
    model: Any, batches: list[Batch], configure: Any, caplog: Any, what: str
) -> None:
    def overflow(loss: Tensor, rows: int) -> Tensor:
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    bench = Bench(model, configure())
    bench.update(*batches)
    before = bench.state()
    bench.loss.change = overflow if what == "gradient" else None
    report = bench.update(batches[0], with_nan(batches[1]) if what == "loss" else batches[1])
    assert not report.applied
    assert math.isfinite(report.loss) == (what == "gradient")
    assert same(bench.state(), before)
    (message,) = caplog.messages
    assert message.endswith(", ".join(batches[1]["ids"]))
    assert (batches[0]["ids"][0] in message) == (what == "gradient")  # any clip of the window may be the cause
    bench.loss.change = None
    assert bench.update(*batches).applied


def test_several_in_a_row_stop_training_with_all_their_clips_also_after_a_resume(
    model: Any, batches: list[Batch], configure: Any
) -> None:
    bench, resumed = (Bench(model, configure(training__max_nonfinite_steps=3)) for _ in range(2))
    singles = windows_of(batches[0], 1)
    # a good one after two bad ones: the count starts again
    for batch in (with_nan(singles[0]), with_nan(singles[1]), singles[2], with_nan(singles[1]), with_nan(singles[2])):
        bench.update(batch)
    bench.hand_over(resumed)
    with pytest.raises(DataError) as caught:
        resumed.update(with_nan(singles[3]))
    assert [name in str(caught.value) for name in batches[0]["ids"]] == [False, True, True, True]


def test_a_spike_of_the_gradient_is_logged_with_its_clips_and_applied(
    model: Any, batches: list[Batch], configure: Any, caplog: Any
) -> None:
    factor = 1.0
    bench = Bench(model, configure(), lambda loss, rows: loss * factor)
    first, second = windows_of(batches[0], 1)[:2]
    for number in range(12):
        factor = 50.0 if number in (3, 10) else 1.0  # 3 is too early: ten norms must be known
        before = bench.state()
        assert bench.update(second if number == 10 else first).applied
        assert not same(bench.state(), before)
    (message,) = caplog.messages
    assert message.endswith(second["ids"][0])


# optimizer and schedule


def rates(total: int, warmup_ratio: float, *, done: int = 0) -> list[float]:
    """Rates of a schedule after `done` of `total` updates, on an optimizer that an earlier schedule has used."""
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0)
    for _ in range(2):
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
    assert max(seen) == seen[9] == 1.0
    assert (seen[0], seen[-1]) == pytest.approx((0.1, 1 / 90))
    assert all(a > b for a, b in itertools.pairwise(seen[10:]))
    assert rates(1, 0.1) == [1.0]
    assert rates(4, 0.0) == [1.0, 0.75, 0.5, 0.25]
    for done in (1, 10, 99):
        assert rates(100, 0.1, done=done) == seen[done:]  # of a resumed run
    assert [count_updates(*each) for each in ((45, 1), (45, 4), (3, 8))] == [45, 12, 1]  # a short last window counts


def test_of_whisper_matrices_and_filters_decay_and_each_weight_is_trained_once(model: Any, configure: Any) -> None:
    prepare_model(model, configure().training)
    decayed, free = build_optimizer(model, learning_rate=1.0, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(names[p].endswith(".weight") and "layer_norm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith(".bias") or "layer_norm" in names[p] for p in free["params"])
    together = [*decayed["params"], *free["params"]]
    assert len(together) == len(set(together)) == len(names) - 1  # all but the encoder's positions


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_adam_without_its_package_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        build_optimizer(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, kind="adamw_8bit")
