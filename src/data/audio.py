"""Decoding, resampling and caching: any recording becomes (T,) float32 mono at 16 kHz.

What a player plays is decoded. Headers of crashed recorders, cutters and phones are often wrong; each oddity is logged
once. Where sound is missing or damaged, `strict` refuses it, as a transcript would not fit; otherwise it is silence or
the end, and logged. FFmpeg runs with every check that it has, and what was decoded is compared with what the header
promises. What has no checksum (PCM, AAC, most mp3 files) may still hold changed samples.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from src.data.utterance import AudioTrack, EncodedAudio
from src.utils.errors import AudioError, WhisperASRError, visible
from src.utils.files import write_bytes_atomic

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000  # Hz, what every Whisper model was trained on
MIN_SAMPLES = SAMPLE_RATE // 10  # 1_600: 0.1 s, below which a log-mel window has nothing to see
SILENCE_PEAK = 1e-4  # -80 dBFS; 16-bit dither is at 3e-5
MAX_PEAK = 100.0  # +40 dBFS; beyond are integers stored as floats, and damaged exponents
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz: half of telephony, the fastest converters; beyond, a header is damaged
BLOCK_VALUES = 1 << 20  # samples of all channels decoded at once (4 MB); a file within one is resampled in one go
CACHE_VERSION = 2  # raise it when decoding or the format of cached files changes: they are made again
MIN_BYTES_PER_SEC = 16  # of a whole file; digital silence in FLAC has 55 at 16 kHz. Less is a bomb, except in
FREE_SEC = 600.0  # the first ten minutes

# first bytes of the files that libsndfile reads; FFmpeg gets the others, and what libsndfile does not know
_SOUNDFILE = frozenset({b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b".snd", b"dns.", b"caff", b"OggS"})
_CHUNKED = frozenset({b"RIFF", b"RIFX", b"RF64", b"BW64", b"caff"})
# FFmpeg may open these and nothing else: no playlists, which name other files and addresses
_FFMPEG_FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dss,dts,eac3,flac,flv,loas,matroska,mov,mp3,mpeg,mpegts,mxf,nistsphere,ogg,"
    "tta,voc,w64,wav,webm,wv"
)
_GUESSED = frozenset({"aac", "ac3", "amr", "dts", "eac3", "loas", "mpeg", "mpegts"})  # durations, from the bit rate
_RESTARTING = frozenset({"mpeg", "mpegts"})  # time jumps where programmes are joined
_STRICT = {"err_detect": "crccheck+explode"}
_TOLERANCE_SEC = 0.05  # times in a container are rounded, and begin before or after the codec's own delay
_EXACT_SEC = 0.001  # where the header counts samples
_PACKET_SEC = 0.15  # ALAC: 4,096 samples of at least 32 kHz
_MP3_SEC = 0.02  # less than a frame
_VIDEO_TOLERANCE_SEC = 2.0  # a picture may be shown for long
_JUMP_SEC = 10.0
_SURPLUS_BYTES = 32  # some phones state 22 bytes too many, and every player accepts it
_UNKNOWN_BYTES = 0x7FFFF000  # from here on: the placeholder of a writer that could not seek back
_REST_BYTES = 8_000  # half a second in 8 bits
_SIZES = frozenset({"RIFF", "data", "Riff size"})  # libsndfile's names for what `_is_unfinished` compares
_UNKNOWN_FRAMES = 1 << 62  # libsndfile says 2**63 - 1 where a header is silent
_USUAL_RATES = frozenset({8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000})
_HEADER_READS = 4_000  # a thousand chunks, or 128 MB for FFmpeg; not millions
_MAX_PADDING = 1 << 22  # bytes of one value, after which FFmpeg's parsers would collect the rest of the file in memory
_RAW = frozenset({"aac", "ac3", "dts", "eac3", "flac", "loas", "mp3"})
_MAX_ERRORS = 100  # of a container in one place
_CANCELLED = 0.4  # power of the sum over that of the loudest channel; 1 for unrelated channels, 4 for two equal ones
_INVERTED, _STRETCH = 0.05, 4096  # the same in samples of a block: one channel may be inverted for a while
_PCM_STEPS = 1 << 15  # of a 16-bit sample, on either side of 0
# fmt: off
AUDIO_SUFFIXES = frozenset({  # of what is decoded
    ".wav", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".ogv", ".opus", ".spx", ".mp3", ".mp2", ".mpga",
    ".m4a", ".m4b", ".m4v", ".mp4", ".mov", ".qt", ".3gp", ".3g2", ".3ga", ".webm", ".weba", ".mkv", ".mka", ".aac",
    ".ac3", ".eac3", ".dts", ".wma", ".wmv", ".asf", ".avi", ".flv", ".f4v", ".mpg", ".mpeg", ".vob", ".ts", ".mts",
    ".m2ts", ".mxf", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist", ".amr", ".awb", ".wv",
    ".tta", ".ape", ".voc", ".dss",
})
# fmt: on
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
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False,
    track: int | None = None, strict: bool = False,
) -> Waveform:  # fmt: skip
    """Decode a recording, mix it to mono and resample it, in little more memory than the result takes.

    Sound that begins after its picture follows silence, so that times are those of the video. A channel that cancels
    the others is left out of the mix.

    Args:
        source: a path, the bytes of an encoded file, or an object whose `read` returns them.
        name: what to call it in errors; the path by default.
        max_sec: refuse a longer recording, by its header or as soon as this much has been decoded.
        allow_silence: return a silent signal instead of raising; silence may be transcribed, not trained on.
        track: which audio track of a video, counted from 1; None is that of an `AudioTrack`, else the default one,
            logged where there are several.
        strict: refuse what is truncated or damaged, instead of a warning.

    Returns:
        (T,) float32 in about [-1, 1], 16 kHz.

    Raises:
        AudioError: absent, no regular file, empty or not audio; mostly damaged; without that track; NaN or infinite
            samples; longer than `max_sec`, shorter than 0.1 s, or silent.
    """
    return decode(source, name=name, max_sec=max_sec, allow_silence=allow_silence, track=track, strict=strict).samples


def decode(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, allow_silence: bool = False,
    track: int | None = None, strict: bool = False,
) -> DecodedAudio:  # fmt: skip
    """Decode as `load_audio` does, and keep the rate and channels of the file."""
    asked = _Asked(_label(source, name), track or _track_of(source), strict)
    with _open(source, asked, max_sec) as recording:
        samples = _to_16k(recording.blocks, recording.rate, asked.label, allow_silence)
        return DecodedAudio(samples, recording.rate, recording.channels)


def stream_audio(
    source: AudioSource, *, name: str | None = None, max_sec: float | None = None, track: int | None = None,
    strict: bool = False,
) -> Iterator[Waveform]:  # fmt: skip
    """Yield (n,) float32 at 16 kHz mono, in memory that does not grow with the recording; silence is allowed.

    Errors are those of `load_audio`; one in the middle of a file is raised after the blocks before it.
    """
    asked, samples = _Asked(_label(source, name), track or _track_of(source), strict), 0
    with _open(source, asked, max_sec) as recording:
        for block in _blocks_16k(recording.blocks, recording.rate, asked.label):
            samples += len(block)
            yield block
    _check_length(samples, asked.label)


def to_mono_16k(
    samples: NDArray[np.float32], rate: int, *, name: str = "<array>", allow_silence: bool = False
) -> Waveform:
    """Check (T,) or (T, channels) floating point samples, mix and resample them; errors are those of `load_audio`."""
    _check_rate(rate, name)
    mono = _mixer(_Asked(name))(samples) if samples.ndim == 2 else samples
    return _to_16k(iter([np.ascontiguousarray(mono, dtype=np.float32)]), rate, name, allow_silence)


# Opening and decoding, at the file's own rate


@dataclass
class _Asked:
    """What is wanted of a recording, and what was found odd about it."""

    label: str
    track: int | None = None
    strict: bool = False
    is_unfinished: bool = False  # its header promises nothing
    damaged: int = 0  # packets left out
    silent_sec: float = 0.0  # put in for sound that is missing
    whole_sec: float | None = None  # end of a video by its header
    reached_sec: float = 0.0  # end of its last packet
    oddities: list[str] = field(default_factory=list)

    def odd(self, what: str) -> None:
        """Note what is wrong with the file, though no sound is missing."""
        if what not in self.oddities:
            self.oddities.append(what)

    def lost(self, what: str) -> None:
        """Note, or with `strict` refuse, that sound is missing."""
        if self.strict:
            raise AudioError(f"{self.label}: {what}; fetch it again, or {_CONVERT}")
        self.odd(what)


class _Recording(NamedTuple):
    rate: int
    channels: int
    promised_sec: float | None  # duration by its header; None where that is silent
    tolerance_sec: float  # by which the promise may be missed
    blocks: Iterator[Waveform]  # mono samples, (n,) float32 at `rate`, decoded while they are read


def _track_of(source: AudioSource) -> int | None:
    return source.number if isinstance(source, AudioTrack) else None


def _label(source: AudioSource, name: str | None) -> str:
    return visible(name or (source if isinstance(source, str | Path) else f"<{type(source).__name__}>"))


@contextmanager
def _open(source: AudioSource, asked: _Asked, max_sec: float | None = None) -> Iterator[_Recording]:
    with ExitStack() as stack:
        file = stack.enter_context(_open_file(source, asked.label))
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        kind = file.read(4)
        file.seek(0)
        file.reads_left = _HEADER_READS
        goes_on = kind in _CHUNKED and _is_unfinished(file, size, asked)
        recording = _open_with_soundfile(file, asked, stack) if kind in _SOUNDFILE and not goes_on else None
        if recording is None:
            file.seek(0)
            recording = _open_with_ffmpeg(file, asked, stack, ignore_length=goes_on)
        file.reads_left = None
        _check_rate(recording.rate, asked.label)
        longest_sec = FREE_SEC + size / MIN_BYTES_PER_SEC
        yield recording._replace(blocks=_bounded(recording, max_sec or float("inf"), longest_sec, asked))


def _bounded(recording: _Recording, max_sec: float, longest_sec: float, asked: _Asked) -> Iterator[Waveform]:
    """Pass blocks on; refuse more than `max_sec`; report what is odd, and an end before the promised one."""
    label, present_sec, samples = asked.label, 0.0, 0
    promised_sec = None if asked.is_unfinished else recording.promised_sec
    if promised_sec is not None and longest_sec > promised_sec > max_sec:
        raise AudioError(f"{label}: longer than {max_sec:g} s (by its header {promised_sec:.1f} s); cut it at a pause")
    for block in recording.blocks:
        samples += len(block)
        present_sec = samples / recording.rate
        if present_sec > max_sec:
            raise AudioError(f"{label}: longer than {max_sec:g} s; cut it at a pause")
        if present_sec > longest_sec:
            raise AudioError(f"{label}: so small a file cannot hold {present_sec / 60:.0f} minutes; {_CONVERT}")
        yield block
    is_whole = promised_sec is not None and present_sec - asked.silent_sec >= promised_sec - recording.tolerance_sec
    if asked.damaged:
        what = f"{asked.damaged} damaged piece(s) left out"
        asked.odd(what) if is_whole else asked.lost(what)  # a tag or rubbish at its end
    if asked.silent_sec:
        asked.lost(f"{asked.silent_sec:.2f} s in it are missing, and are silence")
    if promised_sec is not None and present_sec < promised_sec - recording.tolerance_sec:
        asked.lost(f"truncated: {present_sec:.2f} of {promised_sec:.2f} s are there")
    elif asked.whole_sec is not None and asked.reached_sec < asked.whole_sec - _VIDEO_TOLERANCE_SEC:
        asked.lost(f"truncated: {asked.reached_sec:.1f} of {asked.whole_sec:.1f} s are there")
    if asked.oddities:
        _warn_once(f"{label}: decoded, but it is odd: {'; '.join(asked.oddities)}")


@lru_cache(maxsize=10_000)
def _warn_once(message: str) -> None:
    logger.warning(message)


class _File(io.BufferedReader):
    """A file that hides its name, so that decoders go by its content: names lie, and `.raw` would need a rate.

    While a header is read it ends after some thousands of reads: millions of tiny chunks would take minutes. With
    `ends_in_padding` it ends in a stretch of one value.
    """

    name = "recording"
    reads_left: int | None = None
    ends_in_padding = False
    _padding = 0

    def _may_read(self) -> bool:
        if self.reads_left is not None:
            self.reads_left -= 1
        return self.reads_left is None or self.reads_left > 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size) if self._may_read() else b""
        if self.ends_in_padding and data:
            self._padding = self._padding + len(data) if data.count(data[0]) == len(data) else 0
        return data if self._padding < _MAX_PADDING else b""

    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(buffer) if self._may_read() else 0


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading; a pipe, device, socket or folder raises `OSError`, without waiting for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file; save the recording to one")
    return io.FileIO(descriptor)


@contextmanager
def _open_file(source: AudioSource, label: str) -> Iterator[_File]:
    try:
        source = source.audio if isinstance(source, AudioTrack) else source
        if isinstance(source, str | Path):
            raw: Any = open_regular(Path(source))
        else:
            raw = io.BytesIO(source if isinstance(source, bytes) else source.read())
    except FileNotFoundError as err:
        raise AudioError(f"{label}: no such file") from err
    except (OSError, ValueError) as err:  # a folder, a permission, a broken disk; a zero byte in the path
        raise AudioError(f"{label}: cannot be read: {getattr(err, 'strerror', None) or err}") from err
    with _File(raw) as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise AudioError(f"{label}: the file is empty (0 bytes); copy or record it again")
        file.seek(0)
        yield file


def _is_unfinished(file: _File, size: int, asked: _Asked) -> bool:
    """Compare the size that a WAV, RF64, CAF or AVI file states with its own; whether to read to its end instead.

    A recorder that crashes leaves 0, a placeholder, or the size of its last pause.
    """
    head = file.read(20)
    is_caf = head.startswith(b"caff")
    layout = (">" if is_caf or head.startswith(b"RIFX") else "<") + ("4sq" if is_caf else "4sI")
    begin, stated = 8, int.from_bytes(head[4:8], "little")  # of a RIFF file as a whole
    is_wav, long_size = not is_caf and head[8:12] == b"WAVE", None
    if is_caf or is_wav:
        file.seek(8 if is_caf else 12)
        while len(chunk := file.read(struct.calcsize(layout))) == struct.calcsize(layout):
            name, stated = struct.unpack(layout, chunk)
            begin = file.tell()
            if name == b"data":
                break
            if name == b"ds64":  # of RF64
                long_size = int.from_bytes(file.read(16)[8:], "little")
            if not 0 <= stated <= size - begin:
                return False  # decoders know better, or refuse it
            file.seek(begin + stated + (0 if is_caf else stated % 2))
        else:
            return False
    if long_size is not None and stated == 0xFFFFFFFF:
        stated = long_size
    if stated in (0, -1) or size - begin < stated >= _UNKNOWN_BYTES:
        asked.odd(f"its header was never finished (it states {stated} bytes of samples)")
        asked.is_unfinished = True
        return is_wav and stated == 0
    if stated > size - begin + _SURPLUS_BYTES:
        asked.lost(f"truncated, or never finished: its header says {stated} bytes of samples, {size - begin} are there")
    rest = file.read(1 << 16) if file.seek(begin + stated) else b""
    file.seek(0)
    # what follows the samples is another chunk, or zeros, or text, or more samples
    is_sound = size - begin - stated > _REST_BYTES and any(rest) and not re.match(rb"[ -~\r\n]{4}", rest)
    if is_wav and is_sound:
        asked.odd(f"its header says {stated} bytes of samples, and more follow")
    return is_wav and is_sound


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """soundfile seeks to its own position after each read, which resets decoders that keep a state."""

    def seekable(self) -> bool:
        return False


def _open_with_soundfile(file: _File, asked: _Asked, stack: ExitStack) -> _Recording | None:
    """Open WAV, its relatives and Ogg; None leaves the file to FFmpeg."""
    try:
        sound = stack.enter_context(_Sequential(file))
    except sf.LibsndfileError:
        return None  # a codec that it does not know
    if sound.frames == 0 or sound.subtype.startswith("MPEG"):
        return None  # a header that was never finished; a length that libsndfile gets wrong
    if asked.track not in (None, 1):
        raise AudioError(f"{asked.label}: there is no audio track {asked.track}; it has 1")
    if sound.format == "OGG" and not _is_one_ogg(file, asked):
        return None
    is_exact = sound.subtype.startswith(("PCM", "FLOAT", "DOUBLE"))  # others round their bytes per second
    # libsndfile corrects sizes beyond the end of the file with a line in its log
    for field_, stated, fitting in re.findall(r"^ *(\S.*?) *: (\d+) \(should be (\d+)\)", sound.extra_info, re.M):
        if is_exact and field_ == "Bytes/sec" and int(stated) != 0:
            rate = int(stated) * sound.samplerate // int(fitting)
            if rate in _USUAL_RATES:
                raise AudioError(
                    f"{asked.label}: damaged: its header says both {sound.samplerate} and {rate} samples per second; "
                    "find out which plays right, and convert it with -ar"
                )
            asked.odd(f"its header says {field_} {stated}, not {fitting}")
        elif field_ not in _SIZES and int(fitting) + _SURPLUS_BYTES < int(stated) < _UNKNOWN_BYTES:
            asked.lost(f"truncated, or never finished: its header says {field_} {stated}, {fitting} are there")
    promised_sec = sound.frames / sound.samplerate if sound.frames < _UNKNOWN_FRAMES else None
    return _Recording(sound.samplerate, sound.channels, promised_sec, _EXACT_SEC, _sound_blocks(sound, asked))


def _is_one_ogg(file: _File, asked: _Asked) -> bool:
    """Look for a cut, and for a recording after the first: libsndfile stops there without an error (RFC 3533)."""
    at, size = file.tell(), file.seek(0, io.SEEK_END)
    reads_left, file.reads_left = file.reads_left, None
    has_end = is_cut = is_chained = False
    end = file.seek(0)
    while (head := file.read(27)).startswith(b"OggS") and len(head) == 27:
        is_chained = has_end and bool(head[5] & 2)  # the first page of a stream after the last one of another
        if is_chained:
            break
        end = file.seek(sum(file.read(head[26])), io.SEEK_CUR)
        has_end, is_cut = bool(head[5] & 4), end > size
    is_cut |= end < size and not has_end  # what follows is no page
    file.seek(at)
    file.reads_left = reads_left
    if is_cut:
        asked.lost(f"truncated or damaged at byte {min(end, size)} of {size}")
    elif is_chained or not has_end:
        asked.odd("it is several recordings in one" if is_chained else "its last page is not marked as the last")
    return not is_chained


def _sound_blocks(sound: sf.SoundFile, asked: _Asked) -> Iterator[Waveform]:
    size, mix = max(1, BLOCK_VALUES // sound.channels), _mixer(asked)
    for at in range(0, sound.frames, size):  # no frame more: a tag may follow the sound
        try:
            block = sound.read(min(size, sound.frames - at), dtype="float32", always_2d=True)  # (n, channels)
        except sf.LibsndfileError as err:
            asked.lost(f"damaged at {at / sound.samplerate:.1f} s: {err.error_string}")
            return
        if not len(block):
            return
        yield mix(block)


def _open_with_ffmpeg(file: _File, asked: _Asked, stack: ExitStack, *, ignore_length: bool) -> _Recording:
    import av  # takes 0.2 s, and most recordings do without

    try:
        options = {"format_whitelist": _FFMPEG_FORMATS, **_STRICT, **({"ignore_length": "1"} if ignore_length else {})}
        container = stack.enter_context(av.open(file, options=options, metadata_errors="ignore"))
        stream = _choose_track(container, asked)
        stream.codec_context.options = _STRICT
        kind, is_alone = container.format.name, len(container.streams) == 1
        file.ends_in_padding = kind in _RAW
        from_sec = (container.start_time or 0) / av.time_base
        whole_sec = None if container.duration is None else container.duration / av.time_base
        if not is_alone and whole_sec is not None and kind not in _GUESSED | _RAW | {"asf"}:  # which adds its delay
            asked.whole_sec = from_sec + whole_sec
        file.reads_left = None  # the sound of a video may begin late
        frames = _frames(container, stream, asked)
        head = next(frames, None)  # its rate is the true one: the header of HE-AAC gives half of it
    except (av.FFmpegError, ValueError, IndexError) as err:
        raise AudioError(
            f"{asked.label}: not a recording that can be decoded (PyAV: {err}); check that it plays, or {_CONVERT}"
        ) from err
    if head is None:
        raise AudioError(f"{asked.label}: 0 samples decoded; check that it plays, or {_CONVERT}")
    begin_sec = head.time
    if begin_sec is None and stream.start_time is not None:
        begin_sec = float(stream.start_time * stream.time_base)
    promised_sec, lead_sec = None, 0.0
    if kind in ("mp3", "flac"):
        promised_sec = _mp3_sec(file) if kind == "mp3" else whole_sec
    elif stream.duration is not None and (is_alone or kind.startswith("mov")) and kind not in _GUESSED:
        promised_sec = float(stream.duration * stream.time_base)  # in other videos it is the picture's
    elif whole_sec is not None and is_alone and kind not in _GUESSED:
        promised_sec = whole_sec - from_sec
    if begin_sec is not None and whole_sec is not None:
        if kind == "flac" and begin_sec > 1 and promised_sec is not None:  # a cutter left the length of the whole
            promised_sec -= begin_sec
        # the sound of a video may begin later than its picture: silence keeps the times of captions right
        if not is_alone and _TOLERANCE_SEC < begin_sec - from_sec <= whole_sec:
            lead_sec = begin_sec - from_sec
            promised_sec = None if promised_sec is None else promised_sec + lead_sec
    found = _ffmpeg_blocks(itertools.chain([head], frames), begin_sec, asked, restarts=kind in _RESTARTING)
    blocks = itertools.chain(_silence(lead_sec, head.sample_rate), found)
    is_rounded = kind.startswith(("asf", "avi", "flv", "matroska", "mov", "ogg"))
    tolerance_sec = {"caf": _PACKET_SEC, "mp3": _MP3_SEC}.get(kind) or (_TOLERANCE_SEC if is_rounded else _EXACT_SEC)
    return _Recording(head.sample_rate, head.layout.nb_channels, promised_sec, tolerance_sec, blocks)


def _mp3_sec(file: _File) -> float | None:
    """Return the duration that LAME's header states; FFmpeg guesses where a file is longer, from its bit rate."""
    at, begin = file.tell(), 0
    file.seek(0)
    while (head := file.read(10)).startswith(b"ID3") and len(head) == 10:
        begin += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(begin)
    frame = head + file.read(300)
    file.seek(at)
    found = re.search(rb"(?:Xing|Info)(.{4})(.{4})", frame, re.S)
    if found is None or frame[0] != 0xFF or not found[1][3] & 1:
        return None
    version = frame[1] >> 3 & 3  # 3: MPEG-1; 2 and 0 have half and a quarter of its rates
    rate = (44_100, 48_000, 32_000, 0)[frame[2] >> 2 & 3] >> {3: 0, 2: 1}.get(version, 2)
    samples = int.from_bytes(found[2], "big") * (1152 if version == 3 else 576)
    if found[1][3] & 15 == 15:  # all fields are there, and LAME's with 12 bits each for delay and padding
        ends = int.from_bytes(frame[found.start() + 141 :][:3], "big")
        samples -= (ends >> 12) + (ends & 0xFFF)
    return samples / rate if rate else None


