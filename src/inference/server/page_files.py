"""What a web page does with an uploaded recording: transcribe it, or compare two models on it."""

from __future__ import annotations

import difflib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform, stream_audio
from src.inference.files.transcribe import BatchInference, TranscribedSegment
from src.inference.words import Word
from src.utils.errors import AudioError

MAX_UPLOAD_SEC = 3600.0  # 230 MB of samples


@dataclass(frozen=True)
class FileTranscript:
    """One recording in the words of one model.

    Attributes:
        model: its name on the page.
        segments: those with text, in order, with their words.
        audio_sec: how long the recording is.
        compute_sec: wall time of cutting, features, encoder and decoder; reading the file is not in it.
    """

    model: str
    segments: tuple[TranscribedSegment, ...]
    audio_sec: float
    compute_sec: float

    @property
    def words(self) -> tuple[Word, ...]:
        """All words, in absolute time."""
        return tuple(word for segment in self.segments for word in segment.words or ())

    @property
    def rtf(self) -> float:
        """Real-time factor: compute over audio."""
        return self.compute_sec / self.audio_sec


def read_upload(path: Path, *, max_sec: float = MAX_UPLOAD_SEC) -> Waveform:
    """Decode an upload; silence is allowed.

    Returns: (T,) float32 at 16 kHz.
    Raises: AudioError: it cannot be decoded, or is longer than `max_sec`.
    """
    blocks, samples = [], 0
    for block in stream_audio(path, name=path.name):
        blocks.append(block)
        samples += len(block)
        if samples > max_sec * SAMPLE_RATE:
            raise AudioError(
                f"{path.name}: longer than {max_sec / 60:g} minutes, the most that this page takes; "
                "scripts/transcribe.py transcribes recordings of any length"
            )
    return np.concatenate(blocks)


def transcribe_upload(audio: Waveform, model: str, inference: BatchInference) -> FileTranscript:
    """Transcribe (T,) float32 at 16 kHz, with word times."""
    done = inference.transcribe_batch([audio], word_timestamps=True)
    return FileTranscript(model, done[0].segments, done.audio_sec, done.compute_sec)


def compare_models(audio: Waveform, models: Sequence[tuple[str, BatchInference]]) -> list[FileTranscript]:
    """Transcribe with one named model after the other, so that their times compare."""
    return [transcribe_upload(audio, name, inference) for name, inference in models]


def differing_words(first: Sequence[Word], second: Sequence[Word]) -> tuple[frozenset[int], frozenset[int]]:
    """Return the places of words that the other text lacks; case and punctuation count for nothing.

    The longest common runs are matched first (difflib): it shows where to look, and is no error rate.
    """
    keys = [[word.text.casefold().strip(string.punctuation) for word in words] for words in (first, second)]
    runs = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    same_first = {run.a + i for run in runs for i in range(run.size)}
    same_second = {run.b + i for run in runs for i in range(run.size)}
    return frozenset(range(len(first))) - same_first, frozenset(range(len(second))) - same_second
