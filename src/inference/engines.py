"""Choice of an engine, torch or CTranslate2, and transcription with it; texts that fail are decoded again.

Both engines give the same text and word times in float32 (tested); 8 bits flip a word here and there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from src.data.audio import Waveform
from src.inference.engine_base import DecodingResult, Engine, transcribe
from src.inference.options import DecodingOptions
from src.utils.config import Config, InferenceConfig
from src.utils.errors import ConfigError, ModelError
from src.utils.files import expand_path
from src.utils.runtime import CUBLAS_FIX, ctranslate2_cuda_problem, get_device, usable_cores

if TYPE_CHECKING:
    from src.data.vad import VoiceActivityDetector

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "ctranslate2"]

# Above it silero-vad is asked whether there is speech at all. tiny.en, stock and tuned, int8 and float32 (2026-11-28):
# zeros, white and brown noise and hum have 0.53 to 0.95, read and spoken English clips 0.01 to 0.03.
DOUBTFUL_NO_SPEECH_PROB = 0.2


def load_engine(
    source: str | Path,
    config: Config | None = None,
    *,
    engine: EngineName | None = None,
    compute_type: str | None = None,
    workers: int | None = 1,
) -> Engine:
    """Load a model for transcription.

    Args:
        source: a variant such as "base", a Hugging Face folder, or a CTranslate2 folder.
        config: `device`, `inference`, `model` and `paths.cache_dir`.
        engine: "auto" takes CTranslate2 for a CTranslate2 folder, on a CPU, and on a GPU where its CUDA libraries load,
            otherwise torch, and logs why; by default that of `inference.engine`.
        compute_type: "auto" is float16 on a GPU; on a CPU int8 for CTranslate2, float32 for torch; by default that of
            `inference.compute_type`.
        workers: see `Engine`; of CTranslate2 on a CPU. None takes one per core: more clips per second, each later.
    """
    config = config or Config()
    asked, compute_type = engine or config.inference.engine, compute_type or config.inference.compute_type
    if asked not in ("auto", "torch", "ctranslate2"):
        raise ConfigError(f"engine {asked!r} is unknown; known: auto, torch, ctranslate2")
    folder = expand_path(source)
    chosen, reason = asked, "asked for"
    if asked == "auto" and (folder / "model.bin").is_file() and not (folder / "model.safetensors").is_file():
        chosen, reason = "ctranslate2", "a CTranslate2 folder"
    elif asked == "auto" and (device := get_device(config.device).type) == "cpu":
        chosen, reason = "ctranslate2", "8 bits are fastest on a CPU"
    elif asked == "auto":
        chosen, reason = _engine_of_gpu(device, compute_type)
    loaded: Engine
    if chosen == "torch":
        import torch

        from src.inference.torch_engine import TorchEngine
        from src.models.whisper_model import WhisperModelManager

        automatic = "float16" if get_device(config.device).type == "cuda" else "float32"
        precision = automatic if compute_type == "auto" else compute_type
        if precision not in ("float32", "float16", "bfloat16"):
            raise ModelError(f"torch computes in float32, float16, bfloat16, not {precision}; set engine: ctranslate2")
        # the engine's own language is the checkpoint's; that of the settings is in the options of decoding
        open_language = config.model_copy(update={"model": config.model.model_copy(update={"language": None})})
        model, processor = WhisperModelManager(open_language).initialize_model(str(source))
        loaded = TorchEngine(model.to(getattr(torch, precision)), processor)
    else:
        from src.inference.ct2_engine import CTranslate2Engine, ct2_folder, find_device

        kind, _ = find_device(config.device)
        stored = ("int8" if kind == "cpu" else "float16") if compute_type == "auto" else compute_type
        folder = ct2_folder(str(source), quantization=stored, cache_dir=config.paths.cache_dir)
        workers = 1 if kind == "cuda" else workers or usable_cores()
        loaded = CTranslate2Engine(folder, device=config.device, compute_type=compute_type, workers=workers)
    logger.info(
        "engine: %s, %s on %s, audio context %s (%s)",
        loaded.name, loaded.precision, loaded.device, loaded.audio_context, reason,
    )  # fmt: skip
    return loaded


def _engine_of_gpu(device: str, compute_type: str) -> tuple[EngineName, str]:
    """Return the engine for a kind of GPU, and the reason."""
    if device != "cuda":
        return "torch", f"CTranslate2 does not run on {device}"
    problem = ctranslate2_cuda_problem()
    if problem is None:
        return "ctranslate2", f"{'float16' if compute_type == 'auto' else compute_type}: its CUDA libraries load"
    return "torch", f"CTranslate2 cannot compute on this GPU: {problem}; {CUBLAS_FIX}"


def engine_of(model: Any, processor: Any, engine: Engine | None) -> Engine:
    """Return the engine, or torch's for a model and its processor."""
    if engine is not None:
        return engine
    if model is None or processor is None:
        raise ModelError("nothing to decode with: pass a model and its processor, or engine=load_engine(...)")
    from src.inference.torch_engine import TorchEngine  # CTranslate2 does without torch

    return TorchEngine(model, processor)


