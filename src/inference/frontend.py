"""From clips to the log-mel batch that a model takes: at the audio's own length, or padded to 30 s.

torch is imported where it is used: CTranslate2 does without, and a process's first transcript would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.mel import CONTEXT_SAMPLES, log_mel, padded_samples
from src.utils.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.data.features import LogMel


def log_mel_batch(
    audios: Sequence[Waveform | Tensor],
    trailing_silence_sec: float,
    *,
    num_mel_bins: int,
    audio_context: str,
    device: torch.device,
) -> Tensor:
    """Pad clips as their model takes them, and compute log-mel on a device.

    Args:
        audios: (T,) float32 each, 16 kHz, at most 30 s.
        trailing_silence_sec: silence after the longest clip, where 30 s leave room; unused at full context.
        audio_context: "full" or "dynamic".
    Returns: (B, mels, frames) float32.
    Raises: ModelError: no clip, or a clip longer than 30 s.
    """
    import torch

    samples = _batch_samples(audios, trailing_silence_sec, audio_context)
    batch = torch.zeros(len(audios), samples, device=device)
    for row, audio in enumerate(audios):
        batch[row, : len(audio)] = torch.as_tensor(audio, device=device)
    features: Tensor = log_mel_for(num_mel_bins, device)(batch)
    return features


def log_mel_on_host(
    audios: Sequence[Waveform], trailing_silence_sec: float, *, num_mel_bins: int, audio_context: str
) -> NDArray[np.float32]:
    """Do the same without torch, in the host's memory."""
    samples = _batch_samples(audios, trailing_silence_sec, audio_context)
    batch = np.zeros((len(audios), samples), dtype=np.float32)
    for row, audio in enumerate(audios):
        batch[row, : len(audio)] = audio
    return log_mel(batch, num_mel_bins)


@lru_cache(maxsize=8)
def log_mel_for(num_mel_bins: int, device: torch.device) -> LogMel:
    """Return the feature extractor of a device, made once."""
    from src.data.features import LogMel

    return LogMel(num_mel_bins).to(device)


def _batch_samples(audios: Sequence[Waveform | Tensor], trailing_silence_sec: float, audio_context: str) -> int:
    """Return how many samples each clip of a batch is padded to."""
    if not audios:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(map(len, audios))
    if longest > CONTEXT_SAMPLES:
        raise ModelError(
            f"a clip of {longest / SAMPLE_RATE:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio"
        )
    if audio_context == "full":
        return CONTEXT_SAMPLES
    return padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
