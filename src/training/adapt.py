"""Context adaptation: stock weights learn to work at the audio's own length, without transcripts.

A frozen copy of the model, padded to 30 s as it was trained, is the teacher: it transcribes each clip, and its hidden
states over the real audio and over its own transcript are what the model must have at a short context. Some clips are
cut at a random place, since a stream's audio stops anywhere; the teacher sees the same cut, so any place will do.

The padded teacher is most of the cost. It runs once per clip; its states are kept as float16, over the real positions
only, as long as they fit into 1 GB.

Source: the method of https://github.com/futo-org/whisper-acft, which matches the decoder's states on human transcripts.
Changed here: the teacher's own transcript, the encoder's states too, each loss relative to the variance of its target,
and the token embedding stays as it is: it is the output layer too, which no hidden state would hold in place.
"""

from __future__ import annotations

import copy
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
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, Waveform, load_audio, to_mono_16k
from src.data.dataset import decode_audio
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION, LogMel, padded_samples
from src.data.loader import batch_generator
from src.data.utterance import Utterance
from src.inference.decoding import decode, encode
from src.inference.options import DecodingOptions
from src.inference.words import Vocabulary
from src.models.dynamic_context import DynamicWhisper
from src.training.updates import build_optimizer, build_schedule, default_learning_rate
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, ModelError
from src.utils.runtime import choose_precision

logger = logging.getLogger(__name__)

AudioItem = Waveform | Path | str | Utterance
MIN_CUT_SEC = 1.0  # less has hardly a word, and on almost nothing the teacher makes words up
POOL_BATCHES = 4  # batches that are decoded and sorted by length together
TARGET_MEMORY_BYTES = 1 << 30  # of kept targets; what does not fit is computed again
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
_ORDER_STREAM, _PAUSE_STREAM, _SHUFFLE_STREAM, _CUT_STREAM = range(4)  # of the random draws


