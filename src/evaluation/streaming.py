"""Streaming evaluation: how late, how steady and how right the words of a live session are.

A replay's clock is that of a listener. Audio comes in blocks; block k is complete at a_k. The session takes it up at
b_k, once it has come and the block before is finished, computes for c_k and is finished at e_k:

    b_k = max(e_(k-1), a_k),  e_k = b_k + c_k

So computing hides behind the audio that arrives meanwhile. SimulEval (Ma et al. 2020) adds all computing so far to the
time of the audio, which counts the hidden part too.

A word counts where the committed text has it right, under "plain-v1". For an event e that shows it:

    unaware of computing:  audio heard at e - true end of the word      what the policy costs
    aware of computing:    clock at e - true end of the word            what a listener waits

Commit latency takes for e the event that commits the word; display latency the first event from which on the shown
text (commits and partial) has this word at this place for good. Flicker is normalised erasure (Arivazhagan et al. 2020,
"Re-translation versus streaming") in words, over the texts o_1 .. o_n that are shown one after the other:

    NE = sum_i (|o_(i-1)| - |longest common prefix of o_(i-1) and o_i|) / |o_n|

Intervals resample the stream's clips.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.evaluation.evaluator import EvaluationResult
from src.evaluation.latency import MIN_CALLS
from src.evaluation.metrics import Bootstrap, ErrorRates, MetricsCalculator, PairedComparison
from src.evaluation.streams import SpeechStream
from src.evaluation.text import WHISPER_ENGLISH, error_rate
from src.evaluation.word_timing import Display, WordMatch, find_turns, follow_words, match_words, texts_by_clip
from src.inference.streaming.commit import Event
from src.inference.streaming.microphone import BLOCK_SEC, StreamingASR
from src.inference.streaming.session import StreamingResult, StreamingSession
from src.inference.words import Word
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger

_RATES = ("wer", "wer_low", "wer_high", "wer_plain", "wer_plain_low", "wer_plain_high", "cer",
          "substitutions", "deletions", "insertions", "reference_words", "normalizer")  # fmt: skip


class ReplayClock:
    """Seconds that pass with computing; waiting for audio jumps over them. The replayed session must use it.

    Args:
        timer: seconds of computing. `time.process_time` leaves out what other processes of a busy machine take; a
            constant makes computing free, and the latencies those of the policy alone.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self.restart()

    def __call__(self) -> float:
        """Return the time since the stream began."""
        return self._timer() - self._origin

    def restart(self) -> None:
        """Begin a stream at 0."""
        self._origin = self._timer()

    def wait_until(self, sec: float) -> None:
        """Jump to a time, unless it has passed."""
        self._origin -= max(0.0, sec - self())


@dataclass(frozen=True)
class Replay:
    """A session that heard a whole recording live, and the clock when it was finished, in seconds."""

    result: StreamingResult
    ended_at: float


def replay(session: StreamingSession, audio: Waveform, clock: ReplayClock, *, block_sec: float = BLOCK_SEC) -> Replay:
    """Reset a session and let it hear a recording as if it came live, without sleeping.

    Args:
        session: made with `clock`.
        audio: (T,) float32, 16 kHz.
        clock: restarted here.
        block_sec: how much audio arrives at once.
    """
    session.reset()
    clock.restart()
    events = []
    block = round(block_sec * SAMPLE_RATE)
    for at in range(0, len(audio), block):
        heard = audio[at : at + block]
        clock.wait_until((at + len(heard)) / SAMPLE_RATE)
        events += session.feed(heard)
    events += session.flush()
    return Replay(session.result(events), clock())


