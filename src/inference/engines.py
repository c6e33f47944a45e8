"""One small interface over what decodes: torch on any device, CTranslate2 in 8 and 16 bits.

Both give the same text and word times in float32 (tested); 8 bits flip a word here and there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from src.data.audio import Waveform
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.tokens import Vocabulary
from src.inference.words import Word
from src.utils.config import Config
from src.utils.errors import ConfigError, ModelError
from src.utils.runtime import get_device, usable_cores

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "ctranslate2"]


class Engine(Protocol):
    """Turns audio into text in steps, so that one pass of the encoder serves several decodings.

    Attributes:
        name: "torch" or "ctranslate2".
        device, precision: where and in what type it computes.
        audio_context: "full" (each clip padded to 30 s) or "dynamic" (its own length).
        workers: threads that may call it at once and be faster for it.
    """

    name: str
    device: str
    precision: str
    audio_context: Literal["full", "dynamic"]
    vocabulary: Vocabulary
    workers: int

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Encode clips of at most 30 s, (T,) float32 each at 16 kHz, as one batch; the result is for `decode`.

        Raises: ModelError: no clip, or one that is too long.
        """

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips: one result a clip, in order.

        Raises: ModelError: a language or task that the model does not know.
        """

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Place texts that are known, as tokens, in their clips: the words of each."""

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Return the likeliest language of each clip; None for an English-only model."""

    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Encode a clip and take the decoder's first step, for who measures how long that takes."""


def transcribe(engine: Engine, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
    """Encode and decode clips of at most 30 s as one batch."""
    return engine.decode(engine.encode(audios, options.trailing_silence_sec), audios, options)


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
        engine: "auto" takes CTranslate2 for a CTranslate2 folder and on a CPU, torch else, and logs why; by default
            what `inference.engine` says.
        compute_type: "auto" is float16 on a GPU; on a CPU int8 for CTranslate2, float32 for torch; by default what
            `inference.compute_type` says.
        workers: see `Engine`; of CTranslate2 on a CPU. None takes one a core: more clips a second, each later.
    Raises: ModelError, DeviceError: as `resolve_weights`, `CTranslate2Engine`. ConfigError: an unknown engine.
    """
    config = config or Config()
    engine, compute_type = engine or config.inference.engine, compute_type or config.inference.compute_type
    if engine not in ("auto", "torch", "ctranslate2"):
        raise ConfigError(f"engine {engine!r} is unknown; known: auto, torch, ctranslate2")
    folder = Path(source).expanduser()
    converted = (folder / "model.bin").is_file() and not (folder / "model.safetensors").is_file()
    chosen, reason = engine, "asked for"
    if engine == "auto" and converted:
        chosen, reason = "ctranslate2", "a CTranslate2 folder"
    elif engine == "auto":
        device = get_device(config.device).type
        chosen = "ctranslate2" if device == "cpu" else "torch"
        reason = "8 bits are fastest on a CPU" if device == "cpu" else f"the weights as they are, on {device}"
    if chosen == "torch":
        loaded = _load_torch(source, config, compute_type)
    else:
        loaded = _load_ct2(source, config, compute_type, workers)
    logger.info(
        "engine: %s, %s on %s, audio context %s (%s)",
        loaded.name, loaded.precision, loaded.device, loaded.audio_context, reason,
    )  # fmt: skip
    return loaded


def _load_torch(source: str | Path, config: Config, compute_type: str) -> Engine:
    import torch

    from src.inference.decoding import TorchEngine
    from src.models.whisper_model import WhisperModelManager

    on_gpu = get_device(config.device).type == "cuda"
    precision = {"auto": "float16" if on_gpu else "float32"}.get(compute_type, compute_type)
    if precision not in ("float32", "float16", "bfloat16"):
        raise ModelError(
            f"torch computes in float32, float16 and bfloat16, not in {precision}; set engine: ctranslate2"
        )
    model, processor = WhisperModelManager(config).initialize_model(str(source))
    return TorchEngine(model.to(getattr(torch, precision)), processor)


def _load_ct2(source: str | Path, config: Config, compute_type: str, workers: int | None) -> Engine:
    from src.inference.ct2_engine import CTranslate2Engine, find_device
    from src.models.ct2_cache import ct2_folder

    device, _ = find_device(config.device)
    stored = {"auto": "int8" if device == "cpu" else "float16"}.get(compute_type, compute_type)
    folder = ct2_folder(str(source), quantization=stored, cache_dir=config.paths.cache_dir)
    workers = 1 if device == "cuda" else workers or usable_cores()
    return CTranslate2Engine(folder, device=config.device, compute_type=compute_type, workers=workers)
