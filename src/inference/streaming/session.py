"""Live transcription: audio in, committed words out.

A session holds the newest audio, decodes it when enough of it is new, and lets a commit policy decide which words are
final. Speech detection decides when to compute: a pause makes the words so far final, decoded to their end. Whether the
audio before it stays as context depends on what the model was trained on, see `CONTEXT_SILENCE_SEC`. State advances in
steps of one VAD window, so that any chunking of the same audio gives the same transcript.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Literal, Self

import numpy as np
import soxr

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.vad import WINDOW_SAMPLES, SpeechTimeline, VADEvent, VoiceActivityDetector, check_waveform
from src.inference.engines import Engine, transcribe
from src.inference.options import DecodingOptions
from src.inference.streaming.commit import CommitPolicy, Event, find_loop, join_words, make_policy
from src.inference.words import Word, shifted
from src.utils.config import Config
from src.utils.errors import AudioError

# A longer silence drops the audio before it. Models tuned on single sentences stop at the first pause that they hear:
# tiny.en after 90 updates on the sample clips, 100 s of its test split as a stream (2026-11-24, two CPU cores): keeping
# 2 s, WER 0.344 with 22 of 151 words deleted; dropping at each final, 0.199 with 2.
CONTEXT_SILENCE_SEC: Mapping[str, float] = {"full": 2.0, "dynamic": 0.0}
KEEP_SEC = 4.0  # audio kept as context where a full buffer is cut
UNSETTLED_SEC = 2.0  # newest words that are not forced out of a full buffer
ONSET_SEC = 0.2  # kept before speech, beyond the VAD's own padding and delay
SETTLED_SEC = 0.2  # audio after the last speech that an update must have heard to count as the last one
UNCOVERED_SEC = 0.8  # speech after the last word that shows that the decoder stopped early
ALIGN_SLACK_SEC = 0.2  # how far a word's time may lie outside padded speech
BUSY_FACTOR = 1.2  # an update is worth starting after this many times its own duration
EMA_WEIGHT = 0.3  # of the newest update time in the running mean


@dataclass(frozen=True)
class EmittedWord:
    """A committed word, the audio heard when it was committed, and the clock then (both in seconds)."""

    word: Word
    audio_sec: float
    emitted_at: float


@dataclass(frozen=True)
class StreamingResult:
    """A finished session.

    Attributes:
        events: all of them.
        audio_sec: audio heard.
        compute_sec: clock time spent inside the session.
        longest_update_sec: the longest model call.
        updates: number of model calls.
        overruns: blocks that the microphone lost; 0 for files.
    """

    events: tuple[Event, ...]
    audio_sec: float
    compute_sec: float
    longest_update_sec: float
    updates: int
    overruns: int = 0

    @property
    def words(self) -> tuple[EmittedWord, ...]:
        """All committed words."""
        commits = [event for event in self.events if event.kind == "commit"]
        return tuple(EmittedWord(word, event.audio_sec, event.emitted_at) for event in commits for word in event.words)

    @property
    def text(self) -> str:
        """The transcript: exactly the commits, joined."""
        return join_words([emitted.word for emitted in self.words])

    @property
    def rtf(self) -> float:
        """Real-time factor, compute_sec / audio_sec; nan without audio."""
        return self.compute_sec / self.audio_sec if self.audio_sec else math.nan


class StreamingSession:
    """One live session. Several sessions may share an engine; each is used from one thread at a time.

    As a context manager, it flushes at the end of the block.

    Args:
        engine: from `load_engine`.
        vad: speech detector, may be shared; None decodes silence like speech, and is final only at the end.
        config: sections `streaming`, `model` and `inference`.
        context_silence_sec: silence after which the audio before it is dropped; by default `CONTEXT_SILENCE_SEC` of the
            engine's audio context.
        policy: makes a commit policy for each stream; by default the one that `streaming.policy` names.
        clock: seconds, monotone; measures updates and stamps events.

    Attributes:
        sharers: sessions that take turns on the same machine, this one included: updates become that much rarer.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        vad: VoiceActivityDetector | None = None,
        config: Config | None = None,
        context_silence_sec: float | None = None,
        policy: Callable[[], CommitPolicy] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = config or Config()
        self._engine, self._vad, self._clock = engine, vad, clock
        self._settings = config.streaming
        self._options = replace(DecodingOptions.from_config(config), num_beams=1, word_timestamps=True)
        if context_silence_sec is None:
            context_silence_sec = CONTEXT_SILENCE_SEC[engine.audio_context]
        self._context_silence_sec = context_silence_sec
        self._make_policy = policy or partial(make_policy, config.streaming)
        self._pad_sec = vad.config.pad_sec if vad is not None else 0.0
        self._lead_in_sec = ONSET_SEC + self._pad_sec + (vad.config.min_speech_sec if vad is not None else 0.0)
        self.sharers = 1
        self.reset()

    def reset(self) -> None:
        """Forget everything heard; the next `feed` begins a new stream at 0 s."""
        self._buffer = AudioBuffer(self._settings.buffer_sec)
        self._policy = self._make_policy()
        self._timeline = SpeechTimeline(self._vad)
        self._resampler: soxr.ResampleStream | None = None
        self._rate: int | None = None
        self._pending: Waveform = np.zeros(0, dtype=np.float32)
        self._state: Literal["idle", "speech", "ending", "pause"] = "idle"
        self._adaptive = True
        self._transcript: list[Word] = []
        self._finals = 0  # words of the transcript that a final has covered
        self._left = 0  # words of the transcript whose audio left the buffer
        self._hypothesis: tuple[Word, ...] = ()
        self._partial: tuple[Word, ...] = ()
        self._updated_sec = 0.0
        self._outbox: list[Event] = []  # survives an exception, so that no event is lost
        self._sequence = 0
        self.updates, self.compute_sec, self.longest_update_sec, self._mean_update_sec = 0, 0.0, 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.flush()

    @property
    def transcript(self) -> str:
        """All committed words, joined."""
        return join_words(self._transcript)

    @property
    def words(self) -> tuple[Word, ...]:
        """All committed words, in absolute time."""
        return tuple(self._transcript)

    @property
    def audio_sec(self) -> float:
        """Audio heard so far, without what waits to fill a window of 32 ms."""
        return self._buffer.end_sec

    def feed(self, samples: Waveform, sample_rate: int = SAMPLE_RATE) -> list[Event]:
        """Hear more audio.

        Args:
            samples: (T,) float32 in [-1, 1], any T.
            sample_rate: Hz; the same throughout a stream.

        Returns:
            The events that it caused, in order.

        Raises:
            AudioError: not one channel of finite samples, or another rate than before. Errors of the model pass through
                with a note of the time; the audio is kept, and the next call tries again.
        """
        began = self._clock()
        try:
            self._pending = np.concatenate([self._pending, self._resample(samples, sample_rate)])
            while len(self._pending) >= WINDOW_SAMPLES:
                self._hear(self._pending[:WINDOW_SAMPLES])
            self._pending = self._pending.copy()  # a slice would hold all that it was cut from
            return self._take_events()
        finally:
            self.compute_sec += self._clock() - began

    def flush(self) -> list[Event]:
        """Decode what is left, commit all of it, and emit a final. The session may continue afterwards."""
        began = self._clock()
        try:
            if self._resampler is not None:
                tail = self._resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
                self._pending, self._resampler, self._rate = np.concatenate([self._pending, tail]), None, None
            while len(self._pending):
                self._hear(self._pending[:WINDOW_SAMPLES])  # the last may be shorter
            self._follow(self._timeline.finish())
            if self._state == "ending":
                self._end_utterance()
            return self._take_events()
        finally:
            self.compute_sec += self._clock() - began

    def result(self, events: Sequence[Event]) -> StreamingResult:
        """Summarise the session; `events` are all that it has given since the last `reset`."""
        return StreamingResult(tuple(events), self.audio_sec, self.compute_sec, self.longest_update_sec, self.updates)

    def _resample(self, samples: Waveform, sample_rate: int) -> Waveform:
        check_waveform(samples)
        if self._rate not in (None, sample_rate) or sample_rate <= 0:
            raise AudioError(
                f"sample rate {sample_rate} Hz in a stream of {self._rate} Hz; resample it, or reset() for a new stream"
            )
        self._rate = sample_rate
        if sample_rate == SAMPLE_RATE:
            return samples.astype(np.float32, copy=False)
        if self._resampler is None:
            self._resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        return np.asarray(self._resampler.resample_chunk(samples.astype(np.float32, copy=False)))

    def _hear(self, window: Waveform) -> None:
        """Advance by one window; it leaves `_pending` only when nothing before the buffer can fail any more."""
        if self._buffer.free_samples < len(window):
            self._make_room()
        self._pending = self._pending[len(window) :]
        self._buffer.append(window)
        self._follow(self._timeline.hear(window))
        silence_sec = self._buffer.end_sec - self._timeline.end_sec
        if self._state == "ending":
            self._end_utterance()
        elif self._state == "speech":
            if self._buffer.end_sec - self._updated_sec >= self._interval_sec():
                self._update()
        elif self._state == "idle" or silence_sec > self._context_silence_sec:
            self._state = "idle"
            self._drop_audio_before(self._buffer.end_sec - self._lead_in_sec)

    def _follow(self, events: Sequence[VADEvent]) -> None:
        for event in events:
            if event.kind == "start" and self._state in ("idle", "pause"):
                self._updated_sec = event.time_sec  # the first update waits for a chunk of speech
            self._state = "speech" if event.kind == "start" else "ending"

    def _interval_sec(self) -> float:
        """Audio between updates: more than an update takes, so that a slow machine never falls behind for good."""
        chunk_sec = self._policy.interval_sec or self._settings.min_chunk_sec
        return max(chunk_sec, BUSY_FACTOR * self.sharers * self._mean_update_sec) if self._adaptive else chunk_sec

    def _update(self) -> None:
        self._hypothesis = self._decode()
        result = self._policy.update(self._hypothesis, audio_end_sec=self._buffer.end_sec)
        self._commit(result.committed)
        shown_until_sec = self._buffer.end_sec - self._settings.display_guard_sec
        shown = tuple(itertools.takewhile(lambda word: word.end_sec <= shown_until_sec, result.partial))
        if join_words(shown) != join_words(self._partial):
            self._partial = shown
            self._emit("partial", self._partial)

    def _end_utterance(self) -> None:
        """Speech has ended: decode to its end, unless the last update heard it, and commit everything."""
        if self._updated_sec < min(self._timeline.end_sec + SETTLED_SEC, self._buffer.end_sec):
            self._hypothesis = self._decode()
        self._commit(self._policy.flush(self._hypothesis).committed)
        if self._partial:  # nothing of it was committed, but listeners still show it
            self._partial = ()
            self._emit("partial", ())
        if len(self._transcript) > self._finals:
            self._emit("final", tuple(self._transcript[self._finals :]))
            self._finals = len(self._transcript)
        self._state = "pause"

    def _decode(self) -> tuple[Word, ...]:
        """Transcribe the buffer; return the words that lie in speech, in absolute time."""
        samples, held_from_sec = self._buffer.view()
        start_sec = self._policy.window_start_sec(held_from_sec, self._buffer.end_sec)
        samples = samples[round((start_sec - held_from_sec) * SAMPLE_RATE) :].copy()
        prompt = self._prompt()
        prefix = join_words(self._transcript[self._left :]) if self._policy.forces_prefix else ""
        words = self._call_model(samples, start_sec, prompt, prefix)
        if (prompt or prefix) and find_loop(words) is not None:
            words = self._call_model(samples, start_sec)  # the given text may have begun the loop, and would feed it
        # where the decoder stopped early, decode the rest by itself
        while words and self._vad is not None and self._speech_after(words[-1].end_sec) >= UNCOVERED_SEC:
            at_sec = words[-1].end_sec
            rest = self._call_model(samples[round((at_sec - start_sec) * SAMPLE_RATE) :], at_sec)
            if not rest or rest[-1].end_sec <= at_sec:
                break
            words += rest
        self._updated_sec = self._buffer.end_sec
        slack_sec = self._pad_sec + ALIGN_SLACK_SEC
        return tuple(w for w in words if self._timeline.touches(w.start_sec, w.end_sec, slack_sec=slack_sec))

    def _speech_after(self, sec: float) -> float:
        """Return the seconds of speech in the buffer that lie beyond the reach of a word ending at `sec`."""
        return self._timeline.speech_sec(sec + ALIGN_SLACK_SEC, self._buffer.end_sec)

    def _call_model(self, samples: Waveform, start_sec: float, prompt: str = "", prefix: str = "") -> tuple[Word, ...]:
        """Decode audio that begins at `start_sec`; return its words in absolute time, and measure the call."""
        began = self._clock()
        try:
            (result,) = transcribe(self._engine, [samples], replace(self._options, prompt=prompt, prefix=prefix))
        except Exception as err:
            err.add_note(f"while streaming {self._buffer.start_sec:.2f} to {self._buffer.end_sec:.2f} s")
            raise
        spent_sec = self._clock() - began
        weight = EMA_WEIGHT if self.updates else 1.0
        self._mean_update_sec += weight * (spent_sec - self._mean_update_sec)
        self.longest_update_sec = max(self.longest_update_sec, spent_sec)
        self.updates += 1
        return shifted(result.words or (), start_sec)

    def _prompt(self) -> str:
        """Return the newest text whose audio has left the buffer, at most `max_prompt_tokens` of it."""
        budget = self._settings.max_prompt_tokens
        words: list[str] = []
        for word in reversed(self._transcript[max(0, self._left - budget) : self._left]):
            budget -= len(self._engine.vocabulary.encode(" " + word.text))
            if budget < 0:
                break
            words.insert(0, word.text)
        return " ".join(words)

    def _make_room(self) -> None:
        """Cut a full buffer after a committed word; commit the settled words first where there is none."""
        end_sec = self._buffer.end_sec
        if self._state in ("idle", "pause"):
            self._drop_audio_before(end_sec - self._lead_in_sec)
            return
        if self._updated_sec < end_sec:
            self._update()
        cut_sec = self._cut_sec()
        if cut_sec is None:
            unsettled_sec = min(UNSETTLED_SEC, self._settings.buffer_sec / 4)
            settled = [word for word in self._hypothesis if word.end_sec <= end_sec - unsettled_sec]
            self._commit(self._policy.flush(settled).committed)
            cut_sec = self._cut_sec()
        if cut_sec is None:  # no words there: nothing is lost
            cut_sec = end_sec - min(KEEP_SEC, self._settings.buffer_sec / 2)
        self._drop_audio_before(cut_sec)

    def _cut_sec(self) -> float | None:
        """Return the end of a committed word to cut after: the last one that leaves `KEEP_SEC`, else the first."""
        free_at_least_sec = min(1.0, self._settings.buffer_sec / 4)  # otherwise the next cut follows at once
        ends = [word.end_sec for word in self._transcript[self._left :]]
        ends = [end for end in ends if end >= self._buffer.start_sec + free_at_least_sec]
        old = [end for end in ends if end <= self._buffer.end_sec - KEEP_SEC]
        return old[-1] if old else min(ends, default=None)

    def _drop_audio_before(self, sec: float) -> None:
        self._buffer.trim_to(sec)
        self._policy.discard_before(sec)
        self._timeline.discard_before(sec)
        self._hypothesis = tuple(word for word in self._hypothesis if word.end_sec > sec)
        while self._left < len(self._transcript) and self._transcript[self._left].end_sec <= sec:
            self._left += 1

    def _commit(self, words: tuple[Word, ...]) -> None:
        if words:
            self._transcript += words
            self._partial = ()
            self._emit("commit", words)

    def _emit(self, kind: Literal["partial", "commit", "final"], words: tuple[Word, ...]) -> None:
        self._outbox.append(Event(kind, words, join_words(words), self._buffer.end_sec, self._clock(), self._sequence))
        self._sequence += 1

    def _take_events(self) -> list[Event]:
        events, self._outbox = self._outbox, []
        return events


