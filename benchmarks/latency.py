"""Compare whole systems on the same weights: this project's engines, faster-whisper, and transformers' pipeline.

    python benchmarks/latency.py --model FOLDER [--data FILE.parquet] [--clips 200] [--hours 3] [--quick]

Each system is what its user would call, features included, on the CPU, in a process of its own (see
transcription_systems.py). The rounds go through all systems in turn, so that other work on the machine affects each of
them; a ratio is the median of the rounds' ratios. The last line printed is one JSON object; tables are appended to
docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ENVIRONMENT = dict(os.environ)  # of other processes; src adds to it

import numpy as np
import soundfile

from benchmarks import transcription_systems
from benchmarks.transcription_systems import GREEDY, SYSTEMS, WAITS_AS_HERE, own_config, text_of
from scripts.benchmarking import add_data, load_clips, number, points, require_peer, show
from scripts.command_line import path_argument
from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.data.sources.catalog import SAMPLE_CLIP
from src.evaluation.metrics import WHISPER_ENGLISH, EditCounts, compare_counts, error_rate, word_counts
from src.evaluation.streams import AlignedClip, join_clips
from src.inference.ct2_engine import ct2_folder
from src.inference.engine_base import Engine
from src.inference.engines import load_engine
from src.inference.files.transcribe import BatchInference
from src.models.weights import resolve_weights
from src.utils.config import Config
from src.utils.runtime import ctranslate2_cuda_problem, get_device, usable_cores

RATIOS = {  # figure: (peer, ours)
    "single_vs_faster_whisper": ("faster-whisper int8", "CTranslate2 int8"),
    "single_vs_faster_whisper_waiting": (WAITS_AS_HERE, "CTranslate2 int8"),
    "batched_vs_faster_whisper": ("faster-whisper int8", "CTranslate2 int8, batches"),
    "torch_vs_hf_pipeline": ("transformers pipeline", "torch, batches"),
    "long_vs_batched_pipeline": ("faster-whisper batched, long", "CTranslate2 int8, long"),
}

_MEASURE = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=path_argument, required=True, help="folder of a tuned checkpoint")
    add_data(parser)
    parser.add_argument("--clips", type=int, default=100, help="at a stride over all")
    parser.add_argument("--rounds", type=int, default=3, help="of all systems; medians are reported")
    parser.add_argument("--long-minutes", type=float, default=30.0, help="of the long recording")
    parser.add_argument("--hours", type=float, default=3.0, help="of the file whose memory is measured; 0: none")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.rounds, arguments.long_minutes, arguments.hours = 4, 1, 0.5, 0.0
    folder, record = str(arguments.model), not (arguments.quick or arguments.no_record)
    config = own_config(folder)
    utterances = load_clips(arguments.data, arguments.clips)
    clips, references = [decode_audio(u).numpy() for u in utterances], [u.text for u in utterances]
    seconds = 60 * arguments.long_minutes
    systems = measure_systems(folder, config, clips, references, rounds=arguments.rounds, long_sec=seconds)
    audio_sec = sum(map(len, clips)) / SAMPLE_RATE
    note = f"{len(clips)} clips of {audio_sec / len(clips):.1f} s on average; medians of {arguments.rounds} rounds."
    show("Systems on the same weights", [*map(System.row, systems)], f"{note} {compared(systems)}", record=record)
    processes = measure_processes(folder, config, clips, references, arguments.hours)
    show("Processes", [{name: number(value) for name, value in processes.items()}], note, record=record)
    print(json.dumps(figures(systems) | processes))
    return 0


@dataclass
class System:
    """Something that is measured: `run` returns texts, `references` are what was said in them."""

    name: str
    run: Callable[[], list[str]]
    references: Sequence[str]
    audio_sec: float
    seconds: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def measure(self) -> None:
        """Run once more."""
        began = time.perf_counter()
        self.texts = self.run()
        self.seconds.append(time.perf_counter() - began)

    @property
    def counts(self) -> list[EditCounts]:
        """Word errors of the last round's texts."""
        return word_counts(self.references, self.texts, WHISPER_ENGLISH)

    @property
    def wer(self) -> float | None:
        """Word error rate of the last round's texts."""
        return error_rate(self.counts)

    def row(self) -> dict[str, str]:
        """Lay it out."""
        seconds = statistics.median(self.seconds)
        wer = "-" if self.wer is None else f"{100 * self.wer:.1f} %"
        return {
            "system": self.name,
            "audio": f"{self.audio_sec:.0f} s",
            "compute": f"{seconds:.1f} s",
            "RTFx": f"{self.audio_sec / seconds:.1f}",
            "WER": wer,
        }


