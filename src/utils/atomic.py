"""Files and folders that appear whole or not at all, so that a crash or a second process never meets half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(output_dir: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `output_dir`; it takes that name at the end, or goes away on an error.

    Args:
        output_dir: absent or an empty folder, unless `replace`.
        replace: an older folder of that name stays until the new one is complete, then is removed. A folder cannot be
            exchanged in one step: between two renames there is none of that name.
    Raises: FileExistsError: `output_dir` is a file, or holds something and may not be replaced.
    """
    _refuse_taken(output_dir, replace)
    partial = _hidden_name(output_dir, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        _refuse_taken(output_dir, replace)
        if output_dir.is_dir():
            replaced = _hidden_name(output_dir, "replaced")
            output_dir.rename(replaced)
            partial.rename(output_dir)
            shutil.rmtree(replaced)
        else:
            partial.rename(output_dir)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 file, which is replaced as a whole or stays as it was; line ends are kept as they are.

    Raises: OSError: the folder cannot be made or written.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write a file, which is replaced as a whole or stays as it was.

    Readers in other processes find the old one or the new one; after a power cut it may be either, or empty.

    Raises: OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden_name(path, "partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _hidden_name(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.{suffix}"


def _refuse_taken(output_dir: Path, replace: bool) -> None:
    if output_dir.is_dir() and (replace or not any(output_dir.iterdir())):
        return
    if output_dir.exists():
        raise FileExistsError(f"{output_dir}: exists already; remove it, or choose another output folder")
