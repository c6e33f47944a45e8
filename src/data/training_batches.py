"""Training batches: clips cut at words, augmented, padded to one of few lengths, with the masks of their spectrogram.

All of this happens where batches are collated, in the loader's processes: every random number is a host value, and the
device gets finished audio. Rows have one of few lengths, so that kernels and memory on the device are reused, and each
clip takes a speed at which it fills its row up to a pause.

Cut clips are unfinished speech. A streaming model hears every sentence in the middle; one that has only seen whole
sentences invents their ends: at own length, 29 of 52 errors of such a model were insertions (2026-11-24, a stream of
102 s, tiny.en tuned for 100 updates). So some clips end at a word, and their labels end there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from src.data.audio import SAMPLE_RATE
from src.data.augmentation.augmenter import AudioAugmenter, SpecAugment
from src.data.augmentation.effects import sped_up
from src.data.features import CONTEXT_SAMPLES, HOP_SAMPLES, SAMPLES_PER_POSITION, padded_samples
from src.data.labels import IGNORE_INDEX
from src.utils.config import Config

MAX_LENGTHS = 10  # of rows, besides 30 s
LENGTH_STEP = 8 * SAMPLES_PER_POSITION  # 2_560 samples: matrices of multiples of 8 positions suit a GPU
LABEL_STEP = 8  # tokens; label lengths are multiples of it
MIN_PAUSE_SEC = 0.5  # after a clip is never a reason to take another speed
HALF_WORD_SHARE = 0.5  # of the cuts go through the middle of the next word, whose text is not expected

WordTimes = Mapping[str, Sequence[Any]]  # by utterance id: words with `start_sec`, `end_sec` and `tokens`


class TrainingBatches:
    """Makes a training batch from what the collator gives; everything random comes from the generator of the batch.

    Args:
        config: `training`, `augmentation`, `model.audio_context`.
        num_mel_bins: of the model.
        durations_sec: of the clips, for which the lengths of rows are chosen; without any, a row has the length of the
            longest clip with a random pause.
        words: at which `training.prefix_prob` of the clips end, and so do their labels.
    """

    def __init__(
        self, config: Config, num_mel_bins: int, *, durations_sec: Sequence[float] = (), words: WordTimes | None = None
    ) -> None:
        self._config, self._num_mel_bins, self._words = config, num_mel_bins, words
        self._augment = AudioAugmenter(config.augmentation)
        self._mask = SpecAugment.from_config(config.augmentation)
        self._lengths: list[int] = []
        if len(durations_sec):
            heard_sec = np.asarray(durations_sec) / np.array(self._augment.speeds)[:, None]
            usual_sec = heard_sec[len(heard_sec) // 2].max()  # none has to be longer than the longest at middle speed
            steps = np.ceil(heard_sec[heard_sec <= usual_sec] * SAMPLE_RATE / LENGTH_STEP - 1e-6).astype(int)
            chosen = choose_lengths(np.bincount(steps.clip(min=1)), MAX_LENGTHS)
            self._lengths = [min(step * LENGTH_STEP, CONTEXT_SAMPLES) for step in chosen]

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Cut, augment, pad and draw masks.

        Args:
            batch: of the collator, on the CPU; not changed.
            generator: on the CPU.

        Returns:
            The batch with `audio` (B, samples), `audio_lengths` without pauses, labels of a length that is a multiple
            of 8, and `masks` (B, spans, 2) int64 frames and mel bins of `SpecAugment`, None where nothing is masked.
        """
        training = self._config.training
        if self._words is not None:
            batch = cut_at_words(batch, self._words, training.prefix_prob, generator)
        longest_pause = training.max_trailing_silence_sec * SAMPLE_RATE
        pauses = (torch.rand(len(batch["ids"]), generator=generator) * longest_pause).long()
        (drawn,) = torch.rand(1, generator=generator).tolist()
        full = self._config.model.audio_context == "full" or drawn < training.full_context_prob
        samples, speeds = self._fit(batch, pauses.tolist(), generator, full=full)
        audio, lengths, _ = self._augment(
            batch["audio"], batch["audio_lengths"], generator=generator,
            trailing_samples=pauses,  # background noise does not stop with the voice
            keep_speed=batch["timed"], speeds=speeds,
        )  # fmt: skip
        audio = functional.pad(audio, (0, samples - audio.shape[1]))  # cuts where pauses are longer
        frames = torch.from_numpy(np.minimum(-(-lengths.numpy() // HOP_SAMPLES), samples // HOP_SAMPLES))
        masks = self._mask.draw(frames, self._num_mel_bins, generator)
        return {**batch, **_rounded(batch), "audio": audio, "audio_lengths": lengths, "masks": masks}

    def _fit(
        self, batch: dict[str, Any], pauses: Sequence[int], generator: torch.Generator, *, full: bool
    ) -> tuple[int, list[float]]:
        """Return the samples of a row, and the speed of each clip.

        A row holds the longest clip at the middle speed; where a clip would be silent for too long even at the slowest
        one, it only holds all clips at the fastest. Each clip takes one of the speeds at which it fills the row up to a
        pause, or the one at which it comes nearest to that.
        """
        speeds, kept = self._augment.speeds, batch["timed"].tolist()
        heard = np.array([
            [n if keep or n / speed > CONTEXT_SAMPLES else sped_up(n, speed) for speed in speeds]
            for n, keep in zip(batch["audio_lengths"].tolist(), kept, strict=True)
        ])  # (B, speeds)  # fmt: skip
        draws = torch.rand(heard.shape, generator=generator).numpy()
        longest_pause = SAMPLE_RATE * max(self._config.training.max_trailing_silence_sec, MIN_PAUSE_SEC)
        usual = heard[:, len(speeds) // 2]
        if full:
            samples = longest_pause = CONTEXT_SAMPLES
        elif not self._lengths:
            samples = padded_samples(int(usual.max()) + pauses[int(usual.argmax())])
        else:
            samples = self._row(usual.max())
            if samples - heard.max(axis=1).min() > longest_pause:
                samples = self._row(heard.min(axis=1).max())
        silence = samples - heard
        wanted = np.where(silence > longest_pause, -silence, draws)
        chosen = np.where(silence < 0, -math.inf, wanted).argmax(axis=1)
        return samples, [speeds[at] for at in chosen.tolist()]

    def _row(self, samples: int) -> int:
        """Return the shortest row that holds so many samples."""
        return next((length for length in self._lengths if length >= samples), CONTEXT_SAMPLES)


def choose_lengths(counts: NDArray[np.int64], most: int) -> list[int]:
    """Choose lengths to pad clips to so that their squared paddings sum to the least, by dynamic programming.

    Squares keep gaps small where clips are few, too: a clip must not be silent for much longer than a pause.

    Args:
        counts: clips of each length, from 0; the last one is not 0.
        most: lengths to choose.

    Returns:
        At most `most` lengths, ascending; the last is the longest.
    """
    lengths = np.arange(len(counts))
    number, first, second = (np.cumsum(counts * lengths**power) for power in range(3))
    # cost[i, j]: of clips longer than i, and at most j, padded to j
    among = [ends[None] - ends[:, None] for ends in (number, first, second)]
    cost = np.where(lengths[:, None] < lengths, lengths**2 * among[0] - 2 * lengths * among[1] + among[2], np.inf)
    best, before, costs = np.where(lengths == 0, 0.0, np.inf), [], []
    for _ in range(most):
        sums = best[:, None] + cost
        before.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
        costs.append(best[-1])
    at, chosen = len(counts) - 1, []
    for step in range(int(np.argmin(costs)), -1, -1):
        chosen.append(at)
        at = int(before[step][at])
    return chosen[::-1]


def _rounded(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the labels at a length that is a multiple of `LABEL_STEP`; what is added has no loss."""
    missing = -batch["labels"].shape[1] % LABEL_STEP if "labels" in batch else 0
    if not missing:
        return {}
    inputs = batch["decoder_input_ids"]
    return {
        "decoder_input_ids": torch.cat([inputs, inputs[:, -1:].expand(-1, missing)], dim=1),
        "labels": functional.pad(batch["labels"], (0, missing), value=IGNORE_INDEX),
    }


def cut_at_words(batch: dict[str, Any], words: WordTimes, prob: float, generator: torch.Generator) -> dict[str, Any]:
    """Return a copy of a batch of the collator in which a share of the clips end at, or half a word after, a word.

    Clips without words or with one only, joined clips and clips with timestamps stay whole, and so does a prompt.
    """
    audio, lengths, durations = batch["audio"].clone(), batch["audio_lengths"].tolist(), list(batch["durations"])
    inputs, labels = batch["decoder_input_ids"].numpy().copy(), batch["labels"].numpy().copy()
    timed_rows = batch["timed"].tolist()
    draws = torch.rand(3, len(batch["ids"]), generator=generator).tolist()
    for row, (chosen, where, half) in enumerate(zip(*draws, strict=True)):
        timed = words.get(batch["ids"][row], ())
        if chosen >= prob or len(timed) < 2 or timed_rows[row]:
            continue
        # words, never all of them; one without tokens shares those of the next one
        ends = [kept for kept in range(1, len(timed)) if timed[kept - 1].tokens > 0]
        if not ends:
            continue
        kept = ends[int(where * len(ends))]
        following, end_sec = timed[kept], timed[kept - 1].end_sec
        if half < HALF_WORD_SHARE:
            end_sec = (following.start_sec + following.end_sec) / 2
        samples = max(1, min(lengths[row], round(end_sec * SAMPLE_RATE)))
        audio[row, samples:] = 0
        lengths[row], durations[row] = samples, samples / SAMPLE_RATE
        # the label keeps the words' tokens, then the end token; the collator pads inputs with it
        due = np.flatnonzero(labels[row] != IGNORE_INDEX)
        end_at, end = int(due[0]) + sum(word.tokens for word in timed[:kept]), labels[row, due[-1]]
        labels[row, end_at] = end
        labels[row, end_at + 1 :] = IGNORE_INDEX
        inputs[row, end_at + 1 :] = end
    return {
        **batch,
        "audio": audio[:, : max(lengths)],
        "audio_lengths": torch.tensor(lengths),
        "durations": durations,
        "decoder_input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(labels),
    }