@dataclass(frozen=True)
class StreamingEvaluation:
    """A streamed transcript compared with the same model decoding the same clips one by one.

    Attributes:
        stream: what was heard.
        result: of the session.
        rates: of all committed words against the whole reference; one row, so there is no interval.
        offline_wer: of the clips decoded one by one.
    """

    stream: SpeechStream
    result: StreamingResult
    rates: ErrorRates
    offline_wer: float

    def summary(self) -> dict[str, float | int]:
        """Return the figures of one row of metrics.jsonl."""
        return {
            "clips": len(self.stream.clips),
            "audio_sec": self.stream.duration_sec,
            "wer": self.rates.wer,
            "offline_wer": self.offline_wer,
            "deletions": self.rates.deletions,
            "insertions": self.rates.insertions,
            "rtf": self.result.rtf,
            "longest_update_sec": self.result.longest_update_sec,
            "updates": self.result.updates,
        }

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the figures and the transcript to the run's metrics.jsonl."""
        experiment.log("streaming", **self.summary(), text=self.result.text, reference=self.stream.text)


def evaluate_stream(asr: StreamingASR, stream: SpeechStream, offline: EvaluationResult) -> StreamingEvaluation:
    """Stream the audio as fast as possible and compare all committed words with the reference.

    Args:
        asr: the session.
        stream: from `make_stream`.
        offline: the same model's result on a set that contains the stream's clips.

    Raises:
        DataError: a clip of the stream is not in `offline`.
    """
    rows = {row.id: row for row in offline.rows}
    missing = [clip for clip in stream.ids if clip not in rows]
    if missing:
        raise DataError(f"clips of the stream were not measured offline: {', '.join(missing[:5])}")
    result = asr.stream_audio(stream.audio)
    language = "en" if offline.normalizer == WHISPER_ENGLISH else "other"
    rates = MetricsCalculator(language).compute([stream.text], [result.text])
    return StreamingEvaluation(stream, result, rates, error_rate([rows[clip] for clip in stream.ids]))


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval, which is None where there is one clip only."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Latency:
    """Latency of n words or turns, in seconds; p50 is None below 2 of them, p95 below 20 (see `MIN_CALLS`)."""

    n: int
    mean: Estimate
    p50: Estimate | None
    p95: Estimate | None


@dataclass(frozen=True, kw_only=True)
class StreamingMetrics:
    """A session on a stream; None where something was not measured.

    Attributes:
        stream: its name.
        audio_sec: its length.
        clips: different ones; `repeats` is how often the most frequent was heard.
        rates: of the streamed text, cut into its clips by alignment; one row per clip, with all its repeats.
        offline: of the clips decoded one by one.
        difference: of the WER, streamed minus offline.
        commit_unaware, commit_aware, display_unaware, display_aware: of the words committed right.
        first_word_unaware_sec, first_word_aware_sec: from the start of the first word to the first text shown.
        end_of_turn_unaware, end_of_turn_aware: of each `final`, from the true end of the last word it could contain.
        normalized_erasure: see the module.
        words_without_speech: committed within the stream's stretches without speech. A word that is right does not
            count: its time slipped over the edge. None for a stream without such stretches.
        edge_deletions, offline_edge_deletions: first and last words of clips, next to a pause, that are missing.
        updates: model calls.
        rtf, longest_update_sec: of the computing.
        lag_sec: how far the clock is behind the end of the audio when the session has ended.
    """

    stream: str
    audio_sec: float
    clips: int
    repeats: int
    rates: ErrorRates
    offline: ErrorRates | None
    difference: PairedComparison | None
    commit_unaware: Latency | None
    commit_aware: Latency | None
    display_unaware: Latency | None
    display_aware: Latency | None
    first_word_unaware_sec: float | None
    first_word_aware_sec: float | None
    end_of_turn_unaware: Latency | None
    end_of_turn_aware: Latency | None
    normalized_erasure: float | None
    words_without_speech: int | None
    edge_deletions: int
    offline_edge_deletions: int | None
    updates: int
    rtf: float | None
    longest_update_sec: float | None
    lag_sec: float | None

    def to_row(self) -> dict[str, Any]:
        """Return all figures flat, for tables and metrics.jsonl: "wer", "offline_wer", "commit_aware_p50_sec", ...

        The ends of an interval are "_low" and "_high" ("_low_sec", "_high_sec"); what was not measured is None.
        """
        row: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in ("rates", "offline"):
                prefix = "offline_" if name == "offline" else ""
                row |= {f"{prefix}{key}": _part(value, key) for key in _RATES}
            elif name == "difference":
                ends = {"": "difference", "_low": "low", "_high": "high"}
                row |= {f"wer_difference{end}": _part(value, key) for end, key in ends.items()}
            elif name.endswith("aware"):
                row[f"{name}_n"] = _part(value, "n")
                for statistic, (end, key) in itertools.product(
                    ("mean", "p50", "p95"), {"": "value", "_low": "low", "_high": "high"}.items()
                ):
                    row[f"{name}_{statistic}{end}_sec"] = _part(_part(value, statistic), key)
            else:
                row[name] = value
        return row


