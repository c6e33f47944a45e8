"""Reader of CTranslate2's `model.bin`: named arrays, and aliases between them.

CTranslate2 itself loads such a file only into its engine, which gives no weights back. The layout follows its writer,
`ctranslate2/specs/model_spec.py`: little-endian; version, spec name, spec revision, variables (name, shape, type,
bytes), aliases. Names are length-prefixed and end with a zero byte. Arrays are views of the mapped file, not copies.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from src.utils.errors import ModelError

MODEL_FILE = "model.bin"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
OLDEST_BINARY_VERSION = 4  # since then each variable says its type; Whisper needs at least 5
NEWEST_BINARY_VERSION = 6
BFLOAT16 = "bfloat16"  # numpy has no such type: read as the upper half of a float32
DTYPES = ("float32", "int8", "int16", "int32", "float16", BFLOAT16)  # indices of CTranslate2's DataType

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Ct2Model:
    """A model file, read.

    `variables` holds what is on disk under every name, aliases included; `weight` gives real numbers.
    """

    path: Path
    spec: str
    revision: int
    variables: dict[str, NDArray[Any]]

    def weight(self, name: str) -> FloatArray:
        """Return a variable in float32, integers divided by their scale (one a row, or one a tensor).

        Raises: ModelError: absent, or quantised in a way without a plain scale (AWQ).
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

        Raises: ModelError: there is none.
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
    """Read a `model.bin`.

    Raises: ModelError: absent, cut short, or not a CTranslate2 model.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError as err:
        raise ModelError(
            f"{path}: no such file; a CTranslate2 folder holds model.bin, config.json, tokenizer.json"
        ) from err
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
    if not cursor.at_end():
        raise ModelError(f"{path}: {cursor.bytes_left()} bytes after the last alias; the file is damaged")
    return Ct2Model(path=path, spec=spec, revision=revision, variables=variables)


class _Cursor:
    """A position in the file; every read is checked against its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self._path, self._data, self._at = path, data, 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def bytes_left(self) -> int:
        return len(self._data) - self._at

    def integer(self, code: str) -> int:
        return cast(int, struct.unpack("<" + code, self._take(struct.calcsize("<" + code)).tobytes())[0])

    def string(self) -> str:
        raw = self._take(self.integer("H")).tobytes()
        try:
            return raw.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError as err:
            raise ModelError(
                f"{self._path}: a name at byte {self._at - len(raw)} is not text; damaged, or no model"
            ) from err

    def variable(self, name: str) -> NDArray[Any]:
        shape = tuple(self.integer("I") for _ in range(self.integer("B")))
        type_id, num_bytes = self.integer("B"), self.integer("I")
        if type_id >= len(DTYPES):
            raise ModelError(
                f"{self._path}: {name} has type {type_id}, known are 0 to {len(DTYPES) - 1}; damaged, or newer"
            )
        dtype = np.dtype(np.uint16 if DTYPES[type_id] == BFLOAT16 else DTYPES[type_id])
        if num_bytes != prod(shape) * dtype.itemsize:
            raise ModelError(
                f"{self._path}: {name} {shape} of {DTYPES[type_id]} cannot take {num_bytes} bytes; damaged"
            )
        stored = self._take(num_bytes).view(dtype).reshape(shape)
        return (stored.astype(np.uint32) << 16).view(np.float32) if DTYPES[type_id] == BFLOAT16 else stored

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        if num_bytes > self.bytes_left():
            raise ModelError(
                f"{self._path}: ends after {len(self._data)} bytes in the middle of the model; "
                "it is truncated or not a CTranslate2 model, fetch it again"
            )
        taken = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return taken
