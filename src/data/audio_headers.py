"""Damage that decoders pass over, read from a recording's own header: sizes that do not fit the file or one another.

libsndfile reads a cut WAV, AIFF, AU or W64 file without a word, and believes any sample rate; FFmpeg conceals. What a
header cannot tell stays unseen: PCM carries no checksum, so samples flipped inside a WAV file sound as they are.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from src.data.audio_frames import is_mp3, matroska_damage, mp3_damage, ogg_damage

_ByteOrder = Literal["little", "big"]
_PCM_TAGS = frozenset({1, 3, 0xFFFE})  # integers, floats, WAVE_FORMAT_EXTENSIBLE: the size of a frame is known
_UNKNOWN_SIZE = 0x7FFFF000  # from here on, what writers put that could not seek back
_FLAC_RATES = {1: 88_200, 2: 176_400, 3: 192_000, 4: 8_000, 5: 16_000, 6: 22_050, 7: 24_000, 8: 32_000, 9: 44_100,
               10: 48_000, 11: 96_000}  # Hz, RFC 9639 section 9.1.2  # fmt: skip


class FlacInfo(NamedTuple):
    """What a FLAC file says of its samples: rate in Hz, bits, and the MD5 of all of them (None if not written)."""

    rate: int
    bits: int
    md5: bytes | None
    frames_at: int  # byte at which the first frame begins


def find_damage(file: BinaryIO, size: int) -> str | None:
    """Compare a recording with what its container says of it.

    Args:
        file: one that a decoder has opened; seekable, and its position is left anywhere.
        size: bytes.
    Returns: what is wrong, None if nothing can be found.
    """
    start = after_id3(file)
    head = _read(file, start, 32)
    kind = head[:4]
    if kind in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":  # not AVI
        return _riff_damage(file, size)
    if kind == b"FORM":
        return _promise(8 + int.from_bytes(head[4:8], "big"), size)
    if kind in (b".snd", b"dns."):
        offset, data_bytes = struct.unpack(">II" if kind == b".snd" else "<II", head[4:12])
        return None if data_bytes >= _UNKNOWN_SIZE else _promise(offset + data_bytes, size)
    if kind == b"riff":  # W64
        return _promise(int.from_bytes(head[16:24], "little"), size)
    if kind == b"NIST":
        return _sphere_damage(_read(file, start, 1024), size)
    if kind == b"caff":
        return _caf_damage(file, size)
    if kind == b"fLaC":
        return _flac_damage(file)
    if kind == b"OggS":
        return ogg_damage(file, size)
    if kind == b"\x1a\x45\xdf\xa3":
        return matroska_damage(file, size)
    return mp3_damage(file, start, size) if is_mp3(file, start) else None


def flac_info(file: BinaryIO) -> FlacInfo | None:
    """Read STREAMINFO (RFC 9639 section 8.2); None if this is no FLAC file."""
    at = after_id3(file)
    if _read(file, at, 4) != b"fLaC":
        return None
    stream = _read(file, at + 8, 34)
    at, last = at + 4, False
    while not last and len(block := _read(file, at, 4)) == 4:
        last, at = bool(block[0] & 0x80), at + 4 + int.from_bytes(block[1:], "big")
    packed = int.from_bytes(stream[10:14], "big")  # 20 bits of rate, 3 of channels - 1, 5 of bits - 1
    return FlacInfo(packed >> 12, (packed >> 4 & 0x1F) + 1, stream[18:34] if any(stream[18:34]) else None, at)


def after_id3(file: BinaryIO) -> int:
    """Return where the recording begins, behind ID3v2 tags."""
    at = 0
    while (head := _read(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        a, b, c, d = (byte & 0x7F for byte in head[6:10])
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
    return at


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _promise(promised: int, present: int) -> str | None:
    if promised <= present:
        return None
    return f"truncated: the header promises {promised} bytes, {present} are there"


def _riff_damage(file: BinaryIO, size: int) -> str | None:
    magic, riff_size = _read(file, 0, 4), _read(file, 4, 4)
    order: _ByteOrder = "big" if magic == b"RIFX" else "little"
    riff_end = 8 + int.from_bytes(riff_size, order)
    long_size = None
    for at, name, count in _chunks(file, 12, size, order):
        if name == b"ds64":
            long_size = int.from_bytes(_read(file, at + 8, 8), "little")
        if name == b"fmt " and (problem := _fmt_damage(_read(file, at, 16), order)):
            return problem
        if name == b"data":
            if count == 0xFFFFFFFF and long_size is not None:
                count = long_size
            elif count == 0 or count >= _UNKNOWN_SIZE:
                return None
            return _promise(at + count, size) or _tail_damage(file, at + count, min(riff_end, size), order)
    return "its chunks lead past the end before any samples: the header is damaged"


def _chunks(file: BinaryIO, at: int, end: int, order: _ByteOrder) -> Iterator[tuple[int, bytes, int]]:
    """Yield where each chunk's content begins, its name and its bytes; sizes may lie."""
    while at + 8 <= end:
        head = _read(file, at, 8)
        if at % 2 == 0 and not _is_name(head[:4]) and _is_name(_read(file, at - 1, 4)):
            at, head = at - 1, _read(file, at - 1, 8)  # writers that forget the byte which evens an odd chunk
        count = int.from_bytes(head[4:], order)
        yield at + 8, head[:4], count
        at += 8 + count + count % 2


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= byte < 127 for byte in name)


