"""Manifests: rows that say which recording has which transcript, in whatever form a spreadsheet or toolkit writes them.

What spreadsheets write is read as it is; what cannot be read is refused with the line's number. pandas fills short rows
with empty cells, ends a cell at a NUL, and counts records instead of lines.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import logging
import os
import re
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from src.data.audio import AUDIO_SUFFIXES
from src.utils.errors import DataError, SourceUnavailableError, did_you_mean, first_line, visible
from src.utils.files import parse_json, read_plain

logger = logging.getLogger(__name__)

AUDIO_COLUMNS = (
    "file", "file_name", "path", "audio", "audio_path", "filename", "wav", "audio_filepath", "filepath", "file_path",
    "wav_filename",
)  # fmt: skip
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
MANIFEST_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.parquet", "wav.scp")
MAX_DEPTH = 3  # of folders below a set's own, in which manifests are looked for
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
MAX_UNPACKED_BYTES, MAX_RATIO = 64 << 20, 100  # of a .gz, the larger one; manifests of a million rows have about 20
_BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_WESTERN = re.compile(
    r"[\s -~…’‘“”„–—«»€£§°·¿¡ºªÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØŒÙÚÛÜŸßàáâãäåæçèéêëìíîïñòóôõöøœùúûüÿ]*"
)  # what other code pages than 1252 hardly look like
_FOREIGN = re.compile(r"[À-ÿŒœŸ]{3}")
_UTF8 = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")
_STRAY = "\"'\ufeff\u200b\u200e\u200f\u202a\u202c"  # around names that were copied from somewhere

Row = dict[str, Any]


@dataclass(frozen=True)
class ManifestRows:
    """(line number, row) of each recording, parsed in each iteration: a list of a million rows takes 700 MB."""

    parse: Callable[[], Iterator[tuple[int, Row]]]

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return self.parse()


def is_manifest(path: Path) -> bool:
    """Whether a file's name is that of a manifest."""
    return path.name.lower() in MANIFEST_NAMES or path.name.lower().endswith(MANIFEST_SUFFIXES)


