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
from collections.abc import Iterator
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
QUANTISED_OPERATORS = ("MatMul", "Gather")  # the encoder's two convolutions, few weights, stay in float32
# Sizes to trace with: at least 2, since the tracer takes 0 and 1 for constants.
_BATCH, _FRAMES, _TOKENS, _PAST = 2, 400, 4, 5


def write_onnx(model: Any, folder: Path, *, int8: bool) -> None:
    """Write `encoder_model.onnx` and `decoder_model_merged.onnx`, or the same with `_quantized` in the name.

    Args:
        model: a `DynamicWhisper` in float32, on the CPU, in evaluation mode.
        folder: exists; it needs room for three copies of the decoder's weights.
        int8: quantise the weights.
    """
    suffix = "_quantized" if int8 else ""
    with quiet_tools(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = trace_whisper(model, Path(scratch))
        encoder, first, later = map(ir.load, [quantize_int8(part) for part in parts] if int8 else parts)
        save_graph(encoder, folder / f"encoder_model{suffix}.onnx")
        save_graph(merge_decoder(first, later), folder / f"decoder_model_merged{suffix}.onnx")


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Suppress the tools' messages about each node, and their advice to developers."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    root, unwanted = logging.getLogger(), _NotFromOnnxRuntime()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used")  # one name on several inputs
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about torch
        root.addFilter(unwanted)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.removeFilter(unwanted)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _NotFromOnnxRuntime(logging.Filter):
    """ONNX Runtime's quantiser writes to the root logger: one line per node, and advice that has been followed."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "onnxruntime" not in record.pathname or record.levelno >= logging.ERROR


def trace_whisper(model: Any, folder: Path) -> list[Path]:
    """Write the encoder, the decoder's first step and a later step as files of their own, and return them."""
    graphs = {
        "encoder_model.onnx": _trace_encoder(model),
        "decoder_model.onnx": _trace_first_step(model),
        "decoder_with_past_model.onnx": _trace_later_step(model),
    }
    for name, graph in graphs.items():
        save_graph(graph, folder / name)
    return [folder / name for name in graphs]


def quantize_int8(path: Path) -> Path:
    """Write a graph with int8 weights, one scale per column, next to it; activations are quantised dynamically.

    Measured 2026-11-28, tiny.en on 25 bundled test clips: 5% of the words differ, and 23% with one scale per matrix.
    """
    target = path.with_name(f"{path.stem}_quantized.onnx")
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=list(QUANTISED_OPERATORS),
        per_channel=True,
        # 7 bits: sums of 8 overflow on processors without VNNI
        # (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)
        reduce_range=True,
        use_external_data_format=_data_file(path).exists(),
    )
    return target


def merge_decoder(first: ir.Model, later: ir.Model) -> ir.Model:
    """Return one decoder from the two steps, which are consumed; `use_cache_branch` chooses between them.

    All inputs are always given, at the first step with an empty past. A later step gives empty tensors for the
    cross-attention's keys and values: the caller keeps those that it has.
    """
    switch = ir.val("use_cache_branch", dtype=ir.DataType.BOOL, shape=[1])
    inputs = {value.name: _copy(value) for graph in (later.graph, first.graph) for value in graph.inputs}
    outputs = [_copy(value) for value in first.graph.outputs]
    for value in (output for output in outputs if output.name != "logits"):
        batch, heads, _, width = cast("tuple[Any, Any, Any, Any]", value.shape)
        value.shape = ir.Shape([batch, heads, f"{value.name}.length", width])  # each step has a length of its own
    _add_empty_outputs(later.graph, outputs)
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
    graph = ir.Graph(*ends, nodes=[choice], opset_imports=first.opset_imports, name="decoder")
    share_weights = Sequential(
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateHashedInitializersPass(),
        passes.NameFixPass(),
    )
    return share_weights(ir.Model(graph, ir_version=first.ir_version, producer_name=first.producer_name)).model


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write a graph as one file; weights that are too large for it go into `<name>.onnx_data`."""
    weights = [value.const_value for value in graph.graph.initializers.values()]
    apart = sum(weight.nbytes for weight in weights if weight is not None) > MAX_FILE_BYTES
    ir.save(graph, path, external_data=_data_file(path).name if apart else None)


def _data_file(path: Path) -> Path:
    return path.with_name(f"{path.name}_data")


def _add_empty_outputs(graph: ir.Graph, wanted: list[ir.Value]) -> None:
    """Give a graph all wanted outputs, in their order; those that it does not compute have no element."""
    computed = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    for value in wanted:
        if value.name not in computed:
            _, heads, _, width = cast("tuple[Any, int, Any, int]", value.shape)
            empty = ir.node("Constant", [], {"value": ir.tensor(np.zeros((0, heads, 1, width), dtype=np.float32))})
            empty.outputs[0].name = value.name
            graph.append(empty)
            computed[value.name] = empty.outputs[0]
        graph.outputs.append(computed[value.name])


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_features: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(input_features).last_hidden_state)


class _FirstStep(nn.Module):
    """Tokens (B, T) and hidden states -> logits (B, T, vocabulary); a layer: keys, values, and those of the encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.proj_out

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        output = self.decoder(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=True)
        caches = output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache
        pairs = zip(caches[0].layers, caches[1].layers, strict=True)
        return (
            _logits(self.head, output.last_hidden_state),
            *(tensor for pair in pairs for layer in pair for tensor in (layer.keys, layer.values)),
        )


