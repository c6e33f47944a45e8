"""AlignAtt sessions on real engines and real speech; the states of a session are in test_streaming.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import VoiceActivityDetector
from src.inference.decoding import TorchEngine
from src.inference.engines import Engine, load_engine
from src.inference.streaming.commit import word_key
from src.inference.streaming.events import Event
from src.inference.streaming.live import StreamingASR
from src.utils.config import load_config

CONFIG = load_config(None, overrides={"device": "cpu", "streaming": {"policy": "alignatt", "min_chunk_sec": 1.0}})
WORDS = ["and", "so", "my", "fellow", "americans", "ask", "not"]
PHRASE_SEC = 5.0  # of the public clip, which pauses from 2.3 to 3.2 s and from 4.5 to 5.3 s
PAUSE_AT_SEC = 2.8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ctranslate2_engine() -> Engine:
    return load_engine("tiny.en", CONFIG, engine="ctranslate2", compute_type="float32")


def listen(engine: Engine, pieces: Sequence[Waveform]) -> list[Event]:
    """Hear pieces in turn, on a clock that stands still: computing is free."""
    asr = StreamingASR(engine=engine, vad=VoiceActivityDetector(CONFIG.vad), config=CONFIG, clock=lambda: 0.0)
    return [event for piece in pieces for event in asr.feed(piece)] + asr.flush()


def commits(events: Sequence[Event]) -> list[tuple[str, float, float]]:
    """Return each committed word with when it was said and how much audio had been heard."""
    return [
        (word_key(word), round(word.end_sec, 3), event.audio_sec)
        for event in events
        if event.kind == "commit"
        for word in event.words
    ]


def test_any_chunks_from_one_sample_to_all_at_once_give_the_same_commits(
    ctranslate2_engine: Engine, jfk: Waveform
) -> None:
    audio = jfk[: round(PHRASE_SEC * SAMPLE_RATE)]
    rng = np.random.default_rng(0)
    single_samples = np.arange(1, 300)
    ragged = np.sort(rng.choice(len(audio), size=40, replace=False))
    whole = commits(listen(ctranslate2_engine, [audio]))
    assert [word for word, _, _ in whole] == WORDS
    assert len({heard_sec for _, _, heard_sec in whole}) > 1, "all came at the end"
    for cuts in (single_samples, ragged):
        assert commits(listen(ctranslate2_engine, np.split(audio, cuts))) == whole


def test_both_engines_commit_the_same_words(
    ctranslate2_engine: Engine, _tiny_en: tuple[Any, Any], jfk: Waveform
) -> None:
    audio = jfk[: round(PHRASE_SEC * SAMPLE_RATE)]
    on_torch, on_ctranslate2 = (
        commits(listen(engine, [audio])) for engine in (TorchEngine(*_tiny_en), ctranslate2_engine)
    )
    assert [(word, heard) for word, _, heard in on_torch] == [(word, heard) for word, _, heard in on_ctranslate2]


@pytest.mark.parametrize("silence_sec", [0.8, 2.5])  # kept as context, and dropped
def test_a_longer_pause_in_the_middle_of_a_sentence_costs_no_word(
    ctranslate2_engine: Engine, jfk: Waveform, silence_sec: float
) -> None:
    audio = jfk[: round(PHRASE_SEC * SAMPLE_RATE)]
    silence = np.zeros(round(silence_sec * SAMPLE_RATE), dtype=np.float32)
    events = listen(ctranslate2_engine, [np.insert(audio, round(PAUSE_AT_SEC * SAMPLE_RATE), silence)])
    assert [word for word, _, _ in commits(events)] == WORDS
