"""Where there is speech, for transcription: all that it asks of a detector, and one that loads when it is first asked.

silero-vad needs torch, which takes seconds to import; the first transcript of a short clip asks it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from src.data.audio import Waveform
from src.utils.config_inference import VADConfig

if TYPE_CHECKING:
    from src.data.vad import VADEvent, VoiceActivityDetector


class SpeechStream(Protocol):
    """Hears a recording in pieces; see `VADStream`."""

    def feed(self, samples: Waveform) -> list[VADEvent]:
        """Hear (T,) float32 at 16 kHz; return what began or ended."""

    def finish(self) -> list[VADEvent]:
        """Close what is open."""


class SpeechDetector(Protocol):
    """See `VoiceActivityDetector`."""

    config: VADConfig

    def stream(self) -> SpeechStream:
        """Start a stream with a state of its own."""

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> Sequence[Sequence[Any]]:
        """Find the stretches of speech of each clip."""


class LazyDetector:
    """A `VoiceActivityDetector` that is made when it is first asked.

    Raises: MissingDependencyError, ModelError: then, as `VoiceActivityDetector`.
    """

    def __init__(self, config: VADConfig) -> None:
        self.config = config

    def stream(self) -> SpeechStream:
        """Start a stream with a state of its own."""
        return self._detector.stream()

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> Sequence[Sequence[Any]]:
        """Find the stretches of speech of each clip."""
        return self._detector.speech_segments_batch(audios)

    @cached_property
    def _detector(self) -> VoiceActivityDetector:
        from src.data.vad import VoiceActivityDetector

        return VoiceActivityDetector(self.config)
