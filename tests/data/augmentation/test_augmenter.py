"""Augmentation of batches: what is drawn, what it does, and what it must leave alone."""

from __future__ import annotations

import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
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
from src.data.augmentation.augmenter import AudioAugmenter, Effects, SpecAugment
from src.data.augmentation.effects import RT60_SEC, Effect, Gain, Noise, Pitch, Room, Speed, Telephone, pitch_ratios
from src.data.features import LogMel
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode
from src.utils.config import AugmentationConfig, SpecAugmentConfig
from src.utils.errors import AudioError, ConfigError, DataError
from src.utils.languages import normalize_plain

OFF = {"speed_factors": (1.0,), "pitch_prob": 0, "noise_prob": 0, "max_gain_db": 0, "room_prob": 0, "codec_prob": 0}
EVERYTHING = {
    "speed_factors": (0.9, 1.1), "pitch_prob": 1, "noise_prob": 1, "max_gain_db": 6, "room_prob": 1, "codec_prob": 1,
}  # fmt: skip


def only(**changes: Any) -> AugmentationConfig:
    return AugmentationConfig(**{**OFF, **changes})


def pick(effects: Effects, kind: type[Effect]) -> Any:
    """The effect of a kind, None where the clip has none."""
    return next((effect for effect in effects if isinstance(effect, kind)), None)


def every(drawn: list[Effects] | tuple[Effects, ...], kind: type[Effect]) -> list[Any]:
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
def test_nothing_switched_on_is_the_identity_with_room_for_the_pause(
    batch: tuple[Tensor, Tensor], config: AugmentationConfig
) -> None:
    audio, lengths = batch[0] * 5, batch[1]  # over range: that is not ours to change
    trailing = torch.tensor([8_000, 8_000, 0, 16_000])
    result = AudioAugmenter(config)(audio, lengths, generator=generator(), trailing_samples=trailing)
    assert torch.equal(result.audio[:, :48_000], audio) and not result.audio[:, 48_000:].any()
    assert result.audio.shape[1] == 56_000
    assert torch.equal(result.lengths, lengths) and result.applied == ((),) * 4


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


def draw_many(config: AugmentationConfig, clips: int = 4_000) -> list[Effects]:
    audio = torch.full((clips, 1_600), 0.1)
    return AudioAugmenter(config).draw(audio, torch.full((clips,), 1_600), generator(7))


def test_effects_come_at_their_rates_and_their_values_evenly() -> None:
    drawn = draw_many(
        only(speed_factors=(0.9, 1.0, 1.1), pitch_prob=0.2, noise_prob=0.3, room_prob=0.4, codec_prob=0.5)
    )
    for kind, prob in ((Speed, 2 / 3), (Pitch, 0.2), (Noise, 0.3), (Room, 0.4), (Telephone, 0.5)):
        assert scipy.stats.binomtest(len(every(drawn, kind)), len(drawn), prob).pvalue > 0.01
    both = sum(pick(effects, Telephone) is not None and pick(effects, Noise) is not None for effects in drawn)
    assert scipy.stats.binomtest(both, len(drawn), 0.15).pvalue > 0.01  # drawn independently
    drawn = draw_many(only(pitch_prob=1, noise_prob=1, min_snr_db=3.0, max_snr_db=21.0, max_gain_db=4.0, room_prob=1))
    for low, high, values in (
        (3.0, 21.0, [effect.snr_db for effect in every(drawn, Noise)]),
        (-4.0, 4.0, [effect.gain_db for effect in every(drawn, Gain)]),
        (*RT60_SEC, [effect.rt60_sec for effect in every(drawn, Room)]),
    ):
        assert len(values) == len(drawn) and low <= min(values) and max(values) <= high
        assert scipy.stats.kstest(values, scipy.stats.uniform(low, high - low).cdf).pvalue > 0.01
    kinds = Counter(effect.kind for effect in every(drawn, Noise))
    pitches = Counter(effect.ratio for effect in every(drawn, Pitch))
    assert set(kinds) == {"white", "pink", "brown", "babble"} and set(pitches) == set(pitch_ratios(2.0))
    for counts in (kinds, pitches):
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


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
    assert drawn == [(), (Speed(0.9),), ()]


@pytest.mark.parametrize("name", [*EVERYTHING, "everything"])
def test_padding_and_silence_stay_zero_and_everything_finite(batch: tuple[Tensor, Tensor], name: str) -> None:
    augmenter = AudioAugmenter(only(**{key: value for key, value in EVERYTHING.items() if name in (key, "everything")}))
    for clips, seed in ((1, 0), (4, 0), (4, 1)):
        result = augmenter(batch[0][-clips:], batch[1][-clips:], generator=generator(seed))
        assert bool(result.audio.isfinite().all()) and float(result.audio.abs().max()) <= 1.0
        for row, length in enumerate(result.lengths.tolist()):
            assert result.audio[row, :length].any()
            assert not result.audio[row, length:].any()
    audio = batch[0].clone()
    audio[2] = 0
    result = augmenter(audio, batch[1], generator=generator())
    assert not result.audio[2].any() and pick(result.applied[2], Noise) is None  # nan would be true
    assert name not in ("noise_prob", "everything") or len(every(result.applied, Noise)) == 3


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


