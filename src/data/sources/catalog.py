"""Where utterances come from: one adapter per source, all giving `Utterance`.

Nothing is decoded here. An unavailable source raises; only `data.sources` names others to try.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.data.audio import AUDIO_SUFFIXES
from src.data.sources.archives import unpack
from src.data.sources.hub import stream_hub
from src.data.sources.manifest import find_audio, find_manifests, is_manifest, pick_column, read_rows
from src.data.sources.parquet import read_parquet
from src.data.sources.parts import AudioPart, part_of_row
from src.data.sources.subtitles import find_transcribed
from src.data.utterance import (
    SPLIT_NAMES,
    AudioTrack,
    Utterance,
    split_of,
    text_of,
    utterance_from_row,
    with_unique_ids,
)  # fmt: skip
from src.utils.config import PATH_SOURCES, DataConfig, SourceName, flatten
from src.utils.errors import ConfigError, DataError, SourceUnavailableError
from src.utils.languages import parse_language
from src.utils.runtime import MOUNT_POINT, in_colab, upload_files

SAMPLES_DIR = Path(__file__).parents[1] / "samples"
SAMPLE_PARQUET = SAMPLES_DIR / "speechocean762-mini.parquet"  # 500 clips of SpeechOcean762, see samples/README.md
SAMPLE_CLIP = SAMPLES_DIR / "jfk.flac"
CLIP_TEXT = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."

Streams = dict[str, Iterator[Utterance]]
_MINDS14 = "cs-CZ de-DE en-US es-ES fr-FR it-IT ko-KR nl-NL pl-PL pt-PT ru-RU zh-CN"  # of English also en-GB and en-AU
MINDS14_SUBSETS = {subset[:2]: subset for subset in _MINDS14.split()}  # by language


def choose_data(
    choice: str, path: str = "", language: str | None = None, *, hub: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return settings of `data` for what a user of the notebook chose.

    Args:
        choice: a source; "auto" takes a path or data set that is named, else in Colab telephone speech of MInDS-14 in
            the language, for English with the bundled sample where the Hub does not answer, and elsewhere the sample;
            "upload" asks for files.
        path: of a folder or archive, also one below "My Drive".
        language: of the speech, in any notation; None or "auto" takes English for MInDS-14.
        hub: more of `data.hub`.
        overrides: settings that go before; if they name a source, nothing is chosen.

    Raises:
        ConfigError: MInDS-14 has no such language, or the path is nowhere, or the source needs one or takes none.
        DataError: the language is none.
        WhisperASRError: no file was uploaded.
    """
    if {"data.source", "data.sources", "data.mix"} & set(flatten(overrides or {})):
        return {}
    options = {key: value for key, value in hub.items() if value}
    names_nothing = choice == "auto" and not path and "id" not in options
    if choice == "auto":
        choice = "folder" if path else "hub" if "id" in options else "minds14" if in_colab() else "sample"
    if path and choice not in PATH_SOURCES:
        raise ConfigError(
            f"DATA_PATH {path!r}: {choice} takes no path; choose {', '.join(PATH_SOURCES)}, or empty DATA_PATH"
        )
    if choice == "upload":
        return {"source": "folder", "path": str(upload_files())}
    spoken = parse_language(language) if language and language != "auto" else "en"
    if choice == "minds14":
        if "config" not in options and spoken not in MINDS14_SUBSETS:
            known = ", ".join(MINDS14_SUBSETS)
            raise ConfigError(f"MInDS-14 has no language {language!r}, only {known}; choose another DATA_SOURCE")
        options = {"config": MINDS14_SUBSETS.get(spoken), **options}
        falls_back = names_nothing and spoken == "en"
        return {"source": "minds14", "sources": ["minds14", "sample"] if falls_back else [], "hub": options}
    if not path and choice in PATH_SOURCES and "data.path" not in flatten(overrides or {}):
        raise ConfigError(f"DATA_SOURCE {choice!r} needs DATA_PATH: {PATH_SOURCES[choice]}, here or below My Drive")
    if not path:
        return {"source": choice, "hub": options}
    places = Path(path), MOUNT_POINT / "MyDrive" / path, MOUNT_POINT / path
    if (found := next((place for place in places if place.exists()), None)) is None:
        on_drive = "" if MOUNT_POINT.exists() else "; for Google Drive tick USE_DRIVE and run the cell Start first"
        raise ConfigError(f"DATA_PATH {path!r}: no such file or folder here{on_drive}")
    return {"source": choice, "path": str(found), "hub": options}


def load_utterances(config: DataConfig) -> list[Utterance]:
    """List all utterances of the first source, or of each that is mixed.

    One of the Hub is read to its end: `open_source` takes the first N.
    """
    if config.mix:
        return [in_mix(u, name) for name, data in config.parts.items() for u in load_utterances(data)]
    opened = open_source(config, config.chosen_sources[0])
    return opened if isinstance(opened, list) else [u for stream in opened.values() for u in stream]


