"""The findings of a real model on real and on broken transcripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from src.data.dataset import decode_audio
from src.data.labels import LabelStyle, apply_case
from src.data.preparation import DatasetSplits
from src.data.report.report import DataReport, build_data_report
from src.data.sources.catalog import SAMPLE_CLIP
from src.data.utterance import Utterance
from src.evaluation import data_checks
from src.evaluation.data_checks import (
    add_model_checks,
    choose_label_case,
    fill_languages,
    find_hard_clips,
    measure_label_styles,
)
from src.inference.torch_engine import encode
from src.inference.words import Vocabulary
from src.utils.config import Config, load_config
from src.utils.errors import DataError, ModelError
from tests.data.report_data import splits_of

JFK_TEXT = "And so my fellow Americans ask not what your country can do for you ask what you can do for your country."


def test_the_sentence_style_beats_capitals_by_more_than_ten_nats(
    _tiny_en: tuple[Any, Any], sample: list[Utterance]
) -> None:
    recased = [
        replace(u, text=apply_case(u.text, "sentence"), meta={**u.meta, "source_text": u.text}) for u in sample[:100]
    ]
    table = measure_label_styles(*_tiny_en, recased, Config(), num_clips=4)
    assert list(table.columns) == ["language", "style", "space", "nats", "clips", "example", "configured"]
    nats = table.set_index(["style", "space"])["nats"]
    assert nats["keep", True] - nats["sentence", True] > 10
    assert nats["lower", True] > nats["sentence", True]
    assert all(nats[style, False] > nats[style, True] for style in ("keep", "lower", "sentence"))
    assert set(table["clips"]) == {4}
    assert table["example"][0] == table["example"][2].upper().removesuffix(".")


def test_the_cost_is_the_log_likelihood_of_the_tokens_one_by_one(
    _small: tuple[Any, Any], sample: list[Utterance]
) -> None:
    model, processor = _small
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
            logits = model(encoder_outputs=encoded, decoder_input_ids=inputs).logits[0, -1]
            total -= float(logits.log_softmax(-1)[token])
    assert measured["nats"][0] == pytest.approx(total, rel=1e-3)


def style_table(language: str, nats: dict[tuple[str, bool], float], configured: tuple[str, bool]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"language": language, "style": s, "space": b, "nats": n, "configured": (s, b) == configured}
            for (s, b), n in nats.items()
        ]
    )


@pytest.mark.parametrize(
    ("nats", "configured", "chosen"),
    [
        ((20.0, 12.0, 9.0), "keep", "sentence"),
        ((9.0, 12.0, 9.0), "keep", "keep"),  # a tie
        ((9.5, 12.0, 9.0), "keep", "keep"),  # less than a nat
        ((20.0, 12.0, 9.0), "lower", "sentence"),
    ],
)
def test_auto_takes_the_likeliest_style_and_keeps_the_current_one_if_close(
    nats: tuple[float, ...], configured: str, chosen: str, sample: list[Utterance]
) -> None:
    report = build_data_report(splits_of(sample[:3]), Config())
    with pytest.raises(DataError, match="add_model_checks"):
        choose_label_case(report, Config())
    older = replace(report, label_styles=pd.DataFrame([{"style": "keep", "space": True, "nats": 7.5, "clips": 3}]))
    with pytest.raises(DataError, match="add_model_checks"):
        choose_label_case(older, Config())
    costs = {(s, True): n for s, n in zip(("keep", "lower", "sentence"), nats, strict=True)}
    report = replace(report, label_styles=style_table("en", costs, (configured, True)))
    assert choose_label_case(report, Config()) == chosen
    lower = replace(report, label_styles=style_table("en", costs, ("lower", True)))
    assert choose_label_case(lower, load_config(None, overrides={"data.label_case": "lower"})) == "lower"


def test_case_and_space_are_chosen_for_each_language(sample: list[Utterance]) -> None:
    spaced = style_table("de", {("keep", True): 9, ("sentence", True): 5, ("keep", False): 30}, ("keep", True))
    unspaced = style_table("ja", {("keep", True): 6, ("keep", False): 9}, ("keep", False))
    report = replace(build_data_report(splits_of(sample[:3]), Config()), label_styles=pd.concat([spaced, unspaced]))
    styles = choose_label_case(report, Config())
    assert styles == {"de": LabelStyle("sentence"), "ja": LabelStyle("keep", space=True)}
    splits = DatasetSplits(
        [Utterance("a", b"", "GUTEN TAG", language="de"), Utterance("b", b"", "こんにちは", language="ja")], [],
        [Utterance("c", b"", "HELLO", language="en")], label_case="keep",
    ).with_label_case(styles)  # fmt: skip
    assert [u.text for u in splits.utterances] == ["Guten tag.", "こんにちは", "Hello."]
    assert [u.label_space for u in splits.utterances] == [None, True, None]
    assert splits.label_case == "auto"


def test_clips_with_each_others_transcripts_are_hard(_tiny_en: tuple[Any, Any], sample: list[Utterance]) -> None:
    speech = Utterance("jfk", SAMPLE_CLIP, JFK_TEXT, duration_sec=11.0)
    short, right = splits_of(sample[:2]).train
    clips = [replace(speech, id="jfk-swapped", text="Thank you."), replace(short, text=JFK_TEXT), right]
    hard = find_hard_clips(*_tiny_en, clips, Config())
    assert hard["id"].tolist() == ["jfk-swapped"]  # the other one has too many words for a WER above 1
    assert hard["rate"][0] > 5
    assert "country" in hard["hypothesis"][0]


def test_a_report_takes_up_the_models_findings_and_saves_them(
    _tiny_en: tuple[Any, Any], sample: list[Utterance], tmp_path: Path
) -> None:
    splits = splits_of(sample[:3])
    report = build_data_report(splits, Config())
    wrong = [replace(u, text="No.") for u in splits.train]
    checked = add_model_checks(report, *_tiny_en, wrong, Config(), max_hard_clips=1)
    assert report.label_styles is None  # the one before stays as it was
    assert checked.label_styles is not None
    found = {f.topic: f for f in checked.findings}
    assert (found["hard clips"].level, len(found["hard clips"].ids)) == ("warning", 1)
    costs = checked.label_styles[checked.label_styles["space"]].set_index("style")["nats"]
    assert f"{costs['keep']:.1f}" in found["label style"].message
    again = add_model_checks(checked, *_tiny_en, splits.train, Config(), max_hard_clips=1)
    assert len(again.findings) == len(checked.findings) == len(report.findings) + 2
    assert again.hard_clips is not None and again.hard_clips.empty
    checked.save(tmp_path)
    loaded = DataReport.load(tmp_path)
    assert checked.hard_clips is not None and loaded.hard_clips is not None
    pd.testing.assert_frame_equal(loaded.hard_clips, checked.hard_clips)
    assert "Hard clips" in loaded._repr_html_()


def test_nothing_to_measure_and_a_training_model_are_errors(small: tuple[Any, Any], sample: list[Utterance]) -> None:
    model, processor = small
    for check in (measure_label_styles, find_hard_clips):
        with pytest.raises(DataError, match="no utterance"):
            check(model, processor, [], Config())
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        measure_label_styles(model, processor, sample[:1], Config())


@pytest.mark.slow
def test_rows_without_a_language_get_the_one_that_the_model_hears_and_others_keep_theirs(
    base: tuple[Any, Any], sample: list[Utterance], caplog: pytest.LogCaptureFixture
) -> None:
    splits = splits_of(sample[:6])
    unmarked = [replace(u, language=None) for u in splits.train]
    splits = replace(splits, train=[replace(splits.train[0], language="hi"), *unmarked[1:]], test=unmarked)
    with caplog.at_level("INFO"):
        filled = fill_languages(splits, *base, Config())
    assert [u.language for u in filled.utterances] == ["hi"] + ["en"] * (len(filled.utterances) - 1)
    assert "English (en), which the model hears in" in caplog.text
    assert fill_languages(filled, *base, Config()) is filled


def test_a_corpus_in_which_the_model_hears_several_languages_is_warned_of(
    small: tuple[Any, Any], sample: list[Utterance], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = pd.DataFrame({"de": [-0.1] * 7 + [-3.0] * 3, "nl": [-3.0] * 7 + [-0.1] * 3})
    monkeypatch.setattr(data_checks, "measure_languages", lambda *given: heard)
    monkeypatch.setattr(Vocabulary, "of", lambda tokenizer: SimpleNamespace(multilingual=True))
    splits = splits_of([replace(u, language=None) for u in sample[:10]])
    filled = fill_languages(splits, *small, Config())
    assert {u.language for u in filled.utterances} == {"de"}
    assert "German (de), which the model hears in 7 of 10; set model.language" in caplog.text


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("मेरे भाई ने सेब खरीदे", "hi"),
        ("我哥哥买了", "zh"),
        ("Guten Tag", "ur"),
        ("تقول الأرصاد", "ur"),
        ("私の兄が買った", "ja"),
    ],
)
def test_only_languages_of_the_transcripts_script_are_heard(
    small: tuple[Any, Any], sample: list[Utterance], monkeypatch: pytest.MonkeyPatch, text: str, language: str
) -> None:
    logs = {"ur": -0.1, "en": -0.5, "hi": -2.0, "zh": -5.0, "ja": -5.5, "mr": -6.0, "pa": -1.0, "ko": -1.0}
    monkeypatch.setattr(data_checks, "measure_languages", lambda *given: pd.DataFrame([logs] * 3))
    monkeypatch.setattr(Vocabulary, "of", lambda tokenizer: SimpleNamespace(multilingual=True))
    splits = splits_of([replace(u, language=None, text=text) for u in sample[:3]])
    assert {u.language for u in fill_languages(splits, *small, Config()).utterances} == {language}


def test_transcripts_in_another_script_do_not_agree_on_the_language(
    small: tuple[Any, Any], sample: list[Utterance], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = pd.DataFrame([{"hi": -1.0, "zh": -2.0}] * 4)
    monkeypatch.setattr(data_checks, "measure_languages", lambda *given: heard)
    monkeypatch.setattr(Vocabulary, "of", lambda tokenizer: SimpleNamespace(multilingual=True))
    texts = ["मेरे भाई ने सेब खरीदे", "मेरे भाई ने सेब", "我哥哥买了", "हमने सेब"]
    splits = splits_of([replace(u, language=None, text=text) for u, text in zip(sample, texts, strict=False)])
    fill_languages(splits, *small, Config())
    assert "Hindi (hi), which the model hears in 3 of 4; set model.language" in caplog.text


def test_an_english_model_hears_english(small: tuple[Any, Any], sample: list[Utterance]) -> None:
    splits = splits_of([replace(u, language=None, text="I AM") for u in sample[:3]])
    assert {u.language for u in fill_languages(splits, *small, Config()).utterances} == {"en"}
