"""Decoding, resampling and caching: any recording becomes (T,) float32 mono at 16 kHz.

Decoders are lenient where training must not be: they skip a damaged page, zero a frame, stop early. So FFmpeg runs with
every check that it has, and what was decoded is compared with what the header promises. What has no checksum (PCM, AAC,
Ogg, most mp3 files) may still hold changed samples.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from src.data.utterance import EncodedAudio
from src.utils.errors import AudioError, WhisperASRError
from src.utils.files import write_bytes_atomic

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz, what every Whisper model was trained on
MIN_SAMPLES = SAMPLE_RATE // 10  # 1_600: 0.1 s, below which a log-mel window has nothing to see
SILENCE_PEAK = 1e-4  # -80 dBFS; 16-bit dither is at 3e-5
MAX_PEAK = 100.0  # +40 dBFS; beyond are integers stored as floats, and damaged exponents
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz: half of telephony, the fastest converters; beyond, a header is damaged
BLOCK_VALUES = 1 << 20  # samples of all channels decoded at once (4 MB); a file within one is resampled in one go
CACHE_VERSION = 1  # raise it when decoding or the format of cached files changes: they are made again

# first bytes of the files that libsndfile reads; FFmpeg gets the others
_SOUNDFILE = frozenset({b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b".snd", b"dns.", b"caff", b"OggS"})
# FFmpeg may open these and nothing else: no playlists, which name other files and addresses, and no
# containers that hide their losses (avi, flv, mpegts). What libsndfile refuses, it would decode in part.
_FFMPEG_FORMATS = "aac,ac3,amr,asf,flac,matroska,mov,mp3,nistsphere,wav,webm"
_STRICT = {"err_detect": "crccheck+explode"}
_TOLERANCE_SEC = 0.05  # times in a container are rounded, and begin before or after the codec's own delay
_EXACT_SEC = 0.001  # where the header counts samples
_SURPLUS_BYTES = 32  # some phones state 22 bytes too many, and every player accepts it
_UNKNOWN_BYTES = 0x7FFFF000  # from here on: the placeholder of a writer that could not seek back
_UNKNOWN_FRAMES = 1 << 62  # libsndfile says 2**63 - 1 where a header is silent
_PCM_STEPS = 1 << 15  # of a 16-bit sample, on either side of 0
_CONVERT = "convert it: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"

Waveform = NDArray[np.float32]
AudioSource = str | Path | bytes | EncodedAudio


@dataclass(frozen=True)
class DecodedAudio:
    """A recording as the models take it, with the rate (Hz) and channels of its file."""

    samples: Waveform  # (T,) float32 in about [-1, 1], 16 kHz mono
    sample_rate: int
    channels: int


def load_audio(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False
) -> Waveform:
    """Decode a recording, mix it to mono and resample it, in little more memory than the result takes.

    Args:
        source: a path, the bytes of an encoded file, or an object whose `read` returns them.
        name: what to call it in errors; the path by default.
        max_sec: refuse a longer recording, by its header or as soon as this much has been decoded.
        allow_silence: return a silent signal instead of raising; silence may be transcribed, not trained on.

    Returns:
        (T,) float32 in about [-1, 1], 16 kHz.

    Raises:
        AudioError: absent, empty, truncated, damaged or not audio; NaN or infinite samples; longer than `max_sec`,
            shorter than 0.1 s, or silent.
    """
    return decode(source, name=name, max_sec=max_sec, allow_silence=allow_silence).samples


def decode(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False
) -> DecodedAudio:
    """Decode as `load_audio` does, and keep the rate and channels of the file."""
    label = _label(source, name)
    with _open(source, label, max_sec) as recording:
        samples = _to_16k(recording.blocks, recording.rate, label, allow_silence)
        return DecodedAudio(samples, recording.rate, recording.channels)


def stream_audio(source: AudioSource, *, name: str | None = None) -> Iterator[Waveform]:
    """Yield (n,) float32 at 16 kHz mono, in memory that does not grow with the recording; silence is allowed.

    Errors are those of `load_audio`; damage in the middle of a file is raised after the blocks before it.
    """
    label, samples = _label(source, name), 0
    with _open(source, label) as recording:
        for block in _blocks_16k(recording.blocks, recording.rate, label):
            samples += len(block)
            yield block
    _check_length(samples, label)


def to_mono_16k(
    samples: NDArray[np.float32], rate: int, *, name: str = "<array>", allow_silence: bool = False
) -> Waveform:
    """Check (T,) or (T, channels) floating point samples, mix and resample them; errors are those of `load_audio`."""
    _check_rate(rate, name)
    mono = _mono(samples) if samples.ndim == 2 else samples
    return _to_16k(iter([np.ascontiguousarray(mono, dtype=np.float32)]), rate, name, allow_silence)


# Opening and decoding, at the file's own rate


class _Recording(NamedTuple):
    rate: int
    channels: int
    promised_sec: float | None  # duration by its header; None where that is silent
    tolerance_sec: float  # by which the promise may be missed
    blocks: Iterator[Waveform]  # mono samples, (n,) float32 at `rate`, decoded while they are read


def _label(source: AudioSource, name: str | None) -> str:
    return name or (str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>")


@contextmanager
def _open(source: AudioSource, label: str, max_sec: float | None = None) -> Iterator[_Recording]:
    with ExitStack() as stack:
        file = stack.enter_context(_open_file(source, label))
        kind = file.read(4)
        file.seek(0)
        recording = _open_with_soundfile(file, label, stack) if kind in _SOUNDFILE else None
        if recording is None:
            file.seek(0)
            recording = _open_with_ffmpeg(file, label, stack)
        _check_rate(recording.rate, label)
        yield recording._replace(blocks=_bounded(recording, max_sec or float("inf"), label))


def _bounded(recording: _Recording, max_sec: float, label: str) -> Iterator[Waveform]:
    """Pass blocks on; refuse more than `max_sec`, and an end before the promised one."""
    promised_sec, present_sec, samples = recording.promised_sec or 0.0, 0.0, 0
    if promised_sec > max_sec:
        raise AudioError(f"{label}: longer than {max_sec:g} s (by its header {promised_sec:.1f} s); cut it at a pause")
    for block in recording.blocks:
        samples += len(block)
        present_sec = samples / recording.rate
        if present_sec > max_sec:
            raise AudioError(f"{label}: longer than {max_sec:g} s; cut it at a pause")
        yield block
    if present_sec < promised_sec - recording.tolerance_sec:
        raise AudioError(f"{label}: truncated: {present_sec:.2f} of {promised_sec:.2f} s are there; fetch it again")


class _NamelessFile(io.BufferedReader):
    """A file that hides its name, so that decoders go by its content: names lie, and `.raw` would need a rate."""

    name = "recording"


@contextmanager
def _open_file(source: AudioSource, label: str) -> Iterator[BinaryIO]:
    try:
        if isinstance(source, str | Path):
            file: BinaryIO = _NamelessFile(io.FileIO(Path(source)))
        else:
            file = io.BytesIO(source if isinstance(source, bytes) else source.read())
    except FileNotFoundError as err:
        raise AudioError(f"{label}: no such file") from err
    except (OSError, ValueError) as err:  # a folder, a permission, a broken disk; a zero byte in the path
        raise AudioError(f"{label}: cannot be read: {getattr(err, 'strerror', None) or err}") from err
    with file:
        if file.seek(0, io.SEEK_END) == 0:
            raise AudioError(f"{label}: the file is empty (0 bytes); remove it or fetch it again")
        file.seek(0)
        yield file


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """soundfile seeks to its own position after each read, which resets decoders that keep a state."""

    def seekable(self) -> bool:
        return False


def _open_with_soundfile(file: BinaryIO, label: str, stack: ExitStack) -> _Recording | None:
    """Open WAV, its relatives and Ogg; None leaves the file to FFmpeg."""
    try:
        sound = stack.enter_context(_Sequential(file))
    except sf.LibsndfileError as err:
        raise _undecodable(label, f"soundfile: {err.error_string}") from err
    if sound.frames == 0 or sound.subtype.startswith("MPEG"):
        return None  # a header that was never finished; a length that libsndfile gets wrong
    if sound.format == "OGG":
        _check_ogg_pages(file, label)
    is_exact = sound.subtype.startswith(("PCM", "FLOAT", "DOUBLE"))  # others round their bytes per second
    # libsndfile corrects sizes beyond the end of the file with a line in its log
    for field, stated, fitting in re.findall(r"^ *(\S.*?) *: (\d+) \(should be (\d+)\)", sound.extra_info, re.M):
        is_wrong_rate = is_exact and field == "Bytes/sec" and int(stated) != 0
        if is_wrong_rate or int(fitting) + _SURPLUS_BYTES < int(stated) < _UNKNOWN_BYTES:
            raise AudioError(f"{label}: damaged: its header says {field} {stated}, not {fitting}; fetch it again")
    promised_sec = sound.frames / sound.samplerate if sound.frames < _UNKNOWN_FRAMES else None
    return _Recording(sound.samplerate, sound.channels, promised_sec, _EXACT_SEC, _sound_blocks(sound, label))


def _check_ogg_pages(file: BinaryIO, label: str) -> None:
    """Refuse an Ogg file that is cut, or goes on after its end: decoders stop there without an error (RFC 3533)."""
    at, size = file.tell(), file.seek(0, io.SEEK_END)
    is_whole, end = False, file.seek(0)
    while (head := file.read(27)).startswith(b"OggS") and len(head) == 27:
        if is_whole and head[5] & 2:  # the first page of a stream after the last one of another
            raise AudioError(f"{label}: several recordings chained in one Ogg file, of which one is read; split it")
        end = file.seek(sum(file.read(head[26])), io.SEEK_CUR)
        is_whole = bool(head[5] & 4) and end <= size
    file.seek(at)
    if not is_whole:  # no page is marked as the last
        fix = "fetch it again, or if you want what is left: ffmpeg -i IN -c copy OUT.ogg"
        raise AudioError(f"{label}: truncated or damaged at byte {min(end, size)} of {size}; {fix}")


def _sound_blocks(sound: sf.SoundFile, label: str) -> Iterator[Waveform]:
    size = max(1, BLOCK_VALUES // sound.channels)
    for at in range(0, sound.frames, size):  # no frame more: a tag may follow the sound
        try:
            block = sound.read(min(size, sound.frames - at), dtype="float32", always_2d=True)  # (n, channels)
        except sf.LibsndfileError as err:
            raise AudioError(f"{label}: damaged: {err.error_string}; fetch it again") from err
        if not len(block):
            return
        yield _mono(block)


def _open_with_ffmpeg(file: BinaryIO, label: str, stack: ExitStack) -> _Recording:
    import av  # takes 0.2 s, and most recordings do without

    try:
        options = {"format_whitelist": _FFMPEG_FORMATS, **_STRICT}
        container = stack.enter_context(av.open(file, options=options, metadata_errors="ignore"))
        stream = container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            raise AudioError(f"{label}: the file has no audio track that can be decoded; {_CONVERT}")
        stream.codec_context.options = _STRICT
        frames = container.decode(stream)
        head = next(frames, None)  # its rate is the true one: the header of HE-AAC gives half of it
    except (av.FFmpegError, ValueError, IndexError) as err:
        raise _undecodable(label, f"PyAV: {err}") from err
    if head is None:
        raise AudioError(f"{label}: 0 samples decoded; remove it or record it again")
    kind, is_alone = container.format.name, len(container.streams) == 1
    from_sec = (container.start_time or 0) / av.time_base
    whole_sec = None if container.duration is None else container.duration / av.time_base
    begin_sec = None if stream.start_time is None else float(stream.start_time * stream.time_base)
    promised_sec, lead_samples = None, 0
    if kind in ("aac", "ac3", "amr") or (kind == "mp3" and not stream.start_time):  # an mp3 without LAME's header
        pass  # FFmpeg guesses the duration from the bit rate
    elif stream.duration is not None:
        promised_sec = float(stream.duration * stream.time_base)
    elif whole_sec is not None and is_alone:  # else it may be the picture's
        promised_sec = whole_sec - from_sec
    if begin_sec is not None and whole_sec is not None and not is_alone:
        # the sound of a video may begin later than its picture: silence keeps the times of captions right
        lead_sec = begin_sec - from_sec
        if lead_sec > whole_sec:
            raise AudioError(f"{label}: damaged: its sound begins after its end; fetch it again, or {_CONVERT}")
        if lead_sec > _TOLERANCE_SEC:
            lead_samples = round(lead_sec * head.sample_rate)
            promised_sec = None if promised_sec is None else promised_sec + lead_sec
    sizes = (min(BLOCK_VALUES, lead_samples - at) for at in range(0, lead_samples, BLOCK_VALUES))
    silence = (np.zeros(size, np.float32) for size in sizes)
    blocks = itertools.chain(silence, _ffmpeg_blocks(itertools.chain([head], frames), begin_sec, label))
    tolerance_sec = _TOLERANCE_SEC if kind.startswith(("asf", "matroska", "mov")) else _EXACT_SEC
    return _Recording(head.sample_rate, head.layout.nb_channels, promised_sec, tolerance_sec, blocks)


def _ffmpeg_blocks(frames: Iterator[Any], expected_sec: float | None, label: str) -> Iterator[Waveform]:
    """Mix frames to mono and join them to blocks; refuse holes, damage and a change of format."""
    import av

    resampler = av.AudioResampler(format="flt")  # keeps rate and channels, but interleaves them
    pending: list[NDArray[np.float32]] = []  # (n, channels) each
    kind, waiting, total_sec = None, 0, 0.0
    try:
        for frame in frames:
            kind = kind or (frame.sample_rate, frame.layout.nb_channels)
            if kind != (frame.sample_rate, frame.layout.nb_channels):
                raise AudioError(f"{label}: its sample rate or channels change at {total_sec:.1f} s; {_CONVERT}")
            gap_sec = 0.0 if frame.time is None or expected_sec is None else frame.time - expected_sec
            if frame.is_corrupt or gap_sec > _TOLERANCE_SEC:
                what = "damaged" if frame.is_corrupt else f"{gap_sec:.2f} s are missing"
                raise AudioError(f"{label}: {what} at {total_sec:.1f} s; fetch it again, or {_CONVERT}")
            frame_sec = frame.samples / frame.sample_rate
            expected_sec = None if frame.time is None else frame.time + frame_sec
            total_sec += frame_sec
            if frame.format.name == "fltp" and kind[1] < 8:  # PyAV 18 crashes on 8 planes
                pending.append(frame.to_ndarray().T)
            else:
                pending += [part.to_ndarray().reshape(-1, kind[1]) for part in resampler.resample(frame)]
            waiting += frame.samples * kind[1]
            if waiting >= BLOCK_VALUES:
                yield _mono(np.concatenate(pending))
                pending, waiting = [], 0
    except (av.FFmpegError, ValueError) as err:
        raise AudioError(f"{label}: damaged at {total_sec:.1f} s (PyAV: {err}); fetch it again, or {_CONVERT}") from err
    if pending:
        yield _mono(np.concatenate(pending))


def _undecodable(label: str, reason: str) -> AudioError:
    return AudioError(f"{label}: not a recording that can be decoded ({reason}); check that it plays, or {_CONVERT}")


def _mono(block: NDArray[np.float32]) -> Waveform:
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are refused afterwards
        mono: Waveform = block.mean(axis=1)
    return mono


# Checks and resampling


def _to_16k(blocks: Iterator[Waveform], rate: int, label: str, allow_silence: bool) -> Waveform:
    """Resample mono blocks (n,) at `rate` to one (T,) at 16 kHz: in one go, or block by block where there are more."""
    first, second = next(blocks, np.zeros(0, dtype=np.float32)), next(blocks, None)
    if second is None:
        _check_samples(first, label)
        mono = first if rate == SAMPLE_RATE else soxr.resample(first, rate, SAMPLE_RATE, quality="HQ")
    else:
        buffer = bytearray()  # grows in place: a list of blocks would be held twice while it is joined
        for block in _blocks_16k(itertools.chain([first, second], blocks), rate, label):
            buffer += block.data
        mono = np.frombuffer(buffer, dtype=np.float32)
    _check_length(len(mono), label)
    if not allow_silence and max(mono.max(), -mono.min()) < SILENCE_PEAK:
        raise AudioError(f"{label}: the whole recording is silent (peak below -80 dBFS); remove it or record it again")
    return mono


def _blocks_16k(blocks: Iterator[Waveform], rate: int, label: str) -> Iterator[Waveform]:
    """Resample mono blocks (n,) at `rate` to blocks at 16 kHz."""
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        _check_samples(block, label)
        yield block if rate == SAMPLE_RATE else resampler.resample_chunk(block)
    if rate != SAMPLE_RATE:
        yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _check_rate(rate: int, label: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{label}: sample rate {rate} Hz, possible are {MIN_RATE} to {MAX_RATE}: a damaged header")


def _check_samples(block: Waveform, label: str) -> None:
    peak = max(block.max(), -block.min()) if len(block) else 0.0
    if not peak <= MAX_PEAK:  # NaN is not
        raise AudioError(f"{label}: samples up to {peak:.3g}, floats belong in [-1, 1]; export it again as 16-bit PCM")


def _check_length(samples: int, label: str) -> None:
    if samples < MIN_SAMPLES:
        raise AudioError(f"{label}: {samples} samples decoded, {MIN_SAMPLES} (0.1 s) are needed; record it again")


# Decoded recordings on disk


@dataclass(frozen=True)
class AudioCache:
    """A folder of decoded recordings, so that later epochs and runs decode less.

    Each is a 16-bit FLAC at 16 kHz mono that plays in any player. Its comment holds the SHA-256 of the samples and the
    scale that they are divided by, so that samples beyond [-1, 1] are kept. Files are named by the SHA-256 of the
    encoded recording and appear whole, so several processes may share a folder. A damaged file is made again; nothing
    is ever removed.
    """

    folder: Path

    def load_audio(self, source: AudioSource, *, name: str | None = None) -> Waveform:
        """Return what `load_audio` does, rounded to 16 bits (by 1.5e-5, times the scale), from the folder if there.

        Raises `AudioError` for an unusable recording, `WhisperASRError` for a folder that cannot be read or written.
        """
        encoded, path = self._find(source, name)
        with self._naming_the_folder():
            if (cached := _read_cached(path)) is not None:
                return cached
        return self._keep(load_audio(encoded, name=_label(source, name)), path)

    def decode(self, source: AudioSource, *, name: str | None = None, max_sec: float | None = None) -> DecodedAudio:
        """Return what `decode` does, and keep it for `load_audio`."""
        encoded, path = self._find(source, name)
        decoded = decode(encoded, name=_label(source, name), max_sec=max_sec)
        with self._naming_the_folder():
            is_kept = path.exists()
        if not is_kept:
            self._keep(decoded.samples, path)
        return decoded

    def _find(self, source: AudioSource, name: str | None) -> tuple[bytes, Path]:
        with _open_file(source, label := _label(source, name)) as file:
            try:
                encoded = file.read()
            except OSError as err:
                raise AudioError(f"{label}: cannot be read: {err.strerror}") from err
        key = hashlib.sha256(encoded).hexdigest()
        return encoded, self.folder / key[:2] / f"{key}.flac"

    def _keep(self, samples: Waveform, path: Path) -> Waveform:
        # the scale is 1 unless the samples would clip; float64: rounding must not add to the half step
        scale = max(1.0, float(samples.max()) * _PCM_STEPS / (_PCM_STEPS - 1), -float(samples.min()))
        pcm = np.rint(samples * np.float64(_PCM_STEPS / scale)).clip(-_PCM_STEPS, _PCM_STEPS - 1).astype(np.int16)
        buffer = io.BytesIO()
        with sf.SoundFile(buffer, "w", SAMPLE_RATE, 1, subtype="PCM_16", format="FLAC") as file:
            file.comment = _comment(pcm, scale)
            file.write(pcm)
        with self._naming_the_folder():
            write_bytes_atomic(path, buffer.getvalue())
        return _to_float(pcm, scale)

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            fix = "free some space, set paths.cache_dir to a folder of yours, or data.cache_decoded: false"
            raise WhisperASRError(f"{self.folder}: decoded audio cannot be kept there: {err.strerror}; {fix}") from err


def _read_cached(path: Path) -> Waveform | None:
    """Return the samples of a cached file; None if it is absent or, with a warning, damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    with suppress(sf.LibsndfileError, ValueError), sf.SoundFile(io.BytesIO(content)) as file:
        pcm, scale = file.read(dtype="int16"), float(file.comment.rpartition(" ")[2])  # (T,)
        if file.comment == _comment(pcm, scale):
            return _to_float(pcm, scale)
    logger.warning("%s: damaged, or from another version; decoding the recording again", path)
    return None


def _to_float(pcm: NDArray[np.int16], scale: float) -> Waveform:
    return pcm.astype(np.float32) * np.float32(scale / _PCM_STEPS)


def _comment(pcm: NDArray[np.int16], scale: float) -> str:
    digest = hashlib.sha256(pcm.astype("<i2").tobytes()).hexdigest()
    return f"decoded audio v{CACHE_VERSION}, pcm sha256 {digest}, scale {scale!r}"
