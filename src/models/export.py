"""Checkpoints for other tools: Hugging Face, and CTranslate2 for faster-whisper.

Nothing counts as saved before the tool that it is for has loaded it and given the source model's text. An older export
of the same name is replaced when the new one is complete; any other folder is refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from src.data.audio import Waveform
from src.models.dynamic_context import DynamicWhisper, get_audio_context
from src.models.export_check import MAX_WORD_MISMATCH_QUANTISED, ClipBatch, keeps_length, verify_transcripts
from src.models.processor import save_processor
from src.utils.atomic import atomic_folder, recover_folder
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)

EXACT_QUANTIZATIONS = ("float32", "float16")  # no word may change
PROVENANCE = "provenance.json"
ADAPTERS_FILE = "adapters.safetensors"
FASTER_WHISPER_FILES = ("tokenizer.json", "preprocessor_config.json")


def export_huggingface(
    model: Any,
    processor: WhisperProcessor,
    output_dir: Path,
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


def export_ctranslate2(
    source: Path | Any,
    output_dir: Path,
    *,
    processor: WhisperProcessor | None = None,
    quantization: str = "int8",
    verify_clips: Sequence[Waveform] | None = None,
    language: str | None = None,
) -> Path:
    """Convert for CTranslate2 and faster-whisper, and prove it by transcribing.

    Args:
        source: a Hugging Face folder, or a model together with its `processor`.
        output_dir: replaced if it is an older export; appears whole or not at all.
        quantization: of the weights: "int8", "float16", "float32", ... as CTranslate2 names them.
        verify_clips: (T,) float32 each, 16 kHz, up to 30 s, transcribed by both; five bundled ones by default.
        language: of the clips, for multilingual models; by default what the generation config says, else detected.
    Returns: output_dir; its config.json keeps `audio_context`, which CTranslate2 ignores.
    Raises: ModelError: unknown quantization, or more than 20% of the words differ (float32 and float16: any word).
        FileExistsError: output_dir holds something else.
    """
    if quantization not in ACCEPTED_MODEL_TYPES:
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(ACCEPTED_MODEL_TYPES)}")
    with source_folder(source, processor) as folder:
        return _convert(folder, output_dir, quantization, verify_clips, language)


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


def _convert(
    hf_dir: Path, output_dir: Path, quantization: str, clips: Sequence[Waveform] | None, language: str | None
) -> Path:
    model = DynamicWhisper.from_pretrained(hf_dir, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(hf_dir)
    recover_folder(output_dir)
    with atomic_folder(output_dir, replace=(output_dir / "model.bin").is_file(), durable=True) as folder:
        converter = TransformersConverter(str(hf_dir), copy_files=list(FASTER_WHISPER_FILES))
        converter.convert(str(folder), quantization=quantization, force=True)
        _write_audio_context(folder / "config.json", get_audio_context(model.config))
        mismatch = verify_transcripts(
            model,
            processor,
            _transcriber(folder, quantization),
            name=f"{output_dir}: the {quantization} model",
            allowed=0.0 if quantization in EXACT_QUANTIZATIONS else MAX_WORD_MISMATCH_QUANTISED,
            clips=clips,
            language=language,
        )
    logger.info("saved %s (CTranslate2 %s, %.0f%% of words differ)", output_dir, quantization, 100 * mismatch)
    return output_dir


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


def _transcriber(folder: Path, quantization: str) -> Callable[[ClipBatch], list[list[int]]]:
    compute_type = "int8" if quantization.startswith("int8") else "float32"  # no CPU computes in 16 bits
    threads = torch.get_num_threads()
    engine = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type=compute_type, intra_threads=threads)

    def transcribe(batch: ClipBatch) -> list[list[int]]:
        mel = ctranslate2.StorageView.from_array(np.ascontiguousarray(batch.features.numpy()))
        cap = 2 * batch.max_new_tokens  # CTranslate2 gives half of it to new tokens
        return [result.sequences_ids[0] for result in engine.generate(mel, batch.prompts, beam_size=1, max_length=cap)]

    return transcribe


def _write_audio_context(config_file: Path, audio_context: str) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["audio_context"] = audio_context
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
