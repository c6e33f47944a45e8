"""Conversions on disk: made once, checked before every use, whole or absent.

Each has a manifest with the SHA-256 of its source and of every file in it. Hashing costs less than loading the model
does, and a damaged file is made again instead of being loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from src.utils.errors import ModelError
from src.utils.files import atomic_folder

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1  # part of the folder's name: raise it when the converter's output changes
MANIFEST_FILE = "conversion.json"


def convert_once(
    name: str, source_sha256: str, source: str, *, cache_dir: Path, convert: Callable[[Path], Any]
) -> Path:
    """Return the folder of a conversion, making it if it is absent or damaged.

    Args:
        name: for people, the folder begins with it.
        source_sha256: identifies the source.
        source: what was converted, for the log and the manifest.
        cache_dir: conversions lie in `cache_dir/weights`; several processes may share it.
        convert: writes the conversion into the empty folder that it is given.
    Raises: ModelError: cache_dir cannot be written; and what `convert` raises.
    """
    folder = cache_dir / "weights" / f"{name}-{source_sha256[:12]}-v{CONVERSION_VERSION}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ModelError(
            f"{folder.parent}: cannot be made: {err.strerror}; set paths.cache_dir to a folder of yours"
        ) from err
    with FileLock(f"{folder}.lock"):  # a second process waits, then finds the first one's work
        problem = _damage(folder, source_sha256)
        if problem is None:
            logger.info("weights: conversion of %s in %s", source, folder)
            return folder
        if folder.exists():
            logger.warning("%s: %s; converting %s again", folder, problem, source)
            shutil.rmtree(folder)
        else:
            logger.info("converting %s into %s", source, folder)
        with atomic_folder(folder) as partial:
            convert(partial)
            _write_manifest(partial, source, source_sha256)
    return folder


def combined_sha256(paths: Sequence[Path]) -> str:
    """One SHA-256 over several files.

    Raises: ModelError: one is absent.
    """
    return hashlib.sha256("".join(_sha256(path) for path in paths).encode()).hexdigest()


def _write_manifest(folder: Path, source: str, source_sha256: str) -> None:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"source": source, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _damage(folder: Path, source_sha256: str) -> str | None:
    """Say what is wrong with a conversion, None if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {MANIFEST_FILE}"
    except ValueError as err:
        return f"{MANIFEST_FILE} is not JSON ({err})"
    if manifest["source_sha256"] != source_sha256:
        return f"made from another source ({manifest['source']})"
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != expected:
            return f"{name} is damaged"
    return None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as err:
        raise ModelError(f"{path}: no such file") from err
