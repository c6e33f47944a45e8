"""A frozen model at 30 s gives hidden states; the same model in training at its audio's own length is to have them too.

`context_adaptation` says what this is for.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils.rnn import pad_sequence

from src.data.audio import SAMPLE_RATE
from src.data.batching import batch_generator
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION
from src.data.mel import padded_samples
from src.inference.decoding import decode, encode, log_mel_for
from src.inference.options import DecodingOptions
from src.inference.tokens import Vocabulary
from src.models.dynamic_context import DynamicWhisper
from src.training.schedule import build_optimizer, build_schedule
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.runtime import choose_precision

logger = logging.getLogger(__name__)

TARGET_MEMORY_BYTES = 1 << 30  # of kept targets; what does not fit is computed again
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
PAUSE_STREAM = 1  # of the random draws; context_adaptation has the others


@dataclass(frozen=True)
class Clip:
    """One recording to adapt on.

    Attributes:
        index: in the caller's sequence.
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

    @property
    def num_bytes(self) -> int:
        """Memory of the states."""
        return int(self.encoder.nbytes + self.decoder.nbytes)


class Teacher:
    """A frozen copy of a full-context model, in float32.

    Args:
        config: `model.language`, `model.task` and `inference`, for its transcripts.
        max_trailing_silence_sec: the longest pause of a student's clip.
        keep: targets will be asked for again, so keep what fits into 1 GB.

    Attributes:
        seen: by clip index: whether it is cut, whether its transcript is finished.
        seconds: wall time of computing.
    """

    def __init__(
        self, model: DynamicWhisper, processor: Any, config: Config, *, max_trailing_silence_sec: float, keep: bool
    ) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._processor = processor
        self._decoding = DecodingOptions.from_config(config)
        self._vocabulary = Vocabulary.of(processor.tokenizer)
        self._pause_samples = round(max_trailing_silence_sec * SAMPLE_RATE)
        self._room = TARGET_MEMORY_BYTES if keep else 0
        self._kept: dict[int, Target] = {}
        self.seen: dict[int, tuple[bool, bool]] = {}
        self.seconds = 0.0

    def targets(self, batch: Sequence[Clip]) -> list[Target]:
        """Return one target a clip; a clip of a known index is taken to be the same as before."""
        new = {clip.index: clip for clip in batch if clip.index not in self._kept}
        began = time.perf_counter()
        made = dict(zip(new, self._compute(list(new.values())), strict=True)) if new else {}
        self.seconds += time.perf_counter() - began
        for index, target in made.items():
            self.seen[index] = (new[index].is_cut, target.is_finished)
            if target.num_bytes <= self._room:
                self._kept[index] = target
                self._room -= target.num_bytes
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
        # to the right of a row, padding changes nothing: the decoder is causal
        inputs = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=end)
        states = self._model.model.decoder(
            input_ids=inputs.to(hidden.device), encoder_hidden_states=hidden, use_cache=False
        ).last_hidden_state  # (B, L, d_model)
        targets = []
        for at, (row, start, clip) in enumerate(zip(rows, starts, clips, strict=True)):
            is_finished = int(self._model.proj_out(states[at, len(row) - 1]).argmax()) == end
            # a transcript that was stopped is likely a loop: its states would teach loops
            tokens = torch.tensor(row if is_finished else start)
            positions = padded_samples(len(clip.audio) + self._pause_samples) // SAMPLES_PER_POSITION
            targets.append(Target(_kept(hidden[at, :positions]), tokens, _kept(states[at, : len(tokens)]), is_finished))
        return targets


class Student:
    """The model in training; it must be "dynamic".

    Args:
        config: `precision`.
        steps: updates to come.
        learning_rate: peak.
        max_trailing_silence_sec: each clip gets a pause at its end, drawn from 0 to this.
        full_context_prob: share of batches that are padded to 30 s.
        seed: decides the pauses, and which batches are padded.
    """

    def __init__(
        self,
        model: DynamicWhisper,
        config: Config,
        *,
        steps: int,
        learning_rate: float,
        max_trailing_silence_sec: float,
        full_context_prob: float,
        seed: int,
    ) -> None:
        self._model = model
        self._max_pause_samples = max_trailing_silence_sec * SAMPLE_RATE
        self._full_context_prob = full_context_prob
        self._seed = seed
        self._device = next(model.parameters()).device
        choice = choose_precision(config.precision, self._device)
        logger.info("precision: %s (%s)", choice.precision, choice.reason)
        self._dtype = getattr(torch, choice.precision)
        self._scaler = GradScaler(self._device.type, enabled=choice.precision == "float16")
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(model, learning_rate=learning_rate, weight_decay=0.0)
        self._schedule = build_schedule(self._optimizer, total_updates=steps, warmup_ratio=WARMUP_RATIO)

    def update(self, batch: Sequence[Clip], targets: Sequence[Target], *, step: int) -> tuple[float, float]:
        """Make one update.

        Args:
            step: from 0; with the seed, it decides what is random.
        Returns: the losses of encoder and decoder, from before the update.
        Raises: DataError: a loss that is not finite, with the names of its clips.
        """
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            encoder_loss, decoder_loss = matching_losses(self._model, self._audio(batch, step), targets)
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
        nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    def _audio(self, batch: Sequence[Clip], step: int) -> Tensor:
        """Return (B, T) on the device: clips with their pauses, or padded to 30 s."""
        generator = batch_generator(self._seed, PAUSE_STREAM, step)
        pauses = torch.rand(len(batch), generator=generator) * self._max_pause_samples
        full = float(torch.rand(1, generator=generator)) < self._full_context_prob
        longest = max(len(clip.audio) + int(pause) for clip, pause in zip(batch, pauses, strict=True))
        audio = torch.zeros(len(batch), CONTEXT_SAMPLES if full else padded_samples(longest))
        for row, clip in enumerate(batch):
            audio[row, : len(clip.audio)] = clip.audio
        return audio.to(self._device)


def matching_losses(model: DynamicWhisper, audio: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Compare a model's states with the teacher's.

    Args:
        audio: (B, T) float32 on the model's device, T in whole encoder positions.
        targets: one a row; where the audio is shorter than a target, so far as it goes.
    Returns: `state_loss` of the encoder and of the decoder.
    """
    features = log_mel_for(model.config.num_mel_bins, audio.device)(audio)  # (B, mels, T // 160)
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
        states, targets: (B, N, d_model).
        mask: (B, N) bool: which positions count.
    Returns: scalar float32; 0 is equal, 1 is as far off as the targets' mean.
    """
    wanted = targets[mask].float()  # (positions, d_model)
    return (states[mask].float() - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()


@contextmanager
def frozen(weight: nn.Parameter) -> Iterator[None]:
    """Keep a weight as it is for a while."""
    required = weight.requires_grad
    weight.requires_grad_(False)
    try:
        yield
    finally:
        weight.requires_grad_(required)


def _padded_loss(states: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Compare (B, N, d_model) with a target a row, as far as both go."""
    padded = pad_sequence(list(targets), batch_first=True)[:, : states.shape[1]]
    lengths = torch.tensor([len(target) for target in targets])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return state_loss(states[:, : padded.shape[1]], padded.to(states.device), mask.to(states.device))


def _kept(states: Tensor) -> Tensor:
    return states.to("cpu", torch.float16).clone()  # a view would hold the whole padded batch
