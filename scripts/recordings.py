"""Recordings named on a command line, and the paths of their captions."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.data.audio import AUDIO_SUFFIXES
from src.data.sources.manifest import find_audio, is_manifest, pick_column, read_rows, read_text
from src.data.utterance import language_of_row, text_of
from src.utils.errors import DataError, visible
from src.utils.languages import parse_language

logger = logging.getLogger(__name__)

LIST_SUFFIX = ".txt"  # one path per line


@dataclass(frozen=True)
class Recording:
    """A file to transcribe."""

    path: str  # as it was given or found
    relative: Path  # where it lies under the folder, glob or manifest that named it; its name, if it was named itself
    language: str | None = None  # code, of a manifest's row


def find_recordings(inputs: Sequence[str]) -> list[Recording]:
    """List files, folders (recursively), globs and manifests; each file once, in order.

    In folders and globs only files with an audio suffix count, unless hidden; how many others are left out is logged. A
    file named itself always counts.
    """
    found = {recording.path: recording for given in inputs for recording in _find(given)}
    if not found:
        raise DataError("no recording given; name files, folders, globs or a manifest")
    return list(found.values())


def caption_paths(
    recordings: Sequence[Recording], formats: Sequence[str], folder: Path | None
) -> dict[str, dict[str, Path]]:
    """Return the paths of each recording's captions: next to it, or in a folder under its relative path.

    `talk.wav` gives `talk.srt`; if another recording of that name is in its folder, `talk.mp3`, each keeps its suffix:
    `talk.wav.srt`.

    Returns:
        Paths by format, by the recording's path.
    """
    stems = _count_stems(recordings)
    paths: dict[str, dict[str, Path]] = {}
    taken: dict[Path, str] = {}
    for recording in recordings:
        source = Path(recording.path)
        base = source if folder is None else folder / recording.relative
        if stems[_stem(source)] == 1:
            base = base.with_suffix("")
        paths[recording.path] = {name: base.with_name(f"{base.name}.{name}") for name in formats}
        for path in paths[recording.path].values():
            if taken.setdefault(path, recording.path) != recording.path:
                raise DataError(
                    f"{path}: captions of {taken[path]} and of {recording.path}; "
                    "give the folder that holds both, or one output folder for each"
                )
    return paths


def _find(given: str) -> Iterator[Recording]:
    path = find_audio(Path(), os.path.expandvars(given))
    if os.path.isdir(path):  # noqa: PTH112  a name that is too long for one is absent
        yield from _under(path, sorted(path.rglob("*")), given)
    elif os.path.isfile(path) and (path.suffix.lower() == LIST_SUFFIX or is_manifest(path)):  # noqa: PTH113
        yield from _listed(path)
    elif os.path.lexists(path):
        yield Recording(str(path), Path(path.name))
    elif glob.has_magic(given):
        path = path.expanduser()
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        yield from _under(root, sorted(root.glob(str(path.relative_to(root)))), given)
    else:
        near = f", {path.parent} is there" if os.path.isdir(path.parent) else ""  # noqa: PTH112
        raise DataError(f"{given}: no such file or folder{near}; check the name, and quote globs")


def _under(root: Path, paths: Sequence[Path], given: str) -> Iterator[Recording]:
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            continue
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            left_out["hidden"] += 1
        elif path.suffix.lower() not in AUDIO_SUFFIXES:
            left_out[path.suffix.lower() or "without a suffix"] += 1
        elif not path.is_file():
            left_out["no regular file"] += 1
        else:
            found.append(path)
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common())
        logger.warning("%s: %d recordings; left out as none: %s", given, len(found), reasons)
    if not found:
        raise DataError(f"{given}: no recording there; audio is what ends in {', '.join(sorted(AUDIO_SUFFIXES))}")
    yield from (Recording(str(path), path.relative_to(root)) for path in found)


def _listed(manifest: Path) -> Iterator[Recording]:
    """Yield what a manifest lists; missing files are reported later, with all that cannot be decoded."""
    names: list[tuple[str, str | None]] = []
    if manifest.suffix.lower() == LIST_SUFFIX:
        names = [(line, None) for line in map(str.strip, read_text(manifest).split("\n")) if line]
    else:
        rows = list(read_rows(manifest))
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        column = pick_column(columns, "file", str(manifest), also=["source"]) if rows else ""
        for line, row in rows:
            cell = row.get(column)
            try:
                name = text_of(cell.get("path") if isinstance(cell, dict) else cell).strip()
            except ValueError as err:
                raise DataError(f"{manifest}, line {line}: the row's {column} is wrong: {err}; write a path") from err
            names += [(name, language_of_row(row))] if name else []
    if not names:
        raise DataError(
            f"{manifest}: lists no recording; write one path per line (.txt), or rows with `audio` (.jsonl)"
        )
    for name, mark in names:
        path = find_audio(manifest.parent, name)
        inside = path.relative_to(manifest.parent) if path.is_relative_to(manifest.parent) else Path(path.name)
        relative = Path(path.name) if ".." in inside.parts else inside
        try:
            language = parse_language(mark) if mark else None
        except DataError as err:
            raise DataError(f"{manifest}: {visible(name)}: {err}") from err
        yield Recording(str(path), relative, language)


def _count_stems(recordings: Sequence[Recording]) -> Counter[tuple[Path, str]]:
    """Count the recordings of each name per folder, whether they were asked for or not."""
    asked = {Path(recording.path) for recording in recordings}
    folders = {path.parent for path in asked if path.parent.is_dir()}
    there = {path for folder in folders for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES}
    return Counter(_stem(path) for path in asked | there)


def _stem(path: Path) -> tuple[Path, str]:
    return path.parent, path.stem.lower()
