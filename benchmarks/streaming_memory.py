"""Memory of one live session over simulated hours.

    python benchmarks/streaming_memory.py --model FOLDER [--hours 10] [--pause-sec 10] [--quick]

Clips at a stride are fed without end, as fast as they are decoded, each after a pause; what was fed is dropped. The
memory of the process is read twenty times. The last line printed is one JSON object; the table is
appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from scripts.benchmarking import add_data, append_table, load_clips
from scripts.command_line import model_argument
from src.data.audio import SAMPLE_RATE, Waveform
from src.data.dataset import decode_audio
from src.data.vad import VoiceActivityDetector
from src.inference.engines import load_engine
from src.inference.streaming.session import StreamingASR
from src.utils.config import load_config
from src.utils.memory import measure_memory

CLIPS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=model_argument, default="tiny.en", help="variant, or a folder with a model or its export"
    )
    add_data(parser)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--pause-sec", type=float, default=10.0, help="before each clip")
    parser.add_argument("--quick", action="store_true", help="under a minute: six minutes, nothing recorded")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    arguments = parser.parse_args()
    hours = 0.1 if arguments.quick else arguments.hours
    clips = [decode_audio(utterance).numpy() for utterance in load_clips(arguments.data, CLIPS)]
    readings = run(arguments.model, clips, hours, arguments.pause_sec, every=hours / 20)
    first, last = readings[0][1], readings[-1][1]
    if not (arguments.quick or arguments.no_record):
        rows = [{"hours": f"{at:.1f}", "memory": f"{mb:.0f} MB", "words": str(n)} for at, mb, n in readings]
        append_table("Memory of a live session", rows, note=f"A clip after each {arguments.pause_sec:g} s of silence.")
    print(json.dumps({"hours": hours, "first_mb": round(first), "last_mb": round(last), "words": readings[-1][2]}))
    return 0


def run(
    model: str, clips: list[Waveform], hours: float, pause_sec: float, *, every: float
) -> list[tuple[float, float, int]]:
    """Feed a session; return simulated hours, MB of the process and words so far, at each of the intervals."""
    config = load_config(None, overrides={"device": "cpu", "model": {"language": "en"}})
    engine = load_engine(model, config, engine="ctranslate2")
    asr = StreamingASR(engine=engine, vad=VoiceActivityDetector(config.vad), config=config)
    readings: list[tuple[float, float, int]] = []
    fed = words = 0
    began = time.perf_counter()
    for chunk in endless(clips, pause_sec, round(config.streaming.min_chunk_sec * SAMPLE_RATE)):
        words += sum(len(event.words) for event in asr.feed(chunk) if event.kind == "commit")
        fed += len(chunk)
        at = fed / SAMPLE_RATE / 3600
        if at < every * (len(readings) + 1):
            continue
        readings.append((at, measure_memory(ROOT).process_mb, words))
        seconds = time.perf_counter() - began
        print(f"{at:5.2f} h  {readings[-1][1]:.0f} MB  {words} words  {seconds:.0f} s", flush=True)
        if at >= hours - every / 2:
            return readings
    raise AssertionError("the audio is endless")


def endless(clips: list[Waveform], pause_sec: float, size: int) -> Iterator[Waveform]:
    """Yield chunks of pauses and clips in turn, for ever."""
    pause = np.zeros(round(pause_sec * SAMPLE_RATE), np.float32)
    for clip in itertools.cycle(clips):
        audio = np.concatenate([pause, clip])
        yield from (audio[at : at + size] for at in range(0, len(audio), size))


if __name__ == "__main__":
    sys.exit(main())