def test_gains_are_as_drawn_and_never_clip(jfk: np.ndarray) -> None:
    clip = torch.from_numpy(jfk[:48_000])
    audio = torch.stack([peak * clip / clip.abs().max() for peak in (0.1, 0.9, 1.5)])
    changed = AudioAugmenter().apply(audio, torch.full((3,), 48_000), [(Gain(6.0),)] * 3, seed=0).audio
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
    for wrong in (batch[0].double(), batch[0][0]):
        with pytest.raises(AudioError, match="float32"):
            AudioAugmenter()(wrong, batch[1], generator=generator())
    with pytest.raises(ConfigError, match=r"max_pitch_semitones.*0\.1"):
        AudioAugmenter(only(pitch_prob=0.5, max_pitch_semitones=0.1))


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


@pytest.mark.parametrize(("clips", "babbles"), [(3, False), (4, True)])
def test_babble_needs_three_other_voices(jfk: np.ndarray, clips: int, babbles: bool) -> None:
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


def features(batch: int = 64, mels: int = 80, frames: int = 200) -> Tensor:
    return torch.randn(batch, mels, frames, generator=generator(9))


def mask(before: Tensor, lengths: Tensor | None = None, seed: int = 0, **settings: Any) -> Tensor:
    """Which values masks of these settings change."""
    return SpecAugment(SpecAugmentConfig(**settings))(before, lengths, generator=generator(seed)) != before


def test_masks_stay_inside_real_frames() -> None:
    lengths = torch.randint(10, 201, (64,), generator=generator(1))
    settings = {"time_masks": 4, "max_time_mask_fraction": 0.5, "frequency_masks": 4, "max_frequency_mask_bins": 40}
    changed = mask(features(), lengths, **settings)
    for row, length in enumerate(lengths.tolist()):
        assert changed[row, :, :length].any()
        assert not changed[row, :, length:].any()


@pytest.mark.parametrize("mels", [80, 128])
def test_frequency_masks_have_every_width_up_to_the_limit(mels: int) -> None:
    changed = mask(features(2_000, mels, 12), time_masks=0, frequency_masks=1, max_frequency_mask_bins=10)
    assert bool((changed.all(dim=2) == changed.any(dim=2)).all())  # whole rows
    widths = changed.all(dim=2).sum(dim=1)
    assert set(widths.tolist()) == set(range(10 * mels // 80 + 1))
    covered = changed.all(dim=2).float().mean(dim=0)
    assert covered[0] > 0 and covered[-1] > 0  # the edges too
    for row in changed.all(dim=2)[widths > 0]:
        assert int(row.nonzero()[-1] - row.nonzero()[0]) + 1 == int(row.sum())  # in one piece


def test_time_masks_are_a_share_of_the_clips_own_frames() -> None:
    lengths = torch.tensor([50, 200] * 1_000)
    changed = mask(features(2_000, 4, 200), lengths, time_masks=1, max_time_mask_fraction=0.2, frequency_masks=0)
    widths = changed.all(dim=1).sum(dim=1)
    assert set(widths[::2].tolist()) == set(range(11))
    assert set(widths[1::2].tolist()) == set(range(41))
    assert float(widths[1::2].float().mean()) == pytest.approx(20, abs=1.5)  # uniform: half of the limit


def test_masked_values_are_the_clips_mean_over_real_frames(jfk: np.ndarray) -> None:
    audio = torch.zeros(2, 48_000)
    audio[0] = torch.from_numpy(jfk[:48_000])
    audio[1, :16_000] = 0.1 * torch.from_numpy(jfk[30_000:46_000])
    before, lengths = LogMel()(audio), torch.tensor([300, 100])
    after = SpecAugment(SpecAugmentConfig(max_time_mask_fraction=0.3))(before, lengths, generator=generator(3))
    for row, length in enumerate(lengths.tolist()):
        masked = after[row][after[row] != before[row]]
        assert len(masked) > 0
        torch.testing.assert_close(masked, before[row, :, :length].mean().expand_as(masked))


def test_prob_is_the_share_of_clips_and_the_seed_decides() -> None:
    before = features(4_000, 8, 20)
    kept = before.clone()
    config = SpecAugmentConfig(time_masks=1, max_time_mask_fraction=0.5, frequency_masks=8, max_frequency_mask_bins=40)
    first, again, other = (SpecAugment(config, prob=0.3)(before, generator=generator(seed)) for seed in (1, 1, 2))
    assert float((first != before).flatten(1).any(dim=1).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, kept)


def test_no_masks_are_the_identity() -> None:
    before = features(2)
    for masks in (
        SpecAugment.from_config(AugmentationConfig(enabled=False)),
        SpecAugment.from_config(AugmentationConfig(spec_augment_prob=0)),
        SpecAugment(SpecAugmentConfig(time_masks=0, frequency_masks=0)),
    ):
        assert masks(before, generator=generator()) is before


def test_masks_of_short_clips_and_wide_ones_stay_finite_and_of_their_type() -> None:
    config = SpecAugmentConfig(max_time_mask_fraction=0.5, max_frequency_mask_bins=500)
    lengths = torch.tensor([1, 10] * 8)
    after = SpecAugment(config)(features(16, 80, 10).bfloat16(), lengths, generator=generator())
    assert bool(after.isfinite().all()) and after.dtype == torch.bfloat16
