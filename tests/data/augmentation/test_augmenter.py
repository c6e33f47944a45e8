"""Augmentation of batches: what is drawn, what it does, and what it must leave alone."""

from __future__ import annotations

import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
import scipy.stats
import soundfile as sf
import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE
from src.data.augmentation import effects as dsp
from src.data.augmentation.augmenter import AudioAugmenter, Effects
from src.data.augmentation.effects import RT60_SEC, Effect, Gain, Noise, Pitch, Room, Speed, Telephone, pitch_ratios
from src.evaluation.text import normalize_plain
from src.inference.decoding import decode
from src.inference.options import DecodingOptions
from src.utils.config import AugmentationConfig
from src.utils.errors import AudioError, ConfigError, DataError, DeviceError

OFF: dict[str, Any] = {
    "speed_factors": (1.0,), "pitch_prob": 0.0, "noise_prob": 0.0, "max_gain_db": 0.0, "room_prob": 0.0,
    "codec_prob": 0.0,
}  # fmt: skip
ONE_EFFECT: dict[str, dict[str, Any]] = {
    "speed": {"speed_factors": (0.9, 1.1)},
    "pitch": {"pitch_prob": 1.0},
    "noise": {"noise_prob": 1.0},
    "gain": {"max_gain_db": 6.0},
    "room": {"room_prob": 1.0},
    "codec": {"codec_prob": 1.0},
}
EVERYTHING: dict[str, Any] = {key: value for effect in ONE_EFFECT.values() for key, value in effect.items()}


def only(**changes: Any) -> AugmentationConfig:
    return AugmentationConfig(**{**OFF, **changes})


def pick(effects: Effects, kind: type[Effect]) -> Any:
    """The effect of a kind, None where the clip has none."""
    return next((effect for effect in effects if isinstance(effect, kind)), None)