def decode_with_fallback(
    engine: Engine,
    audios: Sequence[Waveform],
    options: DecodingOptions,
    rules: InferenceConfig,
    *,
    vad: VoiceActivityDetector | None = None,
) -> list[DecodingResult]:
    """Transcribe clips of at most 30 s as one batch; those that fail are decoded again at the next temperature.

    The rules are those of openai/whisper (Radford et al. 2022, section 4.5): a text that compresses too well is a loop,
    one of low log-probability a guess; a guess on what the model takes for silence has no text. The temperatures of
    `rules` are tried until a text passes its thresholds; None switches one off. If none does, the likeliest is taken,
    of those that are no loops if there are any. Where the model doubts that there is speech, and where it loops, the
    VAD is asked: without speech there is no text.
    """
    asked = replace(options, no_speech=True, temperature=rules.temperatures[0])
    tried = [[result] for result in transcribe(engine, audios, asked)]
    doubtful = [
        i
        for i, (result,) in enumerate(tried)
        if result.text and (_exceeds(result.no_speech_prob, DOUBTFUL_NO_SPEECH_PROB) or _is_loop(result, rules))
    ]
    silent: set[int] = set()
    if vad is not None and doubtful:
        heard = vad.speech_segments_batch([audios[i] for i in doubtful])
        silent = {i for i, speech in zip(doubtful, heard, strict=True) if not speech}
    for temperature in rules.temperatures[1:]:
        failed = [i for i, results in enumerate(tried) if i not in silent and fails(results[-1], rules)]
        if not failed:
            break
        logger.debug("%d of %d clips are decoded again at temperature %g", len(failed), len(audios), temperature)
        again = replace(asked, temperature=temperature, num_beams=1)
        for i, result in zip(failed, transcribe(engine, [audios[i] for i in failed], again), strict=True):
            tried[i].append(result)

    def likelier(result: DecodingResult) -> tuple[bool, float]:
        return not _is_loop(result, rules), result.avg_logprob

    chosen = [max(results, key=likelier) if fails(results[-1], rules) else results[-1] for results in tried]
    return [
        replace(result, text="", tokens=(), words=None if result.words is None else (), truncated=False)
        if i in silent or is_silence(result, rules)
        else result
        for i, result in enumerate(chosen)
    ]


def is_silence(result: DecodingResult, rules: InferenceConfig) -> bool:
    """Whether a text is a guess on what the model takes for silence."""
    return _exceeds(result.no_speech_prob, rules.no_speech_threshold) and _is_guess(result, rules)


def fails(result: DecodingResult, rules: InferenceConfig) -> bool:
    """Whether a text is a loop or a guess, on what the model does not take for silence."""
    return not is_silence(result, rules) and (_is_loop(result, rules) or _is_guess(result, rules))


def _is_loop(result: DecodingResult, rules: InferenceConfig) -> bool:
    return _exceeds(result.compression_ratio, rules.compression_ratio_threshold)


def _is_guess(result: DecodingResult, rules: InferenceConfig) -> bool:
    return rules.logprob_threshold is not None and result.avg_logprob < rules.logprob_threshold


def _exceeds(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit
