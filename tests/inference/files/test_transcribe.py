from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.engine_base import DecodingResult
from src.inference.files.transcribe import BatchInference
from src.inference.options import DecodingOptions
from src.utils.config import load_config
from src.utils.errors import AudioError, DataError, ModelError, OutOfMemoryError
from tests.inference.files.test_segmentation import LoudDetector

LANGUAGES = {2: "en", 3: "de"}  # of the scripted engine, by the tenths of a clip's peak


class Scripted:
    """Says how long each clip is, in the language that its loudness stands for; keeps the batches it was given."""

    audio_context, workers = "full", 1
    vocabulary = SimpleNamespace(multilingual=True)

    def __init__(self, room: int = 100) -> None:
        self.batches: list[tuple[str | None, list[int]]] = []
        self._room = room

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Sequence[Waveform]:
        if len(audios) > self._room:
            raise RuntimeError("CUDA out of memory")
        return audios

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        self.batches.append((options.language, [len(audio) for audio in audios]))
        return [
            DecodingResult(f"{len(audio) / SAMPLE_RATE:g} s", (1,), -0.1, language=options.language or _spoken(audio))
            for audio in audios
        ]

    def languages(self, encoded: Sequence[Waveform], rows: int, options: DecodingOptions) -> list[str | None]:
        return [_spoken(audio) for audio in encoded]


def _spoken(audio: Waveform) -> str:
    return LANGUAGES[round(10 * float(audio.max()))]


def clip(sec: float, loudness: float = 0.2) -> Waveform:
    return np.full(round(sec * SAMPLE_RATE), loudness, dtype=np.float32)


def inference(engine: Scripted, **settings: Any) -> BatchInference:
    config = load_config(None, overrides={f"inference.{key}": value for key, value in settings.items()})
    return BatchInference(config=config, engine=engine)  # type: ignore[arg-type]


def test_a_generator_is_read_no_further_than_a_round_and_its_order_kept() -> None:
    read: list[int] = []

    def sources() -> Iterator[Waveform]:
        for number in range(100):
            read.append(number)
            yield clip(1 + number % 3)

    engine = Scripted()
    ahead = [
        len(read) - done
        for done, found in enumerate(inference(engine, batch_size=2).transcribe_iter(sources()))
        if found.text == f"{1 + done % 3} s"
    ]
    assert (len(ahead), max(ahead)) == (100, 17)  # 8 batches of 2, and the one that is being read
    assert engine.batches[0] == (None, [3 * SAMPLE_RATE] * 2)  # from long to short


def test_the_beginning_of_a_recording_decides_its_language_and_batches_have_one_each() -> None:
    engine = Scripted()
    german = np.concatenate([clip(3, 0.3), clip(3, 0.0), clip(3, 0.2)])  # its second half sounds English
    config = load_config(None, overrides={"inference.max_segment_sec": 4.0})
    batch = BatchInference(config=config, engine=engine, vad=LoudDetector())  # type: ignore[arg-type]
    results = batch.transcribe_batch([german, clip(2)])
    assert [result.language for result in results] == ["de", "en"]
    assert [segment.language for segment in results[0].segments] == ["de", "de"]
    assert [language for language, _ in engine.batches] == ["de", None]


def test_where_memory_runs_out_the_batch_is_halved() -> None:
    engine = Scripted(room=3)
    results = inference(engine, batch_size=8).transcribe_batch([clip(1)] * 8)
    assert [result.text for result in results] == ["1 s"] * 8
    assert [len(sizes) for _, sizes in engine.batches] == [2, 2, 2, 2]
    with pytest.raises(OutOfMemoryError, match="segment 1 of array 0"):
        inference(Scripted(room=0)).transcribe_batch([clip(1)])


def test_paths_arrays_silence_and_bad_files_come_back_in_order(tmp_path: Path) -> None:
    speech, silence, bad = (tmp_path / f"{name}.wav" for name in ("speech", "silence", "bad"))
    sf.write(speech, clip(2), SAMPLE_RATE)
    sf.write(silence, np.zeros(40 * SAMPLE_RATE), SAMPLE_RATE)
    bad.write_bytes(b"RIFF")
    batch = BatchInference(engine=Scripted(), vad=LoudDetector())  # type: ignore[arg-type]
    sources = [clip(3), speech, bad, np.zeros(10, np.float32), str(silence)]
    results = batch.transcribe_batch(sources, on_error="skip")
    assert [r.source for r in results] == ["array 0", str(speech), str(bad), "array 3", str(silence)]
    assert [r.text for r in results] == ["3 s", "2 s", None, None, ""]
    assert "bad.wav" in (results[2].error or "")
    assert "array 3: " in (results[3].error or "")
    assert results.audio_sec == pytest.approx(45.0)
    assert results.rtf > 0
    with pytest.raises(AudioError, match=r"bad\.wav"):
        batch.transcribe_batch([bad])


def test_no_source_a_bare_path_and_no_model_are_refused() -> None:
    for sources in ([], "clip.wav"):
        with pytest.raises(DataError, match="transcribe_batch"):
            inference(Scripted()).transcribe_batch(sources)
    with pytest.raises(ModelError):
        BatchInference()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["segments", "sequential"])
def test_a_long_recording_loses_and_doubles_nothing(tiny_en: Any, jfk: Waveform, mode: Any) -> None:
    pause = np.zeros(8_000, dtype=np.float32)
    long = np.concatenate([jfk, pause, jfk, pause, jfk, pause, jfk])  # 45.5 s
    (result,) = BatchInference(*tiny_en).transcribe_batch([long], word_timestamps=True, mode=mode)
    assert result.text.lower().count("fellow americans") == 4
    assert " ".join(word.text for word in result.words).split() == result.text.split()
    starts = [word.start_sec for word in result.words]
    assert starts == sorted(starts)
    assert result.words[-1].end_sec == pytest.approx(45.2, abs=0.8)


@pytest.mark.slow
def test_a_short_recording_of_several_sentences_is_cut_for_models_at_own_length(tiny_en: Any, jfk: Waveform) -> None:
    model, processor = tiny_en
    recording = np.concatenate([jfk, np.zeros(2 * SAMPLE_RATE, np.float32), jfk])
    found = {}
    for context in ("full", "dynamic"):
        model.audio_context = context
        (result,) = BatchInference(model, processor).transcribe_batch([recording])
        found[context] = [round(segment.start_sec) for segment in result.segments]
    assert found["full"] == [0]
    assert 13 in found["dynamic"]
