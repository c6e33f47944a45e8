"""Base class of the engines: from audio to text and words, in steps that each engine computes in its own way."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Literal

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES, padded_samples
from src.data.labels import MAX_LABEL_TOKENS, MIN_NEW_TOKENS
from src.inference.hotwords import HotwordBias
from src.inference.options import DecodingOptions, log_softmax
from src.inference.words import BROKEN, Vocabulary, Word
from src.utils.errors import ModelError
from src.utils.languages import CAP_FACTOR, max_tokens_per_sec, text_language

# A clip at its own length is padded, silence included, to a multiple of it: by at most 1 s, which training shows.
LENGTH_STEP_SEC = 0.5


@dataclass(frozen=True)
class DecodingResult:
    """The text of one clip."""

    text: str  # stripped of surrounding spaces
    tokens: tuple[int, ...]  # of the text, prefix included, and with `timestamps` the times
    avg_logprob: float  # mean natural-log probability of the decoded tokens and the end token
    words: tuple[Word, ...] | None = None  # times within the clip
    language: str | None = None  # given or detected; None where none was given for an English-only model
    no_speech_prob: float | None = None  # of the token for silence; None with torch's beams
    temperature: float = 0.0
    truncated: bool = False  # the text ended at the token cap or at the decoder's 448 positions, not by the end token

    @property
    def compression_ratio(self) -> float:
        """Bytes of the text over its bytes compressed by zlib: loops have more than 2.4 (openai/whisper).

        A character is one byte. In UTF-8, the letters of most scripts begin alike, so that ordinary text compresses as
        a loop does: two Tamil sentences 2.4, here 1.4. Characters beyond ASCII and 127 others have three bytes.
        """
        others = {c: i for i, c in enumerate(dict.fromkeys(c for c in self.text if not c.isascii()))}
        codes = {c: bytes([128 + i]) if i < 127 else b"\xff" + (i - 127).to_bytes(2) for c, i in others.items()}
        data = b"".join(codes.get(c) or c.encode() for c in self.text)
        return len(data) / len(zlib.compress(data)) if data else 0.0


@dataclass(frozen=True)
class Decoded:
    """What the decoder gave for one clip, as tokens; `Engine.decode` makes a `DecodingResult` of it."""

    tokens: Sequence[int]  # those of the forced prefix, then the new ones, without the end token
    avg_logprob: float = math.nan
    no_speech_prob: float | None = None
    probabilities: Sequence[float] = ()  # of the tokens among text tokens, where attention was recorded
    attention: Any = None  # tensor (heads, tokens from the start token on, positions)
    logits: Any = None  # where hotwords are given: (new tokens and the one after them, vocabulary) float32


@lru_cache(maxsize=8)  # a stream asks for each update
def _bias(vocabulary: Vocabulary, terms: tuple[str, ...], strength: float, language: str | None) -> HotwordBias:
    encode = partial(vocabulary.encode, language=language)
    return HotwordBias(terms, encode, end=vocabulary.end, strength=strength)


class Engine(ABC):
    """Turns audio into text in two steps, `encode` and `decode`: audio encoded once can be decoded several times."""

    name: str  # "torch" or "ctranslate2"
    device: str
    precision: str
    audio_context: Literal["full", "dynamic"]
    vocabulary: Vocabulary
    workers: int = 1  # threads that may call it at once and gain speed
    language: str | None = None  # the checkpoint's own
    cap_rates: Mapping[str, float] = MappingProxyType({})  # tokens per second at most, by language: the checkpoint's
    # makes one batch of several that `encode` gave, whose decoder sees each row's own positions alone; None: it cannot
    join: Callable[[Sequence[Any]], Any] | None = None

    @abstractmethod
    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Encode clips of at most 30 s, (T,) float32 each at 16 kHz, as one batch, for `decode` and `align`."""

    def decode(
        self,
        encoded: Any,
        audios: Sequence[Waveform],
        options: DecodingOptions,
        *,
        languages: Sequence[str | None] | None = None,
        max_tokens: int | None = None,
    ) -> list[DecodingResult]:
        """Decode what `encode` returned for these clips: one result per clip, in order.

        `languages` has the language of each clip where it is known, as `languages` takes it. The text before gives way
        to the text that is expected: the decoder has 448 positions for both.
        """
        vocabulary, codes = self.vocabulary, self.languages(encoded, len(audios), options, given=languages)

        # what the decoder is given: previous text, special tokens, the forced beginning of the text
        starts = [vocabulary.start_sequence(code, options.task, timestamps=options.timestamps) for code in codes]
        pairs = zip(audios, codes, strict=True)
        caps = [max_tokens or self._token_cap(len(audio), code, options) for audio, code in pairs]
        # rows get the same tokens, whatever their languages
        style = codes[0] if len({text_language(code, options.task) for code in codes}) == 1 else None
        prompt, prefix = self._context(style, max(caps), options)

        given = [[*prompt, *start, *prefix] for start in starts]
        caps = [min(cap, MAX_LABEL_TOKENS - len(given[0])) for cap in caps]
        rows = self._generate(encoded, given, prefix, caps, options)
        if options.hotwords and not options.temperature:
            bias = partial(_bias, vocabulary, options.hotwords, options.hotword_strength)
            spoken = [text_language(code, options.task) for code in codes]
            begun = [[*prompt, *start] for start in starts]
            rows = [
                self._with_hotwords(bias(spoken[i]), encoded, i, begun[i], row, len(prefix) + caps[i], options)
                for i, row in enumerate(rows)
            ]
        words = self._place(encoded, audios, starts, rows) if options.word_timestamps else [None] * len(rows)
        # a limit may end a text within a character
        texts = [vocabulary.decode(row.tokens).rstrip(BROKEN).strip() for row in rows]
        return [
            DecodingResult(
                text, tuple(row.tokens), row.avg_logprob, placed, code, row.no_speech_prob, options.temperature,
                truncated=len(row.tokens) >= len(prefix) + cap,
            )
            for text, row, placed, code, cap in zip(texts, rows, words, codes, caps, strict=True)
        ]  # fmt: skip

    def contexts(
        self, lengths: Sequence[int], languages: Sequence[str | None] | None, options: DecodingOptions
    ) -> list[object]:
        """Return a key for each clip, equal where the tokens before their texts are: each leaves room for its text."""
        keys: list[object] = []
        for i, (length, code) in enumerate(zip(lengths, languages or [None] * len(lengths), strict=True)):
            code = code or options.language or self.language
            is_open = code is None and self.vocabulary.multilingual  # its style is known when it is heard
            context = self._context(code, self._token_cap(length, code, options), options)
            keys.append(i if is_open else (code, str(context)))
        return keys

    def _context(self, language: str | None, cap: int, options: DecodingOptions) -> tuple[list[int], list[int]]:
        """Return the text before and the forced beginning, as far as a text of `cap` tokens has room."""
        style = text_language(language, options.task)
        room = MAX_LABEL_TOKENS - (4 if self.vocabulary.multilingual else 2) + options.timestamps
        prefix = [*(options.prefix_tokens or self.vocabulary.encode(options.prefix, language=style))][: room - 1]
        room -= len(prefix) + math.ceil(cap / CAP_FACTOR) + 1
        return self.vocabulary.prompt_tokens(options.prompt, language=style, room=room), prefix

    def _with_hotwords(
        self,
        bias: HotwordBias,
        encoded: Any,
        index: int,
        start: list[int],
        row: Decoded,
        cap: int,
        options: DecodingOptions,
    ) -> Decoded:
        """Decode a row again from each token that the bias changes; log-probabilities stay those of the model."""
        settled = list[float]()  # log-probabilities of tokens that are no longer asked about
        while row.logits is not None and (change := bias.first_change(row.tokens, row.logits)):
            at, token = change
            prefix = [*row.tokens[:at], token]
            if len(prefix) >= cap:
                break
            first = len(row.tokens) + 1 - len(row.logits)
            logprobs = log_softmax(row.logits[: at + 1 - first])
            settled += logprobs[range(len(logprobs)), prefix[first:]].tolist()
            given = [[*start, *prefix]]
            (row,) = self._generate(self._row(encoded, index), given, prefix, [cap - len(prefix)], options)
        if not settled:
            return row
        scored = min(len(row.logits), cap - (len(row.tokens) + 1 - len(row.logits)))
        whole = (math.fsum(settled) + row.avg_logprob * scored) / (len(settled) + scored)
        return replace(row, avg_logprob=whole)

    def align(
        self,
        encoded: Any,
        audios: Sequence[Waveform],
        texts: Sequence[Sequence[int]],
        options: DecodingOptions,
    ) -> list[tuple[Word, ...]]:
        """Return the words of known texts (their tokens) with their times in the clips."""
        codes = self.languages(encoded, len(audios), options)
        starts = [self.vocabulary.start_sequence(code, options.task, timestamps=False) for code in codes]
        return self._place(encoded, audios, starts, [Decoded(tokens) for tokens in texts])

    def languages(
        self, encoded: Any, rows: int, options: DecodingOptions, *, given: Sequence[str | None] | None = None
    ) -> list[str | None]:
        """Return the language of each clip: given, else that of the options, the checkpoint's own, or detected.

        None for an English-only model for which none is given.
        """
        default = options.language or self.language
        codes = [code or default for code in given or [None] * rows]
        if self.vocabulary.multilingual and None in codes:
            codes = [code or heard for code, (heard, _) in zip(codes, self.detect(encoded), strict=True)]
        return [self.vocabulary.language_code(code) if code else None for code in codes]

    def detect(self, encoded: Any) -> list[tuple[str, float]]:
        """Return the likeliest language of each row and its probability among all, by one step of the decoder."""
        if not self.vocabulary.multilingual:
            raise ModelError("this is an English-only model: it detects no language; use a multilingual variant")
        return self._detect(encoded)

    def max_tokens_per_sec(self, language: str | None) -> float:
        """Return the rate that ends a text in a language: 2.5 times the ordinary one, or that of the checkpoint.

        None is taken for English. The checkpoint has the rate of its training transcripts, where these are denser.
        """
        return max_tokens_per_sec(language, self.cap_rates)

    def _token_cap(self, samples: int, language: str | None, options: DecodingOptions) -> int:
        """Return the maximum number of new tokens for a clip with this number of samples."""
        rate = options.max_tokens_per_sec or self.max_tokens_per_sec(text_language(language, options.task))
        return MIN_NEW_TOKENS + math.ceil(rate * samples / SAMPLE_RATE)

    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Encode a clip and take the decoder's first step, to measure its latency."""
        encoded = self.encode([audio], options.trailing_silence_sec)
        (result,) = self.decode(encoded, [audio], options, max_tokens=1)
        return next(iter(result.tokens), self.vocabulary.end)

    @abstractmethod
    def _generate(
        self, encoded: Any, given: list[list[int]], prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        """Continue each row of `given` tokens, which end with `prefix`, by at most as many new ones as its cap."""

    def _row(self, encoded: Any, index: int) -> Any:
        """Return one row of what `encode` returned, as a batch of one."""
        return encoded[index : index + 1]

    @abstractmethod
    def _place(
        self, encoded: Any, audios: Sequence[Waveform], starts: list[list[int]], rows: Sequence[Decoded]
    ) -> list[tuple[Word, ...]]:
        """Return the words of each row with their times in its clip."""

    @abstractmethod
    def _detect(self, encoded: Any) -> list[tuple[str, float]]:
        """Return the likeliest language of each row with its probability, for a multilingual model."""


def transcribe(
    engine: Engine,
    audios: Sequence[Waveform],
    options: DecodingOptions,
    *,
    languages: Sequence[str | None] | None = None,
) -> list[DecodingResult]:
    """Encode and decode clips of at most 30 s: one result per clip, in order; `languages` as in `Engine.decode`.

    A text does not depend on the neighbours of its clip: each is padded as it would be alone, and clips share a batch
    of the decoder only if they follow the same tokens, and if they are padded alike or the engine can `join` them.
    """
    lengths, results = [len(audio) for audio in audios], dict[int, DecodingResult]()
    before = options.prompt or options.prefix or options.prefix_tokens
    has_context = bool(before) and len(audios) > 1
    keys = engine.contexts(lengths, languages, options) if has_context else [None] * len(audios)

    def encode(rows: list[int], silence_sec: float) -> Any:
        return engine.encode([audios[i] for i in rows], silence_sec)

    for rows, encoded in encoded_batches(engine, encode, lengths, options, keys):
        spoken: dict[str, Any] = {} if languages is None else {"languages": [languages[i] for i in rows]}
        results |= zip(rows, engine.decode(encoded, [audios[i] for i in rows], options, **spoken), strict=True)
    return [results[i] for i in range(len(audios))]


def encoded_batches(
    engine: Engine,
    encode: Callable[[list[int], float], Any],
    lengths: Sequence[int],
    options: DecodingOptions,
    keys: Sequence[object] | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """Encode clips, each padded as it would be alone: the batches for the decoder, with the places of their clips.

    `encode` takes places and silence of a group; groups and keys are those of `padding_groups`.
    """
    context = getattr(engine, "audio_context", "full")  # not every engine of others says it
    groups = padding_groups(lengths, options.trailing_silence_sec, context, keys)
    parts = ((rows, encode(rows, silence_sec)) for rows, silence_sec in groups)
    join = joining(engine, options)
    if join is None:
        yield from parts
        return
    by_key: dict[object, list[tuple[list[int], Any]]] = defaultdict(list)
    for rows, encoded in parts:
        by_key[keys[rows[0]] if keys else None].append((rows, encoded))
    for same in by_key.values():
        yield [i for rows, _ in same for i in rows], join([encoded for _, encoded in same])


def batchable(engine: Engine, lengths: Sequence[int], options: DecodingOptions) -> list[list[int]]:
    """Part clips into those that may share a batch, by place."""
    if joining(engine, options) is not None:
        return [list(range(len(lengths)))]
    return [rows for rows, _ in padding_groups(lengths, options.trailing_silence_sec, engine.audio_context)]


def joining(engine: Engine, options: DecodingOptions) -> Callable[[Sequence[Any]], Any] | None:
    """Return the engine's `join`, if clips of any lengths may share a batch: beam search takes no mask."""
    return getattr(engine, "join", None) if options.num_beams == 1 else None


def padding_groups(
    lengths: Sequence[int],
    trailing_silence_sec: float,
    audio_context: str,
    keys: Sequence[object] | None = None,
) -> list[tuple[list[int], float]]:
    """Part clips into those that are padded alike, each by its own length: their places, and the silence to add.

    The silence follows the longest clip of a group, as `batch_samples` takes it. Clips of different keys are apart.
    """
    batch_samples(lengths, trailing_silence_sec, audio_context)  # refuses what cannot be encoded
    step, silence = round(LENGTH_STEP_SEC * SAMPLE_RATE), round(trailing_silence_sec * SAMPLE_RATE)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (length, key) in enumerate(zip(lengths, keys or [None] * len(lengths), strict=True)):
        groups[0 if audio_context == "full" else -(-(length + silence) // step), key].append(i)
    return [
        (rows, (steps * step - max(lengths[i] for i in rows)) / SAMPLE_RATE if steps else trailing_silence_sec)
        for (steps, _), rows in groups.items()
    ]


def batch_samples(lengths: Sequence[int], trailing_silence_sec: float, audio_context: str) -> int:
    """Return how many samples clips are padded to: 30 s at full context, else the longest clip and silence."""
    if not lengths:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(lengths)
    if longest > CONTEXT_SAMPLES:
        sec = longest / SAMPLE_RATE
        raise ModelError(f"a clip of {sec:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio")
    own = padded_samples(longest + round(trailing_silence_sec * SAMPLE_RATE))
    return CONTEXT_SAMPLES if audio_context == "full" else own