def _part(whole: Any, name: str) -> Any:
    """Return a field; None where it is nan, which JSON does not know, or where there is no whole."""
    value = getattr(whole, name, None)
    return None if isinstance(value, float) and math.isnan(value) else value


def measure_stream(
    stream: SpeechStream,
    result: StreamingResult,
    *,
    ended_at: float | None = None,
    offline: Sequence[str] | None = None,
    language: str | None = "en",
    bootstrap: Bootstrap | None = None,
) -> StreamingMetrics:
    """Measure a session on a stream.

    Args:
        stream: with the times of its words.
        result: of the session.
        ended_at: the replay's clock when the session had ended. None says that the events carry another clock, on which
            audio did not come in real time: what is aware of computing is None then, and so is the lag.
        offline: the same model's text of each of the stream's clips, in order, decoded one by one.
        language: chooses Whisper's normaliser for the rates; None means English.
        bootstrap: how intervals are drawn.

    Raises:
        DataError: `offline` has another number of texts, or no reference has a word.
    """
    bootstrap = bootstrap or Bootstrap()
    display = follow_words(result.events)
    words = [each.word for each in display.words]
    match = match_words([word.text for word in stream.words], [word.text for word in words])
    computed = result.compute_sec > 0  # else computing took no time on its clock, which measures nothing
    return StreamingMetrics(
        stream=stream.name,
        audio_sec=stream.duration_sec,
        clips=len(set(stream.ids)),
        repeats=stream.repeats,
        **_rates(stream, texts_by_clip(stream, words, match), offline, language, bootstrap),
        **_delays(stream, result.events, display, match, bootstrap, on_clock=ended_at is not None),
        normalized_erasure=display.erased / len(words) if words else None,
        words_without_speech=_count_without_speech(stream, words, match) if stream.no_speech else None,
        edge_deletions=_missing_edges([word.clip for word in stream.words], match),
        offline_edge_deletions=None if offline is None else _offline_missing_edges(stream, offline),
        updates=result.updates,
        rtf=result.rtf if computed else None,
        longest_update_sec=result.longest_update_sec if computed else None,
        lag_sec=None if ended_at is None else ended_at - stream.duration_sec,
    )