@dataclass(frozen=True)
class AdaptationResult:
    """Losses and costs of an adaptation.

    Attributes:
        losses: one per step: encoder loss + decoder loss. Each is the mean squared difference of the states, over the
            variance of the teacher's: 0 is equal, 1 is as far off as a constant.
        encoder_losses: their first part.
        decoder_losses: their second part.
        steps: updates of the weights.
        clips: different clips that were seen.
        cut_clips: clips of these that were cut at a random place.
        unfinished_clips: clips of these not matched over a transcript, because the teacher did not end its own.
        audio_sec: audio that the model saw; repeats count, pauses do not.
        teacher_sec: wall time of the teacher.
        seconds: wall time of everything.
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


@dataclass(frozen=True)
class Clip:
    """One recording to adapt on.

    Attributes:
        index: in the caller's sequence.
        name: for errors.
        audio: (T,) float32, 16 kHz, at most 30 s.
        is_cut: it ends at a random place.
    """

    index: int
    name: str
    audio: Tensor
    is_cut: bool


@dataclass(frozen=True)
class Target:
    """The teacher's last hidden states of one clip, float16 on the CPU.

    Attributes:
        encoder: (positions, d_model) over the real audio and the longest pause.
        tokens: (L,) int64 that the decoder was fed.
        decoder: (L, d_model).
        is_finished: the teacher ended its transcript; else `tokens` are only those that begin one.
    """

    encoder: Tensor
    tokens: Tensor
    decoder: Tensor
    is_finished: bool


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

    After an error the model is "full" again, with the weights that it had by then.

    Args:
        model: of full context, float32; changed in place, and "dynamic" when this returns.
        audio: speech without transcripts: (T,) float32 arrays at 16 kHz, files, or utterances, whose text is not read.
            Only the first 30 s of a longer one are used.
        processor: of the model.
        config: `model.language` and `model.task` of the teacher's transcripts, `inference` for their decoding,
            `precision` of the model's own passes; defaults without. The teacher computes in float32.
        steps: updates; clips repeat, in a new order, when they run out.
        batch_size: clips per update.
        learning_rate: peak; None takes the rate for fine-tuning a model of this size.
        max_trailing_silence_sec: each clip gets a pause at its end, drawn from 0 to this.
        full_context_prob: share of batches padded to 30 s, which cost as much as training at full context.
        cut_prob: share of clips cut at a random place, at least 1 s from their start.
        seed: decides order, cuts and pauses.

    Raises:
        ModelError: the model is dynamic already, or not in float32.
        ConfigError: a number is out of range.
        DataError: no audio, or a loss that is not finite.
        AudioError: a recording cannot be used; it is named.
    """
    config = config or Config()
    rate = default_learning_rate(model.config.d_model) if learning_rate is None else learning_rate
    _check_numbers(steps, batch_size, rate, max_trailing_silence_sec, full_context_prob, cut_prob)
    _check_inputs(model, audio)
    began = time.perf_counter()
    device = next(model.parameters()).device
    choice = choose_precision(config.precision, device)
    dtype, scaler = getattr(torch, choice.precision), GradScaler(device.type, enabled=choice.precision == "float16")
    pause_samples = max_trailing_silence_sec * SAMPLE_RATE
    teacher = Teacher(model, processor, config, round(pause_samples), keep=steps * batch_size > len(audio))
    logger.info(
        "adapting to dynamic context: %d clips, %d updates of %d clips, peak learning rate %.2e, precision %s (%s)",
        len(audio), steps, batch_size, rate, choice.precision, choice.reason,
    )  # fmt: skip
    encoder_losses: list[float] = []
    decoder_losses: list[float] = []
    audio_sec = 0.0
    with _dynamic_while_adapting(model), tqdm(total=steps, desc="adapting", unit="update") as bar:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(model, learning_rate=rate, weight_decay=0.0)
        schedule = build_schedule(optimizer, total_updates=steps, warmup_ratio=WARMUP_RATIO)
        for step, batch in enumerate(_batches(audio, steps=steps, batch_size=batch_size, cut_prob=cut_prob, seed=seed)):
            # what the states must be, and what they are
            targets = teacher.targets(batch)
            draws = batch_generator(seed, _PAUSE_STREAM, step)
            padded = _pad(batch, pause_samples, full_context_prob, draws).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                encoder_loss, decoder_loss = matching_losses(model, padded, targets)
            loss = encoder_loss + decoder_loss
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss of update {step + 1} is {loss.item()}; its clips: "
                    f"{', '.join(clip.name for clip in batch)}. Listen to them, lower learning_rate, or set precision: "
                    "float32"
                )
            # one update
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            # for the result
            encoder_losses.append(encoder_loss.item())
            decoder_losses.append(decoder_loss.item())
            audio_sec += sum(len(clip.audio) for clip in batch) / SAMPLE_RATE
            bar.set_postfix(encoder=f"{encoder_losses[-1]:.4f}", decoder=f"{decoder_losses[-1]:.4f}")
            bar.update()
    result = AdaptationResult(
        losses=tuple(map(sum, zip(encoder_losses, decoder_losses, strict=True))),
        encoder_losses=tuple(encoder_losses),
        decoder_losses=tuple(decoder_losses),
        steps=len(encoder_losses),
        clips=len(teacher.seen),
        cut_clips=sum(is_cut for is_cut, _ in teacher.seen.values()),
        unfinished_clips=sum(not is_finished for _, is_finished in teacher.seen.values()),
        audio_sec=audio_sec,
        teacher_sec=teacher.seconds,
        seconds=time.perf_counter() - began,
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
            "this model has audio_context 'dynamic' already, so its states at 30 s are no target any more; adapt a "
            "full-context model, or continue with WhisperTrainer"
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
    """Yield one batch per step: clips of similar length, in an order that changes with each pass."""
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
    """Decode one clip, and cut it at a place that depends only on its index, since its target is kept."""
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
    embedding = model.model.decoder.embed_tokens.weight
    required = embedding.requires_grad
    model.audio_context = "dynamic"
    embedding.requires_grad_(False)
    try:
        yield
    except BaseException:
        model.audio_context = "full"
        raise
    finally:
        embedding.requires_grad_(required)


def _pad(batch: Sequence[Clip], pause_samples: float, full_context_prob: float, draws: torch.Generator) -> Tensor:
    """Return (B, T): clips with random pauses of at most `pause_samples`, or padded to 30 s."""
    pauses = torch.rand(len(batch), generator=draws) * pause_samples
    full = float(torch.rand(1, generator=draws)) < full_context_prob
    longest = max(len(clip.audio) + int(pause) for clip, pause in zip(batch, pauses, strict=True))
    audio = torch.zeros(len(batch), CONTEXT_SAMPLES if full else padded_samples(longest))
    for row, clip in enumerate(batch):
        audio[row, : len(clip.audio)] = clip.audio
    return audio


class Teacher:
    """A frozen copy of a full-context model, in float32.

    Args:
        model: copied.
        processor: of the model.
        config: `model.language`, `model.task` and `inference`, for its transcripts.
        pause_samples: the longest pause of a student's clip.
        keep: keep the targets that fit into 1 GB, because they will be needed again.

    Attributes:
        seen: by clip index: whether it is cut, whether its transcript is finished.
        seconds: wall time of computing.
    """

    def __init__(
        self, model: DynamicWhisper, processor: Any, config: Config, pause_samples: int, *, keep: bool
    ) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._processor = processor
        self._decoding = DecodingOptions.from_config(config)
        self._vocabulary = Vocabulary.of(processor.tokenizer)
        self._pause_samples = pause_samples
        self._room = TARGET_MEMORY_BYTES if keep else 0
        self._kept: dict[int, Target] = {}
        self.seen: dict[int, tuple[bool, bool]] = {}
        self.seconds = 0.0

    def targets(self, batch: Sequence[Clip]) -> list[Target]:
        """Return one target per clip; a clip of a known index is taken to be the same as before."""
        new = {clip.index: clip for clip in batch if clip.index not in self._kept}
        began = time.perf_counter()
        made = dict(zip(new, self._compute(list(new.values())), strict=True)) if new else {}
        self.seconds += time.perf_counter() - began
        for index, target in made.items():
            self.seen[index] = (new[index].is_cut, target.is_finished)
            num_bytes = target.encoder.nbytes + target.decoder.nbytes
            if num_bytes <= self._room:
                self._kept[index] = target
                self._room -= num_bytes
        return [made.get(clip.index) or self._kept[clip.index] for clip in batch]

    @torch.no_grad()
    def _compute(self, clips: Sequence[Clip]) -> list[Target]:
        audios = [clip.audio.numpy() for clip in clips]
        encoded = encode(self._model, audios, 0.0)
        hidden = encoded.last_hidden_state  # (B, 1500, d_model)
        decoded = decode(self._model, self._processor, audios, self._decoding, encoder_outputs=encoded)
        starts = [
            self._vocabulary.start_sequence(result.language, self._decoding.task, timestamps=False)
            for result in decoded
        ]
        rows = [[*start, *result.tokens] for start, result in zip(starts, decoded, strict=True)]
        end = self._processor.tokenizer.eos_token_id
        # padding to the right of a row changes nothing: the decoder is causal
        inputs = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=end)
        states = self._model.model.decoder(
            input_ids=inputs.to(hidden.device), encoder_hidden_states=hidden, use_cache=False
        ).last_hidden_state  # (B, L, d_model)
        targets = []
        for at, (row, start, clip) in enumerate(zip(rows, starts, clips, strict=True)):
            is_finished = int(self._model.proj_out(states[at, len(row) - 1]).argmax()) == end
            # a transcript that reached a limit is probably a loop: its states would teach loops
            tokens = torch.tensor(row if is_finished else start)
            positions = padded_samples(len(clip.audio) + self._pause_samples) // SAMPLES_PER_POSITION
            targets.append(Target(_kept(hidden[at, :positions]), tokens, _kept(states[at, : len(tokens)]), is_finished))
        return targets


