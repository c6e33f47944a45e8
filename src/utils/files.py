"""Files and folders that appear whole or not at all, so that a crash or a second process never meets half of one.

A folder is replaced by exchanging two names in one step where the system can: renameat2 with RENAME_EXCHANGE on Linux,
renamex_np with RENAME_SWAP on macOS. Elsewhere (Windows, most network and FUSE drives) it takes two renames, and a
crash between them leaves the old folder under a hidden name, from which `recover_folder` brings it back.

Hidden names are `.<name>.<process id>.<token>.partial` or `.replaced`. Whatever is called `.replaced` is whole.
Source: rename(2) of Linux and of macOS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

logger = logging.getLogger(__name__)

_AT_FDCWD = -100  # Linux: paths start from the working folder
_RENAME_SWAP = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS have one value
# What kernels, drivers and container filters answer to a call that they do not know or do not allow.
_NOT_POSSIBLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
_PROCESS_TOKEN = secrets.token_hex(4)  # begins the tokens: a restarted container may give the old process id again
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<token>[0-9a-f]+)\.(?P<kind>partial|replaced)")
_counter = itertools.count()


@dataclass(frozen=True)
class HiddenName:
    """What the hidden name of a file or folder says.

    Attributes:
        final: what it becomes, or was.
        kind: "partial" or "replaced".
        is_in_use: the process that chose the name still runs.
    """

    final: Path
    kind: str
    is_in_use: bool


@contextmanager
def atomic_folder(output_dir: Path, *, replace: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `output_dir`; it takes that name at the end, or goes away on an error.

    A process that is killed leaves the old folder or the new one, whole; call `recover_folder` before the next use.
    Two processes that replace one folder need a lock of their own.

    Args:
        output_dir: absent or an empty folder, unless `replace`.
        replace: an older folder of that name stays until the new one is complete, then is removed.
        durable: also after a power cut, see `fsync_folder`; takes as long as the disk needs to write everything.
    Raises: FileExistsError: `output_dir` is a file, or holds something and may not be replaced.
    """
    _refuse_taken(output_dir, replace)
    partial = _hidden_name(output_dir, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if durable:
            fsync_folder(partial)
        _refuse_taken(output_dir, replace)
        if output_dir.is_dir() and not replace:
            output_dir.rmdir()  # refuses if another process has put something there meanwhile
        if not output_dir.is_dir():
            partial.rename(output_dir)
        elif not _exchange(partial, output_dir):
            _replace_by_renames(partial, output_dir)
        if durable:
            _fsync(output_dir.parent)
    finally:
        _remove(partial)


def recover_folder(output_dir: Path) -> Path | None:
    """Clean up after a process that was killed while it wrote `output_dir`: the folder is then whole, or absent.

    If the folder is absent and an older one lies under a hidden name, the newest of these takes its name again. Other
    hidden left-overs of dead processes are removed. Those of running processes are never touched; a process id tells
    which run, so the folder must not be written by another machine at the same time.

    Returns: output_dir if it was brought back, else None.
    Raises: OSError: a name cannot be changed, or a left-over not be removed.
    """
    leftovers = _dead_leftovers(output_dir)
    older = [path for path in leftovers if path.suffix == ".replaced"]
    recovered = any(_bring_back(path, output_dir) for path in reversed(older))
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):  # brought back, or removed by another process
            _discard(path, output_dir)
    return output_dir if recovered else None