def measure_systems(
    model: str, config: Config, clips: Sequence[Waveform], references: Sequence[str], *, rounds: int, long_sec: float
) -> list[System]:
    """Measure every system on the clips, and the two for long recordings on clips joined with pauses.

    Raises: ImportError: faster-whisper is absent.
    """
    require_peer()
    folder = ct2_folder(model, quantization="int8", cache_dir=config.paths.cache_dir)
    joined, spoken = join_all(clips, references, long_sec)
    audio_sec, joined_sec = sum(map(len, clips)) / SAMPLE_RATE, len(joined) / SAMPLE_RATE
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        np.savez(Path(scratch) / "clips.npz", *clips)
        np.savez(Path(scratch) / "long.npz", joined)
        systems, processes = list[System](), list[subprocess.Popen[str]]()
        for name in SYSTEMS:
            is_long = name.endswith("long")
            command = [
                sys.executable, transcription_systems.__file__, name, model, str(folder),
                f"{scratch}/{'long' if is_long else 'clips'}.npz", str(usable_cores()),
            ]  # fmt: skip
            process = stack.enter_context(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                env=os.environ if name == WAITS_AS_HERE else ENVIRONMENT,
            ))  # fmt: skip
            said, sec = ([spoken], joined_sec) if is_long else (references, audio_sec)
            systems.append(System(name, partial(ask, process, "run"), said, sec))
            processes.append(process)
        for process in processes:
            ask(process, "are you ready")
        for _ in range(rounds):
            for system in systems:
                system.measure()
    return systems


def ask(process: subprocess.Popen[str], question: str) -> list[str]:
    """Write a line to a system's process; return its answer, once there is one."""
    assert process.stdin is not None and process.stdout is not None
    print(question, file=process.stdin)
    if not (line := process.stdout.readline()):
        raise RuntimeError(f"{process.args} ended; its error is above")
    return list(json.loads(line))


def gpu_systems(
    model: str, config: Config, clips: Sequence[Waveform], joined: Waveform, *, batches: Sequence[int]
) -> Iterator[tuple[str, Callable[[], list[str]] | str]]:
    """Give engines and peers on the device of `config`, one after the other; a text instead of a system says why not.

    Each has been warmed up with as many clips as it takes at once.
    """
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

    device, precision = get_device(config.device).type, "float16" if config.device == "cuda" else "float32"
    half = torch.float16 if device == "cuda" else torch.float32
    weights = str(resolve_weights(model, cache_dir=config.paths.cache_dir).path)

    def ours(engine: Engine, size: int, audios: Sequence[Waveform]) -> Callable[[], list[str]]:
        settings = config.model_copy(update={"inference": config.inference.model_copy(update={"batch_size": size})})
        inference = BatchInference(engine=engine, config=settings)
        inference.transcribe_batch(clips[:size])
        return lambda: [item.text or "" for item in inference.transcribe_batch(audios)]

    problem = ctranslate2_cuda_problem() if device == "cuda" else None
    for name in ("torch", "ctranslate2"):
        if name == "ctranslate2" and problem is not None:
            yield f"{name} {precision}", problem
            continue
        engine = load_engine(model, config, engine=name, compute_type=precision)  # type: ignore[arg-type]
        for size in batches:
            yield f"{name} {precision}, batch {size}", ours(engine, size, clips)
        yield f"{name} {precision}, batch {batches[-1]}, long", ours(engine, batches[-1], [joined])
        del engine

    if importlib.util.find_spec("faster_whisper") is None:
        yield "faster-whisper", "not installed: pip install -r requirements-bench.txt -c constraints.txt"
    elif problem is not None:
        yield "faster-whisper", problem
    else:
        from faster_whisper import BatchedInferencePipeline, WhisperModel

        folder = ct2_folder(model, quantization=precision, cache_dir=config.paths.cache_dir)
        whisper = WhisperModel(str(folder), device=device, compute_type=precision)
        batched = BatchedInferencePipeline(whisper)
        sec = len(joined) / SAMPLE_RATE

        def at_once(size: int) -> list[str]:  # its batches are pieces of one recording: here one for each clip
            stream, marks, at = np.concatenate(clips), [], 0.0
            for clip in clips:
                marks.append({"start": at, "end": at + len(clip) / SAMPLE_RATE})
                at = marks[-1]["end"]
            found, _ = batched.transcribe(stream, batch_size=size, clip_timestamps=marks, vad_filter=False, **GREEDY)
            return [segment.text for segment in found]

        def long() -> list[str]:
            marks = None if sec > 30 else [{"start": 0.0, "end": sec}]
            return [text_of(batched.transcribe(joined, batch_size=batches[-1], clip_timestamps=marks, **GREEDY))]

        for size in batches:
            at_once(size)
            yield f"faster-whisper {precision}, batch {size}", partial(at_once, size)
        yield f"faster-whisper {precision}, batch {batches[-1]}, long", long

    stock = WhisperForConditionalGeneration.from_pretrained(weights, dtype=half).to(device)
    processor = WhisperProcessor.from_pretrained(weights)
    for size in batches:
        hf: Any = pipeline(
            "automatic-speech-recognition", model=stock, tokenizer=processor.tokenizer, dtype=half, device=device,
            feature_extractor=processor.feature_extractor, batch_size=size, chunk_length_s=30,
        )  # fmt: skip

        def piped(audios: Sequence[Waveform], hf: Any = hf) -> list[str]:
            return [found["text"] for found in hf([audio.copy() for audio in audios])]

        piped(clips[:size])
        yield f"transformers pipeline {precision}, batch {size}", partial(piped, clips)
    yield f"transformers pipeline {precision}, batch {batches[-1]}, long", partial(piped, [joined])


