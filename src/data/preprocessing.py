"""From any signal to what the model expects: 16 kHz mono, and where asked trimmed and at a given loudness.

Training and evaluation use neither trimming nor a gain: a model should hear recordings as its users make them. Both are
here for recordings that are far off, such as a long pause before the first word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, DecodedAudio, Waveform, to_mono_16k
from src.data.quality import measure_clip
from src.data.vad import VoiceActivityDetector
from src.utils.errors import AudioError


@dataclass(frozen=True)
class AudioPreprocessor:
    """Prepares decoded signals.

    Attributes:
        vad: cuts silence off before the first word and after the last; None keeps it. Its `pad_sec` stays.
        loudness_dbfs: power of the active part to bring the signal to, dB re full scale; None keeps its level.
    """

    vad: VoiceActivityDetector | None = None
    loudness_dbfs: float | None = None

    def __call__(self, samples: NDArray[np.float32], sample_rate: int, *, name: str = "<array>") -> Waveform:
        """Prepare one recording.

        Args:
            samples: (T,) or (T, channels) floating point in [-1, 1].
            sample_rate: of `samples`, Hz.
            name: what to call it in errors.
        Returns: (T',) float32, 16 kHz, peak at most 1.0 where the level was changed.
        Raises: AudioError: as `to_mono_16k`, or no speech to trim to.
        """
        audio = to_mono_16k(samples, sample_rate, name=name)
        if self.vad is not None:
            audio = self._trim(audio, self.vad, name)
        return audio if self.loudness_dbfs is None else _set_loudness(audio, self.loudness_dbfs)

    @staticmethod
    def _trim(audio: Waveform, vad: VoiceActivityDetector, name: str) -> Waveform:
        speech = vad.speech_segments(audio)
        if not speech:
            raise AudioError(f"{name}: no speech was found, so there is nothing to trim to; listen to it, or remove it")
        return audio[round(speech[0].start_sec * SAMPLE_RATE) : round(speech[-1].end_sec * SAMPLE_RATE)]


def _set_loudness(audio: Waveform, loudness_dbfs: float) -> Waveform:
    """Apply one gain to the whole signal, less where the peak would exceed 1.0."""
    measured_dbfs = measure_clip(DecodedAudio(audio, SAMPLE_RATE, 1)).loudness_dbfs
    gain_db = loudness_dbfs - measured_dbfs
    headroom_db = -20 * math.log10(float(np.abs(audio).max()))
    return (audio * np.float32(10 ** (min(gain_db, headroom_db) / 20))).astype(np.float32)
