"""A recording in windows of 30 s, one after the other, each with the text before it as context.

The long-form algorithm of openai/whisper (Radford et al. 2022, section 3.8): the model writes segment times into its
tokens, and the next window begins where the last whole segment ended. It keeps context over cuts, and costs a batch of
one: segments cut at silences are several times faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.labels import TIMESTAMP_STEP_SEC, TimedTokens
from src.data.mel import CONTEXT_SAMPLES
from src.data.vad import VoiceActivityDetector
from src.inference.engines import Engine
from src.inference.files.fallback import FallbackOptions, decode_with_fallback
from src.inference.files.transcription import TranscribedSegment
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.tokens import Vocabulary
from src.inference.words import Word, shifted, split_words

MIN_REST_SEC = 0.5  # a shorter rest at the end holds no word
MAX_PROMPT_CHARS = 2_000  # more than the 223 tokens that a prompt may have
RESET_TEMPERATURE = 0.5  # a text that was drawn above it is no context to trust


def transcribe_sequentially(
    engine: Engine,
    blocks: Iterable[Waveform],
    options: DecodingOptions,
    fallback: FallbackOptions,
    *,
    vad: VoiceActivityDetector | None = None,
) -> Iterator[TranscribedSegment]:
    """Transcribe a recording that arrives in blocks, (n,) float32 at 16 kHz.

    Args:
        options: its prompt stands before the first window; the language of the first window holds for all.
    Yields: segments in order.
    """
    prompt, language = options.prompt, options.language
    window = _Window(blocks)
    while (audio := window.view()) is not None:
        asked = replace(options, timestamps=True, word_timestamps=False, prompt=prompt, language=language)
        (result,) = decode_with_fallback(engine, [audio], asked, fallback, vad=vad)
        language = result.language
        texts, end_sec = split_at_timestamps(result.tokens, engine.vocabulary, len(audio) / SAMPLE_RATE)
        words = None
        if options.word_timestamps:
            words = _words(engine, audio, texts, replace(asked, language=language), end_sec)
        for i, text in enumerate(texts):
            yield _placed(result, text, window.start_sec, engine.vocabulary, None if words is None else words[i])
        window.advance(end_sec)
        heard = "".join(engine.vocabulary.decode(text.tokens) for text in texts)  # not what the next window hears again
        prompt = "" if result.temperature > RESET_TEMPERATURE else f"{prompt}{heard}"[-MAX_PROMPT_CHARS:]


def split_at_timestamps(
    tokens: Sequence[int], vocabulary: Vocabulary, window_sec: float
) -> tuple[list[TimedTokens], float]:
    """Split a window's tokens at the pairs of times that the model wrote between segments.

    Returns: (segments with text; where the next window begins, in seconds of this one: at its end, unless a segment was
        begun there whose end lies beyond).
    """
    begin = vocabulary.timestamp_begin
    is_time = [token >= begin for token in tokens]
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    ends_whole = is_time[-2:] == [False, True]  # speech ended, and nothing was begun after it
    edges = [0, *cuts, len(tokens)] if ends_whole or not cuts else [0, *cuts]
    pieces = [tokens[a:b] for a, b in itertools.pairwise(edges)]
    texts = []
    for piece in pieces:
        times = [min((token - begin) * TIMESTAMP_STEP_SEC, window_sec) for token in piece if token >= begin]
        text = tuple(token for token in piece if token < vocabulary.end)
        start_sec = times[0] if times else 0.0
        end_sec = times[-1] if len(times) > 1 else window_sec
        if vocabulary.decode(text).strip():
            texts.append(TimedTokens(text, start_sec, max(start_sec, end_sec)))
    last_sec = (tokens[cuts[-1] - 1] - begin) * TIMESTAMP_STEP_SEC if cuts else 0.0
    return texts, window_sec if ends_whole or not cuts or last_sec <= 0 else min(last_sec, window_sec)


class _Window:
    """The next 30 s of a recording that arrives in blocks."""

    def __init__(self, blocks: Iterable[Waveform]) -> None:
        self._blocks = iter(blocks)
        self._held: Waveform = np.zeros(0, dtype=np.float32)
        self._start = 0  # samples

    @property
    def start_sec(self) -> float:
        """Where it begins in the recording."""
        return self._start / SAMPLE_RATE

    def view(self) -> Waveform | None:
        """Return (T,) float32 of at most 30 s; None where no word can be left."""
        while len(self._held) < CONTEXT_SAMPLES and (block := next(self._blocks, None)) is not None:
            self._held = np.concatenate([self._held, block])
        return self._held[:CONTEXT_SAMPLES] if len(self._held) >= MIN_REST_SEC * SAMPLE_RATE else None

    def advance(self, sec: float) -> None:
        samples = round(sec * SAMPLE_RATE)
        self._held, self._start = self._held[samples:], self._start + samples


def _words(
    engine: Engine, audio: Waveform, texts: Sequence[TimedTokens], options: DecodingOptions, end_sec: float
) -> list[tuple[Word, ...]]:
    """Place all words of a window at once, none beyond where the next begins, and deal them out to its segments."""
    encoded = engine.encode([audio], options.trailing_silence_sec)
    (words,) = engine.align(encoded, [audio], [[token for text in texts for token in text.tokens]], options)
    words_of = (replace(w, start_sec=min(w.start_sec, end_sec), end_sec=min(w.end_sec, end_sec)) for w in words)
    counts = [sum(bool(word) for word, _ in split_words(engine.vocabulary, text.tokens)) for text in texts]
    return [tuple(itertools.islice(words_of, count)) for count in counts]


def _placed(
    result: DecodingResult, text: TimedTokens, start_sec: float, vocabulary: Vocabulary, words: tuple[Word, ...] | None
) -> TranscribedSegment:
    part = replace(result, text=vocabulary.decode(text.tokens).strip(), tokens=text.tokens)
    placed = TranscribedSegment.of(part, start_sec + text.start_sec, start_sec + text.end_sec)
    return replace(placed, words=None if words is None else shifted(words, start_sec))
