"""Measure one tuned model on single clips, on a long recording and live, against the clip-only recipe and stock.

    python benchmarks/recipe.py --train [--train-data FILE.parquet] [--data FILE.parquet] [--epochs 3] [--keep FOLDER]
    python benchmarks/recipe.py --model FOLDER [--clips-only FOLDER] [--data FILE.parquet] [--quick]

With `--train`, tiny.en (`--variant`) is tuned with the default shares of composed examples and, for as many updates,
on single clips alone. Clips are measured one by one by the evaluator; the long recording and the stream are those clips
joined with pauses, so that other speakers follow one another. The peer is faster-whisper with its own defaults
(timestamps, beams of five, previous text), on int8 exports of the same weights. Segment times are compared with the
true ends of the words that a segment begins and ends with. The last line printed is one JSON object; the table is
appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import soundfile as sf

from benchmarks.real_speech import fetch, read_g722
from benchmarks.streaming import Measured, measure
from scripts.benchmarking import (
    load_clips,
    number,
    percent,
    percent_interval,
    points,
    recased,
    require_peer,
    show,
    strided,
)
from scripts.command_line import parse_settings, path_argument
from src.data import Utterance, create_dataloaders, prepare_datasets
from src.data.audio import SAMPLE_RATE
from src.data.loader import create_loader
from src.data.sources.catalog import load_utterances
from src.evaluation import EvaluationResult, MetricsCalculator, ModelEvaluator
from src.evaluation.evaluator import compare_predictions
from src.evaluation.streaming import match_stream
from src.evaluation.streams import PUBLIC_CLIP, SpeechStream, WordAligner, add_noise, join_clips
from src.inference import BatchInference, load_engine
from src.inference.ct2_engine import ct2_folder
from src.inference.engines import EngineName
from src.inference.words import Word, cut_words
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.utils import Config, load_config, set_seed
from src.utils.config import MAX_AUDIO_SEC, DataConfig
from src.utils.files import jsonable
from src.utils.languages import join_texts
from src.utils.runtime import usable_cores

CLIPS_ONLY = dict.fromkeys(  # the shares of the recipe
    (
        "composition.no_speech_fraction", "composition.concatenate_prob", "composition.timestamp_prob",
        "composition.previous_text_prob", "training.prefix_prob",
    ),
    0.0,
)  # fmt: skip
STREAM = {  # keys of the last line, and of `measure_stream`'s row
    "stream_wer": "rate",
    "offline_wer": "offline_rate",
    "commit_p50_sec": "commit_aware_p50_sec",
    "commit_p95_sec": "commit_aware_p95_sec",
    "end_of_turn_sec": "end_of_turn_aware_p50_sec",
    "normalized_erasure": "normalized_erasure",
}
PROMPTS, PROMPT_LETTERS = "prompts", 40
GAP_SEC = 60.0  # of silence, and of noise, in the noisy stream


@dataclass
class Figures:
    """What was measured of one model; a rate that was not is nan, and a time None."""

    name: str
    clips: EvaluationResult
    guard: float
    long: float = math.nan
    long_peer: float = math.nan
    words_off_sec: float | None = None  # median distance of word times from the truth, here
    segments_off_sec: dict[str, float | None] = field(default_factory=dict)  # of segment times, by engine
    live: dict[str, Any] = field(default_factory=dict)  # of `measure_stream`
    invented: int | None = None  # words in the stretches without speech
    trained_sec: float | None = None


def main() -> int:
    arguments = parse_arguments()
    require_peer()
    logging.basicConfig(level=logging.WARNING)
    config = load_config(None, overrides={"model": {"variant": arguments.variant, "language": arguments.language}})
    set_seed(config.seed)
    folders, trained_sec = {"stock": arguments.variant}, dict[str, float]()
    models: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.train:
            folders |= train(arguments, Path(arguments.keep or scratch), trained_sec)
        else:
            folders |= {"recipe": arguments.model} | (
                {"clips only": arguments.clips_only} if arguments.clips_only else {}
            )
        clips = [recased(clip, config.data) for clip in load_clips(arguments.data, arguments.clips)]
        aligner = WordAligner(
            *WhisperModelManager(config).initialize_model(arguments.aligner), language=arguments.language
        )
        aligned = [aligner.align(clip) for clip in clips]
        del aligner
        long = join_clips(aligned, name="long", seed=1, duration_sec=60 * arguments.minutes)
        live = join_clips(aligned[:: max(1, len(aligned) // arguments.live_clips)], name="live", seed=0)
        for name, folder in folders.items():
            figures = models[name] = measure_clips(name, folder, clips, guard_clips(arguments, config), config)
            figures.trained_sec = trained_sec.get(name)
            measure_long(figures, folder, long, config)
            if name != "stock":
                measure_live(figures, folder, live, config, noise=not arguments.quick)
            print(" ".join(f"{key} {value}" for key, value in row_of(figures, models).items()), flush=True)
    note = (
        f"{arguments.variant}; {len(clips)} clips, one by one; {long.duration_sec / 60:.0f} min of them joined; "
        f"{live.duration_sec:.0f} s of them live, on the int8 export; rates in percent, times in seconds. "
        f"Guard: {arguments.guard or 'the public clip'}. Peer: faster-whisper with its defaults on the int8 export. "
        "Segment times: those that the model writes itself, here with CTranslate2, here with torch, in faster-whisper."
    )
    rows = [row_of(figures, models) for figures in models.values()]
    show(f"One recipe: clips, files and live ({arguments.variant})", rows, note,
         record=not (arguments.quick or arguments.no_record))  # fmt: skip
    print(json.dumps(jsonable(last_line(models))))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder of a tuned checkpoint")
    which.add_argument("--train", action="store_true", help="tune first, with the defaults and on single clips alone")
    parser.add_argument("--clips-only", help="folder of the checkpoint tuned on single clips, to compare with --model")
    parser.add_argument("--variant", default="tiny.en", help="stock weights, tuned with --train; default: %(default)s")
    parser.add_argument("--aligner", default="base", help="weights that place the words of the transcripts")
    parser.add_argument("--language", default="en", help="of the speech")
    parser.add_argument(
        "--train-data", type=path_argument, help="Parquet in the Hugging Face layout; default: bundled sample"
    )
    parser.add_argument("--train-clips", type=int, help="at a stride over all; default: all")
    parser.add_argument("--epochs", type=int, default=3, help="of the recipe; the other takes as many updates")
    parser.add_argument("--keep", metavar="FOLDER", help="for the trained models; default: none is kept")
    parser.add_argument("--data", type=path_argument, help="to measure on, other speakers; default: bundled test set")
    parser.add_argument(
        "--guard", type=path_argument, help=f"audio folder of general speech with transcripts, or {PROMPTS}: Debian's"
    )
    parser.add_argument("--clips", type=int, default=200, help="at a stride over all")
    parser.add_argument("--live-clips", type=int, default=40, help="of those, in the stream")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the long recording")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: few clips, no noise, no table")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.live_clips, arguments.minutes, arguments.aligner = 6, 4, 0.5, arguments.variant
        arguments.train_clips, arguments.epochs = 16, 1
    return arguments


def train(arguments: argparse.Namespace, folder: Path, trained_sec: dict[str, float]) -> dict[str, str]:
    """Tune with the recipe, and on single clips for as many updates; return the folders of the best models."""
    data = {"data.source": "sample"}
    if arguments.train_data is not None:
        data = {"data.source": "parquet", "data.path": str(arguments.train_data)}
    common = data | {
        "model.variant": arguments.variant, "model.language": arguments.language,
        "data.max_validation": 100, "data.num_workers": 0, "training.batch_size": 8, "checkpoints.save_minutes": None,
    }  # fmt: skip
    folders: dict[str, str] = {}
    updates = 0
    for name, own in (("recipe", parse_settings(arguments)), ("clips only", CLIPS_ONLY)):
        paths = {f"paths.{key}": str(folder / name.replace(" ", "_") / key) for key in ("runs_dir", "checkpoints_dir")}
        config = load_config(None, overrides={**common, **own, **paths})
        set_seed(config.seed)
        splits = prepare_datasets(config)
        if arguments.train_clips:
            splits = replace(splits, train=strided(splits.train, arguments.train_clips))
        model, processor = WhisperModelManager(config).initialize_model()
        loaders = create_dataloaders(splits, processor, config)
        epochs = max(1, round(updates / len(loaders.train))) if updates else arguments.epochs
        trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
        began = time.perf_counter()
        trainer.train(num_epochs=epochs)
        trained_sec[name] = time.perf_counter() - began
        updates = sum(loaders.train.batches_in(epoch) for epoch in range(epochs))
        print(f"{name}: {epochs} epochs, {updates} updates, {trained_sec[name]:.0f} s", flush=True)
        folders[name] = str(trainer.best_model_dir)
    return folders


def measure_clips(
    name: str, folder: str, clips: Sequence[Utterance], guard: Sequence[Utterance], config: Config
) -> Figures:
    """Evaluate a model on single clips and on general speech."""
    model, processor = WhisperModelManager(config).initialize_model(folder)
    evaluator = ModelEvaluator(model, processor, config)
    on_clips, on_guard = (
        evaluator.evaluate_dataset(create_loader(those, processor, config), name=name) for those in (clips, guard)
    )
    return Figures(name, on_clips, on_guard.rate)


def measure_long(figures: Figures, folder: str, spoken: SpeechStream, config: Config) -> None:
    """Transcribe the long recording with the int8 export, here and in faster-whisper with its defaults."""
    from faster_whisper import WhisperModel

    calculator = MetricsCalculator(config.model.language)
    exported = ct2_folder(folder, quantization="int8", cache_dir=config.paths.cache_dir)
    engine = load_engine(folder, config, engine="ctranslate2")
    (found,) = BatchInference(engine=engine, config=config).transcribe_batch([spoken.audio], word_timestamps=True)
    figures.long = calculator.compute([spoken.text], [found.text or ""]).rate
    figures.words_off_sec = time_off(spoken, found.words or (), ends_only=False)

    # times that the model writes itself, here in windows of 30 s
    kinds: tuple[EngineName, ...] = ("ctranslate2", "torch")
    for kind in kinds:
        engine = load_engine(folder, config, engine=kind)
        transcriber = BatchInference(engine=engine, config=config)
        (found,) = transcriber.transcribe_batch([spoken.audio], mode="sequential")
        segments = [(each.text, each.start_sec, each.end_sec) for each in found.segments]
        figures.segments_off_sec[kind] = segments_off(spoken, segments)
    peer = WhisperModel(str(exported), device="cpu", compute_type="int8", cpu_threads=usable_cores())
    theirs = list(peer.transcribe(spoken.audio, language=config.model.language)[0])
    figures.long_peer = calculator.compute([spoken.text], [join_texts(each.text.strip() for each in theirs)]).rate
    figures.segments_off_sec["faster-whisper"] = segments_off(
        spoken, [(each.text, each.start, each.end) for each in theirs]
    )


def segments_off(spoken: SpeechStream, segments: Sequence[tuple[str, float, float]]) -> float | None:
    """Return the median distance in seconds of the ends of segments, (text, start, end), from the truth."""
    words = [cut_words([Word(text, start, end) for text in said.split()]) for said, start, end in segments]
    return time_off(spoken, list(itertools.chain(*words)), ends_only=True)


def time_off(spoken: SpeechStream, words: Sequence[Word], *, ends_only: bool) -> float | None:
    """Return the median distance in seconds of the ends of words from the truth, of those that are right.

    With `ends_only`, words have the times of their segments: the first and the last of each segment are compared.
    """
    right = {heard: said for said, heard in match_stream(spoken, words).right.items()}
    off = []
    for place, said in right.items():
        word, truth = words[place], spoken.words[said]
        times = (word.start_sec, word.end_sec)
        first = not ends_only or not place or (words[place - 1].start_sec, words[place - 1].end_sec) != times
        last = (
            not ends_only or place + 1 == len(words) or (words[place + 1].start_sec, words[place + 1].end_sec) != times
        )
        off += [abs(word.start_sec - truth.start_sec)] * first + [abs(word.end_sec - truth.end_sec)] * last
    return statistics.median(off) if off else None


def measure_live(figures: Figures, folder: str, live: SpeechStream, config: Config, *, noise: bool) -> None:
    """Stream the clips with the int8 export, and again in noise with stretches without speech."""
    engine = load_engine(folder, config, engine="ctranslate2")
    measured = Measured(live)
    measure(measured, engine, figures.name, config)
    figures.live = measured.metrics[figures.name]
    if noise:
        noisy = Measured(add_noise(live, snr_db=10, seed=2, silence_sec=GAP_SEC, noise_sec=GAP_SEC))
        measure(noisy, engine, figures.name, config)
        figures.invented = noisy.metrics[figures.name]["words_without_speech"]


def guard_clips(arguments: argparse.Namespace, config: Config) -> list[Utterance]:
    """Return general speech: Asterisk's English prompts, a folder's, or the public clip."""
    if arguments.guard is None:
        listed = [PUBLIC_CLIP]
    elif str(arguments.guard) == PROMPTS:
        listed = read_english_prompts(config.paths.cache_dir / "speech")
    else:
        listed = load_utterances(DataConfig(source="folder", path=arguments.guard))
    return [recased(clip, config.data) for clip in listed]


def read_english_prompts(cache: Path) -> list[Utterance]:
    """Return the sentences among Asterisk's prompts, spoken by one announcer, each with its text."""
    sounds = fetch("asterisk-core-sounds-en-g722=1.6.1-1", cache) / "usr/share/asterisk/sounds"
    named = fetch("asterisk-core-sounds-en=1.6.1-1", cache) / "usr/share/doc/asterisk-core-sounds-en"
    lines = gzip.decompress((named / "core-sounds-en.txt.gz").read_bytes()).decode().splitlines()
    prompts = []
    for name, _, text in (line.partition(": ") for line in lines):
        paths = list(sounds.rglob(f"{name}.g722")) if len(text) > PROMPT_LETTERS and text[0].isalpha() else []
        audio = read_g722(paths[0]) if paths else np.zeros(0, np.float32)
        if 0 < len(audio) <= MAX_AUDIO_SEC * SAMPLE_RATE:
            encoded = io.BytesIO()
            sf.write(encoded, audio, SAMPLE_RATE, format="FLAC")
            prompts.append(Utterance(name, encoded.getvalue(), text, language="en"))
    return prompts


