"""Google Drive: a link from the mount point to a folder."""

from __future__ import annotations

import os
from pathlib import Path


def mount(mountpoint: str, force_remount: bool = False, timeout_ms: int = 120_000, readonly: bool = False) -> None:
    point = Path(mountpoint)
    if point.is_symlink():  # mounted before
        return
    if point.exists():
        raise ValueError("Mountpoint must not already contain files")
    if not point.parent.exists():
        raise ValueError("Mountpoint must be in a directory that exists")
    if "FAKE_COLAB_DRIVE" not in os.environ:
        raise ValueError("mount failed")
    folder = Path(os.environ["FAKE_COLAB_DRIVE"]).resolve()
    (folder / "MyDrive").mkdir(parents=True, exist_ok=True)
    point.symlink_to(folder)


def flush_and_unmount(timeout_ms: int = 24 * 60 * 60 * 1000) -> None:
    """Keep everything mounted: the point is not known any more, and each write has already arrived."""
