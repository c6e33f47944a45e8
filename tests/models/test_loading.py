"""Folders of every origin load in both engines; those whose weights are not the model's are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from src.inference.engine_base import transcribe
from src.inference.engines import load_engine
from src.inference.options import DecodingOptions
from src.models.loading import load_checkpoint
from src.models.processor import save_processor
from src.models.weights import resolve_weights
from src.utils.config import load_config
from src.utils.errors import ModelError
from tests.models.conftest import change, make_pipe

WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
CONV, NORM = "model.encoder.conv1.weight", "model.decoder.layer_norm.weight"


@pytest.fixture(scope="module")
def whole(_small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of width 16 as this library saves it."""
    model, processor = _small
    folder = tmp_path_factory.mktemp("loading") / "whole"
    model.save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(whole: Path) -> tuple[Any, Any]:
    """Its model and processor; do not change them."""
    return load_checkpoint(whole)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def retensor(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replace the tensors of a folder by what an edit of them leaves."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def of_transformers_5(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    (folder / "normalizer.json").unlink()


def of_2022(folder: Path) -> None:
    """A slow tokenizer; generation settings in config.json, and none of languages."""
    tokens = {
        each["content"]: each["id"] for each in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    tokens = {**json.loads((folder / "vocab.json").read_text()), **tokens}
    texts = {token: at for token, at in tokens.items() if at < 50_256}
    added = {token: at for token, at in tokens.items() if 50_256 <= at <= 50_362}
    (folder / "vocab.json").write_text(json.dumps(texts))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": "<|endoftext|>", "additional_special_tokens": list(added)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    plain = {"tokenizer_class": "WhisperTokenizer", "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**plain, "eos_token": "<|endoftext|>"}))
    (folder / "tokenizer.json").unlink()
    (folder / "processor_config.json").unlink()
    saved = json.loads((folder / GENERATION).read_text())
    (folder / GENERATION).unlink()
    change(
        folder / CONFIG, suppress_tokens=saved["suppress_tokens"], begin_suppress_tokens=[220, 50256], max_length=448,
        forced_decoder_ids=[[1, 50362]], torch_dtype="float32", transformers_version="4.23.1",
    )  # fmt: skip


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for at in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[at::2]}
        weight_map |= dict.fromkeys(part, f"model-0000{at + 1}-of-00002.safetensors")
        save_file(part, folder / f"model-0000{at + 1}-of-00002.safetensors", metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_16_bits(folder: Path, dtype: torch.dtype) -> None:
    retensor(folder, lambda tensors: tensors.update({name: each.to(dtype) for name, each in tensors.items()}))
    change(folder / CONFIG, dtype=str(dtype).removeprefix("torch."))


FORMS: dict[str, Callable[[Path], object]] = {
    "transformers 5": of_transformers_5,
    "slow tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "2022": of_2022,
    "no generation config": lambda folder: (folder / GENERATION).unlink(),
    "old generation config": lambda folder: (folder / GENERATION).write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 50257, "forced_decoder_ids": [[1, 50362]]})
    ),
    "shards": shard,
    "float16": lambda folder: in_16_bits(folder, torch.float16),
    "bfloat16": lambda folder: in_16_bits(folder, torch.bfloat16),
    "no preprocessor": lambda folder: [
        (folder / name).unlink() for name in ("preprocessor_config.json", "processor_config.json")
    ],
    "keys that name code": lambda folder: change(
        folder / CONFIG, auto_map={"AutoConfig": "evil.Config"}, attn_implementation="owner/kernel", num_labels=10**12
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_any_version_is_the_same_model(loaded: Any, folder: Path, form: str, tmp_path: Path) -> None:
    FORMS[form](folder)
    (expected, processor), (model, own) = loaded, load_checkpoint(folder)
    rounded = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(rounded).float()), name
    for key in ("suppress_tokens", "begin_suppress_tokens", "no_timestamps_token_id", "eos_token_id", "max_length"):
        assert getattr(model.generation_config, key) == getattr(expected.generation_config, key), key
    assert model.generation_config.is_multilingual is False
    text = " Four score and <|notimestamps|>"
    assert own.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    ids = [*own.tokenizer(text).input_ids, 50_257]
    assert own.decode(ids, skip_special_tokens=True) == processor.decode(ids, skip_special_tokens=True)
    assert own.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    save_processor(own, tmp_path / "again")


