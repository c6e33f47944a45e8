"""From clips to the log-mel batch that a model takes: at the audio's own length, or padded to 30 s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION, LogMel
from src.utils.errors import ModelError


def log_mel_batch(
    audios: Sequence[Waveform | Tensor],
    trailing_silence_sec: float,
    *,
    num_mel_bins: int,
    audio_context: str,
    device: torch.device,
) -> Tensor:
    """Pad clips as their model takes them, and compute log-mel.

    Args:
        audios: (T,) float32 each, 16 kHz, at most 30 s.
        trailing_silence_sec: silence after the longest clip, where 30 s leave room; unused at full context.
        audio_context: "full" or "dynamic".
    Returns: (B, mels, frames) float32.
    Raises: ModelError: no clip, or a clip longer than 30 s.
    """
    if not audios:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(map(len, audios))
    if longest > CONTEXT_SAMPLES:
        raise ModelError(
            f"a clip of {longest / SAMPLE_RATE:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio"
        )
    samples = CONTEXT_SAMPLES
    if audio_context == "dynamic":
        samples = padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
    batch = torch.zeros(len(audios), samples, device=device)
    for row, audio in enumerate(audios):
        batch[row, : len(audio)] = torch.as_tensor(audio, device=device)
    features: Tensor = log_mel_for(num_mel_bins, device)(batch)
    return features


def padded_samples(samples: int) -> int:
    """Round up to whole encoder positions (320 samples), within 0.1 and 30 s."""
    whole = math.ceil(max(samples, SAMPLE_RATE // 10) / SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
    return min(whole, CONTEXT_SAMPLES)


@lru_cache(maxsize=8)
def log_mel_for(num_mel_bins: int, device: torch.device) -> LogMel:
    """Return the feature extractor of a device, made once."""
    return LogMel(num_mel_bins).to(device)
