from __future__ import annotations

import itertools
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
from src.inference.words import Word, join_words
from src.utils.config import load_config
from src.utils.errors import AudioError, DataError, ModelError, OutOfMemoryError
from tests.inference.files.test_segmentation import LoudDetector

LANGUAGES = {0: "la", 2: "en", 3: "de", 4: "ka"}  # of the scripted engine, by tenths of the commonest loudness


class Scripted:
    """Says how long each clip is, in the language that its loudness stands for; keeps the batches it was given."""

    audio_context, workers = "full", 1
    vocabulary = SimpleNamespace(
        multilingual=True,
        timestamp_begin=1_000,
        end=500,
        encode=str.split,
        decode=lambda tokens: "text" if tokens else "",
    )

    def __init__(self, room: int = 100, *, language: str | None = None) -> None:
        self.batches: list[tuple[str | None, list[int]]] = []
        self.detected: list[float] = []  # seconds of audio that a language was heard in
        self.language, self.cap_rates = language, dict[str, float]()
        self._room = room

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Sequence[Waveform]:
        if len(audios) > self._room:
            raise RuntimeError("CUDA out of memory")
        return audios

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        self.batches.append((options.language, [len(audio) for audio in audios]))
        return [
            DecodingResult(
                f"{len(audio) / SAMPLE_RATE:g} s",
                (1,),
                -0.1,
                language=options.language or self.language or _spoken(audio),
            )
            for audio in audios
        ]

    def detect(self, encoded: Sequence[Waveform]) -> list[tuple[str, float]]:
        self.detected += [len(audio) / SAMPLE_RATE for audio in encoded]
        return [(_spoken(audio), 0.4) for audio in encoded]


def _spoken(audio: Waveform) -> str:
    return LANGUAGES[int(np.bincount((10 * audio).round().astype(int)).argmax())]


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


def test_a_text_is_told_as_it_comes_from_blocks_that_may_stop() -> None:
    told: list[str | None] = []
    spoken = by_loudness(Scripted(language="en"), batch_size=1)
    blocks = iter([clip(20), clip(2, 0.0)] * 4)
    (found,) = spoken.transcribe_iter([blocks], on_progress=lambda so_far: told.append(so_far.text))
    assert len(told) == len(found.segments) == 4
    assert told[-1] == found.text
    assert all((later or "").startswith(earlier or "x") for earlier, later in itertools.pairwise(told))

    def stopping() -> Iterator[Waveform]:
        yield clip(40)
        raise ConnectionError("the client left")

    with pytest.raises(ConnectionError):
        list(spoken.transcribe_iter([stopping()]))


def test_a_recording_has_one_language_and_so_has_a_batch() -> None:
    engine = Scripted()
    german = np.concatenate([clip(3.5, 0.3), clip(3, 0.0), clip(3, 0.2)])  # its second half sounds English
    config = load_config(None, overrides={"inference.max_segment_sec": 4.0})
    batch = BatchInference(config=config, engine=engine, vad=LoudDetector())  # type: ignore[arg-type]
    results = batch.transcribe_batch([german, clip(2)])
    assert [result.language for result in results] == ["de", "en"]
    assert [segment.language for segment in results[0].segments] == ["de", "de"]
    assert [language for language, _ in engine.batches] == ["de", None]


def by_loudness(engine: Scripted, **settings: Any) -> BatchInference:
    config = load_config(None, overrides={f"inference.{key}": value for key, value in settings.items()})
    return BatchInference(config=config, engine=engine, vad=LoudDetector())  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["segments", "sequential"])
