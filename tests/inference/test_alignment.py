from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

from src.inference.alignment import alignment_heads, dtw_path, record_cross_attention
from src.inference.torch_engine import Encoded, join
from src.models.dynamic_context import FIND_HEADS, DynamicWhisper, decoder_states
from src.utils.errors import ModelError


def cheapest_by_recursion(cost: np.ndarray) -> float:
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(n):
        for j in range(m):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return float(total[-1, -1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 40), (30, 12), (17, 17)])
def test_path_is_monotone_connected_and_cheapest(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(sum(shape)).standard_normal(shape)
    rows, columns = dtw_path(cost)
    assert (rows[0], columns[0]) == (0, 0)
    assert (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    steps = np.stack([np.diff(rows), np.diff(columns)])
    assert ((steps >= 0) & (steps <= 1)).all()
    assert (steps.sum(axis=0) > 0).all()
    assert cost[rows, columns].sum() == pytest.approx(cheapest_by_recursion(cost))


def test_attention_of_a_joined_batch_is_that_of_each_row_alone(untrained: DynamicWhisper) -> None:
    model, generator = copy.deepcopy(untrained).eval(), torch.Generator().manual_seed(0)
    parts = [Encoded(torch.randn(1, positions, model.config.d_model, generator=generator)) for positions in (20, 7)]

    @torch.inference_mode()
    def looks(encoded: Encoded) -> torch.Tensor:
        hidden = encoded.last_hidden_state
        embedded = model.model.decoder.embed_tokens(torch.tensor([[5, 6, 7]] * len(hidden)))
        with record_cross_attention(model, [(0, 1), (1, 0)]) as recorded:
            decoder_states(model, embedded, hidden, audio_mask=encoded.mask)
        return torch.cat(recorded, dim=1)  # (B, heads, tokens, positions)

    together = looks(join(parts))
    assert together.shape == (2, 2, 3, 20)
    assert not together[1, ..., 7:].any()
    for row, part in enumerate(parts):
        alone = looks(part)
        torch.testing.assert_close(together[row : row + 1, ..., : alone.shape[-1]], alone)


def test_without_heads_the_upper_half_is_read_with_one_warning(
    untrained: DynamicWhisper, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert alignment_heads(untrained) == alignment_heads(untrained) == [(1, 0), (1, 1)]
    (message,) = [record.message for record in caplog.records]
    assert FIND_HEADS in message
    model = copy.deepcopy(untrained)
    model.generation_config.alignment_heads = [[1, 0], [25, 3]]  # of a teacher with 32 layers
    with pytest.raises(ModelError, match=r"\(25, 3\)"):
        alignment_heads(model)
