"""Measures of benchmarks/training.py: speed of updates, peak memory, FLOPs of a model.

Imports nothing of this library: the peer's process measures itself with it.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM_UPDATES = 2  # first ones of a run: allocators, threads and kernels settle
# dense 16-bit TFLOP/s by name of the device, from NVIDIA's data sheets
PEAK_TFLOPS = {"T4": 65.0, "L4": 121.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}


@dataclass(frozen=True)
class Speed:
    """Speed of training, without evaluation.

    Attributes:
        samples_per_sec: clips over seconds of all updates but the first two.
        median_samples_per_sec: of single updates, likewise; batches differ in length on one side only.
        train_sec: of all updates.
        cpu_sec_per_clip: processor time of the same updates as `samples_per_sec`, over all threads; where other work
            shares the machine, it says more than wall time. None if it was not taken.
    """

    samples_per_sec: float
    median_samples_per_sec: float
    train_sec: float
    cpu_sec_per_clip: float | None


def measure_speed(rows: Sequence[Mapping[str, Any]], *, clips: int, batch_size: int) -> Speed:
    """Summarise updates.

    Args:
        rows: one per update, with its seconds `sec` and, if taken, its processor time `cpu_sec`.
        clips: trained on by all of them together.
        batch_size: of the first updates, which are left out.
    """
    seconds = [row["sec"] for row in rows]
    warm = min(WARM_UPDATES, len(seconds) - 1)
    steady = seconds[warm:]
    steady_clips = clips - warm * batch_size
    cpu = [row["cpu_sec"] for row in rows[warm:] if "cpu_sec" in row]
    return Speed(
        steady_clips / sum(steady),
        statistics.median(batch_size / value for value in steady),
        sum(seconds),
        sum(cpu) / steady_clips if len(cpu) == len(steady) else None,
    )


def long_run_speed(rows: Sequence[Mapping[str, Any]], padded: Sequence[bool], job: Any) -> float | None:
    """Return clips/s at the share of updates padded to 30 s that a long run has; a short run has another share.

    Args:
        rows, job: as in `side_figures`.
        padded: which updates were padded. If there are some, the first two count too.
    Returns: None if no update was at its own length, or if no update was padded although a long run would have some.
    """
    own = [row["sec"] for row, full in zip(rows, padded, strict=True) if not full][WARM_UPDATES:]
    full = [row["sec"] for row, full in zip(rows, padded, strict=True) if full]
    share = job.full_context_prob
    if not own or (share and not full):
        return None
    sec = (1 - share) * statistics.mean(own) + share * statistics.mean(full or [0.0])
    return float(job.batch_size / sec)


def side_figures(job: Any, rows: Sequence[Mapping[str, Any]], flops: FlopCounter, peak_mb: float) -> dict[str, Any]:
    """Summarise one side's training for its result file.

    Args:
        job: of benchmarks/training.py.
        rows: one per update, as for `measure_speed`.
        peak_mb: taken at the end of training.
    """
    per_epoch = math.ceil(job.clips / job.batch_size)
    speed = measure_speed(rows, clips=round(job.clips * job.stop_after / per_epoch), batch_size=job.batch_size)
    peak = job.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if job.device == "cuda" else None)
    padded = flops.padded if len(flops.padded) == len(rows) else None  # None where a stopped run went on
    warm = min(WARM_UPDATES, len(rows) - 1)
    tflop_per_update = flops.total / len(flops.padded) / 1e12 if flops.padded else None
    return {
        **asdict(speed),
        "update_sec": [row["sec"] for row in rows],
        "padded_share": statistics.mean(padded[warm:]) if padded else None,
        "long_run_samples_per_sec": long_run_speed(rows, padded, job) if padded else None,
        "peak_mb": peak_mb,
        "tflop_per_update": tflop_per_update,
        "peak_tflops": peak,
        "mfu": tflop_per_update * len(rows) / speed.train_sec / peak if peak and tflop_per_update else None,
    }


def update_rows(events: Sequence[Mapping[str, Any]], *, batch_size: int) -> list[dict[str, Any]]:
    """Return the seconds of each update, from the end of the one before, from the rows of a run's metrics.jsonl.

    Updates whose values were read together have one speed, and share their time evenly. Loading of data is included.
    Updates that follow another event than `begin`, such as an evaluation, count with their own speed, without that
    event.

    Args:
        events: rows of metrics.jsonl in order; `begin` is logged when training begins or resumes.
        batch_size: clips per update.
    """
    by_step: dict[int, dict[str, Any]] = {}  # of an update that was done again after a stop, the last counts
    before: float | None = None
    for speed, group in itertools.groupby(events, key=lambda event: event.get("samples_per_sec")):
        read = list(group)
        if speed is not None:
            sec = batch_size / speed if before is None else (read[-1]["time"] - before) / len(read)
            by_step |= {event["step"]: {"step": event["step"], "sec": sec} for event in read}
        before = read[-1]["time"] if speed is not None or read[-1]["event"] == "begin" else None
    return [by_step[step] for step in sorted(by_step)]


def peak_memory_mb(device: str) -> float:
    """Return the most memory this process has held so far, in MB of 10^6 bytes: resident, or on the GPU by tensors."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held when it started this process
        line = next(row for row in status.read_text(encoding="utf-8").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a known GPU, else None."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


def forward_flops(config: Any, *, clips: int, positions: int, tokens: int, scored: int) -> float:
    """Count the multiply-adds of a forward pass, two FLOPs each; norms, softmax and activations are left out.

    Width d, inner width F, T encoder positions and L decoder tokens per clip, as computed, padding included:
    encoder: 2 convolutions 2T x 6 mels d + T x 6 d^2; per layer T (8 d^2 + 4 d F) + 4 T^2 d.
    decoder: per layer L (12 d^2 + 4 d F) + 4 L^2 d + 4 L T d + 4 T d^2 (keys and values of the audio).
    vocabulary V: 2 d V for each scored token. Training is counted as three forward passes.

    Args:
        config: of the model.
        scored: tokens of all clips that are projected to the vocabulary.
    """
    d, mels = config.d_model, config.num_mel_bins
    t, n = positions, tokens
    encoder = t * (12 * mels * d + 6 * d * d)
    encoder += config.encoder_layers * (t * (8 * d * d + 4 * d * config.encoder_ffn_dim) + 4 * t * t * d)
    decoder = config.decoder_layers * (
        n * (12 * d * d + 4 * d * config.decoder_ffn_dim) + 4 * n * n * d + 4 * n * t * d + 4 * t * d * d
    )
    return float(clips * (encoder + decoder) + 2 * scored * d * config.vocab_size)


class FlopCounter:
    """Adds up the FLOPs that a model trains with, from the shapes that pass through it.

    Args:
        model: a Whisper model, which is watched by hooks.

    Attributes:
        total: FLOPs so far.
        padded: whether each update so far, a batch of which may go through the model in pieces, had the full context.
    """

    def __init__(self, model: Any) -> None:
        self.total = 0.0
        self.padded: list[bool] = []
        self._config = model.config
        self._is_padded = False
        self._shape = (0, 0, 0)  # clips, positions, tokens
        model.model.encoder.register_forward_hook(self._see_encoder)
        model.model.decoder.layer_norm.register_forward_hook(self._see_decoder)  # not every path calls the decoder
        model.proj_out.register_forward_hook(self._see_logits)
        register_optimizer_step_post_hook(self._see_update)

    def _see_update(self, *_: Any) -> None:
        self.padded.append(self._is_padded)
        self._is_padded = False

    def _see_encoder(self, module: Any, _: Any, output: Any) -> None:
        if module.training:
            clips, positions, _width = output[0].shape
            self._shape = (clips, positions, 0)
            self._is_padded |= positions == self._config.max_source_positions

    def _see_decoder(self, module: Any, _: Any, output: Any) -> None:
        if module.training:
            self._shape = (*self._shape[:2], output.shape[1])

    def _see_logits(self, module: Any, _: Any, output: Any) -> None:
        if module.training:
            clips, positions, tokens = self._shape
            scored = output.numel() // output.shape[-1]
            forward = forward_flops(self._config, clips=clips, positions=positions, tokens=tokens, scored=scored)
            self.total += 3 * forward