def _choose_track(container: Any, asked: _Asked) -> Any:
    """Return the audio track that was asked for; else the one marked as default, or the best of those decodable."""
    tracks = list(container.streams.audio)
    names = []
    for number, track in enumerate(tracks, start=1):
        codec = "unknown codec" if track.codec_context is None else track.codec_context.name
        language = "" if track.language == "und" else track.language
        names.append(" ".join(filter(None, [str(number), language, track.metadata.get("title"), f"({codec})"])))
    if asked.track is not None and not 0 < asked.track <= len(tracks):
        raise AudioError(f"{asked.label}: there is no audio track {asked.track}; it has {', '.join(names) or 'none'}")
    known = [track for track in tracks if track.codec_context is not None]
    best = container.streams.best("audio")
    chosen = tracks[asked.track - 1] if asked.track else best if best in known else next(iter(known), None)
    if chosen is None or chosen not in known:
        raise AudioError(f"{asked.label}: the file has no audio track that can be decoded; {_CONVERT}")
    if len(tracks) > 1 and asked.track is None:
        number, listed = tracks.index(chosen) + 1, ", ".join(names)
        _warn_once(f"{asked.label}: track {number} of {len(tracks)} is taken: {listed}; audio_track chooses another")
    return chosen


def _frames(container: Any, stream: Any, asked: _Asked) -> Iterator[Any]:
    """Decode a track to its end; what is damaged is left out and counted."""
    import av

    stuck = decoded = 0
    while stuck < _MAX_ERRORS:
        try:
            for packet in container.demux() if asked.whole_sec is not None else container.demux(stream):
                stuck = 0
                if packet.pts is not None:
                    end = packet.pts + (packet.duration or 0)
                    asked.reached_sec = max(asked.reached_sec, float(end * packet.time_base))
                if packet.stream is not stream:
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    asked.damaged += 1
                    if asked.damaged > 2 * decoded + _MAX_ERRORS:
                        return
                    continue
                decoded += len(frames)
                asked.damaged += sum(frame.is_corrupt for frame in frames)
                yield from (frame for frame in frames if not frame.is_corrupt)
            return
        except av.FFmpegError:
            asked.damaged += not stuck
            stuck += 1


