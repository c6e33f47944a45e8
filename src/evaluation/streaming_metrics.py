"""How late, how steady and how right the words of a stream are.

A word counts where the committed text has it right (`word_timing`). For an event e that shows it, with its true end
from the reference:

    unaware of computing:  audio heard at e - true end        what the policy costs
    aware of computing:    clock at e - true end              what a listener waits

The clock begins with the audio and is a replay's (`ReplayClock`). Commit latency takes for e the event that commits the
word; display latency the first from which on the text shown, commits and partial, has this word at this place for good.
After Ma et al. 2020 (SimulEval), with the true ends of words in place of an even pace.

Flicker is normalised erasure (Arivazhagan et al. 2020, "Re-translation versus streaming"), in words, over the texts
o_1 .. o_n that are shown one after the other:

    NE = sum_i (|o_(i-1)| - |longest common beginning of o_(i-1) and o_i|) / |o_n|

Intervals resample the stream's clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.evaluation.latency import MIN_CALLS
from src.evaluation.metrics import Bootstrap, ErrorRates, MetricsCalculator, PairedComparison
from src.evaluation.streams import TimedStream
from src.evaluation.word_timing import (
    Display,
    WordMatch,
    find_turns,
    follow_words,
    match_stream,
    match_words,
    texts_by_clip,
)
from src.inference.streaming.events import Event, StreamingResult
from src.inference.words import Word
from src.utils.errors import DataError

_AXES = {"unaware": attrgetter("audio_sec"), "aware": attrgetter("emitted_at")}  # of an event
_RATES = ("wer", "wer_low", "wer_high", "wer_plain", "wer_plain_low", "wer_plain_high", "cer",
          "substitutions", "deletions", "insertions", "reference_words", "normalizer")  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval, which is None where there is one clip only."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Latency:
    """Of n words or turns, in seconds. p50 is None under 2 of them, p95 under 20: none is expected beyond it then."""

    n: int
    mean: Estimate
    p50: Estimate | None
    p95: Estimate | None


@dataclass(frozen=True, kw_only=True)
class StreamingMetrics:
    """A session on a stream; None where something was not measured.

    Attributes:
        stream: its name.
        clips: different ones; `repeats` is how often the most frequent was heard.
        rates: of the streamed text, cut into its clips by alignment; a row a clip, with all its repeats.
        offline: of the clips decoded one by one.
        difference: of the WER, streamed minus offline.
        commit_unaware, commit_aware, display_unaware, display_aware: of the words committed right.
        first_word_unaware_sec, first_word_aware_sec: from the start of the first word to the first text shown.
        end_of_turn_unaware, end_of_turn_aware: of each `final`, from the true end of the last word it could hold.
        normalized_erasure: see above.
        words_without_speech: committed within the stream's stretches without speech. A word that is right does not
            count: its time slipped over the edge. None for a stream without such stretches.
        edge_deletions, offline_edge_deletions: first and last words of clips, beside a pause, that are missing.
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
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("rates", "offline"):
                prefix = "offline_" if field.name == "offline" else ""
                row |= {f"{prefix}{key}": _part(value, key) for key in _RATES}
            elif field.name == "difference":
                ends = {"": "difference", "_low": "low", "_high": "high"}
                row |= {f"wer_difference{end}": _part(value, key) for end, key in ends.items()}
            elif field.name.endswith("aware"):
                row |= _latency_row(field.name, value)
            else:
                row[field.name] = value
        return row


def measure_stream(
    stream: TimedStream,
    result: StreamingResult,
    *,
    ended_at: float | None = None,
    offline: Sequence[str] | None = None,
    language: str | None = "en",
    bootstrap: Bootstrap | None = None,
) -> StreamingMetrics:
    """Measure a session on a stream.

    Args:
        ended_at: the replay's clock when the session had ended. None says that the events carry another clock, on which
            audio did not come in real time: what is aware of computing is None then, and the lag.
        offline: the same model's text of each of the stream's clips, in order, decoded one by one.
        language: chooses Whisper's normaliser for the rates; None means English.
    Raises: DataError: `offline` has another number of texts, or no reference has a word.
    """
    bootstrap = bootstrap or Bootstrap()
    display = follow_words(result.events)
    words = [each.word for each in display.words]
    match = match_stream(stream, words)
    computed = result.compute_sec > 0  # else computing took no time on its clock, which measures nothing
    return StreamingMetrics(
        stream=stream.name,
        audio_sec=stream.duration_sec,
        clips=len({clip.id for clip in stream.clips}),
        repeats=stream.repeats,
        **_rates(stream, texts_by_clip(stream, words, match), offline, language, bootstrap),
        **_delays(stream, result.events, display, match, bootstrap, on_clock=ended_at is not None),
        normalized_erasure=display.erased / len(words) if words else None,
        words_without_speech=_count_without_speech(stream, words, match) if stream.no_speech else None,
        edge_deletions=len(_edges(stream) - set(match.stands_for.values())),
        offline_edge_deletions=None if offline is None else _count_offline_edges(stream, offline),
        updates=result.updates,
        rtf=result.rtf if computed else None,
        longest_update_sec=result.longest_update_sec if computed else None,
        lag_sec=None if ended_at is None else ended_at - stream.duration_sec,
    )


