"""Whisper as ONNX files, named and shaped as Hugging Face Optimum and transformers.js expect them.

An encoder, and one decoder with an `If`: the first step computes the cross-attention's keys and values, later steps are
given them. Both branches share their weights, so the file is as large as the decoder, not twice as large.

`torch.onnx.export` traces the graphs: optimum-onnx 0.1.0, the newest in November 2026, needs transformers below 4.58
and knows no encoder of dynamic length; torch's older TorchScript exporter is deprecated. Opset 18 is what torch traces
to without a conversion.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from onnxruntime.quantization import quantize_dynamic  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from src.models.dynamic_context import MIN_FRAMES, get_audio_context

OPSET = 18
MAX_FILE_BYTES = 1 << 30  # no ONNX file may have 2 GiB: larger weights go into a file of their own
QUANTISED_OPERATORS = ["MatMul", "Gather"]  # the encoder's two convolutions, few weights, stay in float32
# Sizes to trace with: at least 2, since the tracer takes 0 and 1 for constants.
_BATCH, _FRAMES, _TOKENS, _PAST = 2, 400, 4, 5


def write_onnx(model: Any, folder: Path, *, int8: bool) -> None:
    """Write `encoder_model.onnx` and `decoder_model_merged.onnx`, or the same with `_quantized` in the name.

    The model is a `DynamicWhisper` in float32, on the CPU, in evaluation mode. The folder exists; it needs room for
    three copies of the decoder's weights.
    """
    suffix = "_quantized" if int8 else ""
    with quiet_tools(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = trace_whisper(model, Path(scratch))
        encoder, first, later = map(ir.load, [quantize_int8(part) for part in parts] if int8 else parts)
        save_graph(encoder, folder / f"encoder_model{suffix}.onnx")
        save_graph(merge_decoder(first, later), folder / f"decoder_model_merged{suffix}.onnx")


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Suppress the tools' messages about each node, some on the root logger, and their advice to developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def trace_whisper(model: Any, folder: Path) -> list[Path]:
    """Write the encoder, the decoder's first step and a later step as files of their own, and return them.

    The encoder takes any even number of frames for a checkpoint of dynamic context, 3,000 for one of full context.
    """
    config, full = model.config, 2 * model.config.max_source_positions
    layers, width, heads = config.decoder_layers, config.d_model, config.decoder_attention_heads
    batch = {0: Dim("batch_size")}
    half = Dim("encoder_sequence_length", min=MIN_FRAMES // 2, max=full // 2)
    tokens = Dim("decoder_sequence_length", min=1, max=config.max_target_positions)
    past = Dim("past_decoder_sequence_length", min=1, max=config.max_target_positions - 1)

    def cache_names(prefix: str, *kinds: str) -> list[str]:
        return [f"{prefix}.{at}.{kind}.{part}" for at in range(layers) for kind in kinds for part in ("key", "value")]

    dynamic = get_audio_context(config) == "dynamic"
    features = torch.zeros(_BATCH, config.num_mel_bins, _FRAMES if dynamic else full)
    frames = {2: 2 * half} if dynamic else {}
    encoder = _trace(model, _encode, {"input_features": (features, batch | frames)}, ["last_hidden_state"])
    ids, hidden = torch.ones(_BATCH, _TOKENS, dtype=torch.long), torch.zeros(_BATCH, _FRAMES // 2, width)
    first = _trace(
        model, _first_step,
        {"input_ids": (ids, batch | {1: tokens}), "encoder_hidden_states": (hidden, batch | {1: half})},
        ["logits", *cache_names("present", "decoder", "encoder")],
    )  # fmt: skip
    own, of_encoder = (torch.zeros(_BATCH, heads, size, width // heads) for size in (_PAST, _FRAMES // 2))
    cache = [(own, batch | {2: past})] * 2 + [(of_encoder, batch | {2: half})] * 2
    later = _trace(
        model, _later_step,
        {"input_ids": (ids[:, :1].clone(), batch)}
        | dict(zip(cache_names("past_key_values", "decoder", "encoder"), cache * layers, strict=True)),
        ["logits", *cache_names("present", "decoder")],
    )  # fmt: skip
    graphs = {"encoder_model.onnx": encoder, "decoder_model.onnx": first, "decoder_with_past_model.onnx": later}
    for name, graph in graphs.items():
        save_graph(graph, folder / name)
    return [folder / name for name in graphs]


@torch.no_grad()
def _trace(
    model: Any, function: Callable[..., Any], inputs: dict[str, tuple[Tensor, dict[int, Any]]], outputs: list[str]
) -> ir.Model:
    """Trace a function of the model; each input has an example and names for its axes of any length."""
    program = torch.onnx.export(
        _Traced(model, function).eval(),
        tuple(example.clone() for example, _ in inputs.values()),
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes=(tuple(axes for _, axes in inputs.values()),),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # the exporter of dynamo=True gives one
    # the notes of where each node comes from hold the paths of this machine's source files
    return passes.ClearMetadataAndDocStringPass()(program.model).model


class _Traced(nn.Module):
    def __init__(self, model: Any, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *given: Tensor) -> Any:
        return self.function(self.model, *given)


def _encode(model: Any, features: Tensor) -> Tensor:
    return cast("Tensor", model.get_encoder()(features).last_hidden_state)


def _first_step(model: Any, ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Tokens (B, T) and hidden states -> logits (B, T, vocabulary); a layer: keys, values, and those of the encoder."""
    output = model.get_decoder()(input_ids=ids, encoder_hidden_states=hidden, use_cache=True)
    caches = output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache
    layers = [layer for pair in zip(*(cache.layers for cache in caches), strict=True) for layer in pair]
    return _logits(model, output.last_hidden_state), *(t for layer in layers for t in (layer.keys, layer.values))