def every(drawn: tuple[Effects, ...], kind: type[Effect]) -> list[Any]:
    return [effect for effects in drawn if (effect := pick(effects, kind)) is not None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def batch(jfk: np.ndarray) -> tuple[Tensor, Tensor]:
    """Four clips of speech, 0.1 to 3 s, at levels between which nothing clips."""
    lengths = torch.tensor([48_000, 1_600, 33_333, 20_000])
    audio = torch.zeros(4, 48_000)
    for row, length in enumerate(lengths.tolist()):
        audio[row, :length] = 0.3 * torch.from_numpy(jfk[row * 16_000 + 8_000 :][:length])
    return audio, lengths


@pytest.mark.parametrize("config", [only(), AugmentationConfig(enabled=False)], ids=["nothing on", "not enabled"])
def test_nothing_switched_on_is_the_identity(batch: tuple[Tensor, Tensor], config: AugmentationConfig) -> None:
    audio, lengths = batch
    result = AudioAugmenter(config)(audio * 5, lengths, generator=generator())  # over range: that is not ours to change
    assert torch.equal(result.audio, audio * 5)
    assert torch.equal(result.lengths, lengths)
    assert result.applied == ((),) * 4


def test_clips_for_which_nothing_was_drawn_and_the_input_keep_every_bit(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch
    kept = audio.clone(), lengths.clone()
    effects = [(Speed(0.9),), (), (Pitch(Fraction(12, 11)),), (Gain(3.0), Telephone())]
    changed = AudioAugmenter().apply(audio, lengths, effects, seed=0).audio
    assert torch.equal(changed[1, :48_000], audio[1])
    assert not changed[1, 48_000:].any()
    AudioAugmenter(only(**EVERYTHING))(audio, lengths, generator=generator())
    assert torch.equal(audio, kept[0]) and torch.equal(lengths, kept[1])


def test_the_seed_alone_decides_everything(batch: tuple[Tensor, Tensor]) -> None:
    augmenter = AudioAugmenter(only(**EVERYTHING))
    first, other = (augmenter(*batch, generator=generator(seed)) for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # does not reach the audio
        again = augmenter(*batch, generator=generator(1))
    assert torch.equal(first.audio, again.audio) and first.applied == again.applied
    assert first.applied != other.applied and not torch.equal(first.audio[:, :9_000], other.audio[:, :9_000])


def draw_many(config: AugmentationConfig, clips: int = 4_000) -> tuple[Effects, ...]:
    audio = torch.full((clips, 1_600), 0.1)
    return AudioAugmenter(config).draw(audio, torch.full((clips,), 1_600), generator(7))


def test_speeds_and_pitches_are_drawn_evenly() -> None:
    drawn = draw_many(only(speed_factors=(0.9, 1.0, 1.1), pitch_prob=1.0))
    speeds = Counter(effect.factor for effect in every(drawn, Speed))
    speeds[1.0] = len(drawn) - sum(speeds.values())
    pitches = Counter(effect.ratio for effect in every(drawn, Pitch))
    assert set(pitches) == set(pitch_ratios(2.0))
    for counts in (speeds, pitches):
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def test_effects_come_at_their_rates() -> None:
    drawn = draw_many(only(pitch_prob=0.2, noise_prob=0.3, room_prob=0.4, codec_prob=0.5))
    for kind, prob in ((Pitch, 0.2), (Noise, 0.3), (Room, 0.4), (Telephone, 0.5)):
        assert scipy.stats.binomtest(len(every(drawn, kind)), len(drawn), prob).pvalue > 0.01
    both = sum(pick(effects, Telephone) is not None and pick(effects, Noise) is not None for effects in drawn)
    assert scipy.stats.binomtest(both, len(drawn), 0.15).pvalue > 0.01  # drawn independently


def test_ratios_gains_and_rooms_are_uniform_in_their_ranges() -> None:
    drawn = draw_many(only(noise_prob=1.0, min_snr_db=3.0, max_snr_db=21.0, max_gain_db=4.0, room_prob=1.0))
    for low, high, values in (
        (3.0, 21.0, [effect.snr_db for effect in every(drawn, Noise)]),
        (-4.0, 4.0, [effect.gain_db for effect in every(drawn, Gain)]),
        (*RT60_SEC, [effect.rt60_sec for effect in every(drawn, Room)]),
    ):
        assert len(values) == len(drawn) and low <= min(values) and max(values) <= high
        assert scipy.stats.kstest(values, scipy.stats.uniform(low, high - low).cdf).pvalue > 0.01
    kinds = Counter(effect.kind for effect in every(drawn, Noise))
    assert set(kinds) == {"white", "pink", "brown", "babble"}
    assert scipy.stats.chisquare(list(kinds.values())).pvalue > 0.01


@pytest.mark.parametrize("off", [{"noise_prob": 0.0}, {"pitch_prob": 0.0}, {"speed_factors": (1.0,)}], ids=str)
def test_switching_an_effect_off_leaves_the_draws_of_the_others(off: dict[str, Any]) -> None:
    drawn, fewer = draw_many(only(**EVERYTHING), 50), draw_many(only(**{**EVERYTHING, **off}), 50)
    for kind in dsp.CHAIN:
        assert every(fewer, kind) in ([], every(drawn, kind))
    assert fewer != drawn


def test_lengths_follow_the_speed_and_only_the_speed(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch
    result = AudioAugmenter(only(**EVERYTHING))(audio, lengths, generator=generator(3))
    speeds = [pick(effects, Speed).factor for effects in result.applied]
    expected = [round(n / speed) for n, speed in zip(lengths.tolist(), speeds, strict=True)]
    assert result.lengths.tolist() == expected
    assert result.audio.shape[1] == max(expected)


def test_clips_with_times_and_clips_that_would_outgrow_30_s_keep_their_speed() -> None:
    augmenter = AudioAugmenter(only(speed_factors=(0.9,)))
    lengths = torch.tensor([29 * SAMPLE_RATE, 26 * SAMPLE_RATE, 16_000])
    audio = torch.full((3, 29 * SAMPLE_RATE), 0.1)
    drawn = augmenter.draw(audio, lengths, generator(), keep_speed=torch.tensor([False, False, True]))
    assert drawn == ((), (Speed(0.9),), ())


@pytest.mark.parametrize("name", [*ONE_EFFECT, "everything"])
def test_padding_and_silence_stay_zero_and_everything_finite(batch: tuple[Tensor, Tensor], name: str) -> None:
    augmenter = AudioAugmenter(only(**ONE_EFFECT.get(name, EVERYTHING)))
    for clips in (1, 4):
        audio, lengths = batch[0][-clips:], batch[1][-clips:]
        for seed in range(3):
            result = augmenter(audio, lengths, generator=generator(seed))
            assert bool(result.audio.isfinite().all()) and float(result.audio.abs().max()) <= 1.0
            for row, length in enumerate(result.lengths.tolist()):
                assert result.audio[row, :length].any()
                assert not result.audio[row, length:].any()
    silent = augmenter(torch.zeros(2, 1_600), generator=generator())
    assert not silent.audio.any()  # nan would be true
    assert not every(silent.applied, Noise)


def test_a_silent_clip_between_others_gets_no_noise(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch[0].clone(), batch[1]
    audio[2] = 0
    result = AudioAugmenter(only(noise_prob=1.0))(audio, lengths, generator=generator())
    assert [pick(effects, Noise) is None for effects in result.applied] == [False, False, True, False]
    assert not result.audio[2].any()


@pytest.mark.parametrize("kind", ["white", "pink", "brown", "babble"])
def test_snr_measured_equals_snr_asked(batch: tuple[Tensor, Tensor], kind: Any) -> None:
    audio, lengths = batch
    ratios_db = [5.0, 12.0, 18.5, 25.0]
    effects = [(Noise(kind, snr_db),) for snr_db in ratios_db]
    trailing = torch.tensor([0, 4_000, 8_000, 100])
    mixed = AudioAugmenter().apply(audio, lengths, effects, seed=1, trailing_samples=trailing).audio
    for row, length in enumerate(lengths.tolist()):
        speech = audio[row, :length].double().numpy()
        noise = mixed[row, :length].double().numpy() - speech
        measured = 10 * np.log10(np.sum(speech**2) / np.sum(noise**2))
        assert measured == pytest.approx(ratios_db[row], abs=0.1)


def test_noise_goes_on_through_the_pause_and_ends_there(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch
    trailing = torch.tensor([8_000, 8_000, 0, 16_000])
    effects = [(Noise("white", 10.0),), (Telephone(),), (), (Noise("pink", 5.0),)]
    result = AudioAugmenter().apply(audio, lengths, effects, seed=1, trailing_samples=trailing)
    assert torch.equal(result.lengths, lengths)
    assert result.audio.shape[1] == 56_000
    in_clip = (result.audio[0, :48_000] - audio[0]).square().mean()
    assert float(result.audio[0, 48_000:].square().mean()) == pytest.approx(float(in_clip), rel=0.1)
    assert not result.audio[1, 1_600:].any() and not result.audio[2, 33_333:].any()
    assert result.audio[3, 35_900:36_000].any() and not result.audio[3, 36_000:].any()
    result = AudioAugmenter(only())(audio, lengths, generator=generator(), trailing_samples=trailing)
    assert result.audio.shape[1] == 56_000  # room for the pause although nothing is drawn
    assert torch.equal(result.audio[:, :48_000], audio) and not result.audio[:, 48_000:].any()


def test_gains_are_as_drawn_and_never_clip(jfk: np.ndarray) -> None:
    clip = torch.from_numpy(jfk[:48_000])
    audio = torch.stack([0.1 * clip / clip.abs().max(), 0.9 * clip / clip.abs().max(), 1.5 * clip / clip.abs().max()])
    effects = [(Gain(6.0),)] * 3
    changed = AudioAugmenter().apply(audio, torch.full((3,), 48_000), effects, seed=0).audio
    torch.testing.assert_close(changed[0], audio[0] * 10 ** (6 / 20))
    assert changed.abs().amax(dim=1).tolist() == pytest.approx([0.1 * 10 ** (6 / 20), 1.0, 1.0])
    assert float(changed.max()) <= 1.0


def test_a_batch_gives_each_clip_what_it_gets_alone(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch
    effects = [
        (Speed(0.9), Pitch(Fraction(12, 11)), Gain(-3.0)),
        (Speed(0.9), Gain(2.0)),
        (Pitch(Fraction(12, 11)), Telephone()),
        (Speed(1.1), Pitch(Fraction(11, 12))),
    ]
    augmenter = AudioAugmenter()
    together = augmenter.apply(audio, lengths, effects, seed=0)
    for row, length in enumerate(lengths.tolist()):
        alone = augmenter.apply(audio[row : row + 1, :length], lengths[row : row + 1], effects[row : row + 1], seed=0)
        assert alone.lengths[0] == together.lengths[row]
        error = together.audio[row, : alone.audio.shape[1]] - alone.audio[0]
        assert float(error.abs().max()) < 1e-3


def test_one_waveform_gives_one_back(jfk: np.ndarray) -> None:
    audio = torch.from_numpy(jfk)
    augmenter = AudioAugmenter(only(**EVERYTHING))
    alone, batch_of_one = (augmenter(a, generator=generator(4)) for a in (audio, audio[None]))
    assert alone.audio.shape == (int(alone.lengths[0]),)
    assert torch.equal(alone.audio, batch_of_one.audio[0]) and alone.applied == batch_of_one.applied
    assert pick(alone.applied[0], Noise).kind in {"white", "pink", "brown"}  # no other clip to babble


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_means_the_same_on_a_gpu(batch: tuple[Tensor, Tensor]) -> None:
    augmenter = AudioAugmenter(only(**{**EVERYTHING, "codec_prob": 0.0}))  # a quantiser may step at another digit
    here = augmenter(*batch, generator=generator())
    there = augmenter(batch[0].cuda(), batch[1].cuda(), generator=generator())
    assert here.applied == there.applied
    torch.testing.assert_close(there.audio.cpu(), here.audio, atol=1e-3, rtol=0)


def test_recordings_of_noise_come_from_the_folder(batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    config = only(noise_prob=1.0, noise_dir=tmp_path, min_snr_db=10.0, max_snr_db=10.0)
    with pytest.raises(DataError, match=str(tmp_path)):
        AudioAugmenter(config)
    AudioAugmenter(only(noise_dir=tmp_path))  # not used, so not checked
    AudioAugmenter(AugmentationConfig(enabled=False, noise_dir=tmp_path))
    hum = 0.2 * np.sin(2 * np.pi * 5_000 * np.arange(8_000) / SAMPLE_RATE)
    sf.write(tmp_path / "hum.wav", hum, SAMPLE_RATE)
    audio, lengths = batch
    result = AudioAugmenter(config)(audio, lengths, generator=generator())
    assert {effect.kind for effect in every(result.applied, Noise)} == {"recording"}
    noise = (result.audio[0] - audio[0]).numpy()
    assert np.abs(np.fft.rfft(noise)).argmax() * SAMPLE_RATE / 48_000 == pytest.approx(5_000, abs=2)


def test_what_does_not_fit_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    audio, lengths = batch
    augmenter = AudioAugmenter()
    with pytest.raises(AudioError, match="float32"):
        augmenter(audio.double(), lengths, generator=generator())
    for wrong in (lengths + 1, lengths[:3]):
        with pytest.raises(AudioError, match="4 clips"):
            augmenter(audio, wrong, generator=generator())
    with pytest.raises(ConfigError, match=r"max_pitch_semitones.*0\.1"):
        AudioAugmenter(only(pitch_prob=0.5, max_pitch_semitones=0.1))
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(DeviceError, match="cuda:0"):
        augmenter(audio, lengths, generator=elsewhere)


@pytest.mark.slow
def test_changed_speech_stays_intelligible(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    effects = [
        *map(Pitch, pitch_ratios(2.0)[::7]), Speed(0.9), Speed(1.1), Room(0.6, 0.0), Telephone(), Noise("pink", 15.0),
    ]  # fmt: skip
    audio = torch.from_numpy(jfk)[None].expand(len(effects), -1)
    lengths = torch.full((len(effects),), len(jfk))
    result = AudioAugmenter().apply(audio, lengths, [(effect,) for effect in effects], seed=0)
    clips = [jfk] + [row[:n].numpy() for row, n in zip(result.audio, result.lengths.tolist(), strict=True)]
    texts = [normalize_plain(decoded.text) for decoded in decode(*tiny_en, clips, DecodingOptions())]
    errors = {str(effect): jiwer.wer(texts[0], text) for effect, text in zip(effects, texts[1:], strict=True)}
    assert max(errors.values()) < 0.06, errors  # one of 22 words


@pytest.mark.parametrize(("clips", "babbles"), [(2, False), (3, False), (4, True)])
def test_babble_needs_three_other_voices(jfk: np.ndarray, clips: int, babbles: bool) -> None:
    """Fewer can be followed, and a clip without speech, whose label is empty, may be the one next to them."""
    audio = torch.from_numpy(jfk[: 16_000 * clips]).reshape(clips, 16_000)
    augmenter = AudioAugmenter(AugmentationConfig(noise_prob=1.0))
    lengths, seeded = torch.full((clips,), 16_000), generator()
    kinds = {noise.kind for _ in range(50) for noise in every(augmenter.draw(audio, lengths, seeded), Noise)}
    assert ("babble" in kinds) == babbles


def test_without_torchaudio_only_the_effects_that_need_it_are_off(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_it = AudioAugmenter(only(**EVERYTHING)).draw(*batch, generator())
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    dsp.torchaudio_functional.cache_clear()
    augmenter = AudioAugmenter(only(**EVERYTHING))
    assert "speed_factors, augmentation.pitch_prob" in caplog.text and "torchaudio==" in caplog.text
    result = augmenter(*batch, generator=generator())
    assert result.applied == tuple((pick(effects, Noise), pick(effects, Gain)) for effects in with_it)
    caplog.clear()
    AudioAugmenter(only(noise_prob=1.0))
    assert not caplog.text
    monkeypatch.undo()
    dsp.torchaudio_functional.cache_clear()
