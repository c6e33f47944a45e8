"""silero-vad's network in NumPy, with the 16 kHz weights that the package ships.

torch takes seconds to import, which the first transcript of a process would wait for, and a call a window of 32 ms.
Here all but the recurrent layer runs over many windows at once (equal to silero's own to 1e-5, tested). The layers are
those of `silero_vad/tinygrad_model.py`; a TorchScript file is a zip archive with its tensors as plain bytes.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.utils.errors import MissingDependencyError, ModelError

WINDOW_SAMPLES = 512  # 32 ms: the only window that the 16 kHz model takes
CONTEXT_SAMPLES = 64  # of the window before, prepended
STATE_SIZE = 128  # of the LSTM

FloatArray = NDArray[np.float32]
State = tuple[FloatArray, FloatArray]  # hidden and cell, (B, 128) each

_N_FFT, _HOP, _PAD = 256, 128, 64
_BINS = _N_FFT // 2 + 1
_WEIGHTS_FILE = Path("data", "silero_vad.jit")
_FIRST_TENSOR = 2  # of the 16 kHz model in the archive
_SHAPES = (
    (2 * _BINS, _N_FFT),  # Fourier transform: cosines, then sines
    *((128, _BINS, 3), (128,), (64, 128, 3), (64,), (64, 64, 3), (64,), (128, 64, 3), (128,)),  # convolutions
    *((4 * STATE_SIZE, 128), (4 * STATE_SIZE, STATE_SIZE), (4 * STATE_SIZE,), (4 * STATE_SIZE,)),  # LSTM
    *((1, STATE_SIZE), (1,)),  # speech or not
)
_STRIDES = (1, 2, 2, 1)


class SpeechNetwork:
    """The weights; what is recurrent is kept by the caller.

    Args:
        weights: of the shapes above, in their order.
    """

    def __init__(self, weights: Sequence[FloatArray]) -> None:
        self._fourier = weights[0].T
        self._convolutions = [
            (weight.reshape(len(weight), -1).T.copy(), bias, stride)
            for weight, bias, stride in zip(weights[1:9:2], weights[2:9:2], _STRIDES, strict=True)
        ]
        self._input, self._hidden = weights[9].T.copy(), weights[10].T.copy()
        self._bias = weights[11] + weights[12]
        self._output, self._output_bias = weights[13][0], weights[14]

    def gates(self, windows: NDArray[np.floating[Any]]) -> FloatArray:
        """Compute all that does not depend on the windows before.

        Args:
            windows: (n, 576), each with the 64 samples before it; 6 kB of memory each.
        Returns: (n, 512), for `step`.
        """
        padded = np.pad(windows.astype(np.float32, copy=False), ((0, 0), (0, _PAD)), mode="reflect")  # (n, 640)
        frames = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT, axis=1)[:, ::_HOP]  # (n, 4, 256)
        spectrum = frames.reshape(-1, _N_FFT) @ self._fourier  # one large product is faster than n small ones
        layer = np.sqrt(spectrum[:, :_BINS] ** 2 + spectrum[:, _BINS:] ** 2).reshape(len(windows), -1, _BINS)
        for weight, bias, stride in self._convolutions:
            layer = _convolve(layer, weight, bias, stride)
        gates: FloatArray = layer[:, 0] @ self._input + self._bias  # four frames have become one
        return gates

    def step(self, gates: FloatArray, state: State) -> tuple[FloatArray, State]:
        """Hear one window of each stream.

        Args:
            gates: (B, 512).
        Returns: (probabilities of speech (B,), the state after it).
        """
        hidden, cell = state
        enter, forget, value, leave = np.split(gates + hidden @ self._hidden, 4, axis=1)
        cell = _sigmoid(forget) * cell + _sigmoid(enter) * np.tanh(value)
        hidden = _sigmoid(leave) * np.tanh(cell)
        return _sigmoid(np.maximum(hidden, 0.0) @ self._output + self._output_bias), (hidden, cell)


def new_state(streams: int) -> State:
    """Return the state before the first window."""
    return np.zeros((streams, STATE_SIZE), np.float32), np.zeros((streams, STATE_SIZE), np.float32)


@cache
def load_network() -> SpeechNetwork:
    """Load the weights of the installed package, once.

    Raises: MissingDependencyError: it is not installed. ModelError: its weights are damaged, or laid out otherwise.
    """
    package = importlib.util.find_spec("silero_vad")
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(
            "speech detection needs silero-vad, which is not installed: pip install 'silero-vad>=6.2,<7'"
        )
    path = Path(package.submodule_search_locations[0], _WEIGHTS_FILE)
    try:
        return SpeechNetwork(_read_weights(path))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as err:
        raise ModelError(
            f"silero-vad is installed, but its weights cannot be used: {path}: {err}; "
            "install it again: pip install --force-reinstall --no-deps silero-vad==6.2.3"
        ) from err


def _read_weights(path: Path) -> list[FloatArray]:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        stored = [archive.read(f"{root}/data/{_FIRST_TENSOR + i}") for i in range(len(_SHAPES))]
    sizes, expected = [len(each) for each in stored], [4 * prod(shape) for shape in _SHAPES]
    if sizes != expected:
        raise ValueError(f"tensors of {sizes} bytes, expected {expected}")
    return [np.frombuffer(each, dtype="<f4").reshape(shape) for each, shape in zip(stored, _SHAPES, strict=True)]


def _convolve(layer: FloatArray, weight: FloatArray, bias: FloatArray, stride: int) -> FloatArray:
    """Convolve (n, frames, channels) with three taps, and rectify."""
    padded = np.pad(layer, ((0, 0), (1, 1), (0, 0)))
    taps = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=1)[:, ::stride]  # (n, frames, channels, 3)
    rows: FloatArray = np.maximum(taps.reshape(-1, len(weight)) @ weight + bias, 0.0)
    return rows.reshape(*taps.shape[:2], -1)


def _sigmoid(x: FloatArray) -> FloatArray:
    shares: FloatArray = 0.5 * np.tanh(0.5 * x) + 0.5  # exp would overflow
    return shares
