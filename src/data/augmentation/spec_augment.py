"""SpecAugment: masks in time and frequency on log-mel features (Park et al. 2019), in one pass over a batch.

A mask is filled with the clip's own mean. A constant would not do: the features are a shifted logarithm, in which 0 is
a loud sound in a quiet clip, and the floor is a silence, which means something. The mean is the value that says least,
and it leaves the level of the clip where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.utils.config import AugmentationConfig, SpecAugmentConfig
from src.utils.errors import ConfigError, DataError

REFERENCE_MELS = 80  # the bins that max_frequency_mask_bins counts; 128 bins get masks of the same width in hertz


class SpecAugment:
    """Masks spectrograms.

    Args:
        config: number and size of masks; the defaults of `SpecAugmentConfig` if None.
        prob: share of clips that get masks.
    Raises: ConfigError: `prob` is not a probability.
    """

    def __init__(self, config: SpecAugmentConfig | None = None, prob: float = 1.0) -> None:
        if not 0 <= prob <= 1:
            raise ConfigError(f"SpecAugment(prob={prob}): a share from 0 to 1 is needed")
        self.config = config or SpecAugmentConfig()
        self.prob = prob

    @classmethod
    def from_config(cls, config: AugmentationConfig) -> SpecAugment:
        """Take masks and share from the augmentation section; none where it is not enabled."""
        return cls(config.spec_augment, prob=config.spec_augment_prob if config.enabled else 0.0)

    @torch.no_grad()
    def __call__(self, features: Tensor, frame_lengths: Tensor | None = None, *, generator: torch.Generator) -> Tensor:
        """Mask features.

        Args:
            features: (B, mels, F) or (mels, F) on any device; not changed.
            frame_lengths: (B,) int64 frames of each clip; masks stay within them. None means F.
            generator: on the CPU.
        Returns: the same shape and type; the input itself where nothing can be masked.
        Raises: DataError: features of another shape, or lengths that do not fit them.
        """
        if features.dim() == 2:
            return self(features[None], frame_lengths, generator=generator)[0]
        frames = _checked_lengths(features, frame_lengths)
        if not self.prob or not (self.config.time_masks or self.config.frequency_masks):
            return features
        mask = self._mask(frames, features.shape, generator, features.device)
        real = (torch.arange(features.shape[2], device=features.device) < frames.to(features.device)[:, None])[:, None]
        total = (features * real).sum(dim=(1, 2), dtype=torch.float32)
        mean = total / (frames.to(features.device) * features.shape[1])
        return torch.where(mask & real, mean.to(features.dtype)[:, None, None], features)

    def _mask(self, frames: Tensor, shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
        """Return (B, mels, F), true where something is covered."""
        batch, mels, width = shape
        chosen = torch.rand(batch, generator=generator) < self.prob
        longest = (frames * self.config.max_time_mask_fraction).floor()
        in_time = _spans(longest, frames, self.config.time_masks, width, generator, device)
        highest = min(self.config.max_frequency_mask_bins * mels // REFERENCE_MELS, mels)
        bins = torch.full((batch,), mels)
        in_frequency = _spans(
            torch.full((batch,), float(highest)), bins, self.config.frequency_masks, mels, generator, device
        )
        return (in_time[:, None] | in_frequency[:, :, None]) & chosen.to(device)[:, None, None]


def _spans(
    longest: Tensor, room: Tensor, count: int, width: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw spans for each clip, of 0..longest, anywhere in 0..room; return their union, (B, W)."""
    draws = torch.rand(2, len(room), count, generator=generator, dtype=torch.float64)
    length = (draws[0] * (longest[:, None] + 1)).floor()
    start = (draws[1] * (room[:, None] - length + 1)).floor()
    start, end = start.to(device, torch.long), (start + length).to(device, torch.long)
    position = torch.arange(width, device=device)[:, None, None]
    return ((position >= start) & (position < end)).any(dim=2).T  # (B, W)


def _checked_lengths(features: Tensor, frame_lengths: Tensor | None) -> Tensor:
    """Return (B,) int64 frames on the CPU."""
    if features.dim() != 3:
        raise DataError(f"features of shape {tuple(features.shape)}: (B, mels, frames) or (mels, frames) is needed")
    batch, _, width = features.shape
    if frame_lengths is None:
        return torch.full((batch,), width)
    frames = frame_lengths.reshape(-1).cpu().long()
    if len(frames) != batch or bool((frames < 1).any()) or bool((frames > width).any()):
        raise DataError(f"frame_lengths {frames.tolist()} do not fit features of {batch} clips and {width} frames")
    return frames
