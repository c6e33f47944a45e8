"""From utterances to padded batches: decoded audio with labels, joined and timed where the settings ask for it.

Audio is padded to the longest clip of its batch only. `training_batches` augments it; log-mel is made on the device.
"""

from __future__ import annotations

import io
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.augmentation.noise import coloured_noise
from src.data.labels import (
    IGNORE_INDEX,
    MAX_LABEL_TOKENS,
    MAX_PROMPT_TOKENS,
    MIN_NEW_TOKENS,
    RATE_MARGIN,
    LabelEncoder,
    TimedTokens,
)
from src.data.utterance import SkippedUtterance, Utterance, stable_hash
from src.data.vad import speech_edges
from src.utils.config import MAX_AUDIO_SEC, CompositionConfig
from src.utils.errors import AudioError, DataError
from src.utils.languages import join_texts

MIN_GAP_SEC, MAX_GAP_SEC = 0.2, 0.8  # pauses between sentences that are read aloud
TIMESTAMPS_PER_PART = 2
_NONE = -1  # instead of an index
MIN_PROMPT_TOKENS = 2  # the token that starts the previous text, and one of its own
SILENCE_SHARE = 0.25  # of the recordings without speech; the others are noise
NOISE_DBFS = (-70.0, -30.0)  # RMS: from a quiet microphone's own noise to a loud street behind a closed window

AudioLoader = Callable[..., Waveform]


class PackedRows:
    """Sequences of whole numbers of any lengths, in one array: a tuple of a few takes three times as much."""

    def __init__(self) -> None:
        self._values, self._ends = array("i"), array("q", [0])

    def append(self, row: Iterable[int]) -> None:
        """Add a row at the end."""
        self._values.extend(row)
        self._ends.append(len(self._values))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[int, ...]:
        at = range(len(self))[index]  # IndexError beyond the last
        return tuple(self._values[self._ends[at] : self._ends[at + 1]])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True)
class Example:
    """One training example."""

    indices: tuple[int, ...]  # of its clips in the data set, in the order in which they are heard
    gaps_sec: tuple[float, ...] = ()  # pauses between them, one fewer than clips; whole samples at 16 kHz
    timestamps: bool = False  # its label carries times
    previous: int | None = None  # index of the clip whose text is its prompt
    duration_sec: float = 0.0  # of the clips and the pauses


