from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import import_utils
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from src.models.export.huggingface import export_huggingface
from src.training.loss import TokenLoss
from src.training.methods import (
    HalfCopy,
    check_shardable,
    choose_method,
    has_adapters,
    merged_model,
    prepare_model,
    record_languages,
    shard_model,
    trainable,
)
from src.training.state import model_tensors
from src.training.updates import build_optimizer
from src.utils.config import LoRAConfig, TrainingConfig
from src.utils.errors import ConfigError, DeviceError, ModelError


def make_batch(model: Any, frames: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 80, frames, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 6), generator=generator)
    return features, tokens, tokens.roll(-1, 1)


@torch.no_grad()
def logits(model: Any, frames: int = 60) -> Tensor:
    features, tokens, _ = make_batch(model, frames)
    found: Tensor = model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
    return found


def assert_close_logits(found: Any, expected: Any, frames: int = 60) -> None:
    wanted = logits(expected, frames)
    assert torch.allclose(logits(found, frames), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


def train(model: Any, config: TrainingConfig, updates: int = 2, rate: float = 1e-2) -> set[str]:
    """Update a few times; return the names of the parameters that changed."""
    model.audio_context = "dynamic"
    prepare_model(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, learning_rate=rate, weight_decay=0.1)
    loss = TokenLoss(model).train()
    for _ in range(updates):
        optimizer.zero_grad()
        loss(*make_batch(model)).backward()
        optimizer.step()
    model.eval()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("settings", "d_model", "method"),
    [
        ({}, 768, "full"), ({}, 1024, "lora"), ({"freeze_encoder": 2}, 1024, "full"),
        ({"method": "full"}, 1280, "full"), ({"method": "lora"}, 384, "lora"),
    ],
)  # fmt: skip
def test_the_method_goes_by_the_models_width(settings: dict[str, Any], d_model: int, method: str) -> None:
    assert choose_method(TrainingConfig(**settings), d_model)[0] == method


POSITIONS = "model.encoder.embed_positions.weight"


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [
        (False, (POSITIONS,)),  # sinusoids are never trained
        (True, ("model.encoder.",)),
        (1, ("model.encoder.conv", POSITIONS, "model.encoder.layers.0.")),
        (2, ("model.encoder.conv", POSITIONS, "model.encoder.layers.")),
    ],
)
def test_full_training_changes_everything_that_is_not_frozen(
    small: tuple[Any, Any], freeze: bool | int, kept: tuple[str, ...]
) -> None:
    model = small[0].half()  # master weights are float32, whatever the checkpoint's type
    names = {name for name, _ in model.named_parameters()}
    changed = train(model, TrainingConfig(freeze_encoder=freeze))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert changed == {name for name in names if not name.startswith(kept)}


def test_a_model_is_thawed_and_its_checkpointing_set_by_the_next_training(small: tuple[Any, Any]) -> None:
    model, _ = small
    prepare_model(model, TrainingConfig(freeze_encoder=True, gradient_checkpointing=True))
    prepare_model(model, TrainingConfig())
    assert not model.is_gradient_checkpointing
    assert len(trainable(model)) == len(list(model.parameters())) - 1
    with pytest.raises(ModelError, match=r"freeze_encoder: 3 .* 2 "):  # more layers than there are
        prepare_model(model, TrainingConfig(freeze_encoder=3))


# adapters


def test_adapters_alone_are_trained_and_sit_where_they_are_asked_for(small: tuple[Any, Any]) -> None:
    model = small[0]
    config = TrainingConfig(method="lora", lora=LoRAConfig(target_modules=("q_proj", "fc2"), rank=4))
    model.audio_context = "dynamic"
    before = logits(model)
    prepare_model(model, config)
    assert torch.equal(logits(model), before)  # untrained adapters change nothing
    changed = train(model, config)
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in changed)
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in changed}
    assert modules == {"q_proj", "fc2"}
    assert len(changed) == 2 * (2 * 2 + 2 * 3)  # A and B: fc2 and q_proj of two layers, and of cross attention


def test_merged_adapters_give_their_outputs_and_the_source_stays_bit_identical(
    small: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = small
    assert merged_model(model) is model
    model.audio_context = "dynamic"
    stock = logits(model)
    train(model, TrainingConfig(method="lora", lora=LoRAConfig(rank=8, dropout=0.1)), rate=1e-1)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    plain = merged_model(model)
    assert not has_adapters(plain)
    assert_close_logits(plain, model)
    assert float((expected - stock).abs().max()) > 0.01  # they do something
    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(model), expected)
    assert plain.generation_config.to_dict() == model.generation_config.to_dict()
    assert (plain.audio_context, plain.training) == ("dynamic", model.training)
    model.audio_context = "full"
    assert plain.audio_context == "dynamic"
    export_huggingface(merged_model(model), processor, tmp_path / "out", adapters=model_tensors(model))
    assert_close_logits(WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), model, 3_000)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_second_training_begins_below_the_adapters_of_the_first(small: tuple[Any, Any], method: Any) -> None:
    model, _ = small
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_model(model, TrainingConfig(method="lora"))
    names = set(model.state_dict())
    for parameter in trainable(model):
        torch.nn.init.ones_(parameter)
    prepare_model(model, TrainingConfig(method=method))
    assert has_adapters(model) == (method == "lora")
    assert set(model.state_dict()) == (names if method == "lora" else set(before))
    plain = merged_model(model).state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("names", [("q_proj", "nonsense"), ("proj_out",), ()])
