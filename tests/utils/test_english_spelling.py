from __future__ import annotations

import hashlib
from importlib import resources

import pytest

from src.utils.english_spelling import SPELLING_FILE, SPELLING_SHA256, load_english_spelling


def test_file_is_the_one_of_openai_whisper() -> None:
    data = resources.files("src.utils").joinpath(SPELLING_FILE).read_bytes()
    assert hashlib.sha256(data).hexdigest() == SPELLING_SHA256


def test_map_goes_from_british_to_american_and_is_read_only() -> None:
    spelling = load_english_spelling()
    assert len(spelling) == 1739
    assert (spelling["colour"], spelling["accessorise"]) == ("color", "accessorize")
    with pytest.raises(TypeError):
        spelling["colour"] = "x"  # type: ignore[index]
