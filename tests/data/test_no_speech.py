from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.signal import welch

from src.data.audio import load_audio
from src.data.dataset import NoSpeechAudio, WhisperDataset, make_no_speech
from src.data.labels import LabelEncoder
from src.data.utterance import EncodedAudio, Utterance
from src.utils.errors import DataError


def waves(count: int = 200, duration_sec: float = 2.0) -> list[np.ndarray]:
    return [NoSpeechAudio(7, f"no-speech-{i:04d}", duration_sec).waveform() for i in range(count)]


def slope(wave: np.ndarray) -> float:
    """Exponent with which the power falls from 100 Hz to 6 kHz."""
    hertz, power = welch(wave, 16_000, nperseg=2048)
    band = (hertz > 100) & (hertz < 6_000)
    return float(np.polyfit(np.log(hertz[band]), np.log(power[band]), 1)[0])


def test_the_same_seed_and_id_give_the_same_samples() -> None:
    first = [NoSpeechAudio(7, "a", 1.0).waveform() for _ in range(2)]
    assert np.array_equal(*first)
    others = [NoSpeechAudio(s, n, 1.0).waveform() for s, n in [(8, "a"), *((7, f"b{i}") for i in range(8))]]
    assert sum(np.array_equal(first[0], other) for other in others) <= 3  # two may both be digital silence


def test_kinds_levels_and_colours_are_those_promised() -> None:
    made = waves()
    assert all(wave.dtype == np.float32 and len(wave) == 32_000 and np.isfinite(wave).all() for wave in made)
    noises = [wave for wave in made if wave.any()]
    assert 0.15 < 1 - len(noises) / len(made) < 0.35
    levels = [20 * np.log10(np.sqrt(np.mean(wave.astype(float) ** 2))) for wave in noises]
    assert -70.01 < min(levels) < -60 and -40 < max(levels) < -29.99
    slopes = [slope(wave) for wave in noises]
    assert -2.2 < min(slopes) < -1.7 and -0.3 < max(slopes) < 0.2
    assert max(np.abs(wave).max() for wave in noises) < 1


@pytest.mark.parametrize("duration_sec", [0.1, 30.0])
def test_any_duration_is_finite(duration_sec: float) -> None:
    for wave in waves(20, duration_sec):
        assert len(wave) == round(duration_sec * 16_000)
        assert np.isfinite(wave).all()


def test_the_encoded_form_decodes_to_the_same() -> None:
    audio = next(a for i in range(9) if (a := NoSpeechAudio(7, f"x{i}", 1.0)).waveform().max() > 0.001)
    assert isinstance(audio, EncodedAudio)
    assert np.array_equal(load_audio(audio.read()), audio.waveform())


def test_their_number_is_a_share_of_the_clips_and_their_durations_are_those_of_clips() -> None:
    clips = [Utterance(f"u{i}", b"", "x", duration_sec=1.0 + i) for i in range(30)]
    made = make_no_speech(clips, fraction=0.2, seed=3)
    assert [u.id for u in made] == [f"no-speech-{n:04d}" for n in range(1, 7)]
    assert made == make_no_speech(clips, fraction=0.2, seed=3)
    assert {u.duration_sec for u in made} <= {u.duration_sec for u in clips}
    assert len({u.duration_sec for u in made}) > 2
    assert all(u.text == "" and u.speaker is None for u in made)
    assert make_no_speech(clips, fraction=0, seed=3) == []


def test_a_clip_that_was_not_checked_is_named() -> None:
    with pytest.raises(DataError, match="utterance u0: its duration is unknown"):
        make_no_speech([Utterance("u0", b"", "x")], fraction=1, seed=3)


@pytest.mark.slow
def test_the_label_is_the_prefix_and_the_end(_tiny_en: tuple[Any, Any]) -> None:
    made = make_no_speech([Utterance("u", b"", "x", duration_sec=1.5)], fraction=1, seed=3)
    item = WhisperDataset(made, LabelEncoder(_tiny_en[1].tokenizer))[0]
    assert item["label"].decoder_input_ids == (50257, 50362)
    assert item["label"].labels == (-100, 50256)
    assert len(item["audio"]) == 24_000