def test_enough_speech_decides_the_language_not_a_short_beginning_or_silence(
    mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    speech = [clip(0.7, 0.2), *([clip(3, 0.0), clip(4, 0.3)] * 12)]
    engine = Scripted()
    with caplog.at_level("INFO"):
        for batch_size in (1, 16):  # of one, a round ends after 8 segments
            inference = by_loudness(engine, batch_size=batch_size, max_segment_sec=5.0, join_pause_sec=0.5)
            (result,) = inference.transcribe_batch([np.concatenate(speech)], mode=mode)
            assert result.language == "de"
            assert {segment.language for segment in result.segments} == {"de"}
    assert all(30 <= sec <= 35 for sec in engine.detected)
    assert "array 0: German (de), 40% certain; set the language" in caplog.text
    music = np.concatenate([clip(12, 0.0), clip(3, 0.3)])  # a clip by itself, mostly without speech
    (result,) = by_loudness(engine).transcribe_batch([music], mode=mode)
    assert result.language == "de"


@pytest.mark.parametrize("mode", ["segments", "sequential"])
def test_a_recordings_own_language_comes_first_and_a_checkpoints_own_before_hearing_it(mode: Any) -> None:
    long = np.concatenate([clip(20, 0.2), clip(2, 0.0), clip(20, 0.2)])

    def languages(engine: Scripted, **options: Any) -> list[str | None]:
        results = by_loudness(engine).transcribe_batch([long, clip(2)], mode=mode, **options)
        return [result.language for result in results]

    own = Scripted(language="hi")
    assert languages(own) == ["hi", "hi"]
    assert languages(own, languages={"array 1": "Mandarin Chinese"}) == ["hi", "zh"]
    assert not own.detected
    assert languages(Scripted(), languages={"array 0": "deu"}) == ["de", "en"]
    assert languages(own, languages={"array 0": "auto", Path("array 1"): "zh"}) == ["hi", "zh"]
    with pytest.raises(DataError, match="'klingon'"):
        languages(own, languages={"array 0": "klingon"})


def test_segments_are_cut_again_when_their_language_is_known() -> None:
    engine = Scripted()
    georgian = np.concatenate([clip(27, 0.4), clip(2, 0.0), clip(27, 0.4)])
    english, many = by_loudness(engine).transcribe_batch([clip(27), georgian])
    assert len(english.segments) == 1
    assert len(many.segments) >= 10
    assert max(segment.end_sec - segment.start_sec for segment in many.segments) < 7
    assert [a.end_sec <= b.start_sec for a, b in itertools.pairwise(many.segments)] == [True] * (len(many.segments) - 1)


class Saying(Scripted):
    """Says a text for each clip, one after another."""

    def __init__(self, *results: tuple[DecodingResult, ...]) -> None:
        super().__init__(language="zh")
        self._results = itertools.chain.from_iterable(results)

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        return [next(self._results) for _ in audios]


def test_segments_are_joined_as_their_script_is_words_too_and_what_ended_at_a_limit_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said(text: str, *words: Word, truncated: bool = False) -> DecodingResult:
        return DecodingResult(text, (1,), -0.1, words, "zh", truncated=truncated)

    you, are = Word("你", 0.0, 2.0, tokens=6, space=False), Word("好", 2.0, 4.0, tokens=6, space=False)
    good = Word("OK", 0.0, 3.0, tokens=9)
    results = said("你好", you, are), said("OK", good), said("OK", good), said("好", are, truncated=True)
    config = load_config(None, overrides={"inference.batch_size": 1})
    batch = BatchInference(config=config, engine=Saying(results), vad=LoudDetector())  # type: ignore[arg-type]
    pause = clip(31, 0.0)
    recording = np.concatenate([clip(4), pause, clip(3), pause, clip(2), pause, clip(1)])
    (result,) = batch.transcribe_batch([recording], word_timestamps=True)
    assert result.text == "你好OK OK好"
    assert join_words(result.words) == result.text
    assert [segment.truncated for segment in result.segments] == [False, False, False, True]
    assert "array 0: texts from 101.8 s ended at a limit" in caplog.text
    row = result.to_json()
    assert row["truncated"] is row["segments"][3]["truncated"] is True
    assert [word.get("space", True) for word in row["words"]] == [False, False, False, True, False]
    assert {key for word in row["words"] for key in word} == {"text", "start_sec", "end_sec", "probability", "space"}


def test_speech_that_nothing_was_written_for_is_in_the_result_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def said(text: str, *words: Word) -> DecodingResult:
        return DecodingResult(text, (1,) * bool(text), -0.1, words, "zh")

    results = said("你", Word("你", 0.0, 1.0, tokens=3, space=False)), said("")  # of 5 s of speech, then of the rest
    batch = BatchInference(engine=Saying(results), vad=LoudDetector())  # type: ignore[arg-type]
    (result,) = batch.transcribe_batch([clip(5)])
    assert (result.text, result.words) == ("你", None)
    assert [(gap.start_sec, gap.end_sec) for gap in result.uncovered] == [(1.0, 5.0)]
    assert result.to_json()["uncovered"] == [{"start_sec": 1.0, "end_sec": 5.0}]
    assert "array 0: speech has no text, or too little: 1.0 to 5.0 s" in caplog.text


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
    config = load_config(None, overrides={"inference.max_segment_sec": 14.0})  # said twice in one, it reads as a loop
    (result,) = BatchInference(*tiny_en, config).transcribe_batch([long], word_timestamps=True, mode=mode)
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
