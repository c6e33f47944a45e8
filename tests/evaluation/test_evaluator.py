"""Evaluation of a small random model: counts, loss, memory and files do not depend on what its weights know."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator, compare_predictions
from src.evaluation.report.run_files import load_predictions
from src.inference import torch_engine
from src.inference.engine_base import DecodingResult
from src.utils.config import Config, load_config
from src.utils.errors import DataError, OutOfMemoryError
from src.utils.tracking import ExperimentLogger

CONFIG = load_config(None, overrides={"device": "cpu", "inference.max_tokens_per_sec": 1.0})


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[400:500:16]]


@pytest.fixture(scope="module")
def loader(_small: tuple[Any, Any], clips: list[Utterance]) -> Any:
    return create_loader(clips, _small[1], CONFIG)  # seven clips, one batch


@pytest.fixture(scope="module")
def result(_small: tuple[Any, Any], loader: Any) -> EvaluationResult:
    return ModelEvaluator(*_small, CONFIG).evaluate_dataset(loader, name="stock")


@pytest.fixture
def evaluator(small: tuple[Any, Any]) -> ModelEvaluator:
    return ModelEvaluator(*small, CONFIG)


def test_rows_are_those_of_the_clips_and_add_up_to_the_rates(result: EvaluationResult, clips: list[Utterance]) -> None:
    assert result["wer"] == result.wer == dict(result)["wer"]  # an object and a mapping
    assert "rows" not in result
    with pytest.raises(KeyError):
        result["word_error_rate"]
    assert result.wer_low <= result.wer <= result.wer_high
    assert result.rtf == pytest.approx(result.compute_sec / result.audio_sec)
    assert {row.id: row.reference for row in result.rows} == {clip.id: clip.text for clip in clips}
    errors = sum(row.substitutions + row.deletions + row.insertions for row in result.rows)
    assert result.reference_words == sum(row.reference_words for row in result.rows)
    assert result.wer == pytest.approx(errors / result.reference_words)
    assert {"age", "gender", "snr_db"} <= set(result.rows[0].meta)  # for slices
    assert all(row.num_tokens for row in result.rows if row.hypothesis)


def test_loss_is_the_token_weighted_mean_of_single_clips(
    small: tuple[Any, Any], clips: list[Utterance], result: EvaluationResult
) -> None:
    model, processor = small
    single = load_config(None, overrides={"device": "cpu", "inference.batch_size": 1})
    total, tokens = 0.0, 0
    for batch in create_loader(clips, processor, single):
        with torch.no_grad():
            encoded = torch_engine.encode(model, [batch["audio"][0]], 0.5)
            logits = model(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"]).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum"))
        tokens += int((batch["labels"] != -100).sum())
    assert result.loss == pytest.approx(total / tokens, rel=1e-4)


def test_clips_of_all_lengths_are_measured_as_each_alone(small: tuple[Any, Any], clips: list[Utterance]) -> None:
    model, processor = small
    model.audio_context = "dynamic"
    single = load_config(None, overrides={"device": "cpu", "inference": {"batch_size": 1, "max_tokens_per_sec": 1.0}})
    alone, together = (
        ModelEvaluator(model, processor, config).evaluate_dataset(create_loader(clips, processor, config))
        for config in (single, CONFIG)
    )
    expected = {row.id: row for row in alone.rows}
    assert {row.id: row.hypothesis for row in together.rows} == {key: row.hypothesis for key, row in expected.items()}
    assert [row.avg_logprob for row in together.rows] == pytest.approx(
        [expected[row.id].avg_logprob for row in together.rows], abs=1e-5
    )
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)


def test_a_failing_model_is_an_error_and_keeps_its_modes(
    small: tuple[Any, Any], clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small
    model.train()
    model.model.encoder.eval()  # as with a frozen encoder
    before = [module.training for module in model.modules()]
    encoded: list[int] = []
    model.model.encoder.register_forward_hook(lambda *a: encoded.append(1))
    loader = create_loader(clips[:2], processor, CONFIG)
    ModelEvaluator(model, processor, CONFIG).evaluate_dataset(loader)
    assert [module.training for module in model.modules()] == before
    assert len(encoded) == len(loader)  # audio is encoded once

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(model.model.decoder.layer_norm, "forward", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        ModelEvaluator(model, processor, CONFIG).evaluate_dataset(loader)
    assert [module.training for module in model.modules()] == before


def test_samples_are_spread_over_the_set_and_worst_first(
    small: tuple[Any, Any], evaluator: ModelEvaluator, clips: list[Utterance], loader: Any
) -> None:
    table = evaluator.evaluate_with_samples(loader, num_samples=3)
    assert set(table["id"]) == {clips[0].id, clips[len(clips) // 2].id, clips[-1].id}
    assert list(table["rate"]) == sorted(table["rate"], reverse=True)
    for given, samples in ((loader, 0), (SimpleNamespace(dataset=[]), 5)):
        with pytest.raises(DataError, match=f"num_samples is {samples}"):
            evaluator.evaluate_with_samples(given, num_samples=samples)
    silent = create_loader([dataclasses.replace(clips[0], text="")], small[1], CONFIG)
    assert math.isnan(evaluator.evaluate_with_samples(silent)["rate"][0])
    with pytest.raises(DataError, match="none of the 1"):
        evaluator.evaluate_dataset(silent)


def test_clips_that_did_not_come_give_no_rate(evaluator: ModelEvaluator, loader: Any) -> None:
    class Partial(list[Any]):
        dataset = loader.dataset

    with pytest.raises(DataError, match="3 clips were measured of 7"):
        evaluator.evaluate_dataset(Partial([{key: values[:3] for key, values in batch.items()} for batch in loader]))
    with pytest.raises(DataError, match="no clip"):
        evaluator.evaluate_dataset([])


def test_out_of_memory_halves_the_batches_from_then_on_and_loses_no_clip(
    evaluator: ModelEvaluator, loader: Any, result: EvaluationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = torch_engine.encode, []

    def encode(model: Any, audios: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(audios))
        if len(audios) > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, audios, *rest, **options)

    monkeypatch.setattr("src.evaluation.evaluator.encode", encode)
    fits = 2
    again = evaluator.evaluate_dataset(loader)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [row.id for row in again.rows] == [row.id for row in result.rows]
    assert again.loss == pytest.approx(result.loss, rel=1e-4)
    fits = 0
    with pytest.raises(OutOfMemoryError, match=result.rows[0].id):
        evaluator.evaluate_dataset(loader)


def test_results_are_saved_and_measuring_again_replaces_the_rows_of_that_model_only(
    result: EvaluationResult, config: Config
) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        result.save(experiment)
    (event,) = [json.loads(line) for line in Path(experiment.metrics_path).read_text().splitlines()]
    assert (event["wer"], event["rtf"]) == (result.wer, pytest.approx(result.rtf))
    path = Path(experiment.predictions_path)
    dataclasses.replace(result, name="tuned").write_predictions(path)
    fewer = dataclasses.replace(
        result, rows=(dataclasses.replace(result.rows[0], avg_logprob=math.nan, hypothesis="a\u2028b"),)
    )
    for _ in range(2):
        fewer.write_predictions(path)
    assert "NaN" not in path.read_text()
    models = load_predictions(experiment.dir)
    assert {name: len(rows) for name, rows in models.items()} == {"tuned": result.n, "stock": 1}
    assert tuple(models["tuned"]) == result.rows
    assert not list(path.parent.glob("*.tmp"))


def test_each_row_is_decoded_and_counted_in_its_own_language(
    base: tuple[Any, Any], clips: list[Utterance], monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    texts = {"zh": ("今天，很好", "今天很坏"), "tr": ("IŞIK", "ışık"), "en": ("the colour", "the color")}
    spoken = [dataclasses.replace(c, language=code, text=texts[code][0]) for c, code in zip(clips, texts, strict=False)]
    asked: list[Any] = []

    def decode(*args: Any, languages: Sequence[str | None]) -> list[DecodingResult]:
        asked.extend(languages)
        return [DecodingResult(texts[str(code)][1], (1,), -0.1, truncated=code == "zh") for code in languages]

    monkeypatch.setattr("src.evaluation.evaluator.TorchEngine.decode", decode)
    monkeypatch.setattr("src.evaluation.evaluator.encode", lambda *args, **options: None)
    monkeypatch.setattr("src.evaluation.evaluator.sum_loss", lambda *args: 1.0)
    result = ModelEvaluator(*base, CONFIG).evaluate_dataset(create_loader(spoken, base[1], CONFIG), name="stock")
    rates = {row.language: row.rate for row in result.rows}
    assert sorted(asked) == sorted(texts)
    assert rates == {"zh": 1 / 4, "tr": 0.0, "en": 0.0}
    assert (result.metric, result.rate, result.truncated) == ("mean", pytest.approx(1 / 12), 1)
    assert {code: found.rate for code, found in result.rates_by_language.items()} == rates
    with ExperimentLogger(config, run_id="r") as experiment:
        result.save(experiment)
    assert load_predictions(experiment.dir)["stock"] == list(result.rows)
    event = json.loads(Path(experiment.metrics_path).read_text())
    assert event["rates_by_language"]["zh"]["metric"] == "CER"
    other = [dataclasses.replace(row, normalizer="whisper-basic-v1") for row in result.rows]
    with pytest.raises(DataError, match="whisper-basic-v1"):
        compare_predictions(result.rows, other)


def test_a_model_compared_with_itself_shows_no_difference(
    small: tuple[Any, Any], evaluator: ModelEvaluator, loader: Any, result: EvaluationResult
) -> None:
    found = evaluator.compare(small[0], small[0], loader)
    assert (found.difference.difference, found.difference.verdict) == (0.0, "no difference shown")
    assert (found.stock.name, found.tuned.name) == ("stock", "tuned")
    assert [row.hypothesis for row in found.tuned.rows] == [row.hypothesis for row in result.rows]


def test_rows_are_compared_by_clip_and_only_with_the_same_references(result: EvaluationResult) -> None:
    rows: Sequence[Any] = result.rows
    assert compare_predictions(rows, rows[::-1]).difference == 0.0
    changed = (dataclasses.replace(rows[0], reference="something else"), *rows[1:])
    for other, reason in ((rows[1:], "different clips"), ((*rows, rows[0]), "unique"), (changed, "references of 1")):
        with pytest.raises(DataError, match=reason):
            compare_predictions(rows, other)