class _LaterStep(nn.Module):
    """One token (B, 1) and what all steps before gave a layer -> logits (B, 1, vocabulary); a layer: keys, values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.proj_out
        self.width = model.config.d_model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        own = DynamicCache(list(zip(past[0::4], past[1::4], strict=True)))
        of_encoder = DynamicCache(list(zip(past[2::4], past[3::4], strict=True)))
        output = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=torch.zeros(1, 1, self.width),  # says that there is an encoder; not read
            past_key_values=EncoderDecoderCache(own, of_encoder),
            use_cache=True,
        )
        layers = output.past_key_values.self_attention_cache.layers
        return (
            _logits(self.head, output.last_hidden_state),
            *(tensor for layer in layers for tensor in (layer.keys, layer.values)),
        )


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Apply the vocabulary's layer to (B, T, d_model).

    With two axes it becomes a Gemm, which reads the embedding as it is. With three, the embedding would be transposed
    at every step, and not be quantised.
    """
    logits: Tensor = head(hidden.flatten(0, 1))
    return logits.view(*hidden.shape[:2], -1)


def _trace_encoder(model: Any) -> ir.Model:
    """Trace with any even number of frames for a checkpoint of dynamic context, with 3,000 for one of full context."""
    full = 2 * model.config.max_source_positions
    dynamic = get_audio_context(model.config) == "dynamic"
    axes = {0: Dim("batch_size")}
    if dynamic:
        axes[2] = 2 * Dim("encoder_sequence_length", min=MIN_FRAMES // 2, max=full // 2)
    features = torch.zeros(_BATCH, model.config.num_mel_bins, _FRAMES if dynamic else full)
    return _trace(_Encoder(model), (features,), (axes,), ["input_features"], ["last_hidden_state"])


def _trace_first_step(model: Any) -> ir.Model:
    config = model.config
    tokens = Dim("decoder_sequence_length", min=1, max=config.max_target_positions)
    return _trace(
        _FirstStep(model),
        (torch.ones(_BATCH, _TOKENS, dtype=torch.long), torch.zeros(_BATCH, _FRAMES // 2, config.d_model)),
        ({0: Dim("batch_size"), 1: tokens}, {0: Dim("batch_size"), 1: _positions(config)}),
        ["input_ids", "encoder_hidden_states"],
        ["logits", *_cache_names("present", config, "decoder", "encoder")],
    )


def _trace_later_step(model: Any) -> ir.Model:
    config = model.config
    past = Dim("past_decoder_sequence_length", min=1, max=config.max_target_positions - 1)
    sizes = [(_PAST, past), (_PAST, past), (_FRAMES // 2, _positions(config)), (_FRAMES // 2, _positions(config))]
    heads, width = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
    cache = [torch.zeros(_BATCH, heads, size, width) for _ in range(config.decoder_layers) for size, _ in sizes]
    axes = [{0: Dim("batch_size"), 2: length} for _ in range(config.decoder_layers) for _, length in sizes]
    return _trace(
        _LaterStep(model),
        (torch.ones(_BATCH, 1, dtype=torch.long), cache),
        ({0: Dim("batch_size")}, axes),
        ["input_ids", *_cache_names("past_key_values", config, "decoder", "encoder")],
        ["logits", *_cache_names("present", config, "decoder")],
    )


def _positions(config: Any) -> Dim:
    return Dim("encoder_sequence_length", min=MIN_FRAMES // 2, max=config.max_source_positions)


def _cache_names(prefix: str, config: Any, *kinds: str) -> list[str]:
    layers = range(config.decoder_layers)
    return [f"{prefix}.{layer}.{kind}.{part}" for layer in layers for kind in kinds for part in ("key", "value")]


@torch.no_grad()
def _trace(module: nn.Module, args: Any, axes: Any, inputs: list[str], outputs: list[str]) -> ir.Model:
    program = torch.onnx.export(
        module.eval(),
        args,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=axes,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # the exporter of dynamo=True gives one
    # the notes of where each node comes from hold the paths of this machine's source files
    return passes.ClearMetadataAndDocStringPass()(program.model).model
