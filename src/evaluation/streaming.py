"""Streaming evaluation: how late, how steady and how right the words of a live session are.

A replay's clock is that of a listener. Block k of the audio is complete at a_k; the session takes it up then, or when
the block before is finished, computes for c_k, and is finished at e_k = max(e_(k-1), a_k) + c_k. So computing hides
behind the audio that arrives meanwhile; SimulEval (Ma et al. 2020) counts the hidden part too.

A word (in scripts without spaces a character) counts where the committed text has it right, under the plain normaliser.
For an event that shows it:

    unaware of computing:  audio heard at the event - true end of the word      what the policy costs
    aware of computing:    clock at the event - true end of the word            what a listener waits

Commit latency takes the event that commits the word; display latency the first event from which on the shown text
(commits and partial) has this word at this place for good. Flicker is normalised erasure (Arivazhagan et al. 2020,
"Re-translation versus streaming") in words, over the texts o_1 .. o_n that are shown one after the other:

    NE = sum_i (|o_(i-1)| - |longest common prefix of o_(i-1) and o_i|) / |o_n|

Intervals resample the stream's clips.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from src.data.audio import SAMPLE_RATE, Waveform
from src.evaluation import metrics
from src.evaluation.evaluator import EvaluationResult
from src.evaluation.latency import MIN_CALLS
from src.evaluation.metrics import Bootstrap, ErrorRates, FloatArray, IntArray, MetricsCalculator
from src.evaluation.streams import SpeechStream, SpokenWord
from src.inference.streaming.commit import Event, word_key
from src.inference.streaming.microphone import BLOCK_SEC
from src.inference.streaming.session import StreamingASR, StreamingResult
from src.inference.streaming.simuleval import log_instance, write_log
from src.inference.words import Word, join_words
from src.utils.errors import DataError
from src.utils.languages import join_texts, normalize_plain
from src.utils.tracking import ExperimentLogger

_RATES = ("metric", "rate", "low", "high", "wer", "wer_low", "wer_high",
          "wer_plain", "wer_plain_low", "wer_plain_high", "cer",
          "substitutions", "deletions", "insertions", "reference_words", "normalizer")  # fmt: skip


class ReplayClock:
    """Seconds that pass with computing; waiting for audio jumps over them. The replayed session must use it.

    `time.process_time` as timer leaves out what other processes take; a constant makes computing free.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer, self._origin = timer, timer()

    def __call__(self) -> float:
        """Return the time since the stream began."""
        return self._timer() - self._origin

    def restart(self) -> None:
        """Begin a stream at 0."""
        self._origin = self._timer()

    def wait_until(self, sec: float) -> None:
        """Jump to a time, unless it has passed."""
        self._origin -= max(0.0, sec - self())


def replay(
    session: StreamingASR, audio: Waveform, clock: ReplayClock, *, block_sec: float = BLOCK_SEC
) -> tuple[StreamingResult, float]:
    """Reset a session and let it hear a recording, (T,) at 16 kHz, as if it came live, without sleeping.

    The session was made with `clock`, which is restarted here; `block_sec` of audio arrive at once. Returns the clock
    at the end, in seconds, with the result.
    """
    session.reset()
    clock.restart()
    events, block = [], round(block_sec * SAMPLE_RATE)
    for at in range(0, len(audio), block):
        clock.wait_until(min(at + block, len(audio)) / SAMPLE_RATE)
        events += session.feed(audio[at : at + block])
    events += session.flush()
    return session.result(events), clock()


@dataclass(frozen=True)
class StreamingEvaluation:
    """A streamed transcript compared with the same model decoding the same clips one by one."""

    stream: SpeechStream  # what was heard
    result: StreamingResult  # of the session
    rates: ErrorRates  # of all committed words against the whole reference; one row, so there is no interval
    offline_rate: float  # of the clips decoded one by one, in the same metric

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the figures of one row of metrics.jsonl; the two of WER are None where the metric is another."""
        rates, result = self.rates, self.result
        wers = (rates.wer, self.offline_rate) if rates.metric == "WER" else (None, None)
        return {
            "clips": len(self.stream.clips), "audio_sec": self.stream.duration_sec,
            "metric": rates.metric, "rate": rates.rate, "offline_rate": self.offline_rate,
            "wer": wers[0], "offline_wer": wers[1], "language": result.language,
            "deletions": rates.deletions, "insertions": rates.insertions,
            "rtf": result.rtf, "longest_update_sec": result.longest_update_sec, "updates": result.updates,
            "truncated": result.truncated,
        }  # fmt: skip

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the figures and the transcript to the run's metrics.jsonl, and write its log for SimulEval."""
        experiment.log("streaming", **self.summary(), text=self.result.text, reference=self.stream.text)
        characters = self.rates.metric == "CER"
        log_streams(experiment.dir / "simuleval", [(self.stream, self.result)], characters=characters, live=False)


