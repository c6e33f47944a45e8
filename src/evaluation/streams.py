"""Long streams made of clips, with the true time of every word.

Word ends come from forced alignment of the transcripts, clip by clip; nothing is decoded. Attention puts most of a
pause into the word before it, so each word is cut to the stretch of speech that it overlaps most, as the VAD hears it.

Compared with an HMM aligner (pocketsphinx 5.1; 46 clips of adults, 351 words, 2026-11-28), the last words of clips end
0.43 s (tiny.en) and 0.51 s (base) late in the median without the cut, 0.09 s with it. Other words end 0.13 s late with
tiny.en, which would flatter every latency by as much, and 0.07 s early with base: align with base or larger.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.augmentation.noise import EXPONENTS, coloured_noise, mix_at_snr
from src.data.dataset import decode_audio
from src.data.labels import LabelEncoder, apply_case, resolve_case
from src.data.sources.catalog import CLIP_TEXT, SAMPLE_CLIP
from src.data.utterance import Utterance
from src.data.vad import SpeechSegment, VoiceActivityDetector
from src.inference.alignment import force_align
from src.inference.torch_engine import encode
from src.inference.words import Word
from src.utils.config import VADConfig
from src.utils.errors import DataError, ModelError
from src.utils.languages import join_texts, normalize_plain

logger = logging.getLogger(__name__)

PAUSE_SEC = (0.3, 0.8)  # between clips, as speakers pause between sentences
PUBLIC_CLIP = Utterance("jfk", SAMPLE_CLIP, CLIP_TEXT, speaker="John F. Kennedy", language="en")
_TRAILING_SILENCE_SEC = 0.5  # for an encoder of dynamic context; 30 s hold enough silence
_SPEECH = VADConfig(pad_sec=0.0, min_silence_sec=0.2, min_speech_sec=0.05)  # 0.2: longer than the closure of a stop


@dataclass(frozen=True)
class AlignedClip:
    """A clip, (T,) float32 at 16 kHz, and the times of its words in seconds of the clip."""

    id: str
    text: str
    audio: Waveform
    words: tuple[Word, ...] = ()
    language: str | None = None


@dataclass(frozen=True)
class SpokenWord:
    """A word of the reference, or a character where its script has no spaces."""

    text: str
    start_sec: float  # of its stream
    end_sec: float
    clip: int  # index


@dataclass(frozen=True)
class StreamClip:
    """A clip in its stream, without the pause after it."""

    id: str
    text: str
    start_sec: float
    end_sec: float
    language: str | None = None


@dataclass(frozen=True)
class SpeechStream:
    """Clips in a row, as they would arrive live."""

    name: str
    audio: Waveform  # (T,) float32, 16 kHz
    clips: tuple[StreamClip, ...]  # in order; a repeated clip is listed several times
    words: tuple[SpokenWord, ...] = ()  # of all clips in order; empty where the clips were not aligned
    no_speech: tuple[tuple[float, float], ...] = ()  # stretches in seconds, without the pauses between clips

    @property
    def duration_sec(self) -> float:
        """Length of the audio in seconds."""
        return len(self.audio) / SAMPLE_RATE

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the clips, in order."""
        return tuple(clip.id for clip in self.clips)

    @property
    def text(self) -> str:
        """The clips' transcripts, joined as their scripts are."""
        return join_texts(clip.text for clip in self.clips)

    @property
    def language(self) -> str | None:
        """The language of all clips; None where one says none, or where they have several."""
        languages = {clip.language for clip in self.clips}
        return languages.pop() if len(languages) == 1 else None

    @property
    def repeats(self) -> int:
        """How often the most frequent clip is heard; 1 where all are different."""
        return max(Counter(self.ids).values())

    def clip_audios(self) -> list[Waveform]:
        """Return the audio of each clip as it is in the stream, noise included, to decode one by one."""
        return [self.audio[_samples(clip.start_sec) : _samples(clip.end_sec)] for clip in self.clips]


def make_stream(utterances: Sequence[Utterance], *, num_clips: int, seed: int) -> SpeechStream:
    """Join clips taken at a stride over all of `utterances`; its words have no times, `seed` is as in `join_clips`.

    A session has one language: of utterances in several, those in the most frequent one are taken.
    """
    if not utterances:
        raise DataError("make_stream: no utterance given")
    sizes = Counter(u.language for u in utterances)
    if len(sizes) > 1:
        language, count = sizes.most_common(1)[0]
        what = "stream: of clips in %d languages, the %d in %r, since a session has one"
        logger.info(what, len(sizes), count, language)
        utterances = [u for u in utterances if u.language == language]
    picks = np.linspace(0, len(utterances) - 1, min(num_clips, len(utterances))).round().astype(int)
    chosen = [utterances[i] for i in picks]
    clips = [AlignedClip(u.id, u.text, decode_audio(u).numpy(), language=u.language) for u in chosen]
    return join_clips(clips, name=f"{len(clips)} clips", seed=seed)


