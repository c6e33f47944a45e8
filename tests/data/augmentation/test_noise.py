"""Noise: its colour by Welch's method, its level by NumPy, its voices by their tones, its folder by its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile as sf
import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.noise import BABBLE_VOICES, EXPONENTS, NoisePool, babble, coloured_noise, mix_at_snr
from src.utils.errors import AudioError, DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_row_has_its_own_colour_and_all_the_same_power() -> None:
    noise = coloured_noise((3, 160_000), torch.tensor(list(EXPONENTS.values())), generator())
    torch.testing.assert_close(noise.square().mean(1), torch.ones(3))
    hertz, density = scipy.signal.welch(noise.double().numpy(), SAMPLE_RATE, nperseg=4_096)
    fit = (hertz > 50) & (hertz < 7_000)
    for row, exponent in zip(density, EXPONENTS.values(), strict=True):
        assert np.polyfit(np.log10(hertz[fit]), np.log10(row[fit]), 1)[0] == pytest.approx(-exponent, abs=0.1)


def test_silence_has_no_ratio() -> None:
    speech, silence, lengths = torch.ones(1, 9), torch.zeros(1, 9), torch.tensor([9])
    for wrong, pair in {"speech": (silence, speech), "noise": (speech, silence)}.items():
        with pytest.raises(AudioError, match=wrong):
            mix_at_snr(*pair, snr_db=10, lengths=lengths)


def voices(count: int) -> tuple[Tensor, Tensor]:
    """Clips of one tone each, of different lengths and levels; clip i sounds at 200 (i + 1) Hz."""
    lengths = torch.tensor([8_000 + 1_600 * row for row in range(count)])
    clips = torch.zeros(count, int(lengths.max()))
    for row, length in enumerate(lengths.tolist()):
        clips[row, :length] = 0.05 * (row + 1) * torch.sin(torch.arange(length) * 400 * torch.pi * (row + 1) / 16_000)
    return clips, lengths


def heard(noise: Tensor, count: int) -> set[int]:
    spectrum = np.abs(np.fft.rfft(noise.numpy() * np.hanning(len(noise))))
    level = [spectrum[round(200 * (row + 1) * len(noise) / 16_000)] for row in range(count)]
    return {row for row in range(count) if level[row] > 0.2 * max(level)}


def test_babble_has_four_equal_voices_and_never_its_own() -> None:
    clips, lengths = voices(8)
    mixed = babble(clips, lengths, torch.arange(8), lengths, 32_000, generator())
    chosen = [heard(row, 8) for row in mixed]
    assert all(len(voices) == BABBLE_VOICES and own not in voices for own, voices in enumerate(chosen))
    assert len(set(map(frozenset, chosen))) > 3
    assert mixed.square().mean(1).sqrt().numpy() == pytest.approx(BABBLE_VOICES**0.5, rel=0.1)


def test_babble_takes_as_many_others_as_there_are() -> None:
    clips, lengths = voices(3)
    assert heard(babble(clips, lengths, torch.tensor([0]), lengths[:1], 16_000, generator())[0], 3) == {1, 2}


def test_babble_reaches_short_clips_whose_neighbours_pause() -> None:
    clips, lengths = torch.zeros(2, 64_000), torch.tensor([1_600, 64_000])
    clips[0, :1_600] = 0.1
    clips[1, 50_000:50_100] = 0.1
    for seed in range(20):
        assert babble(clips, lengths, torch.tensor([0]), lengths[:1], 1_600, generator(seed)).any()


def ramp(samples: int, offset: float) -> np.ndarray:
    return (np.arange(samples) / 60_000 * 0.2 + offset).astype(np.float32)


def test_crops_come_from_the_recordings_and_loop(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    recordings = [ramp(20_000, 0.1), ramp(5_000, 0.6)]
    sf.write(tmp_path / "a.wav", recordings[0], SAMPLE_RATE, subtype="FLOAT")
    sf.write(tmp_path / "deeper" / "b.wav", recordings[1], SAMPLE_RATE, subtype="FLOAT")
    (tmp_path / "LICENSE").write_text("not audio")
    crops = NoisePool(tmp_path).crops(torch.full((40,), 12_000), 12_000, generator()).numpy()
    assert crops.shape == (40, 12_000)
    starts = {0: set(), 1: set()}
    for crop in crops:
        which = int(crop[0] > 0.5)
        start = int(np.abs(recordings[which] - crop[0]).argmin())
        expected = np.take(recordings[which], np.arange(start, start + 12_000), mode="wrap")
        np.testing.assert_array_equal(crop, expected)
        starts[which].add(start)
    assert min(map(len, starts.values())) > 5


def test_a_pause_of_the_recording_is_not_taken(tmp_path: Path) -> None:
    recording = np.zeros(160_000, dtype=np.float32)
    recording[100_000:100_400] = 0.2
    sf.write(tmp_path / "drip.wav", recording, SAMPLE_RATE)
    crops = NoisePool(tmp_path).crops(torch.full((30,), 1_600), 4_000, generator())
    assert bool(crops[:, :1_600].any(dim=1).all())


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match=str(folder)):
            NoisePool(folder)
    (tmp_path / "silent.wav").write_bytes(b"RIFF this is no sound")
    for _ in range(2):
        with pytest.raises(AudioError, match=r"silent\.wav"):
            NoisePool(tmp_path)
        sf.write(tmp_path / "silent.wav", np.zeros(1_600), SAMPLE_RATE)
