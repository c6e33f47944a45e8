"""Augmentation of training batches on the device where the model is: effects on audio, masks on its spectrogram.

What happens to a clip is drawn first, as a tuple of effects; then each kind of effect is applied once,
to the clips that have it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SILENCE_PEAK
from src.data.augmentation.effects import (
    CHAIN,
    Batch,
    Clip,
    Effect,
    Speed,
    limit_peak,
    pitch_ratios,
    torchaudio_functional,
)
from src.data.augmentation.noise import NoisePool
from src.utils.config import AugmentationConfig, SpecAugmentConfig
from src.utils.errors import AudioError, ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

MIN_BABBLE_VOICES = 3  # fewer can be followed, and an empty label may stand next to them
REFERENCE_MELS = 80  # the bins that max_frequency_mask_bins counts; 128 bins get masks of the same width in hertz

Effects = tuple[Effect, ...]  # of one clip, in the order of `CHAIN`; empty where it stays as it is


class AugmentedBatch(NamedTuple):
    """Changed audio (B, T') float32, where T' holds the longest clip with its pause, and (B,) int64 lengths without."""

    audio: Tensor
    lengths: Tensor
    applied: tuple[Effects, ...]


class AudioAugmenter:
    """Draws and applies effects.

    All random numbers come from a generator on the CPU, noise and rooms included, so that a seed means the same effects
    and the same noise on every device. Where torchaudio cannot be imported, the effects that need it are off, and a
    warning names them.

    Args:
        config: shares and ranges; the defaults of `AugmentationConfig` if None.

    Raises:
        DataError: noise_dir cannot be used.
        AudioError: a recording in noise_dir cannot be used.
        ConfigError: a pitch limit below the smallest step.
    """

    def __init__(self, config: AugmentationConfig | None = None) -> None:
        self.config = config = config or AugmentationConfig()
        self._pool = NoisePool(config.noise_dir) if config.enabled and config.noise_prob and config.noise_dir else None
        if config.pitch_prob and config.max_pitch_semitones and not pitch_ratios(config.max_pitch_semitones):
            raise ConfigError(
                f"augmentation.max_pitch_semitones is {config.max_pitch_semitones}, below the smallest step of 0.29; "
                "raise it, or set pitch_prob: 0"
            )
        needing = [kind for kind in CHAIN if kind.needs_torchaudio and getattr(config, kind.setting) not in (0, (1.0,))]
        self._off: Sequence[type[Effect]] = ()
        try:
            if needing and config.enabled:
                torchaudio_functional()
        except MissingDependencyError as err:
            names = ", ".join(f"augmentation.{kind.setting}" for kind in needing)
            logger.warning("%s: off, the other effects work: %s", names, err)
            self._off = needing

    @property
    def speeds(self) -> tuple[float, ...]:
        """The factors that clips are played at, ascending."""
        off = not self.config.enabled or Speed in self._off
        return (1.0,) if off else tuple(sorted(self.config.speed_factors))

    def __call__(
        self,
        audio: Tensor,
        lengths: Tensor,
        *,
        generator: torch.Generator,
        trailing_samples: Tensor | None = None,
        keep_speed: Tensor | None = None,
        speeds: Sequence[float] | None = None,
    ) -> AugmentedBatch:
        """Draw effects for each clip and apply them.

        Args:
            audio: (B, T) float32, 16 kHz, on any device, zeros after each clip. Not changed.
            lengths: (B,) int64 samples.
            generator: on the CPU.
            trailing_samples: (B,) int64 samples of pause after each clip, through which its noise goes on.
            keep_speed: (B,) bool, clips whose labels hold times.
            speeds: factor of each clip; drawn by default.

        Returns:
            The batch, zeros after each clip and its noise. A clip that would grow past 30 s keeps its speed; a silent
            clip has no ratio and gets no noise.

        Raises:
            AudioError: audio of another shape or type.
        """
        if audio.dim() != 2 or audio.dtype != torch.float32:
            raise AudioError(f"audio is {audio.dtype} of shape {tuple(audio.shape)}: (B, T) float32 is needed")
        effects: Sequence[Effects] = [()] * len(audio)
        seed = 0
        if self.config.enabled:
            effects = self.draw(audio, lengths, generator, keep_speed=keep_speed, speeds=speeds)
            (seed,) = torch.randint(2**62, (1,), generator=generator).tolist()
        return self.apply(audio, lengths, effects, seed=seed, trailing_samples=trailing_samples)

    def draw(
        self,
        audio: Tensor,
        lengths: Tensor,
        generator: torch.Generator,
        *,
        keep_speed: Tensor | None = None,
        speeds: Sequence[float] | None = None,
    ) -> list[Effects]:
        """Draw the effects of each clip of (B, T) audio."""
        count = len(audio)
        uniform = torch.rand(count, sum(kind.numbers for kind in CHAIN), generator=generator, dtype=torch.float64)
        columns = [part.tolist() for part in uniform.split([kind.numbers for kind in CHAIN], dim=1)]
        kept = [False] * count if keep_speed is None else keep_speed.tolist()
        audible = [False] * count
        if self.config.noise_prob:
            audible = (audio.abs().amax(dim=1) >= SILENCE_PEAK).tolist()
        drawn: list[Effects] = []
        for samples, keep, loud, *numbers in zip(lengths.tolist(), kept, audible, *columns, strict=True):
            clip = Clip(samples, keep, loud, has_voices=sum(audible) > MIN_BABBLE_VOICES)
            effects = [kind.draw(self.config, clip, *own) for kind, own in zip(CHAIN, numbers, strict=True)]
            if speeds is not None:
                effects[0] = Speed.of(clip, speeds[len(drawn)])
            drawn.append(tuple(effect for effect in effects if effect and type(effect) not in self._off))
        return drawn

    @torch.no_grad()
    def apply(
        self,
        audio: Tensor,
        lengths: Tensor,
        effects: Sequence[Effects],
        *,
        seed: int,
        trailing_samples: Tensor | None = None,
    ) -> AugmentedBatch:
        """Apply the given effects of each clip, as `__call__` does; the seed is that of noise and rooms."""
        device, applied = lengths.device, tuple(effects)
        lengths = lengths.cpu()
        trailing = torch.zeros_like(lengths) if trailing_samples is None else trailing_samples.cpu()
        missing = max((lengths + trailing).tolist()) - audio.shape[1]
        changed = [row for row, own in enumerate(applied) if own]
        if not changed:
            return AugmentedBatch(functional.pad(audio, (0, max(missing, 0))), lengths.to(device), applied)
        batch = Batch(
            functional.pad(audio, (0, missing)), lengths.clone(), trailing, lengths.clone(), (audio, lengths),
            self._pool, torch.Generator().manual_seed(seed),
        )  # fmt: skip
        with torch.autocast(device_type=audio.device.type, enabled=False):  # half precision is noise of its own
            for kind in CHAIN:
                kind.apply(batch, {row: e for row in changed for e in applied[row] if isinstance(e, kind)})
            # nothing that was changed in any way leaves with a peak above 1.0
            batch.audio[changed] = limit_peak(batch.audio[changed])
        width = max((batch.lengths + trailing).tolist())  # less where all are faster
        return AugmentedBatch(batch.audio[:, :width], batch.lengths.to(device), applied)


class SpecAugment:
    """Masks in time and frequency on log-mel features (Park et al. 2019), in one pass over a batch.

    A mask is filled with the clip's own mean. A constant would not do: the features are a shifted logarithm, in which 0
    is a loud sound in a quiet clip, and the floor is a silence, which means something. The mean is the value that says
    least, and it leaves the level of the clip where it was.

    Args:
        config: number and size of masks; the defaults of `SpecAugmentConfig` if None.
        prob: share of clips that get masks.
    """

    def __init__(self, config: SpecAugmentConfig | None = None, prob: float = 1.0) -> None:
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
            features: (B, mels, F) on any device; not changed.
            frame_lengths: (B,) int64 frames of each clip; masks stay within them. None means F.
            generator: on the CPU.

        Returns:
            The same shape and type; the input itself where nothing can be masked.
        """
        batch, mels, width = features.shape
        frames = torch.full((batch,), width) if frame_lengths is None else frame_lengths.cpu()
        masks = self.draw(frames, mels, generator)
        if masks is None:
            return features
        return self.apply(features, frames.to(features.device), masks.to(features.device))

    def draw(self, frames: Tensor, mels: int, generator: torch.Generator) -> Tensor | None:
        """Draw masks for clips of (B,) frames, all on the CPU.

        Returns:
            (B, time masks + frequency masks, 2) int64: first frame or mel bin of each, and the one after its last;
            empty masks for clips that get none, and None where no clip can have one.
        """
        config, count = self.config, len(frames)
        if not self.prob or not (config.time_masks or config.frequency_masks):
            return None
        chosen = torch.rand(count, generator=generator) < self.prob
        in_time = _spans((frames * config.max_time_mask_fraction).floor(), frames, config.time_masks, generator)
        highest = torch.full((count,), float(min(config.max_frequency_mask_bins * mels // REFERENCE_MELS, mels)))
        in_frequency = _spans(highest, torch.full((count,), mels), config.frequency_masks, generator)
        return torch.cat([in_time, in_frequency], dim=1) * chosen[:, None, None]

    @torch.no_grad()
    def apply(self, features: Tensor, frames: Tensor, masks: Tensor) -> Tensor:
        """Mask (B, mels, F) features of clips of (B,) frames with what `draw` gave; all on one device."""
        _, mels, width = features.shape
        numbers = torch.arange(max(width, mels), device=features.device)
        covered = (numbers >= masks[..., :1]) & (numbers < masks[..., 1:])  # (B, masks, numbers)
        in_time, in_frequency = covered.split([self.config.time_masks, self.config.frequency_masks], dim=1)
        masked = in_time.any(dim=1)[:, None, :width] | in_frequency.any(dim=1)[:, :mels, None]  # (B, mels, F)
        real = (numbers[:width] < frames[:, None])[:, None]  # (B, 1, F)
        mean = (features * real).sum(dim=(1, 2), dtype=torch.float32) / (frames * mels)
        return torch.where(masked & real, mean.to(features.dtype)[:, None, None], features)


def _spans(longest: Tensor, room: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw spans for each clip, of 0..longest, anywhere in 0..room: (B, count, 2) int64."""
    draws = torch.rand(2, len(room), count, generator=generator, dtype=torch.float64)
    length = (draws[0] * (longest[:, None] + 1)).floor()
    start = (draws[1] * (room[:, None] - length + 1)).floor()
    return torch.stack([start, start + length], dim=2).long()
