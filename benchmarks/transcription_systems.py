"""The systems of benchmarks/latency.py, as their users call them, each in a process of its own.

    python benchmarks/transcription_systems.py NAME FOLDER CT2_FOLDER CLIPS.npz THREADS

For each line "run" on standard input the clips are transcribed once; a line of JSON has their texts. A peer's process
imports nothing of this library, which sets how OpenMP's threads wait.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GREEDY = {"language": "en", "beam_size": 1, "temperature": 0.0, "without_timestamps": True}  # of faster-whisper
WAITS_AS_HERE = "faster-whisper int8, waiting as here"  # with what `src` sets in the environment
Clip = np.ndarray[Any, np.dtype[np.float32]]
Run = Callable[[], list[str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SYSTEMS))
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("ct2", help="CTranslate2 folder")
    parser.add_argument("clips", help="those to transcribe, as numpy.savez writes them")
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    with np.load(arguments.clips) as file:
        clips = [file[name] for name in file.files]
    run = SYSTEMS[arguments.name](arguments.model, arguments.ct2, clips, arguments.threads)
    for line in sys.stdin:
        print(json.dumps(run() if line.strip() == "run" else []), flush=True)
    return 0


def one_by_one(model: str, _: str, clips: Sequence[Clip], __: int) -> Run:
    """Return our engine on one clip after another."""
    from src.inference.engine_base import transcribe
    from src.inference.engines import load_engine
    from src.inference.options import DecodingOptions

    config = own_config(model)
    engine, options = load_engine(model, config, engine="ctranslate2"), DecodingOptions.from_config(config)
    transcribe(engine, clips[:1], options)
    return lambda: [transcribe(engine, [clip], options)[0].text for clip in clips]


def in_batches(model: str, _: str, clips: Sequence[Clip], __: int, *, engine: Any = "ctranslate2") -> Run:
    """Return our transcription of many or long recordings."""
    from src.inference.engines import load_engine
    from src.inference.files.transcribe import BatchInference

    config = own_config(model)
    inference = BatchInference(engine=load_engine(model, config, engine=engine, workers=None), config=config)
    inference.transcribe_batch([clip[: 10 * 16_000] for clip in clips[:2]])
    return lambda: [item.text or "" for item in inference.transcribe_batch(clips)]


def own_config(model: str) -> Any:
    """Return our settings, where they are not those of everybody."""
    from src.utils.config import load_config

    return load_config(None, overrides={"model": {"variant": model, "language": "en"}, "device": "cpu"})


def faster_whisper(_: str, ct2: str, clips: Sequence[Clip], threads: int) -> Run:
    """Return faster-whisper on one clip after another."""
    from faster_whisper import WhisperModel

    model = WhisperModel(ct2, device="cpu", compute_type="int8", cpu_threads=threads)

    def one(clip: Clip) -> str:
        return text_of(model.transcribe(clip, condition_on_previous_text=False, **GREEDY))

    one(clips[0])
    return lambda: [one(clip) for clip in clips]


def faster_whisper_batched(_: str, ct2: str, clips: Sequence[Clip], threads: int) -> Run:
    """Return faster-whisper's batched pipeline on long recordings."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    batched = BatchedInferencePipeline(WhisperModel(ct2, device="cpu", compute_type="int8", cpu_threads=threads))
    text_of(batched.transcribe(clips[0][: 10 * 16_000], batch_size=16, **GREEDY))
    return lambda: [text_of(batched.transcribe(clip, batch_size=16, **GREEDY)) for clip in clips]


def transformers_pipeline(model: str, _: str, clips: Sequence[Clip], threads: int) -> Run:
    """Return transformers' pipeline on one clip after another."""
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, logging, pipeline

    logging.set_verbosity_error()  # else `generate` warns of its own defaults at each call
    torch.set_num_threads(threads)
    stock = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(model)
    hf: Any = pipeline(
        "automatic-speech-recognition",
        model=stock,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    hf(clips[0].copy())
    return lambda: [hf(clip.copy())["text"] for clip in clips]


def text_of(found: tuple[Any, Any]) -> str:
    """Join the segments that faster-whisper gives."""
    return " ".join(segment.text.strip() for segment in found[0])


SYSTEMS: dict[str, Callable[[str, str, Sequence[Clip], int], Run]] = {
    "CTranslate2 int8": one_by_one,
    "CTranslate2 int8, batches": in_batches,
    "torch, batches": partial(in_batches, engine="torch"),
    "CTranslate2 int8, long": in_batches,
    "faster-whisper int8": faster_whisper,
    "faster-whisper batched, long": faster_whisper_batched,
    WAITS_AS_HERE: faster_whisper,
    "transformers pipeline": transformers_pipeline,
}

if __name__ == "__main__":
    sys.exit(main())