def log_streams(
    folder: Path, heard: Sequence[tuple[SpeechStream, StreamingResult]], *, characters: bool = False, live: bool = True
) -> None:
    """Write `instances.log` and what else SimulEval and OmniSTEval read, in place of older ones.

    `characters` is for scripts without spaces; `live` if the events' clock is that of `replay`, else the audio came as
    fast as it was taken.
    """
    instances = [
        log_instance(
            result.events, name=f"{stream.name}.wav", audio_sec=stream.duration_sec, reference=stream.text,
            characters=characters, computed_sec=None if live else result.compute_sec, index=index,
        )
        for index, (stream, result) in enumerate(heard)
    ]  # fmt: skip
    clips = [[(clip.text, clip.start_sec, clip.end_sec) for clip in stream.clips] for stream, _ in heard]
    write_log(folder, instances, clips)


def evaluate_stream(asr: StreamingASR, stream: SpeechStream, offline: EvaluationResult) -> StreamingEvaluation:
    """Stream the audio as fast as possible and compare all committed words with the reference.

    `offline` is the same model's result on a set that contains the clips of `stream`, whose text is counted in one
    piece: in the units of the text's language, or of its script where clips have several.
    """
    rows = {row.id: row for row in offline.rows}
    if missing := [clip for clip in stream.ids if clip not in rows]:
        raise DataError(f"clips of the stream were not measured offline: {', '.join(missing[:5])}")
    result = asr.stream_audio(stream.audio)
    language = "en" if offline.normalizer == metrics.WHISPER_ENGLISH else stream.language  # translations are English
    rates = MetricsCalculator(language).compute([stream.text], [result.text])
    return StreamingEvaluation(stream, result, rates, metrics.error_rate([rows[clip] for clip in stream.ids]))


