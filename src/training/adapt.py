"""Context adaptation: stock weights learn to work at the audio's own length, without transcripts.

A frozen copy, padded to 30 s as it was trained, transcribes each clip; its hidden states over the real audio and over
its own transcript are what the model must have at a short context. Some clips are cut at a random place, since a
stream's audio stops anywhere.

Source: https://github.com/futo-org/whisper-acft, which matches the decoder's states on human transcripts. Changed here:
the teacher's own transcript, the encoder's states too, each loss relative to the variance of its target, and the token
embedding stays as it is: it is the output layer too, which no hidden state would hold in place.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from src.data.audio import SAMPLE_RATE, Waveform, load_audio, to_mono_16k
from src.data.dataset import decode_audio
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION, LogMel, padded_samples
from src.data.loader import batch_generator
from src.data.utterance import Utterance
from src.inference.options import DecodingOptions
from src.inference.torch_engine import decode, encode
from src.inference.words import Vocabulary
from src.models.dynamic_context import DynamicWhisper
from src.training.updates import build_optimizer, build_schedule, default_learning_rate
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, ModelError
from src.utils.languages import code_of_language
from src.utils.logging_config import ProgressBar
from src.utils.runtime import choose_precision

logger = logging.getLogger(__name__)

AudioItem = Waveform | Path | str | Utterance
PAUSE_SAMPLES = SAMPLE_RATE  # the longest pause after a clip
CUT_SHARE = 0.25  # of the clips
MIN_CUT_SAMPLES = SAMPLE_RATE  # less has hardly a word, and on almost nothing the teacher makes words up
POOL_BATCHES = 4  # batches that are decoded and sorted by length together
TARGET_MEMORY_BYTES = 1 << 30  # of kept targets; what does not fit is computed again
WARMUP_RATIO = 0.1
MAX_GRAD_NORM = 1.0
_ORDER_STREAM, _PAUSE_STREAM, _SHUFFLE_STREAM, _CUT_STREAM = range(4)  # of the random draws


@dataclass(frozen=True)
class AdaptationResult:
    """Losses and costs of an adaptation."""

    losses: tuple[float, ...]  # one per step: of the encoder + of the decoder, each 0 (equal) to 1 (a constant)
    steps: int
    clips: int  # different ones
    unfinished_clips: int  # not matched over a transcript, because the teacher did not end its own
    teacher_sec: float
    seconds: float  # of everything


@dataclass(frozen=True)
class Clip:
    """One recording to adapt on."""

    index: int  # in the caller's sequence
    name: str
    audio: Tensor  # (T,) float32, 16 kHz, at most 30 s
    language: str | None = None  # None takes `model.language`, else the one that the teacher hears


class Target(NamedTuple):
    """The teacher's last hidden states of one clip, float16 on the CPU."""

    encoder: Tensor  # (positions, d_model) over the real audio and the longest pause
    tokens: Tensor  # (L,) int64 that the decoder was fed
    decoder: Tensor  # (L, d_model)
    is_finished: bool  # the teacher ended its transcript; else `tokens` are only those that begin one


def adapt_context(
    model: DynamicWhisper,
    audio: Sequence[AudioItem],
    *,
    processor: Any,
    config: Config | None = None,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float | None = None,
    seed: int = 42,
) -> AdaptationResult:
    """Make a full-context model work at dynamic context, by matching its own hidden states at 30 s.

    Args:
        model: of full context, float32; changed in place, and "dynamic" when this returns, "full" after an error.
        audio: speech without transcripts: (T,) float32 arrays at 16 kHz, files, or utterances, whose text is not read.
            Only the first 30 s of a longer one are used.
        processor: of the model.
        config: `model.language` (of clips that do not say theirs) and `model.task` of the teacher's transcripts,
            `inference` for their decoding, `precision` of the model's own passes; defaults without. The teacher
            computes in float32.
        steps: updates; clips repeat, in a new order, when they run out.
        batch_size: clips per update.
        learning_rate: peak; None takes the rate for fine-tuning a model of this size.
        seed: decides order, cuts and pauses.

    Raises:
        ModelError: the model is dynamic already, or not in float32.
        DataError: no audio, or a loss that is not finite.
        AudioError: a recording cannot be used; it is named.
    """
    config = config or Config()
    rate = default_learning_rate(model.config.d_model) if learning_rate is None else learning_rate
    if steps < 1 or batch_size < 1 or not rate > 0:
        raise ConfigError(
            f"adapt_context: steps {steps} and batch_size {batch_size} are at least 1, learning_rate {rate} is above 0"
        )
    if model.audio_context == "dynamic":
        raise ModelError(
            "this model has audio_context 'dynamic' already, so its states at 30 s are no target any more; adapt a "
            "full-context model, or continue with WhisperTrainer"
        )
    if model.dtype != torch.float32:
        raise ModelError(f"this model is in {model.dtype}, too coarse for small updates: load it with torch.float32")
    if len(audio) == 0:
        raise DataError("adapt_context: no audio; pass speech, no transcripts are needed")
    began, device = time.perf_counter(), model.device
    choice = choose_precision(config.precision, device)
    dtype, scaler = getattr(torch, choice.precision), GradScaler(device.type, enabled=choice.precision == "float16")
    teacher = Teacher(model, processor, config, keep=steps * batch_size > len(audio))
    logger.info(
        "adapting to dynamic context: %d clips, %d updates of %d clips, peak learning rate %.2e, precision %s (%s)",
        len(audio), steps, batch_size, rate, choice.precision, choice.reason,
    )  # fmt: skip
    losses: list[float] = []
    embedding = model.model.decoder.embed_tokens.weight
    required = embedding.requires_grad
    model.audio_context = "dynamic"
    embedding.requires_grad_(False)
    try:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(model, learning_rate=rate, weight_decay=0.0)
        schedule = build_schedule(optimizer, total_updates=steps, warmup_ratio=WARMUP_RATIO)
        batches = _batches(audio, steps=steps, batch_size=batch_size, seed=seed)
        bar = ProgressBar(batches, total=steps, desc="adapting", unit="update")
        for step, batch in enumerate(bar):
            # what the states must be, and what they are
            targets = teacher.targets(batch)
            padded = _pad(batch, batch_generator(seed, _PAUSE_STREAM, step)).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                encoder_loss, decoder_loss = matching_losses(model, padded, targets)
            loss = encoder_loss + decoder_loss
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss of update {step + 1} is {loss.item()}; listen to its clips "
                    f"({', '.join(clip.name for clip in batch)}), lower learning_rate, or set precision: float32"
                )
            # one update
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    except BaseException:
        model.audio_context = "full"
        raise
    finally:
        embedding.requires_grad_(required)
    clips, seconds = len(teacher.finished), time.perf_counter() - began
    logger.info("adapted in %.0f s (teacher %.0f s), loss %.4f", seconds, teacher.seconds, losses[-1])
    unfinished = clips - sum(teacher.finished.values())
    return AdaptationResult(tuple(losses), steps, clips, unfinished, teacher.seconds, seconds)


