"""Long recordings with subtitles: how much of the speech becomes clips, how well they are cut, what wrong text passes.

    python benchmarks/subtitles.py --quick
    python benchmarks/subtitles.py --record

Bundled clips are joined with pauses and noise into recordings of 10 and 30 minutes. Their subtitles are spoilt as real
ones are: times shifted by up to 1.5 s, cues merged and split, 5% of the words replaced by others, a passage missing.
Then tiny.en is trained a few updates on the clips themselves and on what was recovered, and both are measured on the
bundled test set. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import soundfile as sf

from scripts.benchmarking import show
from scripts.command_line import path_argument
from src.data import create_dataloaders, prepare_datasets
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.labels import source_text
from src.data.preparation import DatasetSplits, RecordingChecker
from src.data.sources.catalog import read_folder
from src.data.sources.subtitles import Passage
from src.data.utterance import Utterance
from src.data.vad import VoiceActivityDetector
from src.evaluation import ModelEvaluator
from src.inference.captions import Cue, to_srt
from src.inference.engines import load_engine
from src.inference.files.recordings import Preparation, kind_of, prepare_recordings
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.utils.config import Config, VADConfig, load_config
from src.utils.logging_config import setup_logging
from src.utils.runtime import set_seed

MINUTES, QUICK_MINUTES = (10, 30), 1.0
NOISE_DB = 20.0  # below the speech
MAX_SHIFT_SEC = 1.5
WRONG_SHARE = 0.05  # of the words
MISSING_SEC = 20.0  # of speech without subtitles
MERGED_SHARE, SPLIT_SHARE = 0.2, 0.2  # of the cues
NEAR_SEC = 0.2
NOTE = (
    "Right speech is that of clips whose subtitles are there and have no wrong word, without pauses; boundaries "
    "are those that are known, where a bundled clip begins or ends. The speakers are learners, many of them children."
)


@dataclasses.dataclass(frozen=True)
class Said:
    """A clip in the recording."""

    words: tuple[str, ...]  # as they are spoken
    written: tuple[str, ...]  # as the subtitles have them; none where they are missing
    speech: tuple[tuple[float, float], ...]  # seconds from where to where

    @property
    def start_sec(self) -> float:
        return self.speech[0][0]

    @property
    def end_sec(self) -> float:
        return self.speech[-1][1]

    @property
    def is_right(self) -> bool:
        return self.words == self.written


def build(
    clips: Sequence[Utterance], minutes: float, seed: int
) -> tuple[Waveform, list[Said], list[Passage], set[str]]:
    """Join clips to a recording, and spoil their subtitles; the ids are those of the clips that were used."""
    rng = np.random.default_rng(seed)
    vad = VoiceActivityDetector(VADConfig(min_silence_sec=0.1, pad_sec=0.0))
    vocabulary = sorted({word for clip in clips for word in source_text(clip).split()})
    pieces: list[Waveform] = []
    used: set[str] = set()
    said: list[Said] = []
    at = 0
    for index in rng.permutation(len(clips)):
        audio = load_audio(clips[index].audio)
        spans = vad.speech_segments(audio)
        if not spans or at + len(audio) > minutes * 60 * SAMPLE_RATE:
            continue
        words = tuple(source_text(clips[index]).split())
        written = tuple(
            str(rng.choice([other for other in vocabulary if other != word])) if rng.random() < WRONG_SHARE else word
            for word in words
        )
        begin = at / SAMPLE_RATE
        speech = tuple((begin + span.start_sec, begin + span.end_sec) for span in spans)
        said.append(Said(words, written, speech))
        pause = np.zeros(round(rng.uniform(0.2, 1.5) * SAMPLE_RATE), dtype=np.float32)
        pieces += [audio, pause]
        used.add(clips[index].id)
        at += len(audio) + len(pause)
    joined = np.concatenate(pieces)
    level = float(np.sqrt(np.mean(joined**2))) * 10 ** (-NOISE_DB / 20)
    noisy = (joined + rng.normal(0, level, len(joined))).astype(np.float32)

    # a passage without subtitles
    missing_sec = min(MISSING_SEC, 6 * minutes)
    first = next(i for i, clip in enumerate(said) if clip.start_sec > 0.4 * minutes * 60)
    last = next(i for i, clip in enumerate(said) if clip.start_sec > said[first].start_sec + missing_sec)
    said[first:last] = [dataclasses.replace(clip, written=()) for clip in said[first:last]]

    # cues: shifted, merged and split
    cues: list[Passage] = []
    for clip in said:
        shift = rng.uniform(-MAX_SHIFT_SEC, MAX_SHIFT_SEC)
        start, end = clip.start_sec + shift, clip.end_sec + shift
        kind = rng.random()
        if not clip.written:
            continue
        if kind < SPLIT_SHARE and len(clip.written) > 2:
            half = len(clip.written) // 2
            middle = start + (end - start) * half / len(clip.written)
            cues.append(Passage(" ".join(clip.written[:half]), start, middle))
            cues.append(Passage(" ".join(clip.written[half:]), middle, end))
        elif kind < SPLIT_SHARE + MERGED_SHARE and cues:
            cues[-1] = dataclasses.replace(cues[-1], text=f"{cues[-1].text} {' '.join(clip.written)}", end_sec=end)
        else:
            cues.append(Passage(" ".join(clip.written), start, end))
    for i in range(1, len(cues)):  # in the order in which they are said
        start = max(cues[i].start_sec, cues[i - 1].start_sec + 0.01)
        cues[i] = dataclasses.replace(cues[i], start_sec=start, end_sec=max(start, cues[i].end_sec))
    return noisy, said, cues, used


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one recording; counts, so that several can be added."""

    name: str
    speech_sec: float  # of clips whose subtitles are right
    recovered_sec: float  # of it, in accepted clips
    clips: int  # that were accepted
    bounded: int  # of them, those that begin or end where a bundled clip does
    near: int  # of those, both within 0.2 s
    words: int  # that were accepted
    wrong: int  # of them, those that are not said there
    unwritten: int  # that are said in accepted clips, and left out of their text
    wrong_given: int  # in all subtitles
    rejected: int
    seconds: float  # that it took
    lost_sec: dict[str, float]  # of right speech, by cause


