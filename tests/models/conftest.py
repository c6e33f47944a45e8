"""Shared by the tests of models: a random multilingual Whisper, of which only the state is of interest."""

from __future__ import annotations

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
