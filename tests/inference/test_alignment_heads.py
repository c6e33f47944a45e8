from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from transformers import WhisperForConditionalGeneration

from scripts import find_alignment_heads as script
from src.data.audio import load_audio
from src.data.features import POSITION_SEC
from src.data.utterance import Utterance
from src.inference.alignment_heads import HeadSearch, find_alignment_heads, score_heads, write_alignment_heads
from src.inference.options import DecodingOptions
from src.inference.torch_engine import TorchEngine
from src.inference.words import Vocabulary
from src.models.dynamic_context import DynamicWhisper, upper_half_heads
from src.models.processor import save_processor
from src.utils.errors import DataError, ModelError

# Ends of all words, by forced alignment with pocketsphinx 5.1.1, which knows nothing of Whisper.
ALIGNED = {
    "jfk": (
        "And so my fellow Americans ask not what your country can do for you ask what you can do for your country.",
        [0.63, 0.97, 1.24, 1.63, 2.16, 3.99, 4.30, 5.61, 5.86, 6.42, 6.66,
         6.91, 7.05, 7.67, 8.53, 8.82, 9.20, 9.37, 9.62, 9.78, 9.99, 10.46],
    ),
    "020590026": (
        "Lighting a fire is an easy way to get found.",
        [1.17, 1.31, 2.01, 2.28, 2.51, 2.88, 3.22, 3.47, 3.76, 4.26],
    ),
    "051950033": (
        "Was it in six hours that the french were coming.",
        [0.72, 1.05, 1.28, 1.74, 2.39, 2.84, 2.97, 3.71, 3.86, 4.37],
    ),
    "010270366": (
        "It was a treat to see her at her work.",
        [1.04, 1.27, 1.41, 1.94, 2.16, 2.47, 3.11, 3.39, 3.55, 4.00],
    ),
}  # fmt: skip
TEXTS = [text for text, _ in ALIGNED.values()]


@pytest.fixture(scope="module")
def clips(sample: list[Utterance], jfk: np.ndarray) -> list[np.ndarray]:
    by_id = {utterance.id: utterance for utterance in sample}
    return [jfk if name == "jfk" else load_audio(by_id[name].audio) for name in ALIGNED]


@pytest.fixture(scope="module")
def unlisted(_tiny_en: Any) -> tuple[Any, Any]:
    """tiny.en as a fine-tuning that lost its list."""
    model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
    model.generation_config.alignment_heads = None
    return model, processor


@pytest.fixture(scope="module")
def found(unlisted: Any, clips: list[np.ndarray]) -> HeadSearch:
    return find_alignment_heads(*unlisted, clips, TEXTS)


@pytest.mark.slow
def test_found_heads_end_words_where_an_aligner_does_closer_than_the_fallback_and_the_official_heads(
    found: HeadSearch, _tiny_en: Any, clips: list[np.ndarray]
) -> None:
    model, tokenizer = copy.deepcopy(_tiny_en[0]), _tiny_en[1].tokenizer
    medians = []
    for heads in (found.heads, upper_half_heads(model.config), model.generation_config.alignment_heads):
        model.generation_config.alignment_heads, apart = list(heads), []
        engine = TorchEngine(model, _tiny_en[1])
        for clip, (text, aligned) in zip(clips, ALIGNED.values(), strict=True):
            tokens = [Vocabulary.of(tokenizer).encode(text)]
            (words,) = engine.align(engine.encode([clip], 0.5), [clip], tokens, DecodingOptions())
            ends = np.array([word.end_sec for word in words])
            apart += np.abs(ends - aligned)[:-1].tolist()  # the last word takes the rest of the clip
        medians.append(float(np.median(apart)))
    assert medians == sorted(medians)
    assert medians[0] < 0.1


@pytest.mark.slow
def test_a_search_reports_its_basis_and_the_models_own_transcripts_lead_to_the_same_heads(
    unlisted: Any, clips: list[np.ndarray], found: HeadSearch
) -> None:
    assert (len(found.heads), len(found.scores), found.clips, found.words) == (10, 24, 4, 52)
    values = list(found.scores.values())
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.5
    assert 0 < found.upper_half_sec < 0.1
    assert found.listed_sec is None
    own = find_alignment_heads(*unlisted, [*clips[:2], np.zeros(16_000, dtype=np.float32)])
    assert len(set(own.heads) & set(found.heads)) >= 9


def test_an_untrained_model_and_clips_without_text_are_refused(
    untrained: DynamicWhisper, _tiny_en: Any, clips: list[np.ndarray]
) -> None:
    processor = _tiny_en[1]
    with pytest.raises(ModelError, match=r"0\.0\d, needed is 0\.25"):
        find_alignment_heads(untrained, processor, clips[:1], TEXTS[:1])
    with pytest.raises(DataError, match="none of 2 clips"):
        find_alignment_heads(untrained, processor, clips[:2], ["", "Yes"])
    with pytest.raises(DataError, match="2 clips, but 1 texts"):
        find_alignment_heads(untrained, processor, clips[:2], [""])


def test_a_head_that_follows_scores_one_and_a_head_that_looks_at_one_place_scores_nothing() -> None:
    entered_sec = [0.0, 10 * POSITION_SEC, 20 * POSITION_SEC, 30 * POSITION_SEC]
    attention = torch.zeros(2, 3, 30)
    attention[0, torch.arange(3), torch.tensor([5, 15, 25])] = 1
    attention[1, :, 5] = 1
    assert score_heads(attention, entered_sec).mean(dim=1).tolist() == [1, 0]


@pytest.mark.slow
def test_the_script_writes_heads_that_transformers_and_ctranslate2_then_use(
    unlisted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "setup_logging", lambda level: None)  # it would last, and take pytest's handlers away
    folder = tmp_path / "tuned"
    unlisted[0].save_pretrained(folder)
    save_processor(unlisted[1], folder)
    path = folder / "generation_config.json"
    before = json.loads(path.read_text())
    assert script.main(["--model", str(folder), "--clips", "2", "--device", "cpu", "--write"]) == 0
    heads = json.loads(capsys.readouterr().out.splitlines()[-1])["alignment_heads"]
    assert json.loads(path.read_text()) == {**before, "alignment_heads": heads}
    assert WhisperForConditionalGeneration.from_pretrained(folder).generation_config.alignment_heads == heads
    TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    assert json.loads((tmp_path / "ct2" / "config.json").read_text())["alignment_heads"] == heads


def test_a_folder_without_a_readable_generation_config_is_refused(tmp_path: Path) -> None:
    for content in (None, "[]{"):
        if content:
            (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ModelError, match=r"generation_config\.json"):
            write_alignment_heads(tmp_path, [(0, 0)])
