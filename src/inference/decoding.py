"""Decoding with torch: files, evaluation and streaming turn audio into text here, or in CTranslate2's engine.

Greedy decoding is a plain loop over the decoder with its cache, so that a forced prefix, a token cap per clip,
log-probabilities and word times cost nothing extra; it gives the tokens that `generate` gives (tested). Beams go to
`generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from src.data.audio import SAMPLE_RATE, Waveform
from src.inference.alignment import align_words, alignment_heads, record_cross_attention, words_from_attention
from src.inference.frontend import log_mel_batch
from src.inference.options import DecodingOptions, DecodingResult
from src.inference.tokens import Vocabulary
from src.inference.words import Word
from src.models.dynamic_context import get_audio_context


@dataclass(frozen=True)
class _Context:
    """What the decoder is given before it goes on."""

    prompt: list[int]  # previous text and hotwords
    starts: list[list[int]]  # special tokens a clip, equally many
    prefix: list[int]  # forced beginning of the text

    def tensor(self, device: torch.device) -> Tensor:
        """Return all of it, (B, L)."""
        return torch.tensor([[*self.prompt, *start, *self.prefix] for start in self.starts], device=device)


@dataclass(frozen=True)
class _Decoded:
    """What the decoder gives for one clip."""

    tokens: list[int]  # new ones, without the end token
    avg_logprob: float
    probabilities: list[float]  # of the prefix and the new tokens, where attention was recorded
    no_speech_prob: float | None
    attention: Tensor | None  # (heads, rows, positions) from the start token on: the row before a token predicts it


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
    features = log_mel_batch(
        audios,
        trailing_silence_sec,
        num_mel_bins=model.config.num_mel_bins,
        audio_context=get_audio_context(model.config),
        device=next(model.parameters()).device,
    )
    return model.get_encoder()(features.to(model.dtype))


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
    Raises: ModelError: clip too long, or a language or task that the model does not know.
    """
    vocabulary = Vocabulary.of(processor.tokenizer)
    encoded = encoder_outputs or encode(model, audios, options.trailing_silence_sec)
    languages = languages_of(model, vocabulary, encoded, options)
    starts = [
        vocabulary.start_sequence(language, options.task, timestamps=options.timestamps) for language in languages
    ]
    context = _Context(
        vocabulary.prompt_tokens(options.prompt, options.hotwords), starts, vocabulary.encode(options.prefix)
    )
    caps = [options.token_cap(len(audio)) for audio in audios]
    search = _beam_search if options.num_beams > 1 else _greedy
    results = []
    for i, row in enumerate(search(model, encoded, context, caps, options)):
        tokens = [*context.prefix, *row.tokens]
        words = None
        if options.word_timestamps:
            words = _words(model, processor, encoded, i, context, row, len(audios[i]) / SAMPLE_RATE)
        results.append(
            DecodingResult(
                text=vocabulary.decode(tokens).strip(),
                tokens=tuple(tokens),
                avg_logprob=row.avg_logprob,
                words=words,
                language=languages[i],
                no_speech_prob=row.no_speech_prob,
                temperature=options.temperature,
            )
        )
    return results


def languages_of(
    model: Any, vocabulary: Vocabulary, encoded: BaseModelOutput, options: DecodingOptions
) -> list[str | None]:
    """Return the language of each clip: that of the options, else detected; None for an English-only model."""
    rows = encoded.last_hidden_state.shape[0]
    if options.language is not None or not vocabulary.multilingual:
        return [options.language] * rows
    tokens = model.detect_language(encoder_outputs=encoded, generation_config=model.generation_config).tolist()
    code_of = {token: code for code, token in vocabulary.languages.items()}
    return [code_of[token] for token in tokens]


def _words(
    model: Any,
    processor: Any,
    encoded: BaseModelOutput,
    row: int,
    context: _Context,
    decoded: _Decoded,
    audio_sec: float,
) -> tuple[Word, ...]:
    """Take word times from the attention that decoding has seen; a second pass where it has seen none."""
    start = context.starts[row]
    text = [token for token in (*context.prefix, *decoded.tokens) if token < model.config.eos_token_id]
    if decoded.attention is None:
        hidden = encoded.last_hidden_state[row : row + 1]
        return align_words(model, processor.tokenizer, hidden, sot_sequence=start, tokens=text, audio_sec=audio_sec)
    return words_from_attention(
        processor.tokenizer, text, decoded.probabilities, decoded.attention, first=len(start), audio_sec=audio_sec
    )


