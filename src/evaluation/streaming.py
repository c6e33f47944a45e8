"""Sessions over streams: live on a clock, for `measure_stream`, or as fast as it goes, beside the same model offline.

A replay's clock is that of a listener. Audio comes in blocks; block k is complete at a_k, the session takes it up at
b_k, once it has come and the block before is done with, computes for c_k and is done with it at e_k:

    b_k = max(e_(k-1), a_k),  e_k = b_k + c_k

So computing hides behind the audio that comes meanwhile, and delays only add up where it is the slower of the two.
SimulEval (Ma et al. 2020) adds all computing so far to the time of the audio, which counts the hidden part too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.edits import EditCounts, error_rate
from src.evaluation.metrics import ErrorRates, MetricsCalculator
from src.evaluation.results import EvaluationResult
from src.evaluation.streams import draw_pause, join_audios
from src.evaluation.text import WHISPER_ENGLISH
from src.inference.streaming.events import StreamingResult
from src.inference.streaming.live import StreamingASR
from src.inference.streaming.microphone import BLOCK_SEC
from src.inference.streaming.session import StreamingSession
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger


class ReplayClock:
    """Seconds that pass with computing, and that waiting for audio jumps over. Give it to the session that replays.

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
    """A session that heard a whole recording live, and the clock when it was done with it, in seconds."""

    result: StreamingResult
    ended_at: float


def replay(session: StreamingSession, audio: Waveform, clock: ReplayClock, *, block_sec: float = BLOCK_SEC) -> Replay:
    """Reset a session and let it hear a recording as if it came live, without sleeping.

    Args:
        audio: (T,) float32, 16 kHz.
        clock: the one that the session was made with.
        block_sec: how much audio comes at once.
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
    result = StreamingResult.from_events(
        events,
        audio_sec=session.audio_sec,
        compute_sec=session.compute_sec,
        longest_update_sec=session.longest_update_sec,
        updates=session.updates,
    )
    return Replay(result, clock())


@dataclass(frozen=True)
class SpeechStream:
    """Clips in a row.

    Attributes:
        audio: (T,) float32, 16 kHz.
        text: the clips' transcripts joined by spaces.
        ids: of the clips, in order.
    """

    audio: Waveform
    text: str
    ids: tuple[str, ...]

    @property
    def duration_sec(self) -> float:
        """Length of the audio in seconds."""
        return len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class StreamingEvaluation:
    """A streamed transcript against the same model decoding the same clips one by one.

    Attributes:
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
            "clips": len(self.stream.ids),
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


def make_stream(utterances: Sequence[Utterance], *, num_clips: int, seed: int) -> SpeechStream:
    """Join clips taken at a stride over all of `utterances` (never the head), with pauses of digital silence.

    Args:
        num_clips: taken; all where there are fewer.
        seed: of the pauses' lengths, uniform in 0.3 to 0.8 s.
    Raises: DataError: no utterance.
    """
    if not utterances:
        raise DataError("make_stream: no utterance given")
    picks = np.linspace(0, len(utterances) - 1, min(num_clips, len(utterances))).round().astype(int)
    chosen = [utterances[i] for i in picks]
    rng = np.random.default_rng(seed)
    audio, _ = join_audios([decode_audio(u).numpy() for u in chosen], [draw_pause(rng) for _ in chosen])
    return SpeechStream(audio, " ".join(u.text for u in chosen), tuple(u.id for u in chosen))


def evaluate_stream(asr: StreamingASR, stream: SpeechStream, offline: EvaluationResult) -> StreamingEvaluation:
    """Stream the audio as fast as it goes and compare all committed words with the reference.

    Args:
        offline: the same model's result on a set that holds the stream's clips.
    Raises: DataError: a clip of the stream is not in `offline`.
    """
    rows = {row.id: row for row in offline.rows}
    missing = [clip for clip in stream.ids if clip not in rows]
    if missing:
        raise DataError(f"clips of the stream were not measured offline: {', '.join(missing[:5])}")
    result = asr.stream_audio(stream.audio)
    counts = [
        EditCounts(row.substitutions, row.deletions, row.insertions, row.reference_words)
        for row in (rows[clip] for clip in stream.ids)
    ]
    language = "en" if offline.normalizer == WHISPER_ENGLISH else "other"
    rates = MetricsCalculator(language).compute([stream.text], [result.text])
    return StreamingEvaluation(stream, result, rates, error_rate(counts))
