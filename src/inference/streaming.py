"""Live transcription of a microphone, and of files as if they were live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.inference.events import Event, StreamingResult
from src.inference.microphone import Microphone
from src.inference.session import StreamingSession


class StreamingASR(StreamingSession):
    """A session with its sources: `feed` it, or give it a file, an array or the microphone. Arguments as there."""

    def iter_file(self, path: str | Path) -> Iterator[Event]:
        """Reset, then yield the events of a file, fed in chunks of `min_chunk_sec` as fast as they are decoded.

        Raises: AudioError: the file cannot be decoded.
        """
        yield from self.iter_audio(load_audio(path, allow_silence=True))

    def iter_audio(self, audio: Waveform) -> Iterator[Event]:
        """As `iter_file`, for (T,) float32 at 16 kHz."""
        self.reset()
        self._adaptive = False  # nobody waits: the chunks of real time, whatever the speed
        chunk = round(self._settings.min_chunk_sec * SAMPLE_RATE)
        for at in range(0, len(audio), chunk):
            yield from self.feed(audio[at : at + chunk])
        yield from self.flush()

    def stream_from_file(self, path: str | Path) -> StreamingResult:
        """Transcribe a file as a stream; see `iter_file`."""
        return self._result(list(self.iter_file(path)))

    def stream_audio(self, audio: Waveform) -> StreamingResult:
        """Transcribe (T,) float32 at 16 kHz as a stream; see `iter_file`."""
        return self._result(list(self.iter_audio(audio)))

    def stream_from_microphone(
        self, duration_sec: float, *, on_event: Callable[[Event], None] | None = None
    ) -> StreamingResult:
        """Reset, then transcribe the default microphone.

        Args:
            duration_sec: how much audio to record.
            on_event: called with each event as it comes, in this thread.
        Raises: MissingDependencyError, AudioError, ConfigError: as `Microphone`.
        """
        microphone = Microphone(duration_sec)
        self.reset()
        events: list[Event] = []

        def show(new: list[Event]) -> None:
            events.extend(new)
            for event in new if on_event is not None else ():
                on_event(event)  # type: ignore[misc]

        for block in microphone.blocks():
            show(self.feed(block, microphone.sample_rate))
        show(self.flush())
        return replace(self._result(events), overruns=microphone.overruns)

    def _result(self, events: Sequence[Event]) -> StreamingResult:
        return StreamingResult.from_events(
            events,
            audio_sec=self.audio_sec,
            compute_sec=self.compute_sec,
            longest_update_sec=self.longest_update_sec,
            updates=self.updates,
        )
