"""Checkpoints in the format of Hugging Face, which stock transformers loads.

Nothing counts as saved before the tool that it is for has loaded it and given the source model's text. An older export
of the same name is replaced when the new one is complete; any other folder is refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from src.models.dynamic_context import DynamicWhisper
from src.models.export.verify import keeps_length, verify_transcripts
from src.models.processor import save_processor
from src.utils.errors import ModelError
from src.utils.files import atomic_folder, recover_folder

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
ADAPTERS_FILE = "adapters.safetensors"


def export_huggingface(
    model: Any,
    processor: WhisperProcessor,
    output_dir: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model and its processor, and prove it: stock transformers loads it, weights and transcripts are the same.

    Args:
        model: `WhisperForConditionalGeneration` or a subclass with its state-dict keys.
        processor: of the model.
        output_dir: replaced if it is an older export; appears whole or not at all.
        provenance: how the model came about, for `provenance.json` beside it.
        adapters: that were merged into the model, for `adapters.safetensors`, with which training can go on.
    Returns: output_dir, loadable by `WhisperForConditionalGeneration`, `WhisperProcessor` and `pipeline`.
    Raises: ModelError: the weights or the text differ after reloading, or the model is not plain Whisper.
        FileExistsError: output_dir holds something else.
    """
    output_dir = Path(output_dir)
    _check_plain(model)
    recover_folder(output_dir)
    with atomic_folder(output_dir, replace=(output_dir / "config.json").is_file(), durable=True) as folder:
        _save(model, processor, folder)
        if provenance is not None:
            (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        if adapters is not None:
            save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, folder / ADAPTERS_FILE)
        _verify_huggingface(model, processor, folder)
    logger.info("saved %s (Hugging Face format, reloaded and compared)", output_dir)
    return output_dir


@contextmanager
def source_folder(source: Path | Any, processor: WhisperProcessor | None) -> Iterator[Path]:
    """Yield what is to be converted as a Hugging Face folder; a model is saved for as long.

    Raises: ModelError: a model without its processor, or one that is not plain Whisper.
    """
    if isinstance(source, str | Path):
        yield Path(source)
        return
    if processor is None:
        raise ModelError("a model needs its processor: pass processor=, or a Hugging Face folder instead of the model")
    _check_plain(source)
    with tempfile.TemporaryDirectory() as folder:
        _save(source, processor, Path(folder))
        yield Path(folder)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what an export says of its making; empty where it says nothing or there is none."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


def _check_plain(model: Any) -> None:
    if not isinstance(model, WhisperForConditionalGeneration):
        raise ModelError(
            f"cannot export a {type(model).__name__}; pass the Whisper model itself (LoRA: after merge_and_unload)"
        )


def _save(model: Any, processor: WhisperProcessor, folder: Path) -> None:
    model.save_pretrained(folder)
    save_processor(processor, folder)


def _verify_huggingface(model: Any, processor: WhisperProcessor, folder: Path) -> None:
    reloaded = WhisperForConditionalGeneration.from_pretrained(folder, dtype=model.dtype).to(model.device)
    saved, expected = reloaded.state_dict(), model.state_dict()
    wrong = [name for name in saved if name not in expected or not torch.equal(saved[name], expected[name])]
    if wrong or len(saved) != len(expected):
        raise ModelError(
            f"{folder}: {len(wrong) or abs(len(saved) - len(expected))} weights differ after reloading: "
            f"{', '.join(wrong[:3])}; LoRA adapters must be merged first"
        )
    if keeps_length(model):  # stock Whisper takes 30 s only
        del reloaded, saved  # a GPU that trains has no room for a third copy
        reloaded = DynamicWhisper.from_pretrained(folder, dtype=model.dtype).to(model.device)
    verify_transcripts(model, processor, lambda batch: batch.generate(reloaded), name=f"{folder}: the reloaded model")
