"""Decoding options and results: the same for every engine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from src.data.audio import SAMPLE_RATE
from src.data.features import CONTEXT_SAMPLES, padded_samples
from src.inference.words import Word
from src.utils.config import Config, InferenceConfig
from src.utils.errors import ModelError

MIN_NEW_TOKENS = 8  # a short clip may still hold a long word
_DEFAULTS = InferenceConfig()


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Attributes:
        language: code such as "en"; None detects it per clip (multilingual models).
        task: "transcribe" or "translate".
        num_beams: 1 is greedy.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        trailing_silence_sec: appended to each clip at dynamic context; the pause tells the decoder to stop.
        max_tokens_per_sec: cap on new tokens, which ends loops early; fast speech has about 6.
        word_timestamps: fill `DecodingResult.words`.
        timestamps: let the model write segment times into its tokens.
        no_speech: fill `DecodingResult.no_speech_prob`.
        prompt: previous text, as conditioning only.
        hotwords: words to expect, as conditioning only.
        prefix: text that the result must begin with.
        seed: of the draws at a temperature.

    Raises:
        ModelError: beams together with a temperature.
    """

    language: str | None = None
    task: str = "transcribe"
    num_beams: int = _DEFAULTS.num_beams
    temperature: float = 0.0
    trailing_silence_sec: float = _DEFAULTS.trailing_silence_sec
    max_tokens_per_sec: float = _DEFAULTS.max_tokens_per_sec
    word_timestamps: bool = False
    timestamps: bool = False
    no_speech: bool = False
    prompt: str = ""
    hotwords: str = ""
    prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_beams > 1 and self.temperature > 0:
            raise ModelError(f"num_beams is {self.num_beams} at temperature {self.temperature}: set one of them only")

    @classmethod
    def from_config(cls, config: Config) -> DecodingOptions:
        """Take language and task from the model section, the rest from the inference section."""
        return cls(
            language=config.model.language,
            task=config.model.task,
            num_beams=config.inference.num_beams,
            trailing_silence_sec=config.inference.trailing_silence_sec,
            max_tokens_per_sec=config.inference.max_tokens_per_sec,
        )

    def token_cap(self, samples: int) -> int:
        """Return the maximum number of new tokens for a clip of so many samples."""
        return MIN_NEW_TOKENS + math.ceil(self.max_tokens_per_sec * samples / SAMPLE_RATE)


@dataclass(frozen=True)
class DecodingResult:
    """The text of one clip.

    Attributes:
        text: stripped of surrounding spaces.
        tokens: text tokens, prefix included, and with `timestamps` the times; no other special tokens.
        avg_logprob: mean natural-log probability of the decoded tokens and the end token.
        words: times within the clip, or None where `word_timestamps` was off.
        language: given or detected; None where none was given for an English-only model.
        no_speech_prob: probability of the token for silence; None where not asked for, or decoded with beams by torch.
        temperature: with which it was decoded.
    """

    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    words: tuple[Word, ...] | None = None
    language: str | None = None
    no_speech_prob: float | None = None
    temperature: float = 0.0

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over its bytes compressed by zlib: loops have more than 2.4 (openai/whisper)."""
        data = self.text.encode("utf-8")
        return len(data) / len(zlib.compress(data)) if data else 0.0


def batch_samples(lengths: Sequence[int], trailing_silence_sec: float, audio_context: str) -> int:
    """Return how many samples each clip of a batch is padded to for the encoder.

    Args:
        lengths: samples of each clip, at most 30 s.
        trailing_silence_sec: silence after the longest clip, where 30 s leave room; unused at full context.
        audio_context: "full" or "dynamic".

    Raises:
        ModelError: no clip, or a clip longer than 30 s.
    """
    if not lengths:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(lengths)
    if longest > CONTEXT_SAMPLES:
        raise ModelError(
            f"a clip of {longest / SAMPLE_RATE:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio"
        )
    if audio_context == "full":
        return CONTEXT_SAMPLES
    return padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
