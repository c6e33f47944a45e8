"""Checkpoints for ONNX Runtime, in the browser (transformers.js) and outside (Hugging Face Optimum).

The folder is laid out as those tools expect it: configuration and tokenizer, and below `onnx/` the encoder and one
decoder for all steps. It is kept only if ONNX Runtime gives the source's text. Cross-attentions are not among the
outputs, so word times are unavailable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, WhisperProcessor

from src.models.export import verify
from src.models.export.huggingface import loaded_source, new_export, require_packages
from src.models.processor import save_processor
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)

OnnxQuantization = Literal["none", "int8"]
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_DIR = "onnx"  # in the folder of an export, as on the Hub
ENCODER_FILES = ("onnx/encoder_model.onnx", "onnx/encoder_model_quantized.onnx")
MAX_LOGIT_DIFFERENCE = 0.01  # measured 2026-11-28, tiny.en and base, one CPU core: 3e-5 to 7e-5
WARNINGS_OFF = 3  # severity

FloatArray = NDArray[np.float32]


def export_onnx(
    source: str | Path | Any,
    output_dir: str | Path,
    *,
    processor: WhisperProcessor | None = None,
    quantization: OnnxQuantization = "none",
    verify_clips: verify.Clips | None = None,
) -> Path:
    """Convert for ONNX Runtime, and verify the export by transcribing.

    Arguments are those of `export_ctranslate2`, but for the quantization: "none" keeps float32; "int8" quantises the
    weights of the linear layers and the embedding.

    Returns:
        output_dir. The encoder takes 10 to 3,000 frames if the checkpoint has dynamic context, else 3,000.

    Raises:
        MissingDependencyError: onnx, onnxruntime or onnxscript is absent.
        ModelError: unknown quantization, or more than 20% of the words differ (without quantization: any word) and not
            by close calls alone, see `verify_transcripts`; without quantization, or a logit by more than 0.01.
        FileExistsError: output_dir contains something else.
    """
    if quantization not in get_args(OnnxQuantization):
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(get_args(OnnxQuantization))}")
    require_packages("export to ONNX", ONNX_PACKAGES)
    from src.models.export.onnx_graphs import write_onnx

    output_dir, exact = Path(output_dir), quantization == "none"
    given = loaded_source(source, processor, verify_clips)
    with given as (model, own, clips), new_export(output_dir, ENCODER_FILES) as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_processor(own, folder)
        (folder / ONNX_DIR).mkdir()
        write_onnx(model, folder / ONNX_DIR, int8=not exact)
        exported = OnnxWhisper(folder)
        name = f"{output_dir}: the ONNX model (quantization {quantization})"
        mismatch = verify.verify_transcripts(
            model, own, exported.transcribe, name=name, quantised=not exact, clips=clips
        )
        if exact:
            difference = _logit_difference(model, own, exported)
            if not difference <= MAX_LOGIT_DIFFERENCE:  # nan too
                raise ModelError(
                    f"{name} differs by {difference:.2g} in a logit, allowed are {MAX_LOGIT_DIFFERENCE}, so it was "
                    "not saved"
                )
            logger.info("logits of torch and ONNX Runtime differ by at most %.1e", difference)
    logger.info("saved %s (ONNX, quantization %s, %.0f%% of words differ)", output_dir, quantization, 100 * mismatch)
    return output_dir


def _logit_difference(model: Any, processor: WhisperProcessor, exported: OnnxWhisper) -> float:
    """Compare the logits of every step along the source's transcript of one bundled clip."""
    batch = verify.prepare_batch(model, processor.tokenizer, verify.bundled_clips()[:1])
    prompt, end = batch.prompts[0], processor.tokenizer.eos_token_id
    tokens = [token for token in batch.generate(model)[0] if token < end]  # every id from the end token on is special
    with verify.quiet_inference(model):
        output = model(batch.features, decoder_input_ids=torch.tensor([[*prompt, *tokens]]))
    expected = output.logits[0, len(prompt) - 1 :].numpy()  # (1 + tokens, vocabulary)
    found = exported.logits_along(exported.encode(batch.features.numpy()), prompt, tokens)
    return float(np.abs(found - expected).max())


class OnnxWhisper:
    """A folder of `export_onnx` on ONNX Runtime and the CPU, which decodes clip by clip, greedily."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = WARNINGS_OFF
        self._encoder, self._decoder = (
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for part in ("encoder_model", "decoder_model_merged")
            for path in (folder / ONNX_DIR).glob(f"{part}*.onnx")
        )
        self._generation = GenerationConfig.from_pretrained(folder)

    def transcribe(self, batch: verify.ClipBatch) -> list[list[int]]:
        """Return the new tokens of each clip, the end token included."""
        hidden = self.encode(batch.features.numpy())
        cap = batch.max_new_tokens
        return [self._greedy(hidden[row : row + 1], prompt, cap) for row, prompt in enumerate(batch.prompts)]

    def encode(self, features: FloatArray) -> FloatArray:
        """Return hidden states (B, frames // 2, d_model) of mel features (B, mels, frames)."""
        hidden: FloatArray = self._encoder.run(None, {"input_features": features})[0]
        return hidden

    def logits_along(self, hidden: FloatArray, prompt: list[int], tokens: Sequence[int]) -> FloatArray:
        """Return logits (1 + len(tokens), vocabulary): after the prompt, and after each of the tokens."""
        step = self._decoder_of(hidden)
        return np.stack([step(given) for given in (prompt, *([token] for token in tokens))])

    def _greedy(self, hidden: FloatArray, prompt: list[int], max_new_tokens: int) -> list[int]:
        generation, step = self._generation, self._decoder_of(hidden)
        logits = step(prompt)
        logits[generation.begin_suppress_tokens or []] = -np.inf
        tokens: list[int] = []
        while True:
            logits[generation.suppress_tokens or []] = -np.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == generation.eos_token_id or len(tokens) == max_new_tokens:
                return tokens
            logits = step(tokens[-1:])

    def _decoder_of(self, hidden: FloatArray) -> Callable[[list[int]], FloatArray]:
        """Return a function of the next tokens of a clip that gives the logits (vocabulary,) after the last of them.

        It keeps the keys and values of the steps before; after the first, a step takes one token.
        """
        outputs = [output.name for output in self._decoder.get_outputs()]
        past = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), dtype=np.float32)  # (B, heads, tokens, width)
            for each in self._decoder.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        given: dict[str, Any] = {"encoder_hidden_states": hidden, "use_cache_branch": np.array([False])}

        def step(tokens: list[int]) -> FloatArray:
            inputs = {**given, **past, "input_ids": np.array([tokens], dtype=np.int64)}
            found = dict(zip(outputs, self._decoder.run(None, inputs), strict=True))
            present = {name: found[name.replace("past_key_values", "present")] for name in past}
            past.update({name: value for name, value in present.items() if value.size})  # empty: as it was
            given["use_cache_branch"] = np.array([True])
            logits: FloatArray = found["logits"][0, -1]
            return logits

        return step