def find_manifests(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """Return the manifest of a folder by its name, else all there are in it, else those of the folders in it.

    Captions that a tool wrote for a recording there, such as `talk.tsv` for `talk.mp3`, name no file and are none.
    """
    for name in MANIFEST_NAMES:
        if (folder / name).is_file():
            return [folder / name]
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    listed = [path for path in inside if is_manifest(path) and path.is_file()]
    captioned = {path.stem for path in inside if path.suffix.lower() in AUDIO_SUFFIXES} if listed else set()
    unclear = [path for path in listed if path.stem in captioned or path.name.lower().endswith((".json", ".json.gz"))]
    found = [path for path in listed if path not in unclear or _is_listing(path)]
    found = found or [path for path in unclear if path.stem == "metadata"]  # reading it says what is wrong with it
    for wanted in ("cuts", "supervisions"):  # of lhotse; the recordings are read with them
        if any("recordings" in path.name for path in found):
            found = [path for path in found if wanted in path.name and ".json" in path.name] or found
    if found or not depth:
        return found
    return [path for each in inside if each.is_dir() for path in find_manifests(each, depth - 1)]


def _is_listing(path: Path) -> bool:
    """Whether the first row of a file names a recording; of `.json` files, which may be anything, and captions."""
    try:
        return any(set(AUDIO_COLUMNS) & row.keys() for _, row in itertools.islice(read_rows(path), 1))
    except DataError:
        return False


def read_rows(manifest: Path, *, quoted: bool = True) -> ManifestRows:
    """Return the rows of a manifest, with column names in lower case and without spaces.

    Cells of CSV and TSV stay text. Rows of Kaldi (a folder's `wav.scp`) and lhotse (recordings with supervisions, or
    cuts) have the columns `id`, `file`, `text`, `speaker` and `language`, and for a part of a recording `offset` and
    `duration` in seconds. LJSpeech (`|`, no header) has `id`, `file` and `text`. NeMo's are JSON lines like others.
    """
    name = manifest.name.lower()
    if name == "wav.scp":
        return ManifestRows(lambda: _read_kaldi(manifest))
    if name.endswith(".parquet"):
        return ManifestRows(lambda: _read_parquet(manifest))
    text = read_text(manifest)
    if name.endswith((".csv", ".tsv")):
        return ManifestRows(lambda: _read_csv(manifest, text, quoted))
    return ManifestRows(lambda: _without_lhotse(manifest, _read_json(manifest, text)))


def to_csv(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as a manifest's text, as `read_rows` takes it; a column that a row lacks stays empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def find_audio(folder: Path, name: str) -> Path:
    """Return the path of a recording that a manifest names, relative to its folder.

    Where it is not there as written, other spellings of the name are tried: without surrounding spaces and quotes, with
    Windows' backslashes as slashes, in macOS' form of letters or the usual one. A `file://` address is a path, and `~`
    the home.
    """
    if name.startswith("file:/"):
        name = unquote(re.sub("^file:(//(localhost)?)?", "", name))
    # a name of 5,000 letters or with a zero byte is not there; of those that are, a path keeps no text of its own
    if name and os.path.exists(os.path.join(folder, name)):  # noqa: PTH110, PTH118
        return folder / name
    bare = name.strip().strip(_STRAY).strip()
    spellings = [name.strip(), bare, bare.replace("\\", "/"), os.path.expanduser(bare)]  # noqa: PTH111
    spellings += [unicodedata.normalize(form, spelling) for form in ("NFC", "NFD") for spelling in spellings]
    there = (folder / s for s in dict.fromkeys(spellings) if s and os.path.exists(folder / s))  # noqa: PTH110
    return next(there, folder / name)


def pick_column(columns: Sequence[str], meaning: str, where: str, *, also: Sequence[str] = ()) -> str:
    """Return the column of "text", or else of recordings, by its usual names and `also`.

    A `DataError` has those that exist and the nearest name.
    """
    known: tuple[str, ...] = (*(TEXT_COLUMNS if meaning == "text" else AUDIO_COLUMNS), *also)
    for name in known:
        if name in columns:
            return name
    hint = next((h for c in columns if (h := did_you_mean(c.lower(), known))), "")
    wanted = " or ".join(known[:4])
    there = f"{', '.join(map(visible, columns)):.300}"
    raise DataError(f"{where}: no {meaning} column among {there}; name one of them {wanted}{hint}")


# Bytes to text


def read_text(manifest: Path) -> str:
    """Read a text file in UTF-8 or UTF-16; CSV and TSV also in Windows-1252, with a warning, if it can be no other."""
    data = _read_bytes(manifest)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and 0 in data[:2]:  # a spreadsheet's "Unicode text", without its mark
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        is_whole = err.reason != "unexpected end of data" and encoding == "utf-8-sig"
        is_table = manifest.suffix.lower() in (".csv", ".tsv")
        if is_table and is_whole and (western := decode_western(data)) is not None:
            word = next(word for word in re.split(r"[\s,;|]+", western) if not word.isascii())
            what = "not UTF-8, read as Windows-1252, for example %r; if that is wrong, save it again as UTF-8"
            logger.warning(f"%s, line %d: {what}", manifest, line, word)
            return western
        raise DataError(f"{manifest}, line {line}: not UTF-8 (byte {err.start}); save it again as UTF-8") from err


def decode_western(data: bytes) -> str | None:
    """Read a text in Windows-1252 if it can be no other: neither another code page, nor UTF-8 with damaged bytes."""
    text = data.decode("cp1252", "replace")
    return text if not _UTF8.search(data) and _WESTERN.fullmatch(text) and not _FOREIGN.search(text) else None


def _read_bytes(manifest: Path) -> bytes:
    try:
        content = read_plain(manifest)
        if not manifest.name.lower().endswith(".gz"):
            return content
        limit = max(MAX_UNPACKED_BYTES, MAX_RATIO * len(content))
        with gzip.open(io.BytesIO(content)) as file:
            data = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise DataError(f"{manifest}: damaged ({first_line(err)}); fetch it again") from err
    except OSError as err:
        raise SourceUnavailableError(f"{manifest}: cannot be read: {err.strerror}") from err
    if len(data) > limit:
        raise DataError(f"{manifest}: unpacks to more than {limit >> 20} MB; unpack it yourself if you trust it")
    return data


# JSON lines, a JSON array, Parquet


def _read_json(manifest: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold U+2028
        if not line.strip():
            continue
        try:
            is_array = line.lstrip().startswith("[") and number == 1
            found = parse_json(text if is_array else line)
        except ValueError as err:
            raise DataError(f"{manifest}, line {number}: not JSON: {err}") from err
        for row in found if is_array else [found]:
            if not isinstance(row, dict):
                raise DataError(f"{manifest}, line {number}: expected an object with a file and a text")
            yield number, {_column(str(key)): value for key, value in row.items()}
        if is_array:
            return


def _read_parquet(manifest: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(manifest, use_threads=False).to_pylist()
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"{manifest}: not a Parquet file that can be read: {err}; fetch it again") from err
    for number, row in enumerate(rows, start=1):
        yield number, {_column(name): value for name, value in row.items()}


# CSV and its relatives


def _read_csv(manifest: Path, text: str, quoted: bool) -> Iterator[tuple[int, Row]]:
    delimiters = "\t,;|" if manifest.suffix.lower() == ".tsv" else ",;\t|"
    says = re.match(r'(\s*)"?sep=(.)"?[,;\t ]*\r?(?=\n)', text, re.IGNORECASE)  # Excel's own line before the header
    if says:
        text, delimiters = says[1] + text[says.end() :], says[2]
    # the first delimiter under which the header makes sense
    first = next((line for line in text.split("\n") if line.strip()), "")
    headers = {mark: {_column(name.strip().strip('"')) for name in first.split(mark)} for mark in delimiters}
    fit = [mark for mark, names in headers.items() if names & set(AUDIO_COLUMNS) and names & set(TEXT_COLUMNS)]
    fit += [mark for mark, names in headers.items() if names & set(AUDIO_COLUMNS)]
    if not fit and "|" in first:
        yield from _read_ljspeech(manifest, text)
        return
    delimiter = (fit or delimiters)[0]
    rows = _cells_of(manifest, text, delimiter, quoted)
    line, names = next(rows, (0, []))
    header = [_column(name) for name in names]
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{manifest}, line {line}: the column {repeated[0]!r} occurs twice; rename one")
    for line, cells in rows:
        while len(cells) > len(header) and not cells[-1].strip():  # spreadsheets pad rows
            cells.pop()
        if len(cells) != len(header):
            what = f"the row has {len(cells)} cells, not the {len(header)} columns of the header"
            raise DataError(f"{manifest}, line {line}: {what}; quote a text that holds the delimiter")
        yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _column(name: str) -> str:
    """Return a column's name as the code writes it: `file_name` of "File name"."""
    return re.sub(r"[\s-]+", "_", name.strip().strip("\ufeff").lower())


def _cells_of(manifest: Path, text: str, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Return the cells of each row that is not blank, with the number of its last line."""

    def parse(text: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=quoted, skipinitialspace=quoted)
        try:
            yield from ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
        except csv.Error as err:
            raise DataError(f"{manifest}, line {reader.line_num}: {err}") from err

    if not quoted:
        return parse(text, quoted=False)
    mark = re.escape(delimiter)
    try:
        deque(parse(text, quoted=True), maxlen=0)  # to its end: another way of reading is for the whole
        return parse(text, quoted=True)
    except DataError:
        tidied = re.sub(rf'((?:^|{mark}) *"(?:[^"]|"")*") +(?={mark}|\r?$)', r"\1", text, flags=re.MULTILINE)
        if tidied != text:  # spaces after a closing quote
            return parse(tidied, quoted=True)
        if delimiter in ",;":
            raise
        return parse(text, quoted=False)  # tabs and bars need no quotes: a text begins with one


def _read_ljspeech(manifest: Path, text: str) -> Iterator[tuple[int, Row]]:
    """Read `id|text|normalised text` without a header; the recordings are `wavs/<id>.wav`, or named by their path."""
    wavs = manifest.parent / "wavs"
    there = {path.stem: f"wavs/{path.name}" for path in wavs.iterdir()} if wavs.is_dir() else {}
    for number, line in enumerate(text.split("\n"), start=1):
        name, *texts = (cell.strip() for cell in line.split("|"))
        if not line.strip():
            continue
        file = there.get(name) or (f"wavs/{name}.wav" if there and not Path(name).suffix else name)
        if number == 1 and not find_audio(manifest.parent, file).exists():
            what = f"no file column among {line.strip():.200}, and no recording wavs/{name[:100]}.wav"
            raise DataError(f"{manifest}, line 1: {what}; begin with a header such as file|text")
        if not texts:
            raise DataError(f"{manifest}, line {number}: the row has 1 cell; expected a name and a text")
        yield number, {"id": name, "file": file, "text": texts[0], "normalized_text": "|".join(texts[1:]) or None}


# Kaldi and lhotse


def _read_kaldi(scp: Path) -> Iterator[tuple[int, Row]]:
    """Read wav.scp with the text, utt2spk, utt2lang and segments next to it."""
    tables: dict[str, dict[str, tuple[int, str]]] = {}
    for name in ("wav.scp", "text", "utt2spk", "utt2lang", "segments"):
        table = tables.setdefault(name, {})
        path = scp.with_name(name)
        lines = read_text(path).split("\n") if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            key, _, rest = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
            if key in table:
                raise DataError(f"{path}, line {number}: {key!r} occurs twice, first in line {table[key][0]}")
            if key:
                table[key] = number, rest.strip()
    recordings, segments = tables["wav.scp"], tables["segments"]
    for utterance, (number, rest) in (segments or recordings).items():
        row: Row = {"id": utterance}
        recording, file = utterance, rest
        if segments:
            try:
                recording, start, end = rest.split()[:3]
                row |= {"offset": float(start), "duration": float(end) - float(start) if float(end) >= 0 else None}
                file = recordings[recording][1]
            except (KeyError, ValueError) as err:
                what = "expected an utterance, a recording of wav.scp, its start and its end"
                raise DataError(f"{scp.with_name('segments')}, line {number}: {what} ({err})") from err
        if file.endswith("|"):
            what = f"{recording} is a command, which is not run; run it yourself and write the recordings as files"
            raise DataError(f"{scp}, line {recordings[recording][0]}: {what}")
        row |= {"file": _from_root(scp.parent, file), "text": tables["text"].get(utterance, (0, ""))[1]}
        row |= {"speaker": tables["utt2spk"].get(utterance, (0, None))[1]}
        yield number, row | {"language": tables["utt2lang"].get(utterance, (0, None))[1]}


def _without_lhotse(manifest: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Turn lhotse's recordings, supervisions and cuts into rows; others pass."""
    if (head := next(rows, None)) is None:
        return
    first, rows = head[1], itertools.chain([head], rows)
    is_recordings, is_cuts = isinstance(first.get("sources"), list), isinstance(first.get("supervisions"), list)
    is_supervisions = "recording_id" in first and not is_cuts and not set(AUDIO_COLUMNS) & first.keys()
    if not (is_recordings or is_cuts or is_supervisions):
        yield from rows
        return
    recordings: dict[str, Row] = {}
    if is_supervisions:
        path = manifest.with_name(manifest.name.replace("supervisions", "recordings"))
        if path == manifest or not path.is_file():
            raise DataError(f"{manifest}: lhotse's recordings of these supervisions are not next to it ({path.name})")
        recordings = {str(row.get("id")): row for _, row in _read_json(path, read_text(path))}
    for line, row in rows:
        try:
            if is_cuts and row["supervisions"]:
                spoken = [(row["recording"], each, row["start"] + each["start"]) for each in row["supervisions"]]
            elif is_cuts:
                spoken = [(row["recording"], {"id": row["id"], "duration": row["duration"]}, row["start"])]
            elif is_recordings:
                spoken = [(row, {"id": row["id"], "duration": row["duration"]}, 0.0)]
            else:
                spoken = [(recordings[row["recording_id"]], row, row["start"])]
            for recording, supervision, start_sec in spoken:
                (source,) = recording["sources"]
                if source["type"] != "file":
                    raise ValueError(f"a source of type {source['type']!r}; only files are read")
                if len(source.get("channels", (0,))) > 1:
                    raise ValueError("several channels; write each as a recording")
                found = {key: supervision.get(key) for key in ("id", "text", "speaker", "language", "gender")}
                found["file"] = _from_root(manifest.parent, source["source"])
                duration_sec = float(supervision["duration"])
                if start_sec > 0.01 or start_sec + duration_sec < float(recording["duration"]) - 0.01:
                    found |= {"offset": float(start_sec), "duration": duration_sec}
                yield line, found
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as err:
            what = "not a recording, supervision or cut of lhotse that can be read"
            raise DataError(f"{manifest}, line {line}: {what} ({err!r})") from err


def _from_root(folder: Path, name: str) -> str:
    """Return a path that is relative to where a toolkit was started, which is above its manifests."""
    found = (find_audio(parent, name) for parent in (folder, *folder.absolute().parents[:3]))
    return next((str(path.absolute()) for path in found if os.path.exists(path)), name)  # noqa: PTH110