def write_text_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file, which is replaced as a whole or stays as it was; line ends are kept as they are.

    Args: durable: as of `write_bytes_atomic`.
    Raises: OSError: the folder cannot be made or written.
    """
    write_bytes_atomic(path, text.encode("utf-8"), durable=durable)


def write_bytes_atomic(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file, which is replaced as a whole or stays as it was.

    Readers in other processes find the old one or the new one; after a power cut it may be either, or empty.

    Args: durable: as of `atomic_file`.
    Raises: OSError: the folder cannot be made or written.
    """
    with atomic_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a hidden file beside `path`, open for writing; it takes that name at the end, or goes away on an error.

    Args: durable: never empty after a power cut, and the new one once this has returned; waits for the disk.
    Raises: OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden_name(path, "partial")
    try:
        with partial.open("wb") as file:
            yield file
        if durable:
            _fsync(partial)
        partial.replace(path)
        if durable:
            _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Wait until every file below a folder, and the folders themselves, are on the disk.

    Folders are left out on Windows and on drives that cannot do it. macOS may still hold all in the drive's own cache.

    Raises: OSError: something cannot be opened or written.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _fsync(path)
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    is_dir = path.is_dir()
    if is_dir and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if not (is_dir and err.errno in _NOT_POSSIBLE):
            raise
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Give two folders each other's name in one step; False if the system or the drive cannot."""
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "linux":
            failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_SWAP))
        else:
            failed = libc.renamex_np(names[0], names[1], ctypes.c_uint(_RENAME_SWAP))
    except AttributeError:  # a C library without it
        return False
    if failed and ctypes.get_errno() not in _NOT_POSSIBLE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(first), None, str(second))
    return not failed


def _replace_by_renames(partial: Path, output_dir: Path) -> None:
    """Replace in two steps; an error or an interrupt between them puts the old folder back."""
    replaced = _hidden_name(output_dir, "replaced")
    try:
        output_dir.rename(replaced)
        partial.rename(output_dir)
    finally:
        if replaced.exists() and output_dir.exists():
            _discard(replaced, output_dir)
        elif replaced.exists():
            replaced.rename(output_dir)


def _bring_back(replaced: Path, output_dir: Path) -> bool:
    """Rename a replaced folder back, unless there is one of that name."""
    if os.path.lexists(output_dir):
        return False
    try:
        replaced.rename(output_dir)
    except FileNotFoundError:  # another process was faster
        return False
    logger.warning("%s was missing after a crash; its older content is back", output_dir)
    return True


def _dead_leftovers(output_dir: Path) -> list[Path]:
    """Return what dead processes left of a folder under hidden names, from old to new."""
    found: list[tuple[int, Path]] = []
    for path in output_dir.parent.iterdir() if output_dir.parent.is_dir() else ():
        hidden = read_hidden_name(path)
        if hidden is not None and hidden.final.name == output_dir.name and not hidden.is_in_use:
            with contextlib.suppress(FileNotFoundError):  # another process cleans up as well
                found.append((path.lstat().st_ctime_ns, path))
    return [path for _, path in sorted(found)]


def read_hidden_name(path: Path) -> HiddenName | None:
    """Return what a name says; None where it is no hidden one of this module."""
    match = _HIDDEN.fullmatch(path.name)
    if match is None:
        return None
    return HiddenName(path.with_name(match["name"]), match["kind"], _is_alive(int(match["process"]), match["token"]))


def remove_folder(folder: Path) -> None:
    """Remove a folder so that half of it is never there under its name; a crash leaves it under `removed_name`.

    Raises: OSError: it cannot be renamed or removed.
    """
    doomed = removed_name(folder)
    shutil.rmtree(doomed, ignore_errors=True)  # of an earlier crash
    folder.rename(doomed)
    shutil.rmtree(doomed)


def removed_name(folder: Path) -> Path:
    """Return what a folder is called while it is removed."""
    return folder.with_name(f".{folder.name}.removed")


def _is_alive(process_id: int, token: str) -> bool:
    if process_id == os.getpid():
        return token.startswith(_PROCESS_TOKEN)
    return bool(psutil.pid_exists(process_id))


def _discard(path: Path, output_dir: Path) -> None:
    """Remove a left-over under another name, so that nothing half-removed is called `.replaced`."""
    doomed = _hidden_name(output_dir, "partial")
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _hidden_name(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}.{_PROCESS_TOKEN}{next(_counter):04x}.{suffix}"


def _refuse_taken(output_dir: Path, replace: bool) -> None:
    if output_dir.is_dir() and (replace or not any(output_dir.iterdir())):
        return
    if output_dir.exists():
        raise FileExistsError(f"{output_dir}: exists already; remove it, or choose another output folder")