def _silence(sec: float, rate: int) -> Iterator[Waveform]:
    samples = round(sec * rate)
    return (np.zeros(min(BLOCK_VALUES, samples - at), np.float32) for at in range(0, samples, BLOCK_VALUES))


def _ffmpeg_blocks(
    frames: Iterator[Any], expected_sec: float | None, asked: _Asked, *, restarts: bool
) -> Iterator[Waveform]:
    """Mix frames to mono and join them to blocks; put silence into holes, and convert what changes its format."""
    import av

    mix, is_same = _mixer(asked), True  # as the first frame
    first: tuple[int, int, str] | None = None
    kind: tuple[int, int, str] | None = None
    layout = resampler = None
    pending: list[NDArray[np.float32]] = []  # (n, channels) each
    waiting, total_sec, decoded = 0, 0.0, 0

    def interleaved(frame: Any) -> list[NDArray[np.float32]]:
        assert resampler is not None and first is not None
        return [part.to_ndarray().reshape(-1, first[1]) for part in resampler.resample(frame)]

    try:
        for frame in frames:
            decoded += 1
            if (form := (frame.sample_rate, frame.layout.nb_channels, frame.format.name)) != kind:
                if first is None:
                    first, layout = form, frame.layout
                else:
                    asked.odd(f"its format changes at {total_sec:.1f} s")
                    pending += interleaved(None)
                kind, is_same = form, form[:2] == first[:2]
                # interleaves; rate and channels stay, or become those of the first frame
                resampler = av.AudioResampler("flt", None if is_same else layout, None if is_same else first[0])
            gap_sec = 0.0 if frame.time is None or expected_sec is None else frame.time - expected_sec
            if gap_sec > _TOLERANCE_SEC and not (restarts and gap_sec > _JUMP_SEC):
                asked.silent_sec += gap_sec * (total_sec > _PACKET_SEC)  # after its first packet: a late start
                if pending:
                    yield mix(np.concatenate(pending))
                pending, waiting = [], 0
                yield from _silence(gap_sec, frame.sample_rate if first is None else first[0])
            frame_sec = frame.samples / frame.sample_rate
            expected_sec = None if frame.time is None else frame.time + frame_sec
            total_sec += frame_sec
            if frame.format.name == "fltp" and is_same and form[1] < 8:  # PyAV 18 crashes on 8 planes
                pending.append(frame.to_ndarray().T)
            else:
                pending += interleaved(frame)
            waiting += frame.samples * form[1]
            if waiting >= BLOCK_VALUES:
                yield mix(np.concatenate(pending))
                pending, waiting = [], 0
        if resampler is not None:
            pending += interleaved(None)
    except (av.FFmpegError, ValueError) as err:
        asked.damaged += 1
        asked.odd(f"PyAV: {err}")
    if asked.damaged > decoded:
        raise AudioError(f"{asked.label}: most of it is damaged; fetch it again, or {_CONVERT}")
    if pending:
        yield mix(np.concatenate(pending))


