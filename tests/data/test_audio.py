"""Decoding of any container and rate, refusal of what is damaged, and the cache of decoded recordings."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

from src.data import audio as audio_module
from src.data.audio import SAMPLE_RATE, AudioCache, decode, load_audio, stream_audio, to_mono_16k
from src.data.sources.catalog import SAMPLE_CLIP
from src.utils.errors import AudioError, WhisperASRError
from tests.data.recordings import encoded, muxed, peak_hz, tone
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
     ("mp4", "aac", 16_000, 3.0)],
)  # fmt: skip
def test_sound_that_begins_late_is_whole_and_after_its_picture_follows_silence(
    kind: str, codec: str, rate: int, picture_sec: float
) -> None:
    audio = load_audio(muxed(kind, codec, rate, begin_sec=2.0, picture_sec=picture_sec))
    silence_sec = 2 if picture_sec else 0
    assert len(audio) / SAMPLE_RATE == pytest.approx(silence_sec + 1.0, abs=0.1)
    assert not audio[: round(0.95 * silence_sec * SAMPLE_RATE)].any()
    assert peak_hz(audio[silence_sec * SAMPLE_RATE :]) == pytest.approx(440, abs=4)


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


# What is refused


def refused(*contents: bytes) -> None:
    for content in contents:
        with pytest.raises(AudioError, match="clip: "):
            load_audio(content, name="clip")


def test_absent_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.wav", tmp_path, tmp_path / "nu\0l.wav"):
        with pytest.raises(AudioError, match=path.name):
            load_audio(path)


def test_what_is_not_one_recording_is_refused() -> None:
    refused(
        muxed("matroska", "aac", 16_000, 0.0, picture_sec=1.0),  # a picture alone
        encoded(tone(16_000), 16_000, "MP3") + encoded(tone(24_000), 24_000, "MP3"),
        encoded(tone(16_000), 16_000, "OGG") * 2,
    )


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
    refused(content[: pages[3]] + content[pages[4] :], bytes(changed), content[: pages[-1]])


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
