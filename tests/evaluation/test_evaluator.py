from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.report.run_files import load_predictions
from src.evaluation.results import EvaluationResult, compare_predictions
from src.inference import decoding
from src.utils.config import Config
from src.utils.errors import DataError, OutOfMemoryError
from src.utils.tracking import ExperimentLogger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[400:500:16]]


@pytest.fixture(scope="module")
def result(_tiny_en: tuple[Any, Any], clips: list[Utterance]) -> EvaluationResult:
    model, processor = _tiny_en
    config = Config(device="cpu")
    return ModelEvaluator(model, processor, config).evaluate_dataset(
        create_loader(clips, processor, config), name="stock"
    )


def test_result_is_an_object_and_a_read_only_mapping(result: EvaluationResult, clips: list[Utterance]) -> None:
    assert result["wer"] == result.wer
    assert dict(result)["cer"] == result.cer
    assert "rows" not in result
    assert result.n == len(result.rows) == len(clips)
    assert result.wer_low <= result.wer <= result.wer_high
    assert {row.id for row in result.rows} == {u.id for u in clips}
    assert result.rtf == pytest.approx(result.compute_sec / result.audio_sec)
    with pytest.raises(TypeError):
        result["wer"] = 0  # type: ignore[index]
    with pytest.raises(KeyError):
        result["word_error_rate"]


def test_rows_add_up_to_the_rates(result: EvaluationResult) -> None:
    errors = sum(r.substitutions + r.deletions + r.insertions for r in result.rows)
    assert result.wer == pytest.approx(errors / sum(r.reference_words for r in result.rows))
    assert result.reference_words == sum(r.reference_words for r in result.rows)


def test_loss_is_the_token_weighted_mean_of_single_clips(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, result: EvaluationResult
) -> None:
    model, processor = tiny_en
    total, tokens = 0.0, 0
    for batch in create_loader(
        clips, processor, config.model_copy(update={"inference": config.inference.model_copy(update={"batch_size": 1})})
    ):
        with torch.no_grad():
            encoded = decoding.encode(model, [batch["audio"][0]], 0.5)
            logits = model(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"]).logits
        mask = batch["labels"] != -100
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten().clamp(min=0), reduction="none"
        )
        total += float(losses[mask.flatten()].sum())
        tokens += int(mask.sum())
    assert result.loss == pytest.approx(total / tokens, rel=1e-4)


