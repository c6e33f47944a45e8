"""Files to text: recordings of any length, cut at silences and decoded in batches, or in windows of 30 s.

Files are read, cut and decoded in rounds of bounded audio, so that any number of files of any length fits into memory.
Within a round, segments go from long to short: batches then hold little padding. A text that looks like a loop or a
guess is decoded again at a temperature.

A recording has one language: given for it, else that of the settings, else the checkpoint's own, else what the model
hears in the first 30 s of speech.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from src.data.audio import SAMPLE_RATE, Waveform, stream_audio, to_mono_16k
from src.data.utterance import language_of_row
from src.data.vad import SpeechSegment, VoiceActivityDetector
from src.inference.captions import CaptionOptions, Cue, cues_of_segments, make_cues
from src.inference.engine_base import Engine, batchable
from src.inference.engines import engine_of
from src.inference.files.segmentation import (
    DETECTION_LOOK_SEC,
    DETECTION_SEC,
    Segment,
    TranscribedSegment,
    cut_at_silences,
    cut_to_fit,
    decode_segments,
    decode_windows,
    hear_language,
    is_language_open,
    max_speech_sec,
    speech_of,
)  # fmt: skip
from src.inference.hotwords import read_hotwords
from src.inference.options import DecodingOptions
from src.inference.words import Word
from src.utils.config import Config
from src.utils.errors import AudioError, DataError, visible
from src.utils.languages import join_texts, parse_language, space_between, text_language
from src.utils.logging_config import ProgressBar
from src.utils.runtime import FittingSize, thread_pool

logger = logging.getLogger(__name__)

Source = str | Path | Waveform | Iterator[Waveform]
Sources = Iterable[Source]
ROUND_SEC = 900.0  # of audio that is held at once: 58 MB
ROUND_BATCHES = 8  # per worker: enough to sort by length
MOSTLY_SPEECH = 0.5  # share of a clip that is detected together with what else is in it

# A longer pause separates segments. Models tuned on single sentences at their own length stop after the first sentence:
# of four in 20 s they leave 21% of the words out. Uncut WER 26.9%, cut at every pause 9.9%, at those above 1 s 8.3%,
# above 1.5 s 9.4% (tiny.en int8, bundled test clips by fours, 0.8 s apart, 2026-11-28). Stock models know 30 s.
JOIN_PAUSE_SEC = {"full": 30.0, "dynamic": 1.0}


@dataclass(frozen=True)
class Transcription:
    """The text of one recording."""

    source: str  # the path, or "array N"
    text: str | None  # segments joined as their script is; None where the recording could not be decoded
    duration_sec: float  # of the audio; nan where it could not be decoded
    segments: tuple[TranscribedSegment, ...] = ()  # those with text, in order
    words: tuple[Word, ...] | None = None  # times from the recording's start; None unless asked for
    language: str | None = None  # None for English-only models and silence
    uncovered: tuple[SpeechSegment, ...] = ()  # speech that the text leaves out, though it was decoded again
    error: str | None = None  # why there is no text

    @property
    def truncated(self) -> bool:
        """Whether a segment's text ended at a limit of tokens, so that there may be more."""
        return any(segment.truncated for segment in self.segments)

    def cues(self, *, task: str = "transcribe") -> tuple[Cue, ...]:
        """Return its captions, laid out for its language: by the times of words where these are known."""
        options = CaptionOptions.of(text_language(self.language, task))
        return cues_of_segments(self.segments, options) if self.words is None else make_cues(self.words, options)

    def to_json(self) -> dict[str, Any]:
        """Return the fields and `truncated` as JSON takes them; nan becomes None."""
        fields: dict[str, Any] = _for_json(asdict(self))
        return {**fields, "truncated": self.truncated}


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):  # of words `space` only where there is none, and nothing of their tokens
        without = {"tokens", "token_ids", "logprob", *(["space"] if value.get("space") else [])}
        return {key: _for_json(each) for key, each in value.items() if key not in without}
    if isinstance(value, list | tuple):
        return [_for_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Transcriptions(Sequence[Transcription]):
    """Results in the order of the input, and what they cost."""

    items: tuple[Transcription, ...]
    compute_sec: float  # wall time of reading, cutting, features, encoder and decoder

    @property
    def audio_sec(self) -> float:
        """Audio transcribed."""
        return float(np.nansum([item.duration_sec for item in self.items]))

    @property
    def rtf(self) -> float:
        """Real-time factor: compute over audio, a ratio of sums; nan where nothing was transcribed."""
        return self.compute_sec / self.audio_sec if self.audio_sec else float("nan")

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class _Recording:
    """A recording in progress: its segments are decoded in any order."""

    source: str
    language: str | None = None
    duration_sec: float = 0.0
    error: str | None = None
    cut: int = 0  # segments so far
    cut_sec: float = 0.0  # their length
    is_read: bool = False
    speech: Waveform = field(default_factory=lambda: np.zeros(0, dtype=np.float32))  # its first, to hear the language
    decoded: dict[float, tuple[TranscribedSegment, ...]] = field(default_factory=dict)  # by start

    def joined(self, *, words: bool) -> Transcription:
        """Join the segments; with an error there is no text, whatever was decoded before it."""
        if self.error is not None:
            return Transcription(self.source, None, float("nan"), error=self.error)
        in_order = tuple(itertools.chain.from_iterable(parts for _, parts in sorted(self.decoded.items())))
        spoken = tuple(segment for segment in in_order if segment.text)
        if words:
            befores = ["", *(segment.text for segment in spoken)]
            spoken = tuple(_after(text, segment) for text, segment in zip(befores, spoken, strict=False))
        return Transcription(
            self.source,
            join_texts(segment.text for segment in spoken),
            self.duration_sec,
            spoken,
            tuple(word for segment in spoken for word in segment.words or ()) if words else None,
            spoken[0].language if spoken else None,
            tuple(gap for segment in in_order for gap in segment.uncovered),
        )


def _after(text: str, segment: TranscribedSegment) -> TranscribedSegment:
    """Return a segment whose first word has a space if there is one between its text and the text before."""
    first, *rest = segment.words or (None,)
    if first is None:
        return segment
    space = bool(space_between(text, segment.text) or (first.space and not text))
    return replace(segment, words=(replace(first, space=space), *rest))


_Item = tuple[_Recording, int, Segment]  # a segment, or a part of it, with its index in the recording
_Readings = Iterable[AbstractContextManager[tuple[_Recording, Iterator[Waveform]]]]  # of `_reading`
_Show = Callable[[_Recording], object]  # takes note of what is there of a recording


class BatchInference:
    """Transcribes files and arrays with a `DynamicWhisper` and its processor, or an engine from `load_engine`.

    The `inference`, `model` and `vad` sections of `config` apply, and `data.audio_track`; `vad` cuts recordings and
    detects silence.
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
        config = config or Config()
        self._engine, self._settings = engine_of(model, processor, engine), config.inference
        self._fitting = FittingSize()
        self._track = config.data.audio_track
        self._vad = vad or VoiceActivityDetector(config.vad)
        texts: Any = {"prompt": self._settings.initial_prompt, "hotwords": read_hotwords(self._settings.hotwords)}
        self._options = replace(DecodingOptions.from_config(config), **texts)

    def transcribe_batch(self, sources: Sequence[Source], **options: Any) -> Transcriptions:
        """Transcribe recordings of any length: paths, (T,) float32 arrays at 16 kHz, or iterators over such blocks.

        One `Transcription` per source, in order; options: see `transcribe_iter`. Silence gives an empty text.
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
        sources: Sources,
        *,
        word_timestamps: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        mode: Literal["segments", "sequential"] = "segments",
        languages: Mapping[Any, str | None] | None = None,
        on_progress: Callable[[Transcription], object] | None = None,
    ) -> Iterator[Transcription]:
        """Transcribe any number of recordings, in memory that does not grow with them.

        Args:
            sources: as in `transcribe_batch`; may be a generator.
            word_timestamps: fill `words`.
            on_error: "raise" an AudioError of a bad recording, or "skip": report it in its `Transcription.error`.
            mode: "segments" cuts at silences and decodes in batches; "sequential" goes through a recording in windows
                of 30 s, each with the text before it as context, for models that write timestamps.
            languages: of recordings whose language is known, by source (of an array "array N"): codes or names, as in
                a manifest. It comes before that of the settings.
            on_progress: is given what is there of a recording after each batch: a beginning of its text. Batches then
                go in order, which is a little slower.
        """
        options = replace(self._options, word_timestamps=word_timestamps)
        marks = {str(source): language_of_row({"language": mark}) for source, mark in (languages or {}).items()}
        spoken = {source: parse_language(mark) for source, mark in marks.items() if mark is not None}
        total = len(sources) if isinstance(sources, Sequence) else None
        by_mode = self._one_by_one if mode == "sequential" else self._in_rounds
        readings = (_reading(each, index, spoken, on_error, self._track) for index, each in enumerate(sources))
        show = None if on_progress is None else lambda recording: on_progress(recording.joined(words=word_timestamps))
        with ProgressBar(total=total, desc="transcribing", unit="file", disable=total == 1) as bar:
            for recording in by_mode(readings, options, show):
                bar.update()
                done = recording.joined(words=word_timestamps)
                if done.truncated:
                    cut_off = [f"{segment.start_sec:.1f} s" for segment in done.segments if segment.truncated]
                    logger.warning(
                        "%s: texts from %s ended at a limit of tokens", visible(done.source), ", ".join(cut_off[:5])
                    )
                if done.uncovered:
                    gaps = ", ".join(f"{gap.start_sec:.1f} to {gap.end_sec:.1f} s" for gap in done.uncovered[:5])
                    logger.warning("%s: speech has no text, or too little: %s", visible(done.source), gaps)
                yield done

    def _one_by_one(self, readings: _Readings, options: DecodingOptions, show: _Show | None) -> Iterator[_Recording]:
        for reading in readings:
            with reading as (recording, blocks):
                own = replace(options, language=recording.language or options.language)
                found = decode_windows(self._engine, blocks, own, self._settings, vad=self._vad, name=recording.source)
                for number, segment in enumerate(found):
                    recording.decoded[float(number)] = (segment,)
                    if show is not None:
                        show(recording)
            yield recording

    def _in_rounds(self, readings: _Readings, options: DecodingOptions, show: _Show | None) -> Iterator[_Recording]:
        """Gather segments until there are enough of them, or of audio; decode them, and yield what is complete."""
        max_segments = (ROUND_BATCHES if show is None else 1) * self._settings.batch_size * self._engine.workers
        max_sec, pause_sec = self._settings.max_segment_sec, self._settings.join_pause_sec
        pause_sec = JOIN_PAUSE_SEC[self._engine.audio_context] if pause_sec is None else pause_sec
        is_open = is_language_open(self._engine, options)
        waiting: deque[_Recording] = deque()
        round_: list[_Item] = []

        def is_ready(recording: _Recording) -> bool:
            """Whether enough of a recording was heard to know its language."""
            enough = len(recording.speech) >= DETECTION_SEC * SAMPLE_RATE or recording.cut_sec >= DETECTION_LOOK_SEC
            return not is_open or recording.language is not None or recording.is_read or enough

        def decode() -> Iterator[_Recording]:
            ready = [item for item in round_ if is_ready(item[0])]  # the others wait
            round_[:] = [item for item in round_ if not is_ready(item[0])]
            self._decode_round(ready, options)
            if show is not None:
                for recording in {id(item[0]): item[0] for item in ready}.values():
                    show(recording)
            while waiting and waiting[0].is_read and len(waiting[0].decoded) == waiting[0].cut:
                yield waiting.popleft()

        for reading in readings:
            with reading as (recording, blocks):
                waiting.append(recording)
                for segment in cut_at_silences(blocks, self._vad, max_sec=max_sec, join_pause_sec=pause_sec):
                    round_.append((recording, recording.cut, segment))
                    recording.cut += 1
                    recording.cut_sec += segment.end_sec - segment.start_sec
                    if not is_ready(recording):
                        recording.speech = np.concatenate([recording.speech, speech_of(segment.audio, self._vad)])
                    ready = [segment for each, _, segment in round_ if is_ready(each)]
                    held_sec = sum(segment.end_sec - segment.start_sec for segment in ready)
                    if len(ready) >= max_segments or held_sec >= ROUND_SEC:
                        yield from decode()
            recording.is_read = True
        yield from decode()

    def _decode_round(self, round_: Sequence[_Item], options: DecodingOptions) -> None:
        """Decode segments in batches from long to short, each batch in one language."""
        with thread_pool(self._engine.workers) as pool:
            # torch has its threads where the model was loaded: in another thread of Python it makes as many again
            run: Any = pool.map if self._engine.workers > 1 else map
            if is_language_open(self._engine, options):
                # a clip that is a recording by itself is detected while it is decoded, unless little of it is speech
                open_ones = {id(item[0]): item for item in reversed(round_) if item[0].language is None}

                def hear(recording: _Recording, _: int, segment: Segment) -> None:
                    speech, recording.speech = recording.speech, recording.speech[:0]
                    is_clip = recording.is_read and recording.cut == 1
                    if not is_clip or 0 < len(speech) < MOSTLY_SPEECH * len(segment.audio):
                        speech = speech if len(speech) else segment.audio
                        recording.language = hear_language(self._engine, speech, options, recording.source)

                list(run(lambda item: hear(*item), open_ones.values()))  # raises what a thread raised

            items: list[_Item] = []
            for recording, index, segment in round_:
                code = recording.language or options.language
                max_sec = max_speech_sec(self._engine, code, options)
                parts = cut_to_fit(segment, max_sec, self._vad) if code or self._engine.language else [segment]
                recording.cut += len(parts) - 1
                items += [(recording, index, part) for part in parts]
            by_language: dict[str | None, list[_Item]] = defaultdict(list)
            for item in sorted(items, key=lambda item: len(item[2].audio), reverse=True):
                by_language[item[0].language or options.language].append(item)
            size = self._settings.batch_size
            batches = list[tuple[list[_Item], DecodingOptions]]()
            for language, alike in by_language.items():
                own, lengths = replace(options, language=language), [len(segment.audio) for *_, segment in alike]
                batches += [
                    ([alike[i] for i in rows[at : at + size]], own)
                    for rows in batchable(self._engine, lengths, own)
                    for at in range(0, len(rows), size)
                ]
            list(run(lambda batch: self._decode_batch(*batch), batches))

    def _decode_batch(self, items: Sequence[_Item], options: DecodingOptions) -> None:
        def decode(first: int, last: int) -> list[tuple[TranscribedSegment, ...]]:
            segments = [segment for _, _, segment in items[first:last]]
            return decode_segments(self._engine, segments, options, self._settings, vad=self._vad)

        names = [f"segment {index + 1} of {recording.source}" for recording, index, _ in items]
        parts = self._fitting.run(decode, names)
        for (recording, _, segment), found in zip(items, itertools.chain.from_iterable(parts), strict=True):
            recording.decoded[segment.start_sec] = found


@contextmanager
def _reading(
    source: Source, index: int, languages: Mapping[str, str], on_error: str, track: int | None
) -> Iterator[tuple[_Recording, Iterator[Waveform]]]:
    """Give a recording and its audio in blocks; with "skip", keep a bad recording's fault instead of raising it."""
    name = str(source) if isinstance(source, str | Path) else f"array {index}"
    recording = _Recording(name, languages.get(name))

    def blocks() -> Iterator[Waveform]:
        if isinstance(source, str | Path):
            audio = stream_audio(source, track=track)
        elif isinstance(source, Iterator):
            audio = source
        else:
            audio = iter([to_mono_16k(np.asarray(source), SAMPLE_RATE, name=recording.source, allow_silence=True)])
        for block in audio:
            recording.duration_sec += len(block) / SAMPLE_RATE
            yield block

    try:
        yield recording, blocks()
    except AudioError as err:
        if on_error == "raise":
            raise
        logger.warning("skipped: %s", err)
        recording.error = str(err)