def _batches(audio: Sequence[AudioItem], *, steps: int, batch_size: int, seed: int) -> Iterator[list[Clip]]:
    """Yield one batch per step: clips of similar length, in an order that changes with each pass."""
    made, passes = 0, 0
    order: list[int] = []
    while made < steps:
        batches = min(POOL_BATCHES, steps - made)
        while len(order) < batches * batch_size:
            order += torch.randperm(len(audio), generator=batch_generator(seed, _ORDER_STREAM, passes)).tolist()
            passes += 1
        chosen, order = order[: batches * batch_size], order[batches * batch_size :]
        pool = [_load(audio[index], index, seed) for index in chosen]
        pool.sort(key=lambda clip: (len(clip.audio), clip.index))
        for batch in torch.randperm(batches, generator=batch_generator(seed, _SHUFFLE_STREAM, made)).tolist():
            yield pool[batch * batch_size : (batch + 1) * batch_size]
        made += batches


def _load(item: AudioItem, index: int, seed: int) -> Clip:
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
    if share < CUT_SHARE and len(samples) > MIN_CUT_SAMPLES:
        samples = samples[: MIN_CUT_SAMPLES + math.floor(place * (len(samples) - MIN_CUT_SAMPLES))]
    language = code_of_language(item.language) if isinstance(item, Utterance) and item.language else None
    return Clip(index, name, samples, language)


def _pad(batch: Sequence[Clip], draws: torch.Generator) -> Tensor:
    """Return (B, T): clips with random pauses, in whole encoder positions."""
    pauses = torch.rand(len(batch), generator=draws) * PAUSE_SAMPLES
    longest = max(len(clip.audio) + int(pause) for clip, pause in zip(batch, pauses, strict=True))
    audio = pad_sequence([clip.audio for clip in batch], batch_first=True)
    return functional.pad(audio, (0, padded_samples(longest) - audio.shape[1]))


class Teacher:
    """A frozen copy of a full-context model, in float32, which sees each clip once if its target is to be kept."""

    def __init__(self, model: DynamicWhisper, processor: Any, config: Config, *, keep: bool) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._processor = processor
        self._decoding = DecodingOptions.from_config(config)
        self._vocabulary = Vocabulary.of(processor.tokenizer)
        self._room = TARGET_MEMORY_BYTES if keep else 0
        self._kept: dict[int, Target] = {}
        self.finished: dict[int, bool] = {}  # by clip index: whether its text is
        self.seconds = 0.0  # of computing

    def targets(self, batch: Sequence[Clip]) -> list[Target]:
        """Return one target per clip; a clip of a known index is taken to be the same as before."""
        new = {clip.index: clip for clip in batch if clip.index not in self._kept}
        began = time.perf_counter()
        made = dict(zip(new, self._compute(list(new.values())), strict=True)) if new else {}
        self.seconds += time.perf_counter() - began
        for index, target in made.items():
            self.finished[index] = target.is_finished
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
        languages = [clip.language for clip in clips]
        decoded = decode(
            self._model, self._processor, audios, self._decoding, languages=languages, encoder_outputs=encoded
        )
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
            positions = padded_samples(len(clip.audio) + PAUSE_SAMPLES) // SAMPLES_PER_POSITION
            # clones: a view would hold the whole padded batch
            heard, written = (
                part.to("cpu", torch.float16).clone() for part in (hidden[at, :positions], states[at, : len(tokens)])
            )
            targets.append(Target(heard, tokens, written, is_finished))
        return targets


def matching_losses(model: DynamicWhisper, audio: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Compare a model's states with the teacher's, as far as the audio goes.

    Args:
        model: in training, "dynamic".
        audio: (B, T) float32 on the model's device, T in whole encoder positions.
        targets: one per row.

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
        state_loss(heard, [target.encoder for target in targets]),
        state_loss(written, [target.decoder for target in targets]),
    )


def state_loss(states: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Mean squared difference over the variance of the targets: 0 is equal, 1 is as far off as the targets' mean.

    States are (B, N, d_model), targets (positions, d_model) per row; they are compared as far as both go.
    """
    padded = pad_sequence(list(targets), batch_first=True)[:, : states.shape[1]]
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(target) for target in targets])[:, None]
    wanted = padded[mask].to(states.device).float()  # (positions, d_model)
    found = states[:, : padded.shape[1]][mask.to(states.device)].float()
    return (found - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean()