def matching_losses(model: DynamicWhisper, audio: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Compare a model's states with the teacher's.

    Args:
        model: in training, "dynamic".
        audio: (B, T) float32 on the model's device, T in whole encoder positions.
        targets: one per row; if the audio is shorter than a target, it counts as far as the audio goes.

    Returns:
        `state_loss` of the encoder and of the decoder.
    """
    features = LogMel(model.config.num_mel_bins)(audio)  # (B, mels, T // 160)
    tokens = pad_sequence([target.tokens for target in targets], batch_first=True).to(audio.device)
    heard = model.model.encoder(features).last_hidden_state  # (B, positions, d_model)
    written = model.model.decoder(
        input_ids=tokens, encoder_hidden_states=heard, use_cache=False
    ).last_hidden_state  # (B, L, d_model)
    return (
        _padded_loss(heard, [target.encoder for target in targets]),
        _padded_loss(written, [target.decoder for target in targets]),
    )


def state_loss(states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the variance of the targets.

    Args:
        states: (B, N, d_model).
        targets: likewise.
        mask: (B, N) bool: which positions count.

    Returns:
        Scalar float32; 0 is equal, 1 is as far off as the targets' mean.
    """
    wanted = targets[mask].float()  # (positions, d_model)
    return (states[mask].float() - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()


def _padded_loss(states: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Compare (B, N, d_model) with one target per row, as far as both go."""
    padded = pad_sequence(list(targets), batch_first=True)[:, : states.shape[1]]
    lengths = torch.tensor([len(target) for target in targets])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return state_loss(states[:, : padded.shape[1]], padded.to(states.device), mask.to(states.device))


def _kept(states: Tensor) -> Tensor:
    return states.to("cpu", torch.float16).clone()  # a view would hold the whole padded batch
