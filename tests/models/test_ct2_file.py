"""Damage of a CTranslate2 folder, at which the library itself fails late, hangs or ends the process."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.inference.ct2_engine import CTranslate2Engine
from src.inference.engine_base import transcribe
from src.inference.options import DecodingOptions
from src.models.export.ctranslate2 import export_ctranslate2
from src.utils.errors import ModelError
from tests.models.conftest import change, make_pipe

CONFIG = "config.json"
CONV = b"encoder/conv1/weight\0"


@pytest.fixture(scope="module")
def whole(_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = _small
    target = tmp_path_factory.mktemp("ct2") / "whole"
    return export_ctranslate2(model, target, processor=processor, quantization="float32")


def edit(folder: Path, change: Callable[[bytearray], object]) -> None:
    """Change the bytes of model.bin."""
    data = bytearray((folder / "model.bin").read_bytes())
    change(data)
    (folder / "model.bin").write_bytes(data)


def after_conv(data: bytearray, skip: int, content: bytes) -> None:
    """Overwrite what follows the name of the first convolution: rank, three sizes, type, number of bytes, values."""
    at = data.index(CONV) + len(CONV) + skip
    data[at : at + len(content)] = content


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: os.truncate(f / "model.bin", 0), "empty"),
    "cut": (lambda f: os.truncate(f / "model.bin", 1_000_000), "whole"),
    "cut at the end": (lambda f: os.truncate(f / "model.bin", (f / "model.bin").stat().st_size - 10), "whole"),
    "name": (lambda f: edit(f, lambda d: d.__setitem__(slice(6, 9), b"\xff\xff\xff")), "utf-8"),
    "absent": (lambda f: edit(f, lambda d: d.__setitem__(d.index(CONV), ord("x"))), "no 'encoder/conv1/weight'"),
    "terabytes": (lambda f: edit(f, lambda d: after_conv(d, 1, struct.pack("<I", 0x7FFFFFFF))), "encoder/conv1/weight"),
    "shape": (lambda f: edit(f, lambda d: after_conv(d, 1, struct.pack("<II", 80, 16))), r"\(80, 16, 3\)"),
    "nan": (lambda f: edit(f, lambda d: after_conv(d, 18, struct.pack("<f", float("nan")))), "nan.*encoder/conv1"),
    "words": (lambda f: (f / "vocabulary.json").write_text('["a"]'), "vocabulary.*51864"),
    "no words": (lambda f: (f / "vocabulary.json").unlink(), "vocabulary"),
    "deep words": (lambda f: (f / "vocabulary.json").write_text("[" * 100_000), "deep"),
    "pipe of words": (lambda f: make_pipe(f / "vocabulary.json"), "plain file"),
    "pipe": (lambda f: make_pipe(f / CONFIG), r"config\.json"),
    "suppressed": (lambda f: change(f / CONFIG, suppress_ids=[99_999]), "suppress_ids.*99999"),
    "suppressed text": (lambda f: change(f / CONFIG, suppress_ids_begin="a"), "suppress_ids_begin"),
    "heads": (lambda f: change(f / CONFIG, alignment_heads=[["a", 0]]), "alignment_heads"),
    "context": (lambda f: change(f / CONFIG, audio_context="short"), "audio_context"),
    "rates": (lambda f: change(f / CONFIG, tokens_per_sec=[1]), "tokens_per_sec"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_folder_is_refused_and_named(whole: Path, tmp_path: Path, harm: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "mine"))
    damage, message = HARMS[harm]
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        CTranslate2Engine(folder, device="cpu")
    assert str(folder) in str(caught.value)


def test_heads_of_a_teacher_cost_the_word_times_alone(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "mine"))
    change(folder / CONFIG, alignment_heads=[[7, 0]])
    engine, audio = CTranslate2Engine(folder, device="cpu"), np.zeros(16_000, dtype=np.float32)
    assert transcribe(engine, [audio], DecodingOptions())
    with pytest.raises(ModelError, match=r"alignment_heads.*\[7, 0\]"):
        transcribe(engine, [audio], DecodingOptions(word_timestamps=True))
