"""Training inputs: batches of audio become features on the device, with augmentation, pauses, masks and cut clips.

Cut clips are unfinished speech. A streaming model hears every sentence in the middle; one that has only seen whole
sentences invents their ends: at own length, 29 of 52 errors of such a model were insertions (2026-11-24, a stream of
102 s, tiny.en tuned for 100 updates). So some clips end at a word, and their labels end there too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.augmenter import AudioAugmenter, SpecAugment
from src.data.dataset import WhisperDataset
from src.data.features import CONTEXT_SAMPLES, HOP_SAMPLES, LogMel, padded_samples
from src.data.labels import IGNORE_INDEX
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

HALF_WORD_SHARE = 0.5  # of the cuts go through the middle of the next word, whose text is not expected
_TRAILING_SILENCE_SEC = 0.5
_ALIGNED_TOGETHER = 16  # clips of similar length

WordTimes = Mapping[str, Sequence[Word]]  # by utterance id


class TrainingInputs:
    """Makes training features; everything random is drawn from the generator that each batch brings.

    With `words`, `training.prefix_prob` of the clips end at one of theirs, and so do their labels.
    """

    def __init__(self, config: Config, num_mel_bins: int, *, words: WordTimes | None = None) -> None:
        self._config, self._num_mel_bins, self._words = config, num_mel_bins, words
        self._augment = AudioAugmenter(config.augmentation)
        self._mask = SpecAugment.from_config(config.augmentation)

    def cut(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch with some clips cut at a word if that is asked for; before anything else is drawn."""
        if self._words is None:
            return batch
        return cut_at_words(batch, self._words, self._config.training.prefix_prob, generator)

    def features(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return (B, mels, frames) float32 on the batch's device; `generator` is on the CPU."""
        audio, lengths = self.audio(batch, generator)
        log_mel = LogMel(self._num_mel_bins)(audio)
        frames = (lengths.cpu() / HOP_SAMPLES).ceil().long().clamp(max=log_mel.shape[2])
        return self._mask(log_mel, frames, generator=generator)

    def audio(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment; pad the longest clip by a random pause, or with `full_context_prob` the whole batch to 30 s.

        The other clips end in a pause anyway; a longer one of their own would only make the batch longer.

        Returns:
            (B, T) float32, T in whole encoder positions; and (B,) int64 samples of each clip without its pause.
        """
        training = self._config.training
        pauses_sec = torch.rand(len(batch["ids"]), generator=generator) * training.max_trailing_silence_sec
        pauses = (pauses_sec * SAMPLE_RATE).long().to(batch["audio_lengths"].device)
        full = float(torch.rand(1, generator=generator)) < training.full_context_prob
        audio, lengths, _ = self._augment(
            batch["audio"],
            batch["audio_lengths"],
            generator=generator,
            trailing_samples=pauses,  # background noise does not stop with the voice
            keep_speed=batch["timed"],
        )
        samples = CONTEXT_SAMPLES
        if not full and self._config.model.audio_context == "dynamic":
            longest = lengths.argmax()
            samples = padded_samples(int(lengths[longest] + pauses[longest]))
        return functional.pad(audio, (0, samples - audio.shape[1])), lengths  # cuts where others' pauses are longer


def cut_at_words(batch: dict[str, Any], words: WordTimes, prob: float, generator: torch.Generator) -> dict[str, Any]:
    """Return a copy of a batch of the collator in which a share of the clips end at, or half a word after, a word.

    Clips without words or with one only, joined clips and clips with timestamps stay whole, and so does a prompt.
    """
    audio, lengths, durations = batch["audio"].clone(), batch["audio_lengths"].clone(), list(batch["durations"])
    inputs, labels = batch["decoder_input_ids"].clone(), batch["labels"].clone()
    draws = torch.rand(3, len(batch["ids"]), generator=generator).tolist()
    for row, (chosen, where, half) in enumerate(zip(*draws, strict=True)):
        timed = words.get(batch["ids"][row], ())
        if chosen >= prob or len(timed) < 2 or batch["timed"][row]:
            continue
        # words, never all of them; one without tokens shares those of the next one
        ends = [kept for kept in range(1, len(timed)) if timed[kept - 1].tokens > 0]
        if not ends:
            continue
        kept = ends[int(where * len(ends))]
        following, end_sec = timed[kept], timed[kept - 1].end_sec
        if half < HALF_WORD_SHARE:
            end_sec = (following.start_sec + following.end_sec) / 2
        samples = max(1, min(int(lengths[row]), round(end_sec * SAMPLE_RATE)))
        audio[row, samples:] = 0
        lengths[row], durations[row] = samples, samples / SAMPLE_RATE
        # the label keeps the words' tokens, then the end token; the collator pads inputs with it
        due = torch.nonzero(labels[row] != IGNORE_INDEX)[:, 0].tolist()
        end_at, end = due[0] + sum(word.tokens for word in timed[:kept]), labels[row, due[-1]].item()
        labels[row, end_at] = end
        labels[row, end_at + 1 :] = IGNORE_INDEX
        inputs[row, end_at + 1 :] = end
    return {
        **batch,
        "audio": audio[:, : int(lengths.max())],
        "audio_lengths": lengths,
        "durations": durations,
        "decoder_input_ids": inputs,
        "labels": labels,
    }


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