def judge(name: str, said: Sequence[Said], prepared: Preparation, seconds: float) -> Figures:
    """Compare clips with the truth: each word of the subtitles is one of a bundled clip."""
    clips = [u for u in read_folder(prepared.folder) if u.meta["recording"] == f"{name}.wav"]
    found = [(float(u.meta["recording_start"]), float(u.meta["recording_end"]), u.text, "") for u in clips]
    for row in prepared.rejected:
        if row["recording"] == f"{name}.wav":
            found.append((row["start_sec"], row["end_sec"], row["text"], kind_of(row["reason"])))
    written = [(i, k) for i, clip in enumerate(said) for k in range(len(clip.written))]
    texts = [said[i].written[k] for i, k in written]
    bounded = near = words = wrong = at = 0
    causes: dict[int, str] = {}  # why a bundled clip is not in a clip, or not as a whole
    left_out: Counter[int] = Counter()  # its words that are in none
    for start, end, text, reason in sorted(found):
        spelt = text.split()
        place = next((p for p in range(at, len(texts)) if texts[p : p + len(spelt)] == spelt), None)
        pairs: list[tuple[int, int]] = []
        if place is not None:
            at = place + len(spelt)
            pairs = written[place:at]
        right = [said[i].words[k] == said[i].written[k] for i, k in pairs]
        if reason:
            cause = f"{reason}{', in words that are wrong' * (not all(right))}"
            causes |= {i: cause for i, _ in pairs}
            left_out.update(i for i, _ in pairs)
            continue
        words += len(spelt)
        there = [said[i].start_sec - 1 < end and start < said[i].end_sec + 1 for i, _ in pairs]
        wrong += len(spelt) - sum(a and b for a, b in zip(right, there, strict=True))
        if not pairs:
            continue
        (first, k), (last, m) = pairs[0], pairs[-1]
        off = [abs(start - said[first].start_sec)] if k == 0 else []
        off += [abs(end - said[last].end_sec)] if m + 1 == len(said[last].written) else []
        bounded += bool(off)
        near += bool(off) and max(off) <= NEAR_SEC
    lost: defaultdict[str, float] = defaultdict(float)
    unwritten = 0
    for i, clip in enumerate(said):
        kept = [max(0.0, min(b, d) - max(a, c)) for a, b in clip.speech for c, d, _, reason in found if not reason]
        lost_sec = sum(b - a for a, b in clip.speech) - sum(kept)
        share = left_out[i] / len(clip.words)
        unwritten += left_out[i] * (lost_sec < share / 2 * sum(b - a for a, b in clip.speech))
        if clip.is_right:
            lost[causes.get(i, "cut off")] += lost_sec
    given = sum(a != b for clip in said if clip.written for a, b in zip(clip.words, clip.written, strict=True))
    total = sum(b - a for clip in said if clip.is_right for a, b in clip.speech)
    causes_sec = {cause: round(lost[cause], 2) for cause in sorted(lost, key=lost.__getitem__, reverse=True)}
    return Figures(
        name, total, total - sum(lost.values()), len(clips), bounded, near, words, wrong, unwritten, given,
        len(found) - len(clips), seconds, causes_sec,
    )  # fmt: skip


