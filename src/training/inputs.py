"""Training inputs: prepared batches become features on the device, and words get the times that clips are cut at."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.augmenter import SpecAugment
from src.data.dataset import WhisperDataset
from src.data.features import HOP_SAMPLES, LogMel
from src.inference.alignment import force_align
from src.inference.torch_engine import encode
from src.inference.words import Word
from src.models.dynamic_context import DynamicWhisper, evaluation_mode
from src.training.state import tensors_digest
from src.utils.config import Config
from src.utils.errors import first_line
from src.utils.files import load_json, write_text_atomic
from src.utils.logging_config import ProgressBar

logger = logging.getLogger(__name__)

_TRAILING_SILENCE_SEC = 0.5
_ALIGNED_TOGETHER = 16  # clips of similar length

Batch = dict[str, Any]


class TrainingInputs:
    """Makes training features, on the device, of batches that `TrainingBatches` has prepared."""

    def __init__(self, config: Config, num_mel_bins: int) -> None:
        self._log_mel, self._mask = LogMel(num_mel_bins), SpecAugment.from_config(config.augmentation)

    def features(self, batch: Batch) -> Tensor:
        """Return (B, mels, frames) float32 on the batch's device, masked."""
        features = self._log_mel(batch["audio"])
        if batch["masks"] is None:
            return features
        frames = ((batch["audio_lengths"] + HOP_SAMPLES - 1) // HOP_SAMPLES).clamp(max=features.shape[2])
        return self._mask.apply(features, frames, batch["masks"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors: to a CUDA device in one copy from pinned memory, during which the host goes on."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if device.type != "cuda":
        return {**batch, **{key: value.to(device) for key, value in tensors.items()}}
    # one buffer; the widest types first, so that each tensor begins at a multiple of its size
    order = sorted(tensors, key=lambda key: -tensors[key].element_size())
    packed = torch.empty(sum(tensors[key].nbytes for key in order), dtype=torch.uint8, pin_memory=True)

    def views(buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for key in order:
            part = buffer[at : at + tensors[key].nbytes]
            yield key, part.view(tensors[key].dtype).view(tensors[key].shape)
            at += tensors[key].nbytes

    for key, view in views(packed):
        view.copy_(tensors[key])
    return {**batch, **dict(views(packed.to(device, non_blocking=True)))}


def load_or_time_words(
    model: DynamicWhisper, tokenizer: Any, dataset: WhisperDataset, cache_dir: Path
) -> dict[str, tuple[Word, ...]]:
    """Return the words of every clip with their times; from the cache where these weights have timed these clips.

    The model is as before training, at its own length: word ends differ from those at 30 s by 0.02 s in the median
    (tiny.en, 125 words, 2026-11-25).
    """
    clips = hashlib.sha256()
    for index, (utterance, tokens) in enumerate(zip(dataset.utterances, dataset.tokens, strict=True)):
        spoken = (*dataset.prefix_of(index), *tokens)
        clips.update(f"{utterance.id}\t{utterance.duration_sec}\t{spoken}\n".encode())
    name = f"{tensors_digest(model.named_parameters())}-{clips.hexdigest()[:16]}.json"
    path = cache_dir / "word_times" / name
    try:
        saved = load_json(path)
        cached = {name: tuple(Word(**{"text": "", **word}) for word in words) for name, words in saved.items()}
        logger.info("word times of %d clips: from %s", len(dataset), path)
        return cached
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as err:
        logger.warning("%s: damaged (%s); the words are timed again", path, first_line(err))
    words = time_dataset_words(model, tokenizer, dataset)
    write_text_atomic(path, json.dumps({name: [asdict(word) for word in timed] for name, timed in words.items()}))
    return words


@torch.inference_mode()
def time_dataset_words(model: DynamicWhisper, tokenizer: Any, dataset: WhisperDataset) -> dict[str, tuple[Word, ...]]:
    """Align the text of every clip with its audio, from the cross-attention of the alignment heads."""
    order = sorted(range(len(dataset)), key=lambda index: dataset.utterances[index].duration_sec or 0.0)
    times: dict[str, tuple[Word, ...]] = {}
    with evaluation_mode(model):
        for at in ProgressBar(range(0, len(order), _ALIGNED_TOGETHER), desc="timing words", leave=False):
            indices = [index for index in order[at : at + _ALIGNED_TOGETHER] if dataset.tokens[index]]
            audios = [dataset[index]["audio"] for index in indices]
            hidden = encode(model, audios, _TRAILING_SILENCE_SEC).last_hidden_state if audios else torch.empty(0)
            for row, index in enumerate(indices):
                tokens = dataset.tokens[index]
                words = force_align(
                    model, tokenizer, hidden[row : row + 1], sot_sequence=dataset.prefix_of(index), tokens=tokens,
                    audio_sec=len(audios[row]) / SAMPLE_RATE,
                )  # fmt: skip
                if sum(word.tokens for word in words) == len(tokens):  # else a word is empty, and the rest would shift
                    times[dataset.utterances[index].id] = words
    return times
