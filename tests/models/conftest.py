"""Shared by the tests of models: a random multilingual Whisper, of which only the state is of interest, and damage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_small


@pytest.fixture
def small_base(base: tuple[Any, Any]) -> tuple[Any, Any]:
    """A random Whisper of width 16 with the tokens of base, and its processor."""
    model, processor = base
    small = make_small(model)
    small.generation_config.language = None
    return small, processor


def change(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def make_pipe(path: Path) -> None:
    """Replace a file by a pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)
