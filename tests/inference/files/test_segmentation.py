"""Cutting at silences loses and doubles no speech, in bounded memory; windows are cut as by openai/whisper."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import VADEvent
from src.inference.engine_base import DecodingResult
from src.inference.files.segmentation import Segment, cut_at_silences, decode_windows, split_at_timestamps
from src.inference.options import DecodingOptions
from src.inference.words import Word
from src.utils.config import InferenceConfig, VADConfig

MIN_SILENCE_SEC = 0.5


class LoudDetector:
    """Takes loud samples for speech, and reports as late as silero-vad does."""

    config = VADConfig(min_silence_sec=MIN_SILENCE_SEC)

    def __init__(self) -> None:
        self._heard, self._last, self._speaks = 0, 0, False

    def stream(self) -> LoudDetector:
        return LoudDetector()

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> list[list[object]]:
        return [[] for _ in audios]

    def feed(self, samples: Waveform) -> list[VADEvent]:
        events = []
        for piece in blocks(samples, SAMPLE_RATE // 20):
            loud = float(np.abs(piece).max()) > 0.1
            if loud and not self._speaks:
                events.append(self._event("start", self._heard))
            self._heard += len(piece)
            self._last = self._heard if loud else self._last
            if self._speaks and self._heard - self._last >= MIN_SILENCE_SEC * SAMPLE_RATE:
                events.append(self._event("end", self._last))
        return events

    def finish(self) -> list[VADEvent]:
        return [self._event("end", self._heard)] if self._speaks else []

    def _event(self, kind: str, at: int) -> VADEvent:
        self._speaks = kind == "start"
        return VADEvent(kind, at / SAMPLE_RATE, self._heard / SAMPLE_RATE)  # type: ignore[arg-type]


def recording(stretches: Sequence[tuple[bool, float]]) -> Waveform:
    """Loud and silent stretches, seconds each; each loud sample is another, so that it can be found again."""
    loud = np.concatenate([np.full(round(sec * SAMPLE_RATE), loud) for loud, sec in stretches])
    return np.where(loud, np.linspace(0.2, 0.9, len(loud), dtype=np.float32), np.float32(0))


def blocks(audio: Waveform, size: int) -> Iterator[Waveform]:
    return (audio[at : at + size] for at in range(0, len(audio), size))


def cut(audio: Waveform, *, max_sec: float, join_pause_sec: float = 0.0, size: int = SAMPLE_RATE) -> list[Segment]:
    return list(cut_at_silences(blocks(audio, size), LoudDetector(), max_sec=max_sec, join_pause_sec=join_pause_sec))


stretches = st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.3, 0.6, 1.0, 2.5, 7.0])), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@example(stretches=[(False, 7.4), (True, 3.9), (False, 1.0)], join=0.0, size=16_000)  # ends where it no longer fits
@given(stretches=stretches, join=st.sampled_from([0.0, 0.8, 30.0]), size=st.sampled_from([1_600, 16_000, 99_999]))
def test_all_speech_is_in_one_segment_once(stretches: list[tuple[bool, float]], join: float, size: int) -> None:
    audio = recording(stretches)
    segments = cut(audio, max_sec=4.0, join_pause_sec=join, size=size)
    covered = np.zeros(len(audio), dtype=int)
    for segment in segments:
        first = round(segment.start_sec * SAMPLE_RATE)
        np.testing.assert_array_equal(segment.audio, audio[first : first + len(segment.audio)])
        covered[first : first + len(segment.audio)] += 1
        assert len(segment.audio) <= 4.0 * SAMPLE_RATE
        assert segment.end_sec == pytest.approx(segment.start_sec + len(segment.audio) / SAMPLE_RATE)
    assert covered.max(initial=0) <= 1
    assert (covered[audio > 0] == 1).all()


@pytest.mark.parametrize(
    ("stretches", "join_pause_sec", "segments"),
    [
        ([(False, 1.0), (True, 1.0), (False, 1.5)], 0.0, 1),  # fits whole
        ([(False, 0.5), (True, 1.0), (False, 1.5), (True, 0.5)], 1.0, 2),  # fits, but holds a pause that it may not
        ([(False, 0.5), (True, 1.0), (False, 1.5), (True, 0.5)], 2.0, 1),
        ([(True, 3.95)], 0.0, 1),
        ([(True, 1.0), (False, 0.7), (True, 1.0), (False, 1.5), (True, 1.0)], 1.0, 2),
        ([(True, 0.0)], 0.0, 0),
    ],
)
def test_a_recording_is_cut_at_pauses_too_long_for_a_segment(
    stretches: Any, join_pause_sec: float, segments: int
) -> None:
    audio = recording(stretches)
    found = cut(audio, max_sec=4.0, join_pause_sec=join_pause_sec)
    assert len(found) == segments
    if segments == 1:
        assert (found[0].start_sec, len(found[0].audio)) == (0.0, len(audio))


def test_speech_without_a_pause_is_cut_at_its_quietest_moment() -> None:
    audio = np.full(10 * SAMPLE_RATE, 0.5, dtype=np.float32)
    audio[3 * SAMPLE_RATE : 3 * SAMPLE_RATE + 3_200] = 0.12
    first, *_ = cut(audio, max_sec=4.0)
    assert first.end_sec == pytest.approx(3.1, abs=0.06)


def test_memory_does_not_grow_with_the_recording() -> None:
    minute = recording([(True, 3.0), (False, 2.0)] * 12)

    def peak(minutes: int) -> int:
        tracemalloc.start()
        source = (block for _ in range(minutes) for block in blocks(minute, 10 * SAMPLE_RATE))
        found = cut_at_silences(source, LoudDetector(), max_sec=28.0, join_pause_sec=0.0)  # type: ignore[arg-type]
        assert sum(len(segment.audio) for segment in found) >= 36 * SAMPLE_RATE * minutes
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(30) < 1.2 * peak(3)


class Letters:
    """A vocabulary of letters; times begin at 1,000, the end is 500."""

    end, timestamp_begin = 500, 1_000

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token < self.end)


def tokens(*parts: str | float) -> list[int]:
    """Text as letters, seconds as times."""
    found: list[int] = []
    for part in parts:
        found += [ord(c) for c in part] if isinstance(part, str) else [1_000 + round(part / 0.02)]
    return found


@pytest.mark.parametrize(
    ("given", "texts", "next_sec"),
    [
        (tokens(0.0, "one", 2.0, 2.0, "two", 5.0), [("one", 0.0, 2.0), ("two", 2.0, 5.0)], 30.0),  # ends whole
        (tokens(0.0, "one", 2.0, 2.4, "cut"), [("one", 0.0, 2.0)], 2.0),  # the next window hears "cut" again
        (tokens(0.0, "one", 2.0, 2.4, "two", 4.0, 4.0), [("one", 0.0, 2.0), ("two", 2.4, 4.0)], 4.0),
        (tokens(0.0, "all of it"), [("all of it", 0.0, 30.0)], 30.0),  # no second time: nothing to go by
        (tokens(0.0, "all of it", 7.0), [("all of it", 0.0, 7.0)], 30.0),
        (tokens("no times"), [("no times", 0.0, 30.0)], 30.0),
        (tokens(0.0, 0.0), [], 30.0),  # never stands still
        ([], [], 30.0),
    ],
)
def test_windows_advance_as_in_openai_whisper(given: list[int], texts: Any, next_sec: float) -> None:
    found, end_sec = split_at_timestamps(given, Letters(), 30.0)  # type: ignore[arg-type]
    assert [(Letters().decode(t.tokens), t.start_sec, t.end_sec) for t in found] == texts
    assert end_sec == next_sec


class Windows:
    """An engine that hears a sentence and the beginning of another in each window, and keeps the prompts."""

    vocabulary = Letters()

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> None:
        return None

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        self.prompts.append(options.prompt)
        return [DecodingResult(" one cut", tuple(tokens(0.0, " one", 20.0, 21.0, " cut")), -0.1)]

    def align(self, *_: Any) -> list[tuple[Word, ...]]:
        return [(Word("one", 19.0, 24.0, 0.9),)]


def test_what_the_next_window_hears_again_is_no_context_and_no_word_reaches_into_it() -> None:
    engine, audio = Windows(), np.zeros(50 * 16_000, dtype=np.float32)
    options = DecodingOptions(prompt="Before.", word_timestamps=True)
    found = list(decode_windows(engine, [audio], options, InferenceConfig()))  # type: ignore[arg-type]
    assert engine.prompts == ["Before.", "Before. one", "Before. one one"]
    assert [(part.start_sec, part.end_sec) for part in found] == [(0.0, 20.0), (20.0, 40.0), (40.0, 50.0)]
    assert [part.words[0].end_sec for part in found if part.words] == [20.0, 40.0, 50.0]
