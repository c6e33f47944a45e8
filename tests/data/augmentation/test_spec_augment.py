"""SpecAugment: where its masks lie, how wide they are, what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from src.data.augmentation.augmenter import SpecAugment
from src.data.features import LogMel
from src.utils.config import AugmentationConfig, SpecAugmentConfig
from src.utils.errors import ConfigError, DataError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(batch: int = 64, mels: int = 80, frames: int = 200) -> Tensor:
    return torch.randn(batch, mels, frames, generator=generator(9))


TIME_ONLY = SpecAugmentConfig(time_masks=1, max_time_mask_fraction=0.2, frequency_masks=0)
FREQUENCY_ONLY = SpecAugmentConfig(time_masks=0, frequency_masks=1, max_frequency_mask_bins=10)


def test_masks_stay_inside_real_frames() -> None:
    before, lengths = features(), torch.randint(10, 201, (64,), generator=generator(1))
    config = SpecAugmentConfig(time_masks=4, max_time_mask_fraction=0.5, frequency_masks=4, max_frequency_mask_bins=40)
    changed = SpecAugment(config)(before, lengths, generator=generator()) != before
    for row, length in enumerate(lengths.tolist()):
        assert changed[row, :, :length].any()
        assert not changed[row, :, length:].any()


@pytest.mark.parametrize("mels", [80, 128])
def test_frequency_masks_have_every_width_up_to_the_limit(mels: int) -> None:
    before = features(2_000, mels, 12)
    changed = SpecAugment(FREQUENCY_ONLY)(before, generator=generator()) != before
    assert bool((changed.all(dim=2) == changed.any(dim=2)).all())  # whole rows
    widths = changed.all(dim=2).sum(dim=1)
    assert set(widths.tolist()) == set(range(10 * mels // 80 + 1))
    covered = changed.all(dim=2).float().mean(dim=0)
    assert covered[0] > 0 and covered[-1] > 0  # the edges too
    for row in changed.all(dim=2)[widths > 0]:
        assert int(row.nonzero()[-1] - row.nonzero()[0]) + 1 == int(row.sum())  # in one piece


def test_time_masks_are_a_share_of_the_clips_own_frames() -> None:
    before, lengths = features(2_000, 4, 200), torch.tensor([50, 200] * 1_000)
    changed = SpecAugment(TIME_ONLY)(before, lengths, generator=generator()) != before
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


def test_prob_is_the_share_of_clips() -> None:
    before = features(4_000, 8, 20)
    config = SpecAugmentConfig(time_masks=1, max_time_mask_fraction=0.5, frequency_masks=8, max_frequency_mask_bins=40)
    changed = (SpecAugment(config, prob=0.3)(before, generator=generator()) != before).flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert not SpecAugment(config, prob=0.0)(before, generator=generator()).ne(before).any()


def test_the_input_is_not_changed_and_the_seed_decides() -> None:
    before = features()
    kept, masks = before.clone(), SpecAugment()
    results = [masks(before, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(before, kept)
    assert torch.equal(results[0], results[1])
    assert torch.equal(masks(before[0], generator=generator()), masks(before[:1], generator=generator())[0])
    assert not torch.equal(results[0], results[2])


def test_no_masks_are_the_identity() -> None:
    before = features(2)
    off = AugmentationConfig(enabled=False, spec_augment_prob=0.25)
    assert torch.equal(SpecAugment.from_config(off)(before, generator=generator()), before)
    on = SpecAugment.from_config(off.model_copy(update={"enabled": True, "spec_augment": TIME_ONLY}))
    assert (on.prob, on.config) == (0.25, TIME_ONLY)
    config = SpecAugmentConfig(time_masks=0, frequency_masks=0)
    assert torch.equal(SpecAugment(config)(before, generator=generator()), before)
    none_wide = SpecAugmentConfig(max_time_mask_fraction=0.0, max_frequency_mask_bins=0)
    assert torch.equal(SpecAugment(none_wide)(before, generator=generator()), before)


def test_short_clips_and_wide_masks_stay_finite() -> None:
    config = SpecAugmentConfig(max_time_mask_fraction=0.5, max_frequency_mask_bins=500)
    after = SpecAugment(config)(features(16, 80, 10), torch.tensor([1, 10] * 8), generator=generator())
    assert bool(after.isfinite().all())


def test_the_type_is_kept() -> None:
    half = features(2).bfloat16()
    assert SpecAugment()(half, generator=generator()).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prob=1\.5"):
        SpecAugment(prob=1.5)
    with pytest.raises(DataError, match=r"\(4,\)"):
        SpecAugment()(torch.zeros(4), generator=generator())
    with pytest.raises(DataError, match="do not fit"):
        SpecAugment()(features(2), torch.tensor([200, 201]), generator=generator())
