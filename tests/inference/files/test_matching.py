"""Transcripts are found in their recordings: what both have is cut at silences, what only one has is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.sources.subtitles import Passage
from src.data.utterance import Utterance
from src.data.vad import SpeechSegment, speech_edges
from src.inference.files.anchors import hear, match_words
from src.inference.files.matching import match_transcript
from src.inference.files.transcribe import Transcription
from src.inference.torch_engine import TorchEngine
from src.inference.words import Word
from src.utils.config import load_config

PAUSE = np.zeros(SAMPLE_RATE, dtype=np.float32)


def words(text: str) -> list[str]:
    return text.split()


def test_words_of_both_texts_are_paired_in_order() -> None:
    said, heard = (
        words("so the cat sat on the mat and then it slept"),
        words("uh the cat sat on a mat and than it slept"),
    )
    assert match_words(said, heard) == [(i, i) for i in (1, 2, 3, 4, 6, 7, 9, 10)]


def test_a_passage_that_only_one_text_has_takes_no_words_of_its_neighbours() -> None:
    before, after = words("we met at the old bridge last monday"), words("and then we went home by the river")
    extra = words("the river is at home by the old bridge and we went then") * 3
    alone = [(i, i) for i in range(len(before))]
    shifted = [(len(before) + i, len(before) + len(extra) + i) for i in range(len(after))]
    assert match_words(before + after, before + extra + after) == alone + shifted
    assert match_words(before + extra + after, before + after) == [(j, i) for i, j in alone + shifted]


def test_a_short_word_that_is_alone_in_agreeing_is_no_anchor() -> None:
    said = words("here somebody speaks at length about the weather of all tomorrow")
    assert match_words(said, words("entirely different things the other one said")) == []
    assert match_words(["tomorrow", *said[:-1]], words("x tomorrow y")) == [(0, 1)]  # a long one is


def test_characters_are_words_where_there_are_no_spaces_and_punctuation_is_none() -> None:
    said = ["今", "天", "", "天", "气", "很", "好"]
    assert match_words(said, list("今天天汽很好")) == [(0, 0), (1, 1), (3, 2), (5, 4), (6, 5)]


def test_a_long_text_of_few_words_is_paired() -> None:
    vocabulary = [f"w{i}" for i in range(800)]
    text = [vocabulary[i] for i in np.random.default_rng(0).zipf(1.3, 20_000) % 800]
    heard = [word for i, word in enumerate(text) if i % 7]
    pairs = match_words(text, heard)
    assert len(pairs) > 0.95 * len(heard)
    right = sum(heard[j] == text[i] and i - i // 7 - 1 == j for i, j in pairs)
    assert right > 0.95 * len(pairs)  # a word that is said twice in a row may be either


@pytest.fixture(scope="module")
def said(sample: list[Utterance]) -> dict[str, np.ndarray]:
    """Clips by their text, of the bundled set, that tiny.en hears well."""
    wanted = ("WE ARE SO HAPPY TO HAVE HELPED", "I THOUGHT HE WAS A BRILLIANT MAN", "I KNOW HOW TO PROGRAM",
              "LIGHTING A FIRE IS AN EASY WAY TO GET FOUND", "WE WERE ALWAYS DOING SOMETHING AS IT WAS")  # fmt: skip
    return {u.text: load_audio(u.audio) for u in sample if u.text in wanted}


@pytest.mark.parametrize("shift_sec", [None, -1.5, 1.5])
def test_what_is_said_is_found_and_what_is_not_is_left_out(
    said: dict[str, np.ndarray], _tiny_en: tuple[Any, Any], shift_sec: float | None
) -> None:
    texts = list(said)
    recording = np.concatenate([part for text in texts for part in (said[text], PAUSE)])
    starts = np.cumsum([0] + [len(said[text]) + len(PAUSE) for text in texts]) / SAMPLE_RATE
    written = [text.replace("BRILLIANT", "CARDBOARD") for text in texts]
    unspoken = "NOBODY SAYS THESE WORDS HERE AND THERE IS NO ROOM FOR THEM BETWEEN THE OTHERS EITHER"
    lines = [*written[:2], unspoken, *written[2:4]]  # the last clip is not written
    at = [starts[0], starts[1], starts[2], starts[2], starts[3]]
    passages = [
        Passage(text) if shift_sec is None else Passage(text, max(0.0, sec + shift_sec), max(0.1, sec + shift_sec + 2))
        for text, sec in zip(lines, at, strict=True)
    ]
    matched = match_transcript(recording, passages, TorchEngine(*_tiny_en), load_config(None))
    kept = {e.text: e for e in matched.excerpts if e.reason is None}
    assert set(kept) == {text for text in texts[:4] if "BRILLIANT" not in text}
    for text, excerpt in kept.items():
        begin = starts[texts.index(text)]
        assert begin <= excerpt.start_sec < excerpt.end_sec <= begin + len(said[text]) / SAMPLE_RATE
        assert excerpt.start_sec - excerpt.cut_start_sec <= 0.25
        assert excerpt.cut_end_sec - excerpt.end_sec <= 0.25
    reasons = {e.text: e.reason for e in matched.excerpts if e.reason is not None}
    assert next(r for t, r in reasons.items() if "CARDBOARD" in t) == "'CARDBOARD' is not what is heard"
    assert any("NO ROOM FOR THEM" in text for text in reasons)
    assert 0 < matched.covered_sec < matched.speech_sec


def test_a_wrong_word_costs_what_no_silence_parts_from_it_and_a_word_of_nobody_itself_alone(
    said: dict[str, np.ndarray], _tiny_en: tuple[Any, Any]
) -> None:
    texts = ["I KNOW HOW TO PROGRAM", "I THOUGHT HE WAS A BRILLIANT MAN", "WE ARE SO HAPPY TO HAVE HELPED"]
    audio = [said[text][slice(*(round(sec * SAMPLE_RATE) for sec in speech_edges(said[text])))] for text in texts]
    pause = PAUSE[: round(0.4 * SAMPLE_RATE)]  # too short to end a sentence
    recording = np.concatenate([PAUSE, audio[0], pause, audio[1], PAUSE, PAUSE, audio[2], PAUSE])
    lines = [f"{texts[0]} {texts[1].replace('BRILLIANT', 'CARDBOARD')}", f"{texts[2]} SEVENTEEN"]
    matched = match_transcript(recording, [Passage(line) for line in lines], TorchEngine(*_tiny_en), load_config(None))
    assert [e.text for e in matched.excerpts if e.reason is None] == [texts[0], texts[2]]
    assert [(e.text, e.reason) for e in matched.excerpts if e.reason is not None] == [
        ("I THOUGHT HE WAS A CARDBOARD MAN", "'CARDBOARD' is not what is heard"),
        ("SEVENTEEN", "'SEVENTEEN' is not what is heard"),
    ]


def test_what_the_recogniser_leaves_out_is_heard_again_between_silences() -> None:
    asked: list[tuple[int, Any]] = []

    class Recogniser:
        def transcribe_iter(self, audios: Any, *, word_timestamps: bool, languages: Any) -> Iterator[Transcription]:
            for audio in audios:
                asked.append((len(audio), languages))
                if len(audio) == 20 * SAMPLE_RATE:
                    words, left_out = (Word("one", 1.0, 2.0), Word("lost", 5.5, 6.0)), (SpeechSegment(5.0, 9.0),)
                    yield Transcription("x", "one lost", 20.0, words=words, language="en", uncovered=left_out)
                else:
                    yield Transcription("y", "two", 2.0, words=(Word("two", 0.25, 1.0),), language="en")

    speech = [(1.0, 2.0), (5.0, 6.0), (6.1, 7.0), (8.0, 9.0), (12.0, 13.0)]
    words, language = hear(np.zeros(20 * SAMPLE_RATE, np.float32), speech, Recogniser().transcribe_iter, None)
    assert [(word.text, word.start_sec) for word in words] == [("one", 1.0), ("two", 5.0), ("two", 8.0)]
    assert language == "en"
    assert [samples / SAMPLE_RATE for samples, _ in asked] == [20.0, 2.5, 1.5]
    assert asked[1][1] == {"array 0": "en", "array 1": "en"}


def test_nothing_matches_another_recording(said: dict[str, np.ndarray], _tiny_en: tuple[Any, Any]) -> None:
    audio, other = np.concatenate(list(said.values())[:2]), list(said)[3]
    matched = match_transcript(audio, [Passage(other)], TorchEngine(*_tiny_en), load_config(None))
    assert [e.reason is None for e in matched.excerpts] == [False]
    silent = match_transcript(np.zeros(64_000, np.float32), [Passage(other)], TorchEngine(*_tiny_en), load_config(None))
    assert (silent.speech_sec, silent.covered_sec, [e.text for e in silent.excerpts]) == (0.0, 0.0, [other])


@pytest.mark.slow
def test_a_language_without_spaces_and_a_foreign_one(
    base: tuple[Any, Any], espeak: Callable[[str, str], bytes], tmp_path: Path
) -> None:
    lines = ["今天天气很好，我们去公园。", "我的朋友住在北京，他是老师。"]
    audio = [load_audio(espeak(line, "cmn")) for line in lines]
    recording = np.concatenate([audio[0], PAUSE, audio[1]])
    config = load_config(None, overrides={"model": {"variant": "base", "language": "zh"}})
    matched = match_transcript(recording, [Passage("".join(lines))], TorchEngine(*base), config, min_score=-30)
    assert "".join(e.text for e in matched.excerpts) == "".join(lines)
    assert next(e.text for e in matched.excerpts).endswith("。")
    german = match_transcript(
        recording, [Passage("Heute ist das Wetter schön.")], TorchEngine(*base), config, language="de"
    )
    assert all(e.reason for e in german.excerpts)
