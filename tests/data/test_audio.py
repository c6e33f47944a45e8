from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from src.data import audio as audio_module
from src.data.audio import SAMPLE_RATE, decode, load_audio, read_encoded, to_mono_16k
from src.data.sources.catalog import SAMPLE_CLIP
from src.utils.errors import AudioError


def tone(rate: int, seconds: float = 1.0, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    return np.repeat(wave[:, None], channels, axis=1)


def peak_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(np.argmax(spectrum) * SAMPLE_RATE / len(audio))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channel_count_keeps_pitch_and_length(tmp_path: Path, rate: int, channels: int) -> None:
    path = tmp_path / "tone.wav"
    sf.write(path, tone(rate, channels=channels), rate)
    audio = load_audio(path)
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert len(audio) == pytest.approx(SAMPLE_RATE, abs=2)
    assert peak_hz(audio) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_U8"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("mp3", None)],
)
def test_soundfile_formats_are_decoded(tmp_path: Path, suffix: str, subtype: str | None) -> None:
    path = tmp_path / f"tone.{suffix}"
    sf.write(path, tone(16_000), 16_000, subtype=subtype)
    assert peak_hz(load_audio(path)) == pytest.approx(440, abs=3)


def test_opus_is_decoded(sample: list) -> None:
    audio = load_audio(sample[0].audio)
    assert len(audio) / SAMPLE_RATE == pytest.approx(3.735, abs=0.05)


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"), [("m4a", "aac", 44_100), ("mp4", "aac", 48_000), ("webm", "libopus", 48_000)]
)
def test_containers_that_need_pyav_are_decoded(tmp_path: Path, suffix: str, codec: str, rate: int) -> None:
    path = tmp_path / f"tone.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        samples = np.ascontiguousarray(tone(rate, channels=2).T)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    audio = load_audio(path)
    assert len(audio) / SAMPLE_RATE == pytest.approx(1.0, abs=0.1)
    assert peak_hz(audio) == pytest.approx(440, abs=4)


def test_bytes_and_path_give_the_same() -> None:
    assert np.array_equal(load_audio(SAMPLE_CLIP), load_audio(SAMPLE_CLIP.read_bytes()))


def _wav(samples: np.ndarray, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, 16_000, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is not audio, it is a letter to the editor\n" * 50, "not a recording"),
        (_wav(np.zeros((16_000, 1))), "silent"),
        (_wav(np.full((16_000, 1), np.nan, dtype=np.float32)), "NaN"),
        (_wav(tone(16_000, seconds=0.01)), "0.010 s"),
        (_wav(np.zeros((0, 1))), "0 samples"),
        (_wav(tone(16_000), "PCM_16")[:16_000], "truncated"),
    ],
    ids=["empty", "text", "silent", "nan", "short", "no samples", "truncated"],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad clip.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=reason) as caught:
        load_audio(path)
    assert "bad clip.wav" in str(caught.value)


def test_absent_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no such file"):
        load_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio(tmp_path)


def test_truncated_flac_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    path.write_bytes(SAMPLE_CLIP.read_bytes()[:400_000])
    with pytest.raises(AudioError, match=r"cut\.flac"):
        load_audio(path)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


class Cell:
    """Encoded audio that is read when asked, as a cell of a Parquet file."""

    def read(self) -> bytes:
        return SAMPLE_CLIP.read_bytes()


def test_anything_that_reads_bytes_is_a_source() -> None:
    assert np.array_equal(load_audio(Cell()), load_audio(SAMPLE_CLIP))
    assert np.array_equal(load_audio(str(SAMPLE_CLIP)), load_audio(SAMPLE_CLIP))
    assert read_encoded(Cell()) == read_encoded(SAMPLE_CLIP) == SAMPLE_CLIP.read_bytes()


def test_native_rate_and_channels_are_told() -> None:
    native = decode(encoded(tone(44_100, channels=2), 44_100, "FLAC"))
    assert (native.sample_rate, native.channels, len(native.samples)) == (44_100, 2, SAMPLE_RATE)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_blocks_give_what_one_go_gives(monkeypatch: pytest.MonkeyPatch, kind: str, rate: int) -> None:
    speech = np.stack([load_audio(SAMPLE_CLIP)[: 4 * rate]] * 2, axis=1)
    content = encoded(speech, rate, kind)
    whole = load_audio(content)
    monkeypatch.setattr(audio_module, "BLOCK_VALUES", 20_000)
    in_blocks = load_audio(content)
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


def test_longer_than_allowed_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    sf.write(path, tone(8_000, seconds=31), 8_000)
    with pytest.raises(
        AudioError, match=r"long\.flac: longer than 30 s \(the header says 31\.0 s\); cut it at a pause"
    ):
        decode(path, max_sec=30)
    assert len(load_audio(path, max_sec=31)) == 31 * SAMPLE_RATE


