"""Torch engine: log-mel, encoder, greedy or beam search and word times for a batch of clips.

Greedy decoding is our own loop over the decoder with its cache (greedy.py), so that a forced prefix, a token cap per
clip, log-probabilities and word times cost little extra; it gives the tokens that `generate` gives (tested). Beams go
to `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.features import LogMel
from src.inference.alignment import alignment_heads, force_align, record_cross_attention, time_tokens
from src.inference.engine_base import Decoded, DecodingResult, Engine, batch_samples, transcribe
from src.inference.greedy import Capture, Greedy, cuda_graph
from src.inference.options import DecodingOptions
from src.inference.words import Vocabulary, Word, place_words
from src.models.dynamic_context import (
    decoder_states,
    evaluation_mode,
    get_audio_context,
    get_cap_rates,
    get_language,
    takes_audio_mask,
)

Clips = Sequence[Waveform | Tensor] | Tensor


@dataclass
class Encoded(BaseModelOutput):  # type: ignore[misc]
    """The encoder's output for a batch: `last_hidden_state` (B, positions, d_model), of clips of any lengths."""

    positions: list[int] | None = None  # each row's own, where they differ
    mask: Tensor | None = None  # (B, 1, 1, positions), added to attention scores: hides the others


def join(parts: Sequence[Encoded]) -> Encoded:
    """Return one batch of the rows of several; the decoder sees each row's own positions alone."""
    if len(parts) == 1:
        return parts[0]
    states = [part.last_hidden_state for part in parts]
    positions = [each.shape[1] for each in states for _ in each]
    longest, first = max(positions), states[0]
    hidden = torch.cat([functional.pad(each, (0, 0, 0, longest - each.shape[1])) for each in states])
    own = torch.arange(longest) < torch.tensor(positions)[:, None]
    mask = torch.zeros(own.shape, dtype=first.dtype).masked_fill(~own, torch.finfo(first.dtype).min)
    return Encoded(hidden, positions=positions, mask=mask[:, None, None].to(first.device))


@torch.inference_mode()
def encode(model: Any, audios: Clips, trailing_silence_sec: float, *, lengths: Sequence[int] | None = None) -> Encoded:
    """Compute log-mel and run the encoder of a `DynamicWhisper`, in the context that its config says.

    `audios` are (T,) float32 each, 16 kHz, at most 30 s; or one batch (B, T), zero after the samples of each clip that
    `lengths` gives. The silence follows the longest clip, where 30 s leave room; at full context it is unused.

    Returns:
        `last_hidden_state` (B, positions, d_model): 50 positions per second, 1,500 at full context.
    """
    lengths = [len(audio) for audio in audios] if lengths is None else lengths
    samples = batch_samples(lengths, trailing_silence_sec, get_audio_context(model.config))
    device = next(model.parameters()).device
    if isinstance(audios, Tensor):
        longest = max(lengths)
        batch = functional.pad(audios[:, :longest].to(device), (0, samples - longest))
    else:
        batch = torch.zeros(len(audios), samples, pin_memory=device.type == "cuda")  # one copy, which nothing waits for
        for row, audio in enumerate(audios):
            batch[row, : len(audio)] = torch.as_tensor(audio)
        batch = batch.to(device, non_blocking=True)
    features = LogMel(model.config.num_mel_bins)(batch)  # (B, mels, frames)
    return Encoded(model.get_encoder()(features.to(model.dtype)).last_hidden_state)


def language_logprobs(model: Any, vocabulary: Vocabulary, encoded: Encoded) -> Tensor:
    """Return (B, languages) natural-log probabilities, in the order of the vocabulary's, by one step of the decoder."""
    hidden = encoded.last_hidden_state
    start = torch.full((len(hidden), 1), vocabulary.start, device=hidden.device)
    states = decoder_states(model, model.model.decoder.embed_tokens(start), hidden, audio_mask=encoded.mask)
    logits: Tensor = model.proj_out(states[:, -1]).float()
    return logits[:, list(vocabulary.languages.values())].log_softmax(dim=-1)


