"""Log-mel spectrograms in batches on the device, for audio of any length.

`WhisperFeatureExtractor` runs per clip on the CPU and pads to 30 s; this is the same arithmetic (equal to 1e-4, tested)
as one STFT over a batch wherever the model lives, so nothing padded is ever stored or sent over a bus.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.data.mel import CONTEXT_SAMPLES, FRAMES_PER_SEC, HOP_SAMPLES, N_FFT, SAMPLES_PER_POSITION, mel_filters

__all__ = ["CONTEXT_SAMPLES", "FRAMES_PER_SEC", "HOP_SAMPLES", "N_FFT", "SAMPLES_PER_POSITION", "LogMel"]


class LogMel(nn.Module):
    """Whisper's input features.

    Args:
        num_mel_bins: 80, or 128 for large-v3 and turbo.
    """

    def __init__(self, num_mel_bins: int = 80) -> None:
        super().__init__()
        self.filters: Tensor
        self.window: Tensor
        self.register_buffer("filters", torch.tensor(mel_filters(num_mel_bins)), persistent=False)  # (mels, 201)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Compute features.

        Args:
            audio: (B, T) float, 16 kHz, T > 200 samples; padding at a row's end must be zeros.
        Returns: (B, num_mel_bins, T // 160) float32; each row is scaled by its own maximum.
        """
        with torch.autocast(device_type=audio.device.type, enabled=False):  # the log needs float32
            stft = torch.stft(audio.float(), N_FFT, HOP_SAMPLES, window=self.window, return_complex=True)
            power = stft[..., :-1].abs() ** 2  # (B, 201, T // 160); Whisper drops the last frame
            log_mel = (self.filters @ power).clamp(min=1e-10).log10()
            floor = log_mel.amax(dim=(1, 2), keepdim=True) - 8.0
            return (torch.maximum(log_mel, floor) + 4.0) / 4.0
