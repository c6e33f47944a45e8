"""Files to text: batches of similar length over all files, long recordings cut at silences, faults reported by file.

Files are read, cut and decoded in rounds of bounded audio, so that any number of files of any length fits into memory.
Within a round, segments go from long to short: batches then hold little padding.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, Waveform, stream_audio, to_mono_16k
from src.data.vad import VoiceActivityDetector
from src.inference.engines import Engine
from src.inference.files.fallback import FallbackOptions, decode_with_fallback
from src.inference.files.segmentation import Segment, cut_at_silences
from src.inference.files.sequential import transcribe_sequentially
from src.inference.files.transcription import TranscribedSegment, Transcription, Transcriptions
from src.inference.options import DecodingOptions, DecodingResult
from src.utils.config import Config
from src.utils.errors import AudioError, DataError, ModelError
from src.utils.runtime import FittingSize

logger = logging.getLogger(__name__)

ROUND_SEC = 900.0  # of audio that is held at once: 58 MB
ROUND_BATCHES = 8  # a worker: enough to sort by length
AudioSource = str | Path | Waveform
Mode = Literal["segments", "sequential"]

# A longer pause separates segments. Models tuned on single sentences at their own length stop after the first sentence:
# of four in 20 s they leave 21% of the words out. Uncut WER 26.9%, cut at every pause 9.9%, at those above 1 s 8.3%,
# above 1.5 s 9.4% (tiny.en int8, bundled test clips by fours, 0.8 s apart, 2026-11-28). Stock models know 30 s.
JOIN_PAUSE_SEC = {"full": 30.0, "dynamic": 1.0}


@dataclass
class _Recording:
    """A recording on its way: its segments come back in any order."""

    source: str
    segments: list[Segment] = field(default_factory=list)  # audio is dropped once decoded
    results: dict[int, DecodingResult] = field(default_factory=dict)
    duration_sec: float = 0.0
    language: str | None = None
    error: str | None = None
    is_read: bool = False


_Item = tuple[_Recording, int]  # and the index of its segment


class BatchInference:
    """Transcribes files and arrays.

    Args:
        model: a `DynamicWhisper`; not needed with `engine`.
        processor: its processor.
        config: `inference`, `model` and `vad` sections; defaults without.
        engine: from `load_engine`, instead of a model.
        vad: cuts recordings and tells silence; made from the configuration without.
    Raises: ModelError: neither a model with its processor nor an engine.
    """

    def __init__(
        self,
        model: Any = None,
        processor: Any = None,
        config: Config | None = None,
        *,
        engine: Engine | None = None,
        vad: VoiceActivityDetector | None = None,
    ) -> None:
        self._config = config or Config()
        self._engine = engine if engine is not None else _torch_engine(model, processor)
        self._vad = vad or VoiceActivityDetector(self._config.vad)
        self._fallback = FallbackOptions.from_config(self._config)
        self._fitting = FittingSize()
        section = self._config.inference
        self._options = replace(
            DecodingOptions.from_config(self._config), prompt=section.initial_prompt, hotwords=section.hotwords
        )
        pause = section.join_pause_sec
        self._join_pause_sec = JOIN_PAUSE_SEC[self._engine.audio_context] if pause is None else pause

    def transcribe_batch(self, sources: Sequence[AudioSource], **options: Any) -> Transcriptions:
        """Transcribe recordings of any length.

        Args:
            sources: paths, or (T,) float32 arrays at 16 kHz.
            options: as of `transcribe_iter`.
        Returns: one `Transcription` a source, in order. Silence gives an empty text.
        Raises: DataError: no source. AudioError: a bad recording with "raise".
        """
        if isinstance(sources, str | Path):
            raise DataError(f"transcribe_batch takes a list; write transcribe_batch([{str(sources)!r}])")
        if not len(sources):
            raise DataError("transcribe_batch: no recording given")
        began = time.perf_counter()
        items = tuple(self.transcribe_iter(sources, **options))
        return Transcriptions(items, time.perf_counter() - began)

    def transcribe_iter(
        self,
        sources: Iterable[AudioSource],
        *,
        word_timestamps: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        mode: Mode = "segments",
    ) -> Iterator[Transcription]:
        """Transcribe any number of recordings, in memory that does not grow with them.

        Args:
            sources: as in `transcribe_batch`; may be a generator.
            word_timestamps: fill `words`.
            on_error: "skip" reports a bad recording in its `Transcription.error` and goes on.
            mode: "segments" cuts at silences and decodes in batches; "sequential" goes through a recording in windows
                of 30 s, each with the text before it as context, for models that write timestamps.
        Yields: one `Transcription` a source, in order.
        Raises: AudioError: a bad recording with "raise". ModelError, DeviceError: of the engine.
        """
        options = replace(self._options, word_timestamps=word_timestamps)
        total = len(sources) if isinstance(sources, Sequence) else None
        with tqdm(total=total, desc="transcribing", unit="file", disable=total == 1) as bar:
            found: Iterator[Transcription]
            if mode == "sequential":
                found = (self._one_by_one(source, i, options, on_error) for i, source in enumerate(sources))
            else:
                found = self._in_rounds(sources, options, on_error)
            for transcription in found:
                bar.update()
                yield transcription

    def _one_by_one(self, source: AudioSource, index: int, options: DecodingOptions, on_error: str) -> Transcription:
        recording = _Recording(_label(source, index))
        segments: tuple[TranscribedSegment, ...] = ()
        with _reported(recording, on_error):
            blocks = _counted(_blocks(source, recording.source), recording)
            segments = tuple(transcribe_sequentially(self._engine, blocks, options, self._fallback, vad=self._vad))
        return Transcription.of(
            recording.source, segments, recording.duration_sec, error=recording.error, words=options.word_timestamps
        )

    def _in_rounds(
        self, sources: Iterable[AudioSource], options: DecodingOptions, on_error: str
    ) -> Iterator[Transcription]:
        waiting: list[_Recording] = []
        for round_ in _rounds(self._read(sources, waiting, on_error), self._round_size()):
            self._decode_round(round_, options)
            while waiting and waiting[0].is_read and len(waiting[0].results) == len(waiting[0].segments):
                yield _joined(waiting.pop(0), options.word_timestamps)
        for recording in waiting:
            yield _joined(recording, options.word_timestamps)

    def _read(self, sources: Iterable[AudioSource], waiting: list[_Recording], on_error: str) -> Iterator[_Item]:
        """Cut each source; give out (recording, index of its segment) as soon as a segment is there."""
        section = self._config.inference
        for index, source in enumerate(sources):
            recording = _Recording(_label(source, index))
            waiting.append(recording)
            with _reported(recording, on_error):
                for segment in cut_at_silences(
                    _counted(_blocks(source, recording.source), recording),
                    self._vad,
                    max_sec=section.max_segment_sec,
                    join_pause_sec=self._join_pause_sec,
                ):
                    recording.segments.append(segment)
                    yield recording, len(recording.segments) - 1
            recording.is_read = True

    def _round_size(self) -> int:
        return ROUND_BATCHES * self._config.inference.batch_size * self._engine.workers

    def _decode_round(self, round_: Sequence[_Item], options: DecodingOptions) -> None:
        """Decode segments in batches from long to short, each batch in one language."""
        if self._engine.vocabulary.multilingual and options.language is None:
            self._detect_languages(round_)
        by_language: dict[str | None, list[_Item]] = {}
        for recording, index in sorted(round_, key=lambda item: len(item[0].segments[item[1]].audio), reverse=True):
            by_language.setdefault(recording.language or options.language, []).append((recording, index))
        size = self._config.inference.batch_size
        batches = [
            (items[at : at + size], replace(options, language=language))
            for language, items in by_language.items()
            for at in range(0, len(items), size)
        ]
        with ThreadPoolExecutor(self._engine.workers) as pool:
            for _ in pool.map(self._decode_items, batches):
                pass  # raises here what a thread raised

    def _detect_languages(self, round_: Sequence[_Item]) -> None:
        """Let the beginning of a recording of several segments decide for all of them."""
        for recording, index in round_:
            if index == 0 and (len(recording.segments) > 1 or not recording.is_read):
                (recording.language,) = self._engine.detect_languages([recording.segments[0].audio])

    def _decode_items(self, batch: tuple[list[_Item], DecodingOptions]) -> None:
        items, options = batch
        audios = [recording.segments[index].audio for recording, index in items]
        parts = self._fitting.run(
            lambda first, last: decode_with_fallback(
                self._engine, audios[first:last], options, self._fallback, vad=self._vad
            ),
            [f"segment {index + 1} of {recording.source}" for recording, index in items],
        )
        for (recording, index), result in zip(items, itertools.chain.from_iterable(parts), strict=True):
            recording.results[index] = result
            recording.segments[index] = recording.segments[index].without_audio()


def _torch_engine(model: Any, processor: Any) -> Engine:
    if model is None or processor is None:
        raise ModelError("BatchInference needs a model and its processor, or engine=load_engine(...)")
    from src.inference.decoding import TorchEngine  # torch's models: CTranslate2 does without

    return TorchEngine(model, processor)


def _rounds(items: Iterator[_Item], max_segments: int) -> Iterator[list[_Item]]:
    """Gather segments until there are enough of them, or of audio."""
    round_: list[_Item] = []
    audio_sec = 0.0
    for recording, index in items:
        round_.append((recording, index))
        audio_sec += len(recording.segments[index].audio) / SAMPLE_RATE
        if len(round_) >= max_segments or audio_sec >= ROUND_SEC:
            yield round_
            round_, audio_sec = [], 0.0
    yield round_


def _blocks(source: AudioSource, label: str) -> Iterator[Waveform]:
    if isinstance(source, str | Path):
        return stream_audio(source)
    return iter([to_mono_16k(np.asarray(source), SAMPLE_RATE, name=label, allow_silence=True)])


def _counted(blocks: Iterator[Waveform], recording: _Recording) -> Iterator[Waveform]:
    for block in blocks:
        recording.duration_sec += len(block) / SAMPLE_RATE
        yield block


@contextmanager
def _reported(recording: _Recording, on_error: str) -> Iterator[None]:
    """With "skip", keep a bad recording's fault instead of raising it."""
    try:
        yield
    except AudioError as err:
        if on_error == "raise":
            raise
        logger.warning("skipped: %s", err)
        recording.error = str(err)


def _label(source: AudioSource, index: int) -> str:
    return str(source) if isinstance(source, str | Path) else f"array {index}"


def _joined(recording: _Recording, words: bool) -> Transcription:
    segments = tuple(
        TranscribedSegment.of(recording.results[i], segment.start_sec, segment.end_sec)
        for i, segment in enumerate(recording.segments)
    )
    return Transcription.of(recording.source, segments, recording.duration_sec, error=recording.error, words=words)
