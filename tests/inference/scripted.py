"""A scripted engine: audio whose samples tell their place, and a function that hears words in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

from src.data.audio import Waveform
from src.inference.engine_base import DecodingResult
from src.inference.options import DecodingOptions
from src.inference.words import Word

Hear = Callable[[Waveform, DecodingOptions], Sequence[Word]]


class ScriptedEngine:
    """An `Engine` that gives the words of `hear` for each clip; a word is a token."""

    name = "scripted"
    device = "cpu"
    precision = "float32"
    workers = 1
    vocabulary: Any = SimpleNamespace(encode=str.split, languages=("en",))

    def __init__(self, hear: Hear, *, audio_context: Literal["full", "dynamic"] = "full") -> None:
        self.hear, self.audio_context = hear, audio_context

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        return audios

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        heard = [tuple(self.hear(audio, options)) for audio in audios]
        return [DecodingResult(" ".join(word.text for word in words), (), -0.1, words) for words in heard]

    def align(self, *_: Any) -> Any:
        raise NotImplementedError

    first_token = align
