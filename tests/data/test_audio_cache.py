from __future__ import annotations

import io
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from src.data import audio_cache
from src.data.audio import SAMPLE_RATE, load_audio
from src.data.audio_cache import AudioCache
from src.data.sources.catalog import SAMPLE_CLIP
from src.utils.errors import AudioError, WhisperASRError
from tests.utils.full_disk import fill_disk

HALF_STEP = 0.5 / 32_768


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_second_load_reads_the_file_and_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = AudioCache(tmp_path / "deep" / "audio")
    first = cache.load_audio(SAMPLE_CLIP)
    monkeypatch.setattr(audio_cache, "load_audio", None)
    second = cache.load_audio(SAMPLE_CLIP.read_bytes())
    assert first.dtype == second.dtype == np.float32
    assert np.array_equal(first, second)
    assert np.abs(first - load_audio(SAMPLE_CLIP)).max() <= HALF_STEP * (1 + 1e-4)
    assert len(files(cache.folder)) == 1


def test_file_plays_anywhere_as_16_bit_mono_flac(tmp_path: Path) -> None:
    cached = AudioCache(tmp_path).load_audio(SAMPLE_CLIP)
    [path] = files(tmp_path)
    info = sf.info(path)
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", SAMPLE_RATE, 1)
    assert np.array_equal(load_audio(path), cached)
    assert path.parent.name == path.name[:2]


def test_16_bit_audio_is_kept_exactly(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).integers(-32_768, 32_768, SAMPLE_RATE)
    steps[:2] = (-32_768, 32_767)
    content = wav(steps / 32_768)
    assert np.array_equal(AudioCache(tmp_path).load_audio(content), load_audio(content))


@pytest.mark.parametrize("peak", [0.3, 1.0, 1.7, 12.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_peaks_above_one_do_not_clip(tmp_path: Path, peak: float, sign: int) -> None:
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, SAMPLE_RATE) * peak
    samples[100] = sign * peak
    cache = AudioCache(tmp_path)
    made, read = cache.load_audio(wav(samples)), cache.load_audio(wav(samples))
    assert np.array_equal(made, read)
    assert np.abs(read - samples.astype(np.float32)).max() <= HALF_STEP * max(1.0, peak) * (1 + 1e-3)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other sound", "other comment"])
def test_damaged_file_is_told_by_name_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = AudioCache(tmp_path)
    expected = cache.load_audio(SAMPLE_CLIP)
    [path] = files(tmp_path)
    content = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:])
    elif damage == "cut":
        path.write_bytes(content[:50_000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        comment = sf.SoundFile(path).comment if damage == "other sound" else "a song"
        with sf.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
            file.comment = comment
            file.write(expected * 0.5)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(cache.load_audio(SAMPLE_CLIP), expected)
    assert path.name in caplog.text
    assert "damaged" in caplog.text
    assert np.array_equal(load_audio(path), expected)


def test_unusable_recording_is_refused_by_name_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "letter.wav").write_text("not audio" * 100)
    cache = AudioCache(tmp_path / "cache")
    with pytest.raises(AudioError, match=r"letter\.wav"):
        cache.load_audio(tmp_path / "letter.wav")
    with pytest.raises(AudioError, match="no such file"):
        cache.load_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match="clip 7: "):
        cache.load_audio(b"not audio", name="clip 7")
    assert not cache.folder.exists()


def test_full_disk_names_the_folder_and_the_fix_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch)
    with pytest.raises(WhisperASRError, match="No space left on device") as caught:
        AudioCache(tmp_path).load_audio(SAMPLE_CLIP)
    assert not isinstance(caught.value, AudioError)  # the recording is fine: it may not be skipped for this
    assert str(tmp_path) in str(caught.value)
    assert "data.cache_decoded: false" in str(caught.value)
    assert files(tmp_path) == []


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(WhisperASRError, match="taken: decoded audio cannot be"):
        AudioCache(tmp_path / "taken").load_audio(SAMPLE_CLIP)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WhisperASRError, match="Permission denied"):
        AudioCache(tmp_path / "cache").load_audio(SAMPLE_CLIP)


def test_size_is_told_and_clearing_leaves_other_files(tmp_path: Path) -> None:
    cache = AudioCache(tmp_path)
    assert cache.size_bytes() == 0
    cache.load_audio(SAMPLE_CLIP)
    [path] = files(tmp_path)
    assert cache.size_bytes() == path.stat().st_size > 0
    (path.parent / f".{path.name}.4194304.ab.partial").write_bytes(b"half")
    (path.parent / "notes.flac").write_bytes(b"mine")
    cache.clear()
    assert [p.name for p in files(tmp_path)] == ["notes.flac"]
    assert cache.size_bytes() == 0


def load_and_clear(folder: Path, paths: list[Path]) -> None:
    cache = AudioCache(folder)
    for _ in range(10):
        for path in paths:
            assert np.array_equal(cache.load_audio(path), cache.load_audio(str(path)))
        cache.clear()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a fresh process imports for seconds")
def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.wav" for i in range(8)]
    rng = np.random.default_rng(0)
    for path in paths:
        path.write_bytes(wav(rng.normal(0, 0.1, 4_000)))
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=load_and_clear, args=(tmp_path / "cache", paths)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert files(tmp_path / "cache") == []
