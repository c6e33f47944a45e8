"""Which parameters of a model are trained, and whether several processes share them.

Adapters of PEFT are put into the model in place, so that evaluation and decoding see an ordinary `DynamicWhisper`. A
sharded model (`fully_shard`, arXiv 2304.11277) keeps a share of parameters, gradients and optimizer state in each
process; whatever leaves training sees whole tensors under their usual names, since decoding takes a different number of
steps in each process and could not exchange parameters in step.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from src.data.dataset import WhisperDataset
from src.models.dynamic_context import DynamicWhisper, get_cap_rates
from src.models.weights import base_settings
from src.training.loss import TokenLoss
from src.utils.config import LoRAConfig, TrainingConfig
from src.utils.errors import ConfigError, DeviceError, ModelError
from src.utils.languages import known_language
from src.utils.runtime import world_size

logger = logging.getLogger(__name__)

# medium: LoRA matches full fine-tuning on large models, loses on small ones (arXiv 2406.10507)
LORA_FROM_D_MODEL = 1024
_ADAPTER = "default"  # the name that PEFT gives


def record_languages(model: DynamicWhisper, dataset: WhisperDataset, task: str) -> None:
    """Put into a model's configs what its checkpoints say about the languages of its training data.

    `generation_config.language` is the single language of the rows, none if they have several; `tokens_per_sec` are the
    dataset's `token_rates`. Both have the codes that the model knows: Cantonese is `zh` before large-v3.
    """
    generation, rates = model.generation_config, get_cap_rates(model.config)  # languages of an earlier training stay
    known = [name.strip("<|>") for name in getattr(generation, "lang_to_id", None) or ()]

    def code_of(language: str | None) -> str | None:
        return known_language(language, known) if language and known else language

    found: dict[str, float] = {}
    for language, rate in dataset.token_rates().items():
        code = code_of(language) or language
        found[code] = max(found.get(code, 0.0), round(rate, 1))
    model.config.tokens_per_sec = rates | found
    if getattr(generation, "is_multilingual", False):
        languages = {code_of(u.language) for u in dataset.utterances}
        generation.language = languages.pop() if len(languages) == 1 else None
        generation.task = task


def choose_method(config: TrainingConfig, d_model: int) -> tuple[Literal["full", "lora"], str]:
    """Resolve `training.method` for a model of this width, 384 (tiny) to 1,280 (large); return it with the reason."""
    if config.method != "auto":
        return config.method, "asked for"
    if config.freeze_encoder:
        return "full", "freeze_encoder is set"
    return "lora" if d_model >= LORA_FROM_D_MODEL else "full", f"width {d_model}, LoRA from {LORA_FROM_D_MODEL} on"


def prepare_model(model: DynamicWhisper, config: TrainingConfig) -> None:
    """Freeze and extend a model in place, in float32, as the configuration says.

    Adapters of an earlier training are removed, so that a cell can run again: what they learnt is in that training's
    checkpoints. Raises `ModelError` for more frozen layers than the encoder has, or unknown `lora.target_modules`.
    """
    encoder = model.model.encoder
    method, reason = choose_method(config, model.config.d_model)
    if has_adapters(model):
        logger.info("the adapters of an earlier training are removed; this one starts from the weights below them")
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        del model.peft_config  # PEFT would take new adapters for a second set
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model.float()  # master weights, whatever the checkpoint's type
    model.requires_grad_(True)
    encoder.embed_positions.requires_grad_(False)  # sinusoids, of which short audio would train some rows only
    if method == "lora":
        _add_adapters(model, config.lora)
    elif config.freeze_encoder is True:
        encoder.requires_grad_(False)
    elif config.freeze_encoder > len(encoder.layers):
        raise ModelError(f"training.freeze_encoder: {config.freeze_encoder} of {len(encoder.layers)} layers")
    elif config.freeze_encoder:
        for module in (encoder.conv1, encoder.conv2, *encoder.layers[: config.freeze_encoder]):
            module.requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    trained, total = (sum(p.numel() for p in parameters) for parameters in (trainable(model), model.parameters()))
    logger.info("method: %s (%s); %.1f M of %.1f M parameters are trained", method, reason, trained / 1e6, total / 1e6)


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
    # named explicitly, else PEFT asks every quantisation library in turn, and refuses the torchao that Colab ships
    settings._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(settings, model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained; tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds LoRA adapters."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def adapter_settings(model: DynamicWhisper, variant: str) -> dict[str, Any]:
    """Return PEFT's settings of a model's adapters as JSON has them; `variant` is the model that was trained."""
    settings = model.peft_config[_ADAPTER].to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=sorted))  # sets of names
    return plain | base_settings(variant)


@torch.no_grad()
def merged_model(model: DynamicWhisper) -> DynamicWhisper:
    """Return the plain model that a model with adapters amounts to: W + (alpha / rank) B A; itself if it has none.

    The model does not change: merging and unmerging in place would round its weights.
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
    with torch.random.fork_rng(devices=[]):  # a new model draws its weights: training must not notice
        plain = DynamicWhisper(copy.deepcopy(model.config))
    plain.load_state_dict(state)
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.to(model.device).train(model.training)
    return plain


