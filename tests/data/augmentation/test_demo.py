"""The examples for the notebook: what they are, how they are shown."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch

from src.data.augmentation.demo import Example, demonstrate, draw_examples, players
from src.data.features import LogMel
from src.utils.config import AugmentationConfig

ALL_ON = AugmentationConfig(room_prob=0.1, codec_prob=0.1)


@pytest.fixture(scope="module")
def examples(jfk: np.ndarray) -> list[Example]:
    return demonstrate(jfk[:48_000], ALL_ON, seed=5)


def test_each_effect_that_is_on_has_an_example_that_differs(jfk: np.ndarray, examples: list[Example]) -> None:
    names = [example.name for example in examples]
    kinds = ["original", "speed", "pitch", "room,", "noise", "gain", "telephone", "masks", "everything"]
    assert re.fullmatch(r"(white|pink|brown) noise, SNR \d+ dB", names[4])
    assert all(kind in name for kind, name in zip(kinds, names, strict=True))
    heard = [example.waveform for example in examples if example.audible]
    np.testing.assert_array_equal(heard[0], jfk[:48_000])
    assert len({waveform.tobytes() for waveform in heard}) == len(heard) == 8
    assert all(waveform.dtype == np.float32 and np.abs(waveform).max() <= 1 for waveform in heard)
    speed = float(names[1].removeprefix("speed x"))
    assert len(examples[1].waveform) == len(examples[-1].waveform) == round(48_000 / speed)


def test_masks_are_seen_and_not_heard(examples: list[Example]) -> None:
    (masked,) = (example for example in examples if not example.audible)
    assert masked.log_mel.shape == examples[0].log_mel.shape
    assert (masked.log_mel != examples[0].log_mel).any()
    everything = LogMel()(torch.from_numpy(examples[-1].waveform)[None])[0].numpy()
    assert (everything != examples[-1].log_mel).any()


def test_the_seed_decides_the_values(jfk: np.ndarray, examples: list[Example]) -> None:
    again, other = (demonstrate(jfk[:48_000], ALL_ON, seed=seed) for seed in (5, 6))
    np.testing.assert_array_equal(again[-1].waveform, examples[-1].waveform)
    assert [e.name for e in again] == [e.name for e in examples] != [e.name for e in other]


def test_what_is_off_is_left_out(jfk: np.ndarray) -> None:
    off = {"speed_factors": (1.0,), "pitch_prob": 0, "noise_prob": 0, "max_gain_db": 0, "spec_augment_prob": 0}
    for config, names in (
        (AugmentationConfig(**off, codec_prob=0.2), ["original", "telephone"]),
        (AugmentationConfig(**off), ["original"]),
        (AugmentationConfig(enabled=False), ["original"]),
    ):
        assert [example.name for example in demonstrate(jfk[:16_000], config, seed=0)] == names


def test_each_example_that_is_heard_has_a_player(examples: list[Example]) -> None:
    page, heard = players(examples).data, [example for example in examples if example.audible]
    assert page.count("<audio") == page.count("data:audio/wav") == len(heard)
    assert all(example.name in page for example in heard)


@pytest.mark.parametrize("count", [1, 9])
def test_the_figure_draws_each_example_on_one_scale(examples: list[Example], count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing and a layout that collapses
        figure = draw_examples(examples[:count])
        assert figure._repr_png_().startswith(b"\x89PNG")
    shown = [axes for axes in figure.axes if axes.collections]
    assert [axes.get_title(loc="left") for axes in shown] == [example.name for example in examples[:count]]
    assert len({axes.collections[0].get_clim() for axes in shown}) == len({axes.get_xlim() for axes in shown}) == 1
