from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from src.data.features import CONTEXT_SAMPLES, LogMel, log_mel


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", [1_600, 16_000, 70_400, 176_000, CONTEXT_SAMPLES])
def test_equals_the_feature_extractor_at_any_length(jfk: np.ndarray, bins: int, samples: int) -> None:
    clip = np.pad(jfk[:samples], (0, max(0, samples - len(jfk))))
    expected = WhisperFeatureExtractor(feature_size=bins)(
        clip, sampling_rate=16_000, padding=False, return_tensors="np"
    ).input_features[0]
    assert expected.shape == (bins, samples // 160)
    np.testing.assert_allclose(LogMel(bins)(torch.from_numpy(clip)[None])[0].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(log_mel(clip[None], bins)[0], expected, atol=1e-4)


def test_a_row_does_not_depend_on_the_others(jfk: np.ndarray) -> None:
    batch = torch.zeros(2, 48_000)
    batch[0] = torch.from_numpy(jfk[:48_000])
    batch[1, :16_000] = 0.01 * torch.from_numpy(jfk[16_000:32_000])
    together = LogMel()(batch)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], LogMel()(batch[row : row + 1]), atol=1e-5, rtol=0)
