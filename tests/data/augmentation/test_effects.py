"""Speed, pitch, rooms and telephones: against tones, SciPy, soxr, torchaudio and libsndfile."""

from __future__ import annotations

import io
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile as sf
import soxr
import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE
from src.data.augmentation import effects as dsp
from src.data.augmentation.augmenter import AudioAugmenter
from src.utils.errors import MissingDependencyError

TONE_HZ = 440.0


def tone(hertz: float = TONE_HZ, seconds: float = 2.0) -> Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)[None]


def loudest_hz(audio: Tensor) -> float:
    samples = audio[0].numpy()
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), n=2**19))
    return float(spectrum.argmax()) * SAMPLE_RATE / 2**19


def whole(audio: Tensor) -> Tensor:
    return torch.full((len(audio),), audio.shape[1])


def ragged(jfk: np.ndarray) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([30_000, 1_600, 17_123])
    batch = torch.zeros(3, 30_000)
    for row, length in enumerate(lengths.tolist()):
        batch[row, :length] = torch.from_numpy(jfk[20_000 : 20_000 + length])
    return batch, lengths


def played(audio: Tensor, factor: float) -> Tensor:
    return AudioAugmenter().apply(audio, whole(audio), [(dsp.Speed(factor),)], seed=0).audio


@pytest.mark.parametrize("factor", [0.5, 0.97, 1.1, 2.0])
def test_speed_moves_a_tone_by_its_factor(factor: float) -> None:
    assert loudest_hz(played(tone(), factor)) == pytest.approx(TONE_HZ * factor, rel=1e-3)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_equals_soxr(jfk: np.ndarray, factor: float) -> None:
    ours = played(0.5 * torch.from_numpy(jfk)[None], factor)[0].numpy()
    theirs = 0.5 * soxr.resample(jfk, round(10 * factor), 10, quality="HQ")
    common = min(len(ours), len(theirs))
    error = np.square(ours[:common] - theirs[:common]).sum() / np.square(theirs).sum()
    assert 10 * np.log10(error) < -40


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0, 4.0])
def test_pitch_steps_fill_the_limit_and_stay_within(limit: float) -> None:
    steps = [12 * math.log2(ratio) for ratio in dsp.pitch_ratios(limit)]
    assert max(map(abs, steps)) <= limit
    assert dsp.pitch_ratios(0.0) == dsp.pitch_ratios(0.1) == ()
    assert max(steps) == pytest.approx(-min(steps)) and max(steps) >= 0.95 * limit
    assert len(steps) == 8 or limit < 2
    assert all(max(ratio.numerator, ratio.denominator) <= 80 for ratio in dsp.pitch_ratios(limit))


@pytest.mark.parametrize("ratio", [*dsp.pitch_ratios(2.0)[::3], *dsp.pitch_ratios(4.0)[::7]], ids=str)
def test_pitch_moves_a_tone_and_keeps_the_length(ratio: Fraction) -> None:
    for hertz in (110.0, 2_000.0):
        changed = dsp.shift_pitch(tone(hertz), whole(tone()), ratio=ratio)
        assert changed.shape == tone().shape
        assert loudest_hz(changed) == pytest.approx(hertz * float(ratio), rel=2e-3)


def test_pitch_stays_exact_over_30_s() -> None:
    long = tone(3_000.0, seconds=30.0)
    changed = dsp.shift_pitch(long, whole(long), ratio=Fraction(12, 11))
    assert loudest_hz(changed[:, -4 * SAMPLE_RATE :]) == pytest.approx(3_000 * 12 / 11, rel=1e-3)