class Examples:
    """The examples of an epoch, in arrays: there are as many as rows."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._indices, self._timestamps, self._previous = PackedRows(), array("b"), array("i")
        self._gaps_sec: dict[int, tuple[float, ...]] = {}  # of joined ones
        self.durations_sec = array("d")
        for example in examples:
            if example.gaps_sec:
                self._gaps_sec[len(self)] = example.gaps_sec
            self._indices.append(example.indices)
            self._timestamps.append(example.timestamps)
            self._previous.append(_NONE if example.previous is None else example.previous)
            self.durations_sec.append(example.duration_sec)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        previous = None if self._previous[index] == _NONE else self._previous[index]
        timestamps, duration_sec = bool(self._timestamps[index]), self.durations_sec[index]
        return Example(self._indices[index], self._gaps_sec.get(index, ()), timestamps, previous, duration_sec)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))


class WhisperDataset(Dataset[dict[str, Any]]):
    """Utterances as decoded audio with encoded labels; what cannot be labelled is found here, not during training.

    Args:
        utterances: checked, with durations.
        encoder: of the model to train or measure.
        on_error: "skip" drops transcripts of more than 448 tokens into `skipped`; "raise" refuses them.
        load: how to decode, with the arguments of `load_audio`; for example `AudioCache(...).load_audio`.
    """

    def __init__(
        self, utterances: Sequence[Utterance], encoder: LabelEncoder, *, on_error: str = "raise",
        load: AudioLoader = load_audio,
    ) -> None:  # fmt: skip
        self.utterances: list[Utterance] = []
        self.skipped: list[SkippedUtterance] = []
        self.tokens = PackedRows()  # made once, since a tokenizer's threads do not survive a worker's fork
        self.token_counts = array("i")  # of the text in any label: also after another one, or timed
        self._encoder = encoder
        self._load = load
        for utterance in utterances:
            if not (utterance.duration_sec or 0.0) > 0:  # None, 0 or NaN
                raise DataError(f"utterance {utterance.id}: its duration is unknown; check_utterance measures it")
            if utterance.language is None and encoder.language is not None:
                utterance = replace(utterance, language=encoder.language)
            tokens = encoder.tokenize(utterance.text, utterance.language, space=utterance.label_space)
            timed = sum(len(part.tokens) for part in self._timed("a", utterance))
            longest = max(len(tokens), len(self._tokens_after("a", utterance, tokens)), timed)
            try:
                encoder.label(tokens, language=utterance.language)
            except DataError as err:
                if on_error == "raise":
                    raise DataError(f"utterance {utterance.id}: {err}") from err
                self.skipped.append(SkippedUtterance(utterance.id, str(err)))
            else:
                self.utterances.append(utterance)
                self.tokens.append(tokens)
                self.token_counts.append(longest)

    def __len__(self) -> int:
        return len(self.utterances)

    def _tokens_after(self, before: str, clip: Utterance, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return a clip's tokens as they follow a text, with a space where `join_texts` puts one; `tokens` first."""
        if not before:
            return tokens
        space = len(join_texts([before, clip.text.strip()])) > len(before + clip.text.strip())
        if space and self._encoder.begins_with_space(tokens):
            return tokens
        return self._encoder.tokenize(clip.text, clip.language, space=space, first=False)

    def _timed(self, before: str, clip: Utterance) -> list[TimedTokens]:
        """Return the parts that a clip's source gives with times, as they follow a text."""
        timed = []
        for part in clip.parts:
            said = replace(clip, text=part.text)
            first = self._encoder.tokenize(part.text, clip.language, space=clip.label_space)
            timed.append(TimedTokens(self._tokens_after(before, said, first), part.start_sec, part.end_sec))
            before = part.text
        return timed

    def token_rates(self) -> dict[str, float]:
        """Return tokens per second that may end a text in each language of the transcripts, for inference.

        It is the highest (tokens - 8) / duration of a clip, times 1.5; 8 tokens are allowed in any clip.
        """
        rates: dict[str, float] = {}
        for utterance, tokens in zip(self.utterances, self.tokens, strict=True):
            language = self._encoder.written_language(utterance.language) or "en"
            rate = RATE_MARGIN * (len(tokens) - MIN_NEW_TOKENS) / (utterance.duration_sec or math.inf)
            rates[language] = max(rates.get(language, 0.0), rate)
        return rates

    def prefix_of(self, index: int) -> tuple[int, ...]:
        """Return the special tokens before an utterance's text without timestamps."""
        return self._encoder.prefix_for(self.utterances[index].language)

    def __getitem__(self, key: int | Example) -> dict[str, Any]:
        """Return one utterance, or one composed example.

        A dict: `utterance` (of several clips: ids joined by "+", texts by `join_texts`), `audio` (T,) float32 at 16 kHz
        with zeros in the pauses, `label`, and `timed`: the label holds times, those of the source or of the speech.
        """
        example = key if isinstance(key, Example) else Example((key,))
        clips = [self.utterances[index] for index in example.indices]
        previous = () if example.previous is None else self.tokens[example.previous]
        # join the recordings, with zeros in the pauses, and note when each is heard
        pieces: list[Tensor] = []
        timed: list[TimedTokens] = []
        tokens: list[int] = []
        start_sec, before = 0.0, ""
        for index, clip, gap_sec in zip(example.indices, clips, (*example.gaps_sec, 0.0), strict=True):
            audio = decode_audio(clip, load=self._load)
            duration_sec = len(audio) / SAMPLE_RATE
            pieces += [audio, torch.zeros(round(gap_sec * SAMPLE_RATE))]
            said = self._tokens_after(before, clip, self.tokens[index])
            tokens += said
            if example.timestamps:
                parts = self._timed(before, clip) or [TimedTokens(said, *speech_edges(audio.numpy()))]
                timed += [part.shifted(start_sec) for part in parts]
            start_sec, before = start_sec + duration_sec + gap_sec, clip.text.strip()
        if example.timestamps:
            label = self._encoder.timed_label(timed, previous=previous, language=clips[0].language)
        else:
            label = self._encoder.label(tokens, previous=previous, language=clips[0].language)
        utterance = clips[0]
        if len(clips) > 1:
            name, text = "+".join(clip.id for clip in clips), join_texts(clip.text.strip() for clip in clips)
            utterance = replace(utterance, id=name, text=text, duration_sec=example.duration_sec)
            audio = torch.cat(pieces)
        return {"utterance": utterance, "audio": audio, "label": label, "timed": example.timestamps}


