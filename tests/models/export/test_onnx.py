"""ONNX: whisper-tiny.en once, since tracing takes half a minute; the rest on a random model and on a fake runtime."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import WhisperConfig

from benchmarks import browser
from src.models.dynamic_context import DynamicWhisper
from src.models.export import onnx, onnx_graphs
from src.models.export.onnx import OnnxWhisper, export_onnx
from src.models.export.verify import ClipBatch, bundled_clips, prepare_batch
from src.utils.config import load_config
from src.utils.errors import MissingDependencyError, ModelError

CLIPS = bundled_clips()[:2]  # stock weights do well on these at dynamic context too, which is faster
SHAPE = {
    "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
}  # fmt: skip


@pytest.fixture
def dynamic(tiny_en: Any) -> tuple[Any, Any]:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    return model, processor


@pytest.mark.slow
def test_an_export_gives_the_text_and_is_laid_out_for_optimum_and_transformers_js(dynamic: Any, tmp_path: Path) -> None:
    model, processor = dynamic
    out = export_onnx(model, tmp_path / "out", processor=processor, verify_clips=CLIPS)  # compares text and logits
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json", "onnx"}
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["audio_context"]) == (["WhisperForConditionalGeneration"], "dynamic")
    assert {path.name for path in (out / "onnx").iterdir()} == {"encoder_model.onnx", "decoder_model_merged.onnx"}
    decoder = (out / "onnx" / "decoder_model_merged.onnx").stat().st_size
    assert decoder < 1.02 * 4 * sum(weight.numel() for weight in model.get_decoder().parameters())  # not twice
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    try:
        scripts = browser.fetch_packages(load_config(None).paths.cache_dir)
    except MissingDependencyError as err:
        pytest.skip(f"the export is right, but was opened in no browser: {err}")
    found = browser.transcribe_in_browser(out, CLIPS[0], scripts, calls=1)
    batch = prepare_batch(model, processor.tokenizer, CLIPS[:1])
    assert found["own length"][1] == processor.decode(batch.generate(model)[0], skip_special_tokens=True).strip()
    assert found["padded to 30 s"][1]


@pytest.fixture(scope="module")
def small() -> DynamicWhisper:
    """Random weights, of dynamic context."""
    torch.manual_seed(0)
    return DynamicWhisper(WhisperConfig(**SHAPE, audio_context="dynamic")).eval()


@pytest.fixture(scope="module")
def traced(small: DynamicWhisper, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with onnx_graphs.quiet_tools():
        return onnx_graphs.trace_whisper(small, tmp_path_factory.mktemp("traced"))


@pytest.fixture
def trace_again(monkeypatch: pytest.MonkeyPatch, traced: list[Path]) -> None:
    """Let `write_onnx` take the graphs that are traced already."""

    def trace(model: Any, folder: Path) -> list[Path]:
        for part in traced:
            onnx_graphs.save_graph(ir.load(part), folder / part.name)
        return [folder / part.name for part in traced]

    monkeypatch.setattr(onnx_graphs, "trace_whisper", trace)


@pytest.mark.slow
@pytest.mark.usefixtures("trace_again")
@pytest.mark.parametrize(("int8", "suffix", "tolerance"), [(False, "", 1e-5), (True, "_quantized", 0.05)])
def test_batches_of_any_length_give_torchs_numbers_with_weights_too_large_for_one_file(
    small: DynamicWhisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool, suffix: str, tolerance: float
) -> None:
    monkeypatch.setattr(onnx_graphs, "MAX_FILE_BYTES", 1000)
    small.generation_config.save_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    onnx_graphs.write_onnx(small, tmp_path / "onnx", int8=int8)
    stems = [f"decoder_model_merged{suffix}", f"encoder_model{suffix}"]
    names = [f"{stem}.onnx{data}" for stem in stems for data in ("", "_data")]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    exported = OnnxWhisper(tmp_path)
    prompt, tokens = [1, 2, 3], [7, 5, 9, 9]
    for batch, frames in ((1, 10), (3, 246), (1, 3000)):
        features = torch.randn(batch, 80, frames, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            expected = small(features, decoder_input_ids=torch.tensor([prompt + tokens] * batch))
        hidden = exported.encode(features.numpy())
        np.testing.assert_allclose(hidden, expected.encoder_last_hidden_state, atol=tolerance)
        found = exported.logits_along(hidden[-1:], prompt, tokens)
        np.testing.assert_allclose(found, expected.logits[-1, len(prompt) - 1 :], atol=tolerance)


@pytest.mark.slow
def test_full_context_takes_3000_frames_only_and_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    with onnx_graphs.quiet_tools():
        encoder, *_ = onnx_graphs.trace_whisper(DynamicWhisper(WhisperConfig(**SHAPE)).eval(), tmp_path)
    assert str(ir.load(encoder).graph.inputs[0].shape) == "[batch_size,80,3000]"
    assert b".py" not in encoder.read_bytes()


class FakeRuntime:
    """A runtime that gives the source's own text and logits, or others."""

    text_is_right = True
    logits_are_off_by = 0.0
    source: Any = None

    def __init__(self, folder: Path) -> None:
        assert (folder / "generation_config.json").is_file()

    def transcribe(self, batch: ClipBatch) -> list[list[int]]:
        return batch.generate(self.source) if self.text_is_right else [[11, 13]] * len(batch.prompts)

    def encode(self, features: np.ndarray) -> np.ndarray:
        return features

    def logits_along(self, features: np.ndarray, prompt: list[int], tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            output = self.source(torch.from_numpy(features), decoder_input_ids=torch.tensor([prompt + tokens]))
        return output.logits[0, len(prompt) - 1 :].numpy() + np.float32(self.logits_are_off_by)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, dynamic: Any) -> Iterator[type[FakeRuntime]]:
    fake = type("Runtime", (FakeRuntime,), {"source": dynamic[0]})
    monkeypatch.setattr(onnx, "OnnxWhisper", fake)
    monkeypatch.setattr(onnx_graphs, "write_onnx", lambda model, folder, int8: (folder / "encoder_model.onnx").touch())
    yield fake


def test_an_export_that_differs_is_not_saved_and_an_older_one_stays(dynamic: Any, runtime: Any, tmp_path: Path) -> None:
    model, processor = dynamic
    out = export_onnx(model, tmp_path / "out", processor=processor, verify_clips=CLIPS[:1])
    (out / "older").touch()
    runtime.logits_are_off_by = 0.02
    with pytest.raises(ModelError, match=r"0\.02.* 0\.01"):
        export_onnx(model, out, processor=processor, verify_clips=CLIPS[:1])
    runtime.text_is_right = False
    with pytest.raises(ModelError, match=r"int8.* 100%.* 20%"):
        export_onnx(model, out, processor=processor, quantization="int8", verify_clips=CLIPS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "older").exists()
    runtime.text_is_right = True  # int8 moves logits, which is allowed
    export_onnx(model, out, processor=processor, quantization="int8", verify_clips=CLIPS[:1])
    assert not (out / "older").exists()


def test_what_cannot_be_exported_is_refused(tiny_en: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_en
    with pytest.raises(ModelError, match=r"'int4'.* int8"):
        export_onnx(model, tmp_path / "out", processor=processor, quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="processor="):
        export_onnx(model, tmp_path / "out")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        export_onnx(model, tmp_path, processor=processor)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingDependencyError, match="onnxscript: pip install onnx onnxruntime onnxscript"):
        export_onnx(model, tmp_path / "out", processor=processor)
