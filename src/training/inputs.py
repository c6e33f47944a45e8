"""From a batch of raw audio to what the model is trained on, on the device: augmentation, pauses, log-mel, masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.augmenter import AudioAugmenter
from src.data.augmentation.spec_augment import SpecAugment
from src.data.features import CONTEXT_SAMPLES, HOP_SAMPLES
from src.data.mel import padded_samples
from src.inference.decoding import log_mel_for
from src.training.prefixes import PrefixCutter
from src.utils.config import Config


class TrainingInputs:
    """Makes training features; everything random is drawn of the generator that each batch brings.

    Args:
        config: `augmentation`, `model.audio_context`, and of `training` the pauses and the share of full context.
        num_mel_bins: of the model.
        cutter: cuts a share of the clips, with their labels.
    Raises: DataError, AudioError: augmentation.noise_dir cannot be used.
    """

    def __init__(self, config: Config, num_mel_bins: int, *, cutter: PrefixCutter | None = None) -> None:
        self._config = config
        self._cutter = cutter
        self._num_mel_bins = num_mel_bins
        self._augment = AudioAugmenter(config.augmentation)
        self._mask = SpecAugment.from_config(config.augmentation)

    def cut(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch with some clips cut at a word, where that is asked for; before anything else is drawn."""
        return batch if self._cutter is None else self._cutter(batch, generator)

    def features(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return (B, mels, frames) float32 on the batch's device; `generator` is on the CPU."""
        audio, lengths = self.audio(batch, generator)
        log_mel = log_mel_for(self._num_mel_bins, audio.device)(audio)
        frames = (lengths.cpu() / HOP_SAMPLES).ceil().long().clamp(max=log_mel.shape[2])
        return self._mask(log_mel, frames, generator=generator)

    def audio(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment; give the longest clip a random pause at its end, or the whole batch 30 s with `full_context_prob`.

        The others end in a pause anyway, which a longer one of their own would only make the batch longer for.

        Returns: (B, T) float32, T in whole encoder positions; and (B,) int64 samples of each clip without its pause.
        """
        training = self._config.training
        pauses_sec = torch.rand(len(batch["ids"]), generator=generator) * training.max_trailing_silence_sec
        pauses = (pauses_sec * SAMPLE_RATE).long().to(batch["audio_lengths"].device)
        full = float(torch.rand(1, generator=generator)) < training.full_context_prob
        audio, lengths, _ = self._augment(
            batch["audio"],
            batch["audio_lengths"],
            generator=generator,
            trailing_samples=pauses,  # background noise does not stop with the voice
            keep_speed=batch["timed"],
        )
        samples = CONTEXT_SAMPLES
        if not full and self._config.model.audio_context == "dynamic":
            longest = lengths.argmax()
            samples = padded_samples(int(lengths[longest] + pauses[longest]))
        return functional.pad(audio, (0, samples - audio.shape[1])), lengths  # cuts where others' pauses are longer