def _mixer(asked: _Asked) -> Callable[[NDArray[np.float32]], Waveform]:
    """Return a function that mixes (n, channels) to (n,): the mean, or one channel where others cancel it."""
    chosen: int | None = None

    def mix(block: NDArray[np.float32]) -> Waveform:
        nonlocal chosen
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are refused afterwards
            mono: Waveform = block.mean(axis=1)
            if block.shape[1] > 1:
                whole = _power_of_sum(block, mono) < _CANCELLED
                size = len(block) if whole else _STRETCH
                for at in range(0, len(block), size):
                    part = block[at : at + size]
                    if whole or _power_of_sum(part, mono[at : at + size]) < _INVERTED:
                        if chosen is None:
                            chosen = int(np.einsum("tc,tc->c", part, part).argmax())
                            asked.odd(f"its channels cancel each other, one is inverted: channel {chosen + 1} is used")
                        mono[at : at + size] = part[:, chosen]
        return mono

    return mix


def _power_of_sum(block: NDArray[np.float32], mono: Waveform) -> float:
    """Return the power of the sum of all channels over that of the loudest one; infinite for silence."""
    loudest = float(np.einsum("tc,tc->c", block, block).max())
    return float(mono @ mono) * block.shape[1] ** 2 / loudest if loudest else math.inf


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
        raise AudioError(
            f"{label}: the whole recording is silent (peak below -80 dBFS); check the microphone and the track"
        )
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
        return self._keep(load_audio(encoded, name=_label(source, name), track=_track_of(source)), path)

    def decode(
        self, source: AudioSource, *, name: str | None = None, max_sec: float | None = None, strict: bool = False
    ) -> DecodedAudio:
        """Return what `decode` does, and keep it for `load_audio`."""
        encoded, path = self._find(source, name)
        label = _label(source, name)
        decoded = decode(encoded, name=label, max_sec=max_sec, track=_track_of(source), strict=strict)
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
        track = _track_of(source)
        key = hashlib.sha256(encoded if track is None else encoded + bytes([track])).hexdigest()
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
