"""JSON files that several processes share: replaced whole, changed under a lock, an error when damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from src.utils.errors import DataError
from src.utils.files import write_text_atomic

T = TypeVar("T")


def read_json(path: Path, parse: Callable[[Any], T], *, what: str, fix: str) -> T:
    """Read a file and make something of its content.

    Args:
        parse: may fail with what wrong content brings about: ValueError, TypeError, KeyError or AttributeError.
        what: the file should be, for the error: "a data set version".
        fix: what to do about a damaged one.
    Raises: DataError: the file cannot be read, is no JSON, or not what it should be.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise DataError(f"{path}: not {what} ({err}); {fix}") from err


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Write a file, replaced as a whole; its folder is made.

    Args: durable: as of `write_bytes_atomic`.
    Raises:
        DataError: the folder cannot be made or written.
        ValueError: the content holds nan or an infinity, which JSON has no words for.
    """
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        write_text_atomic(path, text, durable=durable)
    except OSError as err:
        raise DataError(f"{path}: cannot be written: {err.strerror}; choose another folder") from err


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes and threads that do the same out until the end; they wait. A dead process holds no lock.

    The lock is a file beside it, `<name>.lock`, which stays.

    Raises: DataError: the folder cannot be made or written, or its drive knows no locks.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as err:
        raise DataError(f"{path}: cannot be locked for writing: {err}; choose a folder on a local disk") from err
    try:
        yield
    finally:
        lock.release()
