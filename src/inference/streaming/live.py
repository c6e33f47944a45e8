"""Live transcription of a microphone, and of files as if they were live."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.inference.server.client import in_real_time
from src.inference.streaming.browser_microphone import BrowserMicrophone
from src.inference.streaming.events import Event, StreamingResult
from src.inference.streaming.microphone import Microphone
from src.inference.streaming.session import StreamingSession
from src.utils.colab import in_colab, in_notebook

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]


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

    def stream_from_file(
        self, path: str | Path, *, real_time: bool = False, on_event: OnEvent | None = None
    ) -> StreamingResult:
        """Transcribe a file as a stream; see `iter_file`.

        Args:
            real_time: hear it no faster than it was recorded, to watch what a microphone would give.
            on_event: called with each event as it comes, in this thread.
        """
        if not real_time:
            return self._finish(self.iter_file(path), on_event)
        audio = load_audio(path, allow_silence=True)
        return self._finish(self._iter_live((block, SAMPLE_RATE) for block in in_real_time(audio)), on_event)

    def stream_audio(self, audio: Waveform) -> StreamingResult:
        """Transcribe (T,) float32 at 16 kHz as a stream; see `iter_file`."""
        return self._finish(self.iter_audio(audio))

    def stream_from_microphone(self, duration_sec: float, *, on_event: OnEvent | None = None) -> StreamingResult:
        """Reset, then transcribe the microphone: in Colab the browser's, elsewhere the default device of this machine.

        Args:
            duration_sec: how much audio to record.
            on_event: called with each event as it comes, in this thread.
        Raises: MissingDependencyError, AudioError, ConfigError: as `Microphone` and `BrowserMicrophone`.
        """
        microphone = open_microphone(duration_sec)
        with closing(microphone.blocks()) as blocks:  # an error must not leave it open
            events = self._iter_live((block, microphone.sample_rate) for block in blocks)
            return replace(self._finish(events, on_event), overruns=microphone.overruns)

    def _iter_live(self, blocks: Iterable[tuple[Waveform, int]]) -> Iterator[Event]:
        """Reset, then yield the events of samples that come with their rate in Hz, until there are no more."""
        self.reset()
        for samples, sample_rate in blocks:
            yield from self.feed(samples, sample_rate)
        yield from self.flush()

    def _finish(self, events: Iterable[Event], on_event: OnEvent | None = None) -> StreamingResult:
        """Run a stream to its end, and gather what it gave."""
        gathered: list[Event] = []
        for event in events:
            gathered.append(event)
            if on_event is not None:
                on_event(event)
        return StreamingResult.from_events(
            gathered,
            audio_sec=self.audio_sec,
            compute_sec=self.compute_sec,
            longest_update_sec=self.longest_update_sec,
            updates=self.updates,
        )


def open_microphone(duration_sec: float) -> Microphone | BrowserMicrophone:
    """Return the microphone that a person here can speak into, and log which.

    Raises: MissingDependencyError, AudioError, ConfigError: as `Microphone` and `BrowserMicrophone`.
    """
    if in_colab() and in_notebook():
        logger.info("recording %g s from the browser's microphone; allow it if the browser asks", duration_sec)
        return BrowserMicrophone(duration_sec)
    microphone = Microphone(duration_sec)
    logger.info("recording %g s from this machine's microphone at %d Hz", duration_sec, microphone.sample_rate)
    return microphone
