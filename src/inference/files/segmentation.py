"""Recordings of any length in pieces that the encoder takes: cut at silences, or windows of 30 s.

It is cut where silero-vad hears no speech. Speech that goes on for longer than `max_sec` is cut at its quietest moment,
which lies between words far more often than a fixed grid. What fits into one segment stays whole.

The decoder writes at most 448 tokens, which a language with many tokens per second fills in 7 s. So segments are cut
again once the language is known, and a text that still ended at a limit is decoded again in two halves. So is one that
leaves speech out, cut at its longest pause; where it only stops early, the rest is decoded by itself.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES
from src.data.labels import MAX_LABEL_TOKENS, RATE_MARGIN, TIMESTAMP_STEP_SEC, TimedTokens
from src.data.vad import SpeechSegment, VADEvent, VoiceActivityDetector
from src.inference.coverage import UNCOVERED_SEC, uncovered_speech
from src.inference.engine_base import DecodingResult, Engine
from src.inference.engines import decode_with_fallback, fails, is_silence
from src.inference.options import DecodingOptions
from src.inference.words import BROKEN, Vocabulary, Word, shifted
from src.utils.config import InferenceConfig
from src.utils.languages import FAST_SPEECH, join_texts, language_name, text_language, tokens_per_sec

logger = logging.getLogger(__name__)

QUIET_SAMPLES = SAMPLE_RATE // 10  # 0.1 s: the gap that a cut in the middle of speech looks for
PAD_SEC = 0.25  # at least so much stays on both sides of speech; single clips cut so: WER 8.7, at 0.1 s 10.6%
EARLIEST_CUT = 0.5  # share of `max_sec`; a cut before it would make many short segments
MIN_REST_SEC = 0.5  # a shorter rest after the last window holds no word
MAX_PROMPT_CHARS = 2_000  # more than the 223 tokens that a prompt may have
SPECIAL_TOKENS = 5  # start, language, task, no timestamps, end
USED_POSITIONS = 0.8  # of the decoder's, by the text that is expected
SHORTEST_HALF_SEC = 2.0  # a text that ends at a limit is decoded again in halves, down to it
NEAR_LAST_WORD_SEC = (-0.1, 0.3)  # from its end: what is decoded after it begins at the quietest moment there
DETECTION_SEC = 30.0  # of speech: decides the language of a recording
DETECTION_LOOK_SEC = 300.0  # of a recording, to find so much speech
UNSURE_LANGUAGE = 0.5  # a probability below it is a warning
GUESS_LOGPROB = -1.0  # what a text left out is no text below it: openai/whisper's threshold
RESET_TEMPERATURE = 0.5  # a text that was drawn above it is no context to trust


@dataclass(frozen=True)
class TranscribedSegment:
    """A part of a recording that was decoded together; see `DecodingResult`. Times are those of the recording."""

    start_sec: float
    end_sec: float
    text: str
    avg_logprob: float
    no_speech_prob: float | None
    compression_ratio: float
    temperature: float
    words: tuple[Word, ...] | None
    language: str | None
    truncated: bool = False  # the text ended at a limit, and there may be more
    uncovered: tuple[SpeechSegment, ...] = ()  # stretches of speech that the text leaves out
    tokens: tuple[int, ...] = field(default=(), repr=False)  # of the text

    @classmethod
    def of(cls, result: DecodingResult, start_sec: float, end_sec: float, clip_sec: float) -> TranscribedSegment:
        """Place the result of a clip that begins at `clip_sec`."""
        words = None if result.words is None else shifted(result.words, clip_sec)
        certainty = result.avg_logprob, result.no_speech_prob, result.compression_ratio, result.temperature
        return cls(
            start_sec, end_sec, result.text, *certainty, words, result.language, result.truncated, tokens=result.tokens
        )


class Segment(NamedTuple):
    """A piece of a recording, which is (T,) float32 at 16 kHz."""

    start_sec: float
    end_sec: float
    audio: Waveform
    speech: tuple[SpeechSegment, ...] | None = None  # in it, without padding; None where nobody has listened yet


def cut_at_silences(
    blocks: Iterable[Waveform], vad: VoiceActivityDetector, *, max_sec: float, join_pause_sec: float
) -> Iterator[Segment]:
    """Cut a recording that arrives in blocks of (n,) float32 at 16 kHz.

    At least `PAD_SEC` or the detector's `pad_sec` stays on both sides of speech. Stretches of speech with at most
    `join_pause_sec` between them share a segment, where they fit into `max_sec`. Segments come in order, without
    overlap, and hold all speech; the whole recording, where one is enough.
    """
    coming = iter(blocks)
    max_samples, join_samples = round(max_sec * SAMPLE_RATE), round(join_pause_sec * SAMPLE_RATE)
    held = _filled(np.zeros(0, dtype=np.float32), coming, max_samples + 1)
    if len(held) > max_samples:
        yield from _Cutter(vad, max_samples, join_samples).cut(itertools.chain([held], coming))
    elif len(held):  # fits: it is cut only at pauses that may not be in a segment
        whole = Segment(0.0, len(held) / SAMPLE_RATE, held)
        pieces = list(_Cutter(vad, sys.maxsize, join_samples).cut([held])) if len(held) > join_samples else [whole]
        yield from pieces if len(pieces) > 1 else [whole._replace(speech=pieces[0].speech if pieces else ())]


def _filled(held: Waveform, coming: Iterator[Waveform], samples: int) -> Waveform:
    """Return what is held with as much of what is coming as makes it so long."""
    while len(held) < samples and (block := next(coming, None)) is not None:
        held = np.concatenate([held, block])
    return held


class _Cutter:
    """Positions are samples since the recording began."""

    def __init__(self, vad: VoiceActivityDetector, max_samples: int, join_samples: int) -> None:
        self._stream = vad.stream()
        self._pad = round(max(vad.config.pad_sec, PAD_SEC) * SAMPLE_RATE)
        self._onset = self._pad + round(vad.config.min_speech_sec * SAMPLE_RATE) + SAMPLE_RATE // 10
        self._max, self._join = max_samples, join_samples
        self._held: Waveform = np.zeros(0, dtype=np.float32)
        self._from = 0  # position of the first sample held
        self._speech: int | None = None  # where speech that goes on began
        self._window: tuple[int, int] | None = None  # speech that waits for more, or to be given out
        self._spans: list[tuple[int, int]] = []  # its stretches
        self._cut = 0  # no segment begins before it

    def cut(self, blocks: Iterable[Waveform]) -> Iterator[Segment]:
        judged = 0  # up to here the detector has heard
        for block in blocks:
            self._held = np.concatenate([self._held, block])
            heard = self._from + len(self._held)
            while judged < heard:  # a second at a time: speech that is too long is cut in time
                step = min(judged + SAMPLE_RATE, heard)
                events = self._stream.feed(self._held[judged - self._from : step - self._from])
                judged = step
                for event in events:
                    yield from self._note(event)
                yield from self._cut_long(judged)
                if self._window is not None and self._speech is None and judged - self._window[1] > self._join:
                    yield self._give(*self._window)  # nothing that comes can join it
                    self._window = None

                # drop audio that no segment can need, though not at every step: it copies what stays
                waiting = self._window[0] if self._window is not None else self._speech
                keep = max((judged if waiting is None else waiting) - self._onset, self._cut, self._from)
                if keep - self._from > self._max:
                    self._held, self._from = self._held[keep - self._from :].copy(), keep
        for event in self._stream.finish():
            yield from self._note(event)
        if self._window is not None:
            yield self._give(*self._window)

    def _note(self, event: VADEvent) -> Iterator[Segment]:
        """Join a stretch of speech that has ended to the window, or begin a new window with it."""
        at = round(event.time_sec * SAMPLE_RATE)
        if event.kind == "start":
            self._speech = at
            return
        yield from self._cut_long(at)
        begin, self._speech = (at if self._speech is None else self._speech), None
        self._spans.append((begin, at))
        if self._window is not None:
            start, last = self._window
            if begin - last <= self._join and at - start + 2 * self._pad <= self._max:
                begin = start
            else:
                yield self._give(start, last, before=begin)
        self._window = (begin, at)

    def _cut_long(self, until: int) -> Iterator[Segment]:
        """Cut speech that would not fit into a segment if it went on until then, at its quietest moment."""
        while self._speech is not None and until - self._speech > self._max - 2 * self._pad:
            begin = self._speech
            first, last = begin + round(EARLIEST_CUT * self._max), begin + self._max - 2 * self._pad
            at = first + _quietest(self._held[first - self._from : last - self._from])
            if self._window is not None:
                yield self._give(*self._window, before=begin)
                self._window = None
            self._spans.append((begin, at))
            yield self._give(begin, at, before=at)
            self._speech = self._cut = at

    def _give(self, begin: int, end: int, *, before: int | None = None) -> Segment:
        """Make a segment with padding; one that would reach beyond half of the way to `before` ends there."""
        start = max(begin - self._pad, self._cut, 0)
        heard = self._from + len(self._held)
        self._cut = stop = min(end + self._pad, heard if before is None else max(end, (end + before) // 2))
        audio = self._held[start - self._from : stop - self._from].copy()
        speech = tuple(SpeechSegment(a / SAMPLE_RATE, b / SAMPLE_RATE) for a, b in self._spans if b <= end)
        self._spans = [span for span in self._spans if span[1] > end]
        return Segment(start / SAMPLE_RATE, stop / SAMPLE_RATE, audio, speech)


def _quietest(samples: Waveform) -> int:
    """Return the middle of the quietest 0.1 s."""
    power = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    energy = power[QUIET_SAMPLES:] - power[:-QUIET_SAMPLES]
    return int(energy.argmin()) + QUIET_SAMPLES // 2 if len(energy) else len(samples) // 2


def speech_of(audio: Waveform, vad: VoiceActivityDetector | None) -> Waveform:
    """Return what is speech in (T,) float32 at 16 kHz; all of it without a detector."""
    if vad is None:
        return audio
    (spans,) = vad.speech_segments_batch([audio])
    parts = [audio[round(span.start_sec * SAMPLE_RATE) : round(span.end_sec * SAMPLE_RATE)] for span in spans]
    return np.concatenate([audio[:0], *parts])


def is_language_open(engine: Engine, options: DecodingOptions) -> bool:
    """Whether the language of a recording must be heard: neither given nor the checkpoint's own."""
    return engine.vocabulary.multilingual and not (options.language or engine.language)


