"""Greedy Whisper on ONNX Runtime, from a folder of `export_onnx`: what exports are verified with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from src.models.export.verify import ClipBatch

Array = NDArray[np.float32]
ONNX_DIR = "onnx"  # in the folder of an export, as on the Hub
WARNINGS_OFF = 3  # severity


class OnnxWhisper:
    """An exported model on the CPU; it decodes clip by clip.

    Args: folder: of `export_onnx`, in float32 or int8.
    """

    def __init__(self, folder: Path) -> None:
        (encoder,) = (folder / ONNX_DIR).glob("encoder_model*.onnx")
        (decoder,) = (folder / ONNX_DIR).glob("decoder_model_merged*.onnx")
        self._encoder, self._decoder = _open(encoder), _open(decoder)
        self._generation = GenerationConfig.from_pretrained(folder)

    def transcribe(self, batch: ClipBatch) -> list[list[int]]:
        """Return the new tokens of each clip, up to and with the end token."""
        hidden = self.encode(batch.features.numpy())
        cap = batch.max_new_tokens
        return [self._greedy(hidden[row : row + 1], prompt, cap) for row, prompt in enumerate(batch.prompts)]

    def encode(self, features: Array) -> Array:
        """Return hidden states (B, frames // 2, d_model) of mel features (B, mels, frames)."""
        hidden: Array = self._encoder.run(None, {"input_features": features})[0]
        return hidden

    def logits_along(self, hidden: Array, prompt: list[int], tokens: Sequence[int]) -> Array:
        """Return (1 + len(tokens), vocabulary): what follows the prompt, and each of the tokens after it."""
        decoder = _CachedDecoder(self._decoder, hidden)
        return np.stack([decoder.step(given) for given in (prompt, *([token] for token in tokens))])

    def _greedy(self, hidden: Array, prompt: list[int], max_new_tokens: int) -> list[int]:
        generation = self._generation
        decoder = _CachedDecoder(self._decoder, hidden)
        logits = decoder.step(prompt)
        logits[generation.begin_suppress_tokens or []] = -np.inf
        tokens: list[int] = []
        while True:
            logits[generation.suppress_tokens or []] = -np.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == generation.eos_token_id or len(tokens) == max_new_tokens:
                return tokens
            logits = decoder.step(tokens[-1:])


class _CachedDecoder:
    """The decoder on one clip, with the keys and values of the steps before."""

    def __init__(self, session: Any, hidden: Array) -> None:
        self._session, self._hidden = session, hidden
        self._outputs = [output.name for output in session.get_outputs()]
        past = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
        shapes = {each.name: (1, each.shape[1], 0, each.shape[3]) for each in past}  # (B, heads, tokens, width)
        self._past = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        self._started = False

    def step(self, tokens: list[int]) -> Array:
        """Return the logits (vocabulary,) after the last of these tokens; later steps take one."""
        given = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "encoder_hidden_states": self._hidden,
            "use_cache_branch": np.array([self._started]),
            **self._past,
        }
        found = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        present = {name: found[name.replace("past_key_values", "present")] for name in self._past}
        self._past |= {name: value for name, value in present.items() if value.size}  # empty: as it was
        self._started = True
        logits: Array = found["logits"][0, -1]
        return logits


def _open(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = WARNINGS_OFF
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
