"""Folders with a manifest: a CSV, TSV or JSONL file that says which recording has which transcript.

What spreadsheets write is read as it is; what cannot be read is refused with the line's number. pandas
fills short rows with empty cells, ends a cell at a NUL, and counts records instead of lines.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.sources.parts import part_of_row
from src.data.utterance import EncodedAudio, Utterance
from src.utils.errors import DataError, SourceUnavailableError, did_you_mean
from src.utils.languages import code_of_language

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".webm", ".aac", ".wma", ".mkv"})
AUDIO_COLUMNS = ("file", "file_name", "path", "audio", "audio_path", "filename", "wav")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
LANGUAGE_COLUMNS = ("language", "lang", "locale", "language_code", "lang_id")
NO_LANGUAGE = frozenset({"auto", "und", "mul", "mis", "zxx", "nan", "none", "null", "n/a", "unknown", "other"})
MANIFEST_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})

Row = dict[str, Any]


def read_folder(path: Path) -> list[Utterance]:
    """List the recordings of a folder's manifest (`metadata.csv` first), or of a manifest given itself."""
    if path.is_file():
        if path.suffix.lower() not in MANIFEST_SUFFIXES:
            raise DataError(f"{path}: a manifest ends in .csv, .tsv or .jsonl")
        return utterances_from_rows(path)
    if not path.is_dir():
        raise SourceUnavailableError(f"{path}: no such folder; set data.path to one with audio and a CSV, TSV or JSONL")
    found = [path / name for name in MANIFEST_NAMES if (path / name).is_file()][:1]
    found = found or sorted(p for p in path.iterdir() if p.suffix.lower() in MANIFEST_SUFFIXES)
    if len(found) == 1:
        return utterances_from_rows(found[0])
    if found:
        raise DataError(f"{path}: several manifests ({', '.join(p.name for p in found)}); set data.path to one of them")
    audio = sum(p.suffix.lower() in AUDIO_SUFFIXES for p in path.rglob("*"))
    if audio:
        raise SourceUnavailableError(f"{path}: {audio} recording(s), no manifest; add metadata.csv (file_name,text)")
    raise SourceUnavailableError(f"{path}: no recording and no manifest; add audio and metadata.csv (file_name,text)")


def utterances_from_rows(
    manifest: Path, *, audio_dir: Path | None = None, quoted: bool = True, **meta: Any
) -> list[Utterance]:
    """Turn a manifest's rows into utterances, each with `meta`.

    File names are relative to `audio_dir`, by default the manifest's folder. Where not `quoted`, quotation marks are
    part of the text, as Common Voice writes them.
    """
    rows = list(read_rows(manifest, quoted=quoted))
    if not rows:
        raise DataError(f"{manifest}: no rows; expected one row per recording, with a file and a text column")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    audio_column = pick_column(columns, AUDIO_COLUMNS, "file", str(manifest))
    text_column = pick_column(columns, TEXT_COLUMNS, "text", str(manifest))
    lines: dict[str, int] = {}
    utterances = []
    for line, row in rows:
        name = str(row.pop(audio_column, None) or "")
        # spellings of the same name are tried where it is not there as written: Windows' backslashes, macOS' letters
        spellings = [name, name.replace("\\", "/")]
        spellings += [unicodedata.normalize(form, spelling) for form in ("NFC", "NFD") for spelling in spellings]
        folder = audio_dir or manifest.parent
        path = next((folder / s for s in spellings if name and (folder / s).exists()), folder / name)
        part = part_of_row(row, path, f"{manifest}, line {line}")
        utterance = utterance_from_row(
            {**row, "line": line, **meta},
            part or path,
            text_column=text_column,  # an empty text is refused by name when the data set is checked
            fallback_id=(f"{name} {part.times}" if part else name) or f"line {line}",
        )
        if lines.setdefault(utterance.id, line) != line:
            twice = f"the id {utterance.id!r} occurs twice, first in line {lines[utterance.id]}"
            raise DataError(f"{manifest}, line {line}: {twice}; remove one row, or add an `id` column")
        utterances.append(utterance)
    return utterances


