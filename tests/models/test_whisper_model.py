from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.models.dynamic_context import get_language
from src.models.processor import save_processor
from src.models.whisper_model import WhisperModelManager
from src.utils.config import load_config
from src.utils.errors import ModelError


@pytest.mark.parametrize(
    ("saved", "configured", "loaded"),
    [
        (("hi", "transcribe"), (None, "transcribe"), ("hi", "transcribe")),
        (("hindi", "translate"), (None, "transcribe"), ("hi", "translate")),
        (("<|hi|>", "transcribe"), ("de", "transcribe"), ("de", "transcribe")),
        (("hi", "transcribe"), ("yue", "translate"), ("zh", "translate")),  # base has no token for Cantonese
        ((None, None), (None, "transcribe"), (None, None)),
    ],
)
def test_a_checkpoint_keeps_its_own_language_unless_one_is_given(
    small_base: tuple[Any, Any], tmp_path: Path, saved: Any, configured: Any, loaded: Any
) -> None:
    model, processor = small_base
    model.generation_config.language, model.generation_config.task = saved
    model.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    settings = {"model.language": configured[0], "model.task": configured[1]}
    config = load_config(None, overrides={"device": "cpu", **settings})
    found, _ = WhisperModelManager(config).initialize_model(str(tmp_path))
    assert (found.generation_config.language, found.generation_config.task) == loaded


def test_a_language_that_the_checkpoint_does_not_know_is_named(small_base: tuple[Any, Any], small: Any) -> None:
    small_base[0].generation_config.language = "klingon"
    with pytest.raises(ModelError, match=r"generation_config.json.*'klingon'"):
        get_language(small_base[0])
    small[0].generation_config.language = "klingon"  # nobody reads it of an English-only model
    assert get_language(small[0]) is None
