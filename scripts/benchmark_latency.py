"""Measure the latency of your model on your clips, together with plain transformers on the same clips and weights.

    python scripts/benchmark_latency.py [--variant tiny.en ...] [--model FOLDER] [--data FILE.parquet] [--quick]

Plain transformers is `WhisperForConditionalGeneration.generate`, padded to 30 s; a checkpoint with dynamic context is
measured at the audio's own length. Both sides take turns, so that other work on the machine affects both; medians over
the rounds are shown, and the speedup is the median of the rounds' ratios. The last line printed is one JSON object; the
table is appended to docs/BENCHMARKS.md. benchmarks/latency.py compares with faster-whisper and transformers' pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import run_main

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import WhisperForConditionalGeneration
from transformers import logging as transformers_logging

from scripts.benchmarking import add_data, load_clips, number, show
from scripts.command_line import path_argument
from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.evaluation.latency import LatencyResult, MeasuredEngine, check_clips, describe_engine, measure_engine
from src.evaluation.metrics import error_rate, headline_normalizer, metric_of, word_counts
from src.inference.torch_engine import TorchEngine
from src.models.whisper_model import WhisperModelManager
from src.utils.config import Config, load_config

FIGURES = ("rtf", "rtfx", "mean_sec", "p50_sec", "p95_sec", "p99_sec", "first_token_sec", "peak_memory_mb")
PEER = "transformers"


@dataclass(frozen=True)
class Measured:
    """One side at one batch size, and what transformers gave for the same; a result per round."""

    model: str
    batch_size: int
    engine: str
    rounds: tuple[LatencyResult, ...]
    peer_rounds: tuple[LatencyResult, ...]
    rate: float | None
    peer_rate: float | None
    metric: str = "WER"  # of the two rates

    def median(self, figure: str) -> float | None:
        """Return the median over the rounds; None if the figure was not measured."""
        values = [getattr(result, figure) for result in self.rounds]
        return None if None in values else statistics.median(values)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the peer: the median of the rounds' ratios."""
        pairs = [(ours.rtf, theirs.rtf) for ours, theirs in zip(self.rounds, self.peer_rounds, strict=True)]
        ratios = [theirs / ours for ours, theirs in pairs if ours is not None and theirs is not None]
        return statistics.median(ratios) if len(ratios) == len(pairs) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", action="append", help="may be given several times; default: tiny.en")
    parser.add_argument("--model", type=path_argument, action="append", default=[], help="folder of a tuned checkpoint")
    add_data(parser)
    parser.add_argument("--language", default="en", help="of the clips and their transcripts")
    parser.add_argument("--clips", type=int, default=100, help="at a stride over all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="of both sides; medians are reported")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.batch_sizes, arguments.rounds = 4, [1, 4], 1
    transformers_logging.set_verbosity_error()  # else the peer's `generate` warns of its own defaults at each call
    variants = arguments.variant or ([] if arguments.model else ["tiny.en"])
    utterances = load_clips(arguments.data, arguments.clips)
    clips = check_clips([decode_audio(utterance).numpy() for utterance in utterances])
    measured: list[Measured] = []
    for name in [*variants, *map(str, arguments.model)]:
        config = load_config(
            None, overrides={"model": {"variant": name, "language": arguments.language}, "device": arguments.device}
        )
        measured += measure_model(config, clips, [u.text for u in utterances], arguments)
    audio_sec = sum(map(len, clips)) / SAMPLE_RATE
    note = f"{len(clips)} clips of {audio_sec / len(clips):.1f} s on average; medians of {arguments.rounds} rounds."
    record = not (arguments.quick or arguments.no_record)
    show("Latency of transcription", list(map(row, measured)), note, record=record)
    print(json.dumps(summarize(measured)))
    return 0


def measure_model(
    config: Config, clips: list[Waveform], references: list[str], arguments: argparse.Namespace
) -> list[Measured]:
    """Measure both sides at each batch size, in turns."""
    manager = WhisperModelManager(config)
    model, processor = manager.initialize_model()
    assert manager.weights is not None  # a model was loaded
    peer = WhisperForConditionalGeneration.from_pretrained(manager.weights.path, dtype=torch.float32)
    engines = [
        describe_engine(TorchEngine(model, processor), config),
        peer_engine(peer.to(model.device).eval(), processor, config.model.language),
    ]
    normalizer = headline_normalizer(config.model.language)
    metric = metric_of(normalizer)
    measured = []
    for size in arguments.batch_sizes:
        results: dict[str, list[LatencyResult]] = {engine.name: [] for engine in engines}
        for _ in range(arguments.rounds):
            for engine in engines:
                results[engine.name].append(measure_engine(engine, clips, batch_size=size, name=config.model.variant))
        rates = {
            name: None
            if found[-1].reason is not None
            else error_rate(word_counts(references, found[-1].texts, normalizer))
            for name, found in results.items()
        }
        measured += [
            Measured(
                config.model.variant, size, name, tuple(found), tuple(results[PEER]), rates[name], rates[PEER], metric,
            )
            for name, found in results.items()
        ]  # fmt: skip
    return measured


def peer_engine(model: Any, processor: Any, language: str | None) -> MeasuredEngine:
    """Make an engine of stock transformers: features padded to 30 s, then `generate`."""
    spoken = {"language": language, "task": "transcribe"} if model.generation_config.is_multilingual else {}

    @torch.inference_mode()
    def generate(clips: Sequence[Waveform], **limits: int) -> Any:
        inputs = processor(list(clips), sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True)
        features, mask = inputs.input_features.to(model.device), inputs.attention_mask.to(model.device)
        return model.generate(features, attention_mask=mask, **spoken, **limits)

    def transcribe(clips: Sequence[Waveform]) -> list[str]:
        return [text.strip() for text in processor.batch_decode(generate(clips), skip_special_tokens=True)]

    return MeasuredEngine(
        name=PEER,
        transcribe=transcribe,
        device=str(model.device),
        precision=str(model.dtype).removeprefix("torch."),
        audio_context="full",
        first_token=lambda clip: generate([clip], max_new_tokens=1).tolist(),
    )


def row(side: Measured) -> dict[str, str]:
    """Lay one side out."""
    first = side.rounds[0]
    return {
        "model": Path(side.model).name,
        "engine": side.engine,
        "audio context": {"full": "30 s", "dynamic": "own length"}[first.audio_context],
        "device": first.device,
        "precision": first.precision,
        "batch": str(side.batch_size),
        "RTF": number(side.median("rtf")),
        "RTFx": number(side.median("rtfx")),
        "p50": number(side.median("p50_sec"), " s"),
        "p95": number(side.median("p95_sec"), " s"),
        "first token": number(side.median("first_token_sec"), " s"),
        side.metric: number(side.rate),
        "speedup": number(side.speedup, " x"),
    }


def summarize(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the figures of the first model's single clips, and of each other measurement by model and batch size."""
    by_setting = {
        f"{side.model}, batch {side.batch_size}": {
            **{name: side.median(name) for name in FIGURES},
            side.metric.lower(): side.rate,
            "speedup_vs_transformers": side.speedup,
            f"{side.metric.lower()}_transformers": side.peer_rate,
        }
        for side in measured
        if side.engine != PEER
    }
    first = next(iter(by_setting))
    return {"measured": first, **by_setting.pop(first), "others": by_setting}


if __name__ == "__main__":
    run_main(main)
