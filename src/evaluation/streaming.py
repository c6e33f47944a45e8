"""What streaming costs in accuracy: one long stream made of clips, streamed and decoded offline with the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.edits import EditCounts, error_rate
from src.evaluation.metrics import ErrorRates, MetricsCalculator
from src.evaluation.results import EvaluationResult
from src.evaluation.text import WHISPER_ENGLISH
from src.inference.events import StreamingResult
from src.inference.streaming import StreamingASR
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger

PAUSE_SEC = (0.3, 0.8)  # between clips, as speakers pause between sentences


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
    pieces: list[Waveform] = []
    for utterance in chosen:
        pieces.append(decode_audio(utterance).numpy())
        pieces.append(np.zeros(round(rng.uniform(*PAUSE_SEC) * SAMPLE_RATE), dtype=np.float32))
    return SpeechStream(np.concatenate(pieces), " ".join(u.text for u in chosen), tuple(u.id for u in chosen))


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
