"""The one decode path: files, evaluation and streaming all turn audio into text here.

Greedy decoding is a plain loop over the decoder with its cache, so that a forced prefix, a token cap per clip and
log-probabilities cost nothing extra; it gives the tokens that `generate` gives (tested). Beams go to `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import CONTEXT_SAMPLES, SAMPLES_PER_POSITION, LogMel
from src.data.labels import MAX_PROMPT_TOKENS
from src.inference.alignment import Word, align_words
from src.models.dynamic_context import get_audio_context
from src.utils.config import Config
from src.utils.errors import ModelError

MIN_NEW_TOKENS = 8  # a short clip may still hold a long word


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode.

    Attributes:
        language: code such as "en"; None detects it per clip (multilingual models).
        task: "transcribe" or "translate".
        num_beams: 1 is greedy.
        trailing_silence_sec: appended to each clip at dynamic context; the pause tells the decoder to stop.
        max_tokens_per_sec: cap on new tokens, which ends loops early; fast speech has about 6.
        word_timestamps: fill `DecodingResult.words`.
        prompt: previous text, as conditioning only.
        prefix: text that the result must begin with.
    """

    language: str | None = None
    task: str = "transcribe"
    num_beams: int = 1
    trailing_silence_sec: float = 0.5
    max_tokens_per_sec: float = 10.0
    word_timestamps: bool = False
    prompt: str = ""
    prefix: str = ""

    @classmethod
    def from_config(cls, config: Config) -> DecodingOptions:
        """Take language and task from the model section, the rest from the inference section."""
        return cls(
            language=config.model.language,
            task=config.model.task,
            num_beams=config.inference.num_beams,
            trailing_silence_sec=config.inference.trailing_silence_sec,
            max_tokens_per_sec=config.inference.max_tokens_per_sec,
        )


@dataclass(frozen=True)
class DecodingResult:
    """One clip's text.

    Attributes:
        text: stripped of surrounding spaces.
        tokens: text tokens, prefix included, without special tokens.
        avg_logprob: mean natural-log probability of the tokens that were decoded and the end token; nan with beams.
        words: times within the clip, or None where `word_timestamps` was off.
    """

    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    words: tuple[Word, ...] | None


@torch.inference_mode()
def encode(model: Any, audios: Sequence[Waveform | Tensor], trailing_silence_sec: float) -> BaseModelOutput:
    """Compute log-mel and run the encoder on a batch.

    Args:
        model: a `DynamicWhisper`.
        audios: (T,) float32 each, 16 kHz, at most 30 s.
        trailing_silence_sec: silence after the longest clip, where 30 s leave room; unused at full context.
    Returns: `last_hidden_state` (B, positions, d_model): 50 positions a second, 1,500 at full context.
    Raises: ModelError: no clip, or a clip longer than 30 s.
    """
    if not audios:
        raise ModelError("encode: an empty batch; pass at least one clip")
    longest = max(len(audio) for audio in audios)
    if longest > CONTEXT_SAMPLES:
        raise ModelError(
            f"a clip of {longest / SAMPLE_RATE:.1f} s: the encoder takes 30 s; BatchInference cuts longer audio"
        )
    features = log_mel_batch(
        audios,
        trailing_silence_sec,
        num_mel_bins=model.config.num_mel_bins,
        audio_context=get_audio_context(model.config),
        device=next(model.parameters()).device,
    )
    return model.get_encoder()(features.to(model.dtype))


def log_mel_batch(
    audios: Sequence[Waveform | Tensor],
    trailing_silence_sec: float,
    *,
    num_mel_bins: int,
    audio_context: str,
    device: torch.device,
) -> Tensor:
    """Pad clips as their model takes them, and compute log-mel.

    Args:
        audios, trailing_silence_sec: as in `encode`.
        audio_context: "full" or "dynamic".
    Returns: (B, mels, frames) float32.
    """
    samples = CONTEXT_SAMPLES
    if audio_context == "dynamic":
        samples = padded_samples(max(map(len, audios)) + round(trailing_silence_sec * SAMPLE_RATE))
    batch = torch.zeros(len(audios), samples, device=device)
    for row, audio in enumerate(audios):
        batch[row, : len(audio)] = torch.as_tensor(audio, device=device)
    features: Tensor = log_mel_for(num_mel_bins, device)(batch)
    return features


