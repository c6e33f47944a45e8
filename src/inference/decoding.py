"""Decoding with torch: log-mel, encoder, greedy or beam search and word times for a batch of clips.

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
from torch.nn import functional
from transformers import GenerationMixin, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import LogMel
from src.inference.alignment import align_words, alignment_heads, record_cross_attention, words_from_attention
from src.inference.options import DecodingOptions, DecodingResult, batch_samples
from src.inference.words import Vocabulary, Word
from src.models.alignment_heads import Head
from src.models.dynamic_context import evaluation_mode, get_audio_context

Clips = Sequence[Waveform | Tensor] | Tensor


class TorchEngine:
    """Decodes with a `DynamicWhisper` on any device; see `Engine` for its methods.

    Args:
        model: in the context that its config says; it decodes in evaluation mode, and stays in the mode it is in.
        processor: of the model.
    """

    name = "torch"
    workers = 1

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self.vocabulary = Vocabulary.of(processor.tokenizer)
        self.device = str(model.device)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.audio_context = get_audio_context(model.config)

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Any:
        """Return the encoder's output, (B, positions, d_model) in `last_hidden_state`."""
        with evaluation_mode(self._model):
            return encode(self._model, audios, trailing_silence_sec)

    def decode(self, encoded: Any, audios: Sequence[Waveform], options: DecodingOptions) -> list[DecodingResult]:
        """Decode what `encode` gave for these clips."""
        with evaluation_mode(self._model):
            return decode(self._model, self._processor, audios, options, encoder_outputs=encoded)

    def align(
        self, encoded: Any, audios: Sequence[Waveform], texts: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[Word, ...]]:
        """Place known texts in their clips."""
        start = self.vocabulary.start_sequence(options.language, options.task, timestamps=False)
        with evaluation_mode(self._model):
            return [
                align_words(
                    self._model,
                    self._processor.tokenizer,
                    encoded.last_hidden_state[row : row + 1],
                    sot_sequence=start,
                    tokens=tokens,
                    audio_sec=len(audio) / SAMPLE_RATE,
                )
                for row, (audio, tokens) in enumerate(zip(audios, texts, strict=True))
            ]

    @torch.inference_mode()
    def first_token(self, audio: Waveform, options: DecodingOptions) -> int:
        """Return the likeliest first token of a clip."""
        with evaluation_mode(self._model):
            encoded = encode(self._model, [audio], options.trailing_silence_sec)
            hidden = encoded.last_hidden_state  # (1, positions, d_model)
            (language,) = languages_of(self._model, self.vocabulary, encoded, options)
            start = self.vocabulary.start_sequence(language, options.task, timestamps=False)
            tokens = torch.tensor([start], device=hidden.device)
            output = self._model.model.decoder(input_ids=tokens, encoder_hidden_states=hidden, use_cache=True)
            return int(self._model.proj_out(output.last_hidden_state[:, -1]).argmax(dim=-1))

    def detect_languages(self, audios: Sequence[Waveform]) -> list[str | None]:
        """Return the likeliest language of each clip; None for an English-only model."""
        options = DecodingOptions()
        with evaluation_mode(self._model):
            encoded = encode(self._model, audios, options.trailing_silence_sec)
            return languages_of(self._model, self.vocabulary, encoded, options)


@torch.inference_mode()
def encode(
    model: Any, audios: Clips, trailing_silence_sec: float, *, lengths: Sequence[int] | None = None
) -> BaseModelOutput:
    """Compute log-mel and run the encoder on a batch.

    Args:
        model: a `DynamicWhisper`.
        audios: (T,) float32 each, 16 kHz, at most 30 s; or one batch (B, T), zero after the end of each clip.
        trailing_silence_sec: silence after the longest clip, where 30 s leave room; unused at full context.
        lengths: samples of each clip, for one batch.

    Returns:
        `last_hidden_state` (B, positions, d_model): 50 positions per second, 1,500 at full context.

    Raises:
        ModelError: no clip, or a clip longer than 30 s.
    """
    lengths = [len(audio) for audio in audios] if lengths is None else lengths
    samples = batch_samples(lengths, trailing_silence_sec, get_audio_context(model.config))
    device = next(model.parameters()).device
    if isinstance(audios, Tensor):
        longest = max(lengths)
        batch = functional.pad(audios[:, :longest].to(device), (0, samples - longest))
    else:
        batch = torch.zeros(len(audios), samples, device=device)
        for row, audio in enumerate(audios):
            batch[row, : len(audio)] = torch.as_tensor(audio, device=device)
    features = LogMel(model.config.num_mel_bins)(batch)  # (B, mels, frames)
    return model.get_encoder()(features.to(model.dtype))


