"""Damage inside Ogg, Matroska and mp3 streams, where decoders drop pages and frames without a word.

Ogg (RFC 3533) numbers its pages and puts a CRC on each: whatever is lost or changed is found. mp3 frames and Matroska
elements (webm) are walked from header to header, and what is lost or cut is found. LAME's and FFmpeg's mp3 carry a CRC
over all frames as well; in other mp3, and in webm, changed bits inside a frame stay unseen.
"""

from __future__ import annotations

import struct
import zlib
from functools import cache
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FIRST, _LAST = 2, 4  # flags of an Ogg page
_CAPTURE = b"OggS"
_BITRATES = {  # kbit/s by (MPEG-1 or not, layer); index 0 is free format, 15 is forbidden
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")  # what may follow the last mp3 frame
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675  # Matroska (RFC 9559) elements that are entered; the others are skipped
_MATROSKA = frozenset({
    0x1A45DFA3, _SEGMENT, _CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770,
    0x1941A469, 0xEC, 0xBF, 0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0xAF, 0x5854,
})  # fmt: skip
_MAX_DROPPED = 3 * 1152  # samples of delay or padding that an encoder adds at most
_MAX_PADDING = 65_536  # zero bytes that may stand before or behind an mp3's frames


def ogg_damage(file: BinaryIO, size: int) -> str | None:
    """Walk the pages of an Ogg file; return what is wrong, None if nothing."""
    numbers: dict[int, int] = {}  # of the last page, by stream
    open_streams: set[int] = set()
    at = 0
    while at < size:
        page = _ogg_page(file, at)
        if page is None:
            if numbers and not open_streams and not _holds_page(file, at):
                return None  # a tag behind the end
            return f"damaged or truncated at byte {at} of {size}: no whole Ogg page there"
        flags, serial, number = page[5], int.from_bytes(page[14:18], "little"), int.from_bytes(page[18:22], "little")
        if _ogg_crc(page) != int.from_bytes(page[22:26], "little"):
            return f"damaged: the checksum of the Ogg page at byte {at} is wrong"
        if flags & _FIRST:
            if numbers and not open_streams:
                return "several recordings chained in one Ogg file, of which decoders read the first; split it"
            open_streams.add(serial)
        elif number != numbers.get(serial, -2) + 1:
            return f"damaged: Ogg pages are missing before byte {at}"
        numbers[serial] = number
        if flags & _LAST:
            open_streams.discard(serial)
        at += len(page)
    if open_streams:
        return "truncated: no Ogg page is marked as the last; if you want what is left: ffmpeg -i IN -c copy OUT.ogg"
    return None


def _ogg_page(file: BinaryIO, at: int) -> bytes | None:
    file.seek(at)
    head = file.read(27)
    if len(head) < 27 or head[:4] != _CAPTURE:
        return None
    lengths = file.read(head[26])
    body = file.read(sum(lengths))
    return head + lengths + body if len(lengths) == head[26] and len(body) == sum(lengths) else None


def _holds_page(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    return _CAPTURE in file.read()


def _ogg_crc(page: bytes) -> int:
    """CRC-32 with polynomial 0x04c11db7, most significant bit first, from 0.

    zlib has the mirrored one, from 0xffffffff: mirror each byte before it and the sum after it.
    """
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def matroska_damage(file: BinaryIO, size: int) -> str | None:
    """Walk the elements of a Matroska or webm file; return what is wrong, None if nothing."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(12)
        name, name_bytes = _ebml_number(head, keep_marker=True)
        count, count_bytes = _ebml_number(head[name_bytes:], keep_marker=False)
        unknown = count == (1 << 7 * count_bytes) - 1  # a stream, written without knowing its end
        if name not in _MATROSKA or count_bytes == 0 or (unknown and name not in (_SEGMENT, _CLUSTER)):
            return f"damaged or truncated at byte {at} of {size}: no Matroska element there"
        at += name_bytes + count_bytes
        if not unknown and at + count > size:
            return f"truncated: a Matroska element ends at byte {at + count}, the file at {size}"
        at += 0 if name in (_SEGMENT, _CLUSTER) else count
    return None


def _ebml_number(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    """Return a number of variable length and its bytes; 0 bytes where there is none (RFC 8794 section 4)."""
    count = 9 - data[0].bit_length() if data else 9
    if count > min(8, len(data)):
        return 0, 0
    number = int.from_bytes(data[:count], "big")
    return (number if keep_marker else number & ((1 << 7 * count) - 1)), count


class _Mpeg(NamedTuple):
    """A frame's length, and what all frames of a file share: MPEG version and layer, rate, mono or not."""

    frame_bytes: int
    kind: tuple[int, int, bool]
    samples: int


def _mpeg_header(head: bytes) -> _Mpeg | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate_index = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate_index == 3:
        return None
    rate = (44_100, 48_000, 32_000)[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    bits = _BITRATES[version == 3, layer][bitrate] * 1000
    padding = head[2] >> 1 & 1
    kind = (head[1] & 0x1E, rate, head[3] >> 6 == 3)
    if layer == 1:
        return _Mpeg((12 * bits // rate + padding) * 4, kind, 384)
    samples = 576 if layer == 3 and version != 3 else 1152
    return _Mpeg(samples // 8 * bits // rate + padding, kind, samples)


def is_mp3(file: BinaryIO, start: int) -> bool:
    """Tell whether an MPEG audio frame begins behind ID3v2 tags, which end at byte `start`, and padding."""
    return _first_frame(file, start)[1] is not None


def mp3_promised_sec(file: BinaryIO, start: int) -> float | None:
    """Return the seconds of audio that a Xing, Info or LAME header promises; None without one."""
    first, frame = _first_frame(file, start)
    info = frame and _read_info(file, first, frame.frame_bytes)
    if not frame or not info or not info.frames:
        return None
    dropped = int.from_bytes(info.tag[21:24], "big") if info.tag else 0  # 12 bits in front, 12 behind
    return (info.frames * frame.samples - sum(divmod(dropped, 4096))) / frame.kind[1]


def _first_frame(file: BinaryIO, start: int) -> tuple[int, _Mpeg | None]:
    file.seek(start)
    padded = file.read(_MAX_PADDING)
    first = len(padded) - len(padded.lstrip(b"\0"))
    return start + first, _mpeg_header(padded[first : first + 4])


def mp3_damage(file: BinaryIO, start: int, size: int) -> str | None:
    """Walk the frames of an MPEG audio file; return what is wrong, None if nothing.

    Args:
        start: byte behind ID3v2 tags.
        size: bytes of the file.
    """
    first = at = _first_frame(file, start)[0]
    kind, count, second = None, 0, None
    while at < size:
        file.seek(at)
        frame = _mpeg_header(file.read(4))
        if frame is None or frame.kind != (kind or frame.kind):
            if not kind or not _is_tail(file, at):
                return f"damaged at byte {at} of {size}: no mp3 frame there, or one of another kind"
            break
        if at + frame.frame_bytes > size:
            return f"truncated: the last mp3 frame has {size - at} of {frame.frame_bytes} bytes"
        kind, count, at = frame.kind, count + 1, at + frame.frame_bytes
        second = at if count == 1 else second
    return None if second is None else _info_damage(file, first, second, at, count)


def _is_tail(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    rest = file.read(_MAX_PADDING + 1)
    behind = rest.lstrip(b"\0")
    return behind.startswith(_TAGS) or (not behind and len(rest) <= _MAX_PADDING)


class _Info(NamedTuple):
    """A first frame without sound: the frames that it promises (0 if none), LAME's tag, all bytes up to its end."""

    frames: int
    tag: bytes
    head: bytes


def _read_info(file: BinaryIO, at: int, frame_bytes: int) -> _Info | None:
    file.seek(at)
    frame = file.read(frame_bytes)
    at = max(frame.find(b"Xing", 0, 64), frame.find(b"Info", 0, 64))
    if at < 0 or len(frame) < at + 12:
        return None
    flags = frame[at + 7]
    frames = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0
    end = at + 44 + 4 * bool(flags & 1) + 4 * bool(flags & 2) + 100 * bool(flags & 4) + 4 * bool(flags & 8)
    tag = frame[end - 36 : end] if len(frame) >= end else b""
    return _Info(frames, tag if tag[:4] in (b"LAME", b"Lavf", b"Lavc") else b"", frame[:end])


def _info_damage(file: BinaryIO, first: int, second: int, end: int, count: int) -> str | None:
    """Check the counts and the CRC of a header in the first frame."""
    info = _read_info(file, first, second - first)
    if info is None:
        return None
    if info.frames and count - 1 < info.frames:
        return f"truncated: the header promises {info.frames} mp3 frames, {count - 1} are there"
    if info.frames and count - 1 > info.frames + 1:  # some encoders count the header's own frame
        return f"the header promises {info.frames} mp3 frames, {count - 1} are there: files were joined"
    file.seek(second)
    return _lame_damage(info, file.read(end - second)) if info.tag else None


def _lame_damage(info: _Info, frames: bytes) -> str | None:
    """Check a LAME tag against the frames behind it; FFmpeg writes the tag's own CRC in another way."""
    frames_crc, tag_crc = struct.unpack(">HH", info.tag[32:])
    dropped = divmod(int.from_bytes(info.tag[21:24], "big"), 4096)
    if max(dropped) > _MAX_DROPPED or (info.tag[:4] == b"LAME" and _crc16(info.head[:-2]) != tag_crc):
        return "damaged: the checksum of its LAME header is wrong"
    if frames_crc and _crc16(frames) != frames_crc:
        return "damaged: the checksum over the mp3 frames is wrong"
    return None


@cache
def _crc16_step(doublings: int) -> NDArray[np.uint16]:
    """What 2**doublings words of zeros make of every state of the CRC-16 (polynomial 0x8005, mirrored)."""
    if doublings:
        half = _crc16_step(doublings - 1)
        return half[half]
    table = np.arange(65_536, dtype=np.uint16)
    for _ in range(16):
        table = (table >> 1) ^ np.where(table & 1, np.uint16(0xA001), np.uint16(0))
    return table


def _crc16(data: bytes) -> int:
    """CRC-16 from 0, in log2(len) array operations.

    The CRC is linear: neighbouring words a, b fold into T(a) ^ b with T the step over one word; then neighbours of
    those fold with the step over two words, and so on. Zeros in front change nothing.
    """
    words = np.frombuffer(bytes(len(data) % 2) + data, dtype="<u2")
    for doublings in range(len(words).bit_length()):
        if len(words) == 1:
            break
        if len(words) % 2:
            words = np.concatenate((np.zeros(1, dtype=words.dtype), words))
        words = _crc16_step(doublings)[words[0::2]] ^ words[1::2]
    return int(_crc16_step(0)[words[0]]) if len(words) else 0
