"""Where utterances come from: one adapter a source, all giving `Utterance`.

Adapters list recordings and transcripts; nothing is decoded here. A source that fails raises: there is no other source
to switch to in silence.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from src.data.utterance import Utterance
from src.utils.config_schema import DataConfig
from src.utils.errors import DataError, did_you_mean

SAMPLES_DIR = Path(__file__).parent / "samples"
SAMPLE_PARQUET = SAMPLES_DIR / "speechocean762-mini.parquet"
SAMPLE_CLIP = SAMPLES_DIR / "jfk.flac"
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aac", ".wma", ".mkv"})
AUDIO_COLUMNS = ("file", "file_name", "path", "audio", "audio_path", "filename", "wav")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
MANIFEST_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


def load_utterances(config: DataConfig) -> list[Utterance]:
    """List the utterances of the configured source.

    Raises: DataError: source empty, manifest absent or with unknown columns, duplicate ids.
    """
    utterances = SOURCES[config.source](config)
    if not utterances:
        raise DataError(f"source {config.source!r} ({config.path or 'bundled'}) has no utterance")
    seen: set[str] = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise DataError(f"source {config.source!r}: the id {utterance.id!r} occurs twice; make ids unique")
        seen.add(utterance.id)
    return utterances


def _load_sample(config: DataConfig) -> list[Utterance]:
    """Read 500 clips of SpeechOcean762, bundled; see samples/README.md."""
    rows = pq.read_table(SAMPLE_PARQUET).to_pylist()
    return [
        Utterance(
            id=Path(row["audio"]["path"]).stem,
            audio=row["audio"]["bytes"],
            text=row["text"],
            speaker=row["speaker"],
            language="en",
            meta={key: row[key] for key in ("split", "age", "gender")},
        )
        for row in rows
    ]


def _load_folder(config: DataConfig) -> list[Utterance]:
    """Read a folder's manifest (CSV, TSV or JSONL; `metadata.csv` first), or a manifest given itself."""
    assert config.path is not None  # DataConfig requires it
    manifest = _find_manifest(config.path.expanduser())
    rows = list(_read_rows(manifest))
    if not rows:
        raise DataError(f"{manifest}: no rows; expected one row a recording, with a file and a text column")
    columns = [str(key) for key in rows[0][1]]
    audio_column = _pick_column(columns, AUDIO_COLUMNS, "file", manifest)
    text_column = _pick_column(columns, TEXT_COLUMNS, "text", manifest)
    speaker_column = next((c for c in SPEAKER_COLUMNS if c in columns), None)
    taken = {audio_column, text_column, speaker_column, "id", "language"}
    return [
        Utterance(
            id=str(row.get("id") or row.get(audio_column) or f"line {line}"),
            audio=manifest.parent / str(row.get(audio_column) or ""),
            text=str(row.get(text_column) or ""),  # an empty one is refused by name when the data set is checked
            speaker=str(row[speaker_column]) if speaker_column and row.get(speaker_column) else None,
            language=row.get("language") or None,
            meta={**{str(k): v for k, v in row.items() if k not in taken}, "line": line},
        )
        for line, row in rows
    ]


SOURCES: dict[str, Callable[[DataConfig], list[Utterance]]] = {"sample": _load_sample, "folder": _load_folder}


def _find_manifest(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() not in MANIFEST_SUFFIXES:
            raise DataError(f"{path}: a manifest ends in .csv, .tsv or .jsonl")
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set data.path to a folder with audio and a CSV, TSV or JSONL")
    for name in MANIFEST_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in MANIFEST_SUFFIXES)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path}: several manifests ({', '.join(p.name for p in found)}); set data.path to one of them")
    audio = sum(p.suffix.lower() in AUDIO_SUFFIXES for p in path.rglob("*"))
    raise DataError(
        f"{path}: no manifest among its {audio} recording(s); add metadata.csv with the columns file_name,text"
        if audio
        else f"{path}: no recording and no manifest in this folder; add audio and metadata.csv (file_name,text)"
    )


def _read_rows(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row)."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as err:
        raise DataError(f"{manifest}: not UTF-8 (byte {err.start}); save it again as UTF-8") from err
    if manifest.suffix.lower() == ".jsonl":
        yield from _read_jsonl(manifest, text)
        return
    delimiter = "\t" if manifest.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{manifest}, line {reader.line_num}: the row does not have the {len(reader.fieldnames or [])} "
                    "columns of the header; quote a text that holds the delimiter"
                )
            yield reader.line_num, row
    except csv.Error as err:
        raise DataError(f"{manifest}, line {reader.line_num}: {err}") from err


def _read_jsonl(manifest: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(f"{manifest}, line {number}: not JSON: {err}") from err
        if not isinstance(row, dict):
            raise DataError(f"{manifest}, line {number}: expected an object with a file and a text")
        yield number, row


def _pick_column(columns: list[str], known: tuple[str, ...], meaning: str, manifest: Path) -> str:
    for name in known:
        if name in columns:
            return name
    hint = next((h for c in columns if (h := did_you_mean(c.lower(), known))), "")
    raise DataError(
        f"{manifest}: no {meaning} column among {', '.join(columns)}; name one of them {' or '.join(known[:4])}{hint}"
    )
