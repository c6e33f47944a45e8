"""Utterances without speech: what the model must answer with nothing.

Fine-tuning on speech alone makes Whisper write something into every silence. A small share of recordings of nothing,
with an empty text, teaches the end token there. They are made when they are needed, from the seed and the id.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile as sf
import torch

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.augmentation.noise import coloured_noise
from src.data.utterance import Utterance
from src.utils.errors import DataError

SILENCE_SHARE = 0.25  # of them; the others are noise
MIN_LEVEL_DBFS = -70.0  # RMS: a quiet microphone's own noise
MAX_LEVEL_DBFS = -30.0  # a loud street behind a closed window


@dataclass(frozen=True)
class NoSpeechAudio:
    """A recording that is made, not decoded: digital silence, or noise of a drawn colour and level.

    Attributes:
        seed, id: decide the kind, the colour, the level and every sample.
        duration_sec: seconds.
    """

    seed: int
    id: str
    duration_sec: float

    def waveform(self) -> Waveform:
        """Return (T,) float32 at 16 kHz: zeros, or noise whose power falls with f^0 (white) to f^-2 (brown)."""
        rng = _generator(self.seed, self.id)
        samples = round(self.duration_sec * SAMPLE_RATE)
        if rng.random() < SILENCE_SHARE:
            return np.zeros(samples, dtype=np.float32)
        exponent = torch.tensor([rng.uniform(0.0, 2.0)])
        level_dbfs = rng.uniform(MIN_LEVEL_DBFS, MAX_LEVEL_DBFS)
        noise = coloured_noise((1, samples), exponent, torch.Generator().manual_seed(int(rng.integers(2**62))))[0]
        waveform: Waveform = (noise * 10 ** (level_dbfs / 20)).numpy()
        return waveform

    def read(self) -> bytes:
        """Return the same as the bytes of a float WAV file, for players and whatever else takes encoded audio."""
        buffer = io.BytesIO()
        sf.write(buffer, self.waveform(), SAMPLE_RATE, format="WAV", subtype="FLOAT")
        return buffer.getvalue()


def make_no_speech(utterances: Sequence[Utterance], *, fraction: float, seed: int) -> list[Utterance]:
    """Make utterances without speech to go with a training set.

    Args:
        utterances: checked; each new one has the duration of one of them.
        fraction: of their number.
        seed: with the id, decides everything.
    Returns: `no-speech-0001` and so on, with an empty text and no speaker.
    Raises: DataError: an utterance without a duration.
    """
    made = []
    for number in range(1, round(fraction * len(utterances)) + 1):
        name = f"no-speech-{number:04d}"
        pick = int(_generator(seed, f"{name}:duration").integers(len(utterances)))
        duration_sec = utterances[pick].duration_sec
        if duration_sec is None:
            raise DataError(f"utterance {utterances[pick].id}: its duration is unknown; check_utterance measures it")
        made.append(Utterance(name, NoSpeechAudio(seed, name, duration_sec), text="", duration_sec=duration_sec))
    return made


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
