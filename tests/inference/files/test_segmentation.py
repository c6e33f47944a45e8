"""Cutting at silences loses and doubles no speech, in bounded memory; windows are cut as by openai/whisper."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import SpeechSegment, VADEvent
from src.inference.engine_base import DecodingResult
from src.inference.files.segmentation import (
    Segment,
    cut_at_silences,
    cut_to_fit,
    decode_segments,
    decode_windows,
    max_speech_sec,
    split_at_timestamps,
)
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

    def speech_segments_batch(self, audios: Sequence[Waveform]) -> list[list[SpeechSegment]]:
        found = []
        for audio in audios:
            stream = self.stream()
            times = [event.time_sec for event in stream.feed(audio) + stream.finish()]
            found.append([SpeechSegment(*times[at : at + 2]) for at in range(0, len(times), 2)])
        return found

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


@pytest.mark.parametrize(("language", "sec"), [("en", 59.1), ("de", 39.4), ("hi", 13.9), ("ta", 13.9), ("ka", 6.1)])
def test_no_segment_holds_more_speech_than_the_decoder_has_room_for(language: str, sec: float) -> None:
    engine, options = Windows(), DecodingOptions()
    most = max_speech_sec(engine, language, options)  # type: ignore[arg-type]
    assert most == pytest.approx(sec, abs=0.1)
    translated = DecodingOptions(task="translate")  # the text is English
    assert max_speech_sec(engine, language, translated) == pytest.approx(59.1, abs=0.1)  # type: ignore[arg-type]
    engine.cap_rates = {language: 1.5 * 90.0}
    assert max_speech_sec(engine, language, options) == pytest.approx(0.8 * 443 / 90)  # type: ignore[arg-type]


def test_a_segment_without_room_is_cut_at_its_quiet_moments_and_silence_needs_none() -> None:
    audio = recording([(True, 28.0)])
    for at in (5.0, 11.5, 16.0, 22.0):
        audio[round(at * SAMPLE_RATE) : round((at + 0.2) * SAMPLE_RATE)] = 0.12
    parts = cut_to_fit(Segment(3.0, 31.0, audio), 7.0, LoudDetector())  # type: ignore[arg-type]
    assert [round(part.start_sec, 1) for part in parts] == [3.0, 8.1, 14.6, 19.1, 25.1]
    np.testing.assert_array_equal(np.concatenate([part.audio for part in parts]), audio)
    assert [part.end_sec for part in parts[:-1]] == [part.start_sec for part in parts[1:]]
    sparse = Segment(0.0, 28.0, recording([(True, 3.0), (False, 22.0), (True, 3.0)]))
    assert cut_to_fit(sparse, 7.0, LoudDetector()) == [sparse]  # type: ignore[arg-type]


class Letters:
    """A vocabulary of letters; times begin at 1,000, the end is 500."""

    end, timestamp_begin, multilingual = 500, 1_000, False

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

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
    language: str | None = None

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.cap_rates: dict[str, float] = {}

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


class Limited(Windows):
    """An engine that hears a letter in each quarter of a second that is not silent, and writes at most so many."""

    def __init__(self, most: int, *, times: bool = False) -> None:
        super().__init__()
        self._most, self._times = most, times
        self.seconds: list[float] = []

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        return [self._hear(audio, options) for audio in audios]

    def _hear(self, audio: Waveform, options: DecodingOptions) -> DecodingResult:
        self.seconds.append(len(audio) / SAMPLE_RATE)
        self.prompts.append(options.prompt)
        spoken = audio[2_000 :: SAMPLE_RATE // 4]
        heard = "".join(chr(round(float(sample) * 1_000)) for sample in spoken if sample)
        given: list[str | float] = [0.0, heard[: self._most]]
        if self._times and len(heard) > self._most:
            given = [
                0.0,
                heard[: self._most - 2],
                (self._most - 2) / 4,
                (self._most - 2) / 4,
                heard[self._most - 2 :][:2],
            ]
        elif self._times:
            given.append(len(audio) / SAMPLE_RATE)
        text = heard[: self._most]
        return DecodingResult(text, tuple(tokens(*given)), -0.1, truncated=len(heard) > self._most)


def spelt(text: str, *, quiet: Sequence[int] = ()) -> Waveform:
    """A letter in each quarter of a second; those at `quiet` are softer at their end."""
    audio = np.repeat(np.array([ord(c) / 1_000 for c in text], dtype=np.float32), SAMPLE_RATE // 4)
    for at in quiet:
        audio[(at + 1) * 4_000 - 1_600 : (at + 1) * 4_000] = 0.001
    return audio


LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3


class Forgetful(Windows):
    """Writes a letter for each quarter of a second, of at most so many sentences; it skips or stops, and is sure."""

    def __init__(self, *, skips: bool = False, most: int = 1, logprob: float = -0.03) -> None:
        super().__init__()
        self._skips, self._most, self._logprob = skips, most, logprob
        self.heard: list[float] = []

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        return [self._hear(audio, options) for audio in audios]

    def _hear(self, audio: Waveform, options: DecodingOptions) -> DecodingResult:
        self.heard.append(len(audio) / SAMPLE_RATE)
        letters = [(at / SAMPLE_RATE, round(float(audio[at]) * 1_000)) for at in range(2_000, len(audio), 4_000)]
        sentences: list[list[tuple[float, int]]] = [[]]
        for sec, code in letters:
            if code > 90:
                sentences[-1].append((sec, code))
            elif sentences[-1]:
                sentences.append([])
        sentences = [sentence for sentence in sentences if sentence]
        kept = sentences[: self._most]
        if self._skips and len(sentences) > 2:
            kept = [sentences[0], sentences[-1]]
        spoken = [letter for sentence in kept for letter in sentence]
        ends = [*(sec - 0.125 for sec, _ in spoken[1:]), spoken[-1][0] + 0.125 if spoken else 0.0]
        words = tuple(
            Word(chr(code), sec - 0.125, end, tokens=1, space=False)
            for (sec, code), end in zip(spoken, ends, strict=True)
        )
        text = "".join(word.text for word in words)
        return DecodingResult(
            text, tuple(ord(c) for c in text), self._logprob, words if options.word_timestamps else None
        )


def sentences(*texts: str, pause_sec: float = 0.75) -> Waveform:
    """A letter in each quarter of a second, and a pause after each text."""
    pause = np.zeros(round(pause_sec * SAMPLE_RATE), dtype=np.float32)
    return np.concatenate([part for text in texts for part in (spelt(text), pause)])


SENTENCES = ("abcdefghijkl", "mnopqrstuvwx", "yzabcdefghij", "klmnopqrstuv")


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("with_words", [False, True])
def test_speech_that_a_text_leaves_out_is_decoded_again(skips: bool, with_words: bool) -> None:
    audio = sentences(*SENTENCES)
    engine = Forgetful(skips=skips)
    options = DecodingOptions(word_timestamps=with_words)
    given = [
        Segment(5.0, 5.0 + len(audio) / SAMPLE_RATE, audio),
        Segment(0.0, 3.75, audio[: round(3.75 * SAMPLE_RATE)]),
    ]
    vad: Any = LoudDetector()
    parts, short = decode_segments(engine, given, options, InferenceConfig(), vad=vad)  # type: ignore[arg-type]
    assert "".join(part.text for part in parts) == "".join(SENTENCES)
    assert [part.text for part in short] == [SENTENCES[0]]
    assert not any(part.uncovered for part in (*parts, *short))
    assert (parts[0].start_sec, parts[-1].end_sec) == (5.0, given[0].end_sec)
    assert all(a.end_sec <= b.start_sec for a, b in itertools.pairwise(parts))
    if with_words:
        times = [word.start_sec for part in parts for word in part.words or ()]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(5.0 + 3 * 3.75 + 2.75, abs=0.1)
    else:
        assert [part.words for part in parts] == [None] * len(parts)


def test_what_stays_uncovered_is_told_and_a_guess_on_it_is_no_text() -> None:
    audio, vad = sentences(*SENTENCES), LoudDetector()
    segment = Segment(5.0, 5.0 + len(audio) / SAMPLE_RATE, audio)

    class Unsure(Forgetful):
        def _hear(self, audio: Waveform, options: DecodingOptions) -> DecodingResult:
            self._logprob = -0.03 if not self.heard else -3.0
            return super()._hear(audio, options)

    engine = Unsure()
    ((found,),) = decode_segments(engine, [segment], DecodingOptions(), InferenceConfig(), vad=vad)  # type: ignore[arg-type]
    assert found.text == SENTENCES[0]
    assert [(gap.start_sec, gap.end_sec) for gap in found.uncovered] == [(8.0, 19.25)]
    assert len(engine.heard) == 2  # a guess is not decoded again, and at no other temperature
    translated = DecodingOptions(task="translate")
    ((alone,),) = decode_segments(Forgetful(), [segment], translated, InferenceConfig(), vad=vad)  # type: ignore[arg-type]
    assert (alone.text, alone.uncovered) == (SENTENCES[0], ())


def test_a_window_that_ends_early_is_followed_by_one_that_hears_the_rest() -> None:
    class Early(Windows):
        def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
            loud = float(np.abs(audios[0]).max())
            text = " one" if loud > 0.3 else ""
            self.prompts.append(text)
            return [DecodingResult(text, tuple(tokens(0.0, text, 12.0) if text else ()), -0.1)]

    audio = np.concatenate([np.full(24 * SAMPLE_RATE, 0.5), np.zeros(SAMPLE_RATE), np.full(5 * SAMPLE_RATE, 0.2)])
    vad: Any = LoudDetector()
    found = list(decode_windows(Early(), [audio.astype(np.float32)], DecodingOptions(), InferenceConfig(), vad=vad))  # type: ignore[arg-type]
    assert [(part.start_sec, part.end_sec, part.text) for part in found if part.text] == [
        (0.0, 12.0, "one"),
        (12.0, 24.0, "one"),
    ]
    assert [(gap.start_sec, gap.end_sec) for part in found for gap in part.uncovered] == [(25.0, 30.0)]


def test_a_text_that_ended_at_a_limit_is_decoded_in_halves_until_it_is_whole() -> None:
    audio = spelt(LETTERS, quiet=range(3, len(LETTERS), 4))
    engine = Limited(20)
    segment = Segment(5.0, 5.0 + len(audio) / SAMPLE_RATE, audio)
    (parts, short) = decode_segments(
        engine, [segment, Segment(0.0, 1.0, audio[:SAMPLE_RATE])], DecodingOptions(), InferenceConfig()
    )  # type: ignore[arg-type]
    assert "".join(part.text for part in parts) == LETTERS
    assert [part.text for part in short] == ["abcd"]
    assert not any(part.truncated for part in parts)
    assert (parts[0].start_sec, parts[-1].end_sec) == (5.0, segment.end_sec)
    assert [part.end_sec for part in parts[:-1]] == [part.start_sec for part in parts[1:]]
    assert min(engine.seconds[2:]) >= 2.0 - 0.6

    hopeless = Limited(3)
    (parts,) = decode_segments(hopeless, [segment], DecodingOptions(), InferenceConfig())  # type: ignore[arg-type]
    assert all(part.truncated for part in parts)
    assert min(hopeless.seconds) >= 1.0


@pytest.mark.parametrize("times", [True, False])
def test_a_window_whose_text_ended_at_a_limit_loses_nothing(times: bool) -> None:
    audio = spelt(LETTERS, quiet=range(3, len(LETTERS), 4))
    engine = Limited(20, times=times)
    found = list(decode_windows(engine, [audio], DecodingOptions(), InferenceConfig()))  # type: ignore[arg-type]
    assert "".join(part.text for part in found) == LETTERS
    assert not any(part.truncated for part in found)
    assert engine.prompts[-1] == "".join(part.text for part in found[:-1])  # no space is inserted
    hopeless = list(decode_windows(Limited(3), [audio], DecodingOptions(), InferenceConfig()))  # type: ignore[arg-type]
    assert all(part.truncated for part in hopeless)


def test_windows_of_a_language_of_many_tokens_are_shorter() -> None:
    audio = spelt(LETTERS * 3, quiet=range(3, 3 * len(LETTERS), 4))
    engine = Limited(1_000)
    engine.language = "ka"
    found = list(decode_windows(engine, [audio], DecodingOptions(), InferenceConfig()))  # type: ignore[arg-type]
    assert "".join(part.text for part in found) == LETTERS * 3
    assert max(engine.seconds) <= 6.6
