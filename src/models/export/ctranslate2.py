"""Checkpoints for CTranslate2 and faster-whisper."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters.transformers import WhisperLoader
from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES
from transformers import WhisperProcessor

from src.models.dynamic_context import existing_heads, get_cap_rates, get_language
from src.models.export.huggingface import loaded_source, new_export
from src.models.export.verify import ClipBatch, Clips, verify_transcripts
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)


def export_ctranslate2(
    source: str | Path | Any,
    output_dir: str | Path,
    *,
    processor: WhisperProcessor | None = None,
    quantization: str = "int8",
    verify_clips: Clips | None = None,
) -> Path:
    """Convert for CTranslate2 and faster-whisper, and verify the export by transcribing.

    Args:
        source: a Hugging Face folder, or a model together with its `processor`.
        output_dir: replaced if it is an older export; appears whole or not at all.
        processor: of a model.
        quantization: of the weights: "int8", "float16", "float32", ... as CTranslate2 names them.
        verify_clips: speech of up to 30 s, transcribed by both; by default that of the user's data which the folder
            keeps, else five bundled English clips.

    Returns:
        output_dir; its config.json keeps `audio_context`, `language` and `tokens_per_sec`, which CTranslate2 ignores.

    Raises:
        ModelError: unknown quantization, alignment heads that the model does not have, or more than 20% of the words
            differ (float32 and float16: any word) and not by close calls alone, see `verify_transcripts`.
        FileExistsError: output_dir contains something else.
    """
    if quantization not in ACCEPTED_MODEL_TYPES:
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(ACCEPTED_MODEL_TYPES)}")
    output_dir = Path(output_dir)
    given = loaded_source(source, processor, verify_clips)
    with given as (model, own, clips), new_export(output_dir, ["model.bin"]) as folder:
        existing_heads(model)  # CTranslate2 copies the list as it is
        # what `TransformersConverter` does, with a copy of the model that is loaded and checked already
        with torch.no_grad():
            spec = WhisperLoader()(copy.deepcopy(model), own.tokenizer)  # which is quantised in place
        spec.validate()
        spec.optimize(quantization=quantization)
        spec.save(str(folder))
        own.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))  # these two for faster-whisper
        own.feature_extractor.save_pretrained(folder)
        config_file = folder / "config.json"
        said = {
            "language": get_language(model),
            "tokens_per_sec": get_cap_rates(model.config),
        }  # if the checkpoint does
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config |= {"audio_context": model.audio_context, **{key: value for key, value in said.items() if value}}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        engine = ctranslate2.models.Whisper(
            str(folder), device="cpu", intra_threads=torch.get_num_threads(),
            compute_type="int8" if quantization.startswith("int8") else "float32",  # no CPU computes in 16 bits
        )  # fmt: skip

        def transcribe(batch: ClipBatch) -> list[list[int]]:
            mel = ctranslate2.StorageView.from_array(np.ascontiguousarray(batch.features.numpy()))
            cap = 2 * batch.max_new_tokens  # CTranslate2 gives half of it to new tokens
            found = engine.generate(mel, batch.prompts, beam_size=1, max_length=cap)
            return [result.sequences_ids[0] for result in found]

        quantised, name = quantization not in ("float32", "float16"), f"{output_dir}: the {quantization} model"
        mismatch = verify_transcripts(model, own, transcribe, name=name, quantised=quantised, clips=clips)
    logger.info("saved %s (CTranslate2 %s, %.0f%% of words differ)", output_dir, quantization, 100 * mismatch)
    return output_dir
