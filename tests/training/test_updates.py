from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from src.data.batching import batch_generator
from src.data.loader import SpeechLoader, create_loader
from src.data.utterance import Utterance
from src.training import updates
from src.training.inputs import TrainingInputs
from src.training.loss import TokenLoss
from src.training.methods import prepare_model
from src.training.schedule import build_optimizer
from src.training.updates import Updater, UpdateReport
from src.utils.errors import DataError, DeviceError

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
def eight(tiny_en: tuple[Any, Any], clips: list[Utterance], configure: Any) -> Batch:
    batch = next(iter(create_loader(clips[:8], tiny_en[1], configure(inference__batch_size=8))))
    # one length for all, so that padding is the same however the clips are put together
    return {**batch, "audio_lengths": torch.full_like(batch["audio_lengths"], batch["audio"].shape[1])}


@pytest.fixture
def loader(small: tuple[Any, Any], clips: list[Utterance], configure: Any) -> SpeechLoader:
    return create_loader(clips[:8], small[1], configure(inference__batch_size=4))


@pytest.fixture
def batches(loader: SpeechLoader) -> list[Batch]:
    """Two batches of four clips."""
    return list(loader)


@pytest.mark.slow
def test_however_an_update_is_cut_its_gradients_are_those_of_all_clips_at_once(
    tiny_en: tuple[Any, Any], eight: Batch, configure: Any
) -> None:
    model, _ = tiny_en
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
    cuts += [([eight], 2), ([eight], 4), ([eight], 8)]
    for window, pieces in cuts:
        report, split = gradients(window, pieces)
        assert report.loss == pytest.approx(whole_report.loss, rel=1e-5)
        assert (report.tokens, report.clips, report.ids) == (whole_report.tokens, 8, tuple(eight["ids"]))
        close(split, whole)


def test_the_report_counts_tokens_clips_and_seconds(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    bench = Bench(small[0], configure())
    report = bench.update(*batches)
    assert report.applied
    assert report.tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert report.clips == 8
    assert report.audio_sec == pytest.approx(sum(sum(batch["durations"]) for batch in batches))
    assert report.ids == tuple(name for batch in batches for name in batch["ids"])
    assert report.loss == pytest.approx(report.loss_sum / report.tokens)
    assert report.loss == pytest.approx(math.log(51864), rel=0.05)  # a random model knows nothing


def test_gradients_are_clipped(small: tuple[Any, Any], batches: list[Batch], configure: Any) -> None:
    bench = Bench(small[0], configure(training__max_grad_norm=1e-3))
    assert bench.update(batches[0]).grad_norm > 1e-2
    assert float(bench.gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_weight_decay_leaves_the_encoders_position_table_alone(
    tiny_en: tuple[Any, Any], eight: Batch, configure: Any
) -> None:
    model, _ = tiny_en
    table = model.model.encoder.embed_positions.weight.clone()
    bench = Bench(model, configure())
    for group in bench.optimizer.param_groups:
        group["weight_decay"] = 0.5
    before = bench.state()
    bench.update(rows(eight, 0, 2))
    assert torch.equal(model.model.encoder.embed_positions.weight, table)
    unchanged = [name for name, tensor in bench.state().items() if name in before and torch.equal(tensor, before[name])]
    assert unchanged == ["weight model.encoder.embed_positions.weight"]


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
    warned = [r.getMessage() for r in caplog.records if "from now on each batch goes" in r.getMessage()]
    assert len(warned) == pieces.bit_length() - 1


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


def test_a_batch_of_fewer_clips_than_pieces_is_cut_into_single_clips(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    bench = Bench(small[0], configure(), loss=cramped(9))
    bench.updater.pieces = 8
    assert bench.update(rows(batches[0], 0, 3), batches[1]).applied
    assert bench.loss.seen == [1] * 7


def test_no_room_for_a_single_clip_stops_with_the_clips(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    bench = Bench(small[0], configure(), loss=cramped(0))
    before = bench.state()
    with pytest.raises(DeviceError, match=r"out of memory with a single clip.*max_duration_sec") as caught:
        bench.update(*batches)
    assert batches[0]["ids"][0] in str(caught.value)
    assert same(bench.state(), before)


def test_another_error_passes_as_it_is(small: tuple[Any, Any], batches: list[Batch], configure: Any) -> None:
    class Broken(TokenLoss):
        def forward(self, *args: Any) -> Tensor:
            raise RuntimeError("CUDA error: device-side assert triggered")

    bench = Bench(small[0], configure(), loss=Broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        bench.update(batches[0])
    assert bench.updater.pieces == 1


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
    assert f"update skipped, loss nan; its clips: {', '.join(batches[1]['ids'])}" in caplog.messages
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
    assert any(
        message.startswith("update skipped, gradient norm") and message.endswith(", ".join(report.ids))
        for message in caplog.messages
    )


def test_several_in_a_row_stop_training_with_all_their_clips(
    small: tuple[Any, Any], batches: list[Batch], configure: Any
) -> None:
    bench = Bench(small[0], configure(training__max_nonfinite_steps=3))
    singles = [rows(batches[0], i, i + 1) for i in range(4)]
    bench.update(with_nan(singles[0]))
    bench.update(with_nan(singles[1]))
    bench.update(singles[2])  # a good one: the count begins anew
    bench.update(with_nan(singles[1]))
    bench.update(with_nan(singles[2]))
    with pytest.raises(DataError, match="3 updates in a row had no finite loss and gradient") as caught:
        bench.update(with_nan(singles[3]))
    assert [name in str(caught.value) for name in batches[0]["ids"]] == [False, True, True, True]


def test_the_count_goes_on_after_a_resume(small: tuple[Any, Any], batches: list[Batch], configure: Any) -> None:
    config = configure(training__max_nonfinite_steps=2)
    bench = Bench(small[0], config)
    bench.update(with_nan(batches[0]))
    resumed = Bench(small[0], config)
    resumed.updater.load_state_dict(json.loads(json.dumps(bench.updater.state_dict())))
    with pytest.raises(DataError) as caught:
        resumed.update(with_nan(batches[1]))
    assert all(name in str(caught.value) for batch in batches for name in batch["ids"])


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
    assert message.startswith("gradient norm")
    assert message.endswith(f"(clipped to 1.0 and applied); its clips: {batches[0]['ids'][1]}")
    bench.loss.factor = 1.0
    bench.update(one)
    assert len(caplog.messages) == 1


def test_a_batch_padded_to_30_s_goes_through_in_pieces_of_its_own_length(
    small: tuple[Any, Any], batches: list[Batch], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    real = TokenLoss.forward

    def watched(self: TokenLoss, features: Tensor, *args: Tensor) -> Tensor:
        sizes.append((features.shape[0], features.shape[2]))
        return real(self, features, *args)

    monkeypatch.setattr(TokenLoss, "forward", watched)
    model, _ = small
    model.audio_context = "dynamic"
    for share, expected in ((0.0, 4), (1.0, 1)):
        config = configure(training__full_context_prob=share)
        loss = TokenLoss(model)
        optimizer = build_optimizer(model, learning_rate=0.0, weight_decay=0.0)
        accelerator = Accelerator(cpu=True)
        updater = Updater(
            *accelerator.prepare(loss, optimizer), accelerator, TrainingInputs(config, 80), config.training
        )
        sizes.clear()
        updater.update(batches[:1], [batch_generator(0, 0, 0)])
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
