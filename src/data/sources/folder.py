"""Folders of recordings with a manifest that says which has which transcript: CSV, JSON lines, or a toolkit's own."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.data.sources.manifest import (
    AUDIO_COLUMNS,
    MANIFEST_NAMES,
    TEXT_COLUMNS,
    find_audio,
    is_manifest,
    pick_column,
    read_rows,
    text_of,
)  # fmt: skip
from src.data.sources.parts import part_of_row
from src.data.utterance import SPLIT_NAMES, EncodedAudio, Utterance, split_of, with_unique_ids
from src.utils.errors import DataError, SourceUnavailableError, visible
from src.utils.languages import code_of_language

# what `src.data.audio` decodes
# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".wav", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".ogv", ".opus", ".spx", ".mp3", ".mp2", ".mpga",
    ".m4a", ".m4b", ".m4v", ".mp4", ".mov", ".qt", ".3gp", ".3g2", ".3ga", ".webm", ".weba", ".mkv", ".mka", ".aac",
    ".ac3", ".eac3", ".dts", ".wma", ".wmv", ".asf", ".avi", ".flv", ".f4v", ".mpg", ".mpeg", ".vob", ".ts", ".mts",
    ".m2ts", ".mxf", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist", ".amr", ".awb", ".wv",
    ".tta", ".ape", ".voc", ".dss",
})
# fmt: on
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")
NO_SPEAKER = frozenset({"nan", "NaN", "None", "null", "NULL", "N/A", "<NA>"})
LANGUAGE_COLUMNS = ("language", "lang", "locale", "language_code", "lang_id")
NO_LANGUAGE = frozenset({"auto", "und", "mul", "mis", "zxx", "nan", "none", "null", "n/a", "unknown", "other"})
MAX_DEPTH = 3  # of folders below a set's own, in which manifests are looked for
_LINE_END = re.compile(r"\s*[\n\r\t\v\f\x1c-\x1f\x85\u2028\u2029]\s*")

Row = dict[str, Any]


def read_folder(path: Path) -> list[Utterance]:
    """List the recordings of a folder's manifest (`metadata.csv` first), or of a manifest given itself.

    Several manifests are one set where their names or folders say the splits (`train/metadata.csv`, `test.csv`), or
    where each lies in a folder of its own.
    """
    if path.is_file():
        if not is_manifest(path):
            raise DataError(f"{path}: a manifest ends in .csv, .tsv, .jsonl, .jsonl.gz or .json, or is Kaldi's wav.scp")
        return utterances_from_rows(path)
    if not path.is_dir():
        raise SourceUnavailableError(f"{path}: no such folder; set data.path to one with audio and a CSV, TSV or JSONL")
    found = find_manifests(path)
    if len(found) == 1:
        return utterances_from_rows(found[0])
    if found:
        splits = {manifest: split_of(manifest.relative_to(path)) for manifest in found}
        for manifest, split in splits.items():
            beside = [m for m in found if m.parent == manifest.parent and (split is None or splits[m] == split)]
            if len(beside) > 1:
                names = ", ".join(m.name for m in beside)
                raise DataError(f"{manifest.parent}: several manifests ({names}); set data.path to one of them")
        listed: list[Utterance] = []
        for manifest, split in splits.items():
            meta: dict[str, Any] = {"split": split} if split else {}
            prefix = "/".join([*manifest.parent.relative_to(path).parts, ""])
            listed += utterances_from_rows(manifest, prefix=prefix, **meta)
        return list(with_unique_ids(listed))
    audio = sum(p.suffix.lower() in AUDIO_SUFFIXES for p in path.rglob("*"))
    if audio:
        raise SourceUnavailableError(
            f"{path}: {audio} recording(s), no manifest; add metadata.csv (file_name,text), "
            "or their transcripts (talk.srt or talk.txt for talk.mp3)"
        )
    raise SourceUnavailableError(f"{path}: no recording and no manifest; add audio and metadata.csv (file_name,text)")


def find_manifests(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """Return the manifest of a folder by its name, else all there are in it, else those of the folders in it.

    Captions that a tool wrote for a recording there, such as `talk.tsv` for `talk.mp3`, are none.
    """
    named = [folder / name for name in MANIFEST_NAMES if (folder / name).is_file()][:1]
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    listed = [] if named else [path for path in inside if is_manifest(path) and path.is_file()]
    captioned = {path.stem for path in inside if path.suffix.lower() in AUDIO_SUFFIXES} if listed else set()
    found = named or [path for path in listed if path.stem not in captioned and _is_listing(path)]
    for wanted in ("cuts", "supervisions"):  # of lhotse; the recordings are read with them
        if any("recordings" in path.name for path in found):
            found = [path for path in found if wanted in path.name and ".json" in path.name] or found
    if found or not depth:
        return found
    return [path for each in inside if each.is_dir() for path in find_manifests(each, depth - 1)]


def _is_listing(path: Path) -> bool:
    """Whether a file lists recordings; of `.json` files, which may be anything, if its first line does."""
    if not path.name.lower().endswith((".json", ".json.gz")):
        return True
    try:
        return any(set(AUDIO_COLUMNS) & row.keys() for _, row in itertools.islice(read_rows(path), 1))
    except DataError:
        return False


def utterances_from_rows(
    manifest: Path, *, audio_dir: Path | None = None, quoted: bool = True, prefix: str = "", **meta: Any
) -> list[Utterance]:
    """Turn a manifest's rows into utterances, each with `meta`, unless a row says its split.

    File names are relative to `audio_dir`, by default the manifest's folder. Where not `quoted`, quotation marks are
    part of the text, as Common Voice writes them. `prefix` goes before the names that serve as ids.
    """
    rows = list(read_rows(manifest, quoted=quoted))
    if not rows:
        raise DataError(f"{manifest}: no rows; expected one row per recording, with a file and a text column")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    audio_column = pick_column(columns, AUDIO_COLUMNS, "file", str(manifest))
    text_column = pick_column(columns, TEXT_COLUMNS, "text", str(manifest))
    lines: dict[str, int] = {}
    utterances: list[Utterance] = []
    folders: list[str | None] = []  # the split that the first folder of each name is called
    for line, row in rows:
        cell = row.pop(audio_column, None)
        cell = cell.get("path") if isinstance(cell, dict) else cell  # as datasets writes it
        row = {key: None if value != value else value for key, value in row.items()}
        name, problem = "", "the row names no recording; fill it in or remove the row"
        try:
            name = text_of(cell).strip()
        except ValueError as err:
            problem = f"the row's {audio_column} is {err}; write a path"
        path = find_audio(audio_dir or manifest.parent, name)
        part = part_of_row(row, path, f"{manifest}, line {line}")
        shown = f"{name} {part.times}" if part else name
        utterance = utterance_from_row(
            {**row, "line": line, **({} if row.get("split") else meta)},
            part or path,
            text_column=text_column,  # an empty text is refused by name when the data set is checked
            fallback_id=f"{prefix}{shown}" if name else f"line {line}",
        )
        if not name:
            utterance = replace(utterance, problem=problem)
        if lines.setdefault(utterance.id, line) != line:
            twice = f"the id {utterance.id!r} occurs twice, first in line {lines[utterance.id]}"
            raise DataError(f"{manifest}, line {line}: {twice}; remove one row, or add an `id` column")
        utterances.append(utterance)
        folders.append(SPLIT_NAMES.get(re.split(r"[/\\]", name)[0].lower()))
    if "split" in {*columns, *meta} or None in folders or len(set(folders)) < 2:
        return utterances
    parts = zip(utterances, folders, strict=True)  # Hugging Face's AudioFolder with one list: train/a.wav, test/b.wav
    return [replace(utterance, meta={**utterance.meta, "split": split}) for utterance, split in parts]


def utterance_from_row(
    row: Mapping[str, Any], audio: Path | bytes | EncodedAudio, *, text_column: str, fallback_id: str,
    language: str | None = None,
) -> Utterance:  # fmt: skip
    """Build an utterance from a row's plain columns; `fallback_id` and `language` are for rows without their own.

    Line ends inside a transcript become spaces. Control characters and lone surrogates are escapes in ids and all that
    is printed; a transcript that has them, or is no text at all, is the utterance's `problem`.
    """
    problem = None
    cells = {"id": "", text_column: "", "speaker": ""}
    for name, columns in {"id": ("id",), text_column: (text_column,), "speaker": SPEAKER_COLUMNS}.items():
        try:
            cells[name] = next(filter(None, (text_of(row.get(column)).strip() for column in columns)), "")
        except ValueError as err:
            what = "transcript" if name == text_column else name
            problem = f"the {what} is wrong: {err}; write a text"
    text = _LINE_END.sub(" ", cells[text_column])
    if visible(text) != text:
        strange = next(visible(char) for char in text if visible(char) != char)
        problem = f"the transcript has the character {strange}, which is no text; remove it"
    speaker = re.sub(r"^(\d+)\.0+$", r"\1", cells["speaker"])  # a column of numbers that pandas made floats
    taken = {text_column, "id", "path", "file", *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS}
    meta = {key: visible(value.strip()) if isinstance(value, str) else value for key, value in row.items()}
    return Utterance(
        id=visible(cells["id"] or fallback_id),
        audio=audio,
        text=text,
        speaker=visible(speaker) if speaker and speaker not in NO_SPEAKER else None,
        language=language_of_row(row) or language,
        meta={key: value for key, value in meta.items() if key not in taken and _is_plain(value)},
        problem=problem,
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | type(None)) or (isinstance(value, float) and math.isfinite(value))


def language_of_row(row: Mapping[str, Any]) -> str | None:
    """Return Whisper's code for a row's language, its own mark where Whisper has none, None where it has no mark."""
    marks = [visible(row[c].strip()) for c in LANGUAGE_COLUMNS if isinstance(row.get(c), str)]
    marks = [mark for mark in marks if mark.lower() not in NO_LANGUAGE and any(map(str.isalpha, mark))]
    return next(filter(None, map(code_of_language, marks)), marks[0] if marks else None)
