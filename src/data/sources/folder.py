"""Folders of recordings with a manifest that says which has which transcript: CSV, JSON lines, or a toolkit's own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.data.audio import AUDIO_SUFFIXES
from src.data.sources.manifest import (
    AUDIO_COLUMNS,
    TEXT_COLUMNS,
    find_audio,
    find_manifests,
    is_manifest,
    pick_column,
    read_rows,
)  # fmt: skip
from src.data.sources.parts import part_of_row
from src.data.utterance import SPLIT_NAMES, Utterance, split_of, text_of, utterance_from_row, with_unique_ids
from src.utils.errors import DataError, SourceUnavailableError


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
    if any(path.rglob("*.parquet")):
        raise SourceUnavailableError(f"{path}: no manifest, but Parquet files; set data.source: parquet")
    raise SourceUnavailableError(f"{path}: no recording and no manifest; add audio and metadata.csv (file_name,text)")


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
        name, problem = "", None
        try:
            name = text_of(cell).strip()
            problem = None if name else "the row names no recording; fill it in or remove the row"
        except ValueError as err:
            problem = f"the row's {audio_column} is {err}; write a path"
        path = find_audio(audio_dir or manifest.parent, name)
        part = None
        try:
            part = part_of_row(row, path)
        except DataError as err:
            problem = str(err)
        shown = f"{name} {part.times}" if part else f"{name} line {line}".strip() if problem else name
        utterance = utterance_from_row(
            {**row, "line": line, **({} if row.get("split") else meta)},
            part or path,
            text_column=text_column,  # an empty text is refused by name when the data set is checked
            fallback_id=f"{prefix}{shown}",
        )
        if problem:
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
