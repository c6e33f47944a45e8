"""Measure the data path and the usual recipe: time to the first batch, decoding speed, CPU cost of each stage.

    python benchmarks/data.py [--quick] [--data FILE_OR_FOLDER.parquet] [--clips 1000]

The peer is the recipe of Hugging Face's fine-tuning guides: `datasets.map` with `WhisperFeatureExtractor`, which pads
every clip to 30 s and writes the features to the disk before training. Both prepare the same clips in this run. With a
GPU, the loader also feeds a step of 100 ms for 16 clips with all augmentation on, and the waiting is timed. The last
line printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scripts.benchmarking import append_table, median_sec
from scripts.command_line import path_argument
from src.data import AudioAugmenter, DatasetSplits, SpecAugment, Utterance, create_loader, prepare_datasets
from src.data.audio import SAMPLE_RATE, AudioCache, decode, load_audio
from src.data.augmentation.augmenter import Effects
from src.data.augmentation.effects import Gain, Noise, Pitch, Room, Speed, Telephone, pitch_ratios
from src.data.features import LogMel
from src.data.preprocessing import measure_clip
from src.data.sources.catalog import SAMPLE_PARQUET
from src.models import WhisperModelManager
from src.utils import Config, load_config

BATCH = 16
GPU_STEP_SEC = 0.1
DECODING_WORKERS = 2
DRAWN_BATCHES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=path_argument, default=SAMPLE_PARQUET, help="Parquet in the Hugging Face audio layout"
    )
    parser.add_argument("--clips", type=int, default=1000, help="clips to prepare; rows are repeated where too few")
    parser.add_argument("--peer-clips", type=int, default=None, help="clips that the peer prepares; all by default")
    parser.add_argument("--repeats", type=int, default=5, help="of each stage; the median is reported")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, few repeats, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.peer_clips, arguments.repeats = 200, 50, 1
    with tempfile.TemporaryDirectory() as folder:
        figures = run(arguments, Path(folder))
    rows = table(figures)
    for row in rows:
        print(f"{row['what']:<58} {row['ours']:>14} {row['peer']:>14}")
    if not arguments.quick:
        append_table("Data path", rows, note="Peer: `datasets.map` with `WhisperFeatureExtractor`, padded to 30 s.")
    print(json.dumps(figures))
    return 0


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything; return the figures by name."""
    data = folder / "clips.parquet"
    write_clips(arguments.data, arguments.clips, data)
    config = load_config(
        None,
        overrides={
            "data": {"source": "parquet", "path": str(data), "num_workers": DECODING_WORKERS},
            "training.batch_size": BATCH,
            "paths.cache_dir": str(folder / "cache"),
        },
    )
    _, processor = WhisperModelManager(load_config(None, overrides={"device": "cpu"})).initialize_model("tiny.en")
    figures: dict[str, Any] = {"clips": arguments.clips}
    figures["first_batch_sec"], figures["checked_first_batch_sec"], splits = time_first_batch(config, processor)
    figures["files_written"] = sum(p.is_file() for p in folder.rglob("*")) - 1  # but for the clips themselves
    figures.update(time_peer(data, arguments.peer_clips or arguments.clips, folder))
    figures["decoded_clips_per_sec"] = time_decoding(splits, processor, config, arguments.repeats)
    clips = [load_audio(u.audio) for u in splits.train[:BATCH]]
    figures["mean_clip_sec"] = statistics.mean(len(clip) / SAMPLE_RATE for clip in clips)
    figures["ms_per_clip"] = time_stages(splits.train[:BATCH], clips, folder, arguments.repeats)
    if torch.cuda.is_available():
        figures["gpu_wait_share"] = time_waiting(splits, processor, config)
    return figures


