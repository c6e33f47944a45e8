"""One machine for everybody who uses a page: calls of its models take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from src.data.audio import Waveform
from src.inference.engines import Engine
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.words import Word

T = TypeVar("T")


class Turns:
    """Runs calls one at a time, in the order in which they came.

    A thread does it, as in `CaptionServer`: of those that wait for a lock, any may get it next, and a file of an hour
    would keep live captions waiting again and again.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "turns")

    def take(self, call: Callable[..., T], *arguments: object) -> T:
        """Wait for a turn, and return what the call gives; it raises what the call raises."""
        return self._worker.submit(call, *arguments).result()

    def close(self) -> None:
        """Let the call that runs come to its end, and start no other."""
        self._worker.shutdown(wait=False, cancel_futures=True)


class SharedEngine:
    """An engine that several threads may call; see `Engine` for its methods.

    Args: turns: shared by all engines that compute on the same cores or GPU.
    """

    workers = 1

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine, self._turns = engine, turns
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.audio_context, self.vocabulary = engine.audio_context, engine.vocabulary

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Encode in a turn."""
        return self._turns.take(self._engine.encode, audios, trailing_silence_sec)

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode in a turn."""
        return self._turns.take(self._engine.decode, encoded, audios, options)

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Align in a turn."""
        return self._turns.take(self._engine.align, encoded, audios, texts, options)

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Detect in a turn."""
        return self._turns.take(self._engine.detect_languages, audios)

    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Take the first step in a turn."""
        return self._turns.take(self._engine.first_token, audio, options)
