"""Splits of constructed recordings, measured as checking does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import soundfile as sf

from src.data.audio import SAMPLE_RATE, Waveform, decode
from src.data.preparation import DatasetSplits
from src.data.preprocessing import measure_clip
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector

TEXTS = [
    "The quick brown fox jumps over it.", "She sells shells by the sea shore.", "We walked home in the rain.",
    "A stitch in time saves nine today.", "They never saw the light again.", "Please call me back tomorrow.",
]  # fmt: skip


def noise(seconds: float, seed: int, amplitude: float = 0.1) -> Waveform:
    rng = np.random.default_rng(seed)
    return (amplitude * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def clip(
    name: str, audio: Waveform, text: str, *, speaker: str | None = "s1", rate: int = SAMPLE_RATE, kind: str = "WAV",
    language: str | None = "en",
) -> Utterance:  # fmt: skip
    file = io.BytesIO()
    sf.write(file, audio, rate, format=kind, subtype="PCM_16")
    return Utterance(id=name, audio=file.getvalue(), text=text, speaker=speaker, language=language)


def plain_clips(prefix: str, n: int, *, speakers: int = 4) -> list[Utterance]:
    """Return clips of noise at one pace, with texts of their own."""
    return [
        clip(
            f"{prefix}{i}", noise(2.0 + 0.1 * (i % 5), hash_of(prefix, i)),
            f"{TEXTS[i % 6][:-1]} {prefix} {'abcdefghijklmnopqrstuvwxyz'[i % 26]}.",
            speaker=f"{prefix}{i % speakers}",
        )
        for i in range(n)
    ]  # fmt: skip


def hash_of(prefix: str, i: int) -> int:
    return sum(map(ord, prefix)) * 1_000 + i


def splits_of(
    train: Sequence[Utterance],
    validation: Sequence[Utterance] = (),
    test: Sequence[Utterance] = (),
    vad: VoiceActivityDetector | None = None,
) -> DatasetSplits:
    parts, stats = [], {}
    for part in (train, validation, test):
        measured = {u.id: measure_clip(decode(u.audio), vad=vad) for u in part}
        stats.update(measured)
        parts.append([replace(u, duration_sec=measured[u.id].duration_sec) for u in part])
    return DatasetSplits(*parts, label_case="keep", stats=stats)