def measure_stream(
    stream: SpeechStream, result: StreamingResult, *, ended_at: float | None = None,
    offline: Sequence[str] | None = None, language: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a session on a stream whose words have times.

    Args:
        stream: from `join_clips` with aligned clips.
        result: of the session.
        ended_at: the replay's clock when the session had ended. None says that the events carry another clock, on which
            audio did not come in real time: what is aware of computing is None then, and so is the lag.
        offline: the same model's text of each of the stream's clips, in order, decoded one by one.
        language: of clips that do not say theirs; None: their script decides what is counted.

    Returns:
        One flat row for tables and metrics.jsonl; None if not measured. An interval ends at "_low" and "_high".
        - stream, audio_sec, clips (different ones), repeats (how often the most frequent was heard), updates (model
          calls), rtf and longest_update_sec (of the computing), lag_sec (of the clock behind the end of the audio, when
          the session has ended);
        - metric, rate, low and high (the headline with its interval), wer, wer_plain, cer, substitutions, deletions,
          insertions, reference_words, normalizer: of the streamed text, cut into its clips by alignment, one row per
          clip with all its repeats; with "offline_" those of the clips decoded one by one;
        - commit, display and end_of_turn, each with "_unaware" and "_aware" (of computing), as "_n", "_mean_sec",
          "_p50_sec" and "_p95_sec": latency of the words committed right, and of each `final` from the true end of the
          last word it could contain;
        - normalized_erasure: see the module;
        - words_without_speech: committed within the stream's stretches without speech. A word that is right does not
          count: its time slipped over the edge.
    """
    if not stream.words:
        raise DataError(f"stream {stream.name!r}: its words have no times; join clips that WordAligner has aligned")
    if offline is not None and len(offline) != len(stream.clips):
        what = f"{len(offline)} offline texts for {len(stream.clips)} clips"
        raise DataError(f"stream {stream.name!r}: {what}; decode each of stream.clip_audios(), in order")
    heard, erased = follow_words(result.events)
    words = [each.word for each in heard]
    match = match_stream(stream, words, language)
    calculator = MetricsCalculator(language)

    # latency of words and turns, each unaware of computing and aware of it
    right = [(stream.words[said], heard[place]) for said, place in match.right.items()]
    timed = {
        "commit": [(said, word.committed) for said, word in right],
        "display": [(said, word.stable) for said, word in right],
        "end_of_turn": find_turns(stream, result.events, match),
    }
    delays: dict[str, float | int | None] = {}
    for axis, when in (("unaware", "audio_sec"), ("aware", "emitted_at")):
        for name, pairs in timed.items():
            measured = pairs if axis == "unaware" or ended_at is not None else []
            late_sec = [getattr(event, when) - said.end_sec for said, event in measured]
            found = summarize_latency(late_sec, [stream.ids[said.clip] for said, _ in measured], calculator.bootstrap)
            delays |= {f"{name}_{axis}_{key}": value for key, value in found.items()}

    places = set(match.right.values())
    wrong_at = [(word.start_sec + word.end_sec) / 2 for place, word in enumerate(words) if place not in places]
    invented = sum(begin <= sec < end for sec in wrong_at for begin, end in stream.no_speech)
    offline_rates = dict.fromkeys(_RATES) if offline is None else _rates(stream, offline, calculator)
    computed = result.compute_sec > 0  # else computing took no time on its clock, which measures nothing
    row = {
        "stream": stream.name, "audio_sec": stream.duration_sec, "clips": len(set(stream.ids)),
        "repeats": stream.repeats,
        **_rates(stream, texts_by_clip(stream, words, match), calculator),
        **{f"offline_{key}": value for key, value in offline_rates.items()},
        **delays,
        "normalized_erasure": erased / len(words) if words else None,
        "words_without_speech": invented if stream.no_speech else None,
        "updates": result.updates,
        "rtf": result.rtf if computed else None,
        "longest_update_sec": result.longest_update_sec if computed else None,
        "lag_sec": None if ended_at is None else ended_at - stream.duration_sec,
    }  # fmt: skip
    return {key: None if value != value else value for key, value in row.items()}  # nan is not JSON


def _rates(stream: SpeechStream, texts: Sequence[str], calculator: MetricsCalculator) -> dict[str, Any]:
    """Return rates with one row per different clip: its repeats are not independent."""
    clips = pd.DataFrame({"id": stream.ids, "said": [clip.text for clip in stream.clips], "heard": texts})
    rows = clips.groupby("id", sort=False).agg(join_texts)
    language_of = {clip.id: clip.language for clip in stream.clips}
    languages = [language_of[clip] for clip in rows.index]
    rates = calculator.compute(rows["said"].tolist(), rows["heard"].tolist(), languages=languages)
    return {key: getattr(rates, key) for key in _RATES}


def summarize_latency(
    values_sec: Sequence[float], clips: Sequence[str], bootstrap: Bootstrap
) -> dict[str, float | int | None]:
    """Return n, mean_sec, p50_sec and p95_sec of the latencies of words or turns, with "_low" and "_high".

    Intervals resample the clips, of which each has one; nan with one clip only. None with fewer than `MIN_CALLS`.
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
        low = max(low, float(values.min()))  # a few clips widen an interval beyond what can be
        row |= {f"{name}_sec": float(value), f"{name}_low_sec": low, f"{name}_high_sec": high}
    return row


def _percentile_interval(values: FloatArray, blocks: IntArray, q: int, bootstrap: Bootstrap) -> tuple[float, float]:
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
    return bootstrap.ends(found, float(np.percentile(values, q)), [count])


@dataclass(frozen=True)
class WordTiming:
    """A word that was committed right, in audio heard and on the replay's clock (None where none ran)."""

    text: str  # of the reference
    clip: int  # index into the stream's clips
    start_sec: float  # when it was said
    end_sec: float
    commit_audio_sec: float
    commit_clock_sec: float | None
    display_audio_sec: float  # since when it was shown without a change
    display_clock_sec: float | None
    shown_audio_sec: float  # when it was first shown at its place
    shown_clock_sec: float | None


def time_words(stream: SpeechStream, events: Sequence[Event], *, on_clock: bool) -> tuple[WordTiming, ...]:
    """Return the words that were committed right, in order; `on_clock` if a `ReplayClock` stamped the events."""
    words, _ = follow_words(events)
    timings = []
    for index, place in match_stream(stream, [each.word for each in words]).right.items():
        said, (_, *moments) = stream.words[index], words[place]
        times = [sec for event in moments for sec in (event.audio_sec, event.emitted_at if on_clock else None)]
        timings.append(WordTiming(said.text, said.clip, said.start_sec, said.end_sec, *times))  # type: ignore[arg-type]
    return tuple(timings)


class CommittedWord(NamedTuple):
    """A committed word, and the events that committed it, showed it unchanged from then on, and first showed it."""

    word: Word
    committed: Event
    stable: Event
    shown: Event


def follow_words(events: Sequence[Event]) -> tuple[list[CommittedWord], int]:
    """Follow each place of the shown text: the commits so far, then the last valid partial.

    Words are compared without case and punctuation, so that a comma that comes or goes changes nothing. A commit voids
    the partial, and often the next partial follows at once: together they are one change.

    Returns:
        The words committed, in order, and how many words were erased: removed or changed after they were shown, or
        shown after one that was.
    """
    changes: list[tuple[Event, tuple[Word, ...]]] = []  # the words after those committed before
    before: Event | None = None
    for event in (event for event in events if event.kind != "final"):
        if before and (before.kind, event.kind, event.audio_sec) == ("commit", "partial", before.audio_sec):
            changes[-1] = before, before.words + event.words
        else:
            changes.append((event, event.words))
        before = event

    places: list[tuple[str, Event]] = []  # the word at each place, and the event since when
    first_at: dict[tuple[int, str], Event] = {}
    committed: list[tuple[Word, Event]] = []
    erased = 0
    for event, words in changes:
        fixed = len(committed)
        old, new = places[fixed:], [(word_key(word), event) for word in words]
        same = [was[0] == now[0] for was, now in zip(old, new, strict=False)]
        erased += len(old) - sum(itertools.takewhile(bool, same))
        places[fixed:] = [old[i] if i < len(same) and same[i] else now for i, now in enumerate(new)]
        for place, (key, _) in enumerate(new, start=fixed):
            first_at.setdefault((place, key), event)
        committed += [(word, event) for word in event.words if event.kind == "commit"]
    followed = [
        CommittedWord(word, event, since, first_at[place, key])
        for place, ((word, event), (key, since)) in enumerate(zip(committed, places, strict=False))
    ]
    return followed, erased


class WordMatch(NamedTuple):
    """An alignment of a reference and a hypothesis, by word index."""

    right: Mapping[int, int]  # reference to hypothesis, where the whole word is the same
    stands_for: Mapping[int, int]  # hypothesis to reference, right or wrong; inserted words have none


def match_stream(stream: SpeechStream, words: Sequence[Word], language: str | None = None) -> WordMatch:
    """Align the words of a stream with those of its transcript; `language` is of clips that do not say theirs."""
    spoken = stream.language or language
    return match_words([word.text for word in stream.words], [word.text for word in words], language=spoken)


def match_words(reference: Sequence[str], hypothesis: Sequence[str], *, language: str | None = None) -> WordMatch:
    """Align words under the plain normaliser; a word that it splits is right where all its parts are."""
    normalize: Callable[[str], str] = normalize_plain
    if language not in (None, "en"):
        normalize = metrics.get_normalizer(metrics.headline_normalizer(language))
    parts = [[(i, part) for i, word in enumerate(words) for part in normalize(word).split()]
             for words in (reference, hypothesis)]  # fmt: skip
    expected, found = (iter([i for i, _ in each]) for each in parts)  # the word to which each part belongs
    said, heard = (" ".join(part for _, part in each) for each in parts)
    right: dict[int, int] = {}
    wrong: set[int] = set()
    stands_for: dict[int, int] = {}
    for step in metrics.align_words(said, heard, metrics.PLAIN):
        i = next(expected) if step.reference is not None else None
        j = next(found) if step.hypothesis is not None else None
        if i is not None and j is not None:
            stands_for.setdefault(j, i)
            if step.edit == "equal":
                right[i] = j
        if i is not None and step.edit != "equal":
            wrong.add(i)
    return WordMatch({i: j for i, j in right.items() if i not in wrong}, stands_for)


def texts_by_clip(stream: SpeechStream, hypothesis: Sequence[Word], match: WordMatch) -> list[str]:
    """Cut a transcript of the whole stream into those of its clips, as mwerSegmenter does (Matusov et al. 2005).

    Each word goes where the reference word is that it is aligned with. An inserted word goes to the nearer, in time, of
    the reference words around it.
    """
    texts: list[list[Word]] = [[] for _ in stream.clips]
    anchored = sorted(match.stands_for)
    for place, word in enumerate(hypothesis):
        after = bisect.bisect_left(anchored, place)
        around = [stream.words[match.stands_for[j]] for j in anchored[max(0, after - 1) : after + 1]]
        if place in match.stands_for:
            around = [stream.words[match.stands_for[place]]]
        middle = (word.start_sec + word.end_sec) / 2
        nearest = min(around or stream.words, key=lambda w: max(w.start_sec - middle, middle - w.end_sec, 0.0))
        texts[nearest.clip].append(word)
    return [join_words(words) for words in texts]


def find_turns(stream: SpeechStream, events: Sequence[Event], match: WordMatch) -> list[tuple[SpokenWord, Event]]:
    """Pair each `final` with the last word of the reference that it could contain.

    It is the last one, in the clip in which the final's text ends, that had been said when the final came. A final
    without any word of the reference is left out.
    """
    turns = []
    begin = end = 0  # committed words
    for event in events:
        if event.kind == "commit":
            end += len(event.words)
        elif event.kind == "final":
            if heard := [match.stands_for[place] for place in range(begin, end) if place in match.stands_for]:
                last, *later = stream.words[heard[-1] :]
                said = [word for word in later if word.clip == last.clip and word.end_sec <= event.audio_sec]
                turns.append(([last, *said][-1], event))
            begin = end
    return turns
