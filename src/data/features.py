"""Whisper's log-mel spectrogram for audio of any length: in batches on a device, or in NumPy.

`WhisperFeatureExtractor` runs per clip on the CPU and pads to 30 s; both functions here are tested to equal it to 1e-4.
The filters are our own because `transformers.audio_utils` imports torch and librosa, which takes seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

N_FFT = 400  # samples: a 25 ms window
HOP_SAMPLES = 160  # 10 ms
FRAMES_PER_SEC = SAMPLE_RATE // HOP_SAMPLES  # 100
SAMPLES_PER_POSITION = 2 * HOP_SAMPLES  # 320: the encoder's second convolution halves the frames
POSITION_SEC = SAMPLES_PER_POSITION / SAMPLE_RATE  # 0.02
CONTEXT_SAMPLES = 30 * SAMPLE_RATE  # 480_000
BREAK_HZ, BREAK_MEL = 1000.0, 15.0  # Slaney's scale: linear to here, logarithmic above
LOG_STEP = math.log(6.4) / 27  # above the break: 27 mels from 1 to 6.4 kHz
TOP_MEL = BREAK_MEL + math.log(SAMPLE_RATE / 2 / BREAK_HZ) / LOG_STEP  # 45.2: 8 kHz


@dataclass(frozen=True)
class LogMel:
    """Whisper's input features on the device of the audio, where nothing padded is stored or sent over a bus.

    Args:
        num_mel_bins: 80, or 128 for large-v3 and turbo.
    """

    num_mel_bins: int = 80

    def __call__(self, audio: Tensor) -> Tensor:
        """Compute features, without a gradient.

        Args:
            audio: (B, T) float, 16 kHz, T > 200 samples; padding at a row's end must be zeros.

        Returns:
            (B, num_mel_bins, T // 160) float32; each row is scaled by its own maximum.
        """
        import torch

        filters, window = _constants(self.num_mel_bins, audio.device)
        with torch.no_grad(), torch.autocast(device_type=audio.device.type, enabled=False):  # the log needs float32
            stft = torch.stft(audio.float(), N_FFT, HOP_SAMPLES, window=window, return_complex=True)
            power = stft[..., :-1].abs() ** 2  # (B, 201, T // 160); Whisper drops the last frame
            logs = (filters @ power).clamp(min=1e-10).log10()
            floor = logs.amax(dim=(1, 2), keepdim=True) - 8.0
            return (torch.maximum(logs, floor) + 4.0) / 4.0


def log_mel(audio: NDArray[np.float32], num_mel_bins: int = 80) -> NDArray[np.float32]:
    """Compute the features of `LogMel` in NumPy, without waiting for the import of torch."""
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)  # periodic, as torch.hann_window
    padded = np.pad(audio, ((0, 0), (N_FFT // 2, N_FFT // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT, axis=1)[:, ::HOP_SAMPLES]
    spectrum = np.fft.rfft(frames[:, : audio.shape[1] // HOP_SAMPLES] * window)  # (B, T // 160, 201)
    power = spectrum.real**2 + spectrum.imag**2
    # a frequency is in two filters at most; the threads of a matrix product wait for those of CTranslate2
    frequencies, weights, starts = _sparse_filters(num_mel_bins)
    mels = np.add.reduceat(power[..., frequencies] * weights, starts, axis=-1)
    logs = np.log10(np.maximum(mels, 1e-10)).transpose(0, 2, 1)
    floor = logs.max(axis=(1, 2), keepdims=True) - 8.0
    scaled: NDArray[np.float32] = (np.maximum(logs, floor) + 4.0) / 4.0
    return scaled


def padded_samples(samples: int) -> int:
    """Round up to whole encoder positions (320 samples), within 0.1 and 30 s."""
    whole = math.ceil(max(samples, SAMPLE_RATE // 10) / SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
    return min(whole, CONTEXT_SAMPLES)


@cache
def mel_filters(num_mel_bins: int) -> NDArray[np.float32]:
    """Return triangular filters of equal area, (num_mel_bins, 201), from 0 to 8 kHz (Slaney 1998, Auditory Toolbox)."""
    mels = np.linspace(0.0, TOP_MEL, num_mel_bins + 2)
    corners = np.where(mels < BREAK_MEL, mels * BREAK_HZ / BREAK_MEL, BREAK_HZ * np.exp((mels - BREAK_MEL) * LOG_STEP))
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    hz = np.linspace(0.0, SAMPLE_RATE / 2, 1 + N_FFT // 2)
    triangles = np.maximum(0.0, np.minimum((hz - left) / (peak - left), (right - hz) / (right - peak)))
    filters: NDArray[np.float32] = (triangles * 2.0 / (right - left)).astype(np.float32)
    return filters


@cache
def _sparse_filters(num_mel_bins: int) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.intp]]:
    """Return frequency and weight of all entries that are not zero, and where each filter begins among them."""
    filters = mel_filters(num_mel_bins)
    mels, frequencies = np.nonzero(filters)
    return frequencies, filters[mels, frequencies], np.searchsorted(mels, np.arange(num_mel_bins))


@cache
def _constants(num_mel_bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    import torch

    return torch.tensor(mel_filters(num_mel_bins), device=device), torch.hann_window(N_FFT, device=device)