def summarize_latency(
    values_sec: Sequence[float], clips: Sequence[str], bootstrap: Bootstrap | None = None
) -> Latency | None:
    """Summarize latencies; None where there is none.

    Args:
        clips: the clip of each, which is what the intervals resample.
    """
    if not values_sec:
        return None
    bootstrap = bootstrap or Bootstrap()
    values = np.array(values_sec)  # (n,)
    blocks = np.unique(clips, return_inverse=True)[1].astype(np.int64)  # (n,)
    mean = Estimate(float(values.mean()), *map(_known, bootstrap.interval(values, np.ones(len(values)), blocks)))
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
        times = np.bincount(rng.integers(0, count, size=count), minlength=count)  # each block was drawn
        reached = times[blocks[order]].cumsum()
        found.append(values[order[reached.searchsorted(q / 100 * reached[-1])]])
    tail = 100 * (1 - bootstrap.confidence) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


def _rates(
    stream: TimedStream,
    streamed: Sequence[str],
    offline: Sequence[str] | None,
    language: str | None,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Return `rates`, `offline` and `difference`."""
    if offline is not None and len(offline) != len(stream.clips):
        raise DataError(
            f"stream {stream.name!r}: {len(offline)} offline texts for {len(stream.clips)} clips; decode each of "
            "stream.clip_audios(), in order"
        )
    calculator = MetricsCalculator(
        language, bootstrap_samples=bootstrap.samples, confidence=bootstrap.confidence, seed=bootstrap.seed
    )
    references, live = _join_repeats(stream, [clip.text for clip in stream.clips]), _join_repeats(stream, streamed)
    rates = calculator.compute(references, live)
    if offline is None:
        return {"rates": rates, "offline": None, "difference": None}
    alone = _join_repeats(stream, offline)
    return {
        "rates": rates,
        "offline": calculator.compute(references, alone),
        "difference": calculator.compare(references, alone, live),
    }


def _delays(
    stream: TimedStream,
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
    for axis, when in _AXES.items():
        measured = axis == "unaware" or on_clock
        for name, pairs in timed.items():
            late = [when(event) - said.end_sec for said, event in pairs]
            clips = [stream.clips[said.clip].id for said, _ in pairs]
            delays[f"{name}_{axis}"] = summarize_latency(late, clips, bootstrap) if measured else None
        first_sec = None if display.first is None else when(display.first) - stream.words[0].start_sec
        delays[f"first_word_{axis}_sec"] = first_sec if measured else None
    return delays


def _join_repeats(stream: TimedStream, texts: Sequence[str]) -> list[str]:
    """Return a text a different clip: repeats of a clip are not independent, and one row is one block."""
    joined: dict[str, list[str]] = {}
    for clip, text in zip(stream.clips, texts, strict=True):
        joined.setdefault(clip.id, []).append(text)
    return [" ".join(parts) for parts in joined.values()]


def _count_without_speech(stream: TimedStream, words: Sequence[Word], match: WordMatch) -> int:
    right = set(match.right.values())
    middles = [(word.start_sec + word.end_sec) / 2 for place, word in enumerate(words) if place not in right]
    return sum(begin <= middle < end for middle in middles for begin, end in stream.no_speech)


def _edges(stream: TimedStream) -> set[int]:
    """Return the first and the last word of each clip."""
    clips = [word.clip for word in stream.words]
    return {
        index
        for index, clip in enumerate(clips)
        if index in (0, len(clips) - 1) or clip != clips[index - 1] or clip != clips[index + 1]
    }


def _count_offline_edges(stream: TimedStream, offline: Sequence[str]) -> int:
    missing = 0
    for index, text in enumerate(offline):
        words = [word.text for word in stream.words if word.clip == index]
        missing += len({0, len(words) - 1} - set(match_words(words, text.split()).stands_for.values()))
    return missing


def _latency_row(name: str, latency: Latency | None) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = {f"{name}_n": _part(latency, "n")}
    for key in ("mean", "p50", "p95"):
        estimate = _part(latency, key)
        for end, part in {"": "value", "_low": "low", "_high": "high"}.items():
            row[f"{name}_{key}{end}_sec"] = _part(estimate, part)
    return row


def _part(whole: Any, name: str) -> Any:
    """Return a field; None where it is nan, which JSON does not know, or where there is no whole."""
    return None if whole is None else _known(getattr(whole, name))


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