def _later_step(model: Any, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    """One token (B, 1) and what all steps before gave a layer -> logits (B, 1, vocabulary); a layer: keys, values."""
    own, of_encoder = (DynamicCache(list(zip(past[at::4], past[at + 1 :: 4], strict=True))) for at in (0, 2))
    output = model.get_decoder()(
        input_ids=ids,
        encoder_hidden_states=torch.zeros(1, 1, model.config.d_model),  # says that there is an encoder; not read
        past_key_values=EncoderDecoderCache(own, of_encoder),
        use_cache=True,
    )
    layers = output.past_key_values.self_attention_cache.layers
    return _logits(model, output.last_hidden_state), *(t for layer in layers for t in (layer.keys, layer.values))


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Apply the vocabulary's layer to (B, T, d_model).

    With two axes it becomes a Gemm, which reads the embedding as it is. With three, the embedding would be transposed
    at every step, and not be quantised.
    """
    logits: Tensor = model.proj_out(hidden.flatten(0, 1))
    return logits.view(*hidden.shape[:2], -1)


def quantize_int8(path: Path) -> Path:
    """Write a graph with int8 weights, one scale per column, next to it; activations are quantised dynamically.

    Measured 2026-11-28, tiny.en on 25 bundled test clips: 5% of the words differ, and 23% with one scale per matrix.
    """
    target = path.with_name(f"{path.stem}_quantized.onnx")
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=QUANTISED_OPERATORS,
        per_channel=True,
        # 7 bits: sums of 8 overflow on processors without VNNI
        # (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)
        reduce_range=True,
        use_external_data_format=path.with_name(f"{path.name}_data").exists(),
    )
    return target


def merge_decoder(first: ir.Model, later: ir.Model) -> ir.Model:
    """Return one decoder from the two steps, which are consumed; `use_cache_branch` chooses between them.

    All inputs are always given, at the first step with an empty past. A later step gives empty tensors for the
    cross-attention's keys and values: the caller keeps those that it has.
    """

    def copy(value: ir.Value) -> ir.Value:
        return ir.Value(name=value.name, shape=value.shape, type=value.type)

    switch = ir.val("use_cache_branch", dtype=ir.DataType.BOOL, shape=[1])
    inputs = {value.name: copy(value) for graph in (later.graph, first.graph) for value in graph.inputs}
    outputs = [copy(value) for value in first.graph.outputs]
    computed = {value.name: value for value in later.graph.outputs}
    later.graph.outputs.clear()
    for value in outputs:
        if value.name != "logits":
            batch, heads, _, width = cast("tuple[Any, Any, Any, Any]", value.shape)
            value.shape = ir.Shape([batch, heads, f"{value.name}.length", width])  # each step has a length of its own
            if value.name not in computed:  # what a later step does not compute has no element
                nothing = ir.tensor(np.zeros((0, heads, 1, width), dtype=np.float32))
                empty = ir.node("Constant", [], {"value": nothing})
                empty.outputs[0].name = value.name
                later.graph.append(empty)
                computed[value.name] = empty.outputs[0]
        later.graph.outputs.append(computed[value.name])
    for name, graph in (("first", first.graph), ("later", later.graph)):
        for value in graph.inputs:
            value.replace_all_uses_with(inputs[value.name])
        for value in graph.outputs:
            value.name = f"{name}.{value.name}"
        graph.inputs.clear()
        graph.name = f"{name}_step"
    branches = [ir.AttrGraph("then_branch", later.graph), ir.AttrGraph("else_branch", first.graph)]
    choice = ir.Node("", "If", [switch], branches, outputs=outputs)
    ends = [*inputs.values(), switch], outputs
    merged = ir.Graph(*ends, nodes=[choice], opset_imports=first.opset_imports, name="decoder")
    share_weights = Sequential(
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateHashedInitializersPass(),
        passes.NameFixPass(),
    )
    return share_weights(ir.Model(merged, ir_version=first.ir_version, producer_name=first.producer_name)).model


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write a graph as one file; weights that are too large for it go into `<name>.onnx_data`."""
    weights = [value.const_value for value in graph.graph.initializers.values()]
    apart = sum(weight.nbytes for weight in weights if weight is not None) > MAX_FILE_BYTES
    ir.save(graph, path, external_data=f"{path.name}_data" if apart else None)
