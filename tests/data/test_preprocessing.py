from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import soxr

from src.data.audio import DecodedAudio
from src.data.preprocessing import AudioPreprocessor
from src.data.quality import measure_clip
from src.data.vad import VoiceActivityDetector
from src.utils.errors import AudioError


def test_nothing_asked_changes_nothing(jfk: Any) -> None:
    assert np.array_equal(AudioPreprocessor()(jfk, 16_000), jfk)


def test_stereo_at_44_1_khz_becomes_mono_at_16_khz(jfk: Any) -> None:
    stereo = np.repeat(soxr.resample(jfk, 16_000, 44_100)[:, None], 2, axis=1)
    prepared = AudioPreprocessor()(stereo, 44_100)
    assert prepared.shape == pytest.approx(jfk.shape, abs=2)
    assert np.corrcoef(prepared[: len(jfk) - 2], jfk[: len(prepared)][: len(jfk) - 2])[0, 1] > 0.99


def test_silence_around_speech_is_cut_and_pauses_inside_stay(jfk: Any) -> None:
    silence = np.zeros(3 * 16_000, dtype=np.float32)
    vad = VoiceActivityDetector()
    trimmed = AudioPreprocessor(vad=vad)(np.concatenate([silence, jfk, silence]), 16_000)
    speech = vad.speech_segments(jfk)
    assert len(trimmed) / 16_000 == pytest.approx(speech[-1].end_sec - speech[0].start_sec, abs=0.2)


@pytest.mark.parametrize("target_dbfs", [-30.0, -23.0])
def test_loudness_is_what_was_asked(jfk: Any, target_dbfs: float) -> None:
    prepared = AudioPreprocessor(loudness_dbfs=target_dbfs)(0.1 * jfk, 16_000)
    assert measure_clip(DecodedAudio(prepared, 16_000, 1)).loudness_dbfs == pytest.approx(target_dbfs, abs=0.1)


def test_loudness_never_clips(jfk: Any) -> None:
    prepared = AudioPreprocessor(loudness_dbfs=0.0)(jfk, 16_000)
    assert float(np.abs(prepared).max()) == pytest.approx(1.0, abs=1e-5)


def test_a_recording_without_speech_is_named() -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    with pytest.raises(AudioError, match=r"hum\.wav: no speech was found"):
        AudioPreprocessor(vad=VoiceActivityDetector())(noise, 16_000, name="hum.wav")
