"""Hundreds of odd and damaged files: none crashes, most of the damaged are refused by name with a reason."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from src.data.audio import SAMPLE_RATE, SILENCE_PEAK, decode
from src.utils.errors import AudioError
from tests.data.recordings import TONE_HZ, encoded, muxed, peak_hz, tone

SEED = 20261124
DAMAGED_PER_BASE = 14
SECONDS = 0.6
MIN_REFUSED = 315  # of 504 in training; 327 with FFmpeg 8 and libsndfile 1.2.2: the others are inaudible or plain PCM

WAV_SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
SOUNDFILE_BASES = (
    [("wav", "WAV", subtype, 16_000, 1) for subtype in WAV_SUBTYPES]
    + [("wav", "WAVEX", "PCM_16", 48_000, channels) for channels in (3, 6, 8)]
    + [("wav", "WAV", "PCM_16", rate, 2) for rate in (4_000, 8_000, 11_025, 22_050, 44_100, 96_000)]
    + [("flac", "FLAC", sub, rate, n) for sub, rate, n in (
        ("PCM_S8", 16_000, 1), ("PCM_16", 16_000, 1), ("PCM_16", 11_025, 2), ("PCM_24", 96_000, 2), ("PCM_16", 8_000, 8)
    )]
    + [("ogg", "OGG", "VORBIS", rate, n) for rate, n in ((8_000, 1), (16_000, 1), (44_100, 2), (48_000, 6))]
    + [("opus", "OGG", "OPUS", rate, n) for rate, n in ((8_000, 1), (16_000, 1), (48_000, 2), (48_000, 6))]
    + [("mp3", "MP3", None, rate, n) for rate, n in ((8_000, 1), (16_000, 1), (22_050, 2), (44_100, 1), (48_000, 2))]
)  # fmt: skip
AV_BASES = [("m4a", "ipod", "aac", 44_100), ("m4a", "mp4", "aac", 16_000), ("webm", "webm", "libopus", 48_000)]


def bases() -> dict[str, tuple[str, bytes]]:
    """Return kind and content of each undamaged file, by a name for people."""
    made = {
        f"{form}-{subtype}-{rate}-{channels}": (kind, encoded(tone(rate, SECONDS, channels), rate, form, subtype))
        for kind, form, subtype, rate, channels in SOUNDFILE_BASES
    }
    return made | {f"{form}-{rate}": (kind, muxed(form, codec, rate, SECONDS)) for kind, form, codec, rate in AV_BASES}


def flip(content: bytes, rng: random.Random, first: int, last: int, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[rng.randrange(first, min(last, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "one header bit": lambda content, rng: flip(content, rng, 0, 64, 1),
    "header bits": lambda content, rng: flip(content, rng, 0, 200, 8),
    "one body bit": lambda content, rng: flip(content, rng, 64, len(content), 1),
    "body bits": lambda content, rng: flip(content, rng, 64, len(content), 100),
    "cut": lambda content, rng: content[: rng.randrange(1, len(content))],
    "cut at its end": lambda content, rng: content[: -rng.randrange(1, 200)],
    "bytes lost": lambda content, rng: content[: (at := rng.randrange(64, len(content)))] + content[at + 37 :],
    "zeros": lambda content, rng: content[: (at := rng.randrange(64, len(content)))] + bytes(99) + content[at + 99 :],
}


def cases() -> Iterator[tuple[str, bytes, str, str]]:
    """Yield a file's name, its content, its base, and the damage, which is "" where there is none."""
    rng = random.Random(SEED)
    undamaged = bases()
    suffixes = sorted({kind for kind, _ in undamaged.values()})
    for base, (kind, content) in undamaged.items():
        yield f"{base} as it is.{kind}", content, base, ""
        yield f"{base} misnamed.{rng.choice(['txt', 'raw', *suffixes])}", content, base, ""
        for number in range(DAMAGED_PER_BASE):
            damage = rng.choice(sorted(DAMAGES))
            suffix = rng.choice(suffixes) if number % 4 == 0 else kind
            yield f"{base} {damage} {number}.{suffix}", DAMAGES[damage](content, rng), base, damage


def decode_or_reason(path: Path, *, strict: bool = True) -> np.ndarray | None:
    """Return the samples, or None where the file was refused as it should be; anything else that is raised escapes."""
    try:
        samples = decode(path, strict=strict).samples
    except AudioError as err:
        assert path.name in str(err)
        assert len(str(err)) > len(str(path)) + 10
        return None
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() >= SILENCE_PEAK
    return samples


