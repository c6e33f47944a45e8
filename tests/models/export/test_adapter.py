from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from scripts import export as export_script
from src.models.export.adapter import export_peft
from src.models.export.huggingface import ADAPTERS_FILE, export_huggingface
from src.models.export.verify import bundled_clips
from src.models.loading import load_checkpoint
from src.models.weights import base_settings, resolve_weights
from src.training.methods import adapter_settings, merged_model, prepare_model, trainable
from src.training.state import model_tensors
from src.utils.config import LoRAConfig, TrainingConfig
from src.utils.errors import ModelError

CLIPS = bundled_clips()[:1]


def make_run(small: Any, folder: Path) -> tuple[Any, Path, Path]:
    """Return a merged model, the folder that a LoRA training wrote of it, and its base model's."""
    model, processor = small
    base = export_huggingface(model, processor, folder / "stock", verify_clips=CLIPS)
    prepare_model(model, TrainingConfig(method="lora", lora=LoRAConfig(rank=4, alpha=8)))
    model.audio_context = "dynamic"
    model.config.tokens_per_sec = {"de": 7.5}
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter)
    merged = merged_model(model.eval())
    tuned = export_huggingface(
        merged, processor, folder / "tuned", verify_clips=CLIPS,
        adapters=model_tensors(model), adapter_settings=adapter_settings(model, str(base)),
    )  # fmt: skip
    return merged, tuned, base


def logits(model: Any, frames: int) -> torch.Tensor:
    features = torch.linspace(-1, 1, 80 * frames).reshape(1, 80, frames)
    with torch.inference_mode():
        found: torch.Tensor = model(features, decoder_input_ids=torch.tensor([[50258, 50259, 50359]])).logits
    return found


def test_adapters_of_a_training_are_a_folder_of_peft(
    small_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, tuned, base = make_run(small_base, tmp_path)
    out = export_peft(tuned, tmp_path / "peft", cache_dir=tmp_path / "cache")  # transcribes with both
    same = ["--model", str(tuned), "--format", "peft", "--output", str(tmp_path / "same")]
    monkeypatch.setattr(export_script, "setup_logging", lambda level: None)  # it would last
    assert export_script.main(same) == 0
    saved, again = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "same"))
    assert saved.keys() == again.keys()
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["inference_mode"]
    stock = WhisperForConditionalGeneration.from_pretrained(base)
    adapted = PeftModel.from_pretrained(stock, out).eval()
    merged.audio_context = "full"
    assert torch.allclose(logits(adapted, 3_000), logits(merged, 3_000), atol=1e-4)
    assert float((logits(adapted, 3_000) - logits(load_checkpoint(base)[0], 3_000)).abs().max()) > 0.01

    # the way back: as any model's name, with what the training said of lengths and languages
    model, _ = load_checkpoint(resolve_weights(str(out), cache_dir=tmp_path / "cache").path)
    assert (model.audio_context, model.config.tokens_per_sec) == ("dynamic", {"de": 7.5})
    model.audio_context = "full"
    assert torch.allclose(logits(model, 3_000), logits(merged, 3_000), atol=1e-4)


def test_what_has_no_adapters_of_its_base_is_refused(small_base: Any, tmp_path: Path) -> None:
    _, tuned, base = make_run(small_base, tmp_path)

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            export_peft(folder, tmp_path / "peft", cache_dir=tmp_path / "cache")
        assert not (tmp_path / "peft").exists()

    refused(base, r"stock: no adapters\.safetensors: .*training\.method: lora")
    weights = load_file(base / "model.safetensors")
    weights["model.decoder.layer_norm.bias"] += torch.linspace(-5, 5, len(weights["model.decoder.layer_norm.bias"]))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    refused(tuned, r"peft: .*stock with its adapters .* was not saved")
    save_file(load_file(tuned / ADAPTERS_FILE), tuned / ADAPTERS_FILE)
    refused(tuned, r"adapters\.safetensors: says nothing of rank")
    (tuned / ADAPTERS_FILE).write_bytes(b"nothing")
    refused(tuned, r"adapters\.safetensors: damaged")


def test_a_base_model_is_named_as_the_hub_names_it(tmp_path: Path) -> None:
    named = {
        "tiny.en": ("openai/whisper-tiny.en", None),
        "me/whisper@v2": ("me/whisper", "v2"),
        str(tmp_path): (str(tmp_path), None),
    }
    for given, (name, revision) in named.items():
        assert base_settings(given) == {"base_model_name_or_path": name, "revision": revision}
