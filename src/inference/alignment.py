"""Word times from cross-attention: which encoder positions each text token looks at.

A few decoder heads follow the audio (`generation_config.alignment_heads`). Their queries and keys are read with hooks,
so that this works under any attention implementation and computes those heads alone. Path: dynamic time warping over
the normalised, median-filtered weights, as in openai/whisper's timing.py.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.data.features import FRAMES_PER_SEC
from src.utils.errors import ModelError

POSITION_SEC = 2 / FRAMES_PER_SEC  # 0.02 s an encoder position
MEDIAN_WIDTH = 7  # positions
_CLOSING = string.punctuation.replace("'", "") + "。、，！？：”’)]}"  # joins the word before it
_OPENING = "\"'“¿([{-"  # joins the word after it


@dataclass(frozen=True)
class Word:
    """A word with its place in the audio.

    Attributes:
        text: without surrounding spaces, punctuation included.
        start_sec, end_sec: seconds from the start of the decoded audio.
        probability: mean probability of its tokens, in [0, 1].
    """

    text: str
    start_sec: float
    end_sec: float
    probability: float


def alignment_heads(model: Any) -> list[tuple[int, int]]:
    """Return (layer, head) pairs; all heads of the upper half of the layers where the checkpoint lists none."""
    heads = getattr(model.generation_config, "alignment_heads", None)
    if heads:
        return [(int(layer), int(head)) for layer, head in heads]
    layers, count = model.config.decoder_layers, model.config.decoder_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(count)]


@contextmanager
def record_cross_attention(model: Any, heads: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """Record the cross-attention of some heads during decoder calls.

    Yields: a list that receives, for each decoder call and each layer with a head in `heads`, in layer order, a tensor
        (B, heads of that layer, new tokens, positions) of attention probabilities.
    """
    recorded: list[Tensor] = []
    handles = []
    for layer in sorted({layer for layer, _ in heads}):
        wanted = [head for at, head in heads if at == layer]
        attention = model.model.decoder.layers[layer].encoder_attn

        def hook(module: Any, args: Any, kwargs: Any, wanted: list[int] = wanted) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            audio = args[1] if len(args) > 1 else kwargs["key_value_states"]
            shape = (*hidden.shape[:2], module.num_heads, module.head_dim)
            query = (module.q_proj(hidden) * module.scaling).view(shape)[:, :, wanted]  # (B, L, h, d)
            key = module.k_proj(audio).view(*audio.shape[:2], module.num_heads, module.head_dim)[:, :, wanted]
            scores = torch.einsum("blhd,bphd->bhlp", query, key)
            recorded.append(scores.float().softmax(dim=-1))

        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def align_words(
    model: Any,
    tokenizer: Any,
    hidden: Tensor,
    *,
    sot_sequence: Sequence[int],
    tokens: Sequence[int],
    audio_sec: float,
) -> tuple[Word, ...]:
    """Give each word of one decoded text its times and probability.

    Args:
        hidden: (1, positions, d_model) encoder output of this clip.
        sot_sequence: the tokens that precede the text.
        tokens: text tokens, without the end token.
        audio_sec: real audio in `hidden`; times are clipped to it.
    Returns: words in order; starts and ends never decrease.
    Raises: ModelError: the decoder has no cross-attention heads to read.
    """
    if not tokens:
        return ()
    heads = alignment_heads(model)
    if not heads:
        raise ModelError("no alignment heads: the decoder has no layers to read word times from")
    ids = torch.tensor([[*sot_sequence, *tokens]], device=hidden.device)
    with record_cross_attention(model, heads) as recorded:
        decoded = model.model.decoder(input_ids=ids, encoder_hidden_states=hidden, use_cache=False).last_hidden_state
    first = len(sot_sequence)
    predicting = decoded[0, first - 1 : first - 1 + len(tokens)]  # the row before a token predicts it
    logprobs = model.proj_out(predicting).float().log_softmax(dim=-1)
    token_probs = logprobs.gather(1, torch.tensor(tokens, device=hidden.device)[:, None]).exp()[:, 0].cpu().numpy()
    attention = torch.cat(recorded, dim=1)[0]  # (heads, L, positions)
    positions = min(attention.shape[-1], max(1, round(audio_sec / POSITION_SEC)))
    weights = _normalise(attention[..., :positions])[first - 1 :].cpu().numpy()  # each row predicts a token
    return _words_from_path(tokenizer, tokens, token_probs, weights, audio_sec)


def dtw_path(cost: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the cheapest monotone path through a cost matrix, by anti-diagonals.

    Args:
        cost: (N, M).
    Returns: row and column indices of the path from (0, 0) to (N-1, M-1).
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
        best = options.argmin(axis=0)
        total[i, j] = cost[i - 1, j - 1] + options[best, np.arange(len(i))]
        step[i, j] = best
    rows, columns = [], []
    i, j = n, m
    while i > 0 and j > 0:
        rows.append(i - 1)
        columns.append(j - 1)
        move = step[i, j]
        i -= int(move != 2)
        j -= int(move != 1)
    return np.array(rows[::-1]), np.array(columns[::-1])


def _normalise(attention: Tensor) -> Tensor:
    """(heads, L, P) probabilities -> (L, P): standardised over tokens, median-filtered over time, mean over heads."""
    std, mean = torch.std_mean(attention, dim=-2, keepdim=True, unbiased=False)
    weights = (attention - mean) / std.clamp(min=1e-9)
    pad = MEDIAN_WIDTH // 2
    if weights.shape[-1] > pad:
        padded = torch.nn.functional.pad(weights, (pad, pad), mode="reflect")
        weights = padded.unfold(-1, MEDIAN_WIDTH, 1).sort(dim=-1).values[..., pad]
    return weights.mean(dim=0)


def _words_from_path(
    tokenizer: Any,
    tokens: Sequence[int],
    token_probs: NDArray[np.float32],
    weights: NDArray[np.float32],
    audio_sec: float,
) -> tuple[Word, ...]:
    rows, columns = dtw_path(-weights.astype(np.float64))
    first_of_row = np.concatenate([[True], np.diff(rows) > 0])
    jumps = np.minimum(columns[first_of_row] * POSITION_SEC, audio_sec)  # when each row is entered; last: end token
    words = []
    at = 0
    for text, size in split_words(tokenizer, tokens):
        start, end = float(jumps[at]), float(jumps[at + size])
        words.append(Word(text, start, max(start, end), float(token_probs[at : at + size].mean())))
        at += size
    return tuple(word for word in words if word.text)


def split_words(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Group tokens into words: a token starts one if it decodes to a leading space, else it extends the last."""
    words: list[tuple[str, int]] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        piece = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in piece:  # half of a multi-byte character
            continue
        stripped = piece.strip()
        opens = piece.startswith(" ") or not words
        closes = bool(stripped) and all(c in _CLOSING for c in stripped) and not piece.startswith(" ")
        joins_opening = bool(words) and words[-1][0] != "" and all(c in _OPENING for c in words[-1][0])
        if words and (not opens or closes or (joins_opening and not piece.startswith(" "))):
            words[-1] = (words[-1][0] + piece.rstrip(), words[-1][1] + len(pending))
        else:
            words.append((stripped, len(pending)))
        pending = []
    if pending and words:
        words[-1] = (words[-1][0], words[-1][1] + len(pending))
    return words
