"""Recordings of any length in pieces that the encoder takes: cut at silences, or windows of 30 s.

It is cut where silero-vad hears no speech. Speech that goes on for longer than `max_sec` is cut at its quietest moment,
which lies between words far more often than a fixed grid. What fits into one segment stays whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES
from src.data.labels import TIMESTAMP_STEP_SEC, TimedTokens
from src.data.vad import VADEvent, VoiceActivityDetector
from src.inference.engines import Engine, decode_with_fallback
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.words import Vocabulary, Word, shifted, split_words
from src.utils.config import InferenceConfig

QUIET_SAMPLES = SAMPLE_RATE // 10  # 0.1 s: the gap that a cut in the middle of speech looks for
PAD_SEC = 0.25  # at least so much stays on both sides of speech; single clips cut so: WER 8.7, at 0.1 s 10.6%
EARLIEST_CUT = 0.5  # share of `max_sec`; a cut before it would make many short segments
MIN_REST_SEC = 0.5  # a shorter rest after the last window holds no word
MAX_PROMPT_CHARS = 2_000  # more than the 223 tokens that a prompt may have
RESET_TEMPERATURE = 0.5  # a text that was drawn above it is no context to trust


@dataclass(frozen=True)
class TranscribedSegment:
    """A part of a recording that was decoded together.

    Attributes:
        start_sec: in the recording, as `end_sec`.
        text: stripped.
        words: times in the recording; None unless asked for.
        language: given or detected; None for English-only models.

    The other attributes are those of `DecodingResult`.
    """

    start_sec: float
    end_sec: float
    text: str
    avg_logprob: float
    no_speech_prob: float | None
    compression_ratio: float
    temperature: float
    words: tuple[Word, ...] | None
    language: str | None

    @classmethod
    def of(cls, result: DecodingResult, start_sec: float, end_sec: float) -> TranscribedSegment:
        """Place a result, whose words have times in the recording."""
        return cls(
            start_sec,
            end_sec,
            result.text,
            result.avg_logprob,
            result.no_speech_prob,
            result.compression_ratio,
            result.temperature,
            result.words,
            result.language,
        )


@dataclass(frozen=True)
class Segment:
    """A piece of a recording, from `start_sec` to `end_sec`; `audio` is (T,) float32 at 16 kHz."""

    start_sec: float
    end_sec: float
    audio: Waveform


def cut_at_silences(
    blocks: Iterable[Waveform], vad: VoiceActivityDetector, *, max_sec: float, join_pause_sec: float
) -> Iterator[Segment]:
    """Cut a recording that arrives in blocks.

    Args:
        blocks: (n,) float32, 16 kHz, in order.
        vad: its `pad_sec` of silence, at least `PAD_SEC`, stays on both sides of speech.
        max_sec: of a segment.
        join_pause_sec: stretches of speech with at most so much silence between them share a segment, where they fit.

    Yields:
        Segments in order, without overlap, that hold all speech; the whole recording, where one is enough.
    """
    cutter = _Cutter(vad, round(max_sec * SAMPLE_RATE), round(join_pause_sec * SAMPLE_RATE))
    for block in blocks:
        yield from cutter.hear(block)
    yield from cutter.finish()


class _Cutter:
    """Positions are samples since the recording began."""

    def __init__(self, vad: VoiceActivityDetector, max_samples: int, join_samples: int) -> None:
        self._stream = vad.stream()
        self._pad = round(max(vad.config.pad_sec, PAD_SEC) * SAMPLE_RATE)
        self._onset = self._pad + round(vad.config.min_speech_sec * SAMPLE_RATE) + SAMPLE_RATE // 10
        self._max, self._join = max_samples, join_samples
        self._held: Waveform = np.zeros(0, dtype=np.float32)
        self._from = 0  # position of the first sample held
        self._judged = 0  # up to here the detector has heard
        self._speech: int | None = None  # where speech that goes on began
        self._window: tuple[int, int] | None = None  # speech that waits for more, or to be given out
        self._cut = 0  # no segment begins before it

    def hear(self, block: Waveform) -> Iterator[Segment]:
        self._held = np.concatenate([self._held, block])
        if self._judged or self._from + len(self._held) > self._max:
            yield from self._judge()

    def finish(self) -> Iterator[Segment]:
        if self._judged:
            yield from self._close()
        elif len(self._held):
            yield from self._cut_short()

    def _cut_short(self) -> Iterator[Segment]:
        """Cut a recording that fits into one segment only at pauses that may not be in one."""
        whole = Segment(0.0, len(self._held) / SAMPLE_RATE, self._held)
        may_hold_pause = len(self._held) > self._join
        self._max = len(self._held) + 2 * self._pad  # no speech is too long
        segments = [*self._judge(), *self._close()] if may_hold_pause else []
        yield from segments if len(segments) > 1 else [whole]

    def _close(self) -> Iterator[Segment]:
        for event in self._stream.finish():
            yield from self._note(event)
        if self._window is not None:
            yield self._give(*self._window)

    def _judge(self) -> Iterator[Segment]:
        """Let the detector hear what is new, a second at a time: speech that is too long is cut in time."""
        end = self._from + len(self._held)
        while self._judged < end:
            step = min(self._judged + SAMPLE_RATE, end)
            events = self._stream.feed(self._held[self._judged - self._from : step - self._from])
            self._judged = step
            for event in events:
                yield from self._note(event)
            yield from self._cut_long(self._judged)
            if self._window is not None and self._speech is None and self._judged - self._window[1] > self._join:
                yield self._give(*self._window)  # nothing that comes can join it
                self._window = None
            self._forget()

    def _note(self, event: VADEvent) -> Iterator[Segment]:
        at = round(event.time_sec * SAMPLE_RATE)
        if event.kind == "start":
            self._speech = at
            return
        yield from self._cut_long(at)
        begin, self._speech = (at if self._speech is None else self._speech), None
        yield from self._add(begin, at)

    def _add(self, begin: int, end: int) -> Iterator[Segment]:
        """Join a stretch of speech to the window, or begin a new one with it."""
        if self._window is not None:
            start, last = self._window
            if begin - last <= self._join and end - start + 2 * self._pad <= self._max:
                self._window = (start, end)
                return
            yield self._give(start, last, before=begin)
        self._window = (begin, end)

    def _cut_long(self, until: int) -> Iterator[Segment]:
        """Cut speech that would not fit into a segment if it went on until then."""
        while self._speech is not None and until - self._speech > self._max - 2 * self._pad:
            yield from self._cut_speech(self._speech)

    def _cut_speech(self, begin: int) -> Iterator[Segment]:
        """Give out the speech until its quietest moment; the rest goes on from there."""
        first = begin + round(EARLIEST_CUT * self._max)
        last = begin + self._max - 2 * self._pad
        at = first + _quietest(self._held[first - self._from : last - self._from])
        if self._window is not None:
            yield self._give(*self._window, before=begin)
            self._window = None
        yield self._give(begin, at, before=at)
        self._speech = self._cut = at

    def _give(self, begin: int, end: int, *, before: int | None = None) -> Segment:
        """Make a segment with padding; one that would reach beyond half of the way to `before` ends there."""
        start = max(begin - self._pad, self._cut, 0)
        heard = self._from + len(self._held)
        stop = min(end + self._pad, heard if before is None else max(end, (end + before) // 2))
        self._cut = stop
        audio = self._held[start - self._from : stop - self._from].copy()
        return Segment(start / SAMPLE_RATE, stop / SAMPLE_RATE, audio)

    def _forget(self) -> None:
        """Drop audio that no segment can need."""
        waiting = self._window[0] if self._window is not None else self._speech
        keep = max((self._judged if waiting is None else waiting) - self._onset, self._cut, self._from)
        if keep - self._from > self._max:  # not at every step: it copies what stays
            self._held, self._from = self._held[keep - self._from :].copy(), keep


def _quietest(samples: Waveform) -> int:
    """Return the middle of the quietest 0.1 s."""
    power = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    energy = power[QUIET_SAMPLES:] - power[:-QUIET_SAMPLES]
    return int(energy.argmin()) + QUIET_SAMPLES // 2 if len(energy) else len(samples) // 2


def decode_windows(
    engine: Engine,
    blocks: Iterable[Waveform],
    options: DecodingOptions,
    rules: InferenceConfig,
    *,
    vad: VoiceActivityDetector | None = None,
) -> Iterator[tuple[DecodingResult, float, float]]:
    """Transcribe a recording in windows of 30 s, one after the other, each with the text before it as context.

    The long-form algorithm of openai/whisper (Radford et al. 2022, section 3.8): the model writes segment times into
    its tokens, and the next window begins where the last whole segment ended. It keeps context over cuts, but decodes
    one window at a time: segments cut at silences are several times faster. The prompt of `options` precedes the first
    window; the language of the first window is that of all. See `decode_with_fallback` for `rules` and `vad`.

    Yields:
        Each segment's result, its start and its end in seconds of the recording, as the times of its words.
    """
    coming, vocabulary = iter(blocks), engine.vocabulary
    prompt, language = options.prompt, options.language
    held: Waveform = np.zeros(0, dtype=np.float32)
    start = 0  # of what is held, in samples of the recording
    while True:
        while len(held) < CONTEXT_SAMPLES and (block := next(coming, None)) is not None:
            held = np.concatenate([held, block])
        if len(held) < MIN_REST_SEC * SAMPLE_RATE:
            return
        audio, start_sec = held[:CONTEXT_SAMPLES], start / SAMPLE_RATE
        asked = replace(options, timestamps=True, word_timestamps=False, prompt=prompt, language=language)
        (result,) = decode_with_fallback(engine, [audio], asked, rules, vad=vad)
        language = result.language
        texts, end_sec = split_at_timestamps(result.tokens, vocabulary, len(audio) / SAMPLE_RATE)
        parts = [replace(result, text=vocabulary.decode(each.tokens).strip(), tokens=each.tokens) for each in texts]
        if options.word_timestamps:
            words = _words_of_texts(engine, audio, texts, replace(asked, language=language), end_sec)
            parts = [replace(part, words=shifted(each, start_sec)) for part, each in zip(parts, words, strict=True)]
        for part, text in zip(parts, texts, strict=True):
            yield part, start_sec + text.start_sec, start_sec + text.end_sec
        used = round(end_sec * SAMPLE_RATE)
        held, start = held[used:], start + used
        heard = "".join(vocabulary.decode(text.tokens) for text in texts)  # not what the next window hears again
        prompt = "" if result.temperature > RESET_TEMPERATURE else f"{prompt}{heard}"[-MAX_PROMPT_CHARS:]


def split_at_timestamps(
    tokens: Sequence[int], vocabulary: Vocabulary, window_sec: float
) -> tuple[list[TimedTokens], float]:
    """Split a window's tokens at the pairs of times that the model wrote between segments.

    Returns:
        Segments with text; and where the next window begins, in seconds of this one: at its end, unless a segment was
        begun there whose end lies beyond.
    """
    begin = vocabulary.timestamp_begin
    is_time = [token >= begin for token in tokens]
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    ends_whole = is_time[-2:] == [False, True]  # speech ended, and nothing was begun after it
    edges = [0, *cuts, len(tokens)] if ends_whole or not cuts else [0, *cuts]
    texts = []
    for first, last in itertools.pairwise(edges):
        times = [
            min((token - begin) * TIMESTAMP_STEP_SEC, window_sec) for token in tokens[first:last] if token >= begin
        ]
        text = tuple(token for token in tokens[first:last] if token < vocabulary.end)
        start_sec = times[0] if times else 0.0
        end_sec = times[-1] if len(times) > 1 else window_sec
        if vocabulary.decode(text).strip():
            texts.append(TimedTokens(text, start_sec, max(start_sec, end_sec)))
    last_sec = (tokens[cuts[-1] - 1] - begin) * TIMESTAMP_STEP_SEC if cuts else 0.0
    return texts, window_sec if ends_whole or not cuts or last_sec <= 0 else min(last_sec, window_sec)


def _words_of_texts(
    engine: Engine, audio: Waveform, texts: Sequence[TimedTokens], options: DecodingOptions, end_sec: float
) -> Iterator[tuple[Word, ...]]:
    """Place all words of a window at once, none beyond where the next begins, and deal them out to its segments."""
    encoded = engine.encode([audio], options.trailing_silence_sec)
    (words,) = engine.align(encoded, [audio], [[token for text in texts for token in text.tokens]], options)
    within = (replace(w, start_sec=min(w.start_sec, end_sec), end_sec=min(w.end_sec, end_sec)) for w in words)
    for text in texts:
        count = sum(bool(word) for word, _ in split_words(engine.vocabulary, text.tokens))
        yield tuple(itertools.islice(within, count))