def train(clips: Sequence[Utterance], base: DatasetSplits, config: Config, epochs: int) -> float:
    """Return the WER of the bundled test set after training on clips."""
    set_seed(config.seed)
    model, processor = WhisperModelManager(config).initialize_model()
    splits = dataclasses.replace(base, train=list(clips)).with_label_case(config.data.label_case)
    loaders = create_dataloaders(splits, processor, config)
    WhisperTrainer(model, processor, loaders.train, loaders.validation, config).train(num_epochs=epochs)
    return ModelEvaluator(model, processor, config).evaluate_dataset(loaders.test, name="tuned").rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny.en", help="that listens (default: %(default)s)")
    parser.add_argument("--minutes", type=float, action="append", help="of a recording; may repeat; default: 10, 30")
    parser.add_argument("--epochs", type=int, default=2, help="of each training (default: %(default)s)")
    parser.add_argument("--no-training", action="store_true", help="leave out the two trainings")
    parser.add_argument("--keep", type=path_argument, metavar="FOLDER", help="for recordings and clips; default: none")
    parser.add_argument("--record", action="store_true", help="append the table to docs/BENCHMARKS.md")
    parser.add_argument("--quick", action="store_true", help="under a minute: a short recording, one epoch of little")
    arguments = parser.parse_args()
    setup_logging("WARNING")
    lengths = (QUICK_MINUTES,) if arguments.quick else arguments.minutes or MINUTES
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        caps = dict.fromkeys(("data.max_validation", "data.max_test"), 4) if arguments.quick else {}
        config = load_config(None, overrides={
            "model.variant": "tiny.en", "augmentation.enabled": False, "data.num_workers": 0, **caps,
            "training": {"batch_size": 8, "learning_rate": 1e-4, "full_context_prob": 0.0},
            "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
            "checkpoints.save_minutes": None,
        })  # fmt: skip
        base = prepare_datasets(config)
        engine = load_engine(arguments.model, config)
        figures: list[Figures] = []
        for number, minutes in enumerate(lengths):
            name = f"recording_{minutes:g}_min"
            source = folder / f"in_{number}"
            source.mkdir(parents=True)
            audio, said, cues, used = build(base.train, minutes, seed=number)
            sf.write(source / f"{name}.wav", audio, SAMPLE_RATE)
            shown = [Cue(max(0.0, cue.start_sec), max(0.0, cue.end_sec), (cue.text,)) for cue in cues]
            (source / f"{name}.srt").write_text(to_srt(shown), encoding="utf-8")
            began = time.perf_counter()
            prepared = prepare_recordings(source, folder / f"out_{number}", config, engine=engine)
            figures.append(judge(name, said, prepared, time.perf_counter() - began))
            print(figures[-1], flush=True)
        wers: list[float | None] = [None, None]
        if not arguments.no_training:  # with the longest recording, as many updates each
            recovered = RecordingChecker(config).take("train", read_folder(prepared.folder), None)
            recovered = [dataclasses.replace(u, language=None) for u in recovered]
            original = [u for u in base.train if u.id in used]
            wers = [
                train(clips, base, config, 1 if arguments.quick else arguments.epochs)
                for clips in (original, recovered)
            ]
    show("Long recordings with subtitles", table(figures, wers), NOTE, record=arguments.record)
    whole = sum(f.speech_sec for f in figures)
    for cause in dict.fromkeys(cause for f in figures for cause in f.lost_sec):
        sec = sum(f.lost_sec.get(cause, 0.0) for f in figures)
        print(f"{sec / whole:6.1%} of right speech is lost: {cause}")
    print(json.dumps(summary(figures, wers)))
    return 0


def summary(figures: Sequence[Figures], wers: Sequence[float | None]) -> dict[str, float | None]:
    """Return the last line: shares of sums over the recordings."""

    def share(part: str, whole: str) -> float:
        parts, wholes = (sum(float(getattr(f, name)) for f in figures) for name in (part, whole))
        return round(parts / max(1e-9, wholes), 4)

    return {
        "speech_recovered": share("recovered_sec", "speech_sec"),
        "boundaries_within_200ms": share("near", "bounded"),
        "wrong_text_accepted": share("wrong", "words"),
        "wer_clips": None if wers[0] is None else round(wers[0], 4),
        "wer_recovered": None if wers[1] is None else round(wers[1], 4),
    }


def table(figures: Sequence[Figures], wers: Sequence[float | None]) -> list[dict[str, str]]:
    rows = [
        {
            "recording": f.name,
            "clips": str(f.clips),
            "passages left out": str(f.rejected),
            "right speech recovered": f"{f.recovered_sec / f.speech_sec:.1%} of {f.speech_sec / 60:.1f} min",
            "boundaries within 0.2 s": f"{f.near} of {f.bounded}",
            "wrong words given": str(f.wrong_given),
            "wrong words accepted": f"{f.wrong} of {f.words}",
            "spoken, but left out": str(f.unwritten),
            "lost most": ", ".join(
                f"{sec / f.speech_sec:.1%} ({cause})" for cause, sec in list(f.lost_sec.items())[:3]
            ),
            "took": f"{f.seconds:.0f} s",
            "test WER": "-",
        }
        for f in figures
    ]
    rows[-1]["test WER"] = "-" if None in wers else f"{wers[1]:.1%} (trained on the clips themselves: {wers[0]:.1%})"
    return rows


if __name__ == "__main__":
    sys.exit(main())
