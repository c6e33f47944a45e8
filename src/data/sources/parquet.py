"""Parquet files in the Hugging Face audio layout, read cell by cell.

Recordings stay in their file and are read by row group when they are needed, with the newest row groups kept: a small
file lives in memory, and one larger than the memory works.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from src.data.audio import open_regular
from src.data.sources.archives import ALLOWED_BYTES, MAX_RATIO
from src.data.sources.manifest import find_audio, pick_column
from src.data.utterance import Utterance, split_of, utterance_from_row, with_unique_ids
from src.utils.errors import AudioError, DataError, SourceUnavailableError
from src.utils.files import parse_json

KEPT_BYTES = 256 << 20  # of row groups, per process
ROW_BYTES = 256  # that a row takes at least, whatever is in it

_kept: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()  # the newest, up to `KEPT_BYTES`
_lock = threading.Lock()  # the threads of a process share them


@dataclass(frozen=True, slots=True)  # there are as many as rows
class ParquetCell:
    """The recording in one row of a Parquet file."""

    path: Path
    row_group: int
    row: int  # in its row group
    column: str  # a struct of `bytes` and `path`, or plain bytes

    def read(self) -> bytes:
        """Return the bytes of the encoded recording; a path that is named instead is relative to the Parquet file."""
        cell = _read_row_group(self.path, self.row_group, self.column)[self.row].as_py()
        data, named = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return data
        if not named:
            raise AudioError(f"{self}: the cell holds no recording; remove the row")
        place = PureWindowsPath(str(named))  # takes slashes of both kinds
        if place.drive or place.root or ".." in place.parts:
            fix = "a Parquet file may name recordings below its own folder only; embed it"
            raise AudioError(f"{self}: names {named}, which lies elsewhere; {fix}")
        try:
            with open_regular(find_audio(self.path.parent, str(named))) as file:
                return file.readall()
        except (OSError, ValueError) as err:  # a zero byte in the path
            fix = "put it in the folder of the Parquet file, or embed it (datasets' embed_external_files)"
            why = getattr(err, "strerror", None) or err
            raise AudioError(f"{self}: names {named}, which cannot be read ({why}); {fix}") from err

    def __str__(self) -> str:
        return f"{self.path}, row group {self.row_group}, row {self.row}"


def _read_row_group(path: Path, row_group: int, column: str) -> pa.ChunkedArray:
    key = (path, row_group, column)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    try:
        with pq.ParquetFile(path) as file:
            array = _read_columns(file, path, row_group, [column], batch_rows=8).column(column)
    except (pa.ArrowException, OSError) as err:
        raise AudioError(f"{path}, row group {row_group}: cannot be read: {err}; fetch the file again") from err
    with _lock:
        _kept[key] = array
        while len(_kept) > 1 and sum(kept.nbytes for kept in _kept.values()) > KEPT_BYTES:
            _kept.popitem(last=False)
    return array


def _read_columns(
    parquet: pq.ParquetFile, path: Path, row_group: int, columns: list[str], *, batch_rows: int, spent: int = 0
) -> pa.Table:
    """Read a row group; raises `ArrowInvalid` if more comes out than speech in a file of this size can have.

    A value that is stored once and used by each row, or a page of zeros, needs few bytes in the file.
    """
    allowed = max(ALLOWED_BYTES, MAX_RATIO * path.stat().st_size) - spent
    promised = parquet.metadata.row_group(row_group).total_byte_size
    batches: list[pa.RecordBatch] = []
    for batch in (
        parquet.iter_batches(batch_rows, [row_group], columns, use_threads=False) if promised <= allowed else ()
    ):
        allowed -= batch.nbytes + ROW_BYTES * batch.num_rows
        batches.append(batch)
        if allowed < 0:
            break
    if promised > allowed or allowed < 0:
        raise pa.ArrowInvalid(f"row group {row_group} unpacks to {MAX_RATIO} times the file or more")
    return pa.Table.from_batches(batches) if batches else parquet.read_row_group(row_group, columns=columns)


def read_parquet(
    path: Path, *, audio_column: str | None = None, text_column: str | None = None, language: str | None = None
) -> list[Utterance]:
    """List the rows of one file, or of all files in a folder.

    Columns that are None are found by type and name. Where files are named after splits (`train/0000.parquet`,
    `train-00000-of-00002.parquet`) and there is no column `split`, the names say the split. `language` is of rows that
    do not say their own.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.parquet") if p.is_file())
    if not files:
        what = "no .parquet file in this folder" if path.exists() else "no such file or folder"
        raise SourceUnavailableError(f"{path}: {what}; set data.path to Parquet files")
    return list(with_unique_ids(u for f in files for u in _read_file(f, path, language, audio_column, text_column)))


def _read_file(
    file: Path, root: Path, language: str | None, audio_column: str | None, text_column: str | None
) -> Iterator[Utterance]:
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            audio_column = audio_column or _find_audio_column(schema, file)
            if audio_column not in schema.names:
                raise DataError(f"{file}: no column {audio_column!r}; it has {', '.join(schema.names)}")
            plain = [f.name for f in schema if f.name != audio_column and _is_plain(f.type)]
            text_column = text_column or pick_column(plain, "text", str(file))
            if text_column not in plain:
                raise DataError(f"{file}: no column {text_column!r}; it has {', '.join(schema.names)}")
            is_struct = pa.types.is_struct(schema.field(audio_column).type)
            wanted = [*plain, *([f"{audio_column}.path"] if is_struct else [])]
            split = split_of(file.relative_to(root))
            added = {"split": split} if split is not None and "split" not in plain else {}
            names = _class_names(schema)
            spent = 0
            for group in range(parquet.num_row_groups):
                table = _read_columns(parquet, file, group, wanted, batch_rows=64, spent=spent)
                spent += table.nbytes + ROW_BYTES * table.num_rows
                for number, row in enumerate(table.to_pylist()):
                    for column in names.keys() & row.keys():
                        row[column] = names[column].get(row[column])
                    named = (row.pop(audio_column) or {}).get("path") if is_struct else None
                    stem = PurePosixPath(named or row.get("path") or row.get("file") or "").stem
                    yield utterance_from_row(
                        {**row, **added}, ParquetCell(file, group, number, audio_column), text_column=text_column,
                        language=language, fallback_id=stem or f"{file.stem}-{group}-{number}",
                    )  # fmt: skip
    except (pa.ArrowException, OSError, ValueError, OverflowError) as err:  # or not UTF-8, or a date out of range
        raise DataError(f"{file}: not a Parquet file that can be read: {err}; fetch it again") from err


def _is_plain(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind) and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind)


def _class_names(schema: pa.Schema) -> dict[str, dict[Any, str]]:
    """Return the names of the numbers in columns that datasets wrote as `ClassLabel`."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    labels = {name: f["names"] for name, f in features.items() if isinstance(f, dict) and "names" in f}
    return {name: dict(enumerate(classes)) for name, classes in labels.items()}


def _find_audio_column(schema: pa.Schema, file: Path) -> str:
    layout = [f.name for f in schema if pa.types.is_struct(f.type) and "bytes" in {sub.name for sub in f.type}]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    found: list[str] = layout or binary
    if not found:
        fix = "it needs a struct of `bytes` and `path`, as datasets' to_parquet writes"
        raise DataError(f"{file}: no column with recordings among {', '.join(schema.names)}; {fix}")
    if len(found) == 1:
        return found[0]
    return pick_column(found, "audio", f"{file} ({len(found)} columns with recordings)")
