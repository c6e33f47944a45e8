"""What benchmarks/gpu.py computes around its measurements."""

from __future__ import annotations

import re
import time
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.gpu import (
    GPUS,
    REST_MINUTES,
    SIDES,
    SIZES,
    profile_minutes,
    speedups,
    tflop_per_update,
    training_row,
    waits_for_data,
)

MEASURED = {"updates": 100, "update_sec": 0.25, "mfu": 0.31, "wait_share": 0.02, "peak_mb": 1234.0}


class Slow(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.01)
        return torch.zeros(1)


def test_speedups_are_ratios_to_the_recipe_of_the_same_size() -> None:
    rows = [
        {"size": "small", "side": "ours, batches of 32 clips", "clips_per_sec": 400.0},
        {"size": "small", "side": SIDES["hf"], "clips_per_sec": 100.0},
        {"size": "medium", "side": "ours, batches of 32 clips", "clips_per_sec": 90.0},
        {"size": "medium", "side": SIDES["hf"], "reason": "left out: 3 s were left"},
    ]
    assert speedups(rows) == {"speedup small, batches of 32 clips": 4.0}
    assert "left out" in training_row(rows[-1])["side"]
    assert training_row(rows[-1])["clips/s"] == "-"
    shown = training_row({**rows[0], **MEASURED})
    assert (shown["update"], shown["MFU"], shown["memory"]) == ("250 ms", "31 %", "1,234 MB")


def test_what_a_loader_keeps_its_user_waiting_is_counted() -> None:
    with waits_for_data() as waited:
        list(DataLoader(Slow(), batch_size=2))
    list(DataLoader(Slow(), batch_size=2))
    assert len(waited) == 3  # the last one finds the end
    assert sum(waited) > 0.03


def test_padding_to_30_seconds_multiplies_the_work_of_a_short_clip() -> None:
    for shape in SIZES.values():
        own, padded = (tflop_per_update(shape, 32, padded=padded) for padded in (False, True))
        assert padded / own == pytest.approx(7.3, abs=0.5)


def test_the_notebook_says_before_it_starts_how_long_a_profile_trains() -> None:
    notebook = Path(__file__).resolve().parents[2] / "whisper_asr_colab.ipynb"
    first, *_ = nbformat.read(notebook, as_version=4).cells
    assert re.findall(r"^\| profile .*$", first.source, re.M) == [f"| profile | model | {' | '.join(GPUS)} |"]
    rows = profile_minutes()
    for row in rows:
        (shown,) = re.findall(rf"^\| {row['profile']} \| {row['model']} \|(.*)\|$", first.source, re.M)
        minutes = [float(cell) for cell in shown.split("|")]
        assert minutes == pytest.approx([float(row[gpu]) for gpu in GPUS], rel=0.25, abs=0.11), row
    assert "on a T4 that takes about six minutes, five of them for" in first.source
    by_default = float(next(row["T4"] for row in rows if row["profile"] == "balanced"))
    assert REST_MINUTES + by_default == pytest.approx(6.0, abs=1.0)
