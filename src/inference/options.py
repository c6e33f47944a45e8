"""What every engine shares: options, results, and the steps from audio to text and words."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES, padded_samples
from src.inference.words import Vocabulary, Word
from src.utils.config import Config, InferenceConfig
from src.utils.errors import ModelError

MIN_NEW_TOKENS = 8  # a short clip may still hold a long word
_DEFAULTS = InferenceConfig()


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Raises:
        ModelError: beams together with a temperature.
    """

    language: str | None = None  # code such as "en"; None detects it per clip (multilingual models)
    task: str = "transcribe"  # or "translate"
    num_beams: int = _DEFAULTS.num_beams  # 1 is greedy
    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature)
    trailing_silence_sec: float = _DEFAULTS.trailing_silence_sec  # at dynamic context: tells the decoder to stop
    max_tokens_per_sec: float = _DEFAULTS.max_tokens_per_sec  # ends loops early; fast speech has about 6
    word_timestamps: bool = False  # fill `DecodingResult.words`
    timestamps: bool = False  # let the model write segment times into its tokens
    no_speech: bool = False  # fill `DecodingResult.no_speech_prob`
    prompt: str = ""  # previous text, as conditioning only
    hotwords: str = ""  # words to expect, as conditioning only
    prefix: str = ""  # the result begins with it

    def __post_init__(self) -> None:
        if self.num_beams > 1 and self.temperature > 0:
            raise ModelError(f"num_beams is {self.num_beams} at temperature {self.temperature}: set one of them only")

    @classmethod
    def from_config(cls, config: Config) -> DecodingOptions:
        """Take language and task from the model section, the rest from the inference section."""
        names = "num_beams", "trailing_silence_sec", "max_tokens_per_sec"
        decoding = {name: getattr(config.inference, name) for name in names}
        return cls(language=config.model.language, task=config.model.task, **decoding)

    def token_cap(self, samples: int) -> int:
        """Return the maximum number of new tokens for a clip of so many samples."""
        return MIN_NEW_TOKENS + math.ceil(self.max_tokens_per_sec * samples / SAMPLE_RATE)


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
    """The decoder's output for one clip."""

    tokens: Sequence[int]  # forced and new ones, without the end token
    avg_logprob: float = math.nan
    no_speech_prob: float | None = None
    probabilities: Sequence[float] = ()  # of the tokens among text tokens, where attention was recorded
    attention: Any = None  # tensor (heads, tokens from the start token on, positions)


class Engine(ABC):
    """Turns audio into text in steps, so that one pass of the encoder serves several decodings."""

    name: str  # "torch" or "ctranslate2"
    device: str
    precision: str
    audio_context: Literal["full", "dynamic"]
    vocabulary: Vocabulary
    workers: int = 1  # threads that may call it at once and gain speed

    @abstractmethod
    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Encode clips of at most 30 s, (T,) float32 each at 16 kHz, as one batch; the result is for `decode`."""

    def decode(
        self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions, *, max_tokens: int | None = None
    ) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips: one result per clip, in order."""
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
        """Place known texts, as tokens, in their clips: the words of each."""
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
        """Let each row of given tokens, which end with `prefix`, go on by at most its cap of new ones."""

    @abstractmethod
    def _place(
        self, encoded: Any, audios: Sequence[Waveform], starts: list[list[int]], rows: Sequence[Decoded]
    ) -> list[tuple[Word, ...]]:
        """Time the words of each row."""

    @abstractmethod
    def _detect(self, encoded: Any) -> list[str | None]:
        """Return the likeliest language of each row, for a multilingual model."""


def batch_samples(lengths: Sequence[int], trailing_silence_sec: float, audio_context: str) -> int:
    """Return the samples to which clips are padded for the encoder: 30 s, or own length and silence as 30 s allow."""
    if not lengths:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(lengths)
    if longest > CONTEXT_SAMPLES:
        sec = longest / SAMPLE_RATE
        raise ModelError(f"a clip of {sec:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio")
    own = padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
    return CONTEXT_SAMPLES if audio_context == "full" else own
