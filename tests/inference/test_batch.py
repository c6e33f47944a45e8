from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from src.data.sources import SAMPLE_CLIP
from src.inference.batch import BatchInference
from src.utils.errors import AudioError, DataError


@pytest.mark.slow
def test_paths_and_arrays_come_back_in_order(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    results = BatchInference(*tiny_en).transcribe_batch([jfk[: 3 * 16_000], SAMPLE_CLIP, str(SAMPLE_CLIP)])
    assert [r.source for r in results] == ["array 0", str(SAMPLE_CLIP), str(SAMPLE_CLIP)]
    assert results[1].text == results[2].text
    assert results[1].text.endswith("do for your country.")
    assert results[0].duration_sec == pytest.approx(3.0)
    assert results.audio_sec == pytest.approx(25.0, abs=0.1)
    assert results.rtf > 0


@pytest.mark.slow
def test_long_recordings_are_cut_at_silences_with_absolute_times(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    pause = np.zeros(8_000, dtype=np.float32)
    long = np.concatenate([jfk, pause, jfk, pause, jfk, pause, jfk])  # 45.5 s
    result = BatchInference(*tiny_en).transcribe_batch([long], word_timestamps=True)[0]
    assert result.text.lower().count("fellow americans") == 4
    assert result.words[-1].end_sec == pytest.approx(45.2, abs=0.6)
    starts = [word.start_sec for word in result.words]
    assert starts == sorted(starts)


@pytest.mark.slow
def test_a_bad_file_is_raised_or_reported_by_name(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    bad = tmp_path / "broken.wav"
    bad.write_bytes(b"RIFF")
    inference = BatchInference(*tiny_en)
    with pytest.raises(AudioError, match=r"broken\.wav"):
        inference.transcribe_batch([SAMPLE_CLIP, bad])
    results = inference.transcribe_batch([bad, SAMPLE_CLIP], on_error="skip")
    assert results[0].text is None
    assert "broken.wav" in (results[0].error or "")
    assert results[1].error is None


@pytest.mark.slow
def test_no_file_and_a_bare_path_are_refused(tiny_en: tuple[Any, Any]) -> None:
    inference = BatchInference(*tiny_en)
    with pytest.raises(DataError, match="no recording"):
        inference.transcribe_batch([])
    with pytest.raises(DataError, match="takes a list"):
        inference.transcribe_batch("clip.wav")


@pytest.mark.slow
def test_long_silence_gives_an_empty_text(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    sf.write(path, np.zeros(40 * 16_000), 16_000)
    assert BatchInference(*tiny_en).transcribe_batch([path])[0].text == ""
