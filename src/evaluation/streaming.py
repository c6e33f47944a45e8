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

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.audio import SAMPLE_RATE, Waveform
from src.evaluation.evaluator import EvaluationResult
from src.evaluation.latency import MIN_CALLS
from src.evaluation.metrics import Bootstrap, ErrorRates, MetricsCalculator
from src.evaluation.streams import SpeechStream
from src.evaluation.text import WHISPER_ENGLISH, error_rate
from src.evaluation.word_timing import Display, WordMatch, find_turns, follow_words, match_words, texts_by_clip
from src.inference.streaming.commit import Event
from src.inference.streaming.microphone import BLOCK_SEC
from src.inference.streaming.session import StreamingASR, StreamingResult
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


def replay(session: StreamingASR, audio: Waveform, clock: ReplayClock, *, block_sec: float = BLOCK_SEC) -> Replay:
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


def measure_stream(
    stream: SpeechStream,
    result: StreamingResult,
    *,
    ended_at: float | None = None,
    offline: Sequence[str] | None = None,
    language: str | None = "en",
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Measure a session on a stream.

    Args:
        stream: with the times of its words.
        result: of the session.
        ended_at: the replay's clock when the session had ended. None says that the events carry another clock, on which
            audio did not come in real time: what is aware of computing is None then, and so is the lag.
        offline: the same model's text of each of the stream's clips, in order, decoded one by one.
        language: chooses Whisper's normaliser for the rates; None means English.
        bootstrap: how intervals are drawn.

    Returns:
        One flat row for tables and metrics.jsonl; None if not measured. An interval ends at "_low" and "_high".
        - stream, audio_sec, clips (different ones), repeats (how often the most frequent was heard), updates (model
          calls), rtf and longest_update_sec (of the computing), lag_sec (of the clock behind the end of the audio, when
          the session has ended);
        - wer, wer_plain, cer, substitutions, deletions, insertions, reference_words, normalizer: of the streamed text,
          cut into its clips by alignment, one row per clip with all its repeats; with "offline_" those of the clips
          decoded one by one; wer_difference is streamed minus offline;
        - commit, display and end_of_turn, each with "_unaware" and "_aware" (of computing), as "_n", "_mean_sec",
          "_p50_sec" and "_p95_sec": latency of the words committed right, and of each `final` from the true end of the
          last word it could contain; p50 needs 2 of them, p95 needs 20 (see `MIN_CALLS`);
        - first_word_unaware_sec, first_word_aware_sec: from the start of the first word to the first text shown;
        - normalized_erasure: see the module;
        - words_without_speech: committed within the stream's stretches without speech. A word that is right does not
          count: its time slipped over the edge;
        - edge_deletions, offline_edge_deletions: first and last words of clips, next to a pause, that are missing.

    Raises:
        DataError: the stream has no word times, `offline` has another number of texts, or no reference has a word.
    """
    bootstrap = bootstrap or Bootstrap()
    if not stream.words:
        raise DataError(f"stream {stream.name!r}: its words have no times; join clips that WordAligner has aligned")
    if offline is not None and len(offline) != len(stream.clips):
        raise DataError(
            f"stream {stream.name!r}: {len(offline)} offline texts for {len(stream.clips)} clips; decode each of "
            "stream.clip_audios(), in order"
        )
    display = follow_words(result.events)
    words = [each.word for each in display.words]
    match = match_words([word.text for word in stream.words], [word.text for word in words])
    computed = result.compute_sec > 0  # else computing took no time on its clock, which measures nothing
    row = {
        "stream": stream.name,
        "audio_sec": stream.duration_sec,
        "clips": len(set(stream.ids)),
        "repeats": stream.repeats,
        **_rates(
            stream, texts_by_clip(stream, words, match), offline, MetricsCalculator(language, bootstrap=bootstrap)
        ),
        **_delays(stream, result.events, display, match, bootstrap, on_clock=ended_at is not None),
        "normalized_erasure": display.erased / len(words) if words else None,
        "words_without_speech": _count_without_speech(stream, words, match) if stream.no_speech else None,
        "edge_deletions": _missing_edges([word.clip for word in stream.words], match),
        "offline_edge_deletions": None if offline is None else _offline_missing_edges(stream, offline),
        "updates": result.updates,
        "rtf": result.rtf if computed else None,
        "longest_update_sec": result.longest_update_sec if computed else None,
        "lag_sec": None if ended_at is None else ended_at - stream.duration_sec,
    }
    return {key: None if value != value else value for key, value in row.items()}  # nan is not JSON


def _rates(
    stream: SpeechStream, streamed: Sequence[str], offline: Sequence[str] | None, calculator: MetricsCalculator
) -> dict[str, Any]:
    """Return rates with one row per different clip: its repeats are not independent."""

    def by_clip(texts: Sequence[str]) -> list[str]:
        joined: dict[str, list[str]] = {}
        for clip, text in zip(stream.ids, texts, strict=True):
            joined.setdefault(clip, []).append(text)
        return [" ".join(parts) for parts in joined.values()]

    references, live = by_clip([clip.text for clip in stream.clips]), by_clip(streamed)
    alone = None if offline is None else by_clip(offline)
    rates = calculator.compute(references, live)
    apart = None if alone is None else calculator.compute(references, alone)
    difference = None if alone is None else calculator.compare(references, alone, live)
    return {
        **{key: getattr(rates, key) for key in _RATES},
        **{f"offline_{key}": getattr(apart, key, None) for key in _RATES},
        "wer_difference": getattr(difference, "difference", None),
        "wer_difference_low": getattr(difference, "low", None),
        "wer_difference_high": getattr(difference, "high", None),
    }


def _delays(
    stream: SpeechStream,
    events: Sequence[Event],
    display: Display,
    match: WordMatch,
    bootstrap: Bootstrap,
    *,
    on_clock: bool,
) -> dict[str, float | int | None]:
    """Return the latencies and the delay of the first word, each unaware of computing and aware of it."""
    right = [(stream.words[said], display.words[place]) for said, place in match.right.items()]
    timed = {
        "commit": [(said, heard.committed) for said, heard in right],
        "display": [(said, heard.stable) for said, heard in right],
        "end_of_turn": find_turns(stream, events, match),
    }
    row: dict[str, float | int | None] = {}
    for axis, when in (("unaware", "audio_sec"), ("aware", "emitted_at")):
        measured = axis == "unaware" or on_clock
        for name, pairs in timed.items():
            late = [getattr(event, when) - said.end_sec for said, event in pairs] if measured else []
            found = summarize_latency(late, [stream.ids[said.clip] for said, _ in pairs], bootstrap)
            row |= {f"{name}_{axis}_{key}": value for key, value in found.items()}
        first_sec = None if display.first is None else getattr(display.first, when) - stream.words[0].start_sec
        row[f"first_word_{axis}_sec"] = first_sec if measured else None
    return row


def summarize_latency(
    values_sec: Sequence[float], clips: Sequence[str], bootstrap: Bootstrap
) -> dict[str, float | int | None]:
    """Summarize latencies of words or turns.

    Args:
        values_sec: one per word or turn.
        clips: the clip of each, which is what the intervals resample.
        bootstrap: how intervals are drawn.

    Returns:
        n, and mean_sec, p50_sec and p95_sec with "_low" and "_high"; None if there are too few, intervals nan with one
        clip only.
    """
    names = [f"{name}{end}_sec" for name in ("mean", "p50", "p95") for end in ("", "_low", "_high")]
    row: dict[str, float | int | None] = dict.fromkeys(["n", *names])
    if not values_sec:
        return row
    values = np.array(values_sec)  # (n,)
    blocks = np.unique(clips, return_inverse=True)[1].astype(np.int64)  # (n,)
    row["n"] = len(values)
    estimates = {"mean": (values.mean(), bootstrap.interval(values, np.ones(len(values)), blocks))}
    for q in (50, 95):
        if len(values) >= MIN_CALLS[q]:
            estimates[f"p{q}"] = np.percentile(values, q), _percentile_interval(values, blocks, q, bootstrap)
    for name, (value, (low, high)) in estimates.items():
        row |= {f"{name}_sec": float(value), f"{name}_low_sec": low, f"{name}_high_sec": high}
    return row


def _percentile_interval(
    values: NDArray[np.float64], blocks: NDArray[np.int64], q: int, bootstrap: Bootstrap
) -> tuple[float, float]:
    """Return the interval of a percentile when blocks are drawn with replacement, all values of a block together."""
    count = int(blocks.max()) + 1
    if count < 2:
        return math.nan, math.nan
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