def _rates(
    stream: SpeechStream,
    streamed: Sequence[str],
    offline: Sequence[str] | None,
    language: str | None,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Return `rates`, `offline` and `difference`, with one row per different clip: its repeats are not independent."""
    if offline is not None and len(offline) != len(stream.clips):
        raise DataError(
            f"stream {stream.name!r}: {len(offline)} offline texts for {len(stream.clips)} clips; decode each of "
            "stream.clip_audios(), in order"
        )

    def by_clip(texts: Sequence[str]) -> list[str]:
        joined: dict[str, list[str]] = {}
        for clip, text in zip(stream.ids, texts, strict=True):
            joined.setdefault(clip, []).append(text)
        return [" ".join(parts) for parts in joined.values()]

    calculator = MetricsCalculator(language, bootstrap=bootstrap)
    references, live = by_clip([clip.text for clip in stream.clips]), by_clip(streamed)
    rates = calculator.compute(references, live)
    if offline is None:
        return {"rates": rates, "offline": None, "difference": None}
    alone = by_clip(offline)
    difference = calculator.compare(references, alone, live)
    return {"rates": rates, "offline": calculator.compute(references, alone), "difference": difference}


def _delays(
    stream: SpeechStream,
    events: Sequence[Event],
    display: Display,
    match: WordMatch,
    bootstrap: Bootstrap,
    *,
    on_clock: bool,
) -> dict[str, Any]:
    """Return the latencies and the delay of the first word, each unaware of computing and aware of it."""
    right = [(stream.words[said], display.words[place]) for said, place in match.right.items()]
    timed = {
        "commit": [(said, heard.committed) for said, heard in right],
        "display": [(said, heard.stable) for said, heard in right],
        "end_of_turn": find_turns(stream, events, match),
    }
    delays: dict[str, Any] = {}
    for axis, when in (("unaware", "audio_sec"), ("aware", "emitted_at")):
        measured = axis == "unaware" or on_clock
        for name, pairs in timed.items():
            late = [getattr(event, when) - said.end_sec for said, event in pairs]
            clips = [stream.ids[said.clip] for said, _ in pairs]
            delays[f"{name}_{axis}"] = summarize_latency(late, clips, bootstrap) if measured else None
        first_sec = None if display.first is None else getattr(display.first, when) - stream.words[0].start_sec
        delays[f"first_word_{axis}_sec"] = first_sec if measured else None
    return delays


def summarize_latency(
    values_sec: Sequence[float], clips: Sequence[str], bootstrap: Bootstrap | None = None
) -> Latency | None:
    """Summarize latencies; None where there is none.

    Args:
        values_sec: one per word or turn.
        clips: the clip of each, which is what the intervals resample.
        bootstrap: how intervals are drawn.
    """
    if not values_sec:
        return None
    bootstrap = bootstrap or Bootstrap()
    values = np.array(values_sec)  # (n,)
    blocks = np.unique(clips, return_inverse=True)[1].astype(np.int64)  # (n,)
    low, high = bootstrap.interval(values, np.ones(len(values)), blocks)
    mean = Estimate(float(values.mean()), *((None, None) if math.isnan(low) else (low, high)))
    percentiles = [
        Estimate(float(np.percentile(values, q)), *_percentile_interval(values, blocks, q, bootstrap))
        if len(values) >= MIN_CALLS[q]
        else None
        for q in (50, 95)
    ]
    return Latency(len(values), mean, *percentiles)


def _percentile_interval(
    values: NDArray[np.float64], blocks: NDArray[np.int64], q: int, bootstrap: Bootstrap
) -> tuple[float | None, float | None]:
    """Return the interval of a percentile when blocks are drawn with replacement, all values of a block together."""
    count = int(blocks.max()) + 1
    if count < 2:
        return None, None
    order = values.argsort()
    rng = np.random.default_rng(bootstrap.seed)
    found = []
    for _ in range(bootstrap.samples):
        times = np.bincount(rng.integers(0, count, size=count), minlength=count)  # how often each block was drawn
        reached = times[blocks[order]].cumsum()
        found.append(values[order[reached.searchsorted(q / 100 * reached[-1])]])
    return bootstrap.percentiles(found)


def _count_without_speech(stream: SpeechStream, words: Sequence[Word], match: WordMatch) -> int:
    right = set(match.right.values())
    middles = [(word.start_sec + word.end_sec) / 2 for place, word in enumerate(words) if place not in right]
    return sum(begin <= middle < end for middle in middles for begin, end in stream.no_speech)


def _missing_edges(clips: Sequence[int], match: WordMatch) -> int:
    """Count the first and last words of clips that nothing stands for; `clips` has the clip of each word."""
    starts = [i for i, clip in enumerate(clips) if i == 0 or clip != clips[i - 1]]
    edges = {*starts, *(start - 1 for start in starts[1:]), len(clips) - 1}
    return len(edges - set(match.stands_for.values()))


def _offline_missing_edges(stream: SpeechStream, offline: Sequence[str]) -> int:
    missing = 0
    for index, text in enumerate(offline):
        words = [word.text for word in stream.words if word.clip == index]
        missing += _missing_edges([index] * len(words), match_words(words, text.split()))
    return missing
