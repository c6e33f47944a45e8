"""Preparation and measurement of signals, against values that are known and against bundled speech."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import soxr
import torch
from scipy.stats import spearmanr

from src.data.audio import SAMPLE_RATE, DecodedAudio, Waveform, decode
from src.data.preprocessing import MAX_SNR_DB, AudioPreprocessor, ClipStats, PackedStats, measure_clip
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector
from src.utils.errors import AudioError
from tests.data.recordings import encoded


@pytest.fixture(scope="module")
def sample_speech(sample: list[Utterance]) -> list[Waveform]:
    """24 clips of many speakers, once Opus."""
    return [decode(utterance.audio).samples for utterance in sample[::20]]


def tone(amplitude: float, hz: float = 440.0) -> Waveform:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)


def measure(samples: Waveform) -> ClipStats:
    return measure_clip(DecodedAudio(samples, SAMPLE_RATE, 1))


def as_pcm(samples: Waveform) -> Waveform:
    return (np.clip(np.round(samples * 32768), -32768, 32767) / 32768).astype(np.float32)


def test_stereo_at_44_1_khz_becomes_mono_at_16_khz_and_nothing_asked_changes_nothing(jfk: Waveform) -> None:
    assert np.array_equal(AudioPreprocessor()(jfk, SAMPLE_RATE), jfk)
    stereo = np.repeat(soxr.resample(jfk, SAMPLE_RATE, 44_100)[:, None], 2, axis=1)
    prepared = AudioPreprocessor()(stereo, 44_100)
    assert prepared.shape == pytest.approx(jfk.shape, abs=2)
    shared = min(len(prepared), len(jfk))
    assert np.corrcoef(prepared[:shared], jfk[:shared])[0, 1] > 0.99


def test_silence_around_speech_is_cut_and_pauses_inside_stay(jfk: Waveform) -> None:
    silence, vad = np.zeros(3 * SAMPLE_RATE, dtype=np.float32), VoiceActivityDetector()
    trimmed = AudioPreprocessor(vad=vad)(np.concatenate([silence, jfk, silence]), SAMPLE_RATE)
    speech = vad.speech_segments(jfk)
    assert len(trimmed) / SAMPLE_RATE == pytest.approx(speech[-1].end_sec - speech[0].start_sec, abs=0.2)
    noise = 0.01 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    with pytest.raises(AudioError, match=r"hum\.wav"):
        AudioPreprocessor(vad=vad)(noise, SAMPLE_RATE, name="hum.wav")


def test_loudness_is_what_was_asked_and_never_clips(jfk: Waveform) -> None:
    for target_dbfs in (-30.0, -23.0):
        prepared = AudioPreprocessor(loudness_dbfs=target_dbfs)(0.1 * jfk, SAMPLE_RATE)
        assert measure(prepared).loudness_dbfs == pytest.approx(target_dbfs, abs=0.1)
    assert np.abs(AudioPreprocessor(loudness_dbfs=0.0)(jfk, SAMPLE_RATE)).max() == pytest.approx(1.0, abs=1e-5)


def test_a_sine_has_its_peak_and_power() -> None:
    stats = measure(tone(0.5))
    assert stats.duration_sec == 4.0
    assert stats.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert stats.loudness_dbfs == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.05)
    assert stats.silent_fraction == 0


def test_pauses_change_neither_loudness_nor_peak(jfk: Waveform) -> None:
    alone = measure(jfk)
    padded = measure(np.concatenate([np.zeros(10 * SAMPLE_RATE, np.float32), jfk]))
    assert padded.loudness_dbfs == pytest.approx(alone.loudness_dbfs, abs=1e-6)
    assert padded.peak_dbfs == alone.peak_dbfs
    expected = (10 + alone.silent_fraction * len(jfk) / SAMPLE_RATE) / (10 + len(jfk) / SAMPLE_RATE)
    assert padded.silent_fraction == pytest.approx(expected, abs=0.002)


def test_loudness_ranks_speech_as_bs1770_does(sample_speech: list[Waveform]) -> None:
    functional = pytest.importorskip("torchaudio.functional")
    ours = [measure(audio).loudness_dbfs for audio in sample_speech[:12]]
    theirs = [float(functional.loudness(torch.from_numpy(audio)[None], SAMPLE_RATE)) for audio in sample_speech[:12]]
    assert spearmanr(ours, theirs).statistic > 0.95


def test_the_snr_of_noisy_speech_is_about_what_it_was_mixed_at(jfk: Waveform) -> None:
    speech = np.concatenate([jfk, np.zeros(3 * SAMPLE_RATE, dtype=np.float32)])
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    clean = measure(speech)
    assert clean.snr_db == MAX_SNR_DB
    for wanted_db, low_by_db in ((10, 4), (20, 1), (30, 1)):
        gain = 10 ** ((clean.loudness_dbfs - wanted_db) / 20)
        assert wanted_db - low_by_db <= measure(speech + gain * noise).snr_db <= wanted_db + 1


def test_a_clipped_sine_has_the_share_that_geometry_says() -> None:
    gain = 2.0
    clipped = as_pcm(np.clip(tone(gain, 100.0), -1, 1))
    expected = 1 - 2 * math.asin(0.99 / gain) / math.pi  # the share of a period at or above 99% of the rail
    assert measure(clipped).clipped_fraction == pytest.approx(expected, abs=0.01)
    assert measure(as_pcm(0.3 * clipped)).clipped_fraction == pytest.approx(
        expected, abs=0.01
    )  # made quieter afterwards


def test_speech_that_was_too_loud_is_found_at_any_rate_and_clean_speech_is_not(sample_speech: list[Waveform]) -> None:
    assert max(measure(audio).clipped_fraction for audio in sample_speech) < 0.0003
    for audio in sample_speech[:8]:
        loud = 3 * audio / np.abs(audio).max()
        truth = float((np.abs(loud) >= 1).mean())
        assert 0.6 * truth < measure(as_pcm(np.clip(loud, -1, 1))).clipped_fraction < 1.05 * truth  # runs of 3 and more
        at_44k = as_pcm(np.clip(soxr.resample(loud, SAMPLE_RATE, 44_100), -1, 1))
        assert measure(decode(encoded(at_44k, 44_100, "WAV")).samples).clipped_fraction > 0.2 * truth


def test_bandwidth_tells_telephone_speech_in_a_file_of_any_rate(sample_speech: list[Waveform]) -> None:
    assert measure(tone(0.5, 3_000.0)).bandwidth_hz == pytest.approx(3_000, abs=4 * SAMPLE_RATE / 512)
    assert np.mean([measure(audio).bandwidth_hz > 4_100 for audio in sample_speech]) > 0.95
    for audio in sample_speech:
        telephone = soxr.resample(audio, SAMPLE_RATE, 8_000)
        for samples, rate in ((telephone, 8_000), (soxr.resample(telephone, 8_000, 48_000), 48_000)):
            assert measure_clip(decode(encoded(samples, rate, "WAV"))).bandwidth_hz < 4_000


def test_a_file_is_described_by_its_own_rate_and_its_samples(jfk: Waveform) -> None:
    stereo = np.stack([soxr.resample(jfk, SAMPLE_RATE, 44_100)] * 2, axis=1)
    stats = measure_clip(decode(encoded(stereo, 44_100, "WAV")))
    assert (stats.sample_rate, stats.channels) == (44_100, 2)
    assert stats.duration_sec == pytest.approx(len(jfk) / SAMPLE_RATE, abs=1e-3)
    pcm = np.round(jfk * 32_000).astype("<i2")
    hashes = {measure_clip(decode(encoded(pcm, SAMPLE_RATE, kind))).audio_sha256 for kind in ("WAV", "FLAC")}
    assert hashes == {hashlib.sha256(pcm.tobytes()).hexdigest()}


@pytest.mark.parametrize("samples", [np.zeros(1_600, np.float32), np.full(100, 1e-5, np.float32), tone(1.0)[:1_700]])
def test_silence_and_short_signals_have_finite_values(samples: Waveform) -> None:
    stats = measure(samples)
    numbers = {name: value for name, value in vars(stats).items() if isinstance(value, float)}
    not_looked_for = {"speech_fraction", "leading_silence_sec", "trailing_silence_sec"}
    assert {name for name, value in numbers.items() if not math.isfinite(value)} == not_looked_for
    assert 0 <= stats.silent_fraction <= 1
    assert stats.peak_dbfs >= -120


def test_packed_measures_are_exact() -> None:
    first, second = measure(tone(0.5)), replace(measure(tone(0.1)), speech_fraction=0.25, leading_silence_sec=1 / 3)
    packed, other = PackedStats(), PackedStats()
    packed["a"], other["b"] = first, second
    both = PackedStats(packed, other)
    assert list(both) == ["a", "b"]
    assert len(packed) == 1
    for key, stats in {"a": first, "b": second}.items():
        assert repr(both[key]) == repr(stats)  # nan equals nan
    assert "c" not in both
