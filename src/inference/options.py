"""Options of decoding, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from src.utils.config import Config, InferenceConfig
from src.utils.errors import ModelError

_DEFAULTS = InferenceConfig()


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Raises:
        ModelError: beams together with a temperature.
    """

    language: str | None = None  # of all clips; None: the checkpoint's own, else detected per clip
    task: str = "transcribe"  # or "translate"
    num_beams: int = _DEFAULTS.num_beams  # 1 is greedy
    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature)
    trailing_silence_sec: float = _DEFAULTS.trailing_silence_sec  # at dynamic context: tells the decoder to stop
    max_tokens_per_sec: float | None = None  # ends loops early; None: `Engine.max_tokens_per_sec` of the language
    word_timestamps: bool = False  # fill `DecodingResult.words`
    timestamps: bool = False  # let the model write segment times into its tokens
    no_speech: bool = False  # fill `DecodingResult.no_speech_prob`
    prompt: str = ""  # previous text, as conditioning only
    hotwords: tuple[str, ...] = ()  # terms to expect, which texts without a temperature are biased towards
    hotword_strength: float = _DEFAULTS.hotword_strength  # nats per token
    prefix: str = ""  # the result begins with it
    prefix_tokens: tuple[int, ...] = ()  # its tokens, where they are not those of `Vocabulary.encode`

    def __post_init__(self) -> None:
        if self.num_beams > 1 and self.temperature > 0:
            raise ModelError(f"num_beams is {self.num_beams} at temperature {self.temperature}: set one of them only")

    @classmethod
    def from_config(cls, config: Config) -> DecodingOptions:
        """Take language and task from the model section, the rest from the inference section, without its texts."""
        rate = config.inference.max_tokens_per_sec
        return cls(
            language=config.model.language,
            task=config.model.task,
            num_beams=config.inference.num_beams,
            trailing_silence_sec=config.inference.trailing_silence_sec,
            max_tokens_per_sec=None if rate == "auto" else rate,
            hotword_strength=config.inference.hotword_strength,
        )


def gumbel_noise(step: int, temperature: float, size: int) -> NDArray[np.float32]:
    """Return the noise whose sum with logits / temperature is highest at a token drawn from their softmax.

    It is the same for every clip, in every batch and engine (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).
    """
    generator = np.random.default_rng([step, round(1000 * temperature)])
    return generator.gumbel(size=size).astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return natural-log probabilities over the last axis; torch has its own, which takes a second to import."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    norms: NDArray[np.float32] = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - norms
