"""Decoding through FFmpeg of what libsndfile does not know (m4a, mp4, webm, ...) or gets wrong: mp3.

libsndfile guesses the length of an mp3 without a Xing header from its first frame, and stops there: of one with a
variable bit rate it has given 15%. What FFmpeg glosses over is refused here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from src.utils.errors import AudioError

CONVERT = "convert it: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"

# What libsndfile reads is not in here: FFmpeg would decode a file that it refused, leaving out the damaged part. Nor
# are playlists, which may name other files and addresses, and what hides its losses (avi, flv, mpegts).
_FORMATS = "aac,ac3,amr,asf,matroska,mov,webm"
_ESTIMATED = frozenset({"aac", "ac3", "amr"})  # without a header: FFmpeg guesses their length from the bit rate
_TOLERANCE_SEC = 0.05  # times in a container are rounded, and begin before or behind the codec's own delay


@dataclass(frozen=True)
class NativeAudio:
    """An open recording, decoded while it is read.

    Attributes:
        rate: Hz.
        channels: of the file.
        promised_sec: duration by its header; None where that is silent.
        blocks: of mono samples, (n,) float32 at `rate`.
    """

    rate: int
    channels: int
    promised_sec: float | None
    blocks: Iterator[NDArray[np.float32]]


@contextmanager
def open_with_av(
    file: BinaryIO, label: str, *, block_values: int, mp3_sec: float | None = None, first_error: str | None = None
) -> Iterator[NativeAudio]:
    """Open a recording with PyAV.

    Args:
        label: what to call it in errors.
        block_values: samples of all channels in a block, about.
        mp3_sec: duration by the header of an mp3.
        first_error: why libsndfile refused it; None for an mp3, which FFmpeg decodes in the first place.
    Raises: AudioError: here, and while its blocks are read: not decodable, damaged, with holes, or cut.
    """
    import av  # heavy, and most recordings do without

    kind = {"options": {"format_whitelist": _FORMATS}} if first_error else {"format": "mp3"}
    try:
        with av.open(file, mode="r", metadata_errors="ignore", **kind) as container:
            if not container.streams.audio:
                raise AudioError(f"{label}: the file has no audio track")
            promised_sec = _promise(container) if first_error else mp3_sec
            frames = container.decode(container.streams.audio[0])
            head = next(frames, None)  # its rate is the true one: the header of HE-AAC gives half of it
            if head is None:
                raise AudioError(f"{label}: 0 samples decoded; remove it or record it again")
            checked = _checked(itertools.chain([head], frames), promised_sec, label)
            channels = head.layout.nb_channels
            yield NativeAudio(head.sample_rate, channels, promised_sec, _joined(checked, block_values // channels))
    except (av.FFmpegError, ValueError, IndexError) as err:
        reasons = f"soundfile: {first_error}; PyAV: {err}" if first_error else f"PyAV: {err}"
        raise AudioError(
            f"{label}: not a recording that can be decoded ({reasons}); check that it plays, or {CONVERT}"
        ) from err


def _promise(container: Any) -> float | None:
    stream = container.streams.audio[0]
    if container.format.name in _ESTIMATED:
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:  # else it may be the picture's
        return float(container.duration / 1_000_000)  # FFmpeg counts microseconds
    return None


def _checked(frames: Iterator[Any], promised_sec: float | None, label: str) -> Iterator[Any]:
    """Pass frames on; refuse holes, marked damage, a change of format and an early end."""
    kind, total_sec, expected_sec = None, 0.0, None
    for frame in frames:
        kind = kind or (frame.sample_rate, frame.layout.nb_channels)
        if kind != (frame.sample_rate, frame.layout.nb_channels):
            raise AudioError(f"{label}: its sample rate or channels change at {total_sec:.1f} s; {CONVERT}")
        gap_sec = 0.0 if frame.time is None or expected_sec is None else frame.time - expected_sec
        if frame.is_corrupt or gap_sec > _TOLERANCE_SEC:
            what = "damaged" if frame.is_corrupt else f"{gap_sec:.2f} s are missing"
            raise AudioError(f"{label}: {what} at {total_sec:.1f} s; fetch it again, or {CONVERT}")
        expected_sec = None if frame.time is None else frame.time + frame.samples / frame.sample_rate
        total_sec += frame.samples / frame.sample_rate
        yield frame
    if promised_sec is not None and total_sec < promised_sec - _TOLERANCE_SEC:
        raise AudioError(f"{label}: truncated: {promised_sec:.2f} s promised, {total_sec:.2f} s there; fetch it again")


def _joined(frames: Iterator[Any], block_samples: int) -> Iterator[NDArray[np.float32]]:
    """Mix frames to mono, and join them to blocks (n,)."""
    import av

    resampler = av.AudioResampler(format="fltp")  # keeps rate and channels: means are taken here, as of other files
    pending: list[NDArray[np.float32]] = []
    waiting = 0
    for frame in frames:
        floats = [frame] if frame.format.name == "fltp" else resampler.resample(frame)
        planes = np.concatenate([part.to_ndarray() for part in floats], axis=1)  # (channels, n)
        pending.append(planes[0] if len(planes) == 1 else planes.mean(axis=0))
        waiting += planes.shape[1]
        if waiting >= block_samples:
            yield np.concatenate(pending)
            pending, waiting = [], 0
    if pending:
        yield np.concatenate(pending)