@dataclass(frozen=True)
class _Steps:
    """What the loop saw, a tensor a step."""

    tokens: list[Tensor]  # (B,) each
    logprobs: list[Tensor]  # (B,) each, by Whisper's rules; 0 after a row's end
    probabilities: list[Tensor]  # (B,) each, among all text tokens, as in `align_words`; only where words are wanted
    attention: list[Tensor]  # of each decoder call and layer with alignment heads
    context_states: Tensor  # (B, L, d_model): the decoder over the given tokens


def _greedy(
    model: Any, encoded: BaseModelOutput, context: _Context, caps: list[int], options: DecodingOptions
) -> list[_Decoded]:
    """Take the likeliest token, or draw one at a temperature, until the end token."""
    given = context.tensor(encoded.last_hidden_state.device)  # (B, L)
    room = model.config.max_target_positions - given.shape[1]
    limits = torch.tensor([min(cap, room) for cap in caps], device=given.device)
    choose = _TokenChoice(model, given, options, suppress_begin=not context.prefix)
    heads = alignment_heads(model) if options.word_timestamps and not options.timestamps else []
    steps = _run_decoder(model, encoded.last_hidden_state, given, limits, choose, heads)
    scores = torch.stack(steps.logprobs, dim=1).cpu()  # (B, new tokens)
    no_speech = choose.no_speech_probabilities(steps.context_states) if options.no_speech else [None] * len(caps)
    attention = _by_row(steps.attention, heads, begin=len(context.prompt)) if heads else [None] * len(caps)
    certainty: list[list[float]] = [[]] * len(caps)
    if heads:
        forced = choose.prefix_probabilities(steps.context_states, context)
        free = torch.stack(steps.probabilities, dim=1).cpu().tolist()
        certainty = [[*first, *rest] for first, rest in zip(forced, free, strict=True)]
    results = []
    for i, (row, limit) in enumerate(zip(torch.stack(steps.tokens, dim=1).tolist(), limits.tolist(), strict=True)):
        text = row[: row.index(choose.end)] if choose.end in row else row[:limit]
        scored = min(len(text) + 1, limit)
        size = len(context.prefix) + len(text)
        rows = attention[i]
        if rows is not None:  # a shorter text than its neighbours' was fed end tokens
            rows = rows[:, : len(context.starts[i]) + size]
        average = float(scores[i, :scored].sum()) / scored
        results.append(_Decoded(text, average, certainty[i][:size], no_speech[i], rows))
    return results


