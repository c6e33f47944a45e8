"""Decoded recordings on disk, so that later epochs and runs decode less.

Each is a 16-bit FLAC at 16 kHz mono that plays in any player, half the size of its samples. Its comment holds the
SHA-256 of the samples and their scale. Several processes may share a folder: files appear whole, under a name that the
encoded recording decides, so that a changed recording is another file. Whatever is damaged is made again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, AudioSource, Waveform, load_audio, read_encoded
from src.utils.errors import WhisperASRError
from src.utils.files import read_hidden_name, write_bytes_atomic

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # in the comment: raise it when decoding or the format changes, and files are made again
_COMMENT = re.compile(r"decoded audio v(\d+), pcm sha256 ([0-9a-f]{64}), scale ([0-9.e+-]+)")
_NAME = re.compile(r"[0-9a-f]{64}\.flac")
_STEPS = 1 << 15  # of a 16-bit sample, on either side of 0


class AudioCache:
    """A folder of decoded recordings, named by the SHA-256 of the encoded ones.

    Args:
        folder: made when the first recording is written. Nothing is ever removed from it but by `clear`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_audio(self, source: AudioSource, *, name: str | None = None) -> Waveform:
        """Return what `load_audio` does, rounded to 16 bits, from the folder if it is there.

        Samples beyond [-1, 1] are kept: they are stored divided by a scale. The result differs from direct decoding
        by half a 16-bit step at most (1.5e-5, times the scale), whether it comes from the folder or not.

        Args:
            source: a path, the bytes of an encoded file, or something that reads them.
            name: what to call it in errors; the path by default.
        Returns: (T,) float32, 16 kHz.
        Raises:
            AudioError: the recording cannot be used.
            WhisperASRError: the folder cannot be read or written.
        """
        encoded = read_encoded(source, name=name)
        key = hashlib.sha256(encoded).hexdigest()
        path = self.folder / key[:2] / f"{key}.flac"
        try:
            return self._read(path)
        except FileNotFoundError:
            pass
        except _DamagedError as err:
            logger.warning("%s: %s; decoding the recording again", path, err)
        except OSError as err:
            raise self._unusable("read", err) from err
        label = name or (str(source) if isinstance(source, str | Path) else None)
        pcm, scale = _quantize(load_audio(encoded, name=label))
        try:
            write_bytes_atomic(path, _to_flac(pcm, scale))
        except OSError as err:
            raise self._unusable("written", err) from err
        return _to_float(pcm, scale)

    def size_bytes(self) -> int:
        """Return the bytes of all cached recordings."""
        total = 0
        for path in self._files():
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # another process clears
                continue
        return total

    def clear(self) -> None:
        """Remove all cached recordings, and what a killed process left half-written; other files stay.

        Raises: WhisperASRError: a file cannot be removed.
        """
        try:
            for path in [*self._files(), *filter(_is_dead_half, self.folder.glob("??/.*.flac.*.partial"))]:
                path.unlink(missing_ok=True)
        except OSError as err:
            raise WhisperASRError(f"{self.folder}: the cache cannot be cleared: {err.strerror}") from err

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("??/*.flac") if _NAME.fullmatch(path.name)]

    def _read(self, path: Path) -> Waveform:
        content = path.read_bytes()
        try:
            with sf.SoundFile(io.BytesIO(content)) as file:
                comment = _COMMENT.fullmatch(file.comment)
                pcm = file.read(dtype="int16")  # (T,)
        except sf.LibsndfileError as err:
            raise _DamagedError(f"damaged ({err.error_string})") from err
        if comment is None or int(comment[1]) != CACHE_VERSION:
            raise _DamagedError("damaged, or from another version")
        if hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest() != comment[2]:
            raise _DamagedError("damaged (the checksum of its samples is wrong)")
        return _to_float(pcm, float(comment[3]))

    def _unusable(self, done: str, err: OSError) -> WhisperASRError:
        return WhisperASRError(
            f"{self.folder}: decoded audio cannot be {done} there: {err.strerror}; free some space, set "
            "paths.cache_dir to a folder of yours, or data.cache_decoded: false"
        )


class _DamagedError(Exception):
    """A cached file is not what was written."""


def _is_dead_half(path: Path) -> bool:
    hidden = read_hidden_name(path)
    return hidden is not None and not hidden.is_in_use


def _quantize(samples: Waveform) -> tuple[NDArray[np.int16], float]:
    """Round to 16 bits; return the samples and the scale that they are divided by, 1 unless they would clip."""
    scale = max(1.0, float(samples.max()) * _STEPS / (_STEPS - 1), -float(samples.min()))
    steps = np.rint(samples * np.float64(_STEPS / scale))  # float64: rounding must not add to the half step
    return steps.clip(-_STEPS, _STEPS - 1).astype(np.int16), scale


def _to_float(pcm: NDArray[np.int16], scale: float) -> Waveform:
    return pcm.astype(np.float32) * np.float32(scale / _STEPS)


def _to_flac(pcm: NDArray[np.int16], scale: float) -> bytes:
    buffer = io.BytesIO()
    digest = hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()
    with sf.SoundFile(buffer, "w", SAMPLE_RATE, 1, subtype="PCM_16", format="FLAC") as file:
        file.comment = f"decoded audio v{CACHE_VERSION}, pcm sha256 {digest}, scale {scale!r}"
        file.write(pcm)
    return buffer.getvalue()
