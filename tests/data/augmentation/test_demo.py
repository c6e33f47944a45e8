"""The examples for the notebook: what they are, how they are shown."""

from __future__ import annotations

import base64
import io
import re
import warnings

import numpy as np
import pytest
import soundfile as sf
import torch

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.demo import Example, demonstrate, draw_examples, players
from src.data.features import LogMel
from src.utils.config import AugmentationConfig
from src.utils.errors import DataError

ALL_ON = AugmentationConfig(room_prob=0.1, codec_prob=0.1)


@pytest.fixture(scope="module")
def examples(jfk: np.ndarray) -> list[Example]:
    return demonstrate(jfk[:48_000], ALL_ON, seed=5)


def test_each_effect_that_is_on_has_an_example(jfk: np.ndarray, examples: list[Example]) -> None:
    names = [example.name for example in examples]
    assert [name.split()[0] for name in (*names[:4], *names[5:])] == [
        "original", "speed", "pitch", "room,", "gain", "telephone", "masks", "everything",
    ]  # fmt: skip
    assert re.fullmatch(r"(white|pink|brown) noise, SNR \d+ dB", names[4])
    np.testing.assert_array_equal(examples[0].waveform, jfk[:48_000])


def test_examples_differ_and_can_be_played(examples: list[Example]) -> None:
    heard = [example.waveform for example in examples if example.audible]
    assert len({waveform.tobytes() for waveform in heard}) == len(heard) == 8
    assert all(waveform.dtype == np.float32 and np.abs(waveform).max() <= 1 for waveform in heard)
    speed = float(examples[1].name.removeprefix("speed x"))
    assert len(examples[1].waveform) == len(examples[-1].waveform) == round(48_000 / speed)


def test_masks_are_seen_and_not_heard(examples: list[Example]) -> None:
    masked = next(example for example in examples if not example.audible)
    assert masked.log_mel.shape == examples[0].log_mel.shape
    assert (masked.log_mel != examples[0].log_mel).any()
    everything = LogMel()(torch.from_numpy(examples[-1].waveform)[None])[0].numpy()
    assert (everything != examples[-1].log_mel).any()


def test_the_seed_decides_the_values(jfk: np.ndarray, examples: list[Example]) -> None:
    again, other = (demonstrate(jfk[:48_000], ALL_ON, seed=seed) for seed in (5, 6))
    assert [example.name for example in again] == [example.name for example in examples]
    np.testing.assert_array_equal(again[-1].waveform, examples[-1].waveform)
    assert [example.name for example in other] != [example.name for example in examples]


def test_what_is_off_is_left_out(jfk: np.ndarray) -> None:
    off = {"speed_factors": (1.0,), "pitch_prob": 0, "noise_prob": 0, "max_gain_db": 0, "spec_augment_prob": 0}
    only_telephone = demonstrate(jfk[:16_000], AugmentationConfig(**off, codec_prob=0.2), seed=0)
    assert [example.name for example in only_telephone] == ["original", "telephone"]
    for config in (AugmentationConfig(**off), AugmentationConfig(enabled=False)):
        assert [example.name for example in demonstrate(jfk[:16_000], config, seed=0)] == ["original"]


def test_players_hold_the_sound_of_each_example(examples: list[Example]) -> None:
    page = players(examples).data
    heard = [example for example in examples if example.audible]
    assert page.count("<audio") == len(heard)
    assert all(example.name in page for example in heard)
    sounds = re.findall(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)", page)
    for sound, example in zip(sounds, heard, strict=True):
        samples, rate = sf.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
        assert rate == SAMPLE_RATE
        np.testing.assert_allclose(samples, example.waveform, atol=1e-4)  # 16 bits, not normalised


@pytest.mark.parametrize("count", [1, 9])
def test_the_figure_fits_a_notebook_and_lacks_no_glyph(examples: list[Example], count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing and a layout that collapses
        figure = draw_examples(examples[:count])
        png = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    width, height = figure.get_size_inches()
    assert width <= 10 and height <= 4
    shown = [axes for axes in figure.axes if axes.collections]
    assert [axes.get_title(loc="left") for axes in shown] == [example.name for example in examples[:count]]
    assert len({axes.collections[0].get_clim() for axes in shown}) == len({axes.get_xlim() for axes in shown}) == 1


def test_no_examples_are_an_error() -> None:
    with pytest.raises(DataError, match="no examples"):
        draw_examples([])
