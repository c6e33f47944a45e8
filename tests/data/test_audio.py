from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from src.data.audio import SAMPLE_RATE, load_audio, to_mono_16k
from src.data.sources import SAMPLE_CLIP
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


def test_silence_may_be_allowed_for_transcription() -> None:
    assert not to_mono_16k(np.zeros(16_000, dtype=np.float32), 16_000, allow_silence=True).any()
