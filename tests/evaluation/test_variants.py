from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest

from src.data.loader import create_loader
from src.data.preparation import check_utterance
from src.data.utterance import Utterance
from src.evaluation import variants
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.latency import MeasuredEngine
from src.evaluation.variants import ENGINES, NO_CLIPS, VariantFigures, compare_models
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, ModelError

MEASURED = ("peak_memory_mb", "rtf", "rtfx", "wer", "wer_low", "wer_high", "normalizer", "n")


@pytest.mark.slow
def test_tiny_en_is_measured_in_every_engine_and_unavailable_weights_are_blank(
    sample: list[Utterance], _tiny_en: tuple[Any, Any], config: Config
) -> None:
    clips = [check_utterance(u, Config().data) for u in sample[400:500:50]]
    found = compare_models(config, clips, variants=["tiny.en", "openai/whisper-large-v3"])
    assert [(row.variant, row.engine) for row in found.rows] == [
        (variant, engine) for variant in ("tiny.en", "openai/whisper-large-v3") for engine in ENGINES
    ]
    torch_row, float_row, int8_row, *absent = found.rows
    model, processor = _tiny_en
    expected = ModelEvaluator(model, processor, config).evaluate_dataset(create_loader(clips, processor, config))
    for row in (torch_row, float_row):  # CTranslate2 in float32 computes the same
        assert (row.wer, row.n, row.normalizer) == (pytest.approx(expected.wer), 2, expected.normalizer)
        assert row.disk_mb == pytest.approx(151, abs=1)
    assert (torch_row.wer_low, torch_row.wer_high) == pytest.approx((expected.wer_low, expected.wer_high))
    assert int8_row.disk_mb == pytest.approx(40, abs=2)
    for row in (torch_row, float_row, int8_row):
        assert (row.parameters, row.device, row.audio_context, row.batch_size) == (37_760_256, "cpu", "full", 2)
        assert row.reason is None
        assert row.rtf is not None and row.rtfx is not None
        assert row.rtf * row.rtfx == pytest.approx(1)
    for row in absent:
        assert all(getattr(row, name) is None for name in ("parameters", "disk_mb", *MEASURED))
        assert row.reason is not None and "\n" not in row.reason
    assert found.to_frame()["wer"].tolist()[3:] == [""] * 3


def test_without_clips_parameters_and_size_are_filled_and_a_failed_export_is_a_reason(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Path:
        raise ModelError("the int8 model differs in 60% of the words")

    monkeypatch.setattr(variants, "export_ctranslate2", refuse)
    (row, failed) = compare_models(config, engines=["torch", "ctranslate2-int8"]).rows
    assert (row.variant, row.parameters, row.reason) == ("tiny.en", 37_760_256, NO_CLIPS)
    assert row.disk_mb == pytest.approx(151, abs=1)
    assert all(getattr(row, name) is None for name in MEASURED)
    assert failed.reason == "the int8 model differs in 60% of the words"
    monkeypatch.setattr(variants, "MAX_EXPORT_PARAMETERS", 1_000_000)
    (large,) = compare_models(config, engines=["ctranslate2-int8"]).rows
    assert large.reason is not None and "1 M parameters" in large.reason
    assert (large.parameters, large.disk_mb) == (37_760_256, None)


def test_one_export_at_a_time_is_in_memory(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = WeakSet[Any]()

    class FakeCTranslate2:
        name, device, precision, audio_context = "ctranslate2", "cpu", "int8", "full"

        def __init__(self, *args: Any, **options: Any) -> None:
            assert not alive
            alive.add(self)

    monkeypatch.setattr(variants, "export_ctranslate2", lambda *args, **options: tmp_path)
    monkeypatch.setattr(variants, "CTranslate2Engine", FakeCTranslate2)
    assert len(compare_models(config, engines=ENGINES[1:]).rows) == 2


def test_wrong_names_are_errors_before_anything_is_loaded(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=folder.name):
            compare_models(config, variants=[str(folder)])
    monkeypatch.setattr(WhisperModelManager, "initialize_model", lambda self: pytest.fail("loaded"))
    french = load_config(None, overrides={"model": {"variant": "base", "language": "fr"}})
    for given, options, message in (
        (config, {"variants": ["tiny.en", "tinny"]}, "'tinny'"),
        (config, {"engines": ["pytorch"]}, "'pytorch'"),
        (config, {"engines": []}, "torch"),
        (french, {"variants": ["tiny.en"]}, "English"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_models(given, **options)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_into_memory_is_a_reason(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(self: WhisperModelManager) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(WhisperModelManager, "initialize_model", initialize)
    (row,) = compare_models(config, engines=["torch"]).rows
    assert row == VariantFigures("tiny.en", "torch", reason="out of memory: CUDA out of memory. Tried to allocate")


def test_one_clip_has_no_interval(config: Config) -> None:
    engine = MeasuredEngine("torch", lambda audios, languages: ["red house"] * len(audios), "cpu", "float32", "full")
    utterance = Utterance("a", b"", "red mouse", duration_sec=1.0)
    blank = VariantFigures("tiny.en", "torch")
    row = variants._measure(blank, engine, [np.zeros(16_000, dtype=np.float32)], [utterance], config)
    assert (row.wer, row.wer_low, row.wer_high, row.n) == (0.5, None, None, 1)


def test_a_language_that_a_variant_does_not_know_is_a_reason(config: Config) -> None:
    def refuse(audios: Any, languages: Any) -> list[str]:
        raise ModelError(f"this is an English-only model, not for language {languages[0]!r}")

    engine = MeasuredEngine("torch", refuse, "cpu", "float32", "full")
    clip, audio = Utterance("a", b"", "नमस्ते", language="hi"), np.zeros(16_000, np.float32)
    row = variants._measure(VariantFigures("tiny.en", "torch"), engine, [audio], [clip], config)
    assert row == VariantFigures(
        "tiny.en", "torch", device="cpu", reason="this is an English-only model, not for language 'hi'"
    )
