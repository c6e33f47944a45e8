"""What a real model says about real and about broken transcripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from src.data.labels import apply_case
from src.data.report.report import DataReport, build_data_report
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import Utterance
from src.evaluation.data_checks import LabelStyles, StyleCost, add_model_checks, find_hard_clips, measure_label_styles
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from tests.data.report_data import splits_of

JFK_TEXT = "And so my fellow Americans ask not what your country can do for you ask what you can do for your country."


@pytest.fixture(scope="module")
def swapped(sample: list[Utterance]) -> list[Utterance]:
    """Four clips, of which two have each other's transcript."""
    speech = Utterance("jfk", SAMPLE_CLIP, JFK_TEXT, duration_sec=11.0)
    clips = splits_of(sample[:3]).train
    short = clips[0]
    return [
        replace(speech, id="jfk-swapped", text="Thank you."),
        replace(short, text=JFK_TEXT),
        speech,
        *clips[1:],
    ]


@pytest.fixture(scope="module")
def styles(_tiny_en: tuple[Any, Any], sample: list[Utterance]) -> LabelStyles:
    recased = [
        replace(u, text=apply_case(u.text, "sentence"), meta={**u.meta, "source_text": u.text}) for u in sample[:100]
    ]
    return measure_label_styles(*_tiny_en, recased, Config(), num_clips=4)


def test_the_sentence_style_beats_capitals_by_more_than_ten_nats(styles: LabelStyles) -> None:
    nats = {(cost.style, cost.space): cost.nats for cost in styles.costs}
    assert nats["keep", True] - nats["sentence", True] > 10
    assert nats["lower", True] > nats["sentence", True]
    assert all(nats[style, False] > nats[style, True] for style in ("keep", "lower", "sentence"))
    assert (styles.best, styles.configured, styles.gap_nats) == ("sentence", "sentence", 0.0)
    assert (styles.checked, styles.total) == (4, 100)
    assert "on 4 of 100 clips" in styles.describe()
    table = styles.table()
    assert list(table.columns) == ["style", "space", "nats", "clips", "example"]
    assert table["example"][0] == table["example"][2].upper().removesuffix(".")


def test_the_cost_is_the_log_likelihood_of_the_tokens_one_by_one(
    _tiny_en: tuple[Any, Any], sample: list[Utterance]
) -> None:
    from src.data.dataset import decode_audio
    from src.inference.decoding import encode

    model, processor = _tiny_en
    chosen = replace(sample[0], text="Hello there.")
    measured = measure_label_styles(model, processor, [chosen], Config(), num_clips=1)
    tokenizer = processor.tokenizer
    start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    tokens = [*tokenizer.encode(" Hello there.", add_special_tokens=False), tokenizer.eos_token_id]
    with torch.inference_mode():
        encoded = encode(model, [decode_audio(chosen)], 0.0)
        total = 0.0
        for i, token in enumerate(tokens):
            inputs = torch.tensor([[*start, *tokens[:i]]])
            total -= float(
                model(encoder_outputs=encoded, decoder_input_ids=inputs).logits[0, -1].log_softmax(-1)[token]
            )
    assert measured.costs[0].nats == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("nats", "best", "said"),
    [
        ((20.0, 12.0, 9.0), "sentence", "'sentence' is 11.0 nats likelier than 'keep', as configured"),
        ((9.0, 12.0, 9.0), "keep", "'keep', as configured, is as likely"),
        ((9.5, 12.0, 9.0), "sentence", "'keep', as configured, is as likely"),
    ],
)
def test_a_dearer_style_is_named_with_its_cost(nats: tuple[float, ...], best: str, said: str) -> None:
    costs = tuple(StyleCost(s, True, n, "x") for s, n in zip(("keep", "lower", "sentence"), nats, strict=True))  # type: ignore[arg-type]
    styles = LabelStyles(costs, "keep", 4, 9)
    assert styles.best == best
    assert said in styles.describe()


def test_clips_with_each_others_transcripts_are_hard(_tiny_en: tuple[Any, Any], swapped: list[Utterance]) -> None:
    hard = find_hard_clips(*_tiny_en, swapped, Config())
    assert hard.frame["id"].tolist() == ["jfk-swapped"]  # the other one has too many words for a WER above 1
    assert hard.frame["wer"][0] > 5
    assert "country" in hard.frame["hypothesis"][0]
    assert (hard.checked, hard.total) == (5, 5)


def test_a_report_takes_up_what_the_model_says_and_saves_it(
    _tiny_en: tuple[Any, Any], sample: list[Utterance], tmp_path: Path
) -> None:
    splits = splits_of(sample[:3])
    report = build_data_report(splits, Config())
    wrong = [replace(u, text="No.") for u in splits.train]
    checked = add_model_checks(report, *_tiny_en, wrong, Config(), num_style_clips=1, max_hard_clips=1)
    assert report.label_styles is None  # the one before stays as it was
    found = {f.topic: f for f in checked.findings}
    assert found["hard clips"].level == "warning"
    assert len(found["hard clips"].ids) == 1
    assert "1 of 3 were looked at" in found["hard clips"].message
    assert "on 1 of 3 clips" in found["label style"].message
    again = add_model_checks(checked, *_tiny_en, splits.train, Config(), num_style_clips=1, max_hard_clips=1)
    assert len(again.findings) == len(checked.findings) == len(report.findings) + 2
    assert again.hard_clips is not None
    assert again.hard_clips.empty
    checked.save(tmp_path)
    loaded = DataReport.load(tmp_path)
    assert checked.hard_clips is not None
    assert loaded.hard_clips is not None
    pd.testing.assert_frame_equal(loaded.hard_clips, checked.hard_clips)
    assert "Hard clips" in loaded._repr_html_()


def test_nothing_to_measure_and_a_training_model_are_errors(tiny_en: tuple[Any, Any], sample: list[Utterance]) -> None:
    model, processor = tiny_en
    for check in (measure_label_styles, find_hard_clips):
        with pytest.raises(DataError, match="nothing to measure"):
            check(model, processor, [], Config())
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        measure_label_styles(model, processor, sample[:1], Config())
