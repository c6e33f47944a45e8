"""Everything that a GPU decides, in one run: training, transcription, the tests of a GPU, estimates for other GPUs.

    python benchmarks/gpu.py [--minutes 8] [--sizes base small medium large-v3-turbo] [--model FOLDER] [--quick]

Needs no network: weights are random in the shapes of each size, with the tokenizer of the packaged tiny.en, whose own
weights transcribe. Each size is trained in a process of its own, by this library at own length, with batches of clips
and of seconds, and by benchmarks/hf_recipe.py with reading processes, at equal batch, precision and updates. Sizes go
from small to large: one that would not fit into the time that is left is left out, and the table says so. Without a
GPU a small stand-in is measured on the CPU, and the table says that too. The last line printed is one JSON object;
tables are appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.training import Figures, Job, add_shared_arguments, make_job
from scripts.benchmarking import number, show
from scripts.command_line import path_argument

SIZES = {  # width, encoder and decoder layers, heads, mel bins, tokens
    "base": (512, 6, 6, 8, 80, 51_865),
    "small": (768, 12, 12, 12, 80, 51_865),
    "medium": (1024, 24, 24, 16, 80, 51_865),
    "large-v3-turbo": (1280, 32, 4, 20, 128, 51_866),
}
STAND_IN = {"width 64": (64, 2, 2, 2, 80, 51_865)}
SIDES = {"clips": "ours, batches of {} clips", "seconds": "ours, batches of {:.0f} s", "hf": "Hugging Face recipe"}
CLIP_SEC = 4.0  # about that of the bundled clips
WARM_UPDATES = 10  # not counted: libraries choose kernels, allocators settle
TRAINING_SHARE = 0.6  # of the time
LAUNCH_SEC = 6e-6  # of an operator of torch on the host of a rented GPU: assumed where no GPU was measured
ASSUMED_MFU = 0.35  # likewise, where the host does not limit
GPUS = ("T4", "L4", "A100")
PROFILE_CLIPS = 2_000
REST_MINUTES = 5.0  # of the notebook: about 2 to set up and download, and 3, which all but training takes on two cores
TINY = (384, 4, 4, 6, 80, 51_864)
INPUT_OPERATORS = 57  # features of an update, and its optimizer and copies (benchmarks/launches.py)
CLIP_HOST_SEC = 0.0125  # to decode and augment a clip on a core (AMD EPYC, 2026-11-30); two workers share it
WORKERS = 2  # as Colab has cores


def main() -> int:
    arguments = parse()
    if arguments.part is not None:
        measure_part(arguments.part)
        return 0
    import torch

    has_gpu, began = torch.cuda.is_available(), time.monotonic()
    arguments.device = "cuda" if has_gpu else "cpu"
    if arguments.precision is None:
        arguments.precision = (
            ("bfloat16" if torch.cuda.is_bf16_supported(False) else "float16") if has_gpu else "float32"
        )
    named = (
        torch.cuda.get_device_name() if has_gpu else "no GPU: a small stand-in on the CPU, whose figures say nothing"
    )
    sizes = {name: SIZES[name] for name in arguments.sizes} if has_gpu else STAND_IN
    if not has_gpu or arguments.quick:
        arguments.batch, arguments.clips, arguments.updates, arguments.minutes = 4, 12, 3, 1.0
        arguments.batch_seconds, arguments.peer_workers = 16.0, 1
    budget_sec = 60 * arguments.minutes if has_gpu else math.inf
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training = measure_training(sizes, arguments, folder, began + TRAINING_SHARE * budget_sec)
        transcription = measure_transcription(arguments, folder, began + budget_sec)
    tests = run_gpu_tests() if has_gpu else "not run: no GPU"
    note = (
        f"{named}; {arguments.precision}; {arguments.updates} updates, the first {WARM_UPDATES} apart; random weights. "
        "Ours without augmentation and without padded batches."
    )
    show("Training on a GPU", [training_row(each) for each in training], note, record=arguments.record)
    show("Transcription on a GPU", transcription, named, record=arguments.record)
    estimates = estimate_updates(training, arguments, sizes)
    show("Estimated, not measured: training on other GPUs", estimates, ESTIMATE_NOTE, record=arguments.record)
    minutes = profile_minutes(training)
    show(
        f"Estimated, not measured: minutes to train on {PROFILE_CLIPS:,} clips of {CLIP_SEC:.0f} s",
        minutes, ESTIMATE_NOTE, record=arguments.record,
    )  # fmt: skip
    print(f"tests of a GPU: {tests}")
    figures = {
        "device": named, "is_gpu": has_gpu, "precision": arguments.precision, "training": training,
        "transcription": transcription, "estimates": estimates, "profile_minutes": minutes, "gpu_tests": tests,
        "seconds": round(time.monotonic() - began), **speedups(training),
    }  # fmt: skip
    print(json.dumps(figures))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shared_arguments(parser)
    parser.set_defaults(batch=32, clips=320, updates=110, dev_clips=2, precision=None, peer_workers=4, speed_only=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of everything but the tests")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch-seconds", type=float, default=256.0, help="of audio per update, by seconds")
    parser.add_argument("--model", type=path_argument, help="tuned checkpoint that transcribes; else stock tiny.en")
    parser.add_argument("--quick", action="store_true", help="under a minute: a small stand-in, nothing recorded")
    parser.add_argument("--part", type=path_argument, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.threads = int(os.environ.get("OMP_NUM_THREADS") or arguments.threads)
    arguments.record = not (arguments.quick or arguments.no_record)
    arguments.full_context_prob = 0.0
    return arguments


def measure_training(
    sizes: Mapping[str, tuple[int, ...]], arguments: argparse.Namespace, folder: Path, deadline: float
) -> list[Figures]:
    """Train each size by each side, as far as the time goes: one row per size and side."""
    rows: list[Figures] = []
    took: dict[str, float] = {}  # seconds per TFLOP and update, of the size before
    for name, shape in sizes.items():
        arguments.variant = str(random_weights(folder / name, shape))
        (folder / f"{name}-work").mkdir()
        job = make_job(arguments, folder / f"{name}-work")
        per_epoch = -(-job.clips // job.batch_size)
        for side in SIDES:
            blank = {"size": name, "side": SIDES[side].format(
                arguments.batch_seconds if side == "seconds" else arguments.batch)}  # fmt: skip
            left_sec = deadline - time.monotonic()
            expected_sec = took.get(side, 0.0) * tflop_per_update(shape, arguments.batch, padded=side == "hf")
            updates = arguments.updates
            if expected_sec and expected_sec * updates > left_sec:
                updates = max(0, int(left_sec / expected_sec))
            if left_sec <= 0 or updates < min(arguments.updates, 2 * WARM_UPDATES):
                rows.append({**blank, "reason": f"left out: {max(0.0, left_sec):.0f} s were left"})
                continue
            epochs = -(-updates // per_epoch)
            if side == "seconds":  # as many updates
                epochs *= max(1, round(arguments.batch_seconds / CLIP_SEC / arguments.batch))
            own = replace(
                job, side="hf" if side == "hf" else "ours", epochs=epochs, planned_updates=epochs * per_epoch,
                stop_after=epochs * per_epoch, batch_seconds=arguments.batch_seconds if side == "seconds" else None,
                folder=str(Path(job.folder, side)),
            )  # fmt: skip
            rows.append({**blank, **run_part(own)})
            if (sec := rows[-1].get("update_sec")) is not None:
                took[side] = sec / tflop_per_update(shape, arguments.batch, padded=side == "hf")
    return rows


def random_weights(folder: Path, shape: tuple[int, ...]) -> Path:
    """Write a Whisper of random weights, with the processor of a packaged multilingual one if there is one."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor

    from src.models import WhisperModelManager
    from src.models.dynamic_context import DynamicWhisper
    from src.utils import load_config
    from src.utils.errors import WhisperASRError

    manager = WhisperModelManager(load_config(None, overrides={"device": "cpu"}))
    try:
        known, processor = manager.initialize_model("base")
    except WhisperASRError:
        known, processor = manager.initialize_model("tiny.en")
    width, encoder, decoder, heads, mels, tokens = shape
    config = WhisperConfig(
        **{**known.config.to_dict(), "d_model": width, "encoder_layers": encoder, "decoder_layers": decoder,
           "num_hidden_layers": encoder, "encoder_attention_heads": heads, "decoder_attention_heads": heads,
           "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "num_mel_bins": mels,
           "vocab_size": max(tokens, known.config.vocab_size)}
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DynamicWhisper(config)
    model.generation_config = known.generation_config
    model.generation_config.alignment_heads = [[decoder - 1, 0]]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    return folder


def run_part(job: Job) -> Figures:
    """Train in a process of its own; return its figures, or why there are none."""
    folder = Path(job.folder)
    folder.mkdir()
    path = folder / "part.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run([sys.executable, __file__, "--part", str(path)], env=environment)
    result = folder / "result.json"
    if done.returncode or not result.exists():
        return {"reason": f"failed with exit code {done.returncode}; its error is above"}
    figures: Figures = json.loads(result.read_text(encoding="utf-8"))
    return figures


def measure_part(path: Path) -> None:
    """Do one job, and write clips per second, time per update, FLOPs and waiting to `result.json` next to it."""
    import torch

    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    with waits_for_data() as waited:
        if job.side == "hf":
            from benchmarks import training_peer

            found = training_peer.train_hf(job)
        else:
            from benchmarks import training_sides

            found = training_sides.train_ours(job)
    seconds = found["update_sec"]
    steady = seconds[min(WARM_UPDATES, len(seconds) // 2) :]
    trained = job.clips * job.stop_after / -(-job.clips // job.batch_size)  # clips
    tflop, peak = found["tflop_per_update"], job.peak_tflops or found["peak_tflops"]
    figures = {
        "updates": len(seconds),
        "clips_per_sec": trained / len(seconds) * len(steady) / sum(steady),
        "update_sec": sum(steady) / len(steady),
        "median_update_sec": statistics.median(steady),
        "warm_up_sec": sum(seconds) - sum(steady),
        "tflop_per_update": tflop,
        "mfu": tflop * len(steady) / sum(steady) / peak if tflop and peak else None,
        "wait_share": min(1.0, sum(waited) / sum(seconds)),
        "peak_mb": found["peak_mb"],
    }
    path.with_name("result.json").write_text(json.dumps(figures), encoding="utf-8")


@contextmanager
def waits_for_data() -> Iterator[list[float]]:
    """Collect the seconds that torch's loaders keep their user waiting, on both sides."""
    from torch.utils.data import dataloader

    waited: list[float] = []
    real = dataloader._BaseDataLoaderIter.__next__

    def timed(self: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(self)
        finally:
            waited.append(time.perf_counter() - began)

    dataloader._BaseDataLoaderIter.__next__ = timed  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        dataloader._BaseDataLoaderIter.__next__ = real  # type: ignore[method-assign]


def training_row(row: Figures) -> dict[str, str]:
    """Lay out a size and side."""
    if "reason" in row:
        blank = dict.fromkeys(("updates", "clips/s", "update", "MFU", "waiting", "memory"), "-")
        return {"size": row["size"], "side": f"{row['side']} ({row['reason']})", **blank}
    return {
        "size": row["size"],
        "side": row["side"],
        "updates": str(row["updates"]),
        "clips/s": number(row["clips_per_sec"]),
        "update": f"{1000 * row['update_sec']:.0f} ms",
        "MFU": "-" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %",
        "waiting": f"{100 * row['wait_share']:.0f} %",
        "memory": f"{row['peak_mb']:,.0f} MB",
    }


def speedups(training: Sequence[Figures]) -> dict[str, float]:
    """Return clips per second over the recipe's, by size and kind of batch."""
    speeds = {(row["size"], row["side"]): row["clips_per_sec"] for row in training if "clips_per_sec" in row}
    peers = {size: speed for (size, side), speed in speeds.items() if side == SIDES["hf"]}
    return {
        f"speedup {size}, {side.removeprefix('ours, ')}": round(speed / peers[size], 2)
        for (size, side), speed in speeds.items()
        if size in peers and side != SIDES["hf"]
    }


def measure_transcription(arguments: argparse.Namespace, folder: Path, deadline: float) -> list[dict[str, str]]:
    """Transcribe 4 s clips and a long recording by each engine and peer, in growing batches."""
    from benchmarks.latency import System, gpu_systems, join_all
    from scripts.benchmarking import load_clips
    from src.data.audio import SAMPLE_RATE
    from src.data.dataset import decode_audio
    from src.utils import load_config
    from src.utils.errors import WhisperASRError

    is_small = arguments.device == "cpu" or arguments.quick
    model, count, minutes = str(arguments.model or "tiny.en"), 4 if is_small else 256, 0.2 if is_small else 30.0
    if is_small and arguments.model is None:
        model = str(random_weights(folder / "transcribes", next(iter(STAND_IN.values()))))
    config = load_config(None, overrides={
        "device": arguments.device, "model": {"variant": model, "language": None if model == "tiny.en" else "en"},
        "inference": {"max_tokens_per_sec": 4.0, "temperatures": [0.0]}, "paths.cache_dir": str(folder / "cache"),
    } if is_small else {
        "device": arguments.device, "model.variant": model, "inference": {"temperatures": [0.0]},
    })  # fmt: skip
    utterances = load_clips(None, min(count, 100))
    clips, texts = [decode_audio(u).numpy() for u in utterances], [u.text for u in utterances]
    repeats = -(-count // len(clips))
    joined, spoken = join_all(clips, texts, 60 * minutes)
    clips, texts = (clips * repeats)[:count], (texts * repeats)[:count]
    batches = (2,) if is_small else (1, 16, 64, 128)
    rows: list[dict[str, str]] = []
    systems: Iterator[tuple[str, Callable[[], list[str]] | str]]
    try:
        systems = gpu_systems(model, config, clips, joined, batches=batches)
        for name, run in systems:
            audio_sec = len(joined) / SAMPLE_RATE if "long" in name else sum(map(len, clips)) / SAMPLE_RATE
            reason = run if isinstance(run, str) else "left out: no time" if time.monotonic() > deadline else None
            if reason is None and not isinstance(run, str):
                system = System(name, run, [spoken] if "long" in name else texts, audio_sec)
                system.measure()
                rows.append(system.row())
            else:
                blank = {"audio": "-", "compute": str(reason), "RTFx": "-", "WER": "-"}
                rows.append({"system": name, **blank})
    except WhisperASRError as err:
        rows.append({"system": model, "audio": "-", "compute": str(err).splitlines()[0], "RTFx": "-", "WER": "-"})
    return rows


def run_gpu_tests() -> str:
    """Run the tests that need a GPU; return the last line of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


ESTIMATE_NOTE = (
    "Time per update: the larger of FLOPs over the peak of the data sheet times the utilisation measured here, and "
    "operators times the time that the host needs for one; where no GPU was measured, "
    f"{ASSUMED_MFU:.0%} and {1e6 * LAUNCH_SEC:.0f} us are assumed."
)


def tflop_per_update(shape: tuple[int, ...], clips: int, *, padded: bool) -> float:
    """Return the model FLOPs of an update with clips of 4 s, at own length or padded to 30 s."""
    from benchmarks.training_measures import forward_flops

    positions = 1500 if padded else round(50 * (CLIP_SEC + 0.5))
    found = forward_flops(_config(shape), clips=clips, positions=positions, tokens=24, scored=24 * clips)
    return 3 * found / 1e12


def _config(shape: tuple[int, ...], width: int | None = None) -> Any:
    from transformers import WhisperConfig

    full, encoder, decoder, heads, mels, tokens = shape
    width = width or full
    return WhisperConfig(
        d_model=width, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, num_mel_bins=mels,
        vocab_size=tokens,
    )  # fmt: skip


def count_operators(shape: tuple[int, ...]) -> int:
    """Count the operators that a forward and backward pass launches, at a small width, on the CPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from src.models.dynamic_context import DynamicWhisper

    free = ("view", "t.", "transpose", "expand", "slice", "detach", "unsqueeze", "squeeze", "permute", "_unsafe_view",
            "alias", "split", "select", "as_strided", "reshape", "unbind", "empty", "is_")  # fmt: skip

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not str(func).startswith(tuple(f"aten.{name}" for name in free))
            return func(*args, **(kwargs or {}))

    config = _config((shape[0], *shape[1:3], 2, *shape[4:]), width=16)
    model = DynamicWhisper(config).train()
    model.audio_context = "dynamic"
    labels = torch.zeros(2, 8, dtype=torch.long)
    with Counter() as counter:
        model(torch.zeros(2, config.num_mel_bins, 100), labels=labels).loss.backward()
    return counter.count


def estimate_updates(
    training: Sequence[Figures], arguments: argparse.Namespace, sizes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, str]]:
    """Return the estimated time of an update on other GPUs, by size, with what limits it."""
    rows = []
    for name, shape in {**sizes, **SIZES}.items():
        if name not in SIZES:
            continue
        line = {"size": name, "operators": str(count_operators(shape))}
        host_sec = int(line["operators"]) * LAUNCH_SEC
        for gpu in GPUS:
            gpu_sec = tflop_per_update(shape, 32, padded=False) / tflops_reached(gpu, training)
            line[gpu] = f"{1000 * max(gpu_sec, host_sec):.0f} ms ({'host' if host_sec > gpu_sec else 'GPU'})"
        rows.append(line)
    return rows


def profile_minutes(training: Sequence[Figures] = ()) -> list[dict[str, str]]:
    """Return the estimated minutes that the profiles of config.yaml train on `PROFILE_CLIPS`, by GPU.

    Batches at their own length and the share that is padded to 30 s count; validation does not. The notebook's first
    cell and docs/training.md have the table.
    """
    from src.utils import load_config

    rows = []
    for profile in ("demo", "balanced", "production"):
        config = load_config(ROOT / "config.yaml", profile=profile)
        shape, plan = SIZES.get(config.model.variant, TINY), config.training
        launch_sec = (count_operators(shape) + INPUT_OPERATORS) * LAUNCH_SEC
        host_sec = max(launch_sec, plan.batch_size * CLIP_HOST_SEC / WORKERS)
        line = {"profile": profile, "model": f"{config.model.variant}, {plan.epochs} epochs"}
        for gpu in GPUS:
            own_sec, padded_sec = (
                max(host_sec, tflop_per_update(shape, plan.batch_size, padded=padded) / tflops_reached(gpu, training))
                for padded in (False, True)
            )
            update_sec = (1 - plan.full_context_prob) * own_sec + plan.full_context_prob * padded_sec
            line[gpu] = f"{plan.epochs * PROFILE_CLIPS / plan.batch_size * update_sec / 60:.1f}"
        rows.append(line)
    return rows


def tflops_reached(gpu: str, training: Sequence[Figures]) -> float:
    """Return the TFLOP/s that training reaches on a GPU, by the best utilisation that was measured, else by ours."""
    from benchmarks.training_measures import PEAK_TFLOPS

    mfu = [row["mfu"] for row in training if row.get("mfu") is not None and row["side"] != SIDES["hf"]]
    return PEAK_TFLOPS[gpu] * max(mfu, default=ASSUMED_MFU)


if __name__ == "__main__":
    sys.exit(main())
