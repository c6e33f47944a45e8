"""Preparation and measurement of decoded signals, without a model.

Training and evaluation use neither trimming nor a gain: a model should hear recordings as its users make them.
`measure_clip` runs on every clip while it is checked: about 1 ms for 4 s (2026-11-25, one CPU core).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, DecodedAudio, Waveform, to_mono_16k
from src.data.vad import VoiceActivityDetector
from src.utils.errors import AudioError

FRAME_SAMPLES = SAMPLE_RATE // 50  # 320: 20 ms
SILENCE_DBFS = -70.0  # below it a frame is silent in any recording; the absolute gate of ITU-R BS.1770
SILENCE_BELOW_SPEECH_DB = 35.0  # and where it lies this far below the loudness: fricatives reach about 30 dB below
RELATIVE_GATE_DB = 10.0  # BS.1770's other gate
MIN_DBFS = -120.0  # of a signal without any power
NOISE_PERCENTILE = 10
MAX_SNR_DB = 60.0  # beyond it a noise floor is inaudible
CLIPPING_RUN_SAMPLES = 3
RAIL_TOLERANCE = 0.01
BANDWIDTH_DROP_DB = 60.0
FFT_SAMPLES = 512  # 31.25 Hz per bin


@dataclass(frozen=True)
class AudioPreprocessor:
    """Prepares recordings that are far off, such as one with a long pause before the first word.

    Args:
        vad: cuts silence off before the first word and after the last; None keeps it. Its `pad_sec` stays.
        loudness_dbfs: power of the active part to bring the signal to, dB re full scale; None keeps its level.
    """

    vad: VoiceActivityDetector | None = None
    loudness_dbfs: float | None = None

    def __call__(self, samples: NDArray[np.float32], sample_rate: int, *, name: str = "<array>") -> Waveform:
        """Prepare (T,) or (T, channels) floating point samples in [-1, 1].

        Returns:
            (T',) float32, 16 kHz, peak at most 1.0 where the level was changed.

        Raises:
            AudioError: as `load_audio`, or no speech to trim to.
        """
        audio = to_mono_16k(samples, sample_rate, name=name)
        if self.vad is not None:
            speech = self.vad.speech_segments(audio)
            if not speech:
                raise AudioError(f"{name}: no speech was found to trim to; listen to it, or leave it out")
            audio = audio[round(speech[0].start_sec * SAMPLE_RATE) : round(speech[-1].end_sec * SAMPLE_RATE)]
        if self.loudness_dbfs is None:
            return audio
        gain_db = self.loudness_dbfs - _loudness(_frame_levels(audio))
        headroom_db = -20 * math.log10(float(np.abs(audio).max()))  # less gain where the peak would exceed 1.0
        return (audio * np.float32(10 ** (min(gain_db, headroom_db) / 20))).astype(np.float32)


@dataclass(frozen=True)
class ClipStats:
    """What was measured on one recording."""

    sample_rate: int  # of the file, Hz
    channels: int  # of the file
    duration_sec: float
    peak_dbfs: float  # largest magnitude; above 0 where resampling overshoots
    clipped_fraction: float  # share of samples cut off at the rail, see `measure_clipping`
    loudness_dbfs: float  # mean power of the active part, without pauses
    silent_fraction: float  # share of 20 ms frames under -70 dBFS, or 35 dB under the loudness
    snr_db: float  # loudness over the quietest tenth of the frames, 0 to 60: errs low where nobody pauses
    bandwidth_hz: float  # highest frequency with power, see `measure_bandwidth`; at most 8,000
    audio_sha256: str  # of the samples as 16-bit PCM: a copy in another lossless container has the same
    speech_fraction: float = math.nan  # share of the recording; nan where speech was not looked for
    leading_silence_sec: float = math.nan  # before the first speech; nan where there is none
    trailing_silence_sec: float = math.nan  # after the last speech; nan where there is none


class PackedStats(Mapping[str, ClipStats]):
    """What was measured on recordings, by utterance id: packed into 160 bytes each, a third of the object."""

    _FIELDS = struct.Struct("=2I7d32s3d")  # of `ClipStats`, in their order

    def __init__(self, *others: PackedStats) -> None:
        self._packed: dict[str, bytes] = {}
        for other in others:
            self._packed |= other._packed

    def __setitem__(self, key: str, stats: ClipStats) -> None:
        values = {**vars(stats), "audio_sha256": bytes.fromhex(stats.audio_sha256)}
        self._packed[key] = self._FIELDS.pack(*values.values())

    def __getitem__(self, key: str) -> ClipStats:
        unpacked = self._FIELDS.unpack(self._packed[key])
        values: list[Any] = [value.hex() if isinstance(value, bytes) else value for value in unpacked]
        return ClipStats(*values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def measure_clip(decoded: DecodedAudio, *, vad: VoiceActivityDetector | None = None) -> ClipStats:
    """Measure one decoded recording, of at least one sample, and with `vad` where speech is in it."""
    samples, duration_sec = decoded.samples, len(decoded.samples) / SAMPLE_RATE
    speech = {}
    if vad is not None:
        segments = vad.speech_segments(samples)
        speech["speech_fraction"] = sum(s.end_sec - s.start_sec for s in segments) / duration_sec
        if segments:
            speech["leading_silence_sec"] = segments[0].start_sec
            speech["trailing_silence_sec"] = duration_sec - segments[-1].end_sec
    levels_dbfs = _frame_levels(samples)
    loudness_dbfs = _loudness(levels_dbfs)
    silent = levels_dbfs < max(SILENCE_DBFS, loudness_dbfs - SILENCE_BELOW_SPEECH_DB)
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    return ClipStats(
        sample_rate=decoded.sample_rate,
        channels=decoded.channels,
        duration_sec=duration_sec,
        peak_dbfs=max(20 * math.log10(max(float(np.abs(samples).max()), 1e-9)), MIN_DBFS),
        clipped_fraction=measure_clipping(samples),
        loudness_dbfs=loudness_dbfs,
        silent_fraction=float(silent.mean()),
        snr_db=min(max(loudness_dbfs - float(np.percentile(levels_dbfs, NOISE_PERCENTILE)), 0.0), MAX_SNR_DB),
        bandwidth_hz=measure_bandwidth(samples),
        audio_sha256=hashlib.sha256(pcm.tobytes()).hexdigest(),
        **speech,
    )


def measure_clipping(samples: Waveform) -> float:
    """Return the share of samples in runs of at least 3 of one sign at the rail.

    The rail is 99% of full scale, or of the clip's own peak where that is lower: a clipped recording may have been made
    quieter afterwards. Resampling and lossy codecs blur flat tops, so only a share of them is found.
    """
    rail = (1 - RAIL_TOLERANCE) * min(1.0, float(np.abs(samples).max()))
    if rail == 0:
        return 0.0
    clipped = 0
    for at_rail in (samples >= rail, samples <= -rail):
        edges = np.flatnonzero(np.diff(at_rail, prepend=False, append=False))
        runs = edges[1::2] - edges[::2]
        clipped += int(runs[runs >= CLIPPING_RUN_SAMPLES].sum())
    return clipped / len(samples)


def measure_bandwidth(samples: Waveform) -> float:
    """Return the highest frequency, Hz, whose mean power is at most 60 dB below the strongest one.

    The rate of a file does not say it: telephone speech stays below 4 kHz in a file of 48 kHz as well.
    """
    whole = max(len(samples) // FFT_SAMPLES, 1) * FFT_SAMPLES
    padded = np.pad(samples[:whole], (0, whole - len(samples[:whole])))
    frames = padded.reshape(-1, FFT_SAMPLES) * np.hanning(FFT_SAMPLES).astype(np.float32)
    power = (np.abs(np.fft.rfft(frames, axis=1)) ** 2).mean(axis=0)  # (257,)
    strong = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_DROP_DB / 10))
    return float(strong[-1] * SAMPLE_RATE / FFT_SAMPLES) if len(strong) else 0.0


def _frame_levels(samples: Waveform) -> NDArray[np.float64]:
    """Return the power of each 20 ms frame, dB re full scale; a shorter rest is left out."""
    whole = len(samples) // FRAME_SAMPLES * FRAME_SAMPLES
    frames = samples[:whole].reshape(-1, FRAME_SAMPLES) if whole else samples[None]
    power = np.einsum("ft,ft->f", frames, frames, dtype=np.float64) / frames.shape[1]  # (frames,)
    levels: NDArray[np.float64] = 10 * np.log10(np.maximum(power, 10 ** (MIN_DBFS / 10)))
    return levels


def _loudness(levels_dbfs: NDArray[np.float64]) -> float:
    """Return the mean power of the active frames, dB re full scale: pauses do not make a recording quieter.

    The two gates of ITU-R BS.1770-4 on unweighted frames of 20 ms (its frequency weighting ranks clips alike): frames
    above -70 dBFS, and of these the ones that lie at most 10 dB below their mean power. Where none is, the mean of all.
    """

    def mean_dbfs(levels: NDArray[np.float64]) -> float:
        return 10 * math.log10(float((10 ** (levels / 10)).mean()))

    loud = levels_dbfs[levels_dbfs > SILENCE_DBFS]
    return mean_dbfs(loud[loud >= mean_dbfs(loud) - RELATIVE_GATE_DB]) if len(loud) else mean_dbfs(levels_dbfs)