@torch.inference_mode()
def decode(
    model: Any,
    processor: Any,
    audios: Clips,
    options: DecodingOptions,
    *,
    lengths: Sequence[int] | None = None,
    encoder_outputs: BaseModelOutput | None = None,
) -> list[DecodingResult]:
    """Transcribe clips of at most 30 s as one batch.

    Args:
        model: a `DynamicWhisper`, in the context that its config says.
        processor: its `WhisperProcessor`.
        audios: as for `encode`.
        options: how to decode.
        lengths: as for `encode`.
        encoder_outputs: from `encode` on the same clips, to save encoding them twice.

    Returns:
        One result per clip, in order.

    Raises:
        ModelError: clip too long, or a language or task that the model does not know.
    """
    tokenizer, vocabulary = processor.tokenizer, Vocabulary.of(processor.tokenizer)
    lengths = [len(audio) for audio in audios] if lengths is None else lengths
    encoded = encoder_outputs or encode(model, audios, options.trailing_silence_sec, lengths=lengths)
    hidden = encoded.last_hidden_state  # kept here: `generate` repeats that of `encoded` for beams

    # what the decoder is given: previous text and hotwords, special tokens, the forced beginning of the text
    languages = languages_of(model, vocabulary, encoded, options)
    starts = [vocabulary.start_sequence(code, options.task, timestamps=options.timestamps) for code in languages]
    prompt = vocabulary.prompt_tokens(options.prompt, options.hotwords)
    prefix = vocabulary.encode(options.prefix)
    given = torch.tensor([[*prompt, *start, *prefix] for start in starts], device=hidden.device)  # (B, L)

    caps = [options.token_cap(samples) for samples in lengths]
    search = _beam_search if options.num_beams > 1 else _greedy
    rows = search(model, encoded, given, caps, options, begin=len(prompt), forced=len(prefix), end=vocabulary.end)
    results = []
    for i, row in enumerate(rows):
        tokens = [*prefix, *row.tokens]
        words = None
        if options.word_timestamps:
            text, audio_sec = [token for token in tokens if token < vocabulary.end], lengths[i] / SAMPLE_RATE
            start = starts[i]
            if row.attention is not None:
                words = words_from_attention(
                    tokenizer, text, row.probabilities, row.attention, first=len(start), audio_sec=audio_sec
                )
            else:  # beams and timestamps: in a second pass
                words = align_words(
                    model, tokenizer, hidden[i : i + 1], sot_sequence=start, tokens=text, audio_sec=audio_sec
                )
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


@dataclass(frozen=True)
class _Decoded:
    """The decoder's output for one clip."""

    tokens: list[int]  # new ones, without the end token
    avg_logprob: float
    no_speech_prob: float | None = None
    probabilities: Sequence[float] = ()  # of the forced and the new tokens, where attention was recorded
    attention: Tensor | None = None  # (heads, tokens from the start token on, positions)


