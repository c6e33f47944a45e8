"""Golden behaviour: what the library computes from the bundled speech and weights, as one JSON object of sections.

    python tests/golden/behaviour.py --out FILE [--only SECTION ...]

Run it from the root of a checkout: the `src` of the current folder is measured. One thread, float32, fixed seeds and a
clock that stands still, so that two runs on one machine give the same file. Numbers have 6 significant digits.

`comparison.py` knows a few keys: "text" and the values of "texts" are transcripts, "words" are rows of a word and its
times in seconds, "captions" is a caption file, "names" may gain entries. All else is compared value by value.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights come from installed packages
if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperProcessor

import src
from src import data, evaluation, inference, models, training, utils
from src.data import SAMPLE_CLIP, SAMPLE_RATE, Utterance, decode_audio, load_audio
from src.models import WhisperModelManager

METHODS = (  # of the original project
    "src.evaluation.ModelEvaluator.evaluate_with_samples",
    "src.evaluation.LatencyBenchmark.benchmark_batch",
)
UPDATES, CLIPS_PER_UPDATE = 20, 3
TEXT_CLIPS = 12  # of the test split, at a stride
LABEL_STRIDE = 25  # over all clips
RECORDING_CLIPS = 12  # with the pauses about 70 s
STREAM_UPDATE_SEC = 1.5  # of new audio; the default of 0.3 s would take five times as long
FED_SEC = 0.5  # the session's own tests feed it in any pieces
VERIFY_SEC = 3.0  # of speech that an export is checked with
GERMAN = "Fünf Äpfel fielen vom Baum."

Audio = NDArray[np.float32]  # (T,) at 16 kHz
Section = dict[str, Any]


class Subject:
    """What the sections share; each part is made when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # for runs, checkpoints and exports

    def config(self, **overrides: Any) -> utils.Config:
        """Load the demo profile, without composed and cut clips, with overrides, whose keys have "__" for the dot."""
        fixed: dict[str, Any] = {"device": "cpu", "precision": "float32", "training.prefix_prob": 0.0}
        fixed |= {f"composition.{name}": default for name, default in utils.config.CompositionConfig()}
        fixed["streaming.end_of_turn_sec"] = 0.5
        fixed |= {f"paths.{name}_dir": str(self.folder / name) for name in ("runs", "checkpoints")}
        chosen = fixed | {key.replace("__", "."): value for key, value in overrides.items()}
        return utils.load_config(Path(src.__path__[0]).parent / "config.yaml", profile="demo", overrides=chosen)

    @cached_property
    def splits(self) -> data.DatasetSplits:
        return data.prepare_datasets(self.config())

    @cached_property
    def stock(self) -> tuple[Any, Any]:
        """Stock tiny.en, padded to 30 s, and its processor; not to be changed."""
        return WhisperModelManager(self.config()).initialize_model()

    @cached_property
    def vad(self) -> data.VoiceActivityDetector:
        return data.VoiceActivityDetector(self.config().vad)

    @cached_property
    def clips(self) -> list[Utterance]:
        return self.splits.test[:: len(self.splits.test) // TEXT_CLIPS][:TEXT_CLIPS]

    @cached_property
    def audios(self) -> list[Audio]:
        return [decode_audio(clip).numpy() for clip in self.clips]

    @cached_property
    def recording(self) -> Audio:
        """Clips of adults with pauses of 0.4 to 1.2 s, and one of 3 s in the middle."""
        adults = [clip for clip in self.splits.test if clip.meta["age"] >= 18]
        clips = adults[:: len(adults) // RECORDING_CLIPS][:RECORDING_CLIPS]
        pauses_sec = [0.4 + 0.2 * (i % 5) for i in range(len(clips))]
        pauses_sec[len(clips) // 2] = 3.0
        return joined([decode_audio(clip).numpy() for clip in clips], pauses_sec)

    @cached_property
    def stream(self) -> Audio:
        """The bundled speech of jfk.flac and two short clips."""
        short = sorted(self.splits.test, key=lambda clip: (clip.duration_sec or 0.0, clip.id))[10:12]
        return joined([load_audio(SAMPLE_CLIP), *(decode_audio(clip).numpy() for clip in short)], [0.9, 0.6, 0.7])

    @cached_property
    def ctranslate2_dir(self) -> Path:
        model, processor = self.stock
        clip = load_audio(SAMPLE_CLIP)[: round(VERIFY_SEC * SAMPLE_RATE)]
        return models.export_ctranslate2(
            model, self.folder / "ctranslate2", processor=processor, quantization="float32", verify_clips=[clip]
        )

    @cached_property
    def engine(self) -> Any:
        """CTranslate2 with the stock weights in float32."""
        return inference.load_engine(self.ctranslate2_dir, self.config(), engine="ctranslate2", compute_type="float32")

    @cached_property
    def files(self) -> inference.BatchInference:
        """Files by that engine, cut at silences."""
        return inference.BatchInference(config=self.config(), engine=self.engine, vad=self.vad)

    @cached_property
    def evaluator(self) -> tuple[evaluation.ModelEvaluator, Any]:
        """Of the stock model, and a loader of the clips."""
        config = self.config()
        return evaluation.ModelEvaluator(*self.stock, config), data.create_loader(self.clips, self.stock[1], config)

    @cached_property
    def evaluated(self) -> evaluation.EvaluationResult:
        evaluator, loader = self.evaluator
        return evaluator.evaluate_dataset(loader, name="stock")

    @cached_property
    def trained(self) -> tuple[training.WhisperTrainer, list[dict[str, Any]]]:
        """A trainer after one epoch, and the rows of its metrics.jsonl."""
        config = self.config(
            training__epochs=1, training__batch_size=CLIPS_PER_UPDATE, checkpoints__save_minutes=None,
            evaluation__bootstrap_samples=100,
        )  # fmt: skip
        utils.set_seed(config.seed)
        model, processor = WhisperModelManager(config).initialize_model()
        train = data.create_loader(self.splits.train[: UPDATES * CLIPS_PER_UPDATE], processor, config, shuffle=True)
        validation = data.create_loader(self.splits.validation[:CLIPS_PER_UPDATE], processor, config)
        experiment = utils.ExperimentLogger(config, run_id="golden")
        trainer = training.WhisperTrainer(model, processor, train, validation, config, experiment=experiment)
        trainer.train()
        lines = (config.paths.runs_dir / "golden" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return trainer, [json.loads(line) for line in lines]


def splits(subject: Subject) -> Section:
    """Ids and hashes of the bundled data, and the order of the batches."""
    prepared, config = subject.splits, subject.config()
    processor = subject.stock[1]
    section: Section = {
        "label_case": prepared.label_case,
        "shared_speakers": list(prepared.shared_speakers),
        "shared_texts": prepared.shared_texts,
        "skipped": len(prepared.skipped),
        "summary": prepared.summary(),
    }
    for name in ("train", "validation", "test"):
        clips: list[Utterance] = getattr(prepared, name)
        loader = data.create_loader(clips, processor, config, shuffle=name == "train")
        batches = [loader.batch_sampler.batches(epoch) for epoch in (0, 1)]
        described = [(c.id, c.text, c.speaker, c.language, c.duration_sec, c.columns) for c in clips]
        section[name] = {
            "ids": " ".join(clip.id for clip in clips),
            "described": digest(described),
            "audio": digest([hashlib.sha256(decode_audio(clip).numpy().tobytes()).hexdigest() for clip in clips[::20]]),
            "loader": loader.data_version,
            "batches": digest([[[clips[i].id for i in batch] for batch in epoch] for epoch in batches]),
            "first_batch": [clips[i].id for i in batches[0][0]],
        }
    versions = utils.DataVersionManager(subject.folder / "versions")
    logged = versions.log_dataset_version(
        dataset_name="sample", version="golden", metadata={}, utterances=prepared.utterances
    )
    section["data_version"] = {"clips": logged.clips, "checksum": logged.checksum}
    return section


def labels(subject: Subject) -> Section:
    """Decoder inputs and labels: single clips, timestamps, prompts, composed examples, another language."""
    processor = subject.stock[1]
    encoder = data.LabelEncoder(processor.tokenizer, language="en")
    clips = subject.splits.utterances[::LABEL_STRIDE]
    encoded = {clip.id: encoder.encode(clip.text) for clip in clips}
    prompted = encoder.label(encoder.tokenize(clips[1].text), previous=encoder.tokenize(clips[0].text))
    multilingual = WhisperProcessor.from_pretrained(
        models.resolve_weights("base", cache_dir=subject.config().paths.cache_dir).path
    )
    german = data.LabelEncoder(multilingual.tokenizer, language="de").encode(GERMAN)
    probabilities = {f"composition__{name}_prob": 0.5 for name in ("concatenate", "timestamp", "previous_text")}
    composed = subject.config(
        composition__no_speech_fraction=0.1, training__batch_size=CLIPS_PER_UPDATE, **probabilities
    )
    loader = data.create_loader(subject.splits.train[:40], processor, composed, shuffle=True)
    batches = list(loader)
    return {
        "clips": {name: [list(label.decoder_input_ids), list(label.labels)] for name, label in encoded.items()},
        "prompted": [list(prompted.decoder_input_ids), list(prompted.labels)],
        "german": [list(german.decoder_input_ids), list(german.labels)],
        "composed": {
            "ids": [batch["ids"] for batch in batches],
            "samples": [batch["audio_lengths"].tolist() for batch in batches],
            "decoder_input_ids": digest([batch["decoder_input_ids"].tolist() for batch in batches]),
            "labels": digest([batch["labels"].tolist() for batch in batches]),
            "timed": [batch["timed"].tolist() for batch in batches],
            "first_labels": batches[0]["labels"].tolist(),
        },
    }


def losses(subject: Subject) -> Section:
    """What a short training logs: 20 updates with augmentation, and a validation; and the stock model's loss."""
    rows = subject.trained[1]
    updates = [row for row in rows if row["event"] == "train_step"]
    (epoch,) = [row for row in rows if row["event"] == "epoch"]
    logged = {key: [row[key] for row in updates] for key in ("loss", "grad_norm", "learning_rate", "applied")}
    return {
        **logged,
        "train_loss": epoch["train_loss"],
        "val_loss": epoch["val_loss"],
        "stock_loss": subject.evaluated.loss,
    }


def encoder(subject: Subject) -> Section:
    """The stock encoder's output at 30 s and at the audio's own length."""
    model = subject.stock[0]
    audio = torch.from_numpy(subject.audios[0])[None]
    samples = math.ceil(audio.shape[1] / 320) * 320  # whole encoder positions
    found: Section = {}
    before = model.audio_context
    for context, length in (("full", 30 * SAMPLE_RATE), ("dynamic", samples)):
        model.audio_context = context
        features = data.LogMel()(torch.nn.functional.pad(audio, (0, length - audio.shape[1])))
        with torch.inference_mode():
            found[context] = statistics(model.model.encoder(features).last_hidden_state)
    model.audio_context = before
    return found


def transcripts(subject: Subject) -> Section:
    """Texts and word times of single clips, by torch and by CTranslate2."""
    model, processor = subject.stock
    options = inference.DecodingOptions(language="en", word_timestamps=True)
    results = {
        "torch": [inference.decode(model, processor, [audio], options)[0] for audio in subject.audios],
        "ctranslate2": subject.files.transcribe_batch(subject.audios, word_timestamps=True),
    }
    return {
        engine: {
            clip.id: {"text": row.text, "words": word_rows(row.words or ())}
            for clip, row in zip(subject.clips, rows, strict=True)
        }
        for engine, rows in results.items()
    }


def long_file(subject: Subject) -> Section:
    """A recording of about 70 s: cut at silences by both engines, and gone through in windows of 30 s."""
    by_torch = inference.BatchInference(*subject.stock, subject.config(), vad=subject.vad)
    found: Section = {}
    for name, files, mode in (
        ("torch", by_torch, "segments"),
        ("ctranslate2", subject.files, "segments"),
        ("sequential", subject.files, "sequential"),
    ):
        (result,) = files.transcribe_batch([subject.recording], word_timestamps=True, mode=mode)
        segments: Any = [[s.start_sec, s.end_sec] for s in result.segments]
        if mode == "sequential":  # the model writes these times
            segments = {"words": word_rows(result.segments)}
        found[name] = {
            "duration_sec": result.duration_sec,
            "text": result.text,
            "words": word_rows(result.words or ()),
            "segments": segments,
        }
    return found


def streams(subject: Subject) -> Section:
    """Commits of a live session by each policy."""
    return {policy: stream_by(subject, policy) for policy in ("alignatt", "local_agreement", "chunk_merge")}


def stream_by(subject: Subject, policy: str) -> Section:
    config = subject.config(streaming__policy=policy, streaming__min_chunk_sec=STREAM_UPDATE_SEC)
    asr = inference.StreamingASR(engine=subject.engine, vad=subject.vad, config=config, clock=lambda: 0.0)
    events = []
    for at in range(0, len(subject.stream), round(FED_SEC * SAMPLE_RATE)):
        events += asr.feed(subject.stream[at : at + round(FED_SEC * SAMPLE_RATE)])
    events += asr.flush()
    commits = [event for event in events if event.kind == "commit"]
    return {
        "text": asr.transcript,
        "words": [[*row, e.audio_sec] for e in commits for row in word_rows(e.words)],
        "finals": {"words": [[e.text, e.audio_sec] for e in events if e.kind == "final"]},
        "audio_sec": asr.audio_sec,
    }


def speech(subject: Subject) -> Section:
    """Where speech is in the recording, and the probabilities of every eighth window."""
    window = 512  # samples, 32 ms
    stream = subject.vad.stream()
    probabilities = []
    for at in range(0, len(subject.recording) - window + 1, window):
        stream.feed(subject.recording[at : at + window])
        probabilities.append(stream.probability)
    batch = subject.vad.speech_segments_batch([subject.recording, *subject.audios[:3]])
    return {
        "segments": [[s.start_sec, s.end_sec] for s in subject.vad.speech_segments(subject.recording)],
        "batch": [[[s.start_sec, s.end_sec] for s in segments] for segments in batch],
        "probabilities": probabilities[::8],
        "mean": float(np.mean(probabilities)),
    }


def features(subject: Subject) -> Section:
    """Log-mel features at 80 and 128 bins, masks, and prepared audio."""
    audio = torch.from_numpy(subject.audios[0])[None]
    log_mel = data.LogMel()(audio)
    masked = data.SpecAugment.from_config(subject.config(augmentation__spec_augment_prob=1.0).augmentation)(
        log_mel, generator=torch.Generator().manual_seed(0)
    )
    padded = np.pad(subject.audios[0], SAMPLE_RATE)
    stereo = np.stack([padded, 0.5 * padded], axis=1)
    return {
        "log_mel_80": statistics(log_mel),
        "log_mel_128": statistics(data.LogMel(128)(audio)),
        "masked": statistics(masked),
        "mono": statistics(data.AudioPreprocessor()(stereo, SAMPLE_RATE)),
        "resampled": statistics(data.AudioPreprocessor()(padded, 44_100)),
        "trimmed": statistics(data.AudioPreprocessor(vad=subject.vad, loudness_dbfs=-26.0)(padded, SAMPLE_RATE)),
    }


def augmentation(subject: Subject) -> Section:
    """What each effect does to one clip, and what is drawn for a batch."""
    config = subject.config(augmentation__room_prob=0.3, augmentation__codec_prob=0.3).augmentation
    examples = data.demonstrate(subject.audios[0], config, seed=7)
    lengths = torch.tensor([len(audio) for audio in subject.audios[:6]])
    batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in subject.audios[:6]], batch_first=True)
    changed = data.AudioAugmenter(config)(batch, lengths, generator=torch.Generator().manual_seed(7))
    return {
        "effects": {
            e.name: {"samples": len(e.waveform), "rms": rms(e.waveform), "log_mel": statistics(e.log_mel)}
            for e in examples
        },
        "batch": {
            "samples": changed.lengths.tolist(),
            "rms": [rms(row[:n].numpy()) for row, n in zip(changed.audio, changed.lengths.tolist(), strict=True)],
            "applied": [_drawn(effects) for effects in changed.applied],
        },
    }


def _drawn(effects: Sequence[Any]) -> dict[str, Any]:
    """The values of a clip's effects, under the names of the record."""
    values: dict[str, Any] = {"speed": 1.0, "pitch": "1", "rt60_sec": None, "direct_db": 0.0, "noise": None}
    values |= {"snr_db": None, "gain_db": 0.0, "telephone": False}
    names = {"factor": "speed", "ratio": "pitch", "kind": "noise"}
    for effect in effects:
        values |= {names.get(key, key): str(v) if key == "ratio" else v for key, v in asdict(effect).items()}
        values["telephone"] |= type(effect).__name__ == "Telephone"
    return values


def rates(subject: Subject) -> Section:
    """Rates, intervals and slices of the stock model on the clips."""
    evaluator, loader = subject.evaluator
    samples = evaluator.evaluate_with_samples(loader, num_samples=3)
    result = subject.evaluated
    measured = {key: value for key, value in result.items() if key not in ("compute_sec", "rtf", "loss")}
    return {
        "result": measured,
        "texts": {row.id: row.hypothesis for row in result.rows},
        "counts": {r.id: [r.substitutions, r.deletions, r.insertions, r.reference_words] for r in result.rows},
        "slices": {
            column: [asdict(part) for part in evaluation.slice_rates(result.rows, column)]
            for column in ("duration_sec", "age", "gender", "snr_db")
        },
        "samples": samples[["id", "rate"]].to_dict("records"),
    }


def metrics(subject: Subject) -> Section:
    """Rates of given texts: transcripts with words left out, repeated and replaced."""
    clips = subject.splits.test
    references = [clip.text for clip in clips] + [""]
    hypotheses = [damaged(text, i) for i, text in enumerate(references[:-1])] + ["Thank you."]
    better = [text if i % 3 else damaged(text, i) for i, text in enumerate(references)]
    groups = [clip.speaker for clip in clips] + [None]
    found: Section = {}
    for language in ("en", "de"):
        calculator = evaluation.MetricsCalculator(language, bootstrap=evaluation.Bootstrap(500, seed=3))
        found[language] = {
            "rates": asdict(calculator.compute(references, hypotheses, groups)),
            "difference": asdict(calculator.compare(references, hypotheses, better, groups)),
        }
    return found


def captions(subject: Subject) -> Section:
    """Caption files of the recording, from its words and from its segments."""
    (result,) = subject.files.transcribe_batch([subject.recording], word_timestamps=True)
    cues = {
        "words": inference.make_cues(result.words or ()),
        "segments": inference.cues_of_segments(result.segments),
    }
    names = {f"{kind}{suffix}": cues[kind] for kind in cues for suffix in (".srt", ".vtt")}
    paths = {name: inference.write_captions(subject.folder / name, cues) for name, cues in names.items()}
    return {name: {"captions": path.read_text(encoding="utf-8")} for name, path in paths.items()}


def exports(subject: Subject) -> Section:
    """Names of the files that each export writes; that of Hugging Face is a training's best model."""
    folders = {"huggingface": subject.trained[0].best_model_dir, "ctranslate2": subject.ctranslate2_dir}
    return {
        name: sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for name, folder in folders.items()
    }


def public(subject: Subject) -> Section:
    """Public names that can be imported, and methods of the original project."""
    packages = (utils, data, models, inference, evaluation, training)
    names = [f"{package.__name__}.{name}" for package in packages for name in package.__all__ if hasattr(package, name)]
    return {"names": sorted(names + [name for name in METHODS if callable(operator.attrgetter(name[4:])(src))])}


SECTIONS: Mapping[str, Callable[[Subject], Section]] = {
    function.__name__: function
    for function in (
        public, splits, labels, features, augmentation, speech, metrics, encoder, transcripts, long_file, captions,
        streams, rates, losses, exports,
    )
}  # fmt: skip


def measure(only: Sequence[str] = (), *, on_done: Callable[[str, float], None] | None = None) -> dict[str, Section]:
    """Compute sections, all by default; `on_done` gets the name of each and the seconds of CPU that it took."""
    found: dict[str, Section] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            subject = Subject(Path(folder))
            for name in only or SECTIONS:
                began = time.process_time()
                utils.set_seed(0)
                found[name] = rounded(SECTIONS[name](subject))
                if on_done is not None:
                    on_done(name, time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return found


def joined(audios: Sequence[Audio], pauses_sec: Sequence[float]) -> Audio:
    """Join waveforms with digital silence after each."""
    pauses = [np.zeros(round(sec * SAMPLE_RATE), dtype=np.float32) for sec in pauses_sec]
    return np.concatenate([piece for pair in zip(audios, pauses, strict=True) for piece in pair])


def damaged(text: str, number: int) -> str:
    """Leave a word out, say it twice or replace it, by turns; every fourth text stays as it is."""
    words = text.split()
    at = number % max(1, len(words))
    change = {0: words[at : at + 1], 1: [], 2: words[at : at + 1] * 2, 3: ["something"]}[number % 4]
    return " ".join([*words[:at], *change, *words[at + 1 :]])


def word_rows(words: Sequence[Any]) -> list[list[Any]]:
    return [[word.text, word.start_sec, word.end_sec] for word in words]


def statistics(values: Any) -> Section:
    """Shape, moments and a few values of an array."""
    array = np.asarray(values, dtype=np.float64)
    flat = array.reshape(-1)
    picks = np.linspace(0, len(flat) - 1, 8).astype(int)
    return {
        "shape": list(array.shape),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "min": float(flat.min()),
        "max": float(flat.max()),
        "values": flat[picks].tolist(),
    }


def rms(audio: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def digest(value: Any) -> str:
    """Return a hash of anything that JSON can hold."""
    content = json.dumps(rounded(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def rounded(value: Any) -> Any:
    """Return what JSON holds: floats with 6 significant digits, nan as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def main() -> int:
    """Write the sections to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=[], help="sections; all by default")
    arguments = parser.parse_args()
    found = measure(arguments.only, on_done=lambda name, sec: print(f"{name}: {sec:.1f} s", file=sys.stderr))  # noqa: T201
    arguments.out.write_text(to_json(found), encoding="utf-8")
    return 0


def to_json(sections: Mapping[str, Section]) -> str:
    """Return JSON with a line for each part of a section, so that a change is a short diff."""
    blocks = []
    for name, section in sections.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in section.items()]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
