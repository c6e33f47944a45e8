"""From utterances to batches: every recording is decoded once and checked, split by speaker, and batched by length.

Audio stays encoded until a batch needs it, and is padded to the longest clip of its batch only. Log-mel, silence and
augmentation happen later, on the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.labels import IGNORE_INDEX, EncodedLabel, LabelEncoder
from src.data.preparation import DatasetSplits, SkippedUtterance, enforce_skip_policy
from src.data.utterance import Utterance
from src.utils.config import Config
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

BUCKET_BATCHES = 8  # batches sorted together: enough to cut padding, few enough to keep batches mixed


class WhisperDataset(Dataset[dict[str, Any]]):
    """Utterances as decoded audio with encoded labels.

    Args:
        utterances: checked, with durations.
        encoder: of the model to train or measure.
        on_error: "skip" drops transcripts of more than 448 tokens into `skipped`; "raise" refuses them.
    Raises: DataError: a transcript over 448 tokens, found here and not in the middle of training.
    """

    def __init__(self, utterances: Sequence[Utterance], encoder: LabelEncoder, *, on_error: str = "raise") -> None:
        self.utterances: list[Utterance] = []
        self.skipped: list[SkippedUtterance] = []
        self._labels: list[EncodedLabel] = []
        for utterance in utterances:
            try:
                label = encoder.encode(utterance.text)
            except DataError as err:
                if on_error == "raise":
                    raise DataError(f"utterance {utterance.id}: {err}") from err
                self.skipped.append(SkippedUtterance(utterance.id, str(err)))
                continue
            self.utterances.append(utterance)
            self._labels.append(label)

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance, label = self.utterances[index], self._labels[index]
        return {"utterance": utterance, "audio": decode_audio(utterance), "label": label}

    @property
    def durations_sec(self) -> list[float]:
        """Seconds of each utterance."""
        return [utterance.duration_sec or math.nan for utterance in self.utterances]


def decode_audio(utterance: Utterance) -> Tensor:
    """Decode one utterance to (T,) float32 at 16 kHz.

    Raises: AudioError: naming the utterance and its file.
    """
    name = str(utterance.audio) if isinstance(utterance.audio, Path) else "embedded audio"
    try:
        return torch.from_numpy(load_audio(utterance.audio, name=name))
    except AudioError as err:
        raise AudioError(f"utterance {utterance.id}: {err}") from err


class DataCollator:
    """Pad a batch to its own longest clip and label.

    Returns a dict: `audio` (B, T) float32, `audio_lengths` (B,) int64 samples, `decoder_input_ids` and `labels` (B, L)
    int64 (-100 where no loss is due), and lists `ids`, `texts`, `speakers`, `durations` (s).
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
            "ids": [utterance.id for utterance in utterances],
            "texts": [utterance.text for utterance in utterances],
            "speakers": [utterance.speaker for utterance in utterances],
            "durations": [len(audio) / SAMPLE_RATE for audio in audios],
        }


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of clips of similar length; every index exactly once an epoch.

    Args:
        durations_sec: one a clip.
        batch_size: clips a batch; the last one may be smaller.
        shuffle: mix clips and batches anew each epoch; else from long to short: too little memory shows at once.
        seed: with the epoch, decides the order.
    """

    drop_last = False

    def __init__(self, durations_sec: Sequence[float], batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self._durations = list(durations_sec)
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._durations) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._shuffle:
            yield from self._cut(sorted(range(len(self._durations)), key=self._durations.__getitem__, reverse=True))
            return
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * self._epoch)
        order = torch.randperm(len(self._durations), generator=generator).tolist()
        size = self.batch_size * BUCKET_BATCHES
        buckets = [order[at : at + size] for at in range(0, len(order), size)]
        batches = [b for bucket in buckets for b in self._cut(sorted(bucket, key=self._durations.__getitem__))]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]


class Loaders(NamedTuple):
    """One loader a split."""

    train: DataLoader[dict[str, Any]]
    validation: DataLoader[dict[str, Any]]
    test: DataLoader[dict[str, Any]]


def create_dataloaders(splits: DatasetSplits, processor: Any, config: Config) -> Loaders:
    """Build the loaders of all splits for one model.

    Args:
        splits: from `prepare_datasets`.
        processor: of the model; its tokenizer encodes the labels.
        config: batch sizes, workers, language.
    Raises: DataError: a transcript over 448 tokens with `on_error="raise"`, or too many skipped.
    """
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    return Loaders(
        train=_loader(splits.train, encoder, config, config.training.batch_size, shuffle=True),
        validation=_loader(splits.validation, encoder, config, config.inference.batch_size, shuffle=False),
        test=_loader(splits.test, encoder, config, config.inference.batch_size, shuffle=False),
    )


def create_loader(
    utterances: Sequence[Utterance], processor: Any, config: Config, *, shuffle: bool = False
) -> DataLoader[dict[str, Any]]:
    """Build one loader over checked utterances, for evaluation or training."""
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    size = config.training.batch_size if shuffle else config.inference.batch_size
    return _loader(utterances, encoder, config, size, shuffle=shuffle)


def _loader(
    utterances: Sequence[Utterance], encoder: LabelEncoder, config: Config, batch_size: int, *, shuffle: bool
) -> DataLoader[dict[str, Any]]:
    dataset = WhisperDataset(utterances, encoder, on_error=config.data.on_error)
    enforce_skip_policy(dataset.skipped, len(utterances), config.data.max_skip_fraction)
    return DataLoader(
        dataset,
        batch_sampler=LengthBatchSampler(dataset.durations_sec, batch_size, shuffle=shuffle, seed=config.seed),
        collate_fn=DataCollator(encoder.end_token),
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