@pytest.mark.parametrize("form", ["transformers 5", "2022", "old generation config", "shards", "bfloat16"])
def test_both_engines_take_it(folder: Path, form: str, tmp_path: Path) -> None:
    FORMS[form](folder)
    config = load_config(None, overrides={"device": "cpu", "paths.cache_dir": str(tmp_path / "cache")})
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10
    found = [
        transcribe(load_engine(folder, config, engine=name, compute_type="float32"), [audio], DecodingOptions())[0]
        for name in ("torch", "ctranslate2")
    ]
    assert found[0].tokens == found[1].tokens


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NORM][3] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CONV] = tensors[CONV].half()
    tensors[CONV][0, 0, 0] = float("inf")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors of it": (lambda f: save_file({"foo": torch.ones(1)}, f / WEIGHTS), r"missing.*1 tensors not .*\.foo"),
    "one missing": (lambda f: retensor(f, lambda t: t.pop(CONV)), f"1 tensors missing .{CONV}"),
    "one more": (lambda f: retensor(f, lambda t: t.update(x=torch.zeros(1))), r"not of this model \(x\)"),
    "adapters inside": (lambda f: retensor(f, lambda t: t.update({f"{NORM}.lora_A": t[NORM] + 1})), "lora_A"),
    "other shape": (lambda f: retensor(f, lambda t: t.update({NORM: torch.zeros(8)})), rf"{NORM} \[8\] instead of"),
    "quantised": (lambda f: retensor(f, lambda t: t.update({NORM: t[NORM].char()})), f"{NORM} is stored as I8"),
    "nan": (lambda f: retensor(f, nan), f"nan.*{NORM}"),
    "infinity": (lambda f: retensor(f, infinite), f"infinity .{CONV}"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 100_000), WEIGHTS),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 4096), WEIGHTS),
    "pickle": (pickled, r"pytorch_model\.bin is not read.*save_pretrained"),
    "shard of elsewhere": (
        lambda f: (shard(f), change(f / f"{WEIGHTS}.index.json", weight_map={"a": "../whole/model.safetensors"})),
        r"index\.json",
    ),
    "shard absent": (lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()), "00002-of-00002"),
    "deep config": (lambda f: (f / CONFIG).write_text("[" * 100_000), r"config\.json.*deep"),
    "no UTF-8": (lambda f: (f / CONFIG).write_bytes(b'{"model_type": "\xff\xfe"}'), r"config\.json"),
    "list": (lambda f: (f / CONFIG).write_text("[]"), r"config\.json"),
    "pipe": (lambda f: make_pipe(f / CONFIG), r"config\.json"),
    "pipe of generation": (lambda f: make_pipe(f / GENERATION), r"generation_config\.json"),
    "pipe of weights": (lambda f: make_pipe(f / WEIGHTS), WEIGHTS),
    "pipe of tokens": (lambda f: [make_pipe(f / "tokenizer.json"), (f / "vocab.json").unlink()], r"tokenizer\.json"),
    "architecture": (lambda f: change(f / CONFIG, model_type="wav2vec2"), "wav2vec2"),
    "terabytes": (lambda f: change(f / CONFIG, d_model=1 << 40), "another shape|describe"),
    "endless layers": (lambda f: change(f / CONFIG, decoder_layers=10**12), "1000000000000 layers"),
    "more heads": (lambda f: change(f / CONFIG, encoder_attention_heads=3), "heads"),
    "no heads": (lambda f: change(f / CONFIG, encoder_attention_heads=0), r"config\.json"),
    "negative": (lambda f: change(f / CONFIG, vocab_size=-1), r"mine"),
    "text": (lambda f: change(f / CONFIG, d_model="16"), r"config\.json.*d_model"),
    "activation": (lambda f: change(f / CONFIG, activation_function="boom"), "boom"),
    "context": (lambda f: change(f / CONFIG, audio_context="short"), "audio_context.*'short'"),
    "rates": (lambda f: change(f / CONFIG, tokens_per_sec={"en": -1}), "tokens_per_sec"),
    "suppressed": (lambda f: change(f / GENERATION, suppress_tokens=[1, 99_999]), "suppress_tokens.*99999"),
    "heads listed": (lambda f: change(f / GENERATION, alignment_heads=[["a", 0]]), "alignment_heads"),
    "task": (lambda f: change(f / GENERATION, task="summarise"), "task.*'summarise'"),
    "tokenizer cut": (lambda f: os.truncate(f / "tokenizer.json", 5_000), "mine.*tokenizer"),
    "tokenizer of others": (lambda f: (f / "tokenizer.json").write_text("{}"), "mine.*tokenizer"),
    "state": (lambda f: [(f / CONFIG).unlink(), (f / "state.json").touch()], "state of a training"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_the_models_is_refused_and_named(folder: Path, harm: str, engine: Any, tmp_path: Path) -> None:
    damage, message = HARMS[harm]
    damage(folder)
    config = load_config(None, overrides={"device": "cpu", "paths.cache_dir": str(tmp_path / "cache")})
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        load_engine(folder, config, engine=engine)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_the_tokenizer_of_another_model_is_refused(folder: Path, base: tuple[Any, Any]) -> None:
    save_processor(base[1], folder)
    with pytest.raises(ModelError, match=r"mine.*another model's: 51865 tokens"):
        load_checkpoint(folder)


def test_of_two_multilingual_signs_none_may_contradict(small: Any, base: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = small
    model.config.decoder_start_token_id, model.config.eos_token_id = 50_258, 50_257
    model.save_pretrained(tmp_path)
    save_processor(processor, tmp_path)
    with pytest.raises(ModelError, match="another model's"):
        load_checkpoint(tmp_path)
    model.resize_token_embeddings(51_865)
    model.config.decoder_start_token_id, model.config.eos_token_id = 50_257, 50_256  # defaults of `WhisperConfig`
    model.save_pretrained(tmp_path)
    save_processor(base[1], tmp_path)
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.generation_config.is_multilingual


# adapters of PEFT


def save_adapter(folder: Path, base_dir: Path, base: str, settings: Any = None) -> Any:
    """Save an adapter with random weights; return the model with it."""
    model, _ = load_checkpoint(base_dir)
    adapted = get_peft_model(model, settings or LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=base)
    return adapted.base_model.model


def test_an_adapter_is_merged_into_its_base_once(whole: Path, tmp_path: Path) -> None:
    adapted = save_adapter(tmp_path / "lora", whole, str(whole)).eval()
    found = resolve_weights(str(tmp_path / "lora"), cache_dir=tmp_path / "cache")
    assert found.source.startswith("PEFT adapter")
    model, _ = load_checkpoint(found.path)
    features, ids = torch.randn(1, 80, 3_000), torch.tensor([[50_257, 50_362, 5]])
    with torch.inference_mode():
        expected = adapted(features, decoder_input_ids=ids).logits
        assert torch.allclose(model(features, decoder_input_ids=ids).logits, expected, atol=1e-5)
        assert not torch.allclose(
            load_checkpoint(whole)[0](features, decoder_input_ids=ids).logits, expected, atol=1e-2
        )
    assert resolve_weights(str(tmp_path / "lora"), cache_dir=tmp_path / "cache") == found
    config = load_config(None, overrides={"device": "cpu", "paths.cache_dir": str(tmp_path / "cache")})
    for engine in ("torch", "ctranslate2"):
        assert load_engine(tmp_path / "lora", config, engine=engine, compute_type="float32").name == engine  # type: ignore[arg-type]


def test_an_adapters_base_is_found_offline_by_its_name_on_the_hub(tiny_en: tuple[Any, Any], tmp_path: Path) -> None:
    stock = resolve_weights("tiny.en", cache_dir=load_config(None).paths.cache_dir).path
    save_adapter(tmp_path / "lora", stock, "openai/whisper-tiny.en")
    found = resolve_weights(str(tmp_path / "lora"), cache_dir=load_config(None).paths.cache_dir)
    shutil.rmtree(found.path)
    assert "openai/whisper-tiny.en (package" in found.source


ADAPTER, ADAPTED = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "base absent": (lambda f: change(f / ADAPTER, base_model_name_or_path="/content/no/base"), "/content/no/base"),
    "base unknown": (lambda f: change(f / ADAPTER, base_model_name_or_path="me/none"), "me/none"),
    "no base": (lambda f: change(f / ADAPTER, base_model_name_or_path=None), "base_model_name_or_path"),
    "base a list": (lambda f: change(f / ADAPTER, base_model_name_or_path=["a"]), "base_model_name_or_path"),
    "its own base": (lambda f: change(f / ADAPTER, base_model_name_or_path=str(f)), "an adapter itself"),
    "base no name": (lambda f: change(f / ADAPTER, base_model_name_or_path="a" * 5_000), "which cannot be loaded"),
    "kind": (lambda f: change(f / ADAPTER, peft_type="MAGIC"), "MAGIC"),
    "deep": (lambda f: (f / ADAPTER).write_text("[" * 100_000), ADAPTER),
    "pipe": (lambda f: make_pipe(f / ADAPTED), ADAPTED),
    "pickle": (lambda f: (f / ADAPTED).rename(f / "adapter_model.bin"), "safe_serialization"),
    "empty": (lambda f: (f / ADAPTED).write_bytes(b""), ADAPTED),
    "missing": (lambda f: save_file(dict(list(load_file(f / ADAPTED).items())[1:]), f / ADAPTED), "1 tensors missing"),
    "more": (lambda f: save_file({**load_file(f / ADAPTED), "x": torch.ones(1)}, f / ADAPTED), "not of this model"),
    "nan": (lambda f: save_file({k: v * torch.nan for k, v in load_file(f / ADAPTED).items()}, f / ADAPTED), "nan"),
    "rank": (lambda f: change(f / ADAPTER, r=10**12), "lora"),
    "pissa": (lambda f: change(f / ADAPTER, init_lora_weights="pissa"), "pissa"),
    "two models": (lambda f: save_file({"a": torch.ones(1)}, f / WEIGHTS), "a whole model .* and a PEFT adapter"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    save_adapter(folder, whole, str(whole))
    return folder


@pytest.mark.parametrize("harm", ADAPTER_HARMS)
def test_an_adapter_that_cannot_be_merged_is_refused_and_named(adapter: Path, harm: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    damage, message = ADAPTER_HARMS[harm]
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        resolve_weights(str(folder), cache_dir=tmp_path / "cache")
    assert str(folder) in str(caught.value)


def test_an_adapter_without_weights_to_add_is_refused(whole: Path, tmp_path: Path) -> None:
    settings = PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1)
    model, _ = load_checkpoint(whole)
    get_peft_model(model, settings).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match=r"prompt: a PEFT adapter of .* cannot be merged"):
        resolve_weights(str(tmp_path / "prompt"), cache_dir=tmp_path / "cache")
