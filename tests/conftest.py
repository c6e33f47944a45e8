"""Shared by all tests: real weights and real speech, loaded once."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use what packages ship
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores; read when torch is imported

import matplotlib
import numpy as np
import pytest

from src.data.audio import load_audio
from src.data.sources.catalog import SAMPLE_CLIP, load_utterances
from src.data.utterance import Utterance
from src.utils.config import Config, DataConfig, load_config

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take minutes first: where two processes share the files, neither ends with one of them."""
    first = ("test_journey.py", "test_notebook.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Defaults, writing into the test's own folder; with the smallest model that packages ship."""
    paths = {f"{name}_dir": str(tmp_path / name) for name in ("runs", "checkpoints")}
    return load_config(None, overrides={"device": "cpu", "model.variant": "tiny.en", "paths": paths})


@pytest.fixture
def no_warning_and_no_global_change() -> Iterator[None]:
    """A missing glyph or a label that does not fit is a warning in matplotlib."""
    before = dict(matplotlib.rcParams)
    gc.collect()  # files that other tests left open would warn in here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="session")
def jfk() -> np.ndarray:
    return load_audio(SAMPLE_CLIP)


@pytest.fixture(scope="session")
def sample() -> list[Utterance]:
    return load_utterances(DataConfig())


def load_stock(variant: str) -> tuple[Any, Any]:
    from src.models.whisper_model import WhisperModelManager

    return WhisperModelManager(load_config(None, overrides={"device": "cpu"})).initialize_model(variant)


@pytest.fixture(scope="session")
def _tiny_en() -> tuple[Any, Any]:
    return load_stock("tiny.en")


@pytest.fixture
def tiny_en(_tiny_en: tuple[Any, Any]) -> tuple[Any, Any]:
    """Stock whisper-tiny.en as a fresh copy, so that a test may train it, and its processor."""
    model, processor = _tiny_en
    return copy.deepcopy(model), processor


def make_small(model: Any) -> Any:
    """Return a random Whisper of width 16 with the tokens and rules of a model."""
    import torch

    from src.models.dynamic_context import DynamicWhisper

    config = copy.deepcopy(model.config)
    config.d_model, config.num_hidden_layers = 16, 2
    for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items():
        config.update({f"encoder_{name}": value, f"decoder_{name}": value})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = DynamicWhisper(config)
    small.generation_config = copy.deepcopy(model.generation_config)
    small.generation_config.alignment_heads = [[0, 0], [1, 1]]
    return small.eval()


@pytest.fixture(scope="session")
def _small(_tiny_en: tuple[Any, Any]) -> tuple[Any, Any]:
    model, processor = _tiny_en
    return make_small(model), processor


@pytest.fixture
def small(_small: tuple[Any, Any]) -> tuple[Any, Any]:
    """A random Whisper of width 16 with the tokens of tiny.en, as a fresh copy, and its processor."""
    model, processor = _small
    return copy.deepcopy(model), processor


@pytest.fixture(scope="session")
def base() -> tuple[Any, Any]:
    """Stock multilingual whisper-base; do not change it."""
    return load_stock("base")


@pytest.fixture(scope="session")
def espeak() -> Callable[[str, str], bytes]:
    """Make a WAV file of a text in a voice, such as "ja" or "cmn"."""
    program = shutil.which("espeak-ng")
    if program is None:
        pytest.skip("no espeak-ng on the PATH: apt-get install espeak-ng")

    def speak(text: str, voice: str) -> bytes:
        command = [program, "-v", voice, "-s", "130", "--stdout", text]
        return subprocess.run(command, check=True, capture_output=True).stdout

    return speak


@pytest.fixture(scope="session")
def base_vocabulary() -> Any:
    """The multilingual vocabulary."""
    from src.inference.words import Vocabulary
    from src.models.weights import resolve_weights

    return Vocabulary.from_folder(resolve_weights("base", cache_dir=Config().paths.cache_dir).path)
