"""The only decoder and resampler: anything a person may have on disk becomes (T,) float32 mono at 16 kHz.

soundfile decodes wav, flac, ogg and opus; PyAV decodes mp3 and what soundfile does not know (m4a, mp4, webm). soxr
resamples: the best quality per CPU second of the maintained resamplers. Nothing here replaces bad audio: it raises,
naming the file.

Decoders are lenient where training must not be: they skip a damaged page, zero a frame, stop early. So sizes, counts
and checksums of the container are checked first (`audio_headers`), and what was decoded is compared with what was
promised. Not found: changed samples in PCM, AAC, webm, or mp3 without a LAME header (they have no checksum), and the
lost end of a stream whose length nothing says (a webm straight from a browser, cut between two blocks).
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from src.data.audio_av import CONVERT, NativeAudio, open_with_av
from src.data.audio_frames import is_mp3, mp3_promised_sec
from src.data.audio_headers import after_id3, file_size, find_damage, flac_info
from src.data.utterance import EncodedAudio
from src.utils.errors import AudioError

SAMPLE_RATE = 16_000  # Hz, what every Whisper model was trained on
MIN_SAMPLES = SAMPLE_RATE // 10  # 1_600: 0.1 s, below which a log-mel window has nothing to see
SILENCE_PEAK = 1e-4  # -80 dBFS; 16-bit dither is at 3e-5
MAX_PEAK = 100.0  # +40 dBFS; beyond are integers stored as floats, and damaged exponents
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz: half of telephony, the fastest converters; beyond, a header is damaged
BLOCK_VALUES = 1 << 20  # samples of all channels decoded at once (4 MB); a file within one is resampled in one go

_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG"})
_UNKNOWN_FRAMES = 1 << 62  # libsndfile says 2**63 - 1 where a header is silent

Waveform = NDArray[np.float32]
AudioSource = str | Path | bytes | EncodedAudio


@dataclass(frozen=True)
class DecodedAudio:
    """A recording as the models take it, and what it was.

    Attributes:
        samples: (T,) float32 in about [-1, 1], 16 kHz mono.
        sample_rate: Hz of the file.
        channels: of the file.
    """

    samples: Waveform
    sample_rate: int
    channels: int


def load_audio(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False
) -> Waveform:
    """Decode, mix to mono, resample to 16 kHz: the samples of `decode`."""
    return decode(source, name=name, max_sec=max_sec, allow_silence=allow_silence).samples


def decode(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False
) -> DecodedAudio:
    """Decode, mix to mono, resample to 16 kHz, in memory that the result bounds.

    Args:
        source: a path, the bytes of an encoded file, or something that reads them.
        name: what to call it in errors; the path by default.
        max_sec: refuse what is longer, at the header or as soon as so much has been decoded.
        allow_silence: return a silent signal instead of raising; silence may be transcribed, not trained on.
    Raises:
        AudioError: absent, empty, truncated, damaged, not audio, NaN or infinite samples, longer than `max_sec`,
            shorter than 0.1 s, or silent.
    """
    label = _label(source, name)
    with _open(source, label) as file, _reader(file, label) as native:
        _check_rate(native.rate, label)
        if max_sec is not None and native.promised_sec is not None and native.promised_sec > max_sec:
            raise _too_long(label, max_sec, native.promised_sec)
        _refuse_damage(file, label)
        blocks = native.blocks if max_sec is None else _at_most(native.blocks, max_sec, native.rate, label)
        samples = _finish(_to_16k(blocks, native.rate, label), label, allow_silence)
        return DecodedAudio(samples, native.rate, native.channels)


def stream_audio(source: AudioSource, *, name: str | None = None) -> Iterator[Waveform]:
    """Decode a recording of any length block by block, mixed to mono and resampled: memory does not grow with it.

    Args:
        source, name: as in `decode`.
    Yields: (n,) float32, 16 kHz, in order; silence is allowed.
    Raises: AudioError: as `decode`; damage in the middle of a file after the blocks before it.
    """
    label = _label(source, name)
    samples = 0
    with _open(source, label) as file, _reader(file, label) as native:
        _check_rate(native.rate, label)
        _refuse_damage(file, label)
        for block in _blocks_16k(native.blocks, native.rate, label):
            _check_peak(block, label)
            samples += len(block)
            yield block
    _check_length(samples, label)


def read_encoded(source: AudioSource, *, name: str | None = None) -> bytes:
    """Return the bytes of the encoded file.

    Raises: AudioError: absent, unreadable or empty.
    """
    label = _label(source, name)
    with _open(source, label) as file:
        try:
            return file.read()
        except OSError as err:
            raise AudioError(f"{label}: cannot be read: {err.strerror}") from err


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
    _check_rate(rate, name)
    mono = _mono(samples) if samples.ndim == 2 else samples
    block = np.ascontiguousarray(mono, dtype=np.float32)
    return _finish(_to_16k(iter([block]), rate, name), name, allow_silence)


class _NamelessFile(io.BufferedReader):
    """A file that hides its name, so that decoders go by its content: names lie, and `.raw` would need a rate."""

    name = "recording"


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """soundfile seeks to where it is after each read, and an mp3 decoder loses its reservoir by that."""

    def seekable(self) -> bool:
        return False


def _label(source: AudioSource, name: str | None) -> str:
    if name is not None:
        return name
    return str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


@contextmanager
def _open(source: AudioSource, label: str) -> Iterator[BinaryIO]:
    try:
        if isinstance(source, str | Path):
            file: BinaryIO = _NamelessFile(io.FileIO(Path(source)))
        else:
            file = io.BytesIO(source if isinstance(source, bytes) else source.read())
    except FileNotFoundError as err:
        raise AudioError(f"{label}: no such file") from err
    except OSError as err:  # a folder, a permission, a broken disk
        raise AudioError(f"{label}: cannot be read: {err.strerror}") from err
    except ValueError as err:  # a zero byte in the path
        raise AudioError(f"{label}: cannot be read: {err}") from err
    with file:
        if file_size(file) == 0:
            raise AudioError(f"{label}: the file is empty (0 bytes); remove it or fetch it again")
        yield file


@contextmanager
def _reader(file: BinaryIO, label: str) -> Iterator[NativeAudio]:
    start = after_id3(file)
    if is_mp3(file, start):
        promised_sec = mp3_promised_sec(file, start)
        file.seek(0)
        with open_with_av(file, label, block_values=BLOCK_VALUES, mp3_sec=promised_sec) as native:
            yield native
        return
    file.seek(0)
    try:
        sound = _Sequential(file)
    except sf.LibsndfileError as err:
        file.seek(0)
        with open_with_av(file, label, block_values=BLOCK_VALUES, first_error=err.error_string) as native:
            yield native
        return
    with sound:
        if sound.format not in _FORMATS:
            raise AudioError(f"{label}: {sound.format_info} cannot be checked for damage; {CONVERT}")
        known = sound.frames < _UNKNOWN_FRAMES and sound.samplerate > 0
        promised_sec = sound.frames / sound.samplerate if known else None
        yield NativeAudio(sound.samplerate, sound.channels, promised_sec, _sound_blocks(sound, file, label))


def _refuse_damage(file: BinaryIO, label: str) -> None:
    at = file.tell()  # a decoder goes on from here
    damage = find_damage(file, file_size(file))
    file.seek(at)
    if damage is not None:
        raise AudioError(f"{label}: {damage}; fetch it again")


def _sound_blocks(sound: sf.SoundFile, file: BinaryIO, label: str) -> Iterator[Waveform]:
    """Yield mono blocks (n,), and refuse what ends early or has another MD5 than it says."""
    at = file.tell()
    flac = flac_info(file)
    file.seek(at)
    digest = hashlib.md5(usedforsecurity=False) if flac and flac.md5 and flac.bits in (8, 16, 24) else None
    size, frames = max(1, BLOCK_VALUES // sound.channels), 0
    while frames < sound.frames:
        wanted = min(size, sound.frames - frames)  # a tag may follow the sound: no frame more than that
        try:
            block = sound.read(wanted, dtype="float32", always_2d=True)  # (n, channels)
        except sf.LibsndfileError as err:
            raise AudioError(f"{label}: damaged: {err.error_string}; fetch it again") from err
        frames += len(block)
        if digest is not None and flac is not None:
            digest.update(_pcm(block, flac.bits))
        if len(block):
            yield _mono(block)
        if len(block) < wanted:
            break
    if frames < sound.frames < _UNKNOWN_FRAMES:
        raise AudioError(
            f"{label}: truncated: the header promises {sound.frames} samples, {frames} are there; fetch it again"
        )
    if digest is not None and flac is not None and digest.digest() != flac.md5:
        raise AudioError(f"{label}: damaged: its samples do not have the MD5 that its header promises; fetch it again")


def _mono(block: NDArray[np.float32]) -> Waveform:
    """Mean of the channels; NaN and infinity go through, to be refused afterwards."""
    with np.errstate(over="ignore", invalid="ignore"):
        mono: Waveform = block.mean(axis=1)
    return mono


def _pcm(block: Waveform, bits: int) -> bytes:
    """Return the integers that FLAC's MD5 is made of, least significant byte first."""
    integers = (block * np.float32(1 << (bits - 1))).astype("<i4")  # exact: a float32 holds 24 bits
    return integers.reshape(-1, 1).view(np.uint8)[:, : bits // 8].tobytes()


def _check_rate(rate: int, label: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{label}: sample rate {rate} Hz, {MIN_RATE} to {MAX_RATE} are possible; the header is damaged"
        )


def _too_long(label: str, max_sec: float, seconds: float | None = None) -> AudioError:
    found = "" if seconds is None else f" (the header says {seconds:.1f} s)"
    return AudioError(f"{label}: longer than {max_sec:g} s{found}; cut it at a pause")


def _at_most(blocks: Iterator[Waveform], max_sec: float, rate: int, label: str) -> Iterator[Waveform]:
    frames = 0
    for block in blocks:
        frames += len(block)
        if frames > max_sec * rate:
            raise _too_long(label, max_sec)
        yield block


def _to_16k(blocks: Iterator[Waveform], rate: int, label: str) -> Waveform:
    """Resample mono blocks (n,) at `rate` to one (T,) at 16 kHz: in one go, or block by block where there are more."""
    first = _finite(next(blocks, np.zeros(0, dtype=np.float32)), label)
    second = next(blocks, None)
    if second is None:
        return first if rate == SAMPLE_RATE else soxr.resample(first, rate, SAMPLE_RATE, quality="HQ")
    buffer = bytearray()  # grows in place: a list of blocks would be held twice while it is joined
    for block in _blocks_16k(itertools.chain([first, second], blocks), rate, label):
        buffer += block.data
    return np.frombuffer(buffer, dtype=np.float32)


def _blocks_16k(blocks: Iterator[Waveform], rate: int, label: str) -> Iterator[Waveform]:
    """Resample mono blocks (n,) at `rate` to blocks at 16 kHz."""
    if rate == SAMPLE_RATE:
        yield from (_finite(block, label) for block in blocks)
        return
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(_finite(block, label))
    yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _finite(block: Waveform, label: str) -> Waveform:
    bad = block.size - int(np.isfinite(block).sum())
    if bad:
        raise AudioError(f"{label}: {bad} NaN or infinite samples; export it again as 16-bit PCM")
    return block


def _finish(mono: Waveform, label: str, allow_silence: bool) -> Waveform:
    """Check a whole recording, (T,) at 16 kHz."""
    _check_length(len(mono), label)
    peak = _check_peak(mono, label)
    if not allow_silence and peak < SILENCE_PEAK:
        raise AudioError(f"{label}: the whole recording is silent (peak below -80 dBFS); remove it or record it again")
    return mono


def _check_length(samples: int, label: str) -> None:
    if samples == 0:
        raise AudioError(f"{label}: 0 samples decoded; remove it or record it again")
    if samples < MIN_SAMPLES:
        raise AudioError(
            f"{label}: {samples / SAMPLE_RATE:.3f} s of audio, at least {MIN_SAMPLES / SAMPLE_RATE} s is needed"
        )


def _check_peak(block: Waveform, label: str) -> float:
    """Return the largest absolute sample; refuse integers that are stored as floats."""
    peak = max(float(block.max()), -float(block.min())) if len(block) else 0.0
    if peak > MAX_PEAK:
        raise AudioError(f"{label}: samples up to {peak:.3g}, floats belong in [-1, 1]; export it again as 16-bit PCM")
    return peak
