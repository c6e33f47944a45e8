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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, Waveform, load_audio, to_mono_16k
from src.data.batching import batch_generator
from src.data.dataset import decode_audio
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION
from src.data.utterance import Utterance
from src.inference.decoding import DecodingOptions, decode, encode, log_mel_for, padded_samples, sot_sequences
from src.models.dynamic_context import DynamicWhisper
from src.training.schedule import build_optimizer, build_schedule, default_learning_rate
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, ModelError
from src.utils.runtime import choose_precision

logger = logging.getLogger(__name__)

AudioItem = Waveform | Path | str | Utterance
TARGET_MEMORY_BYTES = 1 << 30  # of kept targets; what does not fit is computed again
MIN_CUT_SEC = 1.0  # less has hardly a word, and on almost nothing the teacher makes words up
POOL_BATCHES = 4  # batches that are decoded and sorted by length together
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
LEARNING_RATE_FACTOR = 1.0  # of the rate for fine-tuning


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
        unfinished_clips: of these, without a decoder loss: the teacher did not end its transcript.
        audio_sec: audio that the model saw, repeats and not pauses included.
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


@dataclass(frozen=True)
class AdaptationOptions:
    """How to adapt; `adapt_context` says what each means."""

    steps: int
    batch_size: int
    learning_rate: float
    max_trailing_silence_sec: float
    full_context_prob: float
    cut_prob: float
    seed: int

    def check(self) -> None:
        """Raises: ConfigError: listing every value out of its range."""
        problems = [
            f"{name} is {getattr(self, name)}: {expected}"
            for name, expected, valid in (
                ("steps", "at least 1", self.steps >= 1),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("learning_rate", "above 0", self.learning_rate > 0),
                ("max_trailing_silence_sec", "from 0 to 5", 0 <= self.max_trailing_silence_sec <= 5),
                ("full_context_prob", "from 0 to 1", 0 <= self.full_context_prob <= 1),
                ("cut_prob", "from 0 to 1", 0 <= self.cut_prob <= 1),
            )
            if not valid
        ]
        if problems:
            raise ConfigError("\n  - ".join([f"adapt_context: {len(problems)} value(s) out of range:", *problems]))


@dataclass(frozen=True)
class _Clip:
    index: int
    name: str
    audio: Tensor  # (T,) float32, 16 kHz, at most 30 s
    is_cut: bool


@dataclass(frozen=True)
class _Target:
    """The teacher's states of one clip, float16 on the CPU; `tokens` is what its decoder was fed."""

    encoder: Tensor  # (positions, d_model), the real audio and the longest pause
    tokens: Tensor  # (L,) int64
    decoder: Tensor  # (L, d_model)
    is_finished: bool

    @property
    def num_bytes(self) -> int:
        return int(self.encoder.nbytes + self.decoder.nbytes)


