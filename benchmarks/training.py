"""Fine-tune by this library and by the Hugging Face Seq2SeqTrainer recipe: speed, memory and word error rate.

    python benchmarks/training.py [--quick] [--train FILE.parquet --dev FILE.parquet]
    python benchmarks/training.py --real --train FILE.parquet --dev FILE.parquet
    python benchmarks/training.py --variant small --precision bfloat16 --device cuda --batch 32

Both sides get the same weights, clips, label style, batch size, precision, peak rate and number of updates, each in a
process of its own, one after the other. Ours: own-length features made as it goes. The peer: benchmarks/hf_recipe.py.
Word error rates of both are measured by the same evaluator on clips at a stride over the dev split. `--real` is one
run over the whole train split for three epochs, and by the peer for the first; a stopped one resumes. The last line
printed is one JSON object; tables are appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.benchmarking import append_table, points
from scripts.command_line import path_argument

if TYPE_CHECKING:
    from src.evaluation.metrics import PairedComparison

EPOCHS = 3  # of the real run
WARMUP_RATIO = 0.1
Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One side's work, read by its process from a file.

    Attributes:
        side: "ours", "hf", or "stock": the weights as they are, for their error rate.
        train, dev: Parquet files with the chosen clips.
        weights: a folder in Hugging Face format.
        language: of the clips, for multilingual weights.
        planned_updates: over which the learning rate falls to zero.
        stop_after: updates to do of these.
        evaluate: measure the word error rate at the end; by epoch in the real run.
        resumable: save the state on the way, and resume from it.
    """

    side: str
    folder: str
    train: str
    dev: str
    clips: int
    weights: str
    language: str | None
    device: str
    precision: str
    threads: int
    seed: int
    batch_size: int
    learning_rate: float
    epochs: int
    planned_updates: int
    stop_after: int
    full_context_prob: float
    peer_workers: int = 0
    peak_tflops: float | None = None  # by the device's name where None
    batch_seconds: float | None = None  # of audio per update of our side; None: `batch_size` clips
    augment: bool = False
    evaluate: bool = True
    resumable: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.side}-augmented" if self.augment else self.side

    @property
    def warmup_updates(self) -> int:
        """As our schedule rounds them."""
        return math.ceil(WARMUP_RATIO * self.planned_updates)


