from __future__ import annotations

import numpy as np
import pytest

from src.inference.alignment import dtw_path


def cheapest_by_recursion(cost: np.ndarray) -> float:
    """The textbook recurrence, cell by cell."""
    n, m = cost.shape
    total = np.full((n, m), np.inf)
    for i in range(n):
        for j in range(m):
            before = [total[i - 1, j - 1]] if i and j else []
            before += [total[i - 1, j]] if i else []
            before += [total[i, j - 1]] if j else []
            total[i, j] = cost[i, j] + (min(before) if before else 0.0)
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


def test_path_follows_a_ridge() -> None:
    cost = np.ones((4, 12))
    for token in range(4):
        cost[token, 3 * token : 3 * token + 3] = -1
    rows, columns = dtw_path(cost)
    assert [int(columns[rows == token].min()) for token in range(4)] == [0, 3, 6, 9]
