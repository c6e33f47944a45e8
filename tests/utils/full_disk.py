"""A disk that is full once half of a file is written."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


class _HalfFile(io.FileIO):
    def write(self, content: Any) -> int:
        super().write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file that is written atomically fail half-way."""
    whole = Path.open

    def half(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "partial" in self.name and "w" in mode:
            return _HalfFile(str(self), mode)
        return whole(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", half)
