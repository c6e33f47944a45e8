"""A microphone as an iterator of blocks: PortAudio's callback only enqueues, the caller's thread does the work."""

from __future__ import annotations

import logging
import queue
from collections.abc import Generator
from typing import Any

import numpy as np

from src.data.audio import Waveform
from src.utils.errors import AudioError, ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

BLOCK_SEC = 0.1
MAX_QUEUED_SEC = 60.0  # a consumer this far behind loses audio, which is counted
PATIENCE_SEC = 5.0  # without a single block the device is dead


class Microphone:
    """Records for a given time from the default input device, at its own sample rate.

    Attributes:
        sample_rate: of the blocks, Hz.
        overruns: blocks that were lost, by the device or because the consumer was too slow.
    Raises: MissingDependencyError: sounddevice or PortAudio is absent. AudioError: no usable input device.
        ConfigError: a duration that is not positive.
    """

    def __init__(self, duration_sec: float) -> None:
        check_duration(duration_sec)
        self._duration_sec = duration_sec
        self._device = _import_sounddevice()
        try:
            self.sample_rate = int(self._device.query_devices(kind="input")["default_samplerate"])
        except (self._device.PortAudioError, ValueError) as err:
            raise AudioError(f"no usable microphone: {err}; python -m sounddevice lists the devices") from err
        self.overruns = 0
        self._blocks: queue.Queue[Waveform] = queue.Queue(maxsize=round(MAX_QUEUED_SEC / BLOCK_SEC))

    def blocks(self) -> Generator[Waveform, None, None]:
        """Yield (T,) float32 blocks, all that is waiting in one, until `duration_sec` of audio has come.

        Raises: AudioError: the device cannot be opened, or delivers nothing for 5 s.
        """
        remaining = round(self._duration_sec * self.sample_rate)
        try:
            stream = self._device.InputStream(
                samplerate=self.sample_rate,
                channels=1,
                dtype="float32",
                blocksize=round(BLOCK_SEC * self.sample_rate),
                callback=self._enqueue,
            )
            with stream:
                while remaining > 0:
                    block = self._waiting()[:remaining]
                    remaining -= len(block)
                    yield block
        except self._device.PortAudioError as err:
            raise AudioError(f"the microphone failed: {err}; python -m sounddevice lists the devices") from err
        if self.overruns:
            logger.warning("%d blocks of microphone audio were lost: decoding is slower than speech", self.overruns)

    def _enqueue(self, indata: Any, frames: int, time: Any, status: Any) -> None:
        """Run on PortAudio's thread: no decoding, no waiting."""
        self.overruns += bool(status and status.input_overflow)
        try:
            self._blocks.put_nowait(np.array(indata[:, 0], dtype=np.float32))  # PortAudio reuses its memory
        except queue.Full:
            self.overruns += 1

    def _waiting(self) -> Waveform:
        try:
            blocks = [self._blocks.get(timeout=PATIENCE_SEC)]
        except queue.Empty as err:
            raise AudioError(
                f"the microphone delivered nothing for {PATIENCE_SEC:.0f} s; is it muted or unplugged?"
            ) from err
        while not self._blocks.empty():
            blocks.append(self._blocks.get_nowait())
        return np.concatenate(blocks)


def check_duration(duration_sec: float) -> None:
    """Raise a ConfigError unless there is something to record."""
    if duration_sec <= 0:
        raise ConfigError(f"duration_sec is {duration_sec}; give the seconds to record, above 0")


def _import_sounddevice() -> Any:
    try:
        import sounddevice  # type: ignore[import-not-found]
    except (ImportError, OSError) as err:  # OSError: the package is there, the PortAudio library is not
        raise MissingDependencyError(
            f"recording needs sounddevice and PortAudio ({err}): pip install sounddevice, and on Linux "
            "apt-get install libportaudio2. A machine in the cloud has no microphone: in Colab record from a "
            "cell of the notebook, elsewhere upload a file"
        ) from err
    return sounddevice
