"""Export a checkpoint for another tool; it is kept only if it transcribes a few clips as the source does.

    python scripts/export.py --model checkpoints/best_model_hf --format ct2 --output exports/ct2
    python scripts/export.py --model tiny.en --format onnx --quantization int8 --output exports/onnx

The clips are those of your data that training kept in the folder, else five bundled English ones. hf is for
transformers, ct2 for CTranslate2 and faster-whisper, onnx for ONNX Runtime, Optimum and transformers.js, ggml for
whisper.cpp, peft are the adapters of a LoRA training, not merged. The last line printed is the folder; an error is one
line, with exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_model, check_model_path, path_argument, print_result, run_main
from src.models.export.adapter import export_peft
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.export.ggml import GGML_PACKAGES, export_ggml
from src.models.export.huggingface import export_huggingface, require_packages
from src.models.export.onnx import ONNX_PACKAGES, export_onnx
from src.models.export.verify import load_clips
from src.models.whisper_model import WhisperModelManager
from src.utils.config import load_config
from src.utils.errors import ModelError
from src.utils.files import expand_path
from src.utils.logging_config import setup_logging

FORMATS = ("hf", "ct2", "onnx", "ggml", "peft")
QUANTISED = ("ct2", "onnx")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_and_output(parser)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--quantization", help="ct2: int8 (default), float16, float32, ...; onnx: none (default), int8")
    arguments = parser.parse_args(given)
    setup_logging("INFO")
    return print_result(lambda: export(arguments.model, arguments.format, arguments.quantization, arguments.output))


def add_model_and_output(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--output", required=True, type=path_argument, help="folder; an older export there is replaced")


def export(model: str, target: str, quantization: str | None, output: Path) -> Path:
    """Load a checkpoint, convert and verify it.

    Raises: WhisperASRError: no such checkpoint, a quantization that the format does not have, an absent package, or an
        export that says something else.
    """
    if target not in QUANTISED and quantization not in (None, "none"):
        raise ModelError(f"--quantization {quantization}: {target} has one form of weights; leave it out, or take ct2")
    if needed := {"onnx": ONNX_PACKAGES, "ggml": GGML_PACKAGES}.get(target):
        require_packages(f"export to {target}", needed)  # before minutes of download
    check_model_path(model)
    config = load_config(None, overrides={"device": "cpu"})
    if target == "peft":
        return export_peft(expand_path(model), output, cache_dir=config.paths.cache_dir)
    manager = WhisperModelManager(config)
    source, processor = manager.initialize_model(model)
    assert manager.weights is not None  # of a model that is loaded
    clips = load_clips(manager.weights.path)
    if target == "hf":
        return export_huggingface(source, processor, output, verify_clips=clips)
    options: dict[str, Any] = {"quantization": quantization} if quantization and target in QUANTISED else {}
    convert: Callable[..., Path] = {"ct2": export_ctranslate2, "onnx": export_onnx, "ggml": export_ggml}[target]
    return convert(source, output, processor=processor, verify_clips=clips or None, **options)


if __name__ == "__main__":
    run_main(main)