def adapt_context(
    model: DynamicWhisper,
    audio: Sequence[AudioItem],
    *,
    processor: Any,
    config: Config | None = None,
    steps: int = 300,
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
    rate = learning_rate or LEARNING_RATE_FACTOR * default_learning_rate(model.config.d_model)
    options = AdaptationOptions(steps, batch_size, rate, max_trailing_silence_sec, full_context_prob, cut_prob, seed)
    options.check()
    _check_inputs(model, audio)
    began = time.perf_counter()
    teacher = _Teacher(model, processor, config, options, keep=steps * batch_size > len(audio))
    student = _Student(model, config, options)
    logger.info(
        "adapting to dynamic context: %d clips, %d updates of %d clips, peak learning rate %.2e, without transcripts",
        len(audio), steps, batch_size, rate,
    )  # fmt: skip
    parts: list[tuple[float, float]] = []
    audio_sec = 0.0
    with _dynamic_while_adapting(model), tqdm(total=steps, desc="adapting", unit="update") as bar:
        for batch in _batches(audio, options):
            parts.append(student.update(batch, teacher.targets(batch), step=len(parts)))
            audio_sec += sum(len(clip.audio) for clip in batch) / SAMPLE_RATE
            bar.set_postfix(encoder=f"{parts[-1][0]:.4f}", decoder=f"{parts[-1][1]:.4f}")
            bar.update()
    result = AdaptationResult(
        losses=tuple(encoder + decoder for encoder, decoder in parts),
        encoder_losses=tuple(encoder for encoder, _ in parts),
        decoder_losses=tuple(decoder for _, decoder in parts),
        steps=steps,
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


class _Teacher:
    """The frozen model at full context; keeps what it has computed, where `keep` says that it will be asked again."""

    def __init__(
        self, model: DynamicWhisper, processor: Any, config: Config, options: AdaptationOptions, *, keep: bool
    ) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._processor = processor
        self._decoding = DecodingOptions.from_config(config)
        self._pause_samples = round(options.max_trailing_silence_sec * SAMPLE_RATE)
        self._room = TARGET_MEMORY_BYTES if keep else 0
        self._kept: dict[int, _Target] = {}
        self.seen: dict[int, tuple[bool, bool]] = {}  # by clip: cut, finished
        self.seconds = 0.0

    def targets(self, batch: Sequence[_Clip]) -> list[_Target]:
        """Return one target a clip."""
        new = [clip for clip in batch if clip.index not in self._kept]
        made: dict[int, _Target] = {}
        if new:
            began = time.perf_counter()
            made = {clip.index: target for clip, target in zip(new, self._compute(new), strict=True)}
            self.seconds += time.perf_counter() - began
        targets = [self._kept.get(clip.index) or made[clip.index] for clip in batch]
        for clip in new:
            target = made[clip.index]
            self.seen[clip.index] = (clip.is_cut, target.is_finished)
            if clip.index not in self._kept and target.num_bytes <= self._room:
                self._kept[clip.index] = target
                self._room -= target.num_bytes
        return targets

    @torch.no_grad()
    def _compute(self, clips: Sequence[_Clip]) -> list[_Target]:
        audios = [clip.audio.numpy() for clip in clips]
        encoded = encode(self._model, audios, 0.0)
        hidden = encoded.last_hidden_state  # (B, 1500, d_model)
        starts = sot_sequences(self._model, encoded, self._decoding)
        decoded = decode(self._model, self._processor, audios, self._decoding, encoder_outputs=encoded)
        rows = [[*start, *result.tokens] for start, result in zip(starts, decoded, strict=True)]
        end = self._processor.tokenizer.eos_token_id
        # to the right of a row, padding changes nothing: the decoder is causal
        inputs = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=end)
        states = self._model.model.decoder(
            input_ids=inputs.to(hidden.device), encoder_hidden_states=hidden, use_cache=False
        ).last_hidden_state  # (B, L, d_model)
        targets = []
        for at, (row, start, clip) in enumerate(zip(rows, starts, clips, strict=True)):
            is_finished = int(self._model.proj_out(states[at, len(row) - 1]).argmax()) == end
            # a transcript that was stopped is likely a loop: its states would teach loops
            length = len(row) if is_finished else len(start)
            positions = padded_samples(len(clip.audio) + self._pause_samples) // SAMPLES_PER_POSITION
            targets.append(
                _Target(
                    _kept(hidden[at, :positions]), torch.tensor(row[:length]), _kept(states[at, :length]), is_finished
                )
            )
        return targets


class _Student:
    """The model in training at its audio's own length."""

    def __init__(self, model: DynamicWhisper, config: Config, options: AdaptationOptions) -> None:
        self._model = model
        self._options = options
        self._device = next(model.parameters()).device
        choice = choose_precision(config.precision, self._device)
        logger.info("precision: %s (%s)", choice.precision, choice.reason)
        self._dtype = getattr(torch, choice.precision)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=choice.precision == "float16")
        embedding = model.model.decoder.embed_tokens.weight
        self._trained = [p for p in model.parameters() if p.requires_grad and p is not embedding]
        with _frozen(embedding):
            self._optimizer = build_optimizer(model, learning_rate=options.learning_rate, weight_decay=0.0)
        self._schedule = build_schedule(self._optimizer, total_updates=options.steps, warmup_ratio=WARMUP_RATIO)

    def update(self, batch: Sequence[_Clip], targets: Sequence[_Target], *, step: int) -> tuple[float, float]:
        """Make one update; return the losses of encoder and decoder."""
        features = log_mel_for(self._model.config.num_mel_bins, self._device)(self._audio(batch, step))
        encoder_targets, encoder_mask = self._pad([target.encoder for target in targets])
        decoder_targets, decoder_mask = self._pad([target.decoder for target in targets])
        tokens = pad_sequence([target.tokens for target in targets], batch_first=True).to(self._device)
        inner = self._model.model
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            audio = inner.encoder(features).last_hidden_state  # (B, positions, d_model)
            text = inner.decoder(
                input_ids=tokens, encoder_hidden_states=audio, use_cache=False
            ).last_hidden_state  # (B, L, d_model)
        shared = min(audio.shape[1], encoder_targets.shape[1])
        encoder_loss = state_loss(audio[:, :shared], encoder_targets[:, :shared], encoder_mask[:, :shared])
        decoder_loss = state_loss(text, decoder_targets, decoder_mask)
        loss = encoder_loss + decoder_loss
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss of update {step + 1} is {loss.item()}; its clips: {', '.join(clip.name for clip in batch)}. "
                "Listen to them, lower learning_rate, or set precision: float32"
            )
        self._step(loss)
        return encoder_loss.item(), decoder_loss.item()

    def _step(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._model.zero_grad(set_to_none=True)
        self._schedule.step()

    def _audio(self, batch: Sequence[_Clip], step: int) -> Tensor:
        """Return (B, T) on the device: clips with their pauses, or padded to 30 s."""
        generator = batch_generator(self._options.seed, 1, step)
        pauses = torch.rand(len(batch), generator=generator) * self._options.max_trailing_silence_sec * SAMPLE_RATE
        full = float(torch.rand(1, generator=generator)) < self._options.full_context_prob
        longest = max(len(clip.audio) + int(pause) for clip, pause in zip(batch, pauses, strict=True))
        audio = torch.zeros(len(batch), CONTEXT_SAMPLES if full else padded_samples(longest))
        for row, clip in enumerate(batch):
            audio[row, : len(clip.audio)] = clip.audio
        return audio.to(self._device)

    def _pad(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (B, N, d_model) float32 and which of (B, N) are real."""
        lengths = torch.tensor([len(state) for state in states])
        padded = pad_sequence(list(states), batch_first=True).to(self._device, torch.float32)
        return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(self._device)


def state_loss(states: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference over the variance of the targets.

    Args:
        states, targets: (B, N, d_model).
        mask: (B, N) bool: which positions count.
    Returns: scalar float32; 0 is equal, 1 is as far off as the targets' mean.
    """
    wanted = targets[mask]  # (positions, d_model)
    return (states.float()[mask] - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()


def _check_inputs(model: DynamicWhisper, audio: Sequence[AudioItem]) -> None:
    if model.audio_context == "dynamic":
        raise ModelError(
            "this model has audio_context 'dynamic' already: its states at 30 s may not be those of a stock model, "
            "so there is nothing to match; adapt a full-context model, or go on with WhisperTrainer"
        )
    if model.dtype != torch.float32:
        raise ModelError(
            f"this model is in {model.dtype}; small updates are lost in it: load it with dtype=torch.float32"
        )
    if len(audio) == 0:
        raise DataError("adapt_context: no audio; pass speech, no transcripts are needed")


def _batches(audio: Sequence[AudioItem], options: AdaptationOptions) -> Iterator[list[_Clip]]:
    """Yield one batch a step: clips of similar length, in an order that changes with each pass."""
    made, drawn = 0, 0
    order: list[int] = []
    while made < options.steps:
        wanted = options.batch_size * min(POOL_BATCHES, options.steps - made)
        while len(order) < wanted:
            generator = batch_generator(options.seed, 0, drawn)
            order += torch.randperm(len(audio), generator=generator).tolist()
            drawn += 1
        chosen, order = order[:wanted], order[wanted:]
        pool = sorted(
            (_load(audio, index, options) for index in chosen), key=lambda clip: (len(clip.audio), clip.index)
        )
        starts = torch.randperm(wanted // options.batch_size, generator=batch_generator(options.seed, 2, made)).tolist()
        for start in starts:
            yield pool[start * options.batch_size : (start + 1) * options.batch_size]
        made += len(starts)


def _load(audio: Sequence[AudioItem], index: int, options: AdaptationOptions) -> _Clip:
    """Decode one clip, and cut it where its own draw says so: the same cut each time, as its target is kept."""
    item = audio[index]
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
    share, place = torch.rand(2, generator=batch_generator(options.seed, 3, index)).tolist()
    least = round(MIN_CUT_SEC * SAMPLE_RATE)
    is_cut = share < options.cut_prob and len(samples) > least
    if is_cut:
        samples = samples[: least + math.floor(place * (len(samples) - least))]
    return _Clip(index, name, samples, is_cut)


def _kept(states: Tensor) -> Tensor:
    return states.to("cpu", torch.float16).clone()  # a view would hold the whole padded batch


@contextmanager
def _dynamic_while_adapting(model: DynamicWhisper) -> Iterator[None]:
    model.audio_context = "dynamic"
    try:
        with _frozen(model.model.decoder.embed_tokens.weight):
            yield
    except BaseException:
        model.audio_context = "full"
        raise


@contextmanager
def _frozen(weight: torch.nn.Parameter) -> Iterator[None]:
    required = weight.requires_grad
    weight.requires_grad_(False)
    try:
        yield
    finally:
        weight.requires_grad_(required)
