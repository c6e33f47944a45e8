"""Files of a checkpoint in Hugging Face format: which are present or absent, and their settings, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from src.utils.errors import ModelError, first_line
from src.utils.files import load_json

CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILE = "config.json", "generation_config.json", "tokenizer.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_FILE = "model.safetensors"
GGML_FILE, GGML_USAGE = "ggml-model.bin", "USAGE.md"
_INDEX = f"{WEIGHTS_FILE}.index.json"
_TOKENIZERS = ((TOKENIZER_FILE,), ("vocab.json", "merges.txt"))  # either is enough
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def missing_part(folder: Path) -> str | None:
    """Say what a Hugging Face checkpoint lacks and what to do, None if it lacks nothing."""
    again = "save model and processor there again"
    if not (folder / CONFIG_FILE).is_file():
        if (folder / "state.json").is_file():
            return "it holds the state of a training: resume that, or take the folder best_model_hf of its run"
        return f"{CONFIG_FILE} is absent; {again}"
    if (found := model_type(folder)) != "whisper":
        return f"{CONFIG_FILE} is not that of a Whisper model (model_type {found!r}); {again}"
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / _INDEX).is_file():
        for name in _PICKLED:
            if (folder / name).is_file():
                return (
                    f"no {WEIGHTS_FILE}, and {name} is not read: pickled weights can run code. If you trust them, "
                    f'convert them once: python -c "from transformers import WhisperForConditionalGeneration as W; '
                    f"W.from_pretrained('{folder}').save_pretrained('{folder}')\""
                )
        return f"no {WEIGHTS_FILE} or {_INDEX}; {again}"
    if missing := absent_shards(folder):
        return f"no {', no '.join(missing)}; {again}"
    if not has_tokenizer(folder):
        return f"no {TOKENIZER_FILE}, and no vocab.json with merges.txt; copy those of the model that was fine-tuned"
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer, in the current format or that of slow tokenizers."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)


def absent_shards(folder: Path) -> list[str]:
    """Return the files of weights that a checkpoint's index lists and its folder lacks."""
    try:
        return [path.name for path in weight_files(folder) if not path.is_file()]
    except ModelError:
        return [f"{_INDEX} that is whole"]


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights, which may be absent; `ModelError` if their index is damaged."""
    names = {WEIGHTS_FILE}
    if (folder / _INDEX).is_file():
        listed = read_settings(folder / _INDEX).get("weight_map")
        files = list(listed.values()) if isinstance(listed, dict) else []
        if not files or not all(isinstance(name, str) and name == Path(name).name for name in files):
            raise ModelError(f"{folder / _INDEX}: its weight_map does not name files of the folder; fetch it again")
        names = set(files)
    if (folder / WEIGHTS_FILE).is_file():
        names = {WEIGHTS_FILE}
    return [folder / name for name in sorted(names)]


def content_files(folder: Path) -> list[Path]:
    """Return the files that decide what a checkpoint's model is: weights, settings, tokenizer."""
    tokens = (*(name for names in _TOKENIZERS for name in names), "tokenizer_config.json", "added_tokens.json")
    names = (CONFIG_FILE, GENERATION_FILE, *tokens)
    return [*weight_files(folder), *(folder / name for name in names if (folder / name).is_file())]


def model_type(folder: Path) -> str | None:
    """Return `model_type` of config.json, which Hugging Face has and CTranslate2 has not."""
    file = folder / CONFIG_FILE
    return read_settings(file).get("model_type") if file.exists() else None


def read_settings(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file of a model holds; `ModelError` if it cannot be read or is no object."""
    try:
        settings = load_json(file)
    except (OSError, ValueError) as err:
        raise ModelError(f"{file}: cannot be read ({first_line(err)}); fetch the folder again") from err
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: not an object with settings; fetch the folder again")
    return settings


def own_settings(settings: Mapping[str, Any], file: Path) -> tuple[Literal["full", "dynamic"], dict[str, float]]:
    """Return what this library keeps in a config.json: the audio context, and tokens per second by language.

    Raises `ModelError` for values that it does not write.
    """
    context, rates = settings.get("audio_context", "full"), settings.get("tokens_per_sec") or {}
    if context not in ("full", "dynamic"):
        raise ModelError(f"{file}: audio_context is 'full' or 'dynamic', got {context!r}")
    if not isinstance(rates, dict) or not all(type(r) in (int, float) and 0 < r < math.inf for r in rates.values()):
        raise ModelError(f"{file}: tokens_per_sec maps languages to positive numbers, got {str(rates)[:80]}")
    return cast("Literal['full', 'dynamic']", context), rates