def write_clips(source: Path, count: int, target: Path) -> None:
    """Write the first `count` rows, from the start again if there are too few, under ids of their own."""
    table = pq.read_table(source)
    times = -(-count // table.num_rows)
    repeated = pa.concat_tables([table] * times).slice(0, count)
    ids = pa.array([f"clip-{index:05d}" for index in range(count)])
    pq.write_table(repeated.append_column("id", ids), target, row_group_size=100)


def time_first_batch(config: Config, processor: Any) -> tuple[float, float, DatasetSplits]:
    """Return the seconds until the first training batch, every clip listed, decoded and checked first; and after that.

    The second are for labels, plan, the start of the workers and decoding of one batch.
    """
    began = time.perf_counter()
    splits = prepare_datasets(config)
    checked = time.perf_counter()
    loader = create_loader(splits.train, processor, config, shuffle=True)
    next(iter(loader))
    ended = time.perf_counter()
    return ended - began, ended - checked, splits


def time_peer(data: Path, count: int, folder: Path) -> dict[str, Any]:
    """Prepare clips as Hugging Face's fine-tuning guides do; return seconds for all of them, and bytes stored."""
    import soundfile as sf
    from datasets import Audio, load_dataset
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    cache = folder / "peer"

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        samples, rate = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        return {"input_features": extractor(samples, sampling_rate=rate).input_features[0], "labels": row["text"]}

    began = time.perf_counter()
    dataset = load_dataset("parquet", data_files=str(data), split=f"train[:{count}]", cache_dir=str(cache))
    dataset = dataset.cast_column("audio", Audio(decode=False))  # its own decoder would need FFmpeg
    prepared = dataset.map(prepare, remove_columns=dataset.column_names)
    prepared[0]
    elapsed = time.perf_counter() - began
    stored = sum(Path(file["filename"]).stat().st_size for file in prepared.cache_files)
    return {"peer_clips": count, "peer_first_batch_sec": elapsed, "peer_bytes_per_clip": stored // count}


def time_decoding(splits: DatasetSplits, processor: Any, config: Config, repeats: int) -> float:
    """Return clips per second that two worker processes decode and batch, after they have started."""
    loader = create_loader(splits.train, processor, config, shuffle=True)  # keeps its workers between epochs

    def epoch() -> None:
        for _ in loader:
            pass

    return len(splits.train) / median_sec(epoch, repeats)


def time_stages(
    utterances: list[Utterance], clips: list[np.ndarray[Any, Any]], folder: Path, repeats: int
) -> dict[str, float]:
    """Return the CPU milliseconds per clip of each stage, decoding clip by clip, the rest on one batch."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    cache = AudioCache(folder / "audio")
    decoded = [decode(u.audio) for u in utterances]
    per_clip: dict[str, Callable[[], object]] = {
        "decode": lambda: [load_audio(u.audio) for u in utterances],
        "read from the cache": lambda: [cache.load_audio(u.audio) for u in utterances],
        "measure for the report": lambda: [measure_clip(d) for d in decoded],
    }
    pitch = Pitch(pitch_ratios(2.0)[0])
    effects: dict[str, Effects] = {
        "speed": (Speed(1.1),),
        "pitch": (pitch,),
        "noise, coloured": (Noise("pink", 10.0),),
        "noise, babble": (Noise("babble", 10.0),),
        "room": (Room(0.4, 6.0),),
        "telephone": (Telephone(),),
        "gain": (Gain(-3.0),),
        "every effect": (Speed(1.1), pitch, Room(0.4, 6.0), Noise("pink", 10.0), Gain(-3.0), Telephone()),
    }
    augmenter, generator = AudioAugmenter(), torch.Generator().manual_seed(0)
    log_mel, masks = LogMel(), SpecAugment()
    features = log_mel(audio)
    batched: dict[str, Callable[[], object]] = {
        name: lambda effect=effect: augmenter.apply(audio, lengths, [effect] * len(clips), seed=0)
        for name, effect in effects.items()
    }
    batched["log-mel at own length"] = lambda: log_mel(audio)
    batched["SpecAugment"] = lambda: masks(features, lengths // 160, generator=generator)
    stages = {name: 1000 * median_sec(action, repeats) / len(clips) for name, action in {**per_clip, **batched}.items()}

    def augment_by_default() -> None:
        for _ in range(DRAWN_BATCHES):  # effects are drawn: one batch says little
            augmenter(audio, lengths, generator=generator)

    drawn_sec = median_sec(augment_by_default, repeats) / DRAWN_BATCHES
    stages["augmentation as drawn by default"] = 1000 * drawn_sec / len(clips)
    stages["log-mel padded to 30 s, peer"] = 1000 * median_sec(_peer_log_mel(clips), repeats) / len(clips)
    return {name: round(value, 3) for name, value in stages.items()}


def _peer_log_mel(clips: list[np.ndarray[Any, Any]]) -> Callable[[], object]:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    return lambda: [extractor(clip, sampling_rate=SAMPLE_RATE) for clip in clips]


def time_waiting(splits: DatasetSplits, processor: Any, config: Config) -> float:
    """Return the share of time that a GPU step of 100 ms for 16 clips waits for data, all augmentation on."""
    from src.training.trainer import with_waits

    everything = {"pitch_prob": 1.0, "noise_prob": 1.0, "room_prob": 1.0, "codec_prob": 1.0}
    augmenter = AudioAugmenter(config.augmentation.model_copy(update=everything))
    generator, log_mel = torch.Generator().manual_seed(0), LogMel()
    loader = create_loader(splits.train, processor, config, shuffle=True)
    for _ in range(2):  # the first epoch starts the workers
        epoch_began, waited_sec = time.perf_counter(), 0.0
        for batch, batch_waited_sec in with_waits(loader):
            waited_sec += batch_waited_sec
            began = time.perf_counter()
            audio = batch["audio"].cuda(non_blocking=True)
            log_mel(augmenter(audio, batch["audio_lengths"], generator=generator).audio)
            torch.cuda.synchronize()
            time.sleep(max(0.0, GPU_STEP_SEC - (time.perf_counter() - began)))
        share = waited_sec / (time.perf_counter() - epoch_began)
    return share


def table(figures: dict[str, Any]) -> list[dict[str, str]]:
    """Return the figures as rows with ours and the peer's side by side."""
    ours_each = 1000 * figures["first_batch_sec"] / figures["clips"]
    peer_each = 1000 * figures["peer_first_batch_sec"] / figures["peer_clips"]
    first = f"first batch of {figures['clips']} clips (peer: of {figures['peer_clips']})"
    rows = [
        (first, f"{figures['first_batch_sec']:.1f} s", f"{figures['peer_first_batch_sec']:.1f} s"),
        ("the same, of checked clips", f"{figures['checked_first_batch_sec']:.2f} s", "-"),
        ("the same with the check, per clip", f"{ours_each:.1f} ms", f"{peer_each:.1f} ms"),
        ("stored, per clip", f"{figures['files_written']} files", f"{figures['peer_bytes_per_clip'] / 1000:.0f} kB"),
        ("decoded by two workers", f"{figures['decoded_clips_per_sec']:.0f} clips/s", "-"),
    ]
    if "gpu_wait_share" in figures:
        rows.append(("waiting with a GPU step of 100 ms", f"{100 * figures['gpu_wait_share']:.1f} %", "-"))
    stages = dict(figures["ms_per_clip"])
    peer_mel = stages.pop("log-mel padded to 30 s, peer")
    seconds = figures["mean_clip_sec"]
    for name, value in stages.items():
        peer = f"{peer_mel:.2f} ms" if name.startswith("log-mel") else "-"
        rows.append((f"{name}, a clip of {seconds:.1f} s, CPU", f"{value:.2f} ms", peer))
    return [{"what": what, "ours": ours, "peer": peer} for what, ours, peer in rows]


if __name__ == "__main__":
    sys.exit(main())