def test_unknown_target_modules_are_refused(small: tuple[Any, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=r"target_modules.*fc1, fc2, k_proj"):
        prepare_model(small[0], TrainingConfig(method="lora", lora=LoRAConfig(target_modules=names)))


@pytest.fixture
def old_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torchao that Colab ships, which PEFT refuses."""
    (tmp_path / "site" / "torchao").mkdir(parents=True)
    (tmp_path / "site" / "torchao" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    info = tmp_path / "site" / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    import_utils.is_torchao_available.cache_clear()
    yield
    import_utils.is_torchao_available.cache_clear()


def test_adapters_work_beside_a_torchao_that_peft_refuses(small: tuple[Any, Any], old_torchao: None) -> None:
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        import_utils.is_torchao_available()
    model, _ = small
    train(model, TrainingConfig(method="lora"))
    assert_close_logits(merged_model(model), model)


# memory


@pytest.mark.parametrize("settings", [{}, {"freeze_encoder": 1}, {"freeze_encoder": True}, {"method": "lora"}])
def test_gradient_checkpointing_gives_the_same_gradients(small: tuple[Any, Any], settings: dict[str, Any]) -> None:
    found: list[dict[str, Tensor]] = []
    recomputed: list[bool] = []
    for checkpointing in (False, True):
        model = copy.deepcopy(small[0])
        model.audio_context = "dynamic"
        torch.manual_seed(0)
        lora = LoRAConfig(dropout=0.1)  # the second pass must draw what the first drew
        prepare_model(model, TrainingConfig(gradient_checkpointing=checkpointing, lora=lora, **settings))
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter)
        calls: list[nn.Module] = []
        model.model.decoder.layers[0].fc1.register_forward_hook(lambda m, i, o, calls=calls: calls.append(m))
        torch.manual_seed(1)
        TokenLoss(model).train()(*make_batch(model)).backward()
        recomputed.append(len(calls) == 2)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert recomputed == [False, True]
    assert set(found[0]) == set(found[1])
    assert all(torch.allclose(gradient, found[1][name], atol=1e-6) for name, gradient in found[0].items())


# shards


def test_one_process_holds_the_whole_model(small: tuple[Any, Any]) -> None:
    assert shard_model(TokenLoss(small[0]), TrainingConfig(shard_model=True), mixed_precision="no") is None


@pytest.mark.parametrize(
    ("settings", "precision", "error", "named"),
    [
        ({}, "fp16", DeviceError, "float16"),
        ({"compile": True}, "no", ConfigError, "compile: True"),
        ({"optimizer": "adamw_8bit"}, "bf16", ConfigError, "optimizer: adamw_8bit"),
        ({}, "no", ModelError, "decoder_layerdrop"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    small: tuple[Any, Any], settings: dict[str, Any], precision: str, error: type[Exception], named: str
) -> None:
    small[0].config.decoder_layerdrop = 0.1 if named == "decoder_layerdrop" else 0.0
    with pytest.raises(error, match=named):
        check_shardable(small[0], TrainingConfig(**settings), precision)


@pytest.mark.parametrize(
    ("rows", "task", "language", "rates"),
    [
        ([("hi", 45.04), ("hi", 45.04)], "transcribe", "hi", {"ta": 20.0, "hi": 45.0}),
        ([("hi", 30.0), ("en", 3.0)], "transcribe", None, {"ta": 20.0, "hi": 30.0, "en": 3.0}),
        ([("hi", 3.0)], "translate", "hi", {"ta": 20.0, "hi": 3.0}),
    ],
)
def test_a_model_says_the_languages_and_rates_of_its_training_data(
    small: Any, rows: Any, task: str, language: str | None, rates: dict[str, float]
) -> None:
    model = small[0]
    model.config.tokens_per_sec = {"ta": 20.0}  # of an earlier training
    utterances = [SimpleNamespace(language=code) for code, _ in rows]
    dataset: Any = SimpleNamespace(utterances=utterances, token_rates=lambda: dict(rows))
    record_languages(model, dataset, task)
    assert model.config.tokens_per_sec == rates
    assert getattr(model.generation_config, "language", None) is None  # an English-only model
    model.generation_config.is_multilingual = True
    record_languages(model, dataset, task)
    assert (model.generation_config.language, model.generation_config.task) == (language, task)
    assert merged_model(model).config.tokens_per_sec == rates


def test_a_checkpoint_names_languages_as_its_model_knows_them(small: Any) -> None:
    model, rows = small[0], [("yue", 12.0), ("zh", 9.0)]
    model.generation_config.is_multilingual, model.config.tokens_per_sec = True, None
    dataset: Any = SimpleNamespace(
        utterances=[SimpleNamespace(language=code) for code, _ in rows], token_rates=lambda: dict(rows)
    )
    for known, language, rates in ((("zh",), "zh", {"zh": 12.0}), (("zh", "yue"), None, {"yue": 12.0, "zh": 9.0})):
        model.generation_config.lang_to_id = {f"<|{code}|>": 1 for code in known}
        record_languages(model, dataset, "transcribe")
        assert (model.generation_config.language, model.config.tokens_per_sec) == (language, rates)


def test_a_half_copy_computes_with_the_weights_of_now_and_adds_up_gradients_in_float32(small: tuple[Any, Any]) -> None:
    model = small[0].float()
    model.requires_grad_(True)
    half = HalfCopy(model, torch.bfloat16)
    assert half.model.config is model.config
    assert half.model.proj_out.weight is half.model.model.decoder.embed_tokens.weight  # ties hold
    weight, copied = model.proj_out.weight, half.model.proj_out.weight
    for value in (1.0, 2**-10):  # in 16 bits the second would be lost
        copied.grad = torch.full_like(copied, value)
        half.collect()
        assert copied.grad is None
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full_like(weight, 1 + 2**-10))
    with torch.no_grad():
        weight.fill_(3.0)
    half.refresh()
    assert torch.equal(copied, torch.full_like(copied, 3.0))
