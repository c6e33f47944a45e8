"""Encoded recordings of a tone, in any container."""

from __future__ import annotations

import io

import av
import numpy as np
import soundfile as sf

from src.data.audio import SAMPLE_RATE

TONE_HZ = 440.0


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * TONE_HZ * np.arange(round(rate * seconds)) / rate).astype(np.float32)
    return np.repeat(wave[:, None], channels, axis=1)


def peak_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 18))
    return float(np.argmax(spectrum) * SAMPLE_RATE / (1 << 18))


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    """Encode with soundfile."""
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def muxed(
    kind: str, codec: str, rate: int, seconds: float = 1.0, *, begin_sec: float = 0.0, picture_sec: float = 0.0
) -> bytes:
    """Encode a stereo tone with FFmpeg, which may begin late, with a picture; 0 s leave the picture alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo") if seconds else None
        picture = container.add_stream("mpeg4", rate=5, width=32, height=32) if picture_sec else None
        for number in range(round(5 * picture_sec)):
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            image.pts = number
            container.mux(picture.encode(image))
        if picture is not None:
            container.mux(picture.encode(None))
        if stream is None:
            container.close()
            return buffer.getvalue()
        samples = np.ascontiguousarray(tone(rate, seconds, 2).T)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = rate, round(begin_sec * rate)
        converted = av.AudioResampler(format=stream.format.name).resample(frame)
        for packet in [packet for part in [*converted, None] for packet in stream.encode(part)]:
            container.mux(packet)
    return buffer.getvalue()


def two_tracks(kind: str = "matroska", *, default: int = 1, level: float = 0.5) -> bytes:
    """Encode silence, or a quieter tone, as the first audio track and a tone as the second."""
    from av.stream import Disposition

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        streams = [container.add_stream("aac", rate=16_000, layout="mono") for _ in range(2)]
        for number, stream in enumerate(streams, start=1):
            stream.metadata["language"] = ("eng", "deu")[number - 1]
            stream.disposition = Disposition.default if number == default else Disposition(0)
        for stream, factor in zip(streams, (level - 0.5, 1.0), strict=True):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(factor * tone(16_000, 2).T, np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16_000, 0
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return buffer.getvalue()
