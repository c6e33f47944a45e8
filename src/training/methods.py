"""What of a model is trained: all of it, all but the encoder's first layers, or low-rank adapters beside it.

Adapters come from PEFT. They are put into the model in place, so that evaluation and decoding see an ordinary
`DynamicWhisper`; `merged_model` gives the plain model that they amount to.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from src.models.dynamic_context import DynamicWhisper
from src.utils.config import LoRAConfig, TrainingConfig
from src.utils.errors import ModelError

logger = logging.getLogger(__name__)

LORA_FROM_D_MODEL = (
    1024  # medium: LoRA matches full fine-tuning on large models, loses on small ones (arXiv 2406.10507)
)
_ADAPTER = "default"  # the name that PEFT gives


@dataclass(frozen=True)
class MethodChoice:
    """How a model is trained, and why."""

    method: Literal["full", "lora"]
    reason: str


def choose_method(config: TrainingConfig, d_model: int) -> MethodChoice:
    """Resolve `training.method`.

    Args:
        d_model: width of the model: 384 (tiny) to 1,280 (large).
    """
    if config.method != "auto":
        return MethodChoice(config.method, "asked for")
    if config.freeze_encoder:
        return MethodChoice("full", "freeze_encoder is set")
    if d_model >= LORA_FROM_D_MODEL:
        return MethodChoice("lora", f"the model is {d_model} wide, medium or larger")
    return MethodChoice("full", f"the model is {d_model} wide, smaller than medium")


def prepare_model(model: DynamicWhisper, config: TrainingConfig) -> MethodChoice:
    """Freeze and extend a model in place, in float32, as the configuration says.

    The encoder's position table stays as it is in any case: it holds sinusoids, and audio at its own length would
    train, and weight decay would shrink, some of its rows only.

    Adapters of an earlier training are taken off, so that a cell can run again: what they learnt is in that training's
    checkpoints and in its `merged_model`.

    Raises: ModelError: more frozen layers than the encoder has, or no layer of the names in `lora.target_modules`.
    """
    choice = choose_method(config, model.config.d_model)
    if has_adapters(model):
        logger.info("the adapters of an earlier training are taken off; this one begins from the weights below them")
        _remove_adapters(model)
    model.float()  # master weights, whatever the checkpoint's type
    model.requires_grad_(True)
    model.model.encoder.embed_positions.requires_grad_(False)
    if choice.method == "lora":
        _add_adapters(model, config.lora)
    else:
        _freeze_encoder(model, config.freeze_encoder)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    trained, total = (sum(p.numel() for p in parameters) for parameters in (trainable(model), model.parameters()))
    logger.info(
        "method: %s (%s); %.1f M of %.1f M parameters are trained", choice.method, choice.reason, trained / 1e6,
        total / 1e6,
    )  # fmt: skip
    return choice


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained; tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds LoRA adapters."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


@torch.no_grad()
def merged_model(model: DynamicWhisper) -> DynamicWhisper:
    """Return the plain model that a model with adapters amounts to: W + (alpha / rank) B A.

    The model itself is not touched: merging and unmerging in place would round its weights.

    Returns: the model itself where it has no adapters, else a copy.
    """
    if not has_adapters(model):
        return model
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            base = cast(Tensor, module.get_base_layer().weight)
            state[f"{name}.weight"] = base + module.get_delta_weight(_ADAPTER)
    return plain_copy(model, state)


def plain_copy(model: DynamicWhisper, state: dict[str, Tensor]) -> DynamicWhisper:
    """Return a new model of the same kind with these weights, on the same device."""
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn: training must not notice
        plain = DynamicWhisper(copy.deepcopy(model.config))
    plain.load_state_dict(state)
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.to(model.device).train(model.training)
    return plain


def _add_adapters(model: DynamicWhisper, config: LoRAConfig) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.discard("proj_out")  # tied to the token embedding, which a merged adapter would change too
    unknown = sorted(set(config.target_modules) - linear)
    if unknown or not config.target_modules:
        raise ModelError(
            f"training.lora.target_modules: no linear layer is named {', '.join(unknown) or 'nothing'}; "
            f"known: {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.target_modules)
    )
    # named outright, else PEFT asks every quantisation library in turn, and refuses the torchao that Colab ships
    settings._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(settings, model)


def _remove_adapters(model: DynamicWhisper) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config  # PEFT's note, from which it would take them for a second set


def _freeze_encoder(model: DynamicWhisper, amount: bool | int) -> None:
    encoder = model.model.encoder
    if amount is True:
        encoder.requires_grad_(False)
        return
    if not amount:
        return
    if amount > len(encoder.layers):
        raise ModelError(
            f"training.freeze_encoder: {amount} layers are to be frozen, this encoder has {len(encoder.layers)}"
        )
    for module in (encoder.conv1, encoder.conv2, *encoder.layers[:amount]):
        module.requires_grad_(False)
