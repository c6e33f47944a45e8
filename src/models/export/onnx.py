"""Checkpoints for ONNX Runtime, in the browser (transformers.js) and outside (Hugging Face Optimum).

The folder is laid out as those tools expect it: configuration and tokenizer, and below `onnx/` the encoder and one
decoder for all steps. It is kept only if ONNX Runtime gives the source's text. There are no cross-attentions among the
outputs, so word times are not to be had from it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from transformers import WhisperProcessor

from src.data.audio import Waveform
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import source_folder
from src.models.export.verify import (
    MAX_WORD_MISMATCH_QUANTISED,
    bundled_clips,
    prepare_batch,
    quiet_inference,
    verify_transcripts,
)
from src.models.processor import save_processor
from src.utils.errors import MissingDependencyError, ModelError
from src.utils.files import atomic_folder, recover_folder

if TYPE_CHECKING:  # needs the optional packages
    from src.models.export.onnx_runtime import OnnxWhisper

logger = logging.getLogger(__name__)

OnnxQuantization = Literal["none", "int8"]
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ENCODER_FILES = ("onnx/encoder_model.onnx", "onnx/encoder_model_quantized.onnx")
MAX_LOGIT_DIFFERENCE = 0.01  # measured 2026-11-28, tiny.en and base, one CPU core: 3e-5 to 7e-5


def export_onnx(
    source: str | Path | Any,
    output_dir: str | Path,
    *,
    processor: WhisperProcessor | None = None,
    quantization: OnnxQuantization = "none",
    verify_clips: Sequence[Waveform] | None = None,
    language: str | None = None,
) -> Path:
    """Convert for ONNX Runtime, and prove it by transcribing.

    Args:
        source: a Hugging Face folder, or a model together with its `processor`.
        output_dir: replaced if it is an older export; appears whole or not at all.
        quantization: "none" keeps float32; "int8" is for the weights of the linear layers and the embedding.
        verify_clips: (T,) float32 each, 16 kHz, up to 30 s, transcribed by both; five bundled ones by default.
        language: of the clips, for multilingual models; by default what the generation config says, else detected.
    Returns: output_dir. The encoder takes 10 to 3,000 frames if the checkpoint has dynamic context, else 3,000.
    Raises:
        MissingDependencyError: onnx, onnxruntime or onnxscript is absent.
        ModelError: unknown quantization, or more than 20% of the words differ (without quantization: any word, or a
            logit by more than 0.01).
        FileExistsError: output_dir holds something else.
    """
    if quantization not in get_args(OnnxQuantization):
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(get_args(OnnxQuantization))}")
    require_onnx()
    with source_folder(source, processor) as folder:
        return _convert(folder, Path(output_dir), quantization, verify_clips, language)


def require_onnx() -> None:
    """Raise `MissingDependencyError` unless the optional packages are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"export to ONNX needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")


def _convert(
    hf_dir: Path,
    output_dir: Path,
    quantization: OnnxQuantization,
    clips: Sequence[Waveform] | None,
    language: str | None,
) -> Path:
    from src.models.export.onnx_graphs import write_onnx
    from src.models.export.onnx_runtime import ONNX_DIR, OnnxWhisper

    model = DynamicWhisper.from_pretrained(hf_dir, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(hf_dir)
    exact = quantization == "none"
    is_export = any((output_dir / name).is_file() for name in ENCODER_FILES)
    recover_folder(output_dir)
    with atomic_folder(output_dir, replace=is_export, durable=True) as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_processor(processor, folder)
        (folder / ONNX_DIR).mkdir()
        write_onnx(model, folder / ONNX_DIR, int8=not exact)
        exported = OnnxWhisper(folder)
        mismatch = verify_transcripts(
            model,
            processor,
            exported.transcribe,
            name=f"{output_dir}: the ONNX model (quantization {quantization})",
            allowed=0.0 if exact else MAX_WORD_MISMATCH_QUANTISED,
            clips=clips,
            language=language,
        )
        if exact:
            _verify_logits(model, processor, exported, output_dir, language)
    logger.info("saved %s (ONNX, quantization %s, %.0f%% of words differ)", output_dir, quantization, 100 * mismatch)
    return output_dir


def _verify_logits(
    model: Any, processor: WhisperProcessor, exported: OnnxWhisper, output_dir: Path, language: str | None
) -> None:
    """Compare the logits of every step along the source's transcript of one bundled clip."""
    batch = prepare_batch(model, processor.tokenizer, bundled_clips()[:1], language)
    prompt, end = batch.prompts[0], processor.tokenizer.eos_token_id
    tokens = [token for token in batch.generate(model)[0] if token < end]  # every id from the end token on is special
    with quiet_inference(model):
        output = model(batch.features, decoder_input_ids=torch.tensor([[*prompt, *tokens]]))
    expected = output.logits[0, len(prompt) - 1 :].numpy()  # (1 + tokens, vocabulary)
    found = exported.logits_along(exported.encode(batch.features.numpy()), prompt, tokens)
    difference = float(np.abs(found - expected).max())
    if not difference <= MAX_LOGIT_DIFFERENCE:  # nan too
        raise ModelError(
            f"{output_dir}: a logit of the ONNX model differs by {difference:.2g}, allowed are {MAX_LOGIT_DIFFERENCE}, "
            "so it was not saved"
        )
    logger.info("logits of torch and ONNX Runtime differ by at most %.1e", difference)
