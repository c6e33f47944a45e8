"""ONNX: the real weights are traced once, and called dynamic, which stock weights are good enough for on two clips."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import WhisperConfig

from src.models import onnx_graphs
from src.models.dynamic_context import DynamicWhisper
from src.models.export_check import bundled_clips
from src.models.onnx_export import export_onnx
from src.models.onnx_runtime import OnnxWhisper
from src.utils.errors import MissingDependencyError, ModelError

Edit = Callable[[str, np.ndarray], np.ndarray]


CLIPS = bundled_clips()[:2]  # that the default is five is tested in test_export.py


@pytest.fixture
def dynamic(tiny_en: tuple[Any, Any]) -> tuple[Any, Any]:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    return model, processor


@pytest.fixture(scope="module")
def traced(_tiny_en: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Encoder, first step and later step."""
    model = copy.deepcopy(_tiny_en[0])
    model.audio_context = "dynamic"
    with onnx_graphs.quiet_tools():
        return onnx_graphs.trace_whisper(model, tmp_path_factory.mktemp("traced"))


def trace_again(monkeypatch: pytest.MonkeyPatch, traced: list[Path], edit: Edit | None = None) -> None:
    """Let exports take graphs that are traced already, with the encoder's weights edited."""

    def trace(model: Any, folder: Path) -> list[Path]:
        graphs = [ir.load(part) for part in traced]
        for name, value in graphs[0].graph.initializers.items() if edit else ():
            value.const_value = ir.tensor(edit(name, value.const_value.numpy()), name=name)
        for graph, part in zip(graphs, traced, strict=True):
            onnx_graphs.save_graph(graph, folder / part.name)
        return [folder / part.name for part in traced]

    monkeypatch.setattr(onnx_graphs, "trace_whisper", trace)


@pytest.mark.slow
def test_an_export_is_laid_out_for_optimum_and_transformers_js_and_int8_replaces_it(
    dynamic: tuple[Any, Any], traced: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_again(monkeypatch, traced)
    model, processor = dynamic
    out = export_onnx(model, tmp_path / "out", processor=processor, verify_clips=CLIPS)  # compares text and logits
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json", "onnx"}
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["audio_context"]) == (["WhisperForConditionalGeneration"], "dynamic")
    sizes = {path.name: path.stat().st_size for path in (out / "onnx").iterdir()}
    assert sizes.keys() == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    assert sizes["decoder_model_merged.onnx"] < 1.01 * traced[1].stat().st_size  # the branches share their weights
    export_onnx(model, out, processor=processor, quantization="int8", verify_clips=CLIPS)
    quantised = {path.name: path.stat().st_size for path in (out / "onnx").iterdir()}
    assert quantised.keys() == {"encoder_model_quantized.onnx", "decoder_model_merged_quantized.onnx"}
    assert sum(quantised.values()) < 0.45 * sum(sizes.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda name, weight: 0 * weight if name.startswith("encoder.conv2") else weight,
            "of the words, allowed are 0%",
        ),
        (
            lambda name, weight: 1.01 * weight if name == "encoder.layer_norm.weight" else weight,
            r"a logit of the ONNX model differs by 0\.\d+, allowed are 0.01, so it was not saved",
        ),
    ],
    ids=["other text", "the same text"],
)
def test_a_graph_that_computes_something_else_is_not_saved(
    dynamic: tuple[Any, Any], traced: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit, said: str
) -> None:
    trace_again(monkeypatch, traced, edit)
    with pytest.raises(ModelError, match=said):
        export_onnx(dynamic[0], tmp_path / "out", processor=dynamic[1], verify_clips=CLIPS[:1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_batches_of_any_length_give_torchs_numbers_with_weights_too_large_for_one_file(
    dynamic: tuple[Any, Any], traced: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dynamic[0]
    model.generation_config.save_pretrained(tmp_path)
    monkeypatch.setattr(onnx_graphs, "MAX_FILE_BYTES", 1 << 20)
    trace_again(monkeypatch, traced)
    (tmp_path / "onnx").mkdir()
    onnx_graphs.write_onnx(model, tmp_path / "onnx", int8=False)
    names = [f"{name}.onnx{data}" for name in ("decoder_model_merged", "encoder_model") for data in ("", "_data")]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    exported = OnnxWhisper(tmp_path)
    prompt, tokens = [50257, 50362], [843, 523, 616]
    for batch, frames in ((1, 10), (3, 246), (1, 3000)):
        features = torch.randn(batch, 80, frames, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            expected = model(features, decoder_input_ids=torch.tensor([prompt + tokens] * batch))
        hidden = exported.encode(features.numpy())
        np.testing.assert_allclose(hidden, expected.encoder_last_hidden_state, atol=1e-3)
        found = exported.logits_along(hidden[-1:], prompt, tokens)
        np.testing.assert_allclose(found, expected.logits[-1, len(prompt) - 1 :], atol=1e-3)


def test_full_context_takes_3000_frames_only_and_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "vocab_size": 100}
    model = DynamicWhisper(WhisperConfig(**shape, decoder_attention_heads=2, pad_token_id=0)).eval()
    with onnx_graphs.quiet_tools():
        graph = onnx_graphs._trace_encoder(model)
    assert str(graph.graph.inputs[0].shape) == "[batch_size,80,3000]"
    onnx_graphs.save_graph(graph, tmp_path / "encoder.onnx")
    assert b".py" not in (tmp_path / "encoder.onnx").read_bytes()


def test_an_absent_package_is_named_with_the_line_that_installs_it(
    tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingDependencyError, match="needs onnxscript: pip install onnx onnxruntime onnxscript"):
        export_onnx(tiny_en[0], tmp_path / "out", processor=tiny_en[1])


def test_unknown_quantization_absent_processor_and_a_folder_of_something_else_are_refused(
    tiny_en: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = tiny_en
    with pytest.raises(ModelError, match="unknown quantization 'int4'; known: none, int8"):
        export_onnx(model, tmp_path / "out", processor=processor, quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="processor="):
        export_onnx(model, tmp_path / "out")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another output folder"):
        export_onnx(model, tmp_path, processor=processor)
