"""Checkpoints in Hugging Face format, which stock transformers loads; and the steps that all exports share.

No export counts as saved before the tool that it is for has loaded it and given the source model's text. An older
export of the same name is replaced when the new one is complete; any other folder is refused.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from src.models.dynamic_context import DynamicWhisper
from src.models.export.verify import Clips, keeps_length, load_clips, save_clips, verify_transcripts
from src.models.loading import load_checkpoint
from src.models.processor import save_processor
from src.utils.errors import MissingDependencyError, ModelError
from src.utils.files import atomic_folder, load_json, recover_folder, writing

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
ADAPTERS_FILE = "adapters.safetensors"
ADAPTER_SETTINGS = "adapter_config"  # in its metadata: what `adapter_config.json` of PEFT is to say


def export_huggingface(
    model: Any,
    processor: WhisperProcessor,
    output_dir: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Tensor] | None = None,
    adapter_settings: Mapping[str, Any] | None = None,
    verify_clips: Clips = (),
) -> Path:
    """Save a model and its processor, and verify that stock transformers loads the same weights and transcribes alike.

    Args:
        model: `WhisperForConditionalGeneration` or a subclass with its state-dict keys.
        processor: of the model.
        output_dir: replaced if it is an older export; appears whole or not at all.
        provenance: how the model was made, saved as `provenance.json`.
        adapters: that were merged into the model, saved as `adapters.safetensors`, with which training can go on.
        adapter_settings: of PEFT for the adapters, base model included, with which `export_peft` saves them unmerged.
        verify_clips: speech of up to 30 s, transcribed by both, and kept in the folder for later exports, as
            `.verification_clips.safetensors`. Without any, bundled English clips serve.

    Returns:
        output_dir, loadable by `WhisperForConditionalGeneration`, `WhisperProcessor` and `pipeline`.

    Raises:
        ModelError: the weights or the text differ after reloading, or the model is not plain Whisper.
        FileExistsError: output_dir contains something else.
        WriteError: the disk is full; an older export stays as it is. So for all exports.
    """
    output_dir = Path(output_dir)
    with new_export(output_dir, ["config.json"]) as folder:
        _save(model, processor, folder)
        if provenance is not None:
            (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        if adapters is not None:
            said = None if adapter_settings is None else {ADAPTER_SETTINGS: json.dumps(dict(adapter_settings))}
            save_file({name: tensor.contiguous() for name, tensor in adapters.items()}, folder / ADAPTERS_FILE, said)
        save_clips(verify_clips, folder)
        _verify_huggingface(model, processor, folder, verify_clips)
    logger.info("saved %s (Hugging Face format, reloaded and compared)", output_dir)
    return output_dir


@contextmanager
def new_export(output_dir: Path, marks: Sequence[str]) -> Iterator[Path]:
    """Yield a folder that becomes `output_dir` when the block ends; an older export is recognised by one of its files.

    Raises `FileExistsError` if output_dir contains something else, `WriteError` if the disk is full.
    """
    recover_folder(output_dir)
    replace = any((output_dir / mark).is_file() for mark in marks)
    with atomic_folder(output_dir, replace=replace, durable=True) as folder:
        yield folder


@contextmanager
def loaded_source(
    source: str | Path | Any, processor: Any, clips: Clips | None
) -> Iterator[tuple[DynamicWhisper, Any, Clips | None]]:
    """Yield the source of an export as a model in float32 on the CPU, its processor, and the clips to verify with.

    The source is a Hugging Face folder, or a model together with its processor, which are saved for the time of the
    block. The clips are by default those that the folder keeps, if any.
    """
    with nullcontext(source) if isinstance(source, str | Path) else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if place is not source:
            if processor is None:
                raise ModelError("a model needs its processor: pass processor=, or a Hugging Face folder instead")
            with writing(folder):
                _save(source, processor, folder)
        yield *load_checkpoint(folder), (load_clips(folder) or None) if clips is None else clips


def require_packages(what: str, names: Sequence[str]) -> None:
    """Raise `MissingDependencyError` unless the optional packages of an export are installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(f"{what} needs {', '.join(missing)}: pip install {' '.join(names)}")


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the provenance of an export; empty if it has none that can be read."""
    try:
        return dict(load_json(folder / PROVENANCE))
    except (OSError, ValueError, TypeError):
        return {}


def _save(model: Any, processor: WhisperProcessor, folder: Path) -> None:
    if not isinstance(model, WhisperForConditionalGeneration):
        raise ModelError(
            f"cannot export a {type(model).__name__}; pass the Whisper model itself (LoRA: after merge_and_unload)"
        )
    model.save_pretrained(folder)
    save_processor(processor, folder)


def _verify_huggingface(model: Any, processor: WhisperProcessor, folder: Path, clips: Clips) -> None:
    reloaded = WhisperForConditionalGeneration.from_pretrained(folder, dtype=model.dtype).to(model.device)
    saved, expected = reloaded.state_dict(), model.state_dict()
    wrong = sorted(saved.keys() ^ expected.keys())
    wrong += [name for name in sorted(saved.keys() & expected.keys()) if not torch.equal(saved[name], expected[name])]
    if wrong:
        raise ModelError(
            f"{folder}: {len(wrong)} weights differ after reloading: {', '.join(wrong[:3])}; LoRA adapters must be "
            "merged first"
        )
    if keeps_length(model):  # stock Whisper takes 30 s only
        del reloaded, saved  # a GPU that trains has no room for a third copy
        reloaded = DynamicWhisper.from_pretrained(folder, dtype=model.dtype).to(model.device)
    name = f"{folder}: the reloaded model"
    verify_transcripts(model, processor, lambda batch: batch.generate(reloaded), name=name, clips=clips or None)
