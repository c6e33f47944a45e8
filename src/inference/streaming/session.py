"""Live transcription: audio in, committed words out.

A session holds the newest audio, decodes it when enough of it is new, and lets a commit policy decide which words are
final. Speech detection decides when to compute: a pause makes the words so far final, decoded to their end. State
advances in steps of one VAD window, so that any chunking of the same audio gives the same transcript. A language that
is neither given nor the checkpoint's own is detected once, on enough speech, and kept until `reset`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soxr

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.labels import MAX_LABEL_TOKENS
from src.data.vad import WINDOW_SAMPLES, SpeechTimeline, VADEvent, VoiceActivityDetector, check_waveform
from src.inference.coverage import ALIGN_SLACK_SEC, UNCOVERED_SEC
from src.inference.engine_base import Engine
from src.inference.engines import engine_of
from src.inference.hotwords import read_hotwords
from src.inference.options import DecodingOptions
from src.inference.streaming.commit import CHUNK_OVERLAP_SEC, CommitPolicy, Event, find_loop, make_policy
from src.inference.streaming.microphone import BrowserMicrophone, Microphone, in_real_time
from src.inference.words import Word, cut_words, join_words, shifted, whole_tokens
from src.utils.config import Config
from src.utils.errors import AudioError
from src.utils.languages import CAP_FACTOR, FAST_SPEECH, space_between, text_language
from src.utils.runtime import in_colab, in_notebook

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]

# A longer silence drops the audio before it. Models tuned on single sentences stop at the first pause that they hear:
# tiny.en after 90 updates on the sample clips, 100 s of its test split as a stream (2026-11-24, two CPU cores): keeping
# 2 s, WER 0.344 with 22 of 151 words deleted; dropping at each final, 0.199 with 2.
CONTEXT_SILENCE_SEC = {"full": 2.0, "dynamic": 0.0}
KEEP_SEC = 4.0  # audio kept as context where a full buffer is cut
UNSETTLED_SEC = 2.0  # newest words that are not forced out of a full buffer
ONSET_SEC = 0.2  # kept before speech, beyond the VAD's own padding and delay
SETTLED_SEC = 0.2  # audio after the last speech that an update must have heard to count as the last one
BUSY_FACTOR = 1.2  # an update is worth starting after this many times its own duration
EMA_WEIGHT = 0.3  # of the newest update time in the running mean

# When a session's language is settled. Of base's guesses on 1, 2 and 3 s (espeak-ng in 16 languages, English of 20
# speakers; 2026-11-30) none of at least 0.9 was wrong, but a quarter of those from 0.7 to 0.9.
FIRST_GUESS_SEC = 1.0  # of speech, before which nothing is decoded unless it ends
ENOUGH_SPEECH_SEC = 3.0  # settles it
CERTAIN = 0.9  # probability that settles it earlier

MIN_REST_SEC = 0.2  # of audio after a text that ended at a limit; less has no word
START_TOKENS = 5  # before the text: previous text, start, language, task, no timestamps


@dataclass(frozen=True)
class StreamingResult:
    """A finished session."""

    events: tuple[Event, ...]
    audio_sec: float  # heard
    compute_sec: float  # by the clock, inside the session
    longest_update_sec: float  # of the model calls
    updates: int  # model calls
    overruns: int = 0  # blocks that the microphone lost
    language: str | None = None  # of the newest words: given, the checkpoint's own, or detected
    truncated: int = 0  # texts that ended at a limit of the decoder and were committed so, with audio left

    @property
    def text(self) -> str:
        """The transcript: exactly the commits, joined."""
        return join_words(word for event in self.events if event.kind == "commit" for word in event.words)

    @property
    def rtf(self) -> float:
        """Real-time factor, compute_sec / audio_sec; nan without audio."""
        return self.compute_sec / self.audio_sec if self.audio_sec else math.nan


class StreamingASR:
    """One live session: `feed` it, or give it a file, an array or the microphone.

    Several sessions may share an engine, or a model, also in several threads; a session is used from one at a time.

    Args:
        model: a `DynamicWhisper`, in the context that its config says; not needed with `engine`.
        processor: its `WhisperProcessor`.
        engine: from `load_engine`, instead of a model: CTranslate2 is the fastest on a CPU.
        vad: speech detector, may be shared; None decodes silence like speech, and only the end of the stream is final.
        config: sections `streaming`, `model` and `inference`.
        context_silence_sec: silence after which the audio before it is dropped; by default `CONTEXT_SILENCE_SEC` of the
            engine's audio context.
        policy: makes a commit policy for each stream; by default the one that `streaming.policy` names.
        clock: seconds, monotone; measures updates and stamps events.
    """

    def __init__(
        self,
        model: Any = None,
        processor: Any = None,
        *,
        engine: Engine | None = None,
        vad: VoiceActivityDetector | None = None,
        config: Config | None = None,
        context_silence_sec: float | None = None,
        policy: Callable[[], CommitPolicy] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        engine, config = engine_of(model, processor, engine), config or Config()
        self._engine, self._vad, self._clock = engine, vad, clock
        self._settings = config.streaming
        own: Any = {"num_beams": 1, "word_timestamps": True, "hotwords": read_hotwords(config.inference.hotwords)}
        self._options = replace(DecodingOptions.from_config(config), **own)
        silence_sec = CONTEXT_SILENCE_SEC[engine.audio_context] if context_silence_sec is None else context_silence_sec
        self._context_silence_sec = silence_sec
        self._make_policy = policy or (lambda: make_policy(config.streaming))
        self._pad_sec = vad.config.pad_sec if vad is not None else 0.0
        self._lead_in_sec = ONSET_SEC + self._pad_sec + (vad.config.min_speech_sec if vad is not None else 0.0)
        self.sharers = 1  # sessions that take turns on this machine: updates become that much rarer
        self.reset()

    def reset(self) -> None:
        """Forget everything heard; the next `feed` begins a new stream at 0 s."""
        self._audio: Waveform = np.zeros(0, dtype=np.float32)  # held, then what has not been heard yet
        self._start = self._heard = 0  # samples of the stream before those held, and heard
        self._policy = self._make_policy()
        self._timeline = SpeechTimeline(self._vad, self._settings.end_of_turn_sec)
        self._resampler: soxr.ResampleStream | None = None
        self._rate: int | None = None
        self._state: Literal["idle", "speech", "ending", "pause"] = "idle"
        self._adaptive = True  # update less often on a slow machine
        self._language = self._options.language or self._engine.language
        self._guesses: dict[float, tuple[str, float, float]] = {}  # by utterance: code, probability, seconds of speech
        self._settle_language(self._language is not None or len(self._engine.vocabulary.languages) < 2)
        self._transcript: list[Word] = []
        self._finals = 0  # words of the transcript that a final has covered
        self._left = 0  # words of the transcript whose audio left the buffer
        self._hypothesis: tuple[Word, ...] = ()
        self._tail: tuple[Word, ...] = ()  # of the hypothesis, not committed
        self._partial: tuple[Word, ...] = ()
        self._updated_sec = self._guessed_sec = self._speech_from_sec = 0.0
        self._truncated = 0
        self._cut_at_sec: float | None = None  # where the newest hypothesis ended at a limit
        self._outbox: list[Event] = []  # survives an exception, so that no event is lost
        self._sequence = 0
        self.updates, self.compute_sec, self.longest_update_sec, self._mean_update_sec = 0, 0.0, 0.0, 0.0

    @property
    def transcript(self) -> str:
        """All committed words, joined."""
        return join_words(self._transcript)

    @property
    def words(self) -> tuple[Word, ...]:
        """All committed words, in absolute time."""
        return tuple(self._transcript)

    @property
    def language(self) -> str | None:
        """That the audio is decoded in: given, the checkpoint's own, or detected; None until then."""
        return self._language

    @property
    def audio_sec(self) -> float:
        """Audio heard so far, without what waits to fill a window of 32 ms."""
        return self._heard / SAMPLE_RATE

    def iter_file(self, path: str | Path) -> Iterator[Event]:
        """Reset, then yield the events of a file, fed in chunks of `min_chunk_sec` as fast as they are decoded."""
        return self.iter_audio(load_audio(path, allow_silence=True))

    def iter_audio(self, audio: Waveform) -> Iterator[Event]:
        """As `iter_file`, for (T,) float32 at 16 kHz."""
        chunk = round(self._settings.min_chunk_sec * SAMPLE_RATE)
        chunks = ((audio[at : at + chunk], SAMPLE_RATE) for at in range(0, len(audio), chunk))
        return self._listen(chunks, adaptive=False)  # nobody waits: update as often as a fast machine would live

    def stream_from_file(
        self, path: str | Path, *, real_time: bool = False, on_event: OnEvent | None = None
    ) -> StreamingResult:
        """As `iter_file`; `real_time` hears it no faster than it was recorded, as a microphone would.

        `on_event` is called with each event as it comes, in this thread.
        """
        if not real_time:
            return self._gather(self.iter_file(path), on_event)
        blocks = in_real_time(load_audio(path, allow_silence=True))
        return self._gather(self._listen((block, SAMPLE_RATE) for block in blocks), on_event)

    def stream_audio(self, audio: Waveform) -> StreamingResult:
        """Transcribe (T,) float32 at 16 kHz as a stream; see `iter_file`."""
        return self._gather(self.iter_audio(audio))

    def stream_from_microphone(self, duration_sec: float, *, on_event: OnEvent | None = None) -> StreamingResult:
        """As `stream_from_file`, for so much audio of the microphone: in Colab the browser's, else this machine's."""
        microphone: Microphone | BrowserMicrophone
        if in_colab() and in_notebook():
            microphone = BrowserMicrophone(duration_sec)
            logger.info("recording %g s from the browser's microphone; allow it if the browser asks", duration_sec)
        else:
            microphone = Microphone(duration_sec)
            where = "recording %g s from this machine's microphone at %d Hz"
            logger.info(where, duration_sec, microphone.sample_rate)
        with contextlib.closing(microphone.blocks()) as blocks:  # an error must not leave it open
            events = self._listen((block, microphone.sample_rate) for block in blocks)
            return replace(self._gather(events, on_event), overruns=microphone.overruns)

    def _listen(self, blocks: Iterable[tuple[Waveform, int]], *, adaptive: bool = True) -> Iterator[Event]:
        """Reset, then yield the events of samples that come with their rate in Hz, until there are no more."""
        self.reset()
        self._adaptive = adaptive
        for samples, sample_rate in blocks:
            yield from self.feed(samples, sample_rate)
        yield from self.flush()

    def _gather(self, events: Iterable[Event], on_event: OnEvent | None = None) -> StreamingResult:
        gathered = []
        for event in events:
            gathered.append(event)
            if on_event is not None:
                on_event(event)
        return self.result(gathered)

    def result(self, events: Sequence[Event]) -> StreamingResult:
        """Summarise the session; `events` are all that it has given since the last `reset`."""
        return StreamingResult(
            tuple(events), self.audio_sec, self.compute_sec, self.longest_update_sec, self.updates,
            language=self._language, truncated=self._truncated,
        )  # fmt: skip

    def feed(self, samples: Waveform, sample_rate: int = SAMPLE_RATE) -> list[Event]:
        """Hear more audio, and return the events that it caused, in order.

        Args:
            samples: (T,) float32 in [-1, 1], any T.
            sample_rate: Hz; the same throughout a stream.

        Raises:
            AudioError: not one channel of finite samples, or another rate than before. Errors of the model pass through
                with a note of the time; the audio is kept, and the next call tries again.
        """
        return self._advance(samples, sample_rate, last=False)

    def flush(self) -> list[Event]:
        """Decode what is left, commit all of it, and emit a final. The session may continue afterwards."""
        return self._advance(np.zeros(0, dtype=np.float32), self._rate or SAMPLE_RATE, last=True)

    def _advance(self, samples: Waveform, sample_rate: int, *, last: bool) -> list[Event]:
        began = self._clock()
        try:
            self._audio = np.concatenate([self._audio, self._resample(samples, sample_rate, last=last)])
            while (waiting := self._start + len(self._audio) - self._heard) >= WINDOW_SAMPLES or (last and waiting):
                self._hear(min(waiting, WINDOW_SAMPLES))
            if last:
                self._follow(self._timeline.finish())
                if self._state == "ending":
                    self._end_utterance()
        finally:
            self._audio = self._audio.copy()  # a slice would hold all that it was cut from
            self.compute_sec += self._clock() - began
        events, self._outbox = self._outbox, []
        return events

    def _resample(self, samples: Waveform, sample_rate: int, *, last: bool) -> Waveform:
        check_waveform(samples)
        if self._rate not in (None, sample_rate) or sample_rate <= 0:
            raise AudioError(
                f"sample rate {sample_rate} Hz in a stream of {self._rate} Hz; resample it, or reset() for a new stream"
            )
        self._rate = sample_rate
        samples = samples.astype(np.float32, copy=False)
        if sample_rate != SAMPLE_RATE:
            if self._resampler is None:
                self._resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
            samples = np.asarray(self._resampler.resample_chunk(samples, last=last))
        if last:
            self._resampler = self._rate = None
        return samples

    def _hear(self, size: int) -> None:
        """Hear a window, or what is left at the end; where making room fails, the next call hears it."""
        if self._heard + size - self._start > math.ceil(self._buffer_sec * SAMPLE_RATE):
            self._make_room()
        at = self._heard - self._start
        self._heard += size
        self._follow(self._timeline.hear(self._audio[at : at + size]))
        if self._state == "ending":
            self._end_utterance()
        elif self._state == "speech":
            # more audio than an update takes, so that a slow machine never falls behind for good
            busy_sec = BUSY_FACTOR * self.sharers * self._mean_update_sec if self._adaptive else 0.0
            chunk_sec = self._policy.interval_sec or self._settings.min_chunk_sec
            too_early = not self._language_settled and self._speech_sec() < FIRST_GUESS_SEC
            if self.audio_sec - self._updated_sec >= max(chunk_sec, busy_sec) and not too_early:
                self._update()
        elif self._state == "idle" or self.audio_sec - self._timeline.end_sec > self._context_silence_sec:
            self._state = "idle"
            self._drop_audio_before(self.audio_sec - self._lead_in_sec)

    def _follow(self, events: Sequence[VADEvent]) -> None:
        for event in events:
            if event.kind == "start" and self._state in ("idle", "pause"):
                self._updated_sec = event.time_sec  # the first update waits for a chunk of speech
                self._speech_from_sec = event.time_sec
            self._state = "speech" if event.kind == "start" else "ending"

    def _update(self) -> None:
        self._hypothesis = self._decode()
        self._tail = self._hypothesis
        if self._language_settled:  # nothing is final in a language that is a guess
            whole = self._hypothesis if self._cut_at_sec is None else _without_last(self._hypothesis)
            committed, tail = self._policy.update(whole, audio_end_sec=self.audio_sec)
            self._tail = tail + self._hypothesis[len(whole) :]
            self._commit(committed)
        shown_until_sec = self.audio_sec - self._settings.display_guard_sec
        shown = tuple(itertools.takewhile(lambda word: word.end_sec <= shown_until_sec, self._tail))
        if join_words(shown) != join_words(self._partial):
            self._partial = shown
            self._emit("partial", shown)

    def _end_utterance(self) -> None:
        """Speech has ended: decode to its end, unless the last update heard it, and commit everything."""
        if self._updated_sec < min(self._timeline.end_sec + SETTLED_SEC, self.audio_sec):
            self._hypothesis = self._decode()
        self._commit(self._policy.flush(self._hypothesis))
        self._note_truncated()
        self._tail = ()
        if self._partial:  # nothing of it was committed, but listeners still show it
            self._partial = ()
            self._emit("partial", ())
        if len(self._transcript) > self._finals:
            self._emit("final", tuple(self._transcript[self._finals :]))
            self._finals = len(self._transcript)
        self._state = "pause"

    def _decode(self) -> tuple[Word, ...]:
        """Transcribe the audio held; return the words that lie in speech, in absolute time."""
        held_from_sec = self._start / SAMPLE_RATE
        # a window of the newest audio, and what came since the last update, where updates are late
        window_sec, new_sec = self._policy.window_sec, self.audio_sec - self._updated_sec
        window_sec = window_sec if new_sec <= window_sec else new_sec + CHUNK_OVERLAP_SEC
        start_sec = max(held_from_sec, self.audio_sec - window_sec)
        samples = self._audio[round((start_sec - held_from_sec) * SAMPLE_RATE) : self._heard - self._start]
        prompt = self._prompt()
        forced = self._transcript[self._left :] if self._policy.forces_prefix else []
        before = self._transcript[-1:]
        self._cut_at_sec = None
        words, is_cut = self._call_model(samples, start_sec, before, prompt, forced)
        if (prompt or forced) and find_loop(words) is not None:
            forced = []
            words, is_cut = self._call_model(samples, start_sec, before)  # the given text may have begun the loop
        # where the decoder stopped early, decode the rest by itself: at a pause, or at its limit, perhaps within a word
        while words:
            is_cut = is_cut and find_loop(words) is None
            kept = _without_last(words) if is_cut else words
            at_sec = words[len(kept)].start_sec if is_cut else words[-1].end_sec
            unread_sec = self._timeline.speech_sec(at_sec + ALIGN_SLACK_SEC, self.audio_sec) if self._vad else 0.0
            if not is_cut and unread_sec < UNCOVERED_SEC:
                break
            rest_samples = samples[round((at_sec - start_sec) * SAMPLE_RATE) :]
            rest: tuple[Word, ...] = ()
            if at_sec > start_sec and len(rest_samples) >= MIN_REST_SEC * SAMPLE_RATE:
                rest, rest_is_cut = self._call_model(rest_samples, at_sec, kept[-1:])
            if not rest or rest[-1].end_sec <= at_sec or (rest_is_cut and rest[-1].start_sec <= at_sec):
                self._cut_at_sec = at_sec if is_cut else None
                break
            words, is_cut = kept + rest, rest_is_cut
        self._updated_sec = self.audio_sec
        slack_sec = self._pad_sec + ALIGN_SLACK_SEC
        known = len(forced) if words[: len(forced)] == tuple(forced) else 0
        return words[:known] + tuple(
            w for w in words[known:] if self._timeline.touches(w.start_sec, w.end_sec, slack_sec=slack_sec)
        )

    def _call_model(
        self,
        samples: Waveform,
        start_sec: float,
        before: Sequence[Word],
        prompt: str = "",
        forced: Sequence[Word] = (),
    ) -> tuple[tuple[Word, ...], bool]:
        """Decode audio that begins at `start_sec`, and measure the call.

        Returns:
            The words in absolute time, and whether the text ended at a limit. They begin with those that were forced,
            if the engine knows its tokens. Otherwise the first word follows `before`: a decoder does not know whether
            a space belongs there.
        """
        began = self._clock()
        try:
            encoded = self._engine.encode([samples], self._options.trailing_silence_sec)
            if not self._language_settled and self._guessed_sec < self.audio_sec:
                self._guess_language(encoded)
            tokens: tuple[int, ...] = ()
            if any(word.token_ids for word in forced):
                written = text_language(self._language, self._options.task)
                tokens = tuple(self._engine.vocabulary.spell(forced, language=written))
            prefix = join_words(forced)
            options = replace(
                self._options, language=self._language, prompt=prompt, prefix=prefix, prefix_tokens=tokens
            )
            (result,) = self._engine.decode(encoded, [samples], options)
        except Exception as err:
            err.add_note(f"while streaming {self._start / SAMPLE_RATE:.2f} to {self.audio_sec:.2f} s")
            raise
        spent_sec = self._clock() - began
        self._mean_update_sec += (EMA_WEIGHT if self.updates else 1.0) * (spent_sec - self._mean_update_sec)
        self.longest_update_sec = max(self.longest_update_sec, spent_sec)
        self.updates += 1
        words = shifted(result.words or (), start_sec)
        if tokens and result.tokens[: len(tokens)] == tokens:
            words = (*forced, *cut_words(self._engine.vocabulary.words_after(words, len(tokens))))
        elif words := cut_words(words):
            space = bool(before and space_between(before[-1].text, words[0].text))
            words = replace(words[0], space=space), *words[1:]
        return words, result.truncated

    def _guess_language(self, encoded: Any) -> None:
        """Detect the language of the audio held; enough speech, or a high probability, settles it.

        Utterances that were too short to settle it count together: their guesses are weighted by probability and
        length.
        """
        ((code, probability),) = self._engine.detect(encoded)
        self._guessed_sec, speech_sec = self.audio_sec, self._speech_sec()
        self._guesses[self._speech_from_sec] = code, probability, speech_sec
        weights: Counter[str] = Counter()
        for said, certainty, sec in self._guesses.values():
            weights[said] += certainty * sec  # type: ignore[assignment]
        ((self._language, _),) = weights.most_common(1)
        is_certain = probability >= CERTAIN and speech_sec >= FIRST_GUESS_SEC
        self._settle_language(is_certain or sum(sec for _, _, sec in self._guesses.values()) >= ENOUGH_SPEECH_SEC)
        if self._language_settled:
            logger.info("the stream's language: %s, after %.1f s", self._language, self.audio_sec)

    def _settle_language(self, settled: bool) -> None:
        """Note whether the language is decided; the buffer holds no more fast speech in it than the decoder writes."""
        self._language_settled = settled
        rate = self._engine.max_tokens_per_sec(text_language(self._language, self._options.task))
        room = MAX_LABEL_TOKENS - START_TOKENS - self._settings.max_prompt_tokens
        self._buffer_sec = min(self._settings.buffer_sec, room / (rate / CAP_FACTOR * FAST_SPEECH))

    def _speech_sec(self) -> float:
        """Return how much speech the utterance has so far."""
        return self._timeline.speech_sec(self._speech_from_sec, self.audio_sec)

    def _note_truncated(self) -> None:
        """Note that all of the hypothesis was committed, where it ended at a limit: the next one cannot correct it."""
        if self._cut_at_sec is not None:
            self._truncated += 1
            if self._truncated == 1:
                what = "a text ended at the decoder's limit at %.2f s, the rest is lost; lower streaming.buffer_sec"
                logger.warning(what, self._cut_at_sec)
            self._cut_at_sec = None

    def _prompt(self) -> str:
        """Return the newest text whose audio has left the buffer, at most `max_prompt_tokens` of it."""
        budget = self._settings.max_prompt_tokens
        words = self._transcript[max(0, self._left - budget) : self._left]

        def tokens(count: int) -> int:
            return len(self._engine.vocabulary.encode(join_words(words[len(words) - count :])))

        fitting = bisect.bisect_right(range(len(words) + 1), budget, key=tokens) - 1
        return join_words(words[len(words) - fitting :])

    def _make_room(self) -> None:
        """Cut a full buffer after a committed word; nothing that the newest hypothesis has and no commit is cut off.

        Where there is no such word, those that are settled are committed first, and then one after the other.
        """
        end_sec = self.audio_sec
        if self._state in ("idle", "pause"):
            self._drop_audio_before(end_sec - self._lead_in_sec)
            return
        if self._updated_sec < end_sec:
            self._update()
        settled_sec = end_sec - min(UNSETTLED_SEC, self._buffer_sec / 4)
        for until_sec in (settled_sec, *(word.end_sec for word in self._tail if word.end_sec > settled_sec)):
            if self._cut_sec() is None:
                count = whole_tokens(self._hypothesis, sum(word.end_sec <= until_sec for word in self._hypothesis))
                self._commit(self._policy.flush(self._hypothesis[:count]))
                self._tail = self._tail[max(0, len(self._tail) - len(self._hypothesis) + count) :]
        cut_sec = self._cut_sec()
        if cut_sec is None:  # no words there: nothing is lost
            cut_sec = end_sec - min(KEEP_SEC, self._buffer_sec / 2)
        if self._cut_at_sec is not None and self._cut_at_sec < cut_sec:
            self._note_truncated()
        self._drop_audio_before(cut_sec)

    def _cut_sec(self) -> float | None:
        """Return the end of a committed token to cut after: the last one that leaves `KEEP_SEC`, else the first."""
        free_at_least_sec = min(1.0, self._buffer_sec / 4)  # otherwise the next cut follows at once
        earliest_sec = self._start / SAMPLE_RATE + free_at_least_sec
        held = self._transcript[self._left :]
        whole = (word for at, word in enumerate(held) if whole_tokens(held, at + 1) == at + 1)
        ends = [word.end_sec for word in whole if word.end_sec >= earliest_sec]
        old = [end for end in ends if end <= self.audio_sec - KEEP_SEC]
        cut_sec = old[-1] if old else min(ends, default=None)
        return cut_sec if cut_sec is None or self._free_before(cut_sec) >= earliest_sec else None

    def _free_before(self, sec: float) -> float:
        """Return how far audio before a time may be dropped: to the first word that is not committed."""
        return min([sec, *(word.start_sec for word in self._tail)])

    def _drop_audio_before(self, sec: float) -> None:
        """Drop the audio and the words before a time; a word that is not committed keeps its audio."""
        dropped = min(max(round(self._free_before(sec) * SAMPLE_RATE) - self._start, 0), self._heard - self._start)
        self._audio, self._start = self._audio[dropped:], self._start + dropped
        self._policy.discard_before(sec)
        self._timeline.discard_before(sec)
        self._hypothesis = tuple(word for word in self._hypothesis if word.end_sec > sec)
        held = self._transcript[self._left :]
        self._left += whole_tokens(held, sum(word.end_sec <= sec for word in held))

    def _commit(self, words: tuple[Word, ...]) -> None:
        if words:
            self._transcript += words
            self._partial = ()
            self._emit("commit", words)

    def _emit(self, kind: Literal["partial", "commit", "final"], words: tuple[Word, ...]) -> None:
        text, now = join_words(words), self._clock()
        self._outbox.append(Event(kind, words, text, self.audio_sec, now, self._sequence, self._language))
        self._sequence += 1


def _without_last(words: tuple[Word, ...]) -> tuple[Word, ...]:
    """Return the words before those of the last token, which a limit may have cut."""
    return words[: whole_tokens(words, len(words) - 1)]
