from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.loader import LengthBatchSampler, Shard, batch_generator, current_shard
from src.utils.errors import DataError

DURATIONS = st.lists(st.floats(0.1, 30), min_size=1, max_size=60)


def padding_share(durations: list[float], batches: list[list[int]]) -> float:
    padded = sum(max(durations[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(durations) / padded


@pytest.fixture
def durations() -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1 + 14 * torch.rand(203, generator=generator)).tolist()


def alone(durations: list[float], batch_size: int | None = None, **options: object) -> LengthBatchSampler:
    return LengthBatchSampler(durations, batch_size, rank=0, world_size=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_clip_is_in_exactly_one_batch(durations: list[float], shuffle: bool) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=shuffle, seed=1)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert len(batches) == len(sampler) == 26


def test_epochs_differ_and_the_same_epoch_repeats(durations: list[float]) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=True, seed=1)
    sampler.set_epoch(1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(2)
    assert first == again
    assert list(sampler) != first


def test_batches_of_similar_length_waste_little(durations: list[float]) -> None:
    sampler = LengthBatchSampler(durations, 8, shuffle=True, seed=1)
    unsorted = [list(range(at, min(at + 8, 203))) for at in range(0, 203, 8)]
    assert padding_share(durations, list(sampler)) < 0.12 < padding_share(durations, unsorted)


def test_a_budget_wastes_little_and_fills_its_batches(durations: list[float]) -> None:
    batches = list(alone(durations, batch_seconds=120, shuffle=True, seed=1))
    assert padding_share(durations, batches) < 0.12
    filled = [len(batch) * max(durations[i] for i in batch) for batch in batches]
    assert sum(filled) / len(filled) > 0.8 * 120
    assert len({len(batch) for batch in batches}) > 3  # many short clips or few long ones


def test_evaluation_goes_from_long_to_short(durations: list[float]) -> None:
    order = [i for batch in alone(durations, 8, shuffle=False) for i in batch]
    assert [durations[i] for i in order] == sorted(durations, reverse=True)


def test_the_order_is_that_of_earlier_versions() -> None:  # else a run of theirs would resume in another one
    durations = [float(1 + 7 * i % 11) for i in range(60)]
    sampler = LengthBatchSampler(durations, 3, shuffle=True, seed=42)
    sampler.set_epoch(1)
    assert list(sampler)[:5] == [[31, 50, 39], [16, 38, 49], [5, 24, 35], [21, 54, 43], [26, 4, 15]]


@settings(max_examples=150, deadline=None)
@given(DURATIONS, st.floats(5, 200), st.booleans(), st.integers(0, 3))
def test_a_budget_is_never_exceeded_but_by_a_clip_alone(
    durations: list[float], budget: float, shuffle: bool, epoch: int
) -> None:
    batches = alone(durations, batch_seconds=budget, shuffle=shuffle).batches(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(durations)))
    assert all(len(b) == 1 or len(b) * max(durations[i] for i in b) <= budget for b in batches)


@settings(max_examples=200, deadline=None)
@given(DURATIONS, st.one_of(st.integers(1, 9), st.floats(5, 200)), st.integers(1, 7), st.integers(0, 3))
def test_processes_share_out_an_epoch(durations: list[float], limit: int | float, world_size: int, epoch: int) -> None:
    size = limit if isinstance(limit, int) else None
    budget = None if isinstance(limit, int) else limit

    def batches(rank: int, world_size: int) -> list[list[int]]:
        sampler = LengthBatchSampler(
            durations, size, batch_seconds=budget, shuffle=True, seed=3, rank=rank, world_size=world_size
        )
        assert sampler.batches(epoch) == sampler._plan(epoch)
        return sampler.batches(epoch)

    whole = len(batches(0, 1))
    if len(durations) < -(-whole // world_size) * world_size:  # a batch for every process at every step is impossible
        with pytest.raises(DataError, match=f"cannot be shared out to {world_size} processes"):
            batches(0, world_size)
        return
    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(durations)))
    assert all(batch for share in shares for batch in share)
    for batch in (b for share in shares for b in share):
        if budget is not None:
            assert len(batch) == 1 or len(batch) * max(durations[i] for i in batch) <= budget
        else:
            assert size is not None and len(batch) <= size


@given(DURATIONS, st.integers(1, 9), st.integers(1, 7))
def test_evaluation_deals_out_the_batches_of_one_process(durations: list[float], size: int, world_size: int) -> None:
    shares = [
        LengthBatchSampler(durations, size, shuffle=False, rank=rank, world_size=world_size).batches(0)
        for rank in range(world_size)
    ]
    dealt = [shares[at % world_size][at // world_size] for at in range(sum(map(len, shares)))]
    assert dealt == alone(durations, size, shuffle=False).batches(0)


def test_fewer_clips_than_processes_are_refused() -> None:
    with pytest.raises(DataError, match="2 clips in 1 batches cannot be shared out to 3 processes"):
        list(LengthBatchSampler([1.0, 2.0], 8, shuffle=True, rank=0, world_size=3))


def test_two_clips_a_batch_can_always_be_shared_out() -> None:
    for clips in range(5, 40):
        for world_size in range(1, 6):
            shares = [
                list(LengthBatchSampler([1.0] * clips, 2, shuffle=True, rank=rank, world_size=world_size))
                for rank in range(world_size)
            ]
            assert len({len(share) for share in shares}) == 1


def test_the_batches_of_a_step_are_of_similar_length(durations: list[float]) -> None:
    shares = [list(LengthBatchSampler(durations, 8, shuffle=True, seed=1, rank=r, world_size=4)) for r in range(4)]
    waits = []
    for step in zip(*shares, strict=True):
        longest = [max(durations[i] for i in batch) for batch in step]
        waits.append(max(longest) / min(longest))
    assert sum(waits) / len(waits) < 1.5
    assert (
        len({max(durations[i] for i in batch) > 8 for batch in shares[0][:10]}) == 2
    )  # short and long steps are mixed


def test_a_duration_that_is_not_above_zero_is_refused() -> None:
    for wrong in (float("nan"), 0.0, float("inf")):
        with pytest.raises(DataError, match="clip 1 has a duration of"):
            list(alone([1.0, wrong], 2, shuffle=True))


def test_a_size_and_a_budget_contradict() -> None:
    with pytest.raises(DataError, match="a size or a budget"):
        alone([1.0], 2, batch_seconds=10.0, shuffle=True)
    with pytest.raises(DataError, match="a size or a budget"):
        alone([1.0], shuffle=True)


def test_the_place_among_processes_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_shard() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(DataError, match="WORLD_SIZE None"):
        current_shard()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert current_shard() == Shard(2, 3)
    assert LengthBatchSampler([1.0, 2.0, 3.0], 1, shuffle=False).shard == Shard(2, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(DataError, match="rank 3 of 3"):
        current_shard()


def test_the_place_among_processes_comes_from_torch_where_it_is_initialised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert current_shard() == Shard(0, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert current_shard() == Shard(1, 2)


def test_a_batchs_generator_depends_on_seed_epoch_and_index_alone() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand(1, generator=batch_generator(*key)))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(s, e, i) for s in (0, 1) for e in (0, 1, 2) for i in range(20)}) == 120