def join_clips(
    clips: Sequence[AlignedClip], *, name: str, seed: int, duration_sec: float | None = None
) -> SpeechStream:
    """Join clips, at least one, with a pause of digital silence after each.

    The seed is of the pauses' lengths, uniform in `PAUSE_SEC`, and of the order in which clips are repeated. With
    `duration_sec` the clip that reaches it is the last; too few clips are repeated, shuffled each time, which is
    logged. Without, each clip is taken once.
    """
    if not clips:
        raise DataError(f"stream {name!r}: no clip given")
    rng = np.random.default_rng(seed)
    shuffled = (clips[i] for _ in itertools.count() for i in rng.permutation(len(clips)))
    placed: list[StreamClip] = []
    words: list[SpokenWord] = []
    pieces: list[Waveform] = []
    heard = 0  # samples
    for clip in clips if duration_sec is None else itertools.chain(clips, shuffled):
        if duration_sec is not None and heard >= duration_sec * SAMPLE_RATE:
            break
        start_sec = heard / SAMPLE_RATE
        words += [SpokenWord(w.text, start_sec + w.start_sec, start_sec + w.end_sec, len(placed)) for w in clip.words]
        end_sec = start_sec + len(clip.audio) / SAMPLE_RATE
        placed.append(StreamClip(clip.id, clip.text, start_sec, end_sec, clip.language))
        pieces += [clip.audio, np.zeros(_samples(rng.uniform(*PAUSE_SEC)), np.float32)]
        heard += sum(map(len, pieces[-2:]))
    stream = SpeechStream(name, np.concatenate(pieces), tuple(placed), tuple(words))
    if stream.repeats > 1:
        what = "stream %r: %d clips are too few for %.0f s; some are heard %d times"
        logger.warning(what, name, len(clips), stream.duration_sec, stream.repeats)
    return stream


def add_noise(
    stream: SpeechStream, *, snr_db: float, seed: int, silence_sec: float = 60.0, noise_sec: float = 60.0
) -> SpeechStream:
    """Mix pink noise into a stream, and insert silence and then the noise alone between two clips in its middle.

    `snr_db` is over the whole stream, pauses included; the mixture is scaled down where its peak would exceed 1.0.
    """
    samples, alone = len(stream.audio), _samples(noise_sec)
    generator = torch.Generator().manual_seed(seed)
    noise = coloured_noise((1, samples + alone), torch.tensor([EXPONENTS["pink"]]), generator)
    speech = torch.nn.functional.pad(torch.from_numpy(stream.audio), (0, alone))[None]
    mixed = mix_at_snr(speech, noise, snr_db=snr_db, lengths=torch.tensor([samples]))[0]  # its end is noise alone
    mixed /= mixed.abs().max().clamp(min=1.0)
    gap = torch.cat([torch.zeros(_samples(silence_sec)), mixed[samples:]]).numpy()

    # insert the gap between the two clips nearest to the middle
    places = [*(clip.start_sec for clip in stream.clips[1:]), stream.duration_sec]
    at_sec = min(places, key=lambda place: abs(place - stream.duration_sec / 2))
    edges = [at_sec, at_sec + silence_sec, at_sec + silence_sec + noise_sec]

    def moved(item: Any) -> Any:
        by_sec = len(gap) / SAMPLE_RATE if item.start_sec >= at_sec else 0.0
        return replace(item, start_sec=item.start_sec + by_sec, end_sec=item.end_sec + by_sec)

    return SpeechStream(
        f"{stream.name}, pink noise at {snr_db:g} dB",
        np.insert(mixed[:samples].numpy(), _samples(at_sec), gap),
        tuple(map(moved, stream.clips)),
        tuple(map(moved, stream.words)),
        tuple((begin, end) for begin, end in itertools.pairwise(edges) if end > begin),
    )


def _samples(sec: float) -> int:
    return round(sec * SAMPLE_RATE)


class WordAligner:
    """Finds when each word of a transcript is said, by the alignment heads of a stock model at 30 s.

    In scripts without spaces it finds each character. Multilingual models need the language of the transcripts:
    `language` is that of utterances that do not say theirs.
    """

    def __init__(self, model: Any, processor: Any, *, language: str | None = "en") -> None:
        self._model, self._tokenizer, self._language = model, processor.tokenizer, language
        self._labels = LabelEncoder(processor.tokenizer, language=language)
        self._vad = VoiceActivityDetector(_SPEECH)

    def align(self, utterance: Utterance) -> AlignedClip:
        """Align a clip of at most 30 s that has a transcript."""
        audio = decode_audio(utterance).numpy()
        language = utterance.language or self._language
        # a text in capitals is unlikely to the model, and its attention strays
        text = apply_case(utterance.text, resolve_case([utterance.text], "auto"), language)
        tokens = self._labels.tokenize(text, language)
        if not tokens:
            raise DataError(f"utterance {utterance.id}: no transcript to align; leave it out of the stream")
        try:
            hidden = encode(self._model, [audio], _TRAILING_SILENCE_SEC).last_hidden_state
        except ModelError as err:
            raise ModelError(f"utterance {utterance.id}: {err}") from err
        aligned = force_align(
            self._model, self._tokenizer, hidden,
            sot_sequence=self._labels.prefix_for(language), tokens=tokens, audio_sec=len(audio) / SAMPLE_RATE,
        )  # fmt: skip
        words = [word for word in aligned if normalize_plain(word.text)]  # no lone dash
        cut = cut_to_speech(words, self._vad.speech_segments(audio))
        return AlignedClip(utterance.id, utterance.text, audio, cut, language)


def cut_to_speech(words: Sequence[Word], speech: Sequence[SpeechSegment]) -> tuple[Word, ...]:
    """Cut each word to the stretch of speech that it overlaps most; a word that overlaps none is kept."""
    cut = []
    for word in words:
        shared = [(max(word.start_sec, s.start_sec), min(word.end_sec, s.end_sec)) for s in speech]
        start_sec, end_sec = max(shared, key=lambda part: part[1] - part[0], default=(0.0, 0.0))
        cut.append(replace(word, start_sec=start_sec, end_sec=end_sec) if end_sec > start_sec else word)
    return tuple(cut)
