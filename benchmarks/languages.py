"""Fine-tune base in several languages, and measure what depends on the language.

    python benchmarks/languages.py [--quick] [--run hi] [--epochs 1] [--keep FOLDER] [--no-record]

Folder data sets are spoken by espeak-ng (Debian: apt-get install espeak-ng). Base is tuned to Hindi, to Mandarin and to
Georgian, whose language each says in another way, and to six more languages in one set, whose rows say theirs. Each is
evaluated, exported to int8, and transcribes a file of five minutes and a stream. The last line printed is one JSON
object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jiwer
import opencc
import regex
import soundfile as sf

from benchmarks.synthetic_speech import write_folder
from scripts.benchmarking import percent, percent_interval, show
from scripts.command_line import path_argument
from src.data import Utterance, VoiceActivityDetector, create_dataloaders, prepare_datasets
from src.data.audio import SAMPLE_RATE
from src.data.dataset import decode_audio
from src.data.labels import IGNORE_INDEX
from src.evaluation import EvaluationResult, MetricsCalculator, ModelEvaluator, fill_languages
from src.evaluation.data_checks import measure_languages
from src.evaluation.evaluator import Prediction
from src.evaluation.streams import AlignedClip, join_clips, make_stream
from src.inference import BatchInference, StreamingASR, load_engine
from src.models import WhisperModelManager, export_ctranslate2
from src.training import WhisperTrainer
from src.utils import Config, load_config, set_seed
from src.utils.errors import ModelError
from src.utils.files import jsonable
from src.utils.languages import UNSPACED

BATCH_SIZE = 4
FILE_SEC = 300.0
FILE_SEC_OF_SEVERAL = 60.0  # of each language in a set of several
QUICK_FILE_SEC = 10.0
BAR_POINTS = 2.0  # of offline and streaming rates
MEAN = "mean"  # of the languages of a run, which nothing is streamed in


@dataclass(frozen=True)
class Run:
    """One training: what the column `language` says by code ("" is blank), and the setting `model.language`."""

    name: str
    marks: dict[str, str]
    language: str
    epochs: int
    learning_rate: float = 1e-4  # more than the default, which shows little in few updates
    clips: int = 48  # of each language, by eight speakers


RUNS = (
    Run("hi", {"hi": ""}, "Hindi", epochs=8, learning_rate=5e-5),
    Run("zh", {"zh": "cmn"}, "auto", epochs=8, learning_rate=5e-5),
    Run("ka", {"ka": ""}, "geo", epochs=8, clips=152),  # stock base hardly knows how it is written
    Run(
        "mixed",
        {"de": "German", "ta": "tam", "ar": "ar", "ja": "jpn", "th": "Thai", "tr": "tr-TR"},
        "auto",
        epochs=3,
    ),
)
QUICK = Run("hi+zh", {"hi": "Hindi", "zh": "cmn"}, "auto", epochs=1, clips=8)


@dataclass(frozen=True)
class Figures:
    """One language of one run; rates are fractions, nan where they were not measured."""

    tuned_on: str
    language: str
    metric: str
    rate: float
    low: float
    high: float
    by_hand: float  # the same, without this library
    clips: int
    truncated: int  # texts of the clips, the stream and the file that ended at a limit
    heard: str  # by the stock model, in the test clips
    stream: float = math.nan  # CER of what was streamed
    offline: float = math.nan  # CER of the same clips one by one
    file: float = math.nan  # CER
    file_language: str | None = None
    file_sec: float = math.nan
    compute_sec: float = math.nan  # of the file
    suppressed: int = 0  # labels that begin with a token that decoding never writes first
    export: str = ""
    updates: int = 0  # of the training

    @property
    def bars(self) -> dict[str, bool]:
        """What must hold."""
        return {
            "headline equals the one by hand": math.isclose(self.rate, self.by_hand, abs_tol=1e-9),
            "no text ended by a limit": self.truncated == 0,
            "streaming within 2 points": abs(self.stream - self.offline) <= BAR_POINTS / 100 or self.language == MEAN,
            "export saved": self.export == "saved",
            "no label begins with a suppressed token": self.suppressed == 0,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="of each training; default: 3 to 8")
    parser.add_argument(
        "--keep", type=path_argument, metavar="FOLDER", help="for data, checkpoints and exports; default: none"
    )
    parser.add_argument("--run", action="append", choices=[run.name for run in RUNS], help="may repeat; default: all")
    parser.add_argument("--no-record", action="store_true", help="append no table")
    parser.add_argument("--quick", action="store_true", help="under a minute: two languages, one epoch; no table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    runs = [QUICK] if arguments.quick else [run for run in RUNS if run.name in (arguments.run or [run.name])]
    file_sec = QUICK_FILE_SEC if arguments.quick else FILE_SEC
    figures: list[Figures] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for run in runs:
            epochs = arguments.epochs or run.epochs
            sec = min(file_sec, FILE_SEC_OF_SEVERAL) if len(run.marks) > 1 else file_sec
            figures += measure(run, folder / run.name, epochs=epochs, file_sec=sec)
    record = not (arguments.quick or arguments.no_record)
    show("Languages: synthetic speech", table(figures), note(figures), record=record)
    missed = [f"{f.tuned_on} {f.language}: {bar}" for f in figures for bar, holds in f.bars.items() if not holds]
    untrained = " (after so few updates a model does not know when to stop)" if arguments.quick else ""
    print(f"bars missed{untrained}:", "; ".join(missed) or "none")
    print(json.dumps(jsonable({"figures": list(map(asdict, figures)), "bars_missed": missed}), ensure_ascii=False))
    return 0


def measure(run: Run, folder: Path, *, epochs: int, file_sec: float) -> list[Figures]:
    """Make a data set, tune base to it, and measure each of its languages."""
    config = configure(run, write_folder(folder / "data", run.marks, run.clips), folder)
    set_seed(config.seed)
    model, processor = WhisperModelManager(config).initialize_model()
    splits = fill_languages(prepare_datasets(config), model, processor, config)
    heard = hear(model, processor, splits.test, config)

    # train for whole epochs, and evaluate what was kept
    loaders = create_dataloaders(splits, processor, config)
    never = {*model.generation_config.suppress_tokens, *model.generation_config.begin_suppress_tokens}
    suppressed = count_suppressed(loaders.train, never - {processor.tokenizer.eos_token_id})
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
    trainer.train(num_epochs=epochs)
    updates = epochs * len(loaders.train)
    tuned = trainer.merged_model()
    result = ModelEvaluator(tuned, processor, config).evaluate_dataset(loaders.test, name="tuned")

    exported, saved = folder / "int8", "saved"
    try:
        export_ctranslate2(trainer.best_model_dir, exported, quantization="int8")
    except ModelError as err:
        saved = f"refused: {err}"
    found = []
    for code in run.marks:
        figures = rate(run, code, result, heard[code], suppressed.get(code, 0), saved, updates)
        spoken = config.model_copy(update={"model": config.model.model_copy(update={"language": code})})
        clips_of = [clip for clip in splits.test if clip.language == code]
        if saved == "saved":
            aligned = [AlignedClip(clip.id, clip.text, decode_audio(clip).numpy()) for clip in clips_of]
            figures = transcribe(figures, exported, aligned, spoken, folder / f"{code}.wav", file_sec)
            figures = stream(figures, exported, clips_of, spoken)
        print(
            f"{run.name} {code}: {figures.metric} {percent(figures.rate)}, streamed CER {percent(figures.stream)}",
            flush=True,
        )
        found.append(figures)
    if len(run.marks) > 1:
        found.append(rate_all(run, result, sum(suppressed.values()), saved, updates))
    return found


def configure(run: Run, data: Path, folder: Path) -> Config:
    """Return the settings: clips as they are, cut at words for streaming, and joined for long recordings."""
    return load_config(
        None,
        overrides={
            "model": {"variant": "base", "language": run.language},
            "data": {"source": "folder", "path": str(data), "num_workers": 0},
            "training": {"batch_size": BATCH_SIZE, "learning_rate": run.learning_rate},
            "training.full_context_prob": 0.0,
            "training.prefix_prob": 0.3,
            "composition": {"concatenate_prob": 0.5, "max_concatenated_sec": 28},
            "augmentation.enabled": False,
            "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
            "checkpoints.save_minutes": None,
        },
    )


def hear(model: Any, processor: Any, clips: Sequence[Utterance], config: Config) -> dict[str, str]:
    """Return in how many clips of each language a model detects it, by its code."""
    found = measure_languages(model, processor, clips, config).idxmax(axis=1)
    spoken = [str(clip.language) for clip in clips]
    right = [code for code, heard in zip(spoken, found, strict=True) if code == heard]
    return {code: f"{right.count(code)} of {spoken.count(code)}" for code in dict.fromkeys(spoken)}


def count_suppressed(loader: Any, never: set[int]) -> dict[str, int]:
    """Count the labels of an epoch that begin with a token that decoding never writes first, by language."""
    counts: dict[str, int] = {}
    for batch in loader:
        for labels, code in zip(batch["labels"], batch["languages"], strict=True):
            first = int(labels[labels != IGNORE_INDEX][0])
            counts[code] = counts.get(code, 0) + (first in never)
    return counts


def rate(
    run: Run, code: str, result: EvaluationResult, heard: str, suppressed: int, saved: str, updates: int
) -> Figures:
    """Return the rates of one language's test clips."""
    found = result.rates_by_language[code]
    rows = [row for row in result.rows if row.language == code]
    return Figures(
        run.name, code, found.metric, found.rate, found.low, found.high, by_hand(rows, code), len(rows),
        sum(row.truncated for row in rows), heard, suppressed=suppressed, export=saved, updates=updates,
    )  # fmt: skip


