"""Files of a CTranslate2 Whisper folder, read and compared with each other without torch.

CTranslate2 itself notices only during inference that a variable is absent, of another shape or not finite; alignment
heads that the decoder lacks end the process.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.utils.errors import ModelError, first_line
from src.utils.files import load_json

BINARY_VERSIONS = range(4, 7)  # since 4 each variable says its type
DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # indices of CTranslate2's DataType
SPEC_NAME = "WhisperSpec"
_HEAD_DIM = 64  # of every Whisper
# of a layer, in units of the width d, "f" for that of the feed-forward network
_LAYER = {
    "self_attention/layer_norm/gamma": (1,), "self_attention/layer_norm/beta": (1,),
    "self_attention/linear_0/weight": (3, 1), "self_attention/linear_0/bias": (3,),
    "self_attention/linear_1/weight": (1, 1), "self_attention/linear_1/bias": (1,),
    "ffn/layer_norm/gamma": (1,), "ffn/layer_norm/beta": (1,),
    "ffn/linear_0/weight": ("f", 1), "ffn/linear_0/bias": ("f",),
    "ffn/linear_1/weight": (1, "f"), "ffn/linear_1/bias": (1,),
}  # fmt: skip
_CROSS = {
    "attention/layer_norm/gamma": (1,), "attention/layer_norm/beta": (1,),
    "attention/linear_0/weight": (1, 1), "attention/linear_0/bias": (1,),
    "attention/linear_1/weight": (2, 1), "attention/linear_1/bias": (2,),
    "attention/linear_2/weight": (1, 1), "attention/linear_2/bias": (1,),
}  # fmt: skip

Variables = dict[str, NDArray[Any]]


def check_ct2_folder(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of layers and heads of the decoder.

    Raises:
        ModelError: model.bin, vocabulary and config.json are damaged or not of one Whisper.
    """
    try:
        variables = read_variables(folder / "model.bin")
        tokens, width = variables["decoder/embeddings/weight"].shape
        expected: dict[str, tuple[int, ...]] = {
            "encoder/conv1/weight": (width, variables["encoder/conv1/weight"].shape[1], 3),
            "encoder/conv2/weight": (width, width, 3),
            "decoder/embeddings/weight": (tokens, width),
            "decoder/projection/weight": (tokens, width),
        }
        layers = {}
        for side in ("encoder", "decoder"):
            layers[side] = len({m[1] for name in variables if (m := re.match(rf"{side}/layer_(\d+)/", name))})
            positions = len(variables[f"{side}/position_encodings/encodings"])
            expected |= {
                f"{side}/position_encodings/encodings": (positions, width),
                f"{side}/layer_norm/gamma": (width,),
                f"{side}/layer_norm/beta": (width,),
            }
            hidden = len(variables[f"{side}/layer_0/ffn/linear_0/bias"])
            parts = _LAYER | (_CROSS if side == "decoder" else {})
            for at in range(layers[side]):
                for name, sizes in parts.items():
                    shape = tuple(hidden if size == "f" else int(size) * width for size in sizes)
                    expected[f"{side}/layer_{at}/{name}"] = shape
        for name, shape in expected.items():
            if variables[name].shape != shape:
                raise ValueError(f"{name} has shape {variables[name].shape}, not {shape}")
        floats = {name: values for name, values in variables.items() if values.dtype.kind == "f"}
        if wrong := [n for n, v in floats.items() if not np.isfinite(np.add.reduce(v, axis=None, dtype=np.float32))]:
            raise ValueError(f"{len(wrong)} variables have nan or infinity, first {wrong[0]}")
        for key in ("suppress_ids", "suppress_ids_begin", "lang_ids"):
            for token in config.get(key) or ():
                if type(token) is not int or not 0 <= token < tokens:
                    raise ValueError(f"config.json: {key} has {token!r}, which is no token")
        for layer, head in config.get("alignment_heads") or ():
            if not (type(layer) is type(head) is int and min(layer, head) >= 0):
                raise ValueError(f"config.json: alignment_heads has {[layer, head]}, which is no layer and head")
        vocabulary = next((f for f in (folder / "vocabulary.json", folder / "vocabulary.txt") if f.exists()), None)
        if vocabulary is None:
            raise ValueError("no vocabulary.json or vocabulary.txt")
        listed = load_json(vocabulary) if vocabulary.suffix == ".json" else _lines(vocabulary)
        if not isinstance(listed, list) or len(listed) != tokens:
            raise ValueError(f"{vocabulary.name} does not list the {tokens} tokens of model.bin")
        return layers["decoder"], count_heads(variables, "decoder", width)
    except (OSError, struct.error, LookupError, TypeError, ValueError, ArithmeticError) as err:
        problem = f"no {err}" if isinstance(err, KeyError) else first_line(err)
        raise ModelError(f"{folder}: not a whole Whisper of CTranslate2: {problem}; export the model again") from err


def count_heads(variables: Variables, side: str, width: int) -> int:
    """Return the heads of "encoder" or "decoder", which revisions 1 and 2 of the format do not store."""
    return int(np.ravel(variables.get(f"{side}/num_heads", width // _HEAD_DIM))[0])


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{file.name} is not a plain file")
    return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def read_variables(path: Path) -> Variables:
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