def _tail_damage(file: BinaryIO, at: int, end: int, order: _ByteOrder) -> str | None:
    """A data chunk that says too little leaves samples behind it, which are no chunks."""
    if not _read(file, at, 4096).strip(b"\0"):
        return None  # nothing, or padding
    for content, name, count in _chunks(file, at + at % 2, end, order):
        if not _is_name(name) or content + count > end + 1:
            return f"{end - at} bytes behind the samples are no chunks: the header's size of the samples is damaged"
    return None


def _fmt_damage(fmt: bytes, order: _ByteOrder) -> str | None:
    if len(fmt) < 16:
        return "truncated within the header"
    tag, channels, rate, byte_rate, frame_bytes, bits = struct.unpack((">" if order == "big" else "<") + "HHIIHH", fmt)
    if tag not in _PCM_TAGS:
        return None
    sample_bytes = {-(-bits // 8)} | ({4} if 16 < bits <= 32 else set())  # 24 bits may lie in 32
    if channels == 0 or frame_bytes not in {channels * count for count in sample_bytes}:
        return f"the header contradicts itself: {channels} channels of {bits} bits in {frame_bytes} bytes"
    if byte_rate not in (0, rate * frame_bytes):
        return f"the header contradicts itself: {rate} Hz of {frame_bytes} bytes, but {byte_rate} bytes a second"
    return None


def _sphere_damage(header: bytes, size: int) -> str | None:
    fields = dict(re.findall(rb"^(\w+) -i (\d+)", header, re.M))
    lines = header.split(b"\n")
    counts = [fields.get(key) for key in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    if None in counts or len(lines) < 2 or not lines[1].strip().isdigit():
        return None
    samples, channels, sample_bytes = (int(count or 0) for count in counts)
    return _promise(int(lines[1]) + samples * channels * sample_bytes, size)


def _caf_damage(file: BinaryIO, size: int) -> str | None:
    at = 8
    while len(head := _read(file, at, 12)) == 12:
        count = int.from_bytes(head[4:], "big", signed=True)
        if count < 0:  # samples up to the end of the file
            return None if head[:4] == b"data" else "a chunk has a negative size: the header is damaged"
        at += 12 + count
    return _promise(at, size)


def _flac_damage(file: BinaryIO) -> str | None:
    """STREAMINFO has no checksum of its own, but each frame repeats the rate under one."""
    info = flac_info(file)
    if info is None:
        return None
    head = _read(file, info.frames_at, 16)
    if len(head) < 16 or head[0] != 0xFF or head[1] & 0xFC != 0xF8:
        return "truncated or damaged: no frame follows the header"
    size_code, rate_code = head[2] >> 4, head[2] & 0xF
    at = 5 + {6: 1, 7: 2}.get(size_code, 0)  # behind the frame's number (one byte: it is 0) and its length
    u16 = int.from_bytes(head[at : at + 2], "big")
    rates = _FLAC_RATES | {0: info.rate, 12: head[at] * 1000, 13: u16, 14: u16 * 10}
    if rates.get(rate_code) != info.rate:
        return f"the header says {info.rate} Hz, the first frame {rates.get(rate_code)} Hz: one of them is damaged"
    return None


def file_size(file: BinaryIO) -> int:
    """Return the bytes of a seekable file and rewind it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size