class AudioBuffer:
    """The newest audio of a stream, on the stream's clock: seconds since its first sample.

    Twice the capacity is allocated, so that the content stays contiguous and moves only once per capacity heard.

    Args:
        max_sec: capacity, seconds.
    """

    def __init__(self, max_sec: float) -> None:
        self.capacity_samples = math.ceil(max_sec * SAMPLE_RATE)
        self._memory: Waveform = np.zeros(2 * self.capacity_samples, dtype=np.float32)
        self._at = 0  # first valid sample within the memory
        self._size = 0
        self._start = 0  # the same sample in the stream

    @property
    def start_sec(self) -> float:
        """Time of the oldest sample held."""
        return self._start / SAMPLE_RATE

    @property
    def end_sec(self) -> float:
        """Time of the end of the newest sample: all audio heard."""
        return (self._start + self._size) / SAMPLE_RATE

    @property
    def free_samples(self) -> int:
        """How much can be appended before something must be trimmed."""
        return self.capacity_samples - self._size

    def append(self, samples: Waveform) -> None:
        """Add (T,) float32 at the end; `trim_to` must have made room for it."""
        if len(samples) > self.free_samples:
            raise AudioError(f"{len(samples)} samples do not fit: {self.free_samples} are free; call trim_to first")
        if self._at + self._size + len(samples) > len(self._memory):
            self._memory[: self._size] = self._memory[self._at : self._at + self._size]
            self._at = 0
        end = self._at + self._size
        self._memory[end : end + len(samples)] = samples
        self._size += len(samples)

    def trim_to(self, sec: float) -> None:
        """Drop the audio before a time; a time outside the buffer keeps or drops all of it."""
        drop = min(max(round(sec * SAMPLE_RATE) - self._start, 0), self._size)
        self._at += drop
        self._start += drop
        self._size -= drop

    def view(self) -> tuple[Waveform, float]:
        """Return the audio held, (T,) float32 and valid until the next append, and its start in seconds."""
        return self._memory[self._at : self._at + self._size], self.start_sec