def rate_all(run: Run, result: EvaluationResult, suppressed: int, saved: str, updates: int) -> Figures:
    """Return the overall rate of a run with several languages: the mean of theirs."""
    each = [by_hand([row for row in result.rows if row.language == code], code) for code in run.marks]
    return Figures(
        run.name, MEAN, result.metric, result.rate, result.low, result.high, sum(each) / len(each), result.n,
        result.truncated, "", suppressed=suppressed, export=saved, updates=updates,
    )  # fmt: skip


def by_hand(rows: Sequence[Prediction], code: str) -> float:
    """Compute the headline with jiwer alone: characters without spaces where a language has none, else words."""
    references, hypotheses = (
        [plain(text, code) for text in texts]
        for texts in ([row.reference for row in rows], [row.hypothesis for row in rows])
    )
    if code in UNSPACED:
        return float(jiwer.cer(references, hypotheses))
    return float(jiwer.wer(references, hypotheses))


def plain(text: str, code: str) -> str:
    """Fold case and digits, and make all but letters, marks and digits a space, or nothing in unspaced languages."""
    text = regex.sub(r"\p{Nd}", lambda digit: str(unicodedata.digit(digit[0])), unicodedata.normalize("NFKC", text))
    text = text.replace("İ", "i").replace("I", "ı").lower() if code == "tr" else text.lower()
    text = regex.sub(r"(?<=\w)['’](?=\w)", "\N{MODIFIER LETTER APOSTROPHE}", text)  # within a word
    text = opencc.OpenCC("t2s").convert(text) if code == "zh" else text
    return regex.sub(r"[^\p{L}\p{M}\p{N}\u02BC\u200C\u200D]+", "" if code in UNSPACED else " ", text).strip()


