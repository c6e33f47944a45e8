"""A model shared out to the processes that train it: each holds a share of parameters, gradients and optimizer state.

FSDP2 of torch (`fully_shard`), which unlike Accelerate's plug-in runs on the CPU too, where it is tested. A layer's
parameters are put together while it computes; embeddings and convolutions, outside of the layers, stay together from
forward to backward, and so does the embedding's tie to the output. Everything that leaves training (checkpoints,
exports, evaluation) sees whole tensors under their usual names: decoding takes another number of steps in each process,
and could not exchange parameters in step. So evaluation needs room for one plain copy in each process.

Source: Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.data.labels import IGNORE_INDEX
from src.models.dynamic_context import DynamicWhisper
from src.training.loss import TokenLoss
from src.utils.config import TrainingConfig
from src.utils.distributed import gather_objects, is_main_process, world_size
from src.utils.errors import ConfigError, DeviceError, ModelError

logger = logging.getLogger(__name__)

Piece = tuple[Tensor, Tensor, Tensor]  # features, decoder inputs, labels


class ShardedModel:
    """The way from a shared-out model to a plain one.

    Args:
        loss: shared out in place, with the model in it; the optimizer is made afterwards, of the new parameters.
        policy: types in which layers compute and gradients are summed.
    """

    def __init__(self, loss: TokenLoss, policy: MixedPrecisionPolicy) -> None:
        self._model = loss.model
        # modules without memory for weights; FSDP's own cannot be copied
        self._skeleton = _copy_with(
            self._model, [nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in _each(self._model)]
        )
        for parameter in _each(self._model):
            distributed.broadcast(parameter.data, src=0)  # as DDP does
        mesh = init_device_mesh(self._model.device.type, (world_size(),))
        inner = self._model.model
        for module in (*inner.encoder.layers, *inner.decoder.layers, loss):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    def whole(self) -> DynamicWhisper:
        """Return a plain copy with all weights, adapters included, in every process; all must call it."""
        plain = _copy_with(
            self._skeleton, [nn.Parameter(whole_tensor(p.detach()), p.requires_grad) for p in _each(self._model)]
        )
        plain.train(self._model.training)
        return plain


def shard_model(loss: TokenLoss, config: TrainingConfig, *, mixed_precision: str) -> ShardedModel | None:
    """Share a model out where several processes train it and `training.shard_model` asks for it.

    Args:
        loss: changed in place.
        mixed_precision: "no", "bf16" or "fp16", as Accelerate names them.
    Returns: None where nothing was shared out.
    Raises: DeviceError: float16. ConfigError: with torch.compile or the 8-bit optimizer. ModelError: layers are dropped
        at random, so that processes would wait for different ones.
    """
    if not config.shard_model:
        return None
    if world_size() == 1:
        logger.info("training.shard_model does nothing: one process trains, and holds the whole model")
        return None
    _check(loss.model, config, mixed_precision)
    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = ShardedModel(loss, policy)
    logger.info("the model is shared out to %d processes", world_size())
    return sharded


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or all its shards put together, in every process; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect_on_cpu(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors by name, on the CPU. Shards are put together by all processes, and kept by the main one alone."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        whole = whole_tensor(tensor.detach())
        if not isinstance(tensor, DTensor) or is_main_process():
            found[name] = whole.cpu()
    return found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, where it goes with a parameter that is shared out."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # src_data_rank None: every process has read the same file, nothing need be sent
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def shard_all_like(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of whole tensors as `model.load_state_dict` takes it."""
    parameters = dict(model.named_parameters())
    return {name: shard_like(t, parameters[name]) if name in parameters else t for name, t in tensors.items()}


def in_step(pieces: Sequence[Piece]) -> list[Piece]:
    """Add passes without a loss until all processes have as many: each pass is an exchange of parameters."""
    missing = max(gather_objects(len(pieces))) - len(pieces)
    features, inputs, labels = (tensor[:1] for tensor in pieces[-1])
    return [*pieces, *[(features, inputs, torch.full_like(labels, IGNORE_INDEX))] * missing]


def exchange_gradients(loss: nn.Module, on: bool) -> None:
    """Let the next backward pass sum gradients over the processes, or keep them for a later one."""
    assert isinstance(loss, FSDPModule)
    loss.set_requires_gradient_sync(on)


def _check(model: DynamicWhisper, config: TrainingConfig, mixed_precision: str) -> None:
    if mixed_precision == "fp16":
        raise DeviceError(
            "training.shard_model takes bfloat16 or float32, not float16, whose loss scale it has not; set precision: "
            "float32 where the GPU has no bfloat16"
        )
    if config.compile or config.optimizer != "adamw":
        raise ConfigError(
            f"training.shard_model goes with compile: false and optimizer: adamw, not with compile: {config.compile} "
            f"and optimizer: {config.optimizer}; its shards divide the optimizer's memory already"
        )
    if model.config.encoder_layerdrop or model.config.decoder_layerdrop:
        raise ModelError("training.shard_model: set the model's encoder_layerdrop and decoder_layerdrop to 0")


def _each(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())  # tied ones once


def _copy_with(model: DynamicWhisper, parameters: Sequence[nn.Parameter]) -> DynamicWhisper:
    """Copy a model's modules with other parameters in the place of its own; ties hold, and the configs are shared."""
    memo: dict[int, Any] = {id(config): config for config in (model.config, model.generation_config)}
    memo |= {id(old): new for old, new in zip(_each(model), parameters, strict=True)}
    return copy.deepcopy(model, memo)