def in_mix(utterance: Utterance, name: str | None) -> Utterance:
    """Return an utterance whose id and `meta` say its source; of a source without a name, as it is."""
    if name is None:
        return utterance
    return replace(utterance, id=f"{name}/{utterance.id}", meta={**utterance.meta, "source": name})


def open_source(config: DataConfig, source: SourceName) -> list[Utterance] | Streams:
    """Open a source: a list, with its splits in `meta["split"]`, or for the Hub one iterator per split.

    Raises `SourceUnavailableError` if it is unavailable, another `DataError` if it is invalid.
    """
    opened = SOURCES[source](config) if source in SOURCES else stream_hub(source, config.hub)
    if not opened:
        raise DataError(f"source {source!r} ({config.path or 'bundled'}) has no utterance")
    if (number := config.audio_track) is None:
        return opened

    def with_track(utterance: Utterance) -> Utterance:
        audio = utterance.audio
        track = replace(audio, track=number) if isinstance(audio, AudioPart) else AudioTrack(audio, number)
        return replace(utterance, audio=track)

    if isinstance(opened, list):
        return [with_track(utterance) for utterance in opened]
    return {name: map(with_track, stream) for name, stream in opened.items()}


def _load_common_voice(config: DataConfig) -> list[Utterance]:
    """Read an archive of Common Voice, extracted or not: clips/ and train.tsv, dev.tsv, test.tsv."""
    folder = _path(config)
    lists = {"train": folder / "train.tsv", "validation": folder / "dev.tsv", "test": folder / "test.tsv"}
    if not (folder / "clips").is_dir() or not lists["train"].is_file():
        what = "not a Common Voice archive, which has clips/ and train.tsv"
        fix = "set data.path to the archive of one language, or to where that was extracted (cv-corpus-23.0/en)"
        raise SourceUnavailableError(f"{folder}: {what}; {fix}")
    listed: list[Utterance] = []
    for split, manifest in lists.items():
        if manifest.is_file():
            listed += utterances_from_rows(manifest, audio_dir=folder / "clips", quoted=False, split=split)
    return listed


def _load_folder(config: DataConfig) -> list[Utterance]:
    folder = _path(config)
    try:
        return read_folder(folder)
    except SourceUnavailableError as err:
        if not find_transcribed(folder):
            raise
        fix = "cut them first: config = with_clips(config), from src.inference, or scripts/prepare.py"
        raise DataError(f"{folder}: long recordings with transcripts are no clips yet; {fix}") from err


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
    if audio := sum(p.suffix.lower() in AUDIO_SUFFIXES for p in path.rglob("*")):
        fix = "add metadata.csv (file_name,text), or their transcripts (talk.srt or talk.txt for talk.mp3)"
        raise SourceUnavailableError(f"{path}: {audio} recording(s), no manifest; {fix}")
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
    rows = read_rows(manifest, quoted=quoted)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if not columns:
        raise DataError(f"{manifest}: no rows; expected one row per recording, with a file and a text column")
    audio_column = pick_column(columns, "file", str(manifest))
    text_column = pick_column(columns, "text", str(manifest))
    lines: dict[str, int] = {}
    utterances: list[Utterance] = []
    folders: list[str | None] = []  # the split that the first folder of each name is called
    for line, row in rows:
        cell = row.pop(audio_column, None)
        cell = cell.get("path") if isinstance(cell, dict) else cell  # as datasets writes it
        row = {key: None if value != value else value for key, value in row.items()}
        name, part, problem = "", None, None
        try:
            name = text_of(cell).strip()
            problem = None if name else "the row names no recording; fill it in or remove the row"
        except ValueError as err:
            problem = f"the row's {audio_column} is {err}; write a path"
        path = find_audio(audio_dir or manifest.parent, name)
        try:
            part = part_of_row(row, path)
        except DataError as err:
            problem = str(err)
        shown = f"{name} {part.times}" if part else f"{name} line {line}".strip() if problem else name
        row |= {} if row.get("split") else meta
        # an empty text is refused by name when the data set is checked
        utterance = utterance_from_row(
            row, part or path, text_column=text_column, fallback_id=f"{prefix}{shown}", line=line
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


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig requires it for these sources
    return unpack(config.path)


SOURCES: dict[SourceName, Callable[[DataConfig], list[Utterance]]] = {  # all others are of the Hub
    "sample": lambda c: read_parquet(SAMPLE_PARQUET, language="en"),
    "folder": _load_folder,
    "parquet": lambda c: read_parquet(_path(c), audio_column=c.hub.audio_column, text_column=c.hub.text_column),
    "common_voice": _load_common_voice,
}
