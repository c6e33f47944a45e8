"""A scripted engine: audio whose samples tell their place, and a function that hears words in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

from src.data.audio import Waveform
from src.inference.engine_base import DecodingResult
from src.inference.options import DecodingOptions
from src.inference.words import Word, join_words

Hear = Callable[[Waveform, DecodingOptions], Sequence[Word]]
Detect = Callable[[Waveform], tuple[str, float]]


class ScriptedEngine:
    """An `Engine` that gives the words of `hear` for each clip; a word is a token."""

    name = "scripted"
    device = "cpu"
    precision = "float32"
    workers = 1
    language: str | None = None

    def __init__(
        self,
        hear: Hear,
        *,
        audio_context: Literal["full", "dynamic"] = "full",
        languages: Sequence[str] = ("en",),
        detect: Detect | None = None,
        tokens_per_sec: float = 10.0,
    ) -> None:
        self.hear, self.audio_context = hear, audio_context
        self.vocabulary: Any = SimpleNamespace(encode=str.split, languages=languages)
        self._detect, self._tokens_per_sec = detect, tokens_per_sec

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        return audios

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        heard = [tuple(self.hear(audio, options)) for audio in audios]
        return [DecodingResult(join_words(words), (), -0.1, words, options.language) for words in heard]

    def detect(self, encoded: Any) -> list[tuple[str, float]]:
        assert self._detect is not None, "nobody asked for detection"
        return [self._detect(audio) for audio in encoded]

    def max_tokens_per_sec(self, language: str | None) -> float:
        return self._tokens_per_sec

    def align(self, *_: Any) -> Any:
        raise NotImplementedError

    first_token = align