@pytest.mark.parametrize("ratio", [Fraction(49, 55), Fraction(55, 49)], ids=str)
def test_pitch_keeps_words_in_place_and_energy(jfk: np.ndarray, ratio: Fraction) -> None:
    audio = torch.from_numpy(jfk)[None]
    changed = dsp.shift_pitch(audio, whole(audio), ratio=ratio)
    assert float(changed.square().sum()) == pytest.approx(float(audio.square().sum()), rel=1e-4)
    loudness = [
        a[0, : len(jfk) // 800 * 800].reshape(-1, 800).square().mean(1).sqrt().numpy() for a in (audio, changed)
    ]
    correlation = np.correlate(loudness[0] - loudness[0].mean(), loudness[1] - loudness[1].mean(), "full")
    assert correlation.argmax() == len(loudness[0]) - 1  # in frames of 50 ms
    assert np.corrcoef(loudness)[0, 1] > 0.9


@pytest.mark.parametrize("rate", [Fraction(4, 5), Fraction(7, 6)], ids=str)
def test_vocoder_equals_that_of_torchaudio(jfk: np.ndarray, rate: Fraction) -> None:
    from torchaudio.functional import phase_vocoder

    spectrum = torch.stft(
        torch.from_numpy(jfk[:48_000])[None].double(), 512, 128, window=torch.hann_window(512).double(),
        return_complex=True,
    )  # fmt: skip
    spectrum = spectrum[..., :360]
    theirs = phase_vocoder(spectrum, float(rate), torch.linspace(0, torch.pi * 128, 257).double()[:, None])
    ours = dsp.stretch_spectrum(spectrum, rate)
    assert ours.shape == theirs.shape
    # where the new frame is an old one, theirs may read the turn of the frame before it, by rounding
    assert float((ours.abs() - theirs.abs()).abs().max()) < 1e-4 * float(theirs.abs().max())
    assert float((ours - theirs).abs().mean()) < 1e-3 * float(theirs.abs().mean())


def test_rooms_have_the_direct_sound_first_at_its_ratio_and_decay_by_60_db_in_their_time() -> None:
    wanted, direct_db = torch.tensor([0.15, 0.3, 0.6]), torch.tensor([0.0, 6.0, 12.0])
    impulses = dsp.room_impulses(wanted, direct_db, torch.Generator().manual_seed(1)).double()
    assert impulses[:, 0].tolist() == [1.0, 1.0, 1.0]
    measured = -10 * impulses[:, 1:].square().sum(1).log10()
    torch.testing.assert_close(measured, direct_db.double(), atol=1e-3, rtol=0)
    for rt60_sec, impulse in zip(wanted.tolist(), impulses.numpy(), strict=True):
        tail = impulse[64:]
        decay_db = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1] / np.sum(tail**2))  # Schroeder 1965
        fit = (decay_db < -5) & (decay_db > -25)
        slope = np.polyfit(np.flatnonzero(fit) / SAMPLE_RATE, decay_db[fit], 1)[0]
        assert -60 / slope == pytest.approx(rt60_sec, rel=0.15)


def test_reverberation_is_convolution_with_length_and_energy_kept(jfk: np.ndarray) -> None:
    audio, lengths = ragged(jfk)
    impulses = dsp.room_impulses(torch.tensor([0.2, 0.4, 0.6]), torch.zeros(3), torch.Generator().manual_seed(3))
    wet = dsp.reverberate(audio, lengths, impulses=impulses)
    for row, length in enumerate(lengths.tolist()):
        expected = scipy.signal.fftconvolve(audio[row, :length].double(), impulses[row].double())[:length]
        expected *= np.sqrt(np.square(audio[row].double().numpy()).sum() / np.square(expected).sum())
        np.testing.assert_allclose(wet[row, :length], expected, atol=1e-5)
        assert not wet[row, length:].any()


def test_telephone_leaves_nothing_above_4_khz_and_words_in_place(jfk: np.ndarray) -> None:
    speech = dsp.telephone(torch.from_numpy(jfk[:48_000])[None])[0].numpy()
    assert np.correlate(speech, jfk[:48_000], "full").argmax() == 48_000 - 1
    audio = 0.1 * torch.randn(1, 64_000, generator=torch.Generator().manual_seed(0))
    changed = dsp.telephone(audio)
    assert changed.shape == audio.shape
    hertz, density = scipy.signal.welch(changed[0], SAMPLE_RATE, nperseg=2_048)
    before = scipy.signal.welch(audio[0], SAMPLE_RATE, nperseg=2_048)[1]
    assert 10 * np.log10(density[hertz >= 4_000].max() / density[hertz < 3_000].mean()) < -50
    assert 10 * np.log10(density[hertz < 3_200] / before[hertz < 3_200]).mean() == pytest.approx(0, abs=0.2)


def test_mu_law_equals_libsndfile() -> None:
    levels = torch.arange(-8_191, 8_192) / 8_192  # all that 14 bits can say
    buffer = io.BytesIO()
    sf.write(buffer, levels.numpy(), 8_000, format="WAV", subtype="ULAW")
    buffer.seek(0)
    theirs, _ = sf.read(buffer, dtype="float32")
    np.testing.assert_array_equal(dsp.g711_mu_law(levels).numpy(), theirs)


@pytest.mark.parametrize("broken", [False, True])
def test_an_absent_or_broken_torchaudio_is_named_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    if broken:  # as one of another torch is
        (tmp_path / "torchaudio").mkdir()
        (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')")
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "torchaudio", None)
    dsp.torchaudio_functional.cache_clear()
    fix = r"libcudart.*torch==.* torchaudio==" if broken else r"torchaudio==\d+\.\d+\.\d+$"
    with pytest.raises(MissingDependencyError, match=fix):
        dsp.telephone(tone())


def test_only_one_module_imports_torchaudio() -> None:
    source = Path(__file__).parents[3] / "src"
    importing = re.compile(r"^\s*(from|import) torchaudio", re.M)
    assert sorted(path.name for path in source.rglob("*.py") if importing.search(path.read_text())) == [
        "effects.py", "validation.py",  # the doctor's runs in a process of its own
    ]  # fmt: skip
