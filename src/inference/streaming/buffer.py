"""The newest audio of a stream, in one preallocated array with an absolute clock.

Twice the capacity is allocated, so that the content stays contiguous and is moved only once per capacity heard:
a view costs nothing.
"""

from __future__ import annotations

import math

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.utils.errors import AudioError


class AudioBuffer:
    """A bounded window over a stream at 16 kHz.

    Args:
        max_sec: capacity, seconds.

    Times are seconds since the first sample ever appended.
    """

    def __init__(self, max_sec: float) -> None:
        if max_sec <= 0:
            raise AudioError(f"an audio buffer of {max_sec} s; its capacity must be above 0")
        self.capacity_samples = math.ceil(max_sec * SAMPLE_RATE)
        self._memory: Waveform = np.zeros(2 * self.capacity_samples, dtype=np.float32)
        self._at = 0  # first valid sample within the memory
        self._size = 0
        self._start = 0  # the same sample in the stream

    @property
    def start_sec(self) -> float:
        """Time of the oldest sample held."""
        return self._start / SAMPLE_RATE

    @property
    def end_sec(self) -> float:
        """Time of the end of the newest sample: all audio heard."""
        return (self._start + self._size) / SAMPLE_RATE

    @property
    def duration_sec(self) -> float:
        """Audio held."""
        return self._size / SAMPLE_RATE

    @property
    def free_samples(self) -> int:
        """How much can be appended before something must be trimmed."""
        return self.capacity_samples - self._size

    def append(self, samples: Waveform) -> None:
        """Add audio at the end.

        Args:
            samples: (T,) float32, 16 kHz.
        Raises: AudioError: more than the free room; `trim_to` makes room, nothing is dropped unasked.
        """
        if len(samples) > self.free_samples:
            raise AudioError(
                f"{len(samples)} samples do not fit: {self.free_samples} of {self.capacity_samples} are free; "
                "call trim_to first"
            )
        if self._at + self._size + len(samples) > len(self._memory):
            self._memory[: self._size] = self._memory[self._at : self._at + self._size]
            self._at = 0
        end = self._at + self._size
        self._memory[end : end + len(samples)] = samples
        self._size += len(samples)

    def trim_to(self, sec: float) -> None:
        """Drop the audio before a time; a time outside the buffer keeps or drops all of it."""
        drop = min(max(round(sec * SAMPLE_RATE) - self._start, 0), self._size)
        self._at += drop
        self._start += drop
        self._size -= drop

    def view(self) -> tuple[Waveform, float]:
        """Return what is held: ((T,) float32, read-only and valid until the next append; its start in seconds)."""
        view = self._memory[self._at : self._at + self._size]
        view.flags.writeable = False
        return view, self.start_sec
