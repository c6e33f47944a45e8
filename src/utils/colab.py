"""Google Colab: whether this is one, and Google Drive as an optional copy of finished files.

Training writes to the local disk. Drive gets whole files that are checked after the copy, because writes to a mounted
Drive stall and vanish, and links do not work there. Colab uploads from its own cache: a checked copy has certainly
reached Google only after `google.colab.drive.flush_and_unmount()` (colabtools issue 659).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from src.utils.errors import WhisperASRError
from src.utils.files import sha256_of

logger = logging.getLogger(__name__)

MOUNT_POINT = Path("/content/drive")
_ROOT = Path(__file__).resolve().parents[2]
MIRROR_MARKER = ".mirror.json"  # written by `utils.mirror` into its copies
_BLOCK_BYTES = 1 << 18
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def in_colab() -> bool:
    """Whether this Python runs in Google Colab."""
    has_google = importlib.util.find_spec("google") is not None  # find_spec of a child imports its parent
    return has_google and importlib.util.find_spec("google.colab") is not None


def in_notebook() -> bool:
    """Whether this runs in a Jupyter or Colab kernel, which can show more than text."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def start_session(drive_folder: str | None = None) -> Path | None:
    """Start a session of the notebook: install what Colab's image lacks, and mount Google Drive on request.

    Args:
        drive_folder: folder below "MyDrive" for copies of checkpoints; None does without Drive.

    Returns:
        The folder on Drive, or None.

    Raises:
        WhisperASRError: if pip cannot install `requirements.txt`; and as `mount_drive`.
    """
    if in_colab():
        requirements = _ROOT / "requirements.txt"
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", str(requirements)])
        if done.returncode:
            raise WhisperASRError(
                f"pip could not install {requirements}, see above; run the cell again, or take a fresh runtime: "
                "Runtime > Disconnect and delete runtime"
            )
    return None if drive_folder is None else mount_drive(drive_folder)


def mount_drive(folder: str) -> Path:
    """Mount Google Drive and return a folder below "MyDrive", made if absent.

    Raises:
        WhisperASRError: if this is not Colab, or the mount was refused.
    """
    if not in_colab():
        raise WhisperASRError(
            "Google Drive can be mounted in Colab only; elsewhere use any folder as the copy's target"
        )
    from google.colab import drive

    try:
        drive.mount(str(MOUNT_POINT))
        target = MOUNT_POINT / "MyDrive" / folder
        target.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as err:  # refused consent, quota, a time-out
        raise WhisperASRError(
            f"Google Drive could not be mounted: {err}; run the cell again, or continue without it"
        ) from err
    return target


def is_on_unmounted_drive(path: Path) -> bool:
    """Whether a path lies on Google Drive while it is not mounted: writing there would fill the local disk."""
    return path.absolute().is_relative_to(MOUNT_POINT) and not MOUNT_POINT.is_mount()


def copy_verified(source: Path, target: Path) -> int:
    """Copy a file or folder; each file is checked by SHA-256 and takes its name only when it is whole.

    Files that exist with equal content are left alone; nothing is deleted.

    Returns:
        Number of bytes copied.

    Raises:
        WhisperASRError: if the source is absent, the target is full or gone, or a copy differs from its source.
    """
    if not source.exists():
        raise WhisperASRError(f"{source}: nothing to copy; train first")
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != MIRROR_MARKER)
    copied = 0
    for file in files:
        destination = target / file.relative_to(source) if source.is_dir() else target
        if destination.is_file() and sha256_of(destination) == sha256_of(file):
            continue
        partial = destination.with_name(destination.name + ".partial")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            copied += copy_file_checked(file, partial)[0]
            partial.replace(destination)
        except OSError as err:
            raise WhisperASRError(
                f"{destination}: cannot be written: {err.strerror}; free space, or mount Drive again"
            ) from err
    logger.info("copied %.1f MB of %s to %s", copied / 1e6, source, target)
    return copied


def copy_file_checked(
    file: Path, destination: Path, on_block: Callable[[int], None] = lambda n_bytes: None
) -> tuple[int, str]:
    """Copy one file's content, then read the copy back and compare size and SHA-256; a link is never made.

    Args:
        file: source.
        destination: may be left incomplete after an error.
        on_block: called with the number of bytes before each block is written or read back; may wait, or raise to stop.

    Returns:
        Size in bytes and SHA-256 in hexadecimal.

    Raises:
        WhisperASRError: if the copy differs.
        OSError: if the file cannot be read or the destination cannot be written.
    """
    written, read, n_bytes = hashlib.sha256(), hashlib.sha256(), 0
    with file.open("rb") as reader, destination.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            on_block(len(block))
            _write_block(writer, block)
            written.update(block)
            n_bytes += len(block)
        writer.flush()
        try:
            os.fsync(writer.fileno())  # a full drive may say so only now
        except OSError as err:
            if err.errno not in _NO_FSYNC:
                raise
    with destination.open("rb") as copy:
        if hasattr(os, "posix_fadvise"):  # read from the drive rather than from memory
            with contextlib.suppress(OSError):
                os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := copy.read(_BLOCK_BYTES):
            on_block(len(block))
            read.update(block)
    if destination.stat().st_size != n_bytes or read.digest() != written.digest():
        raise WhisperASRError(f"{destination}: the copy differs from {file}; the target is not reliable, try again")
    return n_bytes, written.hexdigest()


def _write_block(writer: BinaryIO, block: bytes) -> None:
    writer.write(block)
