"""The benchmark's own arithmetic: speed of updates, FLOPs, the peak of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from benchmarks.training_measures import FlopCounter, forward_flops, measure_speed, peak_tflops, update_rows

TINY = WhisperConfig(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, max_source_positions=50,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip


def test_speed_is_clips_over_seconds_without_the_first_two_updates() -> None:
    rows = [{"sec": 100.0}, {"sec": 100.0}, {"sec": 1.0}, {"sec": 3.0}]
    speed = measure_speed(rows, clips=30, batch_size=8)
    assert speed.samples_per_sec == 14 / 4
    assert speed.median_samples_per_sec == pytest.approx((8 + 8 / 3) / 2)
    assert speed.train_sec == 204
    assert speed.cpu_sec_per_clip is None


def step(time: float, number: int, speed: float = 8.0) -> dict[str, Any]:
    return {"event": "train_step", "time": time, "step": number, "samples_per_sec": speed}


def test_an_update_after_an_evaluation_counts_without_it_and_one_done_again_once() -> None:
    begin, epoch = {"event": "begin", "time": 10.0}, {"event": "epoch", "time": 50.0}
    events = [begin, step(12.0, 1), epoch, step(52.0, 2), step(55.0, 3, 2.5)]
    assert [row["sec"] for row in update_rows(events, batch_size=8)] == [2.0, 1.0, 3.0]
    stopped = [begin, step(12.0, 1), {"event": "begin", "time": 900.0}, step(901.0, 1)]
    assert update_rows(stopped, batch_size=8) == [{"step": 1, "sec": 1.0}]


def test_updates_whose_values_were_read_together_share_their_time() -> None:
    events = [{"event": "begin", "time": 10.0}, step(15.9, 1), step(16.0, 2), step(17.0, 3, 9.0)]
    assert [row["sec"] for row in update_rows(events, batch_size=8)] == [3.0, 3.0, 1.0]


def test_flops_agree_with_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = WhisperForConditionalGeneration._from_config(TINY, attn_implementation="eager")
    features, tokens = torch.zeros(3, 80, 100), torch.zeros(3, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_features=features, decoder_input_ids=tokens)
    ours = forward_flops(TINY, clips=3, positions=50, tokens=7, scored=21)
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_counter_counts_training_alone_three_times_the_forward_pass() -> None:
    model = WhisperForConditionalGeneration(TINY)
    counter = FlopCounter(model)
    inputs = {"input_features": torch.zeros(2, 80, 100), "decoder_input_ids": torch.zeros(2, 5, dtype=torch.long)}
    model.eval()(**inputs)
    assert counter.total == 0
    model.train()(**inputs)
    assert counter.total == 3 * forward_flops(TINY, clips=2, positions=50, tokens=5, scored=10)
    assert counter.padded == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert counter.padded == [True]


def test_peak_goes_by_the_name_of_the_device() -> None:
    peaks = {"Tesla T4": 65.0, "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA L4": 121.0, "Radeon": None}
    assert {name: peak_tflops(name) for name in peaks} == peaks
