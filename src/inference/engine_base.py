"""Base class of the engines: from audio to text and words, in steps that each engine computes in its own way."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES, padded_samples
from src.inference.options import DecodingOptions
from src.inference.words import Vocabulary, Word
from src.utils.errors import ModelError


@dataclass(frozen=True)
class DecodingResult:
    """The text of one clip."""

    text: str  # stripped of surrounding spaces
    tokens: tuple[int, ...]  # of the text, prefix included, and with `timestamps` the times
    avg_logprob: float  # mean natural-log probability of the decoded tokens and the end token
    words: tuple[Word, ...] | None = None  # times within the clip
    language: str | None = None  # given or detected; None where none was given for an English-only model
    no_speech_prob: float | None = None  # of the token for silence; None with torch's beams
    temperature: float = 0.0

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over its bytes compressed by zlib: loops have more than 2.4 (openai/whisper)."""
        data = self.text.encode("utf-8")
        return len(data) / len(zlib.compress(data)) if data else 0.0


@dataclass(frozen=True)
class Decoded:
    """What the decoder gave for one clip, as tokens; `Engine.decode` makes a `DecodingResult` of it."""

    tokens: Sequence[int]  # those of the forced prefix, then the new ones, without the end token
    avg_logprob: float = math.nan
    no_speech_prob: float | None = None
    probabilities: Sequence[float] = ()  # of the tokens among text tokens, where attention was recorded
    attention: Any = None  # tensor (heads, tokens from the start token on, positions)


class Engine(ABC):
    """Turns audio into text in two steps, `encode` and `decode`: audio encoded once can be decoded several times."""

    name: str  # "torch" or "ctranslate2"
    device: str
    precision: str
    audio_context: Literal["full", "dynamic"]
    vocabulary: Vocabulary
    workers: int = 1  # threads that may call it at once and gain speed

    @abstractmethod
    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Encode clips of at most 30 s, (T,) float32 each at 16 kHz, as one batch, for `decode` and `align`."""

    def decode(
        self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions, *, max_tokens: int | None = None
    ) -> list[DecodingResult]:
        """Decode what `encode` returned for these clips: one result per clip, in order."""
        vocabulary, languages = self.vocabulary, self.languages(encoded, len(audios), options)

        # what the decoder is given: previous text and hotwords, special tokens, the forced beginning of the text
        prompt = vocabulary.prompt_tokens(options.prompt, options.hotwords)
        starts = [vocabulary.start_sequence(code, options.task, timestamps=options.timestamps) for code in languages]
        prefix = vocabulary.encode(options.prefix)

        caps = [max_tokens or options.token_cap(len(audio)) for audio in audios]
        given = [[*prompt, *start, *prefix] for start in starts]
        rows = self._generate(encoded, given, prefix, caps, options)
        words = self._place(encoded, audios, starts, rows) if options.word_timestamps else [None] * len(rows)
        texts = [vocabulary.decode(row.tokens).strip() for row in rows]
        return [
            DecodingResult(
                text, tuple(row.tokens), row.avg_logprob, placed, code, row.no_speech_prob, options.temperature
            )
            for text, row, placed, code in zip(texts, rows, words, languages, strict=True)
        ]

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Return the words of known texts (their tokens) with their times in the clips."""
        start = self.vocabulary.start_sequence(options.language, options.task, timestamps=False)
        return self._place(encoded, audios, [start] * len(texts), [Decoded(tokens) for tokens in texts])

    def languages(self, encoded: Any, rows: int, options: DecodingOptions) -> list[str | None]:
        """Return the language of each clip: that of the options, else detected; None for an English-only model."""
        known = options.language is not None or not self.vocabulary.multilingual
        return [options.language] * rows if known else self._detect(encoded)

    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Encode a clip and take the decoder's first step, to measure its latency."""
        encoded = self.encode([audio], options.trailing_silence_sec)
        (result,) = self.decode(encoded, [audio], options, max_tokens=1)
        return next(iter(result.tokens), self.vocabulary.end)

    @abstractmethod
    def _generate(
        self, encoded: Any, given: list[list[int]], prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        """Continue each row of `given` tokens, which end with `prefix`, by at most as many new ones as its cap."""

    @abstractmethod
    def _place(
        self, encoded: Any, audios: Sequence[Waveform], starts: list[list[int]], rows: Sequence[Decoded]
    ) -> list[tuple[Word, ...]]:
        """Return the words of each row with their times in its clip."""

    @abstractmethod
    def _detect(self, encoded: Any) -> list[str | None]:
        """Return the likeliest language of each row, for a multilingual model."""


def batch_samples(lengths: Sequence[int], trailing_silence_sec: float, audio_context: str) -> int:
    """Return how many samples clips are padded to: 30 s at full context, else the longest clip and silence."""
    if not lengths:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(lengths)
    if longest > CONTEXT_SAMPLES:
        sec = longest / SAMPLE_RATE
        raise ModelError(f"a clip of {sec:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio")
    own = padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
    return CONTEXT_SAMPLES if audio_context == "full" else own
