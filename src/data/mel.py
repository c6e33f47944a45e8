"""Whisper's log-mel spectrogram in NumPy, for engines that take their input from the host.

torch takes seconds to import, which the first transcript of a process would wait for. `features.LogMel` is the same
arithmetic on a device (equal to 1e-4, tested).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE

N_FFT = 400  # samples: a 25 ms window
HOP_SAMPLES = 160  # 10 ms
FRAMES_PER_SEC = SAMPLE_RATE // HOP_SAMPLES  # 100
SAMPLES_PER_POSITION = 2 * HOP_SAMPLES  # 320: the encoder's second convolution halves the frames
CONTEXT_SAMPLES = 30 * SAMPLE_RATE  # 480_000
BREAK_HZ, BREAK_MEL = 1000.0, 15.0  # Slaney's scale: linear to here, logarithmic above
LOG_STEP = np.log(6.4) / 27  # above the break: 27 mels from 1 to 6.4 kHz


def log_mel(audio: NDArray[np.float32], num_mel_bins: int = 80) -> NDArray[np.float32]:
    """Compute Whisper's input features.

    Args:
        audio: (B, T) float32, 16 kHz, T > 200 samples; padding at a row's end must be zeros.
        num_mel_bins: 80, or 128 for large-v3 and turbo.
    Returns: (B, num_mel_bins, T // 160) float32; each row is scaled by its own maximum.
    """
    padded = np.pad(audio, ((0, 0), (N_FFT // 2, N_FFT // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT, axis=1)[:, ::HOP_SAMPLES]
    spectrum = np.fft.rfft(frames[:, : audio.shape[1] // HOP_SAMPLES] * _window())  # (B, T // 160, 201)
    power = spectrum.real**2 + spectrum.imag**2
    logs = np.log10(np.maximum(power @ mel_filters(num_mel_bins).T, 1e-10)).transpose(0, 2, 1)
    floor = logs.max(axis=(1, 2), keepdims=True) - 8.0
    scaled: NDArray[np.float32] = (np.maximum(logs, floor) + 4.0) / 4.0
    return scaled


def padded_samples(samples: int) -> int:
    """Round up to whole encoder positions (320 samples), within 0.1 and 30 s."""
    whole = math.ceil(max(samples, SAMPLE_RATE // 10) / SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
    return min(whole, CONTEXT_SAMPLES)


@cache
def mel_filters(num_mel_bins: int) -> NDArray[np.float32]:
    """Return triangular filters of equal area, (num_mel_bins, 201), from 0 to 8 kHz.

    Source: Slaney (1998), Auditory Toolbox; librosa.filters.mel has the same values.
    """
    corners = _mel_to_hz(np.linspace(0.0, _hz_to_mel(SAMPLE_RATE / 2), num_mel_bins + 2))
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    hz = np.linspace(0.0, SAMPLE_RATE / 2, 1 + N_FFT // 2)
    triangles = np.maximum(0.0, np.minimum((hz - left) / (peak - left), (right - hz) / (right - peak)))
    return (triangles * 2.0 / (right - left)).astype(np.float32)


@cache
def _window() -> NDArray[np.float32]:
    return np.hanning(N_FFT + 1)[:-1].astype(np.float32)  # periodic, as torch.hann_window


def _hz_to_mel(hz: float) -> float:
    return hz * BREAK_MEL / BREAK_HZ if hz < BREAK_HZ else BREAK_MEL + np.log(hz / BREAK_HZ) / LOG_STEP


def _mel_to_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    hz: NDArray[np.float64] = np.where(
        mels < BREAK_MEL, mels * BREAK_HZ / BREAK_MEL, BREAK_HZ * np.exp((mels - BREAK_MEL) * LOG_STEP)
    )
    return hz