def row_of(figures: Figures, models: Mapping[str, Figures]) -> dict[str, str]:
    """Lay one model out."""
    clips, live = figures.clips, figures.live
    against, other = "-", models.get("clips only")
    if other is not None and other is not figures:
        against = points(compare_predictions(other.clips.rows, clips.rows))
    return {
        "model": figures.name,
        "clips [95% interval]": percent_interval(clips.rate, clips.low, clips.high),
        "against clips only": against,
        "general speech": percent(figures.guard),
        "file": percent(figures.long),
        "word times off": number(figures.words_off_sec),
        "file, faster-whisper": percent(figures.long_peer),
        "segment times off": ", ".join(number(off) for off in figures.segments_off_sec.values()) or "-",
        "live": percent(live.get("rate")),
        "its clips one by one": percent(live.get("offline_rate")),
        "commit p50": number(live.get("commit_aware_p50_sec")),
        "p95": number(live.get("commit_aware_p95_sec")),
        "end of turn": number(live.get("end_of_turn_aware_p50_sec")),
        "erasure": number(live.get("normalized_erasure")),
        "invented": "-" if figures.invented is None else str(figures.invented),
        "training": number(figures.trained_sec),
    }  # fmt: skip


def last_line(models: Mapping[str, Figures]) -> dict[str, float | int | None]:
    """Return the figures by name; nan or None where one was not measured."""
    recipe, stock, only = models["recipe"], models["stock"], models.get("clips only")
    return {
        "clips_wer": recipe.clips.rate,
        "clips_only_wer": only and only.clips.rate,
        "long_wer": recipe.long,
        "long_faster_whisper_wer": recipe.long_peer,
        "long_clips_only_wer": only and only.long,
        "long_clips_only_faster_whisper_wer": only and only.long_peer,
        "long_stock_wer": stock.long,
        "long_stock_faster_whisper_wer": stock.long_peer,
        "guard_wer": recipe.guard,
        "guard_clips_only_wer": only and only.guard,
        "guard_stock_wer": stock.guard,
        "words_off_sec": recipe.words_off_sec,
        "segments_off_sec": recipe.segments_off_sec.get("ctranslate2"),
        "segments_off_torch_sec": recipe.segments_off_sec.get("torch"),
        "segments_off_faster_whisper_sec": recipe.segments_off_sec.get("faster-whisper"),
        "segments_off_stock_faster_whisper_sec": stock.segments_off_sec.get("faster-whisper"),
        "words_without_speech": recipe.invented,
        "training_sec": recipe.trained_sec,
        "training_clips_only_sec": only and only.trained_sec,
        **{key: recipe.live.get(name) for key, name in STREAM.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
