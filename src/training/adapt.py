"""Context adaptation: stock weights learn to work at the audio's own length, without transcripts.

A frozen copy of the model, padded to 30 s as it was trained, teaches: it transcribes each clip, and its hidden states
over the real audio and over its own transcript are what the model must have at a short context. Some clips are cut at a
random place, since a stream's audio stops anywhere; the teacher sees the same cut, so that any place will do.

The padded teacher is most of the cost. It runs once a clip; its states are kept as float16, over the real positions
alone, as long as they fit into 1 GB.

Source: the method of https://github.com/futo-org/whisper-acft, which matches the decoder's states on human transcripts.
Changed here: the teacher's own transcript, the encoder's states too, each loss relative to the variance of what it
matches, and the token embedding stays as it is: it is the output layer too, which no hidden state would hold in place.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, Waveform, load_audio, to_mono_16k
from src.data.batching import batch_generator
from src.data.dataset import decode_audio
from src.data.features import CONTEXT_SAMPLES
from src.data.utterance import Utterance
from src.models.dynamic_context import DynamicWhisper
from src.training.schedule import default_learning_rate
from src.training.state_matching import Clip, Student, Teacher, frozen
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, ModelError

logger = logging.getLogger(__name__)

AudioItem = Waveform | Path | str | Utterance
MIN_CUT_SEC = 1.0  # less has hardly a word, and on almost nothing the teacher makes words up
POOL_BATCHES = 4  # batches that are decoded and sorted by length together
LEARNING_RATE_FACTOR = 1.0  # of the rate for fine-tuning
_ORDER_STREAM, _SHUFFLE_STREAM, _CUT_STREAM = 0, 2, 3  # of the random draws; 1 are the pauses


@dataclass(frozen=True)
class AdaptationResult:
    """What an adaptation did.

    Attributes:
        losses: one a step: encoder loss + decoder loss. Each is the mean squared difference of the states, over the
            variance of the teacher's: 0 is equal, 1 is as far off as a constant.
        encoder_losses, decoder_losses: their parts.
        steps: updates of the weights.
        clips: different clips that were seen.
        cut_clips: of these, cut at a random place.
        unfinished_clips: of these, not matched over a transcript: the teacher did not end its own.
        audio_sec: audio that the model saw; repeats count, pauses do not.
        teacher_sec, seconds: wall time of the teacher, and of everything.
    """

    losses: tuple[float, ...]
    encoder_losses: tuple[float, ...]
    decoder_losses: tuple[float, ...]
    steps: int
    clips: int
    cut_clips: int
    unfinished_clips: int
    audio_sec: float
    teacher_sec: float
    seconds: float


def adapt_context(
    model: DynamicWhisper,
    audio: Sequence[AudioItem],
    *,
    processor: Any,
    config: Config | None = None,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float | None = None,
    max_trailing_silence_sec: float = 1.0,
    full_context_prob: float = 0.0,
    cut_prob: float = 0.25,
    seed: int = 42,
) -> AdaptationResult:
    """Make a full-context model work at dynamic context, by matching its own hidden states at 30 s.

    Args:
        model: of full context, float32; changed in place, and "dynamic" when this returns.
        audio: speech without transcripts: (T,) float32 arrays at 16 kHz, files, or utterances, whose text is not read.
            Of what is longer than 30 s, the first 30 s are used.
        processor: of the model.
        config: `model.language` and `model.task` of the teacher's transcripts, `inference` for their decoding,
            `precision` of the model's own passes; defaults without. The teacher computes in float32.
        steps: updates; clips repeat, in a new order, when they run out.
        batch_size: clips an update.
        learning_rate: peak; None takes the rate for fine-tuning a model of this size.
        max_trailing_silence_sec: each clip gets a pause at its end, drawn from 0 to this.
        full_context_prob: share of batches padded to 30 s, which cost as much as training at full context.
        cut_prob: share of clips cut at a random place, at least 1 s from their start.
        seed: decides order, cuts and pauses.
    Raises: ModelError: the model is dynamic already, or not in float32. ConfigError: a number out of range.
        DataError: no audio, or a loss that is not finite. AudioError: a recording that cannot be used, by name.
        After an error the model is "full" again, with the weights that it had by then.
    """
    config = config or Config()
    rate = (
        default_learning_rate(model.config.d_model) * LEARNING_RATE_FACTOR if learning_rate is None else learning_rate
    )
    _check_numbers(steps, batch_size, rate, max_trailing_silence_sec, full_context_prob, cut_prob)
    _check_inputs(model, audio)
    began = time.perf_counter()
    teacher = Teacher(
        model, processor, config,
        max_trailing_silence_sec=max_trailing_silence_sec, keep=steps * batch_size > len(audio),
    )  # fmt: skip
    logger.info(
        "adapting to dynamic context: %d clips, %d updates of %d clips, peak learning rate %.2e, without transcripts",
        len(audio), steps, batch_size, rate,
    )  # fmt: skip
    parts: list[tuple[float, float]] = []
    audio_sec = 0.0
    with _dynamic_while_adapting(model), tqdm(total=steps, desc="adapting", unit="update") as bar:
        student = Student(
            model, config, steps=steps, learning_rate=rate, max_trailing_silence_sec=max_trailing_silence_sec,
            full_context_prob=full_context_prob, seed=seed,
        )  # fmt: skip
        for batch in _batches(audio, steps=steps, batch_size=batch_size, cut_prob=cut_prob, seed=seed):
            parts.append(student.update(batch, teacher.targets(batch), step=len(parts)))
            audio_sec += sum(len(clip.audio) for clip in batch) / SAMPLE_RATE
            bar.set_postfix(encoder=f"{parts[-1][0]:.4f}", decoder=f"{parts[-1][1]:.4f}")
            bar.update()
    return _result(parts, teacher, audio_sec, time.perf_counter() - began)


def _result(
    parts: Sequence[tuple[float, float]], teacher: Teacher, audio_sec: float, seconds: float
) -> AdaptationResult:
    result = AdaptationResult(
        losses=tuple(encoder + decoder for encoder, decoder in parts),
        encoder_losses=tuple(encoder for encoder, _ in parts),
        decoder_losses=tuple(decoder for _, decoder in parts),
        steps=len(parts),
        clips=len(teacher.seen),
        cut_clips=sum(is_cut for is_cut, _ in teacher.seen.values()),
        unfinished_clips=sum(not is_finished for _, is_finished in teacher.seen.values()),
        audio_sec=audio_sec,
        teacher_sec=teacher.seconds,
        seconds=seconds,
    )
    logger.info(
        "adapted in %.0f s (teacher %.0f s): loss %.4f, then %.4f",
        result.seconds, result.teacher_sec, result.losses[0], result.losses[-1],
    )  # fmt: skip
    return result


def _check_numbers(
    steps: int, batch_size: int, rate: float, max_trailing_silence_sec: float, full_context_prob: float, cut_prob: float
) -> None:
    problems = [
        f"{name} is {value}: {expected}"
        for name, value, expected, valid in (
            ("steps", steps, "at least 1", steps >= 1),
            ("batch_size", batch_size, "at least 1", batch_size >= 1),
            ("learning_rate", rate, "above 0", rate > 0),
            ("max_trailing_silence_sec", max_trailing_silence_sec, "from 0 to 5", 0 <= max_trailing_silence_sec <= 5),
            ("full_context_prob", full_context_prob, "from 0 to 1", 0 <= full_context_prob <= 1),
            ("cut_prob", cut_prob, "from 0 to 1", 0 <= cut_prob <= 1),
        )
        if not valid
    ]
    if problems:
        raise ConfigError("\n  - ".join([f"adapt_context: {len(problems)} value(s) out of range:", *problems]))


def _check_inputs(model: DynamicWhisper, audio: Sequence[AudioItem]) -> None:
    if model.audio_context == "dynamic":
        raise ModelError(
            "this model has audio_context 'dynamic' already, so its states at 30 s are no measure any more; adapt a "
            "full-context model, or go on with WhisperTrainer"
        )
    if model.dtype != torch.float32:
        raise ModelError(
            f"this model is in {model.dtype}, where small updates are lost; load it with dtype=torch.float32"
        )
    if len(audio) == 0:
        raise DataError("adapt_context: no audio; pass speech, no transcripts are needed")


def _batches(
    audio: Sequence[AudioItem], *, steps: int, batch_size: int, cut_prob: float, seed: int
) -> Iterator[list[Clip]]:
    """Yield one batch a step: clips of similar length, in an order that changes with each pass."""
    made, passes = 0, 0
    order: list[int] = []
    while made < steps:
        batches = min(POOL_BATCHES, steps - made)
        while len(order) < batches * batch_size:
            order += torch.randperm(len(audio), generator=batch_generator(seed, _ORDER_STREAM, passes)).tolist()
            passes += 1
        chosen, order = order[: batches * batch_size], order[batches * batch_size :]
        pool = sorted(
            (_load(audio[index], index, cut_prob=cut_prob, seed=seed) for index in chosen),
            key=lambda clip: (len(clip.audio), clip.index),
        )
        for batch in torch.randperm(batches, generator=batch_generator(seed, _SHUFFLE_STREAM, made)).tolist():
            yield pool[batch * batch_size : (batch + 1) * batch_size]
        made += batches


def _load(item: AudioItem, index: int, *, cut_prob: float, seed: int) -> Clip:
    """Decode one clip, and cut it where its own draw says so: the same cut each time, as its target is kept."""
    if isinstance(item, Utterance):
        name, samples = item.id, decode_audio(item)
    elif isinstance(item, str | Path):
        name, samples = str(item), torch.from_numpy(load_audio(item))
    elif isinstance(item, np.ndarray) and item.ndim == 1:
        name = f"audio[{index}]"
        samples = torch.from_numpy(to_mono_16k(item, SAMPLE_RATE, name=name))
    else:
        raise DataError(f"audio[{index}]: {type(item).__name__}; pass (T,) float32 arrays, files or utterances")
    samples = samples[:CONTEXT_SAMPLES]
    share, place = torch.rand(2, generator=batch_generator(seed, _CUT_STREAM, index)).tolist()
    least = round(MIN_CUT_SEC * SAMPLE_RATE)
    is_cut = share < cut_prob and len(samples) > least
    if is_cut:
        samples = samples[: least + math.floor(place * (len(samples) - least))]
    return Clip(index, name, samples, is_cut)


@contextmanager
def _dynamic_while_adapting(model: DynamicWhisper) -> Iterator[None]:
    model.audio_context = "dynamic"
    finished = False
    try:
        # the embedding is the output layer too, and no hidden state would hold it in place
        with frozen(model.model.decoder.embed_tokens.weight):
            yield
        finished = True
    finally:
        if not finished:
            model.audio_context = "full"