def decode_audio(utterance: Utterance, *, load: AudioLoader = load_audio) -> Tensor:
    """Decode one utterance to (T,) float32 at 16 kHz with `load`, or make it where it is one without speech.

    Raises:
        AudioError: it cannot be decoded; the message names the utterance and its file.
    """
    if isinstance(utterance.audio, NoSpeechAudio):
        return torch.from_numpy(utterance.audio.waveform())
    try:
        audio = torch.from_numpy(load(utterance.audio, name=utterance.audio_name))
        return audio[: round(MAX_AUDIO_SEC * SAMPLE_RATE)]  # the check takes clips that are up to 0.5 s longer
    except AudioError as err:
        raise AudioError(f"utterance {utterance.id}: {err}") from err


@dataclass(frozen=True)
class DataCollator:
    """Pad a batch to its own longest clip and label.

    Returns a dict: `audio` (B, T) float32, `audio_lengths` (B,) int64 samples, `decoder_input_ids` and `labels` (B, L)
    int64 (-100 where no loss is due), `timed` (B,) bool (the label holds times, so the speed must stay), and lists
    `ids`, `texts`, `languages`, `speakers`, `durations` (s), `meta` (other columns of the source, `snr_db`, `line`).
    """

    end_token: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of items that `WhisperDataset` gave."""
        audios: list[Tensor] = [item["audio"] for item in items]
        utterances: list[Utterance] = [item["utterance"] for item in items]
        inputs = [torch.tensor(item["label"].decoder_input_ids) for item in items]
        labels = [torch.tensor(item["label"].labels) for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "audio": pad(audios, batch_first=True),
            "audio_lengths": torch.tensor([len(audio) for audio in audios]),
            "decoder_input_ids": pad(inputs, batch_first=True, padding_value=self.end_token),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "timed": torch.tensor([item["timed"] for item in items]),
            "ids": [utterance.id for utterance in utterances],
            "texts": [utterance.text for utterance in utterances],
            "languages": [utterance.language for utterance in utterances],
            "speakers": [utterance.speaker for utterance in utterances],
            "durations": [len(audio) / SAMPLE_RATE for audio in audios],
            "meta": [utterance.columns for utterance in utterances],
        }


class ExamplePlanner:
    """Decides for each epoch which clips are heard, joined, timed and prompted; without weights each is heard once.

    Whisper was trained on 30 s of running speech with timestamps and the text before. A data set of single sentences
    takes that away from it; joining sentences of one speaker gives some of it back. What is made of which clip is a
    pure function of the seed and the epoch.

    Clips of one speaker and language are neighbours in the order of the data set; clips without a speaker count as one.
    A clip without text stands alone. The shares of `config` are of clips (`concatenate_prob`) or of examples, where
    there is room. `token_counts` are without special tokens, `prefix_tokens` those before a text.

    `weights` say how often clips are heard per epoch, by their `meta["source"]`: with 2.5 each twice, and half of them
    once more. That half changes from epoch to epoch, so that after some all were heard alike.
    """

    def __init__(
        self, utterances: Sequence[Utterance], token_counts: Sequence[int], *, prefix_tokens: int,
        config: CompositionConfig, seed: int, weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.weights = dict(weights or {})
        sources = [str(utterance.meta.get("source")) for utterance in utterances]
        self._weighted = {  # clips of each source, in hashed order
            name: sorted(
                (index for index, source in enumerate(sources) if source == name),
                key=lambda index: stable_hash(seed, f"{name} {index}"),
            )
            for name in self.weights
        }
        self._durations = array("d", (utterance.duration_sec or 0.0 for utterance in utterances))
        self._counts = token_counts
        self._times = array("i", (TIMESTAMPS_PER_PART * max(1, len(utterance.parts)) for utterance in utterances))
        self._room = MAX_LABEL_TOKENS - prefix_tokens - 1  # 1: the end token
        self._seed = seed
        groups: dict[tuple[str | None, str | None], array[int]] = {}
        for index, utterance in enumerate(utterances):
            if token_counts[index]:
                groups.setdefault((utterance.speaker, utterance.language), array("i")).append(index)
        self._groups = list(groups.values())
        self._before = array("i", [_NONE]) * len(utterances)
        for group in self._groups:
            for before, index in itertools.pairwise(group):
                self._before[index] = before
        self._planned: tuple[int, Examples] | None = None  # the last epoch asked for

    def longest_label(self, epoch: int) -> int:
        """Return the tokens of an epoch's longest label, special tokens and prompt included."""
        longest = 0
        for example in self.plan(epoch):
            text = sum(self._counts[i] + self._times[i] * example.timestamps for i in example.indices)
            prompt = 0 if example.previous is None else 1 + min(self._counts[example.previous], MAX_PROMPT_TOKENS)
            longest = max(longest, MAX_LABEL_TOKENS - self._room + text + prompt)
        return min(longest, MAX_LABEL_TOKENS)

    def durations_sec(self, epoch: int) -> Sequence[float]:
        """Return the seconds of an epoch's examples, pauses included."""
        return self.plan(epoch).durations_sec

    def plan(self, epoch: int) -> Examples:
        """Return an epoch's examples, in the order of their first clips."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._compose(epoch)
        return self._planned[1]

    def _times_heard(self, epoch: int) -> list[int]:
        """Return how often each clip is heard in an epoch."""
        times = [1] * len(self._durations)
        for name, order in self._weighted.items():
            whole, share = divmod(self.weights[name], 1)
            extra = max(round(share * len(order)), not whole)
            for index in order:
                times[index] = int(whole)
            for place in range(extra):  # goes round the clips from epoch to epoch
                times[order[(epoch * extra + place) % len(order)]] += 1
        return times

    def _compose(self, epoch: int) -> Examples:
        times = self._times_heard(epoch)
        examples = [
            example
            for number in range(max(times, default=0))
            for example in self._compose_once(epoch, number, [count > number for count in times])
        ]
        return Examples(sorted(examples, key=lambda example: example.indices))

    def _compose_once(self, epoch: int, number: int, heard: Sequence[bool]) -> Iterator[Example]:
        """Yield the examples of the clips that are heard in one of the passes of an epoch."""
        # one number of each kind for each clip: changing one share leaves the others' draws alone
        rng = np.random.default_rng((self._seed, epoch, number) if number else (self._seed, epoch))
        join, target, gap, timed, prompted = rng.random((5, len(self._durations))).tolist()
        # the pause before each clip in whole samples, so that sums in seconds are exact in samples
        gaps = [round((MIN_GAP_SEC + g * (MAX_GAP_SEC - MIN_GAP_SEC)) * SAMPLE_RATE) / SAMPLE_RATE for g in gap]
        yield from (
            Example((i,), duration_sec=self._durations[i]) for i, n in enumerate(self._counts) if not n and heard[i]
        )
        for whole in self._groups:
            group, at = [index for index in whole if heard[index]], 0
            while at < len(group):
                run = self._run(group, at, gaps, target[group[at]]) if self.config.concatenate_prob else [group[at]]
                at += len(run)
                # each clip is in one run, so that keeping a run with this probability joins this share of the clips
                runs = [run] if join[run[0]] < self.config.concatenate_prob else [[index] for index in run]
                yield from (self._example(run, gaps, timed[run[0]], prompted[run[0]]) for run in runs)

    def _run(self, group: list[int], at: int, gaps: list[float], target: float) -> list[int]:
        """Return the clip at a place and its following neighbours up to a drawn length, at least two where two fit."""
        longest_sec = min(self.config.max_concatenated_sec, MAX_AUDIO_SEC)
        seconds = self._durations[group[at]]
        tokens = self._counts[group[at]] + self._times[group[at]]
        limit_sec = 0.0
        end = at + 1
        while end < len(group):
            seconds += gaps[group[end]] + self._durations[group[end]]
            tokens += self._counts[group[end]] + self._times[group[end]]
            if end == at + 1:  # between two clips and the longest allowed
                limit_sec = min(seconds + target * (longest_sec - seconds), longest_sec)
            if seconds > limit_sec or tokens > self._room:
                break
            end += 1
        return group[at:end]

    def _example(self, run: list[int], gaps: list[float], timed: float, prompted: float) -> Example:
        pauses = tuple(gaps[index] for index in run[1:])
        tokens = sum(self._counts[index] for index in run)
        with_times = tokens + sum(self._times[index] for index in run)
        timestamps = timed < self.config.timestamp_prob and with_times <= self._room
        fits = (with_times if timestamps else tokens) + MIN_PROMPT_TOKENS <= self._room
        has_prompt = fits and prompted < self.config.previous_text_prob and self._before[run[0]] != _NONE
        previous = self._before[run[0]] if has_prompt else None
        seconds = sum(self._durations[index] for index in run) + sum(pauses)
        return Example(tuple(run), pauses, timestamps, previous, seconds)


@dataclass(frozen=True)
class NoSpeechAudio:
    """A recording that is made, not decoded: digital silence, or noise of a drawn colour and level."""

    seed: int  # with the id of the utterance, decides every sample
    id: str
    duration_sec: float

    def waveform(self) -> Waveform:
        """Return (T,) float32 at 16 kHz: zeros, or noise whose power falls with f^0 (white) to f^-2 (brown)."""
        rng = _generator(self.seed, self.id)
        samples = round(self.duration_sec * SAMPLE_RATE)
        if rng.random() < SILENCE_SHARE:
            return np.zeros(samples, dtype=np.float32)
        exponent = torch.tensor([rng.uniform(0.0, 2.0)])
        level_dbfs = rng.uniform(*NOISE_DBFS)
        noise = coloured_noise((1, samples), exponent, torch.Generator().manual_seed(int(rng.integers(2**62))))[0]
        waveform: Waveform = (noise * 10 ** (level_dbfs / 20)).numpy()
        return waveform

    def read(self) -> bytes:
        """Return the same as the bytes of a float WAV file, for players and whatever else takes encoded audio."""
        buffer = io.BytesIO()
        sf.write(buffer, self.waveform(), SAMPLE_RATE, format="WAV", subtype="FLOAT")
        return buffer.getvalue()


def make_no_speech(utterances: Sequence[Utterance], *, fraction: float, seed: int) -> list[Utterance]:
    """Make utterances of nothing, with an empty text, each as long as one of the training set.

    Fine-tuning on speech alone makes Whisper write something into every silence. A small share of these, a `fraction`
    of the number of utterances, teaches the end token there.
    """
    made = []
    for number in range(1, round(fraction * len(utterances)) + 1):
        name = f"no-speech-{number:04d}"
        model = utterances[int(_generator(seed, f"{name}:duration").integers(len(utterances)))]
        duration_sec = model.duration_sec or 0.0  # unknown: `WhisperDataset` refuses it
        audio = NoSpeechAudio(seed, name, duration_sec)
        made.append(Utterance(name, audio, text="", language=model.language, duration_sec=duration_sec))
    return made


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(bytes.fromhex(stable_hash(seed, name))[:8], "little"))
