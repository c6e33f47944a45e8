from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation import variants
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.latency import Engine, torch_engine
from src.evaluation.variants import (
    ENGINES,
    NO_CLIPS,
    VariantComparison,
    VariantFigures,
    compare_models,
    ctranslate2_engine,
)
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, ModelError
from src.utils.tracking import ExperimentLogger

MEASURED = ("peak_memory_mb", "rtf", "rtfx", "wer", "wer_low", "wer_high", "normalizer", "n")


@pytest.fixture(scope="module")
def clips(sample: list[Utterance]) -> list[Utterance]:
    return [check_utterance(u, Config().data) for u in sample[400:500:26]]


@pytest.mark.slow
def test_tiny_en_is_measured_in_every_engine_and_what_cannot_be_had_is_blank(
    clips: list[Utterance], tiny_en: tuple[Any, Any], config: Config
) -> None:
    found = compare_models(config, clips, variants=["tiny.en", "large-v3-turbo", "openai/whisper-large-v3"])
    assert [(row.variant, row.engine) for row in found.rows] == [
        (variant, engine) for variant in ("tiny.en", "large-v3-turbo", "openai/whisper-large-v3") for engine in ENGINES
    ]
    torch_row, float_row, int8_row, *absent = found.rows
    model, processor = tiny_en
    expected = ModelEvaluator(model, processor, config).evaluate_dataset(create_loader(clips, processor, config))
    for row in (torch_row, float_row):  # CTranslate2 in float32 computes the same
        assert (row.wer, row.n, row.normalizer) == (pytest.approx(expected.wer), 4, expected.normalizer)
        assert row.disk_mb == pytest.approx(151, abs=1)
    assert (torch_row.wer_low, torch_row.wer_high) == pytest.approx((expected.wer_low, expected.wer_high))
    assert int8_row.disk_mb == pytest.approx(40, abs=2)
    for row in (torch_row, float_row, int8_row):
        assert (row.parameters, row.device, row.audio_context, row.batch_size) == (37_760_256, "cpu", "full", 4)
        assert row.reason is None
        assert row.rtf is not None and row.rtfx is not None
        assert row.rtf * row.rtfx == pytest.approx(1)
    for row in absent:
        assert all(getattr(row, name) is None for name in ("parameters", "disk_mb", *MEASURED))
        assert row.reason is not None
        assert "not downloaded yet" in row.reason and "\n" not in row.reason
    table = found.to_frame()
    assert table["wer"].tolist()[3:] == [""] * 6
    assert table["parameters"].tolist()[0] == 37_760_256


@pytest.mark.slow
def test_without_clips_parameters_and_size_are_filled(config: Config) -> None:
    (row,) = compare_models(config, engines=["torch"]).rows
    assert (row.variant, row.parameters, row.reason) == ("tiny.en", 37_760_256, NO_CLIPS)
    assert row.disk_mb == pytest.approx(151, abs=1)
    assert all(getattr(row, name) is None for name in MEASURED)


def test_wrong_names_are_errors_before_anything_is_loaded(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WhisperModelManager, "initialize_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="unknown variant 'tinny'; did you mean 'tiny'"):
        compare_models(config, variants=["tiny.en", "tinny"])
    with pytest.raises(ConfigError, match="'pytorch' is unknown; did you mean 'torch'"):
        compare_models(config, engines=["pytorch"])
    with pytest.raises(ConfigError, match="known: torch"):
        compare_models(config, engines=[])
    french = load_config(None, overrides={"model": {"variant": "base", "language": "fr"}})
    with pytest.raises(ConfigError, match="knows English only"):
        compare_models(french, variants=["tiny.en"])


def test_a_folder_that_is_no_checkpoint_is_an_error(config: Config, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=folder.name):
            compare_models(config, variants=[str(folder)])


def test_a_model_that_does_not_fit_into_memory_is_a_reason(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(self: WhisperModelManager) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(WhisperModelManager, "initialize_model", initialize)
    (row,) = compare_models(config, engines=["torch"]).rows
    assert row == VariantFigures("tiny.en", "torch", reason="out of memory: CUDA out of memory. Tried to allocate")


@pytest.mark.slow
def test_an_export_that_takes_minutes_or_fails_is_a_reason(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Path:
        raise ModelError("the int8 model differs in 60% of the words")

    monkeypatch.setattr(variants, "export_ctranslate2", refuse)
    (failed,) = compare_models(config, engines=["ctranslate2-int8"]).rows
    assert failed.reason == "the int8 model differs in 60% of the words"
    monkeypatch.setattr(variants, "MAX_EXPORT_PARAMETERS", 1_000_000)
    (large,) = compare_models(config, engines=["ctranslate2-int8"]).rows
    assert large.reason is not None and "more than 1 M parameters" in large.reason
    assert (large.parameters, large.disk_mb) == (37_760_256, None)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["full", "dynamic"])
def test_ctranslate2_gives_the_texts_of_torch_in_either_context(
    context: str, tiny_en: tuple[Any, Any], jfk: np.ndarray, config: Config, tmp_path: Path
) -> None:
    model, processor = tiny_en
    model.audio_context = context
    export = export_ctranslate2(model, tmp_path / "export", processor=processor, quantization="float32")
    engine = ctranslate2_engine(export, config, quantization="float32")
    audios = [jfk, jfk[: 5 * 16_000]]
    assert engine.transcribe(audios) == torch_engine(model, processor, config).transcribe(audios)
    assert (engine.name, engine.audio_context) == ("ctranslate2-float32", context)
    assert engine.first_token is not None
    token = engine.first_token(jfk)
    assert token == torch_engine(model, processor, config).first_token(jfk)  # type: ignore[misc]


@pytest.mark.slow
def test_ctranslate2_detects_or_takes_the_language_as_torch_does(
    base: tuple[Any, Any], jfk: np.ndarray, config: Config, tmp_path: Path
) -> None:
    model, processor = base
    export = export_ctranslate2(model, tmp_path / "export", processor=processor, quantization="float32")
    clip = jfk[: 4 * 16_000]
    for language in (None, "fr"):
        own = load_config(None, overrides={"model": {"variant": "base", "language": language}, "device": "cpu"})
        engine = ctranslate2_engine(export, own, quantization="float32")
        assert engine.transcribe([clip]) == torch_engine(model, processor, own).transcribe([clip])


def test_rows_are_read_back_from_the_run_the_last_of_each_engine(config: Config) -> None:
    first = VariantFigures("tiny.en", "torch", rtf=0.5, rtfx=2.0, n=4)
    again = VariantFigures("tiny.en", "torch", rtf=0.25, rtfx=4.0, n=4)
    blank = VariantFigures("base", "torch", reason="no weights")
    with ExperimentLogger(config, run_id="r") as experiment:
        VariantComparison((first, blank)).save(experiment)
        VariantComparison((again,)).save(experiment)
    assert VariantComparison.load(experiment.dir).rows == (again, blank)


def test_one_clip_has_no_interval(config: Config) -> None:
    engine = Engine("torch", lambda audios: ["red house"] * len(audios), "cpu", "float32", "full")
    utterance = Utterance("a", b"", "red mouse", duration_sec=1.0)
    one = variants._TestClips([np.zeros(16_000, dtype=np.float32)], [utterance])
    row = variants._fill(VariantFigures("tiny.en", "torch"), engine, one, config)
    assert (row.wer, row.wer_low, row.wer_high, row.n) == (0.5, None, None, 1)
    assert not any(isinstance(v, float) and math.isnan(v) for v in vars(row).values())