def padded_samples(samples: int) -> int:
    """Round up to whole encoder positions (320 samples), within 0.1 and 30 s."""
    whole = math.ceil(max(samples, SAMPLE_RATE // 10) / SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
    return min(whole, CONTEXT_SAMPLES)


@lru_cache(maxsize=8)
def log_mel_for(num_mel_bins: int, device: torch.device) -> LogMel:
    """Return the feature extractor of a device, made once."""
    return LogMel(num_mel_bins).to(device)


@torch.inference_mode()
def decode(
    model: Any,
    processor: Any,
    audios: Sequence[Waveform],
    options: DecodingOptions,
    *,
    encoder_outputs: BaseModelOutput | None = None,
) -> list[DecodingResult]:
    """Transcribe clips of at most 30 s as one batch.

    Args:
        model: a `DynamicWhisper`, in the context that its config says.
        processor: its `WhisperProcessor`.
        audios: (T,) float32 each, 16 kHz.
        encoder_outputs: from `encode` on the same clips, to save encoding them twice.
    Returns: one result a clip, in order.
    Raises: ModelError: clip too long, language unknown to the model, prompt with beams.
    """
    encoded = encoder_outputs or encode(model, audios, options.trailing_silence_sec)
    hidden = encoded.last_hidden_state
    starts = sot_sequences(model, encoded, options)
    caps = [token_cap(len(audio), options) for audio in audios]
    if options.num_beams > 1:
        decoded = [(tokens, math.nan) for tokens in _beam_search(model, encoded, options, caps)]
        prefix: list[int] = []
    else:
        prompt, prefix = _context_tokens(model, processor.tokenizer, options)
        decoded = _greedy(
            model, hidden, [[*prompt, *start, *prefix] for start in starts], caps, suppress_begin=not prefix
        )
    results = []
    for row, (new_tokens, logprob) in enumerate(decoded):
        tokens = [*prefix, *new_tokens]
        words = None
        if options.word_timestamps:
            words = align_words(
                model,
                processor.tokenizer,
                hidden[row : row + 1],
                sot_sequence=starts[row],
                tokens=tokens,
                audio_sec=len(audios[row]) / SAMPLE_RATE,
            )
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        results.append(DecodingResult(text, tuple(tokens), logprob, words))
    return results


def sot_sequences(model: Any, encoded: BaseModelOutput, options: DecodingOptions) -> list[list[int]]:
    """Return, per clip, the special tokens that begin a transcript; the language is detected where none is set."""
    generation = model.generation_config
    batch = encoded.last_hidden_state.shape[0]
    start, no_timestamps = generation.decoder_start_token_id, generation.no_timestamps_token_id
    if not getattr(generation, "is_multilingual", False):
        if options.language not in (None, "en"):
            raise ModelError(
                f"this is an English-only model, language is {options.language!r}; use a multilingual variant"
            )
        return [[start, no_timestamps]] * batch
    if options.language is None:
        languages = model.detect_language(encoder_outputs=encoded, generation_config=generation).tolist()
    else:
        known = generation.lang_to_id
        if f"<|{options.language}|>" not in known:
            codes = ", ".join(sorted(key.strip("<|>") for key in known))
            raise ModelError(f"unknown language {options.language!r}; this model knows: {codes}")
        languages = [known[f"<|{options.language}|>"]] * batch
    task = generation.task_to_id[options.task]
    return [[start, language, task, no_timestamps] for language in languages]


def token_cap(samples: int, options: DecodingOptions) -> int:
    """Return the most tokens that a clip of so many samples may get."""
    return MIN_NEW_TOKENS + math.ceil(options.max_tokens_per_sec * samples / SAMPLE_RATE)


def _context_tokens(model: Any, tokenizer: Any, options: DecodingOptions) -> tuple[list[int], list[int]]:
    prompt: list[int] = []
    if options.prompt.strip():
        text = tokenizer.encode(" " + options.prompt.strip(), add_special_tokens=False)[-MAX_PROMPT_TOKENS:]
        prompt = [tokenizer.convert_tokens_to_ids("<|startofprev|>"), *text]
    prefix = tokenizer.encode(" " + options.prefix.strip(), add_special_tokens=False) if options.prefix.strip() else []
    return prompt, prefix


def _greedy(
    model: Any, hidden: Tensor, contexts: list[list[int]], caps: list[int], *, suppress_begin: bool
) -> list[tuple[list[int], float]]:
    """Return (new tokens, mean log-probability) a row; every context has the same length."""
    generation = model.generation_config
    eot = generation.eos_token_id if isinstance(generation.eos_token_id, int) else generation.eos_token_id[0]
    room = model.config.max_target_positions - len(contexts[0])
    limits = torch.tensor([min(cap, room) for cap in caps], device=hidden.device)
    suppressed = torch.tensor(generation.suppress_tokens or [], dtype=torch.long, device=hidden.device)
    begin = generation.begin_suppress_tokens if suppress_begin else None
    tokens = torch.tensor(contexts, device=hidden.device)
    finished = torch.zeros(len(contexts), dtype=torch.bool, device=hidden.device)
    total = torch.zeros(len(contexts), device=hidden.device)
    chosen: list[Tensor] = []
    cache = None
    for step in range(int(limits.max())):
        output = model.model.decoder(
            input_ids=tokens, encoder_hidden_states=hidden, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits = model.proj_out(output.last_hidden_state[:, -1]).float()  # (B, vocabulary)
        logits[:, suppressed] = -torch.inf
        if step == 0 and begin:
            logits[:, begin] = -torch.inf
        logprob, token = logits.log_softmax(dim=-1).max(dim=-1)
        token = torch.where(finished, eot, token)
        total += torch.where(finished, 0.0, logprob)
        chosen.append(token)
        finished |= (token == eot) | (step + 1 >= limits)
        if bool(finished.all()):
            break
        tokens = token[:, None]
    rows = torch.stack(chosen, dim=1).cpu().tolist()
    results = []
    for row, limit, score in zip(rows, limits.tolist(), total.tolist(), strict=True):
        text = row[: row.index(eot)] if eot in row else row
        results.append((text, score / min(len(text) + 1, limit)))
    return results


def _beam_search(model: Any, encoded: BaseModelOutput, options: DecodingOptions, caps: list[int]) -> list[list[int]]:
    if options.prompt or options.prefix:
        raise ModelError("prompt and prefix need greedy decoding; set num_beams to 1")
    multilingual = bool(getattr(model.generation_config, "is_multilingual", False))
    spoken = {"language": options.language, "task": options.task} if multilingual else {}
    sequences = model.generate(
        encoder_outputs=encoded,
        num_beams=options.num_beams,
        max_new_tokens=max(caps),
        return_timestamps=False,
        **spoken,
    )
    special = model.generation_config.eos_token_id  # every id from the end token on is special
    return [[token for token in row if token < special] for row in np.asarray(sequences.cpu()).tolist()]
