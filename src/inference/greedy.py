"""Greedy decoding in torch: the choice of tokens stays on the device, and on CUDA each step is one captured graph.

The host only counts steps. It reads whether all rows have ended every `READ_EVERY` tokens on a GPU, where a read waits
for all work that was queued; on a CPU after every token. In a captured graph every tensor keeps its place: keys and
values lie in caches of fixed size, and the shapes of a graph are multiples (rows, tokens, masked positions), so that
few are captured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, WhisperTimeStampLogitsProcessor

from src.data.labels import MAX_LABEL_TOKENS
from src.inference.options import DecodingOptions, gumbel_noise
from src.models.dynamic_context import decoder_states
from src.utils.errors import first_line

logger = logging.getLogger(__name__)

READ_EVERY = 8  # tokens
# batches, token caches and masked positions of captured graphs are multiples
ROWS_STEP, LENGTH_STEP, POSITIONS_STEP = 8, 64, 128
MAX_GRAPHS = 8  # of one model: each holds keys and values of its shape
WARM_STEPS = 2  # before a capture: libraries choose their kernels; and compared after it

Step = Callable[[], None]
Capture = Callable[[Step], Step]


class Choice:
    """Whisper's rules for the next token, and what was chosen so far: (B, steps) tensors on the device."""

    def __init__(self, model: Any, end: int, rows: int, steps: int, device: torch.device) -> None:
        rules = model.generation_config
        self.end, vocabulary = end, model.config.vocab_size
        self._rule = _suppressing(rules.suppress_tokens, vocabulary, device)
        self._first_rule = self._rule + _suppressing(rules.begin_suppress_tokens, vocabulary, device)
        self.tokens = torch.full((rows, steps), end, device=device)
        self.logprobs = torch.zeros(rows, steps, device=device)  # natural
        self.probabilities = torch.zeros(rows, steps, device=device)  # among text tokens alone
        self.newest = torch.full((rows, 1), end, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._caps = torch.zeros(rows, dtype=torch.long, device=device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)

    def begin(self, caps: Sequence[int]) -> None:
        """Begin texts of at most so many tokens; rows beyond them have none."""
        self.tokens.fill_(self.end)
        for tensor in (self.logprobs, self.finished, self._step):
            tensor.zero_()
        self._caps.copy_(torch.tensor([*caps, *[0] * (len(self._caps) - len(caps))]), non_blocking=True)

    def take(
        self,
        logits: Tensor,
        *,
        is_first: bool = False,
        timestamps: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 0.0,
        noise: Tensor | None = None,
    ) -> None:
        """Choose the next token of each row by its logits (B, vocabulary): the likeliest, or with `noise` a drawn one.

        Rows that have ended get the end token.
        """
        raw = logits.float()
        logits = raw + (self._first_rule if is_first else self._rule)
        if timestamps is not None:
            logits = timestamps(logits)
        scores = logits.log_softmax(dim=-1)
        if noise is None:
            score, token = scores.max(dim=-1)
        else:
            token = (logits / temperature + noise).argmax(dim=-1)
            score = scores.gather(1, token[:, None])[:, 0]
        token = torch.where(self.finished, self.end, token)
        among_text = raw.gather(1, token[:, None].clamp(max=self.end - 1))[:, 0] - raw[:, : self.end].logsumexp(dim=-1)
        self.tokens.index_copy_(1, self._step, token[:, None])
        self.logprobs.index_copy_(1, self._step, torch.where(self.finished, 0.0, score)[:, None])
        self.probabilities.index_copy_(1, self._step, among_text.exp()[:, None])
        self._step.add_(1)
        self.finished.logical_or_((token == self.end) | (self._step >= self._caps))
        self.newest.copy_(token[:, None])


def _suppressing(tokens: Sequence[int] | None, vocabulary: int, device: torch.device) -> Tensor:
    rule = torch.zeros(vocabulary)
    rule[list(tokens or ())] = -torch.inf
    return rule.to(device)


class Greedy:
    """One batch of texts in progress, of a `DynamicWhisper` in evaluation mode.

    `hidden` (B, positions, d_model) is the encoder's output; `ids` (B, L) are the tokens before the texts, of which the
    last `forced` begin the texts; `caps` are in new tokens. `mask` (B, 1, 1, positions) hides positions that are not a
    row's own. `capture` makes a step of the decoder a captured graph.
    """

    def __init__(
        self, model: Any, end: int, hidden: Tensor, ids: Tensor, caps: Sequence[int], *, forced: int,
        mask: Tensor | None = None, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        self._model, self._end, self._hidden, self._mask, self._ids = model, end, hidden, mask, ids
        self._caps, self._forced, self._capture = caps, forced, capture
        self._read_every = 1 if hidden.device.type == "cpu" and capture is None else READ_EVERY
        self.taken = 0  # tokens

    def run(self, options: DecodingOptions) -> None:
        """Choose tokens until every row has ended or reached its cap."""
        steps = max(self._caps)
        # rules for times read the tokens on the host, and drawn tokens need noise from it
        if self._capture is not None and options.temperature == 0 and not options.timestamps:
            length = self._ids.shape[1] + steps
            static = static_decoder(self._model, self._end, self._hidden, self._mask, length, self._capture)
            self.choice, self._cache = static.choice, static.cache
            has_forced = self._forced > 0
            self.given_states = static.begin(self._hidden, self._mask, self._ids, self._caps, has_forced=has_forced)
            self._hidden, self._mask = static.hidden, static.mask
            self._advance(steps, static.step)
            return
        rows, device = len(self._ids), self._hidden.device
        self.choice = Choice(self._model, self._end, rows, steps, device)
        self.choice.begin(self._caps)
        rules, vocabulary = self._model.generation_config, self._model.config.vocab_size
        begin = self._ids.shape[1] - self._forced
        times = WhisperTimeStampLogitsProcessor(rules, begin_index=begin) if options.timestamps else None
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

        def step(tokens: Tensor | None = None) -> None:
            states = self._decode(self.choice.newest if tokens is None else tokens)
            if tokens is not None:
                self.given_states = states
            written = None if times is None else torch.cat([self._ids, self.choice.tokens[:, : self.taken]], dim=1)
            noise = gumbel_noise(self.taken, options.temperature, vocabulary) if options.temperature else None
            self.choice.take(
                self._model.proj_out(states[:, -1]),
                is_first=tokens is not None and not self._forced,
                timestamps=None if times is None else lambda logits: times(written, logits),
                temperature=options.temperature,
                noise=None if noise is None else torch.from_numpy(noise).to(device, non_blocking=True),
            )

        step(self._ids)
        self._advance(steps, step)

    def _advance(self, steps: int, step: Step) -> None:
        self.taken = 1
        while self.taken < steps:
            if self.taken % self._read_every == 0 and bool(self.choice.finished.all()):
                break
            step()
            self.taken += 1

    def feed_all(self) -> None:
        """Run the decoder over all of the tokens again at once, so that its attention can be recorded."""
        cache, rows = self._cache, len(self.choice.tokens)
        own, cache.self_attention_cache = cache.self_attention_cache, DynamicCache()
        ids = torch.cat([_filled(self._ids, rows), self.choice.tokens[:, : self.taken - 1]], dim=1)
        self._decode(ids)
        cache.self_attention_cache = own

    def _decode(self, ids: Tensor) -> Tensor:
        """Feed (B, n) tokens after those in the cache."""
        embedded = self._model.model.decoder.embed_tokens(ids)
        return decoder_states(self._model, embedded, self._hidden, audio_mask=self._mask, cache=self._cache)


class StaticDecoder:
    """Decodes batches of one shape with tensors that keep their places; `step` chooses the next tokens."""

    def __init__(
        self, model: Any, end: int, rows: int, positions: int, length: int, is_masked: bool, hidden: Tensor
    ) -> None:
        self._model, self._rows, device = model, rows, hidden.device
        self.cache = EncoderDecoderCache(
            StaticCache(config=model.config, max_cache_len=length),
            StaticCache(config=model.config, max_cache_len=positions),
        )
        self.choice = Choice(model, end, rows, length, device)
        self.hidden = hidden.new_zeros(rows, positions, hidden.shape[2])
        self.mask = hidden.new_zeros(rows, 1, 1, positions) if is_masked else None
        self._places = torch.arange(length, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self.step: Step = self._eager_step

    def begin(
        self, hidden: Tensor, mask: Tensor | None, ids: Tensor, caps: Sequence[int], *, has_forced: bool
    ) -> Tensor:
        """Feed the tokens before the texts, and choose the first ones; return the states (B, L, d_model)."""
        self.cache.reset()
        self.choice.begin(caps)
        self.hidden[:, : hidden.shape[1]].copy_(_filled(hidden, self._rows))
        if self.mask is not None and mask is not None:
            self.mask.fill_(torch.finfo(self.mask.dtype).min)
            self.mask[..., : mask.shape[-1]].copy_(_filled(mask, self._rows))
        tokens = ids.shape[1]
        self._position.zero_()
        states = self._decode(_filled(ids, self._rows), self._places[:tokens])
        self._position.add_(tokens)
        self.choice.take(self._model.proj_out(states[:, -1]), is_first=not has_forced)
        return states[: len(ids)]

    def _eager_step(self) -> None:
        states = self._decode(self.choice.newest, self._position)
        self._position.add_(1)
        self.choice.take(self._model.proj_out(states[:, -1]))

    def _decode(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Feed (B, n) tokens at n places; each sees those up to its own."""
        dtype = self.hidden.dtype
        hides = self._places > places[:, None]  # (n, length)
        mask = torch.zeros(hides.shape, dtype=dtype, device=hides.device).masked_fill(hides, torch.finfo(dtype).min)
        return decoder_states(
            self._model, self._model.model.decoder.embed_tokens(tokens), self.hidden, audio_mask=self.mask,
            cache=self.cache, positions=places.clamp(max=MAX_LABEL_TOKENS - 1)[None], mask=mask[None, None],
        )  # fmt: skip

    def capture(self, capture: Capture, hidden: Tensor, audio_mask: Tensor | None, ids: Tensor) -> None:
        """Capture a step, and compare it with the steps before it; without success they go on one by one."""
        caps = [WARM_STEPS + 1] * len(ids)

        def first_tokens() -> Tensor:
            self.begin(hidden, audio_mask, ids, caps, has_forced=False)
            for _ in range(WARM_STEPS):
                self.step()
            return self.choice.tokens[:, : WARM_STEPS + 1].clone()

        expected = first_tokens()
        try:
            self.step = capture(self._eager_step)
            if not torch.equal(first_tokens(), expected):
                raise RuntimeError("its tokens are others")
        except RuntimeError as err:
            self.step = self._eager_step
            logger.warning("no CUDA graph of the decoder, which is slower: %s", first_line(err))


_decoders: WeakKeyDictionary[Any, tuple[list[int], OrderedDict[tuple[int, ...], StaticDecoder]]] = WeakKeyDictionary()


def static_decoder(
    model: Any, end: int, hidden: Tensor, mask: Tensor | None, length: int, capture: Capture
) -> StaticDecoder:
    """Return the decoder of a model for a shape, captured once; of its shapes the last `MAX_GRAPHS` are kept.

    A graph reads the weights where they lay: weights that have moved since make all graphs void.
    """
    places = [weight.data_ptr() for weight in model.parameters()]
    kept = _decoders.get(model)
    if kept is None or kept[0] != places:
        kept = _decoders[model] = (places, OrderedDict())
    rows = len(hidden) if len(hidden) <= 2 else _multiple(len(hidden), ROWS_STEP)
    positions = hidden.shape[1] if mask is None else _multiple(hidden.shape[1], POSITIONS_STEP)
    shape = rows, positions, _multiple(length, LENGTH_STEP), mask is not None
    if shape not in kept[1]:
        decoder = StaticDecoder(model, end, *shape, hidden)
        start = torch.full((len(hidden), 1), end, device=hidden.device)
        decoder.capture(capture, hidden, mask, start)
        kept[1][shape] = decoder
        if len(kept[1]) > MAX_GRAPHS:
            kept[1].popitem(last=False)
    kept[1].move_to_end(shape)
    return kept[1][shape]


def release_graphs(model: Any) -> None:
    """Give back the memory of a model's captured decoders, before it trains on."""
    _decoders.pop(model, None)


def cuda_graph(step: Step) -> Step:
    """Capture a step, which has run before, into a CUDA graph; return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces in the stream of the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    replay: Step = graph.replay
    return replay


def _multiple(number: int, step: int) -> int:
    return -(-number // step) * step


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """Return (rows, ...), the first row repeated after the others."""
    return (
        tensor if len(tensor) == rows else torch.cat([tensor, tensor[:1].expand(rows - len(tensor), *tensor.shape[1:])])
    )
