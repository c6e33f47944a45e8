"""The only decoder and resampler: anything a person may have on disk becomes (T,) float32 mono at 16 kHz.

soundfile decodes wav, flac, ogg, opus and mp3; PyAV decodes what it does not know (m4a, mp4, webm). soxr resamples: the
best quality per CPU second of the maintained resamplers. Nothing here replaces bad audio: it raises, naming the file.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from src.utils.errors import AudioError

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz, what every Whisper model was trained on
MIN_SAMPLES = SAMPLE_RATE // 10  # 1_600: 0.1 s, below which a log-mel window has nothing to see
SILENCE_PEAK = 1e-4  # -80 dBFS; 16-bit dither is at 3e-5

Waveform = NDArray[np.float32]


def load_audio(source: str | Path | bytes, *, name: str | None = None, allow_silence: bool = False) -> Waveform:
    """Decode, mix to mono, resample to 16 kHz.

    Args:
        source: a path, or the bytes of an encoded file.
        name: what to call it in errors; the path by default.
        allow_silence: return a silent signal instead of raising; silence may be transcribed, not trained on.
    Returns: (T,) float32 in about [-1, 1], 16 kHz.
    Raises: AudioError: absent, empty, truncated, not audio, NaN or infinite samples, shorter than 0.1 s, or silent.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "<bytes>")
    data = source if isinstance(source, bytes) else _read_bytes(Path(source), label)
    if not data:
        raise AudioError(f"{label}: the file is empty (0 bytes); remove it or fetch it again")
    samples, rate = _decode(data, label)  # (T, channels)
    return to_mono_16k(samples, rate, name=label, allow_silence=allow_silence)


def to_mono_16k(
    samples: NDArray[np.float32], rate: int, *, name: str = "<array>", allow_silence: bool = False
) -> Waveform:
    """Check a decoded signal, mix its channels and resample it.

    Args:
        samples: (T,) or (T, channels) floating point.
        rate: samples per second.
    Returns: (T,) float32, 16 kHz.
    Raises: AudioError: as `load_audio`.
    """
    if rate <= 0:
        raise AudioError(f"{name}: sample rate {rate} Hz; the header is damaged")
    if samples.size == 0:
        raise AudioError(f"{name}: 0 samples decoded; remove it or record it again")
    if not np.isfinite(samples).all():
        raise AudioError(
            f"{name}: {int((~np.isfinite(samples)).sum())} NaN or infinite samples; export it again as 16-bit PCM"
        )
    mono = samples.mean(axis=1) if samples.ndim == 2 else samples
    mono = np.ascontiguousarray(mono, dtype=np.float32)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) < MIN_SAMPLES:
        raise AudioError(
            f"{name}: {len(mono) / SAMPLE_RATE:.3f} s of audio, at least {MIN_SAMPLES / SAMPLE_RATE} s is needed"
        )
    if not allow_silence and float(np.abs(mono).max()) < SILENCE_PEAK:
        raise AudioError(f"{name}: the whole recording is silent (peak below -80 dBFS); remove it or record it again")
    return mono


def _read_bytes(path: Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as err:
        raise AudioError(f"{label}: no such file") from err
    except OSError as err:  # a folder, a permission, a broken disk
        raise AudioError(f"{label}: cannot be read: {err.strerror}") from err


def _decode(data: bytes, label: str) -> tuple[NDArray[np.float32], int]:
    try:
        with sf.SoundFile(io.BytesIO(data)) as file:
            samples = file.read(dtype="float32", always_2d=True)
            rate = file.samplerate
    except (sf.LibsndfileError, TypeError, ValueError) as sf_err:  # TypeError: headerless raw guessed from bytes
        return _decode_with_av(data, label, sf_err)
    _refuse_truncated_wav(data, samples, label)
    return samples, int(rate)


def _refuse_truncated_wav(data: bytes, samples: NDArray[np.float32], label: str) -> None:
    """libsndfile reads a cut WAV without a word; its data chunk says how much there should have been."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = data.find(b"data", 12)
    if at < 0:
        return
    promised = int.from_bytes(data[at + 4 : at + 8], "little")
    present = len(data) - at - 8
    streaming_header = (
        promised in (0, 0xFFFFFFFF, 0x7FFFFFFF) or promised >= 0x7FFFF000
    )  # writers that could not seek back
    if promised > present and not streaming_header:
        raise AudioError(
            f"{label}: truncated: the header promises {promised} bytes of samples, {present} are there; fetch it again"
        )


def _decode_with_av(data: bytes, label: str, first_error: Exception) -> tuple[NDArray[np.float32], int]:
    import av  # heavy, and needed for m4a, mp4 and webm alone

    try:
        with av.open(io.BytesIO(data), mode="r", metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError(f"{label}: the file has no audio track")
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout="mono")
            frames = [out.to_ndarray()[0] for frame in container.decode(stream) for out in resampler.resample(frame)]
            frames += [out.to_ndarray()[0] for out in resampler.resample(None)]
            rate = int(stream.rate)
    except (av.FFmpegError, ValueError, IndexError) as err:
        raise AudioError(
            f"{label}: not a recording that can be decoded (soundfile: {first_error}; PyAV: {err}); "
            "check that it plays, or convert it: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"
        ) from err
    samples = np.concatenate(frames) if frames else np.zeros(0, dtype=np.float32)
    return samples[:, None], rate