def transcribe(
    figures: Figures, exported: Path, clips: Sequence[AlignedClip], config: Config, path: Path, file_sec: float
) -> Figures:
    """Transcribe a file of the language's test clips with the export."""
    spoken = join_clips(clips, name=path.stem, seed=0, duration_sec=file_sec)
    sf.write(path, spoken.audio, SAMPLE_RATE)
    found = BatchInference(engine=load_engine(exported, config), config=config).transcribe_batch([path])
    (text,) = found
    rates = MetricsCalculator(figures.language).compute([spoken.text], [text.text])
    ended = sum(segment.truncated for segment in text.segments)
    return replace(
        figures, file=rates.cer, file_language=text.language, file_sec=text.duration_sec,
        compute_sec=found.compute_sec, truncated=figures.truncated + ended,
    )  # fmt: skip


def stream(figures: Figures, exported: Path, clips: Sequence[Utterance], config: Config) -> Figures:
    """Stream the language's test clips with the export, and transcribe them one by one with it."""
    engine, spoken = load_engine(exported, config), make_stream(clips, num_clips=len(clips), seed=0)
    asr = StreamingASR(engine=engine, vad=VoiceActivityDetector(config.vad), config=config)
    streamed = asr.stream_audio(spoken.audio)
    alone = BatchInference(engine=engine, config=config).transcribe_batch(spoken.clip_audios())
    calculator = MetricsCalculator(figures.language)
    ended = streamed.truncated + sum(segment.truncated for each in alone for segment in each.segments)
    return replace(
        figures,
        stream=calculator.compute([spoken.text], [streamed.text]).cer,
        offline=calculator.compute([clip.text for clip in spoken.clips], [each.text for each in alone]).cer,
        truncated=figures.truncated + ended,
    )


