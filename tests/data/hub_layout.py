"""Small data sets laid out as on the Hub, made of the bundled speech."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile as sf
import soxr
from datasets import Audio, ClassLabel, Dataset, Features, Value

from src.data.audio import load_audio
from src.data.utterance import Utterance

TEXT, INTEGER = Value("string"), Value("int64")
Splits = Mapping[str, Sequence[Utterance]]


def encoded(utterance: Utterance, rate: int, file_format: str) -> bytes:
    """Return the recording in another rate and format."""
    buffer = io.BytesIO()
    sf.write(buffer, soxr.resample(load_audio(utterance.audio), 16_000, rate), rate, format=file_format)
    return buffer.getvalue()


def write_minds14(root: Path, clips: Sequence[Utterance], config: str = "en-US") -> Path:
    """As the Parquet branch of PolyAI/minds14: <config>/train/0000.parquet, 8 kHz WAV, no speakers, no card."""
    types = {
        "path": TEXT, "audio": Audio(sampling_rate=8_000), "transcription": TEXT,
        "intent_class": ClassLabel(names=["abroad", "address"]),
    }  # fmt: skip

    def row(clip: Utterance) -> dict[str, Any]:
        audio = {"bytes": encoded(clip, 8_000, "WAV"), "path": f"{clip.id}.wav"}
        return {"path": f"{config}~ABROAD/{clip.id}.wav", "audio": audio, "transcription": clip.text.lower(),
                "intent_class": 0}  # fmt: skip

    return _write(root, f"{config}/{{}}/0000.parquet", {"train": clips}, row, types)


def write_librispeech(root: Path, splits: Splits) -> Path:
    """As openslr/librispeech_asr: clean/<split>/0000.parquet, 16 kHz FLAC, and a card that lists the splits."""
    types = {"file": TEXT, "audio": Audio(sampling_rate=16_000), "text": TEXT, "speaker_id": INTEGER, "id": TEXT}

    def row(clip: Utterance) -> dict[str, Any]:
        audio = {"bytes": encoded(clip, 16_000, "FLAC"), "path": f"{clip.id}.flac"}
        speaker = int(clip.speaker or 0)
        return {"file": f"{clip.id}.flac", "audio": audio, "text": clip.text, "speaker_id": speaker, "id": clip.id}

    _write(root, "clean/{}/0000.parquet", splits, row, types)
    listed = "".join(f"  - split: {split}\n    path: clean/{split}/*.parquet\n" for split in splits)
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: clean\n  data_files:\n{listed}---\n")
    return root


def write_fleurs(root: Path, clips: Sequence[Utterance], config: str) -> Path:
    """As the Parquet branch of google/fleurs: <config>/<split>/0000.parquet, 16 kHz WAV, no speakers, no card."""
    types = {
        "id": INTEGER, "path": TEXT, "audio": Audio(sampling_rate=16_000), "transcription": TEXT,
        "raw_transcription": TEXT, "language": TEXT,
    }  # fmt: skip

    def row(clip: Utterance) -> dict[str, Any]:
        audio = {"bytes": encoded(clip, 16_000, "WAV"), "path": f"{clip.id}.wav"}
        return {"id": int(clip.id), "path": f"{clip.id}.wav", "audio": audio, "transcription": clip.text.lower(),
                "raw_transcription": clip.text, "language": "Hindi"}  # fmt: skip

    return _write(
        root, f"{config}/{{}}/0000.parquet", dict.fromkeys(("train", "validation", "test"), clips), row, types
    )


def write_speechocean762(root: Path, splits: Splits) -> Path:
    """As mispeech/speechocean762: data/<split>-00000-of-00001.parquet, with columns of scores."""
    words = [{"text": TEXT, "accuracy": INTEGER}]
    types = {"text": TEXT, "words": words, "speaker": TEXT, "gender": TEXT, "age": INTEGER, "audio": Audio()}

    def row(clip: Utterance) -> dict[str, Any]:
        scored = [{"text": word, "accuracy": 10} for word in clip.text.split()]
        audio = {"bytes": encoded(clip, 16_000, "WAV"), "path": f"{clip.id}.WAV"}
        return {"text": clip.text, "words": scored, "speaker": clip.speaker, "gender": clip.meta["gender"],
                "age": clip.meta["age"], "audio": audio}  # fmt: skip

    return _write(root, "data/{}-00000-of-00001.parquet", splits, row, types)


def _write(
    root: Path, name: str, splits: Splits, row: Callable[[Utterance], dict[str, Any]], types: dict[str, Any]
) -> Path:
    for split, clips in splits.items():
        path = root / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list([row(clip) for clip in clips], features=Features(types)).to_parquet(path)
    return root