def test_a_failing_model_is_an_error_and_never_a_zero(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    loader = create_loader(clips, processor, config)
    monkeypatch.setattr(
        model.model.decoder, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        ModelEvaluator(model, processor, config).evaluate_dataset(loader)


def test_nothing_to_measure_is_an_error(tiny_en: tuple[Any, Any], config: Config) -> None:
    with pytest.raises(DataError, match="no clip"):
        ModelEvaluator(*tiny_en, config).evaluate_dataset([])


def test_modes_are_restored_module_by_module(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    model.train()
    model.model.encoder.eval()  # as with a frozen encoder
    before = [module.training for module in model.modules()]
    loader = create_loader(clips[:2], processor, config)
    ModelEvaluator(model, processor, config).evaluate_dataset(loader)
    assert [module.training for module in model.modules()] == before
    monkeypatch.setattr("src.evaluation.evaluator.decode", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ModelEvaluator(model, processor, config).evaluate_dataset(loader)
    assert [module.training for module in model.modules()] == before


def test_audio_is_encoded_once(tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config) -> None:
    model, processor = tiny_en
    seen: list[int] = []
    model.model.encoder.register_forward_hook(lambda *a: seen.append(1))
    loader = create_loader(clips[:2], processor, config)
    ModelEvaluator(model, processor, config).evaluate_dataset(loader)
    assert len(seen) == len(loader)


def test_samples_are_spread_over_the_set_and_worst_first(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    model, processor = tiny_en
    loader = create_loader(clips, processor, config)
    table = ModelEvaluator(model, processor, config).evaluate_with_samples(loader, num_samples=3)
    assert set(table["id"]) == {clips[0].id, clips[len(clips) // 2].id, clips[-1].id}
    assert list(table["wer"]) == sorted(table["wer"], reverse=True)


def test_results_are_saved_for_tables_and_pictures(result: EvaluationResult, config: Config) -> None:
    with ExperimentLogger(config, run_id="r") as experiment:
        result.save(experiment)
    rows = [json.loads(line) for line in Path(experiment.predictions_path).read_text().splitlines()]
    assert [row["id"] for row in rows] == [row.id for row in result.rows]
    assert all(row["model"] == "stock" for row in rows)
    (event,) = [json.loads(line) for line in Path(experiment.metrics_path).read_text().splitlines()]
    assert event["wer"] == result.wer
    assert math.isclose(event["rtf"], result.rtf)


def test_a_model_compared_with_itself_shows_no_difference(
    tiny_en: tuple[Any, Any], clips: list[Utterance], result: EvaluationResult, config: Config
) -> None:
    model, processor = tiny_en
    evaluator = ModelEvaluator(model, processor, config)
    found = evaluator.compare(result, model, create_loader(clips, processor, config))
    assert (found.difference.difference, found.difference.verdict) == (0.0, "no difference shown")
    assert found.stock is result
    assert found.tuned.name == "tuned"
    assert [row.hypothesis for row in found.tuned.rows] == [row.hypothesis for row in result.rows]
    with pytest.raises(DataError, match="tuned model has not been measured"):
        evaluator.compare(result, model)
    with pytest.raises(DataError, match="whisper-basic-v1"):
        evaluator.compare(result, dataclasses.replace(result, normalizer="whisper-basic-v1"))


def test_out_of_memory_halves_the_batches_from_then_on_and_loses_no_clip(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config, result: EvaluationResult,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real, sizes = decoding.encode, []

    def encode(model: Any, audios: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(audios))
        if len(audios) > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, audios, *rest, **options)

    monkeypatch.setattr("src.evaluation.evaluator.encode", encode)
    loader = create_loader(clips, tiny_en[1], config)  # seven clips, one batch
    evaluator = ModelEvaluator(*tiny_en, config)
    fits = 2
    again = evaluator.evaluate_dataset(loader)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [row.id for row in again.rows] == [row.id for row in result.rows]
    assert again.wer == pytest.approx(result.wer)
    assert again.loss == pytest.approx(result.loss, rel=1e-4)
    assert "from now on at most 1 at once" in caplog.text
    fits = 0
    with pytest.raises(OutOfMemoryError, match=result.rows[0].id):
        evaluator.evaluate_dataset(loader)


def test_a_loader_that_leaves_clips_out_gives_no_rate(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    whole = create_loader(clips, tiny_en[1], config)
    (batch,) = whole

    class Partial:
        dataset = whole.dataset

        def __iter__(self) -> Any:
            yield {key: values[:3] for key, values in batch.items()}

    with pytest.raises(DataError, match="3 clips were measured of 7"):
        ModelEvaluator(*tiny_en, config).evaluate_dataset(Partial())


def test_rows_carry_what_slices_are_made_of(result: EvaluationResult) -> None:
    assert {"age", "gender", "snr_db"} <= set(result.rows[0].meta)
    assert all(row.num_tokens for row in result.rows if row.hypothesis)


def test_measuring_again_replaces_the_rows_of_that_model_only(result: EvaluationResult, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    result.write_predictions(path)
    dataclasses.replace(result, name="tuned").write_predictions(path)
    fewer = dataclasses.replace(result, rows=(dataclasses.replace(result.rows[0], avg_logprob=math.nan),))
    fewer.write_predictions(path)
    assert "NaN" not in path.read_text()
    models = load_predictions(path)
    assert {name: len(rows) for name, rows in models.items()} == {"tuned": result.n, "stock": 1}
    assert tuple(models["tuned"]) == result.rows
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_clips_other_references_and_repeated_ids_cannot_be_compared(result: EvaluationResult) -> None:
    rows = result.rows
    changed = (dataclasses.replace(rows[0], reference="something else"), *rows[1:])
    for other, reason in ((rows[1:], "different clips"), ((*rows, rows[0]), "unique"), (changed, "references of 1")):
        with pytest.raises(DataError, match=reason):
            compare_predictions(rows, other)


def test_order_of_the_clips_does_not_matter_to_a_comparison(result: EvaluationResult) -> None:
    assert compare_predictions(result.rows, result.rows[::-1]).difference == 0.0


def test_silence_alone_can_be_looked_at_but_has_no_rate(
    tiny_en: tuple[Any, Any], clips: list[Utterance], config: Config
) -> None:
    model, processor = tiny_en
    loader = create_loader([dataclasses.replace(clips[0], text="")], processor, config)
    evaluator = ModelEvaluator(model, processor, config)
    assert math.isnan(evaluator.evaluate_with_samples(loader)["wer"][0])
    with pytest.raises(DataError, match="no rate is defined"):
        evaluator.evaluate_dataset(loader)