def table(figures: Sequence[Figures]) -> list[dict[str, str]]:
    """Lay the figures out; what was not measured is a dash."""
    return [
        {
            "tuned on": each.tuned_on,
            "language": each.language,
            "rate [95% interval]": f"{each.metric} {percent_interval(each.rate, each.low, each.high)}",
            "by hand": percent(each.by_hand),
            "ended by a limit": str(each.truncated),
            "suppressed": str(each.suppressed),
            "stock hears it in": each.heard or "-",
            "CER streamed": percent(each.stream),
            "CER one by one": percent(each.offline),
            "CER of the file": percent(each.file),
            "file's language": each.file_language or "-",
            "int8 export": each.export,
        }
        for each in figures
    ]


def note(figures: Sequence[Figures]) -> str:
    """Say what was measured, and the limits of it."""
    rates = {run.name: run.learning_rate for run in (*RUNS, QUICK)}
    updates = {each.tuned_on: each.updates for each in figures}
    trained = ", ".join(f"{name} {count} (at {rates[name]:g})" for name, count in updates.items())
    files = [each for each in figures if not math.isnan(each.file)]
    audio_sec, compute_sec = sum(each.file_sec for each in files), sum(each.compute_sec for each in files)
    return (
        f"base tuned by {trained} updates of up to {BATCH_SIZE} examples without "
        "augmentation; rates in percent. Speech of espeak-ng, "
        "eight variants of one voice per language, of which two speak the test clips; its sentences are drawn from "
        "a few parts, so every word was trained. It shows that texts, labels, metrics, limits and exports follow the "
        "language; it says nothing about the rates of human speech, and the stock model hardly knows which language it "
        "is. Mandarin is spoken from pinyin, Japanese from kana; the Thai voice leaves vowels out. By hand: jiwer on "
        "texts normalised without this library. Suppressed: labels that begin with a token that decoding never writes "
        f"first. With the int8 export: files of {FILE_SEC / 60:.0f} min (of a set of several languages 1 min each), in "
        f"{compute_sec / max(audio_sec, 1e-9):.3f} of real time; the test clips one by one, and joined as a stream."
    )


if __name__ == "__main__":
    sys.exit(main())
