"""Word times from cross-attention: which encoder positions each text token looks at.

A few decoder heads follow the audio (`generation_config.alignment_heads`). Their queries and keys are read with hooks,
so that this works under any attention implementation and computes those heads alone. Path: dynamic time warping over
the normalised, median-filtered weights, as in openai/whisper's timing.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.data.features import POSITION_SEC
from src.inference.words import Vocabulary, Word, place_words
from src.models.dynamic_context import FIND_HEADS, Head, existing_heads, upper_half_heads

logger = logging.getLogger(__name__)

MEDIAN_WIDTH = 7  # positions

_warned: WeakSet[Any] = WeakSet()  # models without a list


def alignment_heads(model: Any) -> list[Head]:
    """Return the heads that time words; those of `upper_half_heads` where the checkpoint lists none, with a warning."""
    listed = existing_heads(model)
    if not listed and model not in _warned:
        _warned.add(model)
        logger.warning(
            "the checkpoint lists no alignment_heads: word times come from all heads of the upper half of its layers; "
            "better ones can be found: %s",
            FIND_HEADS,
        )
    return listed or upper_half_heads(model.config)


@contextmanager
def record_cross_attention(model: Any, heads: Sequence[Head]) -> Iterator[list[Tensor]]:
    """Record the cross-attention of some heads during decoder calls.

    The list receives, for each decoder call and each layer with a head in `heads`, in layer order, a tensor
    (B, heads of that layer, new tokens, positions) of attention probabilities.
    """
    recorded: list[Tensor] = []
    with ExitStack() as stack:
        for layer in sorted({layer for layer, _ in heads}):
            hook = _AttentionHook([head for at, head in heads if at == layer], recorded)
            attention = model.model.decoder.layers[layer].encoder_attn
            stack.enter_context(attention.register_forward_pre_hook(hook, with_kwargs=True))
        yield recorded


class _AttentionHook:
    """Computes the attention of some heads of a layer; the keys of an audio once, however many calls it sees."""

    def __init__(self, heads: list[int], recorded: list[Tensor]) -> None:
        self._heads, self._recorded = heads, recorded
        self._audio: Tensor | None = None
        self._key: Tensor

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        def split(projected: Tensor) -> Tensor:  # (B, N, d_model) -> (B, N, h, d) of the heads
            return projected.view(*projected.shape[:2], module.num_heads, module.head_dim)[:, :, self._heads]

        hidden = args[0] if args else kwargs["hidden_states"]
        audio = args[1] if len(args) > 1 else kwargs["key_value_states"]
        if audio is not self._audio:
            self._audio, self._key = audio, split(module.k_proj(audio))
        query = split(module.q_proj(hidden) * module.scaling)
        scores = torch.einsum("blhd,bphd->bhlp", query, self._key)
        if (mask := kwargs.get("attention_mask")) is not None:  # of the audio
            scores = scores + mask
        self._recorded.append(scores.float().softmax(dim=-1))


@torch.inference_mode()
def force_align(
    model: Any,
    tokenizer: Any,
    hidden: Tensor,
    *,
    sot_sequence: Sequence[int],
    tokens: Sequence[int],
    audio_sec: float,
    heads: Sequence[Head] | None = None,
) -> tuple[Word, ...]:
    """Give each word of a text its times and probability; starts and ends never decrease.

    `hidden` (1, positions, d_model) is the encoder's output for a clip, of which `audio_sec` are real audio: times are
    clipped to it. The tokens of the text, without the end token, follow those of `sot_sequence`. The heads are those
    of `alignment_heads` by default.
    """
    if not tokens:
        return ()
    ids = torch.tensor([[*sot_sequence, *tokens]], device=hidden.device)
    with record_cross_attention(model, alignment_heads(model) if heads is None else heads) as recorded:
        decoded = model.model.decoder(input_ids=ids, encoder_hidden_states=hidden, use_cache=False).last_hidden_state
    first = len(sot_sequence)
    predicting = decoded[0, first - 1 : first - 1 + len(tokens)]  # the row before a token predicts it
    among_text = model.proj_out(predicting)[:, : model.config.eos_token_id].float().softmax(dim=-1)
    token_probs = among_text.gather(1, torch.tensor(tokens, device=hidden.device)[:, None])[:, 0].tolist()
    entered_sec = time_tokens(torch.cat(recorded, dim=1)[0], len(tokens), first=first, audio_sec=audio_sec)
    return place_words(Vocabulary.of(tokenizer), tokens, entered_sec=entered_sec, probabilities=token_probs)


def time_tokens(attention: Tensor, count: int, *, first: int, audio_sec: float) -> list[float]:
    """Return when each of `count` tokens begins, and then the end token, in ascending seconds: `count` + 1 times.

    `attention` (heads, L, positions) has one row per token that the decoder was fed: `first` tokens before the text,
    then those of the text, the last of which is missing where decoding was cut off before it.
    """
    attention = attention[..., : max(1, round(audio_sec / POSITION_SEC))]
    # standardised over tokens, median-filtered over time, mean over heads: (L, P)
    std, mean = torch.std_mean(attention, dim=-2, keepdim=True, unbiased=False)
    weights = (attention - mean) / std.clamp(min=1e-9)
    pad = MEDIAN_WIDTH // 2
    if weights.shape[-1] > pad:
        padded = torch.nn.functional.pad(weights, (pad, pad), mode="reflect")
        weights = padded.unfold(-1, MEDIAN_WIDTH, 1).sort(dim=-1).values[..., pad]
    cost = -weights.mean(dim=0)[first - 1 : first + count].cpu().numpy()  # each row predicts a token
    rows, columns = dtw_path(cost.astype(np.float64))
    first_of_row = np.concatenate([[True], np.diff(rows) > 0])
    entered_sec: list[float] = np.minimum(columns[first_of_row] * POSITION_SEC, audio_sec).tolist()
    return entered_sec + [audio_sec] * (count + 1 - len(entered_sec))


def dtw_path(cost: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find rows and columns of the cheapest monotone path through a cost matrix (N, M), by anti-diagonals.

    Source: Sakoe & Chiba 1978; steps (1,1), (1,0), (0,1) of equal weight.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    step = np.zeros((n + 1, m + 1), dtype=np.int8)
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        options = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        step[i, j] = options.argmin(axis=0)
        total[i, j] = cost[i - 1, j - 1] + options.min(axis=0)
    path, row, column = [], n, m
    while row and column:
        path.append((row - 1, column - 1))
        move = step[row, column]
        row, column = row - int(move != 2), column - int(move != 1)
    rows, columns = np.array(path[::-1]).T
    return rows, columns
