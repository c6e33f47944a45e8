"""Alignment heads for checkpoints that list none, against those that OpenAI lists for tiny.en."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.data.audio import load_audio
from src.inference.alignment import alignment_heads, upper_half_heads
from src.inference.head_search import find_alignment_heads, score_heads, write_alignment_heads
from src.utils.errors import DataError, ModelError


def test_a_head_that_follows_scores_one_and_one_that_looks_everywhere_none() -> None:
    n, positions = 4, 40
    follows, everywhere = torch.zeros(n, positions), torch.full((n, positions), 1 / positions)
    for token in range(n):
        follows[token, 10 * token + 5] = 1.0
    scores = score_heads(torch.stack([follows, everywhere]), [0.0, 0.2, 0.4, 0.6, 0.8]).mean(dim=1)
    assert scores.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.slow
def test_found_heads_time_words_as_the_listed_ones_do(tiny_en: tuple[Any, Any], sample: list[Any]) -> None:
    model, processor = tiny_en
    clips = sample[400:500:12]
    search = find_alignment_heads(model, processor, [load_audio(u.audio) for u in clips], [u.text for u in clips])
    assert search.clips >= 8
    assert 1 < len(search.heads) <= 10
    assert search.listed_sec is not None
    assert search.listed_sec < 0.15  # OpenAI's lie late: by 0.16 s against an HMM aligner, these by 0.08 s
    assert search.upper_half_sec < 0.1


@pytest.mark.slow
def test_heads_are_written_and_used_and_all_else_stays(
    tiny_en: tuple[Any, Any], jfk: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = tiny_en
    model.generation_config.alignment_heads = None
    with caplog.at_level(logging.WARNING):
        assert alignment_heads(model) == upper_half_heads(model)
        alignment_heads(model)
    assert caplog.text.count("find_alignment_heads.py") == 1
    found = find_alignment_heads(model, processor, [jfk])  # by its own transcript
    assert found.listed_sec is None
    model.generation_config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "generation_config.json").read_text())
    write_alignment_heads(tmp_path, found.heads)
    after = json.loads((tmp_path / "generation_config.json").read_text())
    assert [tuple(head) for head in after.pop("alignment_heads")] == list(found.heads)
    assert after == {key: value for key, value in before.items() if key != "alignment_heads"}


@pytest.mark.slow
def test_what_follows_nothing_is_refused(tiny_en: tuple[Any, Any], jfk: np.ndarray, tmp_path: Path) -> None:
    model, processor = tiny_en
    with pytest.raises(DataError, match="none of 1 clips has a text"):
        find_alignment_heads(model, processor, [jfk], [""])
    with pytest.raises(DataError, match="1 clips, but 2 texts"):
        find_alignment_heads(model, processor, [jfk], ["a", "b"])
    with pytest.raises(ModelError, match="no generation_config"):
        write_alignment_heads(tmp_path, [(0, 0)])
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight.normal_(0, 0.02)
            layer.encoder_attn.k_proj.weight.normal_(0, 0.02)
    with pytest.raises(ModelError, match="no cross-attention head follows the audio"):
        find_alignment_heads(model, processor, [jfk], ["Ask not what your country can do for you."])
    model.generation_config.alignment_heads = [[40, 0]]
    with pytest.raises(ModelError, match="another model's"):
        alignment_heads(model)
