"""Google Colab: where we are, and Google Drive as an opt-in copy of finished files.

Training writes to the local disk. Drive gets whole files, checked after the copy: writes to a mounted Drive stall and
vanish, and links do not work there. Colab uploads from a cache of its own: a checked copy has surely reached Google
only after `google.colab.drive.flush_and_unmount()` (colabtools issue 659).
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from src.utils.errors import WhisperASRError

logger = logging.getLogger(__name__)

MOUNT_POINT = Path("/content/drive")
_ROOT = Path(__file__).resolve().parents[2]
_MAX_BLOCK_BYTES = 1 << 20
_MIN_BLOCK_BYTES = 1 << 12
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Pace:
    """Bounds a stream of bytes by sleeping before each block.

    Args:
        bytes_per_sec: at most; infinity never sleeps.
        sleep: takes seconds.
        clock: gives seconds; never goes back.
        on_block: called before each block; may raise to stop the copy.
    """

    def __init__(
        self,
        bytes_per_sec: float = float("inf"),
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        self._bytes_per_sec = bytes_per_sec
        self._sleep, self._clock, self._on_block = sleep, clock, on_block
        self._due_sec = clock()
        # about one block a second when slow, so that a stop is noticed soon
        self.block_bytes = int(min(_MAX_BLOCK_BYTES, max(_MIN_BLOCK_BYTES, bytes_per_sec)))

    def spend(self, n_bytes: int) -> None:
        """Wait until this many more bytes may pass."""
        self._on_block()
        now = self._clock()
        if self._due_sec > now:
            self._sleep(self._due_sec - now)
        self._due_sec = max(self._due_sec, now) + n_bytes / self._bytes_per_sec


def in_colab() -> bool:
    """Whether this Python runs in Google Colab."""
    has_google = importlib.util.find_spec("google") is not None  # find_spec of a child imports its parent
    return has_google and importlib.util.find_spec("google.colab") is not None


def in_notebook() -> bool:
    """Whether a Jupyter or Colab kernel runs this, which can show more than text."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def start_session(drive_folder: str | None = None) -> Path | None:
    """Begin a session of the notebook: install what Colab's image lacks, and mount Google Drive if it is wanted.

    Args:
        drive_folder: below "MyDrive"; None goes without Drive.
    Returns: the folder on Drive, for copies of checkpoints; None without.
    Raises: WhisperASRError: pip cannot install `requirements.txt`; and as `mount_drive`.
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
    """Mount Google Drive and return a folder in it, made if absent.

    Args:
        folder: below "MyDrive", for example "whisper_asr".
    Raises: WhisperASRError: not in Colab, or the mount was refused.
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
            f"Google Drive could not be mounted: {err}; run the cell again, or go on without it"
        ) from err
    return target


def is_on_unmounted_drive(path: Path) -> bool:
    """Whether a path belongs to Google Drive while that is not mounted: writing there would fill the local disk."""
    return path.absolute().is_relative_to(MOUNT_POINT) and not MOUNT_POINT.is_mount()


def copy_verified(source: Path, target: Path) -> int:
    """Copy a file or folder; each file is checked by SHA-256 and appears under its name only when it is whole.

    Files that are already there with equal content are left alone; nothing is deleted.

    Returns: number of bytes copied.
    Raises: WhisperASRError: source absent, target full or gone, or a copy that differs from its source.
    """
    if not source.exists():
        raise WhisperASRError(f"{source}: nothing to copy; train first")
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    copied = 0
    for file in files:
        destination = target / file.relative_to(source) if source.is_dir() else target
        if destination.is_file() and sha256_of(destination) == sha256_of(file):
            continue
        _copy_whole(file, destination)
        copied += file.stat().st_size
    logger.info("copied %.1f MB of %s to %s", copied / 1e6, source, target)
    return copied


def copy_file_checked(file: Path, destination: Path, pace: Pace | None = None) -> tuple[int, str]:
    """Copy one file's content, then read the copy back and compare size and SHA-256.

    The destination may be left cut or wrong after an error; a link is never made.

    Args: pace: of the writing and of the reading back.
    Returns: size in bytes, SHA-256 in hexadecimal.
    Raises:
        WhisperASRError: the copy differs.
        OSError: the file cannot be read or the destination not be written.
    """
    pace = pace or Pace()
    digest, n_bytes = hashlib.sha256(), 0
    with file.open("rb") as reader, destination.open("wb") as writer:
        while block := reader.read(pace.block_bytes):
            pace.spend(len(block))
            _write_block(writer, block)
            digest.update(block)
            n_bytes += len(block)
        writer.flush()
        _fsync(writer)
    if destination.stat().st_size != n_bytes or sha256_of(destination, pace) != digest.hexdigest():
        raise WhisperASRError(f"{destination}: the copy differs from {file}; the target is not reliable, try again")
    return n_bytes, digest.hexdigest()


def sha256_of(path: Path, pace: Pace | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal, read at a pace.

    Raises: OSError: it cannot be read.
    """
    pace = pace or Pace()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # rather from the drive than from memory
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(pace.block_bytes):
            pace.spend(len(block))
            digest.update(block)
    return digest.hexdigest()


def _copy_whole(file: Path, destination: Path) -> None:
    partial = destination.with_name(destination.name + ".partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        copy_file_checked(file, partial)
        partial.replace(destination)
    except OSError as err:
        raise WhisperASRError(
            f"{destination}: cannot be written: {err.strerror}; free space, or mount Drive again"
        ) from err


def _write_block(writer: BinaryIO, block: bytes) -> None:
    writer.write(block)


def _fsync(writer: BinaryIO) -> None:
    try:
        os.fsync(writer.fileno())  # a full drive may say so only now
    except OSError as err:
        if err.errno not in _NO_FSYNC:
            raise
