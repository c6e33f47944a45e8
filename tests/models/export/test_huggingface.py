from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from scripts import export as export_script
from scripts import export_onnx as export_onnx_script
from src.data.audio import SAMPLE_RATE
from src.data.utterance import Utterance
from src.models.ct2_converter import convert_ct2_to_hf
from src.models.dynamic_context import DynamicWhisper
from src.models.export import ctranslate2 as ct2_export
from src.models.export import huggingface as export
from src.models.export import verify as export_check
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.export.huggingface import export_huggingface
from src.utils.errors import ModelError


@pytest.mark.slow
def test_huggingface_export_loads_in_stock_classes_and_replaces_an_older_one(
    tiny_en: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    model.train()
    for bias in (0.0, 0.5):
        model.model.decoder.layer_norm.bias.data.add_(bias)
        assert export_huggingface(model, processor, tmp_path / "out") == tmp_path / "out"
        reloaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert torch.equal(reloaded.model.decoder.layer_norm.bias, model.model.decoder.layer_norm.bias)
    assert model.training
    assert DynamicWhisper.from_pretrained(tmp_path / "out").audio_context == "dynamic"
    assert WhisperProcessor.from_pretrained(tmp_path / "out").tokenizer.normalize("colour") == "color"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()  # faster-whisper and transformers 4 need it
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_model_that_changes_on_the_way_is_not_saved(
    tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    save = export._save

    def save_something_else(model: Any, processor: Any, folder: Path) -> None:
        save(model, processor, folder)
        model.model.encoder.conv1.bias.data.add_(1)

    monkeypatch.setattr(export, "_save", save_something_else)
    with pytest.raises(ModelError, match=r"1 weights differ after reloading: model\.encoder\.conv1\.bias"):
        export_huggingface(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_no_longer_gives_the_text_is_not_saved(
    tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    save = export._save

    def save_other_settings(model: Any, processor: Any, folder: Path) -> None:
        save(model, processor, folder)
        settings = json.loads((folder / "generation_config.json").read_text())
        settings["suppress_tokens"] += processor.tokenizer(" be But", add_special_tokens=False).input_ids
        (folder / "generation_config.json").write_text(json.dumps(settings))

    monkeypatch.setattr(export, "_save", save_other_settings)
    with pytest.raises(ModelError, match=r"the reloaded model differs in \d+% of the words, allowed are 0%"):
        export_huggingface(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exports_are_verified_with_five_speakers_of_the_bundled_sample(sample: list[Utterance]) -> None:
    clips = export_check.bundled_clips()
    chosen = [utterance for utterance in sample if utterance.id in export_check.VERIFY_IDS]
    assert len({utterance.speaker for utterance in chosen}) == len(clips) == 5
    assert all(2 * SAMPLE_RATE < len(clip) < 4 * SAMPLE_RATE for clip in clips)


def test_clips_that_cannot_be_verified_with_are_refused(tiny_en: tuple[Any, Any], jfk: np.ndarray) -> None:
    model, processor = tiny_en
    with pytest.raises(ModelError, match="no clip to verify with"):
        export_check.verify_transcripts(model, processor, lambda batch: [], name="x", clips=[])
    with pytest.raises(ModelError, match=r"a clip of 33\.0 s: pass clips of at most 30 s"):
        export_check.prepare_batch(model, processor.tokenizer, [np.concatenate([jfk] * 3)], None)
    model.generation_config.is_multilingual, model.generation_config.lang_to_id = True, {"<|de|>": 1, "<|sv|>": 2}
    with pytest.raises(ModelError, match="language 'den' is unknown to this model; did you mean 'de'"):
        export_check.prepare_batch(model, processor.tokenizer, [jfk], "den")


def test_folder_that_is_no_export_is_left_alone(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another output folder"):
        export_huggingface(*tiny_en, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_wrapped_model_is_refused(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="merge_and_unload"):
        export_huggingface(nn.Sequential(tiny_en[0]), tiny_en[1], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "float16"])
def test_ctranslate2_export_is_complete_and_gives_the_text(
    tiny_en: tuple[Any, Any], tmp_path: Path, quantization: str, jfk: np.ndarray
) -> None:
    model, processor = tiny_en
    out = export_ctranslate2(
        model, tmp_path / "out", processor=processor, quantization=quantization, verify_clips=[jfk, jfk[: 16_000 * 4]]
    )
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.bin",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocabulary.json",
    }
    assert json.loads((out / "config.json").read_text())["audio_context"] == "full"


@pytest.mark.slow
def test_dynamic_context_survives_export_and_conversion_back(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    export_ctranslate2(model, tmp_path / "ct2", processor=processor, quantization="float32")
    back = DynamicWhisper.from_pretrained(convert_ct2_to_hf(tmp_path / "ct2", tmp_path / "hf"))
    assert back.audio_context == "dynamic"
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in back.state_dict().items())


@pytest.mark.slow
def test_multilingual_export_detects_the_language(base: tuple[Any, Any], tmp_path: Path, jfk: np.ndarray) -> None:
    model, processor = base
    export_ctranslate2(model, tmp_path / "out", processor=processor, verify_clips=[jfk[: 16_000 * 5]])
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["lang_ids"]) == 99


@pytest.mark.slow
def test_export_that_says_something_else_is_removed(
    tiny_en: tuple[Any, Any], tmp_path: Path, jfk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    load_model = ct2_export.TransformersConverter.load_model

    def load_damaged(self: Any, *args: Any, **options: Any) -> Any:
        loaded = load_model(self, *args, **options)
        loaded.model.decoder.layers[0].fc1.weight.data.zero_()
        return loaded

    monkeypatch.setattr(ct2_export.TransformersConverter, "load_model", load_damaged)
    with pytest.raises(ModelError, match="of the words, allowed are 20%, so it was not saved"):
        export_ctranslate2(model, tmp_path / "out", processor=processor, verify_clips=[jfk])
    assert list(tmp_path.iterdir()) == []


def test_alignment_heads_of_another_model_are_not_exported(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_en
    model.generation_config.alignment_heads = [[31, 0]]
    with pytest.raises(ModelError, match=r"lists \(31, 0\), but the decoder has 4 layers"):
        export_ctranslate2(model, tmp_path / "out", processor=processor)
    assert list(tmp_path.iterdir()) == []


def test_unknown_quantization_and_absent_processor_are_refused(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown quantization 'int4'; known: int8"):
        export_ctranslate2(tmp_path, tmp_path / "out", quantization="int4")
    with pytest.raises(ModelError, match="processor="):
        export_ctranslate2(tiny_en[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("expected", "found", "rate"),
    [
        (["a b c d"], ["a b c d"], 0.0),
        (["a b c d"], ["a b x d e"], 0.5),
        (["", "a b"], ["", "a b"], 0.0),
        ([""], [""], 0.0),
        ([""], ["a"], 1.0),
        (["a b c d", "x y", "z", "z"], ["a b", "x y", "z", "z"], 0.125),
        (["a", "b"], ["a a a a a", "b"], 0.5),
    ],
)
def test_word_mismatch_counts_edits_over_the_words_of_the_source_and_every_clip_once(
    expected: list[str], found: list[str], rate: float
) -> None:
    assert export_check.word_mismatch(expected, found) == rate


def test_provenance_and_adapters_lie_beside_the_model(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_en
    model.audio_context = "dynamic"
    adapters = {"fc1.lora_A": torch.arange(6.0).reshape(2, 3).t(), "fc1.lora_B": torch.zeros(3, 2)}
    made = {"epoch": 2, "validation_wer": 0.25, "git_revision": None}
    out = export_huggingface(model, processor, tmp_path / "out", provenance=made, adapters=adapters)
    assert export.read_provenance(out) == made
    saved = load_file(out / "adapters.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {n: t.tolist() for n, t in adapters.items()}
    reloaded = WhisperForConditionalGeneration.from_pretrained(out)
    assert torch.equal(reloaded.model.encoder.conv1.weight, model.model.encoder.conv1.weight)
    # a later export without them leaves nothing of the older one
    export_huggingface(model, processor, out)
    assert not (out / "adapters.safetensors").exists()
    assert export.read_provenance(out) == {}


@pytest.mark.parametrize("content", [None, "{", "[1]", "\xff"])
def test_a_provenance_that_is_absent_or_damaged_says_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "provenance.json").write_text(content, encoding="latin-1")
    assert export.read_provenance(tmp_path) == {}


def test_a_full_disk_leaves_the_older_export(
    tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        export_huggingface(*tiny_en, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_scripts_export_a_checkpoint_and_say_errors_in_one_line(
    tiny_en: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_script, "setup_logging", lambda level: None)  # it would last, and take pytest's handlers
    model, processor = tiny_en
    model.audio_context = "dynamic"
    source, out = export_huggingface(model, processor, tmp_path / "source"), tmp_path / "out"
    assert export_script.main(["--model", str(source), "--format", "ct2", "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    assert (out / "model.bin").is_file()
    for given, said in (
        (
            ["--model", str(source), "--format", "hf", "--quantization", "int8"],
            "ModelError: --quantization int8: hf keeps",
        ),
        (
            ["--model", str(source), "--format", "onnx", "--quantization", "q4"],
            "unknown quantization 'q4'; known: none",
        ),
        (["--model", "tinny", "--format", "ct2"], "ModelError: 'tinny': unknown variant; did you mean 'tiny'? Known:"),
        (["--model", str(tmp_path / "gone"), "--format", "ct2"], "gone: no such folder; checkpoints beside it:"),
    ):
        assert export_script.main([*given, "--output", str(tmp_path / "other")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
    (tmp_path / "thesis.txt").write_text("mine")
    assert export_script.main(["--model", str(source), "--format", "ct2", "--output", str(tmp_path)]) == 2


def test_the_short_onnx_script_is_the_long_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(*given: Any) -> Path:
        calls.append(given)
        return tmp_path

    monkeypatch.setattr(export_script, "setup_logging", lambda level: None)
    monkeypatch.setattr(export_onnx_script, "export", record)
    assert export_onnx_script.main(["--model", "tiny.en", "--output", str(tmp_path)]) == 0
    assert export_onnx_script.main(["--model", "tiny.en", "--output", str(tmp_path), "--int8"]) == 0
    assert calls == [("tiny.en", "onnx", quantization, tmp_path) for quantization in ("none", "int8")]
