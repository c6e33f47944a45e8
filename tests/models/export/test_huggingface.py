from __future__ import annotations

import copy
import errno
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from scripts import export as export_script
from scripts import export_onnx as export_onnx_script
from src.data.audio import load_audio
from src.data.labels import LabelEncoder
from src.data.loader import create_loader
from src.data.utterance import Utterance
from src.models.ct2_to_hf import convert_ct2_to_hf
from src.models.dynamic_context import DynamicWhisper, get_cap_rates
from src.models.export import ctranslate2 as ct2_export
from src.models.export import huggingface as export
from src.models.export import verify as export_check
from src.models.export.ctranslate2 import export_ctranslate2
from src.models.export.huggingface import export_huggingface
from src.utils.config import Config, ModelConfig
from src.utils.errors import ModelError


@pytest.mark.slow
def test_huggingface_export_loads_in_stock_classes_and_replaces_an_older_one(tiny_en: Any, tmp_path: Path) -> None:
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


def add_bias(model: Any, processor: Any, folder: Path) -> None:
    model.model.encoder.conv1.bias.data.add_(1)


def suppress_words(model: Any, processor: Any, folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["suppress_tokens"] += processor.tokenizer(" be But", add_special_tokens=False).input_ids
    (folder / "generation_config.json").write_text(json.dumps(settings))


def fill_the_disk(*given: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (add_bias, ModelError, r"model\.encoder\.conv1\.bias"),
        pytest.param(suppress_words, ModelError, r"\d+%.* 0%", marks=pytest.mark.slow),
        (fill_the_disk, OSError, "No space left"),
    ],
)
def test_an_export_that_fails_or_differs_from_the_model_leaves_the_older_one(
    tiny_en: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, error: Any, named: str
) -> None:
    tiny_en[0].audio_context = "dynamic"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    save = export._save

    def save_damaged(*given: Any) -> None:
        save(*given)
        damage(*given)

    monkeypatch.setattr(export, "_save", save_damaged)
    with pytest.raises(error, match=named):
        export_huggingface(*tiny_en, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_clips_and_languages_that_cannot_be_verified_with_are_refused(tiny_en: Any, jfk: np.ndarray) -> None:
    model, processor = tiny_en
    for clips in ([], [np.concatenate([jfk] * 3)]):
        with pytest.raises(ModelError, match="30 s"):
            export_check.verify_transcripts(model, processor, lambda batch: [], name="x", clips=clips)
    generation = model.generation_config
    generation.is_multilingual, generation.lang_to_id, generation.language = True, {"<|de|>": 1}, "den"
    with pytest.raises(ModelError, match="'den'"):
        export_check.prepare_batch(model, processor.tokenizer, [jfk])
    generation.language = "german"
    assert export_check.prepare_batch(model, processor.tokenizer, [jfk]).spoken["language"] == ["<|de|>"]


def test_a_folder_of_something_else_is_left_alone_and_a_wrapped_model_refused(tiny_en: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        export_huggingface(*tiny_en, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(ModelError, match="merge_and_unload"):
        export_huggingface(nn.Sequential(tiny_en[0]), tiny_en[1], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "float16"])
def test_ctranslate2_export_is_complete(tiny_en: Any, tmp_path: Path, quantization: str, jfk: np.ndarray) -> None:
    model, processor = tiny_en
    out = export_ctranslate2(
        model, tmp_path / "out", processor=processor, quantization=quantization, verify_clips=[jfk, jfk[: 16_000 * 4]]
    )
    names = ["config.json", "model.bin", "preprocessor_config.json", "tokenizer.json", "vocabulary.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "config.json").read_text())["audio_context"] == "full"


SENTENCES = ["ჩემმა ძმამ გუშინ საღამოს სამი კილო ვაშლი იყიდა.", "ბიჭმა გასულ კვირას ძველი ველოსიპედი ნახა."]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng makes the speech")
def test_exports_of_a_model_tuned_to_another_language_are_saved_and_broken_ones_refused(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = "ka"  # test_languages exports others
    model, processor = copy.deepcopy(base[0]), base[1]
    clips = []
    for at, text in enumerate(SENTENCES):
        spoken = ["espeak-ng", "-v", language, "-w", str(tmp_path / f"{at}.wav"), text]
        subprocess.run(spoken, check=True)
        clips.append(export_check.SpokenClip(load_audio(tmp_path / f"{at}.wav"), language))
    batch = export_check.prepare_batch(model, processor.tokenizer, clips)
    encoder = LabelEncoder(processor.tokenizer, language=language)
    labels = [encoder.encode(text) for text in SENTENCES]
    optimizer = torch.optim.AdamW(model.model.decoder.parameters(), lr=2e-5)
    with torch.no_grad():
        heard = model.get_encoder()(batch.features).last_hidden_state
    for _ in range(3):
        for row, label in enumerate(labels):
            ids, wanted = torch.tensor([label.decoder_input_ids]), torch.tensor([label.labels])
            states = model.model.decoder(input_ids=ids, encoder_hidden_states=heard[row : row + 1]).last_hidden_state
            nn.functional.cross_entropy(model.proj_out(states)[0], wanted[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.language = language
    source = export_huggingface(model, processor, tmp_path / "hf", verify_clips=clips)
    assert [clip.language for clip in export_check.load_clips(source)] == [language] * 2
    for quantization in ("int8", "float16"):
        out = export_ctranslate2(source, tmp_path / quantization, quantization=quantization)
        assert json.loads((out / "config.json").read_text())["language"] == language
    (source / export_check.CLIPS_FILE).unlink()
    export_ctranslate2(source, tmp_path / "int8", quantization="int8")  # with English clips in this language

    convert = ct2_export.WhisperLoader.get_model_spec

    def convert_damaged(self: Any, model: Any) -> Any:
        damaged = copy.deepcopy(model)
        damaged.model.decoder.layers[-1].fc1.weight.data.zero_()
        return convert(self, damaged)

    monkeypatch.setattr(ct2_export.WhisperLoader, "get_model_spec", convert_damaged)
    for given in (clips, None):
        with pytest.raises(ModelError, match=r"20%.*nats"):
            export_ctranslate2(source, tmp_path / "broken", quantization="int8", verify_clips=given)
    assert not (tmp_path / "broken").exists()


@pytest.mark.slow
def test_own_settings_survive_export_and_conversion_back(tiny_en: Any, tmp_path: Path) -> None:
    model, processor = tiny_en
    model.audio_context, model.config.tokens_per_sec = "dynamic", {"en": 12.5}
    export_ctranslate2(model, tmp_path / "ct2", processor=processor, quantization="float32")
    back = DynamicWhisper.from_pretrained(convert_ct2_to_hf(tmp_path / "ct2", tmp_path / "hf"))
    assert (back.audio_context, get_cap_rates(back.config)) == ("dynamic", {"en": 12.5})
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in back.state_dict().items())


@pytest.mark.slow
def test_export_that_says_something_else_is_removed(
    tiny_en: Any, tmp_path: Path, jfk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_en
    convert = ct2_export.WhisperLoader.get_model_spec

    def convert_damaged(self: Any, model: Any) -> Any:
        damaged = copy.deepcopy(model)
        damaged.model.decoder.layers[0].fc1.weight.data.zero_()
        return convert(self, damaged)

    monkeypatch.setattr(ct2_export.WhisperLoader, "get_model_spec", convert_damaged)
    with pytest.raises(ModelError, match="20%"):
        export_ctranslate2(model, tmp_path / "out", processor=processor, verify_clips=[jfk])
    assert list(tmp_path.iterdir()) == []


def test_what_ctranslate2_cannot_hold_is_not_exported(tiny_en: Any, tmp_path: Path) -> None:
    model, processor = tiny_en
    with pytest.raises(ModelError, match=r"'int4'.*int8"):
        export_ctranslate2(tmp_path, tmp_path / "out", quantization="int4")
    with pytest.raises(ModelError, match="processor="):
        export_ctranslate2(model, tmp_path / "out")
    model.generation_config.alignment_heads = [[31, 0]]
    with pytest.raises(ModelError, match=r"\(31, 0\).* 4 layers"):
        export_ctranslate2(model, tmp_path / "out", processor=processor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expected", "found", "rate"),
    [
        (["a b c d"], ["a b x d e"], 0.5),
        (["", "a b"], ["", "a b"], 0.0),
        ([""], ["a"], 1.0),
        (["a b c d", "x y", "z", "z"], ["a b", "x y", "z", "z"], 0.125),
        (["a", "b"], ["a a a a a", "b"], 0.5),
    ],
)
def test_word_mismatch_counts_edits_over_the_words_of_the_source(
    expected: list[str], found: list[str], rate: float
) -> None:
    assert export_check.word_mismatch(expected, found) == rate


def test_word_mismatch_counts_characters_where_words_have_no_spaces_between_them() -> None:
    assert export_check.word_mismatch(["他昨天 买了书"], ["他昨天卖了书"], ["zh"]) == pytest.approx(1 / 6)
    assert export_check.word_mismatch(["他 昨天"], ["他昨天"], ["ja"]) == 0
    assert export_check.word_mismatch(["मेरा नाम"], ["मेरी नाम"], ["hi"]) == 0.5


def test_clips_are_kept_in_16_bits_with_their_languages(
    small_base: Any, sample: list[Utterance], config: Config, tmp_path: Path, jfk: np.ndarray
) -> None:
    codes = ["hi", "hi", "hi", "hi", "hi", "zh", "de"]
    clips = [replace(u, language=code, duration_sec=3.0) for u, code in zip(sample, codes, strict=False)]
    loader = create_loader(clips, small_base[1], config.model_copy(update={"model": ModelConfig()}))
    chosen = export_check.choose_clips(loader, 42)
    assert len(chosen) == 5
    assert [clip.language for clip in chosen] == [clip.language for clip in export_check.choose_clips(loader, 42)]
    assert {"hi", "zh", "de"} == {clip.language for clip in chosen}
    assert export_check.choose_clips([], 42) == ()  # a list of batches

    long = export_check.SpokenClip(jfk, "en")
    export_check.save_clips([*chosen, long], tmp_path)
    kept = export_check.load_clips(tmp_path)
    assert [clip.language for clip in kept] == [*(clip.language for clip in chosen), "en"]
    assert np.abs(kept[-1].audio - jfk).max() < 1e-4
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(".")  # push_to_hub leaves it out
    assert file.stat().st_size < 2 * sum(len(clip.audio) for clip in kept) + 2_000
    for damaged in (file.read_bytes()[:-1], b"{}"):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"verification_clips.*delete it"):
            export_check.load_clips(tmp_path)
    file.unlink()
    assert export_check.load_clips(tmp_path) == ()


def test_a_clip_is_decoded_in_its_language_with_a_limit_that_fits_it(small_base: Any, jfk: np.ndarray) -> None:
    model, processor = small_base
    clips = [export_check.SpokenClip(jfk[:32_000], code) for code in ("ka", "yue", "de")]
    batch = export_check.prepare_batch(model, processor.tokenizer, clips)
    assert batch.spoken["language"] == ["<|ka|>", "<|zh|>", "<|de|>"]  # base has no token for Cantonese
    assert batch.max_new_tokens == 8 + 2 * 97.5  # 39 tokens per second are ordinary in Georgian
    model.config.tokens_per_sec = {"de": 30.0}
    for code, cap in (("de", 8 + 2 * 30), ("hi", 8 + 2 * 42.5), ("en", 8 + 2 * 10)):
        batch = export_check.prepare_batch(model, processor.tokenizer, [export_check.SpokenClip(jfk[:32_000], code)])
        assert batch.max_new_tokens == cap
    model.generation_config.language, model.generation_config.task = "hi", "translate"
    batch = export_check.prepare_batch(model, processor.tokenizer, [jfk])
    assert (batch.spoken["language"], batch.languages) == (["<|hi|>"], ["en"])


def test_a_text_that_goes_another_way_after_a_close_call_is_judged_by_the_source(small_base: Any) -> None:
    """A random model that writes nonsense; its exports write other nonsense, as likely or not."""
    model, processor = small_base
    clips = export_check.bundled_clips()[:2]
    end = processor.tokenizer.eos_token_id
    batch = export_check.prepare_batch(model, processor.tokenizer, clips)
    own = batch.written(batch.generate(model), end)
    assert export_check.worst_gaps(model, batch, own) == [0.0, 0.0]
    exact = {"name": "x", "clips": clips}
    assert export_check.verify_transcripts(model, processor, lambda batch: batch.generate(model), **exact) == 0
    # the first token is the second choice: a close call in this model
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.proj_out.weight[own[0][0]] *= 0.5
    nonsense = batch.written(batch.generate(other), end)
    assert nonsense != own
    gap = max(export_check.worst_gaps(model, batch, nonsense))
    assert 0 < gap < 2
    assert export_check.verify_transcripts(
        model, processor, lambda batch: batch.generate(other), name="x", clips=clips, quantised=True
    ) > 0.2  # fmt: skip
    # texts that end at once, and tokens that the source may not write
    for broken in ([[end], [end]], [[model.generation_config.suppress_tokens[3], end]] * 2):
        with pytest.raises(ModelError, match=r"100%.*20%.*nats"):
            export_check.verify_transcripts(
                model, processor, lambda batch, rows=broken: rows, name="x", clips=clips, quantised=True
            )


def test_provenance_and_adapters_lie_beside_the_model(tiny_en: Any, tmp_path: Path) -> None:
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


def test_a_provenance_that_is_absent_or_damaged_says_nothing(tmp_path: Path) -> None:
    for content in (None, "{", "[1]", "\xff"):
        if content is not None:
            (tmp_path / "provenance.json").write_text(content, encoding="latin-1")
        assert export.read_provenance(tmp_path) == {}


@pytest.mark.slow
def test_the_scripts_export_a_checkpoint_and_say_errors_in_one_line(
    tiny_en: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_script, "setup_logging", lambda level: None)  # it would last, and take pytest's handlers
    model, processor = tiny_en
    model.audio_context = "dynamic"
    source, out = export_huggingface(model, processor, tmp_path / "source"), tmp_path / "out"
    assert export_script.main(["--model", str(source), "--format", "ct2", "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    assert (out / "model.bin").is_file()
    for given, said in (
        (["--model", str(source), "--format", "hf", "--quantization", "int8"], "--quantization int8"),
        (["--model", str(source), "--format", "onnx", "--quantization", "q4"], "'q4'"),
        (["--model", str(source), "--format", "ggml", "--quantization", "q5_0"], "--quantization q5_0"),
        (["--model", str(source), "--format", "peft"], "adapters.safetensors"),
        (["--model", "tinny", "--format", "ct2"], "ModelError: 'tinny'"),
        (["--model", str(tmp_path / "gone"), "--format", "ct2"], "gone"),
    ):
        assert export_script.main([*given, "--output", str(tmp_path / "other")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    (tmp_path / "thesis.txt").write_text("mine")
    assert export_script.main(["--model", str(source), "--format", "ct2", "--output", str(tmp_path)]) == 2


def test_the_short_onnx_script_is_the_long_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = Mock(return_value=tmp_path)
    monkeypatch.setattr(export_script, "setup_logging", lambda level: None)
    monkeypatch.setattr(export_script, "export", record)
    assert export_onnx_script.main(["--model", "tiny.en", "--output", str(tmp_path)]) == 0
    assert export_onnx_script.main(["--model", "tiny.en", "--output", str(tmp_path), "--int8"]) == 0
    assert record.call_args_list == [call("tiny.en", "onnx", each, tmp_path) for each in ("none", "int8")]