def test_every_file_is_decoded_or_refused_by_name_and_most_of_the_damaged_are_refused(tmp_path: Path) -> None:
    whole: dict[str, np.ndarray] = {}
    refused = 0
    for name, content, base, damage in cases():
        path = tmp_path / name
        path.write_bytes(content)
        samples, played = decode_or_reason(path), decode_or_reason(path, strict=False)
        path.unlink()
        assert samples is None or played is not None  # what training takes, transcription takes as well
        if damage:
            refused += samples is None
            # each frame of FLAC has a checksum
            assert samples is None or not base.startswith("FLAC") or np.array_equal(samples, whole[base]), name
            continue
        assert samples is not None, name
        assert peak_hz(samples) == pytest.approx(TONE_HZ, abs=3), name
        assert len(samples) / SAMPLE_RATE == pytest.approx(SECONDS, abs=0.15), name  # AAC: whole frames
        whole[base] = samples
    assert refused >= MIN_REFUSED


def patched_wav(at: int, layout: str, value: int) -> bytes:
    content = bytearray(encoded(tone(16_000, SECONDS), 16_000, "WAV"))
    struct.pack_into(layout, content, at, value)
    return bytes(content)


def wav_with(value: float, subtype: str) -> bytes:
    samples = tone(16_000, SECONDS, 2).astype(np.float64)
    samples[5_000, 1] = value
    return encoded(samples, 16_000, "WAV", subtype)


NO_RECORDINGS = {
    "empty": b"",
    "one byte": b"R",
    "wav magic": b"RIFF",
    "ogg magic": b"OggS" + bytes(40),
    "flac magic": b"fLaC" + bytes(60),
    "mp3 tag alone": b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10),
    "mp3 header alone": b"\xff\xfb\x90\x00",
    "ones": b"\xff" * 5_000,
    "zeros": bytes(50_000),
    "noise": random.Random(SEED).randbytes(50_000),
    "a letter": b"A letter, not a recording.\n" * 99,
    "playlist of local files": b"#EXTM3U\n#EXTINF:1\n/etc/hostname\n",
    "list of local files": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "rate 0": patched_wav(24, "<I", 0),
    "rate 1": patched_wav(24, "<I", 1),
    "rate 4 GHz": patched_wav(24, "<I", 0xFFFFFFFF),
    "no channels": patched_wav(22, "<H", 0),
    "1000 channels": patched_wav(22, "<H", 1000),
    "0 bits": patched_wav(34, "<H", 0),
    "another rate": patched_wav(24, "<I", 8_000),
    "silence": encoded(np.zeros((16_000, 1)), 16_000, "WAV"),
    "size of samples too big": patched_wav(40, "<I", 1 << 30),
    **{f"{value} as {sub}": wav_with(value, sub) for value in (np.nan, -np.inf, 1e30) for sub in ("FLOAT", "DOUBLE")},
    **{f"{count} samples of {kind}": encoded(tone(16_000)[:count], 16_000, kind)
       for count in (0, 1, 2, 1_000) for kind in ("WAV", "FLAC", "OGG", "MP3")},
}  # fmt: skip


@pytest.mark.parametrize("content", NO_RECORDINGS.values(), ids=NO_RECORDINGS)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.wav"
    path.write_bytes(content)
    assert decode_or_reason(path) is None


def test_three_hours_cost_nothing_where_30_s_are_allowed(tmp_path: Path) -> None:
    frames = 3 * 3600 * 96_000
    header = struct.pack("<HHIIHH", 1, 8, 96_000, 96_000 * 16, 16, 16)
    long_size = struct.pack("<QQQI", frames * 16 + 80, frames * 16, frames, 0)
    with (tmp_path / "long.wav").open("wb") as file:  # RF64: more than 4 GB; the disk holds none of the samples
        file.write(b"RF64\xff\xff\xff\xffWAVEds64\x1c\0\0\0" + long_size + b"fmt \x10\0\0\0" + header)
        file.write(b"data\xff\xff\xff\xff")
        file.truncate(file.tell() + frames * 16)
    with pytest.raises(AudioError, match=r"long\.wav: .* 30 s .*10800\.0 s"):
        decode(tmp_path / "long.wav", max_sec=30)
