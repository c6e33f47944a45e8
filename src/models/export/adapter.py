"""Adapters of a LoRA training as a folder of PEFT: small, not merged, for `PeftModel.from_pretrained`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Linear

from src.models.export.huggingface import ADAPTER_SETTINGS, ADAPTERS_FILE, loaded_source, new_export
from src.models.export.verify import Clips, verify_transcripts
from src.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from src.models.loading import load_checkpoint
from src.models.processor import save_processor
from src.models.weights import resolve_base
from src.utils.errors import ModelError
from src.utils.files import parse_json

logger = logging.getLogger(__name__)


def export_peft(
    source: str | Path,
    output_dir: str | Path,
    *,
    cache_dir: Path,
    verify_clips: Clips | None = None,
) -> Path:
    """Save the adapters of a LoRA training as PEFT does, and verify that they and their base model transcribe alike.

    The source is a Hugging Face folder that such a training wrote, `best_model_hf`; `resolve_weights` finds the base
    model with `cache_dir`. The other arguments are those of `export_ctranslate2`.

    Returns:
        output_dir, for `PeftModel.from_pretrained(base model, output_dir)`, and as a model's name for this library.

    Raises:
        ModelError: the folder has no adapters, their base model is unavailable, or with it any word differs from the
            merged model's and not by close calls alone, see `verify_transcripts`.
        FileExistsError: output_dir contains something else.
    """
    source, output_dir = Path(source), Path(output_dir)
    tensors, settings = read_adapters(source)
    base = resolve_base(settings, cache_dir=cache_dir)
    given = loaded_source(source, None, verify_clips)
    with given as (model, processor, clips), new_export(output_dir, [ADAPTER_CONFIG]) as folder:
        settings["inference_mode"] = True
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # as `PeftModel.save_pretrained` names them
        named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in tensors.items()}
        save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(folder)  # what the merged model says of its audio context and languages
        model.generation_config.save_pretrained(folder)
        save_processor(processor, folder)
        stock, _ = load_checkpoint(base.path)
        stock.audio_context, stock.generation_config = model.audio_context, model.generation_config
        config = PeftConfig.from_pretrained(str(folder))
        config._register_custom_module({Linear: LoraLinear})  # else PEFT asks every quantisation library in turn
        adapted: Any = PeftModel.from_pretrained(stock, str(folder), config=config).eval()
        name = f"{output_dir}: {settings['base_model_name_or_path']} with its adapters"
        verify_transcripts(model, processor, lambda batch: batch.generate(adapted), name=name, clips=clips)
    logger.info("saved %s (PEFT, adapters of %s)", output_dir, settings["base_model_name_or_path"])
    return output_dir


def read_adapters(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the adapters in a checkpoint's folder, and PEFT's settings of them; `ModelError` if it has none."""
    path = folder / ADAPTERS_FILE
    if not path.is_file():
        raise ModelError(f"{folder}: no {ADAPTERS_FILE}: only a training with training.method: lora writes adapters")
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(ADAPTER_SETTINGS)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = None if said is None else parse_json(said)
    except (OSError, SafetensorError, ValueError) as err:
        raise ModelError(f"{path}: damaged ({err}); fetch it again") from err
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: says nothing of rank and base model, as before version 0.2; train once more")
    return tensors, settings