def utterance_from_row(
    row: Mapping[str, Any], audio: Path | bytes | EncodedAudio, *, text_column: str, fallback_id: str,
    language: str | None = None,
) -> Utterance:  # fmt: skip
    """Build an utterance from a row's plain columns; `fallback_id` and `language` are for rows without their own."""
    speaker = next((row[c] for c in SPEAKER_COLUMNS if row.get(c) not in (None, "")), None)
    spoken = language_of_row(row) or language
    taken = {text_column, "id", "path", "file", *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS}
    plain = (str, int, float, bool, type(None))
    return Utterance(
        id=str(row["id"]) if row.get("id") not in (None, "") else fallback_id,
        audio=audio,
        text=str(row.get(text_column) or ""),
        speaker=None if speaker is None else str(speaker),
        language=spoken,
        meta={key: value for key, value in row.items() if key not in taken and isinstance(value, plain)},
    )


def language_of_row(row: Mapping[str, Any]) -> str | None:
    """Return Whisper's code for a row's language, its own mark where Whisper has none, None where it has no mark."""
    marks = [str(row[c]).strip() for c in LANGUAGE_COLUMNS if isinstance(row.get(c), str)]
    marks = [mark for mark in marks if mark.lower() not in NO_LANGUAGE and any(map(str.isalpha, mark))]
    return next(filter(None, map(code_of_language, marks)), marks[0] if marks else None)


def pick_column(columns: Sequence[str], known: Sequence[str], meaning: str, where: str) -> str:
    """Return the first known name among columns, or raise `DataError` with those that exist and the nearest name."""
    for name in known:
        if name in columns:
            return name
    hint = next((h for c in columns if (h := did_you_mean(c.lower(), known))), "")
    wanted = " or ".join(known[:4])
    raise DataError(f"{where}: no {meaning} column among {', '.join(columns)}; name one of them {wanted}{hint}")


def read_rows(manifest: Path, *, quoted: bool = True) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) with column names stripped and in lower case; cells of CSV and TSV stay text."""
    try:
        data = manifest.read_bytes()
    except OSError as err:
        raise SourceUnavailableError(f"{manifest}: cannot be read: {err.strerror}") from err
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # spreadsheets' "Unicode text"
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise DataError(f"{manifest}, line {line}: not UTF-8 (byte {err.start}); save it again as UTF-8") from err
    yield from _read_jsonl(manifest, text) if manifest.suffix.lower() == ".jsonl" else _read_csv(manifest, text, quoted)


def _read_jsonl(manifest: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as err:
            raise DataError(f"{manifest}, line {number}: not JSON: {err}") from err
        if not isinstance(row, dict):
            raise DataError(f"{manifest}, line {number}: expected an object with a file and a text")
        yield number, {str(key).strip().lower(): value for key, value in row.items()}


def _read_csv(manifest: Path, text: str, quoted: bool) -> Iterator[tuple[int, Row]]:
    delimiters = "\t" if manifest.suffix.lower() == ".tsv" else ",;\t"  # the first under which a header makes sense
    first = text.split("\n", 1)[0].rstrip("\r").lower()
    headers = {mark: {name.strip().strip('"') for name in first.split(mark)} for mark in delimiters}
    fit = [m for m, names in headers.items() if names & set(AUDIO_COLUMNS) and names & set(TEXT_COLUMNS)]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=(fit or delimiters)[0],
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{manifest}, line 1: the column {repeated[0]!r} occurs twice; rename one")
        for cells in filter(None, reader):  # an empty line has no cells
            if len(cells) != len(header):
                what = f"the row has {len(cells)} cells, not the {len(header)} columns of the header"
                raise DataError(f"{manifest}, line {reader.line_num}: {what}; quote a text that holds the delimiter")
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as err:
        raise DataError(f"{manifest}, line {reader.line_num}: {err}") from err