def main() -> int:
    arguments = parse()
    if arguments.job is not None:
        run_side(Job(**json.loads(arguments.job.read_text(encoding="utf-8"))))
        return 0
    if arguments.real:
        figures = run_real(arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = run_short(arguments, Path(folder))
    print(json.dumps(figures))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shared_arguments(parser)
    parser.add_argument("--full-context-prob", type=float, default=0.1, help="share of our batches padded to 30 s")
    parser.add_argument("--real", action="store_true", help="the whole train split, three epochs; about two hours")
    parser.add_argument(
        "--work", type=path_argument, default=ROOT / "runs" / "benchmark_training", help="of the real run"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, nothing recorded")
    parser.add_argument("--job", type=path_argument, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.train is None) != (arguments.dev is None):
        parser.error("--train and --dev go together")
    if arguments.quick:
        arguments.batch, arguments.clips, arguments.updates, arguments.dev_clips = 4, 12, 3, 8
    arguments.no_record |= arguments.quick
    return arguments


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that benchmarks/context_share.py has too."""
    parser.add_argument(
        "--train", type=path_argument, help="Parquet in the Hugging Face audio layout; bundled clips by default"
    )
    parser.add_argument("--dev", type=path_argument, help="likewise, for the word error rate")
    parser.add_argument("--variant", default="tiny.en", help="or a folder with weights")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=8, help="clips an update")
    parser.add_argument("--clips", type=int, default=160, help="at a stride over the train split")
    parser.add_argument("--updates", type=int, default=16, help="that many batches of the clips, at a stride")
    parser.add_argument("--dev-clips", type=int, default=100, help="at a stride over the dev split")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision; by name for known GPUs")
    parser.add_argument("--peer-workers", type=int, default=0, help="reading processes of the peer; its guide has none")
    parser.add_argument("--speed-only", action="store_true", help="no word error rate, for weights that say nothing")
    parser.add_argument("--no-record", action="store_true", help="append no table, draw no figure")


def run_short(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Compare a few updates; print and record the table, return the figures."""
    job = make_job(arguments, folder)
    ours = run_job(replace(job, side="ours"))
    hf = run_job(replace(job, side="hf"))
    extra = {}
    if not arguments.quick:
        if job.evaluate:
            extra["stock"] = run_job(replace(job, side="stock"))
        extra["augmented"] = run_job(replace(job, side="ours", augment=True, evaluate=False))
    compared = compare_texts(job) if job.evaluate else None
    report(
        short_table(ours, hf, compared, **extra),
        f"Training {Path(arguments.variant).name}: {job.stop_after} updates",
        job,
        arguments,
    )
    interval = compared and [100 * value for value in (compared.difference, compared.low, compared.high)]
    return {**summary(ours, hf, arguments), "wer_full_minus_hf_points": interval}


def compare_texts(job: Job) -> PairedComparison:
    """Compare our texts with the peer's, both padded to 30 s."""
    from src.evaluation.evaluator import compare_predictions
    from src.evaluation.report.run_files import load_predictions

    texts = load_predictions(job.folder)
    return compare_predictions(texts["hf full"], texts["ours full"])


def run_real(arguments: argparse.Namespace) -> Figures:
    """Train on everything; draw and record the curve after each side that has ended, so that a stop loses little."""
    from benchmarks.training_curve import curve_table, draw_curve

    folder: Path = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    job = replace(make_job(arguments, folder, real=True), resumable=True)
    stock = run_job(replace(job, side="stock"))
    ours = run_job(replace(job, side="ours"))
    first_epoch = math.ceil(job.clips / job.batch_size)
    hf = run_job(replace(job, side="hf", stop_after=first_epoch))
    report(curve_table(stock, ours, hf), f"Training {Path(arguments.variant).name}: three epochs", job, arguments)
    if not arguments.no_record:
        draw_curve(stock, ours, hf, ROOT / "docs" / "images")
    return summary({**ours, **ours["by_epoch"][-1]}, hf, arguments)


def make_job(arguments: argparse.Namespace, folder: Path, *, real: bool = False) -> Job:
    """Choose the clips, write them to files that both sides read, and set the options that both sides share."""
    from benchmarks.training_sides import choose_clips
    from src.models.weights import resolve_weights
    from src.training.updates import default_learning_rate
    from src.utils import load_config

    train, dev = folder / "train.parquet", folder / "dev.parquet"
    counts = None if real else (arguments.clips, arguments.dev_clips)
    wanted = arguments.updates * arguments.batch
    clips = choose_clips(arguments.train, arguments.dev, counts, wanted, targets=(train, dev))
    updates = math.ceil(clips / arguments.batch) * (EPOCHS if real else 1)
    weights = resolve_weights(arguments.variant, cache_dir=load_config(None).paths.cache_dir).path.resolve()
    known = json.loads((weights / "generation_config.json").read_text(encoding="utf-8"))
    width = json.loads((weights / "config.json").read_text(encoding="utf-8"))["d_model"]
    return Job(
        side="",
        folder=str(folder),
        train=str(train),
        dev=str(dev),
        clips=clips,
        weights=str(weights),
        language="en" if known.get("is_multilingual") else None,
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
        seed=arguments.seed,
        batch_size=arguments.batch,
        learning_rate=default_learning_rate(width),
        epochs=EPOCHS if real else 1,
        planned_updates=updates,
        stop_after=updates,
        full_context_prob=arguments.full_context_prob,
        peer_workers=arguments.peer_workers,
        peak_tflops=arguments.peak_tflops,
        evaluate=not arguments.speed_only,
    )


def run_job(job: Job) -> Figures:
    """Run one side in its own process, so that peak memory is its own; a resumable one that is done is not repeated."""
    name = job.name
    path, result = Path(job.folder) / f"{name}.job.json", Path(job.folder) / f"{name}.json"
    text = json.dumps(asdict(job))
    if job.resumable and result.exists() and path.exists() and path.read_text(encoding="utf-8") == text:
        print(f"{name}: done before, {result}", flush=True)
    else:
        path.write_text(text, encoding="utf-8")
        result.unlink(missing_ok=True)
        print(f"{name}: {job.stop_after if job.side != 'stock' else 0} updates", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        subprocess.run([sys.executable, __file__, "--job", str(path)], env=environment, check=True)
    figures: Figures = json.loads(result.read_text(encoding="utf-8"))
    return figures


def run_side(job: Job) -> None:
    """Do a job, and write its figures to `<folder>/<side>.json`."""
    import torch

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    torch.set_num_threads(job.threads)
    if job.side == "hf":
        from benchmarks import training_peer

        figures = training_peer.train_hf(job)
    else:
        from benchmarks import training_sides

        figures = training_sides.train_ours(job) if job.side == "ours" else training_sides.measure_stock(job)
    Path(job.folder, f"{job.name}.json").write_text(json.dumps(figures), encoding="utf-8")


def short_table(
    ours: Figures,
    hf: Figures,
    compared: PairedComparison | None,
    stock: Figures | None = None,
    augmented: Figures | None = None,
) -> list[dict[str, str]]:
    """Return the figures side by side."""

    def row(what: str, key: str, shape: str, scale: float = 1.0) -> dict[str, str]:
        cells = [shape.format(side[key] * scale) if side.get(key) is not None else "-" for side in (ours, hf)]
        return {"what": what, "ours": cells[0], "Seq2SeqTrainer": cells[1]}

    rows = [
        row("training, all updates but the first two", "samples_per_sec", "{:.2f} clips/s"),
        row("of these, updates padded to 30 s", "padded_share", "{:.0f} %", 100),
        row("at the long run's share of padded updates", "long_run_samples_per_sec", "{:.2f} clips/s"),
        row("median of single updates", "median_samples_per_sec", "{:.2f} clips/s"),
        row("processor time of all threads", "cpu_sec_per_clip", "{:.2f} s a clip"),
        row("all updates", "train_sec", "{:.1f} s"),
        row("preparing the clips before (ours: checking)", "prep_sec", "{:.1f} s"),
        row("stored before training", "prep_bytes", "{:.0f} MB", 1e-6),
        row("peak memory of the process", "peak_mb", "{:.0f} MB"),
        row("model FLOPs an update", "tflop_per_update", "{:.3f} TFLOP"),
        row("model FLOP utilisation", "mfu", "{:.1f} %", 100),
        row("WER, at own length", "wer_own", "{:.1f} %", 100),
        row("WER, padded to 30 s", "wer_full", "{:.1f} %", 100),
    ]
    if compared is not None:
        rows.append(
            {"what": "the latter, in points more than the peer", "ours": points(compared), "Seq2SeqTrainer": "-"}
        )
    if stock is not None:
        rows.append({"what": "WER before, padded to 30 s", "ours": f"{100 * stock['wer_full']:.1f} %"})
        rows[-1]["Seq2SeqTrainer"] = rows[-1]["ours"]
    if augmented is not None:
        speed = f"{augmented['samples_per_sec']:.2f} clips/s"
        rows.append({"what": "training, with default augmentation", "ours": speed, "Seq2SeqTrainer": "-"})
    return [row for row in rows if {row["ours"], row["Seq2SeqTrainer"]} != {"-"}]


def report(rows: Sequence[dict[str, str]], title: str, job: Job, arguments: argparse.Namespace) -> None:
    """Print a table, and record it."""
    for row in rows:
        first, *cells = row.values()
        print(f"{first:<46}" + "".join(f"{cell:>18}" for cell in cells))
    note = (
        f"{job.clips} clips an epoch, batch {job.batch_size}, {job.precision}, {job.threads} threads, peak rate "
        f"{job.learning_rate:.2e}, {job.warmup_updates} warm-up updates, seed {job.seed}; same weights, clips and "
        f"label style. Ours: {job.full_context_prob:.0%} of batches padded to 30 s, no augmentation unless said. Peer: "
        "benchmarks/hf_recipe.py, labels without the leading space, as its guide makes them, and "
        f"{job.peer_workers or 'no'} reading processes."
    )
    if not arguments.no_record:
        append_table(title, rows, note=note)


def summary(ours: Figures, hf: Figures, arguments: argparse.Namespace) -> Figures:
    """Return the figures of the last line."""
    return {
        "speedup_vs_hf": round(ours["samples_per_sec"] / hf["samples_per_sec"], 2),
        "memory_ratio_vs_hf": round(ours["peak_mb"] / hf["peak_mb"], 3),
        "wer_ours_own_length": ours.get("wer_own"),
        "wer_ours_full": ours.get("wer_full"),
        "wer_hf": hf.get("wer_full"),
        "speedup_long_run": ours["long_run_samples_per_sec"]
        and round(ours["long_run_samples_per_sec"] / hf["samples_per_sec"], 2),
        "speedup_of_medians": round(ours["median_samples_per_sec"] / hf["median_samples_per_sec"], 2),
        "samples_per_sec": round(ours["samples_per_sec"], 3),
        "samples_per_sec_hf": round(hf["samples_per_sec"], 3),
        "peak_mb": round(ours["peak_mb"]),
        "peak_mb_hf": round(hf["peak_mb"]),
        "mfu": ours["mfu"],
        "mfu_hf": hf["mfu"],
        "full_context_prob": arguments.full_context_prob,
    }


if __name__ == "__main__":
    sys.exit(main())
