"""From utterances to padded batches: a recording stays encoded until an example needs it.

Audio is padded to the longest clip of its batch only. Log-mel, silence and augmentation happen later, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.checking import SkippedUtterance, audio_name
from src.data.composition import Example
from src.data.labels import IGNORE_INDEX, EncodedLabel, LabelEncoder, TimedTokens
from src.data.no_speech import NoSpeechAudio
from src.data.utterance import Utterance
from src.utils.errors import AudioError, DataError

AudioLoader = Callable[..., Waveform]


class WhisperDataset(Dataset[dict[str, Any]]):
    """Utterances as decoded audio with encoded labels.

    Args:
        utterances: checked, with durations.
        encoder: of the model to train or measure.
        on_error: "skip" drops transcripts of more than 448 tokens into `skipped`; "raise" refuses them.
        load: how to decode, with the arguments of `load_audio`; for example `AudioCache(...).load_audio`.
    Raises: DataError: a transcript over 448 tokens, or a duration that is unknown: found here and not in the middle of
        training.

    Attributes:
        utterances: those that can be used.
        tokens: text tokens of each.
        prefix: special tokens before a text without timestamps.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        encoder: LabelEncoder,
        *,
        on_error: str = "raise",
        load: AudioLoader = load_audio,
    ) -> None:
        self.utterances: list[Utterance] = []
        self.skipped: list[SkippedUtterance] = []
        # made once: workers need no tokenizer, whose threads do not survive a fork
        self.tokens: list[tuple[int, ...]] = []
        self._encoder = encoder
        self.prefix = tuple(encoder.prefix)
        self._load = load
        for utterance in utterances:
            if utterance.duration_sec is None:
                raise DataError(f"utterance {utterance.id}: its duration is unknown; check_utterance measures it")
            tokens = encoder.tokenize(utterance.text)
            try:
                encoder.label(tokens)
            except DataError as err:
                if on_error == "raise":
                    raise DataError(f"utterance {utterance.id}: {err}") from err
                self.skipped.append(SkippedUtterance(utterance.id, str(err)))
                continue
            self.utterances.append(utterance)
            self.tokens.append(tokens)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, key: int | Example) -> dict[str, Any]:
        """Return one utterance, or one composed example.

        Returns: `utterance` (of an example of several clips: ids joined by "+", texts by spaces), `audio` (T,) float32
            at 16 kHz with zeros in the pauses, `label`, and `timed`: the label holds times.
        Raises: AudioError: naming the utterance and its file.
        """
        example = key if isinstance(key, Example) else Example((key,))
        utterances = [self.utterances[index] for index in example.indices]
        audios = [decode_audio(utterance, load=self._load) for utterance in utterances]
        return {
            "utterance": _joined(utterances, example),
            "audio": _with_pauses(audios, example.gaps_sec),
            "label": self._label(example, [len(audio) / SAMPLE_RATE for audio in audios]),
            "timed": example.timestamps,
        }

    def _label(self, example: Example, durations_sec: Sequence[float]) -> EncodedLabel:
        parts = [self.tokens[index] for index in example.indices]
        previous = () if example.previous is None else self.tokens[example.previous]
        if not example.timestamps:
            return self._encoder.label([token for part in parts for token in part], previous=previous)
        timed = []
        start_sec = 0.0
        for part, duration_sec, gap_sec in zip(parts, durations_sec, (*example.gaps_sec, 0.0), strict=True):
            timed.append(TimedTokens(part, start_sec, start_sec + duration_sec))
            start_sec += duration_sec + gap_sec
        return self._encoder.timed_label(timed, previous=previous)


def decode_audio(utterance: Utterance, *, load: AudioLoader = load_audio) -> Tensor:
    """Decode one utterance to (T,) float32 at 16 kHz.

    Args:
        load: with the arguments of `load_audio`.
    Raises: AudioError: naming the utterance and its file.
    """
    if isinstance(utterance.audio, NoSpeechAudio):
        return torch.from_numpy(utterance.audio.waveform())
    try:
        return torch.from_numpy(load(utterance.audio, name=audio_name(utterance)))
    except AudioError as err:
        raise AudioError(f"utterance {utterance.id}: {err}") from err


class DataCollator:
    """Pad a batch to its own longest clip and label.

    Returns a dict: `audio` (B, T) float32, `audio_lengths` (B,) int64 samples, `decoder_input_ids` and `labels` (B, L)
    int64 (-100 where no loss is due), `timed` (B,) bool (the label holds times, so the speed must stay), and lists
    `ids`, `texts`, `speakers`, `durations` (s), `meta` (other columns of the source; a dict each).
    """

    def __init__(self, end_token: int) -> None:
        self._end_token = end_token

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        audios = [item["audio"] for item in items]
        utterances: list[Utterance] = [item["utterance"] for item in items]
        inputs = [torch.tensor(item["label"].decoder_input_ids) for item in items]
        labels = [torch.tensor(item["label"].labels) for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "audio": pad(audios, batch_first=True),
            "audio_lengths": torch.tensor([len(audio) for audio in audios]),
            "decoder_input_ids": pad(inputs, batch_first=True, padding_value=self._end_token),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "timed": torch.tensor([item["timed"] for item in items]),
            "ids": [utterance.id for utterance in utterances],
            "texts": [utterance.text for utterance in utterances],
            "speakers": [utterance.speaker for utterance in utterances],
            "durations": [len(audio) / SAMPLE_RATE for audio in audios],
            "meta": [dict(utterance.meta) for utterance in utterances],
        }


def _joined(utterances: Sequence[Utterance], example: Example) -> Utterance:
    if len(utterances) == 1:
        return utterances[0]
    return replace(
        utterances[0],
        id="+".join(utterance.id for utterance in utterances),
        text=" ".join(utterance.text.strip() for utterance in utterances),
        duration_sec=example.duration_sec,
    )


def _with_pauses(audios: Sequence[Tensor], gaps_sec: Sequence[float]) -> Tensor:
    pieces = [audios[0]]
    for gap_sec, audio in zip(gaps_sec, audios[1:], strict=True):
        pieces += [torch.zeros(round(gap_sec * SAMPLE_RATE)), audio]
    return torch.cat(pieces) if len(pieces) > 1 else audios[0]
