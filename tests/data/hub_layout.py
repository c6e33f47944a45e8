"""Small data sets laid out as on the Hub, made of the bundled speech."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile as sf
import soxr
from datasets import Audio, ClassLabel, Dataset, Features, Value

from src.data.audio import load_audio
from src.data.utterance import Utterance


def encoded(utterance: Utterance, rate: int, file_format: str) -> bytes:
    """Return the recording in another rate and format."""
    buffer = io.BytesIO()
    audio = load_audio(utterance.audio)
    sf.write(buffer, soxr.resample(audio, 16_000, rate), rate, format=file_format)
    return buffer.getvalue()


def write_minds14(root: Path, clips: Sequence[Utterance], config: str = "en-US") -> Path:
    """As the Parquet branch of PolyAI/minds14: <config>/train/0000.parquet, 8 kHz WAV, no speakers, no card."""
    features = Features(
        {
            "path": Value("string"),
            "audio": Audio(sampling_rate=8_000),
            "transcription": Value("string"),
            "english_transcription": Value("string"),
            "intent_class": ClassLabel(names=["abroad", "address"]),
        }
    )
    rows = [
        {
            "path": f"{config}~ABROAD/{clip.id}.wav",
            "audio": {"bytes": encoded(clip, 8_000, "WAV"), "path": f"{clip.id}.wav"},
            "transcription": clip.text.lower(),
            "english_transcription": clip.text.lower(),
            "intent_class": index % 2,
        }
        for index, clip in enumerate(clips)
    ]
    return _write(root, {f"{config}/train/0000.parquet": rows}, features)


def write_librispeech(root: Path, splits: dict[str, Sequence[Utterance]]) -> Path:
    """As openslr/librispeech_asr: clean/<split>/0000.parquet, 16 kHz FLAC, and a card that lists the splits."""
    features = Features(
        {
            "file": Value("string"),
            "audio": Audio(sampling_rate=16_000),
            "text": Value("string"),
            "speaker_id": Value("int64"),
            "chapter_id": Value("int64"),
            "id": Value("string"),
        }
    )
    files = {
        f"clean/{split}/0000.parquet": [
            {
                "file": f"{clip.id}.flac",
                "audio": {"bytes": encoded(clip, 16_000, "FLAC"), "path": f"{clip.id}.flac"},
                "text": clip.text,
                "speaker_id": int(clip.speaker or 0),
                "chapter_id": 1,
                "id": clip.id,
            }
            for clip in clips
        ]
        for split, clips in splits.items()
    }
    _write(root, files, features)
    listed = "".join(f"  - split: {split}\n    path: clean/{split}/*.parquet\n" for split in splits)
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: clean\n  data_files:\n{listed}---\n")
    return root


def write_speechocean762(root: Path, splits: dict[str, Sequence[Utterance]]) -> Path:
    """As mispeech/speechocean762: data/<split>-00000-of-00001.parquet, with columns of scores."""
    features = Features(
        {
            "accuracy": Value("int64"),
            "text": Value("string"),
            "words": [{"text": Value("string"), "accuracy": Value("int64")}],
            "speaker": Value("string"),
            "gender": Value("string"),
            "age": Value("int64"),
            "audio": Audio(),
        }
    )
    files = {
        f"data/{split}-00000-of-00001.parquet": [
            {
                "accuracy": 8,
                "text": clip.text,
                "words": [{"text": word, "accuracy": 10} for word in clip.text.split()],
                "speaker": clip.speaker,
                "gender": clip.meta["gender"],
                "age": clip.meta["age"],
                "audio": {"bytes": encoded(clip, 16_000, "WAV"), "path": f"{clip.id}.WAV"},
            }
            for clip in clips
        ]
        for split, clips in splits.items()
    }
    return _write(root, files, features)


def _write(root: Path, files: dict[str, list[dict[str, Any]]], features: Features) -> Path:
    for name, rows in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(root / name)
    return root