def without_info_frame(content: bytes) -> bytes:
    """Cut off the first frame of an mp3, which says how many there are."""
    first = content.index(content[:2], 4)
    return content[first:]


def test_longer_than_allowed_is_refused_while_decoding_where_the_header_is_silent() -> None:
    content = without_info_frame(encoded(tone(16_000, seconds=31), 16_000, "MP3"))
    with pytest.raises(AudioError, match=r"long\.mp3: longer than 30 s; cut it at a pause"):
        decode(content, name="long.mp3", max_sec=30)


def test_mp3_of_variable_rate_without_a_length_is_decoded_whole() -> None:
    speech = load_audio(SAMPLE_CLIP)
    audio = load_audio(without_info_frame(encoded(speech, SAMPLE_RATE, "MP3")))
    assert 0 <= len(audio) - len(speech) < 0.2 * SAMPLE_RATE  # the encoder's delay and padding


def test_bare_aac_is_decoded() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(16_000).T), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert peak_hz(load_audio(buffer.getvalue())) == pytest.approx(440, abs=3)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "CAF", "NIST", "WAV", "FLAC", "OGG", "MP3"])
def test_a_cut_file_of_any_container_is_refused(kind: str) -> None:
    content = encoded(tone(16_000), 16_000, kind)
    assert peak_hz(load_audio(content)) == pytest.approx(440, abs=3)
    for kept in (0.5, 0.9, 0.99):
        with pytest.raises(AudioError, match="clip: "):
            load_audio(content[: int(kept * len(content))], name="clip")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_page_that_is_missing_or_changed_is_refused(subtype: str) -> None:
    rng = np.random.default_rng(0)
    content = encoded(rng.normal(0, 0.1, (16_000 * 4, 1)), 16_000, "OGG", subtype)
    pages = [content.index(b"OggS", at) for at in range(len(content)) if content.startswith(b"OggS", at)]
    assert len(pages) >= 5
    with pytest.raises(AudioError, match="Ogg pages are missing"):
        load_audio(content[: pages[3]] + content[pages[4] :])
    changed = bytearray(content)
    changed[pages[3] + 200] ^= 1
    with pytest.raises(AudioError, match="checksum of the Ogg page"):
        load_audio(bytes(changed))
    with pytest.raises(AudioError, match="no Ogg page is marked as the last"):
        load_audio(content[: pages[-1]])
    with pytest.raises(AudioError, match="several recordings chained"):
        load_audio(content + content)


def test_a_tag_behind_the_sound_is_no_damage() -> None:
    tag = b"TAG" + bytes(125)
    for kind in ("MP3", "OGG", "FLAC"):
        assert peak_hz(load_audio(encoded(tone(16_000), 16_000, kind) + tag)) == pytest.approx(440, abs=3)
    id3 = b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)
    for kind in ("MP3", "FLAC"):
        assert peak_hz(load_audio(id3 + encoded(tone(16_000), 16_000, kind))) == pytest.approx(440, abs=3)


def test_a_flac_whose_rate_was_changed_is_refused() -> None:
    content = bytearray(encoded(tone(16_000), 16_000, "FLAC"))
    content[18:21] = (22_050 << 4).to_bytes(3, "big")  # STREAMINFO; its low bits hold mono and the depth's first bit
    with pytest.raises(AudioError, match="the header says 22050 Hz, the first frame 16000 Hz"):
        load_audio(bytes(content))


def test_a_wav_whose_header_contradicts_itself_is_refused() -> None:
    content = bytearray(encoded(tone(16_000), 16_000, "WAV"))
    content[24:28] = (8_000).to_bytes(4, "little")
    with pytest.raises(AudioError, match="the header contradicts itself: 8000 Hz"):
        load_audio(bytes(content))


def test_wav_with_other_chunks_and_a_silent_length_is_decoded() -> None:
    content = encoded(tone(16_000), 16_000, "WAV")
    odd_chunk = b"note\x03\0\0\0abc\0"
    assert len(load_audio(content[:36] + odd_chunk + content[36:])) == SAMPLE_RATE
    assert len(load_audio(content + odd_chunk)) == SAMPLE_RATE
    assert len(load_audio(content[:40] + b"\xff\xff\xff\xff" + content[44:])) == SAMPLE_RATE  # ffmpeg to a pipe


def test_integers_stored_as_floats_are_refused() -> None:
    with pytest.raises(AudioError, match=r"floats belong in \[-1, 1\]"):
        to_mono_16k(tone(16_000) * 32_768, 16_000)


def test_an_extension_is_not_believed(tmp_path: Path) -> None:
    for name in ("speech.raw", "speech.mp3", "speech"):
        (tmp_path / name).write_bytes(encoded(tone(16_000), 16_000, "FLAC"))
        assert len(load_audio(tmp_path / name)) == SAMPLE_RATE


def test_silence_may_be_allowed_for_transcription() -> None:
    assert not to_mono_16k(np.zeros(16_000, dtype=np.float32), 16_000, allow_silence=True).any()