def hear_language(engine: Engine, speech: Waveform, options: DecodingOptions, name: str) -> str:
    """Detect the language of a recording in up to 30 s of its speech."""
    encoded = engine.encode([speech[:CONTEXT_SAMPLES]], options.trailing_silence_sec)
    ((language, probability),) = engine.detect(encoded)
    level = logging.WARNING if probability < UNSURE_LANGUAGE else logging.INFO
    fix = "; set the language if it is another" if level == logging.WARNING else ""
    logger.log(level, "%s: %s (%s), %.0f%% certain%s", name, language_name(language), language, 100 * probability, fix)
    return language


def max_speech_sec(engine: Engine, language: str | None, options: DecodingOptions) -> float:
    """Return how much fast speech, or what the checkpoint has seen, has room in the decoder; text before gives way."""
    prefix = options.prefix_tokens or engine.vocabulary.encode(options.prefix)
    room = MAX_LABEL_TOKENS - len(prefix) - SPECIAL_TOKENS
    written = text_language(language or engine.language, options.task)
    seen = engine.cap_rates.get(written or "en", 0.0) / RATE_MARGIN
    return USED_POSITIONS * room / max(FAST_SPEECH * tokens_per_sec(written), seen)


def cut_to_fit(segment: Segment, max_sec: float, vad: VoiceActivityDetector | None) -> list[Segment]:
    """Cut a segment that holds more speech than has room at its quietest moments."""
    if segment.end_sec - segment.start_sec <= max_sec or len(speech_of(segment.audio, vad)) <= max_sec * SAMPLE_RATE:
        return [segment]
    parts, most = [], round(max_sec * SAMPLE_RATE)
    while len(segment.audio) > most:
        last = min(most, len(segment.audio) - most // 4)  # no short rest
        part, segment = _cut_between(segment, round(EARLIEST_CUT * last), last)
        parts.append(part)
    return [*parts, segment]


def _cut_between(segment: Segment, first: int, last: int) -> tuple[Segment, Segment]:
    """Cut a segment at its quietest moment between two samples."""
    at = first + _quietest(segment.audio[first:last])
    cut_sec = segment.start_sec + at / SAMPLE_RATE
    before: tuple[SpeechSegment, ...] | None = None
    after: tuple[SpeechSegment, ...] | None = None
    if segment.speech is not None:
        before = tuple(replace(s, end_sec=min(s.end_sec, cut_sec)) for s in segment.speech if s.start_sec < cut_sec)
        after = tuple(replace(s, start_sec=max(s.start_sec, cut_sec)) for s in segment.speech if s.end_sec > cut_sec)
    return (
        Segment(segment.start_sec, cut_sec, segment.audio[:at], before),
        Segment(cut_sec, segment.end_sec, segment.audio[at:], after),
    )


def _halves(segment: Segment) -> tuple[Segment, ...]:
    """Cut a segment in its middle half; none if it is too short."""
    if len(segment.audio) < 2 * SHORTEST_HALF_SEC * SAMPLE_RATE:
        return ()
    return _cut_between(segment, len(segment.audio) // 4, len(segment.audio) * 3 // 4)


def decode_segments(
    engine: Engine,
    segments: Sequence[Segment],
    options: DecodingOptions,
    rules: InferenceConfig,
    *,
    vad: VoiceActivityDetector | None = None,
    part: bool = False,
) -> list[tuple[TranscribedSegment, ...]]:
    """Transcribe segments of at most 30 s as one batch; a text that is not whole is decoded again in parts.

    A text that ended at a limit is decoded in two halves. With a `vad`, one that stops early is continued, and one that
    skips speech is decoded in two parts, cut at the longest pause, which are kept if they leave at most half as much
    out. Translations are not checked: the times of their words say little. See `decode_with_fallback` for `rules` and
    `vad`; a `part` has no text where it would be decoded again at another temperature.

    Returns:
        For each segment itself, or the parts in which its text is whole.
    """
    if part:
        limit = rules.logprob_threshold or GUESS_LOGPROB
        rules = rules.model_copy(update={"temperatures": rules.temperatures[:1], "logprob_threshold": limit})
    checks = vad is not None and options.task == "transcribe"
    asked = replace(options, word_timestamps=options.word_timestamps or checks)
    results = decode_with_fallback(engine, [segment.audio for segment in segments], asked, rules, vad=vad)
    found: list[tuple[TranscribedSegment, ...]] = []
    again: dict[tuple[str | None, bool], dict[int, Sequence[Segment]]] = defaultdict(dict)  # parts by place
    for i, (segment, result) in enumerate(zip(segments, results, strict=True)):
        if part and fails(result, rules):
            result = replace(result, text="", tokens=(), words=(), truncated=False)
        whole = TranscribedSegment.of(result, segment.start_sec, segment.end_sec, segment.start_sec)
        parts: Sequence[Segment] = ()
        if result.truncated:
            parts = _halves(segment)
        elif vad is not None and checks:
            whole, parts = _check(segment, whole, vad)
            if not whole.text and (part or is_silence(result, rules)):
                parts = ()
        if parts:
            again[result.language, part or not result.truncated][i] = parts
        found.append((whole if options.word_timestamps else replace(whole, words=None),))
    for (language, are_parts), by_place in again.items():
        logger.debug("%d texts are not whole: decoded again in parts", len(by_place))
        pieces, own = [piece for parts in by_place.values() for piece in parts], replace(options, language=language)
        decoded = iter(decode_segments(engine, pieces, own, rules, vad=vad, part=are_parts))
        for i, parts in by_place.items():
            (whole,) = found[i]
            found[i] = _fuller(whole, tuple(itertools.chain(*itertools.islice(decoded, len(parts)))))
    return found


def _check(
    segment: Segment, whole: TranscribedSegment, vad: VoiceActivityDetector
) -> tuple[TranscribedSegment, Sequence[Segment]]:
    """Return a segment with what its text leaves out, and the parts to decode again: the rest, two parts, or none."""
    if whole.words is None:
        return whole, ()
    everything, rate = [SpeechSegment(segment.start_sec, segment.end_sec)], tokens_per_sec(whole.language)
    if not any(uncovered_speech(whole.words, everything, tokens_per_sec=rate)):
        return whole, ()
    if segment.speech is None:
        segment = segment._replace(speech=_listen(segment, vad))
    uncovered = uncovered_speech(whole.words, segment.speech or (), tokens_per_sec=rate)
    whole = replace(whole, uncovered=tuple(gap for gap in uncovered if gap is not None))
    if not whole.uncovered:
        return whole, ()

    def samples(sec: float) -> int:
        return min(max(round((sec - segment.start_sec) * SAMPLE_RATE), 0), len(segment.audio))

    if uncovered.skipped is None and whole.words:
        return whole, _cut_between(segment, *(samples(whole.words[-1].end_sec + sec) for sec in NEAR_LAST_WORD_SEC))[1:]
    pauses = [(b.start_sec - a.end_sec, a.end_sec, b.start_sec) for a, b in itertools.pairwise(segment.speech or ())]
    if not pauses:
        return whole, _halves(segment)
    _, *longest = max(pauses)
    return whole, _cut_between(segment, *map(samples, longest))


def _listen(segment: Segment, vad: VoiceActivityDetector) -> tuple[SpeechSegment, ...]:
    """Return the speech in a segment, without padding."""
    stream = vad.stream()
    times = [segment.start_sec + event.time_sec for event in stream.feed(segment.audio) + stream.finish()]
    return tuple(itertools.starmap(SpeechSegment, zip(times[::2], times[1::2], strict=True)))


def _fuller(whole: TranscribedSegment, parts: tuple[TranscribedSegment, ...]) -> tuple[TranscribedSegment, ...]:
    """Return parts instead of a text that ended at a limit, after one that they continue, or if they have more."""
    texts = [part.text for part in parts if part.text]
    if whole.truncated:
        return parts
    if parts[0].start_sec > whole.start_sec:  # the rest
        return (replace(whole, end_sec=parts[0].start_sec, uncovered=()), *parts) if texts else (whole,)

    def left_out_sec(*segments: TranscribedSegment) -> float:
        return sum(gap.end_sec - gap.start_sec for segment in segments for gap in segment.uncovered)

    is_fuller = len(join_texts(texts)) > len(whole.text) and left_out_sec(*parts) <= left_out_sec(whole) / 2
    return parts if is_fuller else (whole,)


def decode_windows(
    engine: Engine,
    blocks: Iterable[Waveform],
    options: DecodingOptions,
    rules: InferenceConfig,
    *,
    vad: VoiceActivityDetector | None = None,
    name: str = "recording",
) -> Iterator[TranscribedSegment]:
    """Transcribe a recording in windows of 30 s, one after the other, each with the text before it as context.

    The long-form algorithm of openai/whisper (Radford et al. 2022, section 3.8): the model writes segment times into
    its tokens, and the next window begins where the last whole segment ended. It keeps context over cuts, but decodes
    one window at a time: segments cut at silences are several times faster. The prompt of `options` precedes the first
    window. Windows are shorter where 30 s of the language have no room in the decoder. With a `vad`, the next window
    hears speech after a window's last segment again, and speech of a window without text is reported. See
    `decode_with_fallback` for `rules` and `vad`; `name` is for the log.
    """
    coming, vocabulary, with_words = iter(blocks), engine.vocabulary, options.word_timestamps
    options = replace(options, timestamps=True, word_timestamps=False)
    held: Waveform = np.zeros(0, dtype=np.float32)
    if is_language_open(engine, options):
        speech = held
        while len(speech) < DETECTION_SEC * SAMPLE_RATE and len(held) < DETECTION_LOOK_SEC * SAMPLE_RATE:
            more = _filled(held[:0], coming, CONTEXT_SAMPLES)
            if not len(more):
                break
            early = more[: round(DETECTION_LOOK_SEC * SAMPLE_RATE)]  # an array comes as one block
            held, speech = np.concatenate([held, more]), np.concatenate([speech, speech_of(early, vad)])
        if len(speech):
            options = replace(options, language=hear_language(engine, speech, options, name))
    start = 0  # of what is held, in samples of the recording
    while len(held := _filled(held, coming, CONTEXT_SAMPLES)) >= MIN_REST_SEC * SAMPLE_RATE:
        start_sec = start / SAMPLE_RATE
        window = Segment(0.0, min(len(held), CONTEXT_SAMPLES) / SAMPLE_RATE, held[:CONTEXT_SAMPLES])
        window = cut_to_fit(window, max_speech_sec(engine, options.language, options), vad)[0]
        while True:
            (result,) = decode_with_fallback(engine, [window.audio], options, rules, vad=vad)
            texts, end_sec = split_at_timestamps(result.tokens, vocabulary, window.end_sec, truncated=result.truncated)
            # the next window hears what is lost, unless no time says where
            is_lost = result.truncated and end_sec == window.end_sec
            if not is_lost or not (halves := _halves(window)):
                break
            window = halves[0]
        uncovered: tuple[SpeechSegment, ...] = ()
        if vad is not None and options.task == "transcribe" and not is_lost and end_sec == window.end_sec:
            last_sec = texts[-1].end_sec if texts else 0.0
            at = round(last_sec * SAMPLE_RATE)
            rest = Segment(start_sec + last_sec, start_sec + end_sec, window.audio[at:])
            if rest.end_sec - rest.start_sec >= UNCOVERED_SEC:
                gaps = uncovered_speech((), _listen(rest, vad), tokens_per_sec=tokens_per_sec(result.language))
                uncovered = tuple(gap for gap in gaps if gap is not None)
            if uncovered and last_sec >= SHORTEST_HALF_SEC:
                uncovered, end_sec = (), last_sec
        if result.text:
            options = replace(options, language=result.language)
        words = _words_of_texts(engine, window.audio, texts, options, end_sec) if with_words else itertools.repeat(None)
        for text, spoken in zip(texts, words, strict=False):
            part = replace(
                result,
                text=vocabulary.decode(text.tokens).rstrip(BROKEN).strip(),
                tokens=text.tokens,
                words=spoken,
                truncated=is_lost and text is texts[-1],
            )
            placed = TranscribedSegment.of(part, start_sec + text.start_sec, start_sec + text.end_sec, start_sec)
            yield replace(placed, uncovered=uncovered) if text is texts[-1] else placed
        if uncovered and not texts:
            silent = replace(result, text="", tokens=(), words=() if with_words else None)
            placed = TranscribedSegment.of(silent, start_sec, start_sec + window.end_sec, start_sec)
            yield replace(placed, uncovered=uncovered)
        used = round(end_sec * SAMPLE_RATE)
        held, start = held[used:], start + used
        heard = "".join(vocabulary.decode(text.tokens) for text in texts)  # not what the next window hears again
        context = "" if result.temperature > RESET_TEMPERATURE else f"{options.prompt}{heard}"[-MAX_PROMPT_CHARS:]
        options = replace(options, prompt=context)


def split_at_timestamps(
    tokens: Sequence[int], vocabulary: Vocabulary, window_sec: float, *, truncated: bool = False
) -> tuple[list[TimedTokens], float]:
    """Split a window's tokens at the pairs of times that the model wrote between segments.

    The next window begins, in seconds of this one, at its end, unless a segment was begun there that ends beyond; of a
    text that was truncated, where its last whole segment ends.
    """
    begin = vocabulary.timestamp_begin
    is_time = [token >= begin for token in tokens]
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    ends_whole = is_time[-2:] == [False, True]  # speech ended, and nothing was begun after it
    edges = [0, *cuts, len(tokens)] if ends_whole or not cuts else [0, *cuts]
    texts = []
    for first, last in itertools.pairwise(edges):
        part = tokens[first:last]
        times = [min((token - begin) * TIMESTAMP_STEP_SEC, window_sec) for token in part if token >= begin]
        text = tuple(token for token in part if token < vocabulary.end)
        start_sec, end_sec = times[0] if times else 0.0, times[-1] if len(times) > 1 else window_sec
        if vocabulary.decode(text).strip():
            texts.append(TimedTokens(text, start_sec, max(start_sec, end_sec)))
    goes_on = bool(cuts) and not ends_whole
    if truncated and ends_whole:
        cuts, goes_on = [len(tokens)], True
    last_sec = (tokens[cuts[-1] - 1] - begin) * TIMESTAMP_STEP_SEC if goes_on else 0.0
    return texts, min(last_sec, window_sec) if last_sec > 0 else window_sec


def _words_of_texts(
    engine: Engine, audio: Waveform, texts: Sequence[TimedTokens], options: DecodingOptions, end_sec: float
) -> Iterator[tuple[Word, ...]]:
    """Place all words of a window at once, none beyond where the next begins, and deal them out to its segments."""
    encoded = engine.encode([audio], options.trailing_silence_sec)
    (words,) = engine.align(encoded, [audio], [[token for text in texts for token in text.tokens]], options)
    within = [replace(w, start_sec=min(w.start_sec, end_sec), end_sec=min(w.end_sec, end_sec)) for w in words]
    ends = list(itertools.accumulate(word.tokens for word in within))  # of the words, in tokens
    at = spelt = 0
    for text in texts:
        spelt += len(text.tokens)
        count = len(within) if text is texts[-1] else sum(end <= spelt for end in ends)
        while count > at and count < len(within) and not within[count - 1].tokens:  # spelt by a token of the next text
            count -= 1
        yield tuple(within[at:count])
        at = count
