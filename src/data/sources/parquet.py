"""Parquet files in the Hugging Face audio layout, read cell by cell.

Only the text columns are read when a data set is listed. Recordings stay in their file and are read by row group when
a batch needs them, with the newest row groups kept: a small file lives in memory, and one larger than the memory works.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from src.data.sources.manifest import AUDIO_COLUMNS, LANGUAGE_COLUMNS, SPEAKER_COLUMNS, TEXT_COLUMNS, pick_column
from src.data.utterance import SPLIT_NAMES, Utterance
from src.utils.errors import AudioError, DataError, SourceUnavailableError

KEPT_BYTES = 256 << 20  # of row groups, a process


@dataclass(frozen=True)
class ParquetCell:
    """The recording in one row of a Parquet file.

    Attributes:
        path: of the file.
        row_group, row: which row group, and which row in it.
        column: of the recording: a struct of `bytes` and `path`, or plain bytes.
    """

    path: Path
    row_group: int
    row: int
    column: str

    def read(self) -> bytes:
        """Return the bytes of the encoded recording.

        Raises: AudioError: the file is gone or damaged, or the cell is empty.
        """
        cell = _ROW_GROUPS.get(self.path, self.row_group, self.column)[self.row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if isinstance(cell, dict) and cell.get("path"):
            return self._read_file(Path(cell["path"]))
        raise AudioError(f"{self}: the cell holds no recording; remove the row")

    def _read_file(self, name: Path) -> bytes:
        """Read a recording that is named and not embedded; relative names are relative to the Parquet file."""
        try:
            return (self.path.parent / name).read_bytes()
        except OSError as err:
            raise AudioError(
                f"{self}: names {name}, which cannot be read ({err.strerror}); put the recordings beside the file, or "
                "embed them (datasets' embed_external_files)"
            ) from err

    def __str__(self) -> str:
        return f"{self.path}, row group {self.row_group}, row {self.row}"


def read_parquet(
    path: Path, *, audio_column: str | None = None, text_column: str | None = None, language: str | None = None
) -> list[Utterance]:
    """List the rows of one file, or of all files in a folder.

    Args:
        path: file or folder; where files are named after splits (`train-00000-of-00002.parquet`, `train/0000.parquet`)
            and there is no column `split`, the names say the split.
        audio_column, text_column: found by type and name where None.
        language: of rows that do not say their own.
    Returns: utterances, with the other plain columns in `meta`.
    Raises: SourceUnavailableError: no such path, no file in it. DataError: not Parquet, or columns not recognised.
    """
    if not path.exists():
        raise SourceUnavailableError(f"{path}: no such file or folder; set data.path to Parquet files")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.parquet") if p.is_file())
    if not files:
        raise SourceUnavailableError(f"{path}: no .parquet file in this folder; set data.path to Parquet files")
    named = path.is_dir()
    utterances: list[Utterance] = []
    seen: set[str] = set()
    for file in files:
        split = split_of(file.relative_to(path)) if named else None
        for utterance in _read_file(file, split, audio_column, text_column):
            known = utterance if utterance.language else replace(utterance, language=language)
            utterances.append(with_unique_id(known, seen))
    return utterances


def with_unique_id(utterance: Utterance, seen: set[str]) -> Utterance:
    """Number an id that was seen before: file names inside archives repeat, and nobody can mend them there."""
    unique, number = utterance.id, 2
    while unique in seen:
        unique, number = f"{utterance.id}#{number}", number + 1
    seen.add(unique)
    return utterance if unique == utterance.id else replace(utterance, id=unique)


def split_of(path: Path) -> str | None:
    """Return the split that a file's or folder's name says, the nearest first; None where none does."""
    for part in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def utterance_from_row(
    row: dict[str, Any],
    audio: Path | bytes | ParquetCell,
    *,
    text_column: str,
    audio_name: str | None,
    fallback_id: str,
) -> Utterance:
    """Build an utterance from a row's plain columns.

    Args:
        row: without the recording.
        audio_name: file name of the recording, its id where the row has none.
        fallback_id: where there is no file name either.
    """
    speaker = next((row[c] for c in SPEAKER_COLUMNS if row.get(c) not in (None, "")), None)
    language = next((row[c] for c in LANGUAGE_COLUMNS if isinstance(row.get(c), str) and row[c]), None)
    given_id = row.get("id")
    name = PurePosixPath(audio_name).stem if audio_name else ""
    taken = {text_column, "id", "path", "file", *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS}
    return Utterance(
        id=str(given_id) if given_id not in (None, "") else name or fallback_id,
        audio=audio,
        text=str(row.get(text_column) or ""),
        speaker=None if speaker is None else str(speaker),
        language=language,
        meta={
            k: v for k, v in row.items() if k not in taken and (v is None or isinstance(v, str | int | float | bool))
        },
    )


def _read_file(file: Path, split: str | None, audio_column: str | None, text_column: str | None) -> Iterator[Utterance]:
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            audio_column = audio_column or _find_audio_column(schema, file)
            plain = [f.name for f in schema if f.name != audio_column and not pa.types.is_nested(f.type)]
            text_column = text_column or pick_column(plain, TEXT_COLUMNS, "text", str(file))
            if text_column not in plain:
                raise DataError(f"{file}: no column {text_column!r}; it has {', '.join(schema.names)}")
            is_struct = pa.types.is_struct(schema.field(audio_column).type)
            wanted = [*plain, *([f"{audio_column}.path"] if is_struct else [])]
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=wanted, use_threads=False).to_pylist()
                for number, row in enumerate(rows):
                    path = (row.pop(audio_column) or {}).get("path") if is_struct else None
                    utterance = utterance_from_row(
                        row,
                        ParquetCell(file, group, number, audio_column),
                        text_column=text_column,
                        audio_name=path or row.get("path") or row.get("file"),
                        fallback_id=f"{file.stem}-{group}-{number}",
                    )
                    yield utterance if split is None or "split" in row else _with_split(utterance, split)
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"{file}: not a Parquet file that can be read: {err}; fetch it again") from err


def _find_audio_column(schema: pa.Schema, file: Path) -> str:
    layout = [f.name for f in schema if pa.types.is_struct(f.type) and "bytes" in {sub.name for sub in f.type}]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    found: list[str] = layout or binary
    if len(found) == 1:
        return found[0]
    if found:
        return pick_column(found, AUDIO_COLUMNS, "audio", f"{file} ({len(found)} columns with recordings)")
    raise DataError(
        f"{file}: no column with recordings among {', '.join(schema.names)}; the Hugging Face audio layout has a "
        "struct of `bytes` and `path` (datasets' to_parquet writes it)"
    )


def _with_split(utterance: Utterance, split: str) -> Utterance:
    return replace(utterance, meta={**utterance.meta, "split": split})


class _RowGroupCache:
    """The newest recordings columns of row groups, up to `KEPT_BYTES`; shared by the threads of a process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, row_group: int, column: str) -> pa.ChunkedArray:
        key = (path, row_group, column)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            with pq.ParquetFile(path) as file:
                array = file.read_row_group(row_group, columns=[column], use_threads=False).column(column)
        except (pa.ArrowInvalid, OSError) as err:
            raise AudioError(f"{path}, row group {row_group}: cannot be read: {err}; fetch the file again") from err
        with self._lock:
            if key not in self._kept:
                self._kept[key] = array
                self._bytes += array.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return array


_ROW_GROUPS = _RowGroupCache()
