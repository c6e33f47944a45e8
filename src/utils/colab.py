"""Google Colab: where we are, and Google Drive as an opt-in copy of finished files.

Training writes to the local disk. Drive gets whole files, checked after the copy: writes to a mounted Drive stall and
vanish, and links do not work there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
from pathlib import Path

from src.utils.errors import WhisperASRError

logger = logging.getLogger(__name__)

MOUNT_POINT = Path("/content/drive")
_HASH_BLOCK_BYTES = 1 << 20


def in_colab() -> bool:
    """Whether this Python runs in Google Colab."""
    has_google = importlib.util.find_spec("google") is not None  # find_spec of a child imports its parent
    return has_google and importlib.util.find_spec("google.colab") is not None


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
        if destination.is_file() and _sha256(destination) == _sha256(file):
            continue
        _copy_file(file, destination)
        copied += file.stat().st_size
    logger.info("copied %.1f MB of %s to %s", copied / 1e6, source, target)
    return copied


def _copy_file(file: Path, destination: Path) -> None:
    partial = destination.with_name(destination.name + ".partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial)
        if _sha256(partial) != _sha256(file):
            raise WhisperASRError(f"{destination}: the copy differs from {file}; the target is not reliable, try again")
        partial.replace(destination)
    except OSError as err:
        raise WhisperASRError(
            f"{destination}: cannot be written: {err.strerror}; free space, or mount Drive again"
        ) from err


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