class HalfCopy:
    """A copy of a model in 16 bits that computes, while the float32 weights of the model are trained.

    The copy's configs are the model's own. Gradients are added up in float32 from pass to pass.
    """

    def __init__(self, model: DynamicWhisper, dtype: torch.dtype) -> None:
        halves = [nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in model.parameters()]
        self.model = _copy_with(model, halves)
        pairs = list(zip(model.parameters(), self.model.parameters(), strict=True))
        self.weights = [weight for weight, _ in pairs if weight.requires_grad]  # float32
        self._copies = [half for weight, half in pairs if weight.requires_grad]

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the float32 weights."""
        pairs = [(w, h.grad) for w, h in zip(self.weights, self._copies, strict=True) if h.grad is not None]
        wide = [torch.empty_like(weight) for weight, _ in pairs]
        torch._foreach_copy_(wide, [gradient for _, gradient in pairs])
        later = [(weight.grad, new) for (weight, _), new in zip(pairs, wide, strict=True) if weight.grad is not None]
        if later:
            torch._foreach_add_([gradient for gradient, _ in later], [new for _, new in later])
        for (weight, _), new in zip(pairs, wide, strict=True):
            weight.grad = new if weight.grad is None else weight.grad
        for half in self._copies:
            half.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the copy the weights of now."""
        torch._foreach_copy_(self._copies, self.weights)


class ShardedModel:
    """A model sharded in place together with its loss; make the optimizer afterwards, from the new parameters."""

    def __init__(self, loss: TokenLoss, policy: MixedPrecisionPolicy) -> None:
        self._model = loss.model
        # modules without memory for weights; FSDP's own modules cannot be copied
        self._skeleton = _copy_with(
            self._model,
            [nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in self._model.parameters()],
        )
        for parameter in self._model.parameters():
            distributed.broadcast(parameter.data, src=0)  # as DDP does
        mesh = init_device_mesh(self._model.device.type, (world_size(),))
        inner = self._model.model
        for module in (*inner.encoder.layers, *inner.decoder.layers, loss):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    def whole(self) -> DynamicWhisper:
        """Return a plain copy with all weights, adapters included, in every process; all processes must call this."""
        parameters = [
            nn.Parameter((p.full_tensor() if isinstance(p, DTensor) else p).detach(), p.requires_grad)
            for p in self._model.parameters()
        ]
        plain = _copy_with(self._skeleton, parameters)
        plain.train(self._model.training)
        return plain


def shard_model(loss: TokenLoss, config: TrainingConfig, *, mixed_precision: str) -> ShardedModel | None:
    """Shard a model in place if several processes train it and `training.shard_model` asks for it; None if not."""
    if not config.shard_model:
        return None
    if world_size() == 1:
        logger.info("training.shard_model does nothing: one process trains, and holds the whole model")
        return None
    check_shardable(loss.model, config, mixed_precision)
    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = ShardedModel(loss, policy)
    logger.info("the model is sharded over %d processes", world_size())
    return sharded


def check_shardable(model: DynamicWhisper, config: TrainingConfig, mixed_precision: str) -> None:
    """Refuse what does not work with shards; see `shard_model`."""
    if mixed_precision == "fp16":
        raise DeviceError(
            "training.shard_model takes bfloat16 or float32, not float16, whose loss scale it lacks; set precision: "
            "float32 if the GPU has no bfloat16"
        )
    if config.compile or config.optimizer != "adamw":
        raise ConfigError(
            f"training.shard_model goes with compile: false and optimizer: adamw, not with compile: {config.compile} "
            f"and optimizer: {config.optimizer}; its shards divide the optimizer's memory already"
        )
    if model.config.encoder_layerdrop or model.config.decoder_layerdrop:
        raise ModelError("training.shard_model: set the model's encoder_layerdrop and decoder_layerdrop to 0")


def _copy_with(model: DynamicWhisper, parameters: Sequence[nn.Parameter]) -> DynamicWhisper:
    """Copy a model's modules with other parameters in place of its own; ties hold, and the configs are shared."""
    memo: dict[int, Any] = {id(config): config for config in (model.config, model.generation_config)}
    memo |= {id(old): new for old, new in zip(model.parameters(), parameters, strict=True)}
    return copy.deepcopy(model, memo)
