"""Decoding of any container and rate, refusal of what is damaged, and the cache of decoded recordings."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

from src.data import audio as audio_module
from src.data.audio import SAMPLE_RATE, AudioCache, decode, load_audio, stream_audio, to_mono_16k
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import AudioTrack
from src.utils.errors import AudioError, WhisperASRError
from tests.data.recordings import encoded, muxed, peak_hz, tone, two_tracks
from tests.utils.full_disk import fill_disk

HALF_STEP = 0.5 / 32_768


# What is decoded


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 6])
def test_any_rate_and_channel_count_keeps_pitch_and_length(rate: int, channels: int) -> None:
    native = decode(encoded(tone(rate, channels=channels), rate, "WAV"))
    assert (native.sample_rate, native.channels) == (rate, channels)
    assert (native.samples.dtype, native.samples.ndim) == (np.float32, 1)
    assert len(native.samples) == pytest.approx(SAMPLE_RATE, abs=2)
    assert peak_hz(native.samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("FLAC", "PCM_16"),
     ("FLAC", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("NIST", "PCM_16")],
)  # fmt: skip
def test_lossless_files_give_the_samples_of_soundfile(kind: str, subtype: str, channels: int) -> None:
    content = encoded(tone(16_000, channels=channels), 16_000, kind, subtype)
    expected = sf.read(io.BytesIO(content), dtype="float32", always_2d=True)[0].mean(axis=1)
    assert np.array_equal(load_audio(content), expected)


@pytest.mark.parametrize(
    ("kind", "codec", "rate"),
    [("OGG", "VORBIS", 0), ("OGG", "OPUS", 0), ("MP3", None, 0), ("WAV", "IMA_ADPCM", 0), ("WAV", "ULAW", 0),
     ("ipod", "aac", 44_100), ("adts", "aac", 16_000), ("webm", "libopus", 48_000), ("wav", "libmp3lame", 16_000)],
)  # fmt: skip
def test_lossy_files_keep_pitch_and_length(kind: str, codec: str, rate: int) -> None:
    audio = load_audio(muxed(kind, codec, rate) if rate else encoded(tone(16_000), 16_000, kind, codec))
    assert len(audio) / SAMPLE_RATE == pytest.approx(1.0, abs=0.1)
    assert peak_hz(audio) == pytest.approx(440, abs=4)


@pytest.mark.parametrize(
    ("kind", "codec", "rate", "picture_sec"),
    [("matroska", "libopus", 48_000, 0.0), ("webm", "libopus", 48_000, 0.0), ("matroska", "aac", 16_000, 3.0),
     ("mp4", "aac", 16_000, 3.0), ("matroska", "aac", 44_100, 9.0), ("mpegts", "aac", 16_000, 3.0),
     ("mov", "aac", 48_000, 3.0)],
)  # fmt: skip
def test_sound_that_begins_late_is_whole_and_after_its_picture_follows_silence(
    kind: str, codec: str, rate: int, picture_sec: float
) -> None:
    audio = load_audio(muxed(kind, codec, rate, begin_sec=2.0, picture_sec=picture_sec))
    silence_sec = 2 if picture_sec else 0
    assert len(audio) / SAMPLE_RATE == pytest.approx(silence_sec + 1.0, abs=0.1)
    assert not audio[: round(0.95 * silence_sec * SAMPLE_RATE)].any()
    assert peak_hz(audio[silence_sec * SAMPLE_RATE :]) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("kind", ["matroska", "mp4"])
def test_the_default_track_is_taken_and_said_and_another_can_be_chosen(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for default in (1, 2):
        content, name = two_tracks(kind, default=default), f"{kind} with default {default}"
        silent = not np.abs(load_audio(content, name=name, allow_silence=True)).max() > 0.1
        assert silent == (default == 1)
        assert f"{name}: track {default} of 2 is taken: 1 eng (aac), 2 deu (aac)" in caplog.text
        assert peak_hz(load_audio(content, track=2)) == pytest.approx(440, abs=4)
        assert peak_hz(np.concatenate(list(stream_audio(AudioTrack(content, 2))))) == pytest.approx(440, abs=4)
    caplog.clear()
    with pytest.raises(AudioError, match=r"no audio track 3; it has 1 eng \(aac\), 2 deu"):
        load_audio(content, track=3)
    with pytest.raises(AudioError, match="no audio track 2; it has 1"):
        load_audio(encoded(tone(16_000), 16_000, "WAV"), track=2)
    assert not caplog.text


def test_the_cache_keeps_tracks_apart(tmp_path: Path) -> None:
    content, cache = two_tracks(level=0.6), AudioCache(tmp_path)
    quiet, loud = (np.abs(cache.load_audio(AudioTrack(content, number))).max() for number in (1, 2))
    again = np.abs(cache.load_audio(AudioTrack(content, 1))).max()
    assert loud > 3 * quiet == 3 * again


def test_path_text_bytes_and_anything_that_reads_bytes_are_sources() -> None:
    expected = load_audio(SAMPLE_CLIP)
    for source in (str(SAMPLE_CLIP), SAMPLE_CLIP.read_bytes(), SimpleNamespace(read=SAMPLE_CLIP.read_bytes)):
        assert np.array_equal(load_audio(source), expected)


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_blocks_give_what_one_go_gives(monkeypatch: pytest.MonkeyPatch, kind: str, rate: int) -> None:
    speech = np.stack([load_audio(SAMPLE_CLIP)[: 4 * rate]] * 2, axis=1)
    content = encoded(speech, rate, kind)
    whole = load_audio(content)
    monkeypatch.setattr(audio_module, "BLOCK_VALUES", 20_000)
    for in_blocks in (load_audio(content), np.concatenate(list(stream_audio(content)))):
        assert abs(len(in_blocks) - len(whole)) <= 1
        shared = min(len(in_blocks), len(whole))
        assert np.abs(in_blocks[:shared] - whole[:shared]).max() < 1e-5


def test_memory_is_bounded_by_the_result(tmp_path: Path) -> None:
    seconds, rate, channels = 60, 48_000, 8
    sf.write(tmp_path / "long.wav", np.tile(tone(rate, channels=channels), (seconds, 1)), rate, subtype="PCM_16")
    load_audio(tmp_path / "long.wav")  # imports and tables
    tracemalloc.start()
    audio = load_audio(tmp_path / "long.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(audio) == pytest.approx(seconds * SAMPLE_RATE, abs=2)
    assert peak < 2 * audio.nbytes + 4 * 4 * audio_module.BLOCK_VALUES  # all at once would be 92 MB


def without_info_frame(content: bytes) -> bytes:
    """Cut off the first frame of an mp3, which says how many there are."""
    return content[content.index(content[:2], 4) :]


@pytest.mark.parametrize("silent_header", [False, True])
def test_longer_than_allowed_is_refused(silent_header: bool) -> None:
    content = encoded(tone(16_000, seconds=31), 16_000, "MP3")
    assert len(load_audio(content, max_sec=31)) == 31 * SAMPLE_RATE
    assert 0 <= len(load_audio(without_info_frame(content))) - 31 * SAMPLE_RATE < 0.2 * SAMPLE_RATE  # and its padding
    with pytest.raises(AudioError, match=r"long\.mp3: .*30 s"):
        decode(without_info_frame(content) if silent_header else content, name="long.mp3", max_sec=30)


def test_tags_around_the_sound_are_no_damage() -> None:
    id3 = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
    for kind, before in (("MP3", id3), ("FLAC", id3), ("OGG", b"")):
        content = encoded(tone(16_000), 16_000, kind)
        for tagged in (before + content, content + b"TAG" + bytes(125)):
            assert peak_hz(load_audio(tagged)) == pytest.approx(440, abs=3)


def test_wav_with_other_chunks_or_without_a_true_length_is_decoded() -> None:
    content = encoded(tone(16_000), 16_000, "WAV")
    odd_chunk = b"note\x03\0\0\0abc\0"
    whole = load_audio(content)
    for variant in (
        content[:36] + odd_chunk + content[36:],
        content + odd_chunk,
        content[:40] + b"\xff\xff\xff\xff" + content[44:],  # ffmpeg to a pipe
        content[:40] + bytes(4) + content[44:],  # a recorder that crashed
        content[:40] + (32_022).to_bytes(4, "little") + content[44:],  # a phone's recorder
    ):
        assert np.array_equal(load_audio(variant), whole)


# What a player plays, with a warning


def wav(data: bytes, stated: int, *, riff: int | None = None, magic: bytes = b"RIFF", chunks: bytes = b"") -> bytes:
    """Return a 16-bit WAV file at 16 kHz with samples of any stated size."""
    head = b"WAVE" + chunks + b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    body = head + b"data" + struct.pack("<I", stated) + data
    return magic + struct.pack("<I", len(body) if riff is None else riff) + body


def ds64(*sizes: int) -> bytes:
    return b"ds64" + struct.pack("<IQQQI", 28, *sizes, 0)


PCM = encoded(tone(16_000, 2), 16_000, "RAW", "PCM_16")  # 2 s
UNKNOWN = 0xFFFFFFFF
UNFINISHED = {
    "size 0": wav(PCM, 0, riff=0),
    "size of an empty file": wav(PCM, 0, riff=36),
    "no size": wav(PCM, UNKNOWN, riff=UNKNOWN),
    "2 GB": wav(PCM, 0x7FFFFFFF, riff=0x7FFFFFFF),
    "1 kB too large": wav(PCM, len(PCM) + 1000),
    "an hour": wav(PCM, 3600 * 32_000),
    "size at the last pause": wav(PCM, 32_000, riff=32_036),
    "size of the first block": wav(PCM, 4096),
    "RF64, sizes 0": wav(PCM, UNKNOWN, riff=UNKNOWN, magic=b"RF64", chunks=ds64(0, 0, 0)),
    "BW64, sizes 0": wav(PCM, UNKNOWN, riff=UNKNOWN, magic=b"BW64", chunks=ds64(0, 0, 0)),
    "RF64, both sizes 0": wav(PCM, 0, riff=0, magic=b"RF64", chunks=ds64(0, 0, 0)),
    "RF64, a terabyte": wav(PCM, UNKNOWN, riff=UNKNOWN, magic=b"RF64", chunks=ds64(1 << 40, 1 << 40, 1 << 39)),
}


@pytest.mark.parametrize("content", UNFINISHED.values(), ids=UNFINISHED)
def test_wav_of_a_crashed_recorder_is_whole_with_a_warning(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    name = f"crash of {hash(content)}"
    assert np.array_equal(load_audio(content, name=name), load_audio(wav(PCM, len(PCM))))
    assert name in caplog.text
    assert "header" in caplog.text
    assert "remove" not in caplog.text


def test_odd_sizes_and_what_follows_the_samples_change_nothing() -> None:
    whole = load_audio(wav(PCM, len(PCM)))
    for content in (
        wav(PCM + b"x", len(PCM) + 1),
        wav(PCM, len(PCM)) + bytes(50_000),
        wav(PCM, len(PCM)) + b"a text after the end" * 999,
        wav(PCM, len(PCM)) * 2,
    ):
        assert np.array_equal(load_audio(content), whole)
    assert np.array_equal(load_audio(wav(PCM[:-1], len(PCM))), whole[:-1])


def test_a_header_with_two_rates_is_refused_and_other_wrong_fields_are_not() -> None:
    content = wav(PCM, len(PCM))
    for bytes_per_sec in (0, 31_999, 256_000):
        assert len(load_audio(content[:28] + struct.pack("<I", bytes_per_sec) + content[32:])) == 32_000
    with pytest.raises(AudioError, match=r"8000 and 16000"):
        load_audio(content[:24] + struct.pack("<I", 8_000) + content[28:])


@pytest.mark.parametrize("between", [b"", b"ID3\x04\0\0\0\0\x01\0" + bytes(128), b"TAG" + bytes(125)])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (16_000, 2), (24_000, 1)])
def test_spliced_mp3_is_decoded_to_its_end(rate: int, channels: int, between: bytes) -> None:
    first, second = encoded(tone(16_000), 16_000, "MP3"), encoded(tone(rate, 1, channels), rate, "MP3")
    audio = load_audio(first + between + second, strict=True)
    assert len(audio) / SAMPLE_RATE == pytest.approx(2.0, abs=0.2)
    assert peak_hz(audio[-8_000:]) == pytest.approx(440, abs=4)


def test_chained_and_unmarked_ogg_are_decoded_to_their_end(caplog: pytest.LogCaptureFixture) -> None:
    content = encoded(tone(16_000, 2), 16_000, "OGG", "OPUS")
    assert len(load_audio(content * 2, strict=True)) / SAMPLE_RATE == pytest.approx(4.0, abs=0.1)
    assert "several recordings" in caplog.text
    pages = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    assert len(load_audio(content[: pages[-1]], strict=True)) / SAMPLE_RATE == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "CAF", "RF64", "W64", "FLAC", "OGG", "MP3"])
def test_a_truncated_file_is_decoded_as_far_as_it_goes(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    content = encoded(np.random.default_rng(0).normal(0, 0.1, (64_000, 1)), 16_000, kind)
    for cut in (content[: len(content) // 2], content[: len(content) * 9 // 10]):
        audio = load_audio(cut, name=f"{len(cut)} bytes of {kind}")
        assert 0.8 < len(audio) / SAMPLE_RATE < 3.97
        assert f"{len(cut)} bytes of {kind}: " in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_bytes_after_the_end_are_no_damage(strict: bool) -> None:
    for kind, length in (("MP3", 2.0), ("FLAC", 2.0), ("OGG", 2.0), ("CAF", 2.0), ("AIFF", 2.0)):
        for rest in (bytes(100_000), b"no sound " * 500, b"free" + struct.pack(">q", (1 << 63) - (1 << 40))):
            audio = load_audio(encoded(tone(16_000, 2), 16_000, kind) + rest, strict=strict)
            assert len(audio) / SAMPLE_RATE == pytest.approx(length, abs=0.1)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
@pytest.mark.parametrize("factors", [(1, -1), (0.7, -0.5), (-1, 1, 0, 0, 0, 0)])
def test_a_channel_that_cancels_the_others_is_left_out(
    kind: str, factors: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    factors = factors[:2] if kind == "MP3" else factors
    content = encoded(tone(16_000, 2) * np.array(factors, np.float32), 16_000, kind)
    audio = load_audio(content, name=f"{kind} {factors}", strict=True)
    assert np.abs(audio).max() == pytest.approx(0.5 * max(factors), rel=0.05) or max(factors) == 1
    assert np.abs(audio).max() > 0.3
    assert f"{kind} {factors}" in caplog.text
    assert np.abs(to_mono_16k(tone(16_000) * np.array([1, -1], np.float32), 16_000)).max() > 0.4


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
@pytest.mark.parametrize("first", [True, False])
def test_no_stretch_is_lost_where_one_channel_is_inverted_for_a_while(kind: str, first: bool) -> None:
    sound = tone(16_000, 4).repeat(2, axis=1)
    sound[:27_000, int(first)] *= -1
    sound = sound if first else sound[::-1]
    audio = load_audio(encoded(sound, 16_000, kind), name="clip", strict=True)
    loudness = np.abs(audio[:60_000].reshape(-1, 5_000)).max(axis=1)
    assert loudness.min() == pytest.approx(loudness.max(), rel=0.1)


def test_channels_that_do_not_cancel_are_averaged(caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (16_000, 2)).astype(np.float32)
    for channels in (noise, noise * [1, 0], np.repeat(noise[:, :1], 2, axis=1), np.pad(noise[:, :1], ((0, 0), (0, 7)))):
        content = encoded(channels, 16_000, "WAV", "FLOAT")
        assert np.allclose(load_audio(content), channels.mean(axis=1), atol=1e-6)
    assert not caplog.text


# What is refused


def refused(*contents: bytes) -> None:
    for content in contents:
        with pytest.raises(AudioError, match="clip: "):
            load_audio(content, name="clip", strict=True)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "link.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(tmp_path):  # its address has 107 bytes at most
        listening.bind("s.wav")
    odd = [tmp_path / name for name in ("nothing.wav", "pipe.wav", "link.wav", "s.wav", "nu\0l.wav")]
    for path in (*odd, tmp_path):
        with pytest.raises(AudioError, match=path.name.replace("\0", r"\\x00")):
            load_audio(path)


def test_what_is_not_one_recording_is_refused() -> None:
    refused(muxed("matroska", "aac", 16_000, 0.0, picture_sec=1.0))  # a picture alone


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "CAF", "NIST", "WAV", "FLAC", "OGG", "MP3"])
def test_a_cut_file_of_any_container_is_refused(kind: str) -> None:
    content = encoded(tone(16_000), 16_000, kind)
    assert peak_hz(load_audio(content)) == pytest.approx(440, abs=3)
    shares = (0.5, 0.9) if kind == "MP3" else (0.5, 0.9, 0.99)  # the last bytes of an mp3 hold no sound
    refused(*(content[: int(kept * len(content))] for kept in shares))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_page_that_is_missing_or_changed_is_refused(subtype: str) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (16_000 * 4, 1))
    content = encoded(samples, 16_000, "OGG", subtype)
    pages = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    assert len(pages) >= 5
    changed = bytearray(content)
    changed[pages[3] + 200] ^= 1
    refused(content[: pages[3]] + content[pages[4] :], bytes(changed))


def test_endless_headers_and_bombs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (
        b"RIFF\xff\xff\xff\x7fWAVE" + b"junk\0\0\0\0" * 1_000_000,
        b"FORM\x7f\xff\xff\xffAIFF" + b"ANNO\0\0\0\0" * 1_000_000,
        b"caff\0\1\0\0" + (b"free" + bytes(8)) * 1_000_000,
        b"ID3\x04\0\0\0\0\0\0" * 1_000_000,
        (b"OggS\0\2" + bytes(20) + b"\0") * 100_000,
    ):
        refused(content)
    monkeypatch.setattr(audio_module, "FREE_SEC", 0.5)
    monkeypatch.setattr(audio_module, "MIN_BYTES_PER_SEC", 100)
    with pytest.raises(AudioError, match="cannot hold"):  # 55 bytes per second
        load_audio(encoded(np.zeros((16_000 * 90, 1)), 16_000, "FLAC", "PCM_16"), allow_silence=True)
    monkeypatch.undo()
    with (tmp_path / "padded.mp3").open("wb") as file:
        file.write(encoded(tone(16_000), 16_000, "MP3"))
        file.truncate(1 << 29)  # FFmpeg's parser would collect all of it
    assert len(load_audio(tmp_path / "padded.mp3")) / SAMPLE_RATE == pytest.approx(1.0, abs=0.1)


def test_integers_stored_as_floats_are_refused_and_silence_may_be_allowed() -> None:
    with pytest.raises(AudioError, match=r"\[-1, 1\]"):
        to_mono_16k(tone(16_000) * 32_768, 16_000)
    assert not to_mono_16k(np.zeros(16_000, dtype=np.float32), 16_000, allow_silence=True).any()


# The cache


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_second_load_reads_the_file_and_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = AudioCache(tmp_path / "deep" / "audio")
    first = cache.load_audio(SAMPLE_CLIP)
    monkeypatch.setattr(audio_module, "decode", None)
    second = cache.load_audio(SAMPLE_CLIP.read_bytes())
    assert first.dtype == second.dtype == np.float32
    assert np.array_equal(first, second)
    [path] = files(cache.folder)
    info = sf.info(path)  # plays anywhere
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)


@pytest.mark.parametrize("peak", [0.3, 1.0, -1.7, 12.0])
def test_samples_are_kept_to_half_a_step_of_their_scale(tmp_path: Path, peak: float) -> None:
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, SAMPLE_RATE).astype(np.float32) * abs(peak)
    samples[100] = peak
    content, cache = encoded(samples, SAMPLE_RATE, "WAV", "FLOAT"), AudioCache(tmp_path)
    made, read = cache.load_audio(content), cache.load_audio(content)
    assert np.array_equal(made, read)
    assert np.abs(read - samples).max() <= HALF_STEP * max(1.0, abs(peak)) * (1 + 1e-3)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other sound", "other comment"])
def test_damaged_file_is_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    cache = AudioCache(tmp_path)
    expected = cache.load_audio(SAMPLE_CLIP)
    [path] = files(tmp_path)
    content = path.read_bytes()
    if damage.startswith("other"):
        comment = sf.SoundFile(path).comment if damage == "other sound" else "a song"
        with sf.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
            file.comment = comment
            file.write(expected * 0.5)
    else:
        flipped = content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]
        path.write_bytes({"flipped": flipped, "cut": content[:50_000], "empty": b""}[damage])
    assert np.array_equal(cache.load_audio(SAMPLE_CLIP), expected)
    assert path.name in caplog.text
    assert np.array_equal(load_audio(path), expected)


def test_unusable_recording_is_refused_by_name_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "letter.wav").write_text("not audio" * 100)
    cache = AudioCache(tmp_path / "cache")
    for source, name in ((tmp_path / "letter.wav", None), (tmp_path / "nothing.wav", None), (b"not audio", "clip 7")):
        with pytest.raises(AudioError, match=name or str(source)):
            cache.load_audio(source, name=name)
    assert not cache.folder.exists()


def test_full_disk_names_the_folder_and_the_fix_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(WhisperASRError, match=r"data\.cache_decoded") as caught:
        AudioCache(tmp_path).load_audio(SAMPLE_CLIP)
    assert not isinstance(caught.value, AudioError)  # the recording is fine: it may not be skipped for this
    assert str(tmp_path) in str(caught.value)
    assert files(tmp_path) == []


def test_unusable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    for folder in (tmp_path / "taken", tmp_path / ("long" * 100)):
        for use in (AudioCache(folder).load_audio, AudioCache(folder).decode):
            with pytest.raises(WhisperASRError, match=f"{folder}: "):
                use(SAMPLE_CLIP)


def test_no_name_of_a_recording_ends_the_line_of_an_error(tmp_path: Path) -> None:
    for source in (tmp_path / "a\nERROR \x1b.wav", str(tmp_path / "caf\udce9.wav")):
        with pytest.raises(AudioError) as caught:
            load_audio(source)
        assert str(caught.value).isprintable()
