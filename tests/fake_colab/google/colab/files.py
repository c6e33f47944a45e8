"""The user's disk: folders that files come from and go to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def upload() -> dict[str, bytes]:
    """Take every file of FAKE_COLAB_UPLOADS into the working directory; none is a dialog that was cancelled."""
    folder = os.environ.get("FAKE_COLAB_UPLOADS")
    chosen = {} if folder is None else {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    for name, content in chosen.items():
        Path(name).write_bytes(content)
    return chosen


def download(filename: str) -> None:
    """Copy a file to FAKE_COLAB_DOWNLOADS."""
    if not Path(filename).exists():
        raise FileNotFoundError(f"Cannot find file: {filename}")
    if folder := os.environ.get("FAKE_COLAB_DOWNLOADS"):
        shutil.copy(filename, folder)
