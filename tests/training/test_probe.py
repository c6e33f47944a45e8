from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.training import probe
from src.training.probe import largest_that_fits, propose_batch_seconds
from src.utils.config import Config
from src.utils.errors import DeviceError


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


def test_out_of_memory_ends_the_search(small: tuple[Any, Any], config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(self: Any, clips: int, clip_sec: float) -> None:
        if clips > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(probe._Trial, "_update", update)
    proposal = propose_batch_seconds(small[0], config, clip_sec=10.0)
    assert (proposal.fits_sec, proposal.limit) == (50.0, "memory")


def test_batches_padded_to_30_s_are_tried_in_the_pieces_that_training_cuts_them_into(
    small: tuple[Any, Any], configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, float]] = []
    monkeypatch.setattr(probe._Trial, "_update", lambda self, clips, clip_sec: tried.append((clips, clip_sec)))
    for share, expected in ((0.0, {10.0}), (0.1, {10.0, 30.0})):
        tried.clear()
        propose_batch_seconds(small[0], configure(training__full_context_prob=share), clip_sec=10.0, max_seconds=80.0)
        assert {clip_sec for _, clip_sec in tried} == expected
        assert tried[-1] == ((3, 30.0) if share else (8, 10.0))  # 80 s, and a fifth more


def test_nothing_that_fits_is_an_error_and_other_errors_pass(
    small: tuple[Any, Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Any, clips: int, clip_sec: float) -> None:
        raise MemoryError

    def broken(self: Any, clips: int, clip_sec: float) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(probe._Trial, "_update", never)
    with pytest.raises(DeviceError, match="gradient_checkpointing"):
        propose_batch_seconds(small[0], config)
    monkeypatch.setattr(probe._Trial, "_update", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        propose_batch_seconds(small[0], config)
