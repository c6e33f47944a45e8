"""The two engines on the same weights, audio and options."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from src.data.audio import load_audio
from src.inference.ct2_engine import CTranslate2Engine
from src.inference.decoding import TorchEngine
from src.inference.engines import Engine, load_engine, transcribe
from src.inference.options import DecodingOptions
from src.models.export.ctranslate2 import export_ctranslate2
from src.utils.config import Config, load_config
from src.utils.errors import ConfigError, DeviceError, ModelError

pytestmark = pytest.mark.slow
Clip = NDArray[np.float32]


@pytest.fixture(scope="module")
def clips(sample: list[Any], jfk: Clip) -> list[Clip]:
    return [jfk, *(load_audio(u.audio) for u in sample[400:500:33])]


@pytest.fixture(scope="module")
def folder(_tiny_en: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory, jfk: Clip) -> Path:
    model, processor = _tiny_en
    target = tmp_path_factory.mktemp("engines") / "float32"
    return export_ctranslate2(model, target, processor=processor, quantization="float32", verify_clips=[jfk])


@pytest.fixture(scope="module")
def engines(_tiny_en: tuple[Any, Any], folder: Path) -> tuple[Engine, Engine]:
    model, processor = _tiny_en
    return TorchEngine(copy.deepcopy(model), processor), CTranslate2Engine(folder)


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(word_timestamps=True, no_speech=True),
        DecodingOptions(timestamps=True),
        DecodingOptions(num_beams=3),
        DecodingOptions(prompt="He said.", hotwords="Americans", prefix="And so"),
    ],
    ids=["words", "timestamps", "beams", "context"],
)
def test_both_engines_give_the_same_text_times_and_probabilities(
    engines: tuple[Engine, Engine], clips: Sequence[Clip], options: DecodingOptions
) -> None:
    apart_sec = []
    for expected, found in zip(*(transcribe(engine, clips, options) for engine in engines), strict=True):
        assert found.text == expected.text
        assert found.tokens == expected.tokens
        if options.num_beams == 1:  # of beams, the engines divide by different lengths
            assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
        if options.no_speech:
            assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-3)
        for ours, theirs in zip(found.words or (), expected.words or (), strict=True):
            assert ours.text == theirs.text
            assert ours.probability == pytest.approx(theirs.probability, abs=0.01)
            apart_sec.append(abs(ours.end_sec - theirs.end_sec))
    if options.word_timestamps:  # where two paths through the attention cost the same, each takes its own
        assert len(apart_sec) > 40
        assert np.quantile(apart_sec, 0.8) <= 0.021
        assert max(apart_sec) < 0.3


def test_a_clip_gets_as_many_tokens_as_its_cap_allows_from_both(
    engines: tuple[Engine, Engine], clips: Sequence[Clip]
) -> None:
    options = DecodingOptions(max_tokens_per_sec=1.0)
    expected, found = (transcribe(engine, clips, options) for engine in engines)
    assert [result.tokens for result in found] == [result.tokens for result in expected]
    assert len(found[0].tokens) == options.token_cap(len(clips[0]))  # the whole text has 24


def test_a_model_stays_in_the_mode_that_it_is_in(tiny_en: tuple[Any, Any], jfk: Clip) -> None:
    model, processor = tiny_en
    engine = TorchEngine(model.train(), processor)
    assert "country" in transcribe(engine, [jfk], DecodingOptions())[0].text
    assert all(module.training for module in model.modules())


def test_a_known_text_is_placed_by_both(engines: tuple[Engine, Engine], jfk: Clip) -> None:
    options = DecodingOptions()
    for engine in engines:
        tokens = engine.vocabulary.encode("And so my fellow Americans")
        (words,) = engine.align(engine.encode([jfk], 0.5), [jfk], [tokens], options)
        assert [word.text for word in words] == ["And", "so", "my", "fellow", "Americans"]
        assert words[3].end_sec == pytest.approx(1.76, abs=0.1)


def test_own_length_reaches_both_encoders(_tiny_en: tuple[Any, Any], tmp_path: Path, jfk: Clip) -> None:
    model, processor = copy.deepcopy(_tiny_en[0]), _tiny_en[1]
    model.audio_context = "dynamic"
    folder = export_ctranslate2(
        model, tmp_path / "own", processor=processor, quantization="float32", verify_clips=[jfk]
    )
    ct2 = CTranslate2Engine(folder)
    assert ct2.audio_context == "dynamic"
    encoded = np.array(ct2.encode([jfk], 0.5))
    expected = TorchEngine(model, processor).encode([jfk], 0.5).last_hidden_state.numpy()
    assert encoded.shape == expected.shape == (1, 575, 384)
    np.testing.assert_allclose(encoded, expected, atol=2e-3)


def test_multilingual_clips_are_detected_and_aligned_row_by_row(
    base: tuple[Any, Any], tmp_path: Path, jfk: Clip
) -> None:
    torch_engine = TorchEngine(*base)
    assert torch_engine.detect_languages([jfk]) == ["en"]
    folder = export_ctranslate2(base[0], tmp_path / "base", processor=base[1], quantization="int8", verify_clips=[jfk])
    ct2 = CTranslate2Engine(folder)
    assert ct2.detect_languages([jfk]) == ["en"]
    silence = np.zeros(32_000, dtype=np.float32)  # of any language
    results = transcribe(ct2, [jfk, silence], DecodingOptions(word_timestamps=True))
    assert results[0].language == "en"
    assert results[0].words is not None
    assert results[0].words[-1].text.strip(".") == "country"
    with pytest.raises(ModelError, match="unknown language 'xx'"):
        transcribe(ct2, [jfk], DecodingOptions(language="xx"))


def test_auto_says_its_choice(folder: Path, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = load_engine(folder, config)
    assert (engine.name, engine.precision) == ("ctranslate2", "float32")
    assert "a CTranslate2 folder" in caplog.text
    assert load_engine("tiny.en", config, engine="torch").name == "torch"


def test_weights_are_converted_once_for_the_cpu(config: Config, tmp_path: Path) -> None:
    cached = load_config(None, overrides={"device": "cpu", "paths": {"cache_dir": str(tmp_path)}})
    engine = load_engine("tiny.en", cached)
    assert (engine.name, engine.precision) == ("ctranslate2", "int8_float32")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.bin")}
    load_engine("tiny.en", cached)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.bin")} == made


def test_what_cannot_be_loaded_is_named(tmp_path: Path, folder: Path, config: Config) -> None:
    with pytest.raises(ModelError, match=r"no model\.bin"):
        CTranslate2Engine(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    (broken / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:1_000_000])
    with pytest.raises(ModelError, match="cannot load it"):
        CTranslate2Engine(broken)
    (broken / "config.json").write_text('{"layer_norm_epsilon": 1e-5}')
    with pytest.raises(ModelError, match="not a Whisper model"):
        CTranslate2Engine(broken)
    with pytest.raises(DeviceError, match="compute_type"):
        CTranslate2Engine(folder, compute_type="int3")
    with pytest.raises(ConfigError, match="unknown"):
        load_engine(folder, config, engine="onnx")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not in int8"):
        load_engine("tiny.en", config, engine="torch", compute_type="int8")