def _greedy(
    model: Any,
    encoded: BaseModelOutput,
    given: Tensor,
    caps: Sequence[int],
    options: DecodingOptions,
    *,
    begin: int,
    forced: int,
    end: int,
) -> list[_Decoded]:
    """Take the likeliest token, or draw one at a temperature, until every row has ended or reached its cap.

    `given` (B, L) has the tokens before the new ones: the start token is at `begin`, the last `forced` are text.
    """
    generation, device = model.generation_config, given.device
    room = model.config.max_target_positions - given.shape[1]
    limits = [min(cap, room) for cap in caps]
    limit_of_row = torch.tensor(limits, device=device)
    suppressed = torch.tensor(generation.suppress_tokens or [], dtype=torch.long, device=device)
    timestamps = WhisperTimeStampLogitsProcessor(generation, begin_index=given.shape[1]) if options.timestamps else None
    generator = torch.Generator(device).manual_seed(options.seed)
    heads = alignment_heads(model) if options.word_timestamps and not options.timestamps else []

    tokens, cache, given_states = given, None, torch.empty(0)
    finished = torch.zeros(len(given), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []  # (B,) per step, as the next two
    logprobs: list[Tensor] = []
    probabilities: list[Tensor] = []  # among text tokens alone
    with record_cross_attention(model, heads) as recorded:
        for step in range(max(limits)):
            output = model.model.decoder(
                input_ids=tokens, encoder_hidden_states=encoded.last_hidden_state, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            given_states = output.last_hidden_state if step == 0 else given_states
            logits = model.proj_out(output.last_hidden_state[:, -1]).float()  # (B, vocabulary)
            among_text = logits[:, :end].softmax(dim=-1) if heads else None

            # Whisper's rules for the next token
            logits[:, suppressed] = -torch.inf
            if step == 0 and not forced and generation.begin_suppress_tokens:
                logits[:, generation.begin_suppress_tokens] = -torch.inf
            if timestamps is not None:
                logits = timestamps(torch.cat([given, *(token[:, None] for token in chosen)], dim=1), logits)

            # the choice, and the end token for rows that have ended
            scores = logits.log_softmax(dim=-1)
            if options.temperature == 0:
                score, token = scores.max(dim=-1)
            else:
                drawn = torch.multinomial((logits / options.temperature).softmax(dim=-1), 1, generator=generator)
                score, token = scores.gather(1, drawn)[:, 0], drawn[:, 0]
            token = torch.where(finished, end, token)
            chosen.append(token)
            logprobs.append(torch.where(finished, 0.0, score))
            if among_text is not None:
                probabilities.append(among_text.gather(1, token[:, None].clamp(max=end - 1))[:, 0])
            finished |= (token == end) | (step + 1 >= limit_of_row)
            if bool(finished.all()):
                break
            tokens = token[:, None]

    # what each row gives
    scores = torch.stack(logprobs, dim=1).cpu()  # (B, new tokens)
    no_speech: list[float | None] = [None] * len(given)
    if options.no_speech:
        silence = generation.no_timestamps_token_id - 1  # <|nospeech|> stands before <|notimestamps|> everywhere
        no_speech = model.proj_out(given_states[:, begin]).float().softmax(dim=-1)[:, silence].tolist()
    if heads:
        attention = _joined_attention(recorded, heads)[:, :, begin:]  # (B, heads, start, forced and new tokens, P)
        certainty = torch.stack(probabilities, dim=1)
        if forced:
            among_text = model.proj_out(given_states[:, -forced - 1 : -1])[..., :end].float().softmax(dim=-1)
            certainty = torch.cat([among_text.gather(2, given[:, -forced:, None])[..., 0], certainty], dim=1)
        certainty_of_row = certainty.tolist()
    rows = []
    for i, row in enumerate(torch.stack(chosen, dim=1).tolist()):
        text = row[: row.index(end)] if end in row else row[: limits[i]]
        scored = min(len(text) + 1, limits[i])
        logprob = float(scores[i, :scored].sum()) / scored
        if not heads:
            rows.append(_Decoded(text, logprob, no_speech[i]))
            continue
        until = given.shape[1] - begin + len(text)  # a shorter text than its neighbours' was fed end tokens
        rows.append(
            _Decoded(text, logprob, no_speech[i], certainty_of_row[i][: forced + len(text)], attention[i, :, :until])
        )
    return rows


def _joined_attention(recorded: Sequence[Tensor], heads: Sequence[Head]) -> Tensor:
    """Join the attention of successive decoder calls, one record per call and layer: (B, heads, tokens, positions)."""
    layers = len({layer for layer, _ in heads})
    return torch.cat([torch.cat(list(recorded[layer::layers]), dim=2) for layer in range(layers)], dim=1)


def _beam_search(
    model: Any,
    encoded: BaseModelOutput,
    given: Tensor,
    caps: Sequence[int],
    options: DecodingOptions,
    *,
    begin: int,
    forced: int,
    end: int,
) -> list[_Decoded]:
    """Search by the plain `generate` of transformers: Whisper's own takes no forced beginning."""
    rules = copy.deepcopy(model.generation_config)
    rules.max_length = min(given.shape[1] + max(caps), model.config.max_target_positions)
    rules.num_beams, rules.return_dict_in_generate, rules.output_scores = options.num_beams, True, True
    if forced:
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
    rows = [row[: row.index(end)] if end in row else row for row in found.sequences[:, given.shape[1] :].tolist()]
    scores = found.sequences_scores.tolist()
    return [_Decoded(row[:cap], score) for row, cap, score in zip(rows, caps, scores, strict=True)]