def join_all(clips: Sequence[Waveform], references: Sequence[str], seconds: float) -> tuple[Waveform, str]:
    """Join clips with pauses, over and over, to a recording of some length; return it and what is said in it."""
    parts = [AlignedClip(str(i), *pair) for i, pair in enumerate(zip(references, clips, strict=True))]
    stream = join_clips(parts, name="long", seed=0, duration_sec=seconds)
    return stream.audio, stream.text


def ratios(peer: System, own: System) -> list[float]:
    """Return how many times as fast ours was, by round."""
    return [theirs / ours for theirs, ours in zip(peer.seconds, own.seconds, strict=True)]


def figures(systems: Sequence[System]) -> dict[str, float | None]:
    """Return the ratios, and the WER of each system."""
    by_name = {system.name: system for system in systems}
    found: dict[str, float | None] = {
        name: statistics.median(ratios(by_name[peer], by_name[own])) for name, (peer, own) in RATIOS.items()
    }
    return found | {f"wer {system.name}": system.wer for system in systems}


def compared(systems: Sequence[System]) -> str:
    """Compare ours with their peers in words: the range of the rounds' ratios, and WER paired by clip."""
    by_name, found = {system.name: system for system in systems}, []
    for peer, own in ((by_name[peer], by_name[own]) for peer, own in RATIOS.values()):
        by_round = ratios(peer, own)
        found.append(f"{own.name} against {peer.name}: {min(by_round):.1f} to {max(by_round):.1f} times as fast")
        if len(own.references) > 1:
            found[-1] += f", WER {points(compare_counts(peer.counts, own.counts))} points"
    return "; ".join(found) + "."


def cold_process(folder: Path, recording: Path) -> tuple[float, float]:
    """Transcribe a file in a new process; return its seconds, start to end, and its peak memory in MB."""
    command = [sys.executable, str(ROOT / "scripts" / "transcribe.py"), str(recording), "--model", str(folder)]
    # from a small process: to Linux the peak of a child begins with what its parent holds
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=True)
    seconds, peak_kb = map(float, done.stdout.split())
    return seconds, peak_kb / 1000


def measure_processes(
    model: str, config: Config, clips: Sequence[Waveform], references: Sequence[str], hours: float
) -> dict[str, float | None]:
    """Return how long a cold process takes for its first transcript, and what a long file costs in memory."""
    folder = ct2_folder(model, quantization="int8", cache_dir=config.paths.cache_dir)
    found: dict[str, float | None] = {
        "first_transcript_sec": statistics.median(cold_process(folder, SAMPLE_CLIP)[0] for _ in range(3)),
        "memory_short_mb": None,
        "memory_long_mb": None,
    }
    if hours:
        for name, length in (("memory_short_mb", hours / 6), ("memory_long_mb", hours)):
            with tempfile.TemporaryDirectory() as scratch:
                recording = Path(scratch) / "long.wav"
                soundfile.write(recording, join_all(clips, references, 3600 * length)[0], SAMPLE_RATE)
                found[name] = cold_process(folder, recording)[1]
    return found


if __name__ == "__main__":
    sys.exit(main())