def decode(
    model: Any,
    processor: Any,
    audios: Clips,
    options: DecodingOptions,
    *,
    languages: Sequence[str | None] | None = None,
    lengths: Sequence[int] | None = None,
    encoder_outputs: Encoded | None = None,
) -> list[DecodingResult]:
    """Transcribe clips of at most 30 s with a `DynamicWhisper`, as `transcribe` does: one result per clip, in order.

    Audios and lengths are those of `encode`; `encoder_outputs`, what it gave for them, saves encoding them twice. A
    clip's entry in `languages` comes before the language of the options.
    """
    clips: Any = audios if lengths is None else [audio[:n] for audio, n in zip(audios, lengths, strict=True)]
    engine = TorchEngine(model, processor)
    if encoder_outputs is None:
        return transcribe(engine, clips, options, languages=languages)
    return engine.decode(encoder_outputs, clips, options, languages=languages)


class TorchEngine(Engine):
    """Decodes with a `DynamicWhisper` on any device, in evaluation mode; the model stays in the mode it is in.

    `capture` makes a step of the decoder a captured graph; by default on CUDA, where the weights are whole.
    """

    name = "torch"

    def __init__(self, model: Any, processor: Any, *, capture: Capture | None = None) -> None:
        if capture is None and model.device.type == "cuda":
            capture = cuda_graph if all(type(weight) is torch.nn.Parameter for weight in model.parameters()) else None
        self._capture = capture
        self._model, self._processor = model, processor
        self.join = join if takes_audio_mask(model) else None
        self.vocabulary = Vocabulary.of(processor.tokenizer)
        self.device = str(model.device)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.audio_context = get_audio_context(model.config)
        self.language, self.cap_rates = get_language(model), get_cap_rates(model.config)

    def encode(self, audios: Sequence[Waveform], trailing_silence_sec: float) -> Encoded:
        """Return the encoder's output, (B, positions, d_model) in `last_hidden_state`."""
        with evaluation_mode(self._model):
            return encode(self._model, audios, trailing_silence_sec)

    @torch.inference_mode()
    def _generate(
        self, encoded: Any, given: list[list[int]], prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        """Take the likeliest token, or draw one at a temperature, until every row has ended or reached its cap."""
        model, hidden, device = self._model, encoded.last_hidden_state, encoded.last_hidden_state.device
        ids = torch.tensor(given, device=device)  # (B, L)
        if options.num_beams > 1:
            return self._beam_search(encoded, ids, prefix, caps, options)
        rules, forced, end = model.generation_config, len(prefix), self.vocabulary.end
        begin = given[0].index(self.vocabulary.start)
        heads = alignment_heads(model) if options.word_timestamps and not options.timestamps else []
        greedy = Greedy(model, end, hidden, ids, caps, forced=forced, mask=encoded.mask, capture=self._capture)
        with evaluation_mode(model):
            greedy.run(options)
            if heads:
                with record_cross_attention(model, heads) as recorded:  # one per layer
                    greedy.feed_all()

        # what each row gives
        choice, count, states = greedy.choice, greedy.taken, greedy.given_states
        chosen, scores = choice.tokens[:, :count].tolist(), choice.logprobs[:, :count].cpu()
        no_speech: list[float | None] = [None] * len(given)
        if options.no_speech:
            silence = rules.no_timestamps_token_id - 1  # <|nospeech|> stands before <|notimestamps|> everywhere
            no_speech = model.proj_out(states[:, begin]).float().softmax(dim=-1)[:, silence].tolist()
        if heads:
            attention = torch.cat(list(recorded), dim=1)[:, :, begin:]  # (B, heads, tokens from the start, positions)
            certainty = choice.probabilities[: len(given), :count]
            if forced:
                among_text = model.proj_out(states[:, -forced - 1 : -1])[..., :end].float().softmax(dim=-1)
                certainty = torch.cat([among_text.gather(2, ids[:, -forced:, None])[..., 0], certainty], dim=1)
            certainty_of_row = certainty.tolist()
        rows = []
        for i, row in enumerate(chosen[: len(given)]):
            text = row[: row.index(end)] if end in row else row[: caps[i]]
            scored = min(len(text) + 1, caps[i])
            until = ids.shape[1] - begin + scored - 1  # a shorter text than its neighbours' was fed more tokens
            timing = (certainty_of_row[i][: forced + len(text)], attention[i, :, :until]) if heads else ()
            rows.append(Decoded([*prefix, *text], float(scores[i, :scored].sum()) / scored, no_speech[i], *timing))
        return self._with_logits(encoded, given, prefix, rows) if options.hotwords else rows

    def _with_logits(
        self, encoded: Encoded, given: list[list[int]], prefix: list[int], rows: list[Decoded]
    ) -> list[Decoded]:
        """Run the decoder over the texts once more, for the scores at each place of all tokens that may be there."""
        rules, found = self._model.generation_config, []
        for i, row in enumerate(rows):
            hidden = self._row(encoded, i).last_hidden_state
            ids = torch.tensor([[*given[i], *row.tokens[len(prefix) :]]], device=hidden.device)
            with evaluation_mode(self._model):
                states = self._model.model.decoder(input_ids=ids, encoder_hidden_states=hidden).last_hidden_state
            logits = self._model.proj_out(states[0, len(given[i]) - 1 :]).float()
            logits[:, rules.suppress_tokens or []] = -torch.inf
            if not prefix:
                logits[0, rules.begin_suppress_tokens or []] = -torch.inf
            found.append(replace(row, logits=logits.cpu().numpy()))
        return found

    def _row(self, encoded: Encoded, index: int) -> Encoded:
        own = None if encoded.positions is None else encoded.positions[index]
        return Encoded(encoded.last_hidden_state[index : index + 1, :own])

    def _beam_search(
        self, encoded: Encoded, ids: Tensor, prefix: list[int], caps: list[int], options: DecodingOptions
    ) -> list[Decoded]:
        """Search by the plain `generate` of transformers: Whisper's own takes no forced beginning."""
        model, rules, end = self._model, copy.deepcopy(self._model.generation_config), self.vocabulary.end
        rules.max_length = ids.shape[1] + max(caps)
        rules.num_beams, rules.return_dict_in_generate, rules.output_scores = options.num_beams, True, True
        if prefix:
            rules.begin_suppress_tokens = None
        hidden, begin = encoded.last_hidden_state, ids.shape[1] - len(prefix)
        processors = [WhisperTimeStampLogitsProcessor(rules, begin)] if options.timestamps else None
        with evaluation_mode(model):
            found = GenerationMixin.generate(
                model,
                generation_config=rules,
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden),  # of its own: it repeats it for the beams
                attention_mask=torch.ones(hidden.shape[:2], device=ids.device),
                decoder_input_ids=ids,
                decoder_attention_mask=torch.ones_like(ids),
                logits_processor=processors,
            )
        texts = [row[: row.index(end)] if end in row else row for row in found.sequences[:, ids.shape[1] :].tolist()]
        scores = found.sequences_scores.tolist()
        rows = [Decoded([*prefix, *row[:cap]], score) for row, cap, score in zip(texts, caps, scores, strict=True)]
        return self._with_logits(encoded, ids.tolist(), prefix, rows) if options.hotwords else rows

    def _place(
        self, encoded: Encoded, audios: Sequence[Waveform], starts: list[list[int]], rows: Sequence[Decoded]
    ) -> list[tuple[Word, ...]]:
        tokenizer, words = self._processor.tokenizer, []
        for i, (audio, start, row) in enumerate(zip(audios, starts, rows, strict=True)):
            tokens, audio_sec = [token for token in row.tokens if token < self.vocabulary.end], len(audio) / SAMPLE_RATE
            if row.attention is not None:
                times = time_tokens(row.attention, len(tokens), first=len(start), audio_sec=audio_sec)
                words.append(place_words(self.vocabulary, tokens, entered_sec=times, probabilities=row.probabilities))
            else:  # known texts, beams and timestamps: in a second pass
                known: Any = {"sot_sequence": start, "tokens": tokens, "audio_sec": audio_sec}
                with evaluation_mode(self._model):
                    hidden = self._row(encoded, i).last_hidden_state
                    words.append(force_align(self._model, tokenizer, hidden, **known))
        return words

    @torch.inference_mode()
    def _detect(self, encoded: Encoded) -> list[tuple[str, float]]:
        codes = list(self.vocabulary.languages)
        with evaluation_mode(self._model):
            best = language_logprobs(self._model, self.vocabulary, encoded).exp().max(dim=-1)
        return [(codes[at], probability) for probability, at in zip(*(part.tolist() for part in best), strict=True)]
