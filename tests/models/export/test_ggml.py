"""whisper.cpp itself, as pywhispercpp has it built in, is the judge of the files."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest

from src.models.export import ggml
from src.models.export.ggml import audio_context, export_ggml
from src.models.export.verify import bundled_clips
from src.models.folder import GGML_FILE, GGML_USAGE
from src.utils.errors import MissingDependencyError, ModelError

CLIPS = bundled_clips()[:1]  # stock weights do well on it at dynamic context too, which is faster


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "vocabulary"), [("tiny_en", 51_864), ("base", 51_865)])
def test_whisper_cpp_gives_the_text_at_the_clips_own_length(
    variant: str, vocabulary: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, processor = request.getfixturevalue(variant)
    model.audio_context = "dynamic"
    out = export_ggml(model, tmp_path / "out", processor=processor, verify_clips=CLIPS)
    assert {path.name for path in out.iterdir()} == {GGML_FILE, GGML_USAGE, "config.json"}
    with (out / GGML_FILE).open("rb") as file:
        magic, tokens, positions, *_ = struct.unpack("<12i", file.read(48))
    assert (magic, tokens, positions) == (0x67676D6C, vocabulary, 1_500)
    assert f"-nfa -ac {50 * 4.7:.0f} " in (out / GGML_USAGE).read_text()


@pytest.mark.slow
def test_a_file_that_whisper_cpp_reads_otherwise_is_refused(
    tiny_en: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    tensors = ggml.openai_tensors

    def swapped(state: Any) -> Any:
        return ((name, tensor.flip(0) if name == "decoder.ln.weight" else tensor) for name, tensor in tensors(state))

    monkeypatch.setattr(ggml, "openai_tensors", swapped)
    with pytest.raises(ModelError, match=r"out: the ggml model .* was not saved"):
        export_ggml(model, tmp_path / "out", processor=processor, verify_clips=CLIPS)
    assert not list(tmp_path.iterdir())


def test_usage_says_how_to_call_it(small_base: Any) -> None:
    model, _ = small_base
    model.audio_context, model.generation_config.language = "full", "de"
    assert "-l de -f" in ggml._usage(model)
    assert " -ac " not in ggml._usage(model)  # at full context whisper.cpp's own padding is right
    assert audio_context(29.9) == 1_500
    assert audio_context(0.1) == 30


def test_what_whisper_cpp_has_no_place_for_is_refused(small_base: Any, tmp_path: Path) -> None:
    model, processor = small_base
    for size, problem in ((51_867, "this one has 51867"), (51_864, "this one has 51864, and its text ends with 50257")):
        model.config.vocab_size = size
        with pytest.raises(ModelError, match=problem), (tmp_path / "file").open("wb") as file:
            ggml.write_ggml(model, processor, file)


def test_without_whisper_cpp_nothing_is_exported(
    small_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install pywhispercpp"):
        export_ggml(small_base[0], tmp_path / "out", processor=small_base[1])
    assert not list(tmp_path.iterdir())