def _run_decoder(
    model: Any,
    hidden: Tensor,
    given: Tensor,
    limits: Tensor,
    choose: _TokenChoice,
    heads: Sequence[tuple[int, int]],
) -> _Steps:
    """Feed the decoder its own choices until every row has ended or has as many tokens as it may."""
    tokens, cache, context_states = given, None, torch.empty(0)
    finished = torch.zeros(len(given), dtype=torch.bool, device=given.device)
    chosen: list[Tensor] = []
    logprobs: list[Tensor] = []
    probabilities: list[Tensor] = []
    with record_cross_attention(model, heads) as recorded:
        for step in range(int(limits.max())):
            output = model.model.decoder(
                input_ids=tokens, encoder_hidden_states=hidden, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            context_states = output.last_hidden_state if step == 0 else context_states
            logits = model.proj_out(output.last_hidden_state[:, -1]).float()  # (B, vocabulary)
            free = logits[:, : choose.end].softmax(dim=-1) if heads else None
            token, logprob = choose(logits, chosen)
            token = torch.where(finished, choose.end, token)
            if free is not None:
                probabilities.append(free.gather(1, token[:, None].clamp(max=choose.end - 1))[:, 0])
            logprobs.append(torch.where(finished, 0.0, logprob))
            chosen.append(token)
            finished |= (token == choose.end) | (step + 1 >= limits)
            if bool(finished.all()):
                break
            tokens = token[:, None]
    return _Steps(chosen, logprobs, probabilities, recorded, context_states)


class _TokenChoice:
    """Whisper's rules for the next token, and the choice by them."""

    def __init__(self, model: Any, contexts: Tensor, options: DecodingOptions, *, suppress_begin: bool) -> None:
        generation = model.generation_config
        end = generation.eos_token_id
        self.end: int = end if isinstance(end, int) else end[0]
        self._model, self._contexts, self._temperature = model, contexts, options.temperature
        self._suppressed = torch.tensor(generation.suppress_tokens or [], dtype=torch.long, device=contexts.device)
        self._begin = generation.begin_suppress_tokens if suppress_begin else None
        self._timestamps = None
        if options.timestamps:
            self._timestamps = WhisperTimeStampLogitsProcessor(generation, begin_index=contexts.shape[1])
        self._generator = torch.Generator(contexts.device).manual_seed(options.seed)

    def __call__(self, logits: Tensor, chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the tokens that follow (B,) and their log-probabilities (B,), from logits (B, vocabulary)."""
        logits[:, self._suppressed] = -torch.inf
        if not chosen and self._begin:
            logits[:, self._begin] = -torch.inf
        if self._timestamps is not None:
            logits = self._timestamps(torch.cat([self._contexts, *(t[:, None] for t in chosen)], dim=1), logits)
        logprobs = logits.log_softmax(dim=-1)
        if self._temperature == 0:
            best, token = logprobs.max(dim=-1)
            return token, best
        drawn = torch.multinomial((logits / self._temperature).softmax(dim=-1), 1, generator=self._generator)
        return drawn[:, 0], logprobs.gather(1, drawn)[:, 0]

    def no_speech_probabilities(self, decoded: Tensor) -> list[float | None]:
        """Return, a row, how likely the token for silence is after the start token; `decoded` is (B, L, d_model)."""
        generation = self._model.generation_config
        token = generation.no_timestamps_token_id - 1  # <|nospeech|> stands before <|notimestamps|> in every vocabulary
        at = self._contexts[0].tolist().index(generation.decoder_start_token_id)
        probabilities: list[float | None] = (
            self._model.proj_out(decoded[:, at]).float().softmax(dim=-1)[:, token].cpu().tolist()
        )
        return probabilities

    def prefix_probabilities(self, decoded: Tensor, context: _Context) -> list[list[float]]:
        """Return how likely the forced tokens were, a row; `decoded` is (B, L, d_model)."""
        if not context.prefix:
            return [[]] * len(decoded)
        size = len(context.prefix)
        logits = self._model.proj_out(decoded[:, -size - 1 : -1])[..., : self.end].float()  # (B, size, text tokens)
        wanted = torch.tensor(context.prefix, device=decoded.device)[None, :, None].expand(len(decoded), -1, -1)
        found: list[list[float]] = logits.softmax(dim=-1).gather(2, wanted)[..., 0].cpu().tolist()
        return found


def _by_row(recorded: Sequence[Tensor], heads: Sequence[tuple[int, int]], *, begin: int) -> list[Tensor]:
    """Join the attention of successive decoder calls, from token `begin` on: (heads, tokens, positions) a clip."""
    layers = len({layer for layer, _ in heads})  # record once a call each
    by_layer = [torch.cat(list(recorded[layer::layers]), dim=2) for layer in range(layers)]  # (B, h, L, P)
    return list(torch.cat(by_layer, dim=1)[:, :, begin:])


def _beam_search(
    model: Any, encoded: BaseModelOutput, context: _Context, caps: list[int], options: DecodingOptions
) -> list[_Decoded]:
    """Search by the plain `generate` of transformers: Whisper's own takes no forced beginning."""
    given = context.tensor(encoded.last_hidden_state.device)
    rules = copy.deepcopy(model.generation_config)
    rules.max_length = min(given.shape[1] + max(caps), model.config.max_target_positions)
    rules.num_beams, rules.return_dict_in_generate, rules.output_scores = options.num_beams, True, True
    if context.prefix:
        rules.begin_suppress_tokens = None
    found = GenerationMixin.generate(
        model,
        generation_config=rules,
        encoder_outputs=encoded,
        attention_mask=torch.ones(encoded.last_hidden_state.shape[:2], device=given.device),
        decoder_input_ids=given,
        decoder_attention_mask=torch.ones_like(given),
        logits_processor=[WhisperTimeStampLogitsProcessor(rules, given.shape[1])] if options.timestamps else None,
    )
    end = model.config.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in found.sequences[:, given.shape[1] :].tolist()]
    scores = found.sequences_scores.tolist()
    return [_Decoded(row[:cap], score, [], None, None) for row, cap, score in zip(rows, caps, scores, strict=True)]
