"""Compare the speed of two commits in pairs, in one run on one machine.

    python benchmarks/compare_speed.py OLD_COMMIT [--data FILE] [--rounds 5] [--only TASK ...] [--quick]

Each commit gets a process of its own, with the same interpreter and environment. The tasks are measured in turn,
old and new directly after one another, and only one of the two processes computes at a time. The ratio is the median
over the rounds of new / old: below 1 the new commit is faster. Only public names that both commits have are used.

The model is tiny.en with stock weights, the speech is bundled; `--data` names a Parquet file with more clips for the
first batch. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
WARM_ROUNDS = 1
FIRST_BATCH_CLIPS, TRAIN_CLIPS, FILE_CLIPS = 1000, 120, 48
STREAM_SEC, STREAM_FED_SEC = 20, 0.1
SPEECH_DETECTION_SEC = 600


def main() -> int:
    """Measure both sides and print the table."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.compare_commits import checkout_of
    from scripts.benchmarking import show
    from scripts.command_line import path_argument

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD_COMMIT", help="commit to compare the working tree with")
    parser.add_argument("--old-checkout", type=path_argument, help="folder in which OLD_COMMIT is checked out already")
    parser.add_argument(
        "--data", type=path_argument, help="Parquet file in the Hugging Face audio layout; default: bundled clips"
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each task (default: 5)")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="one pair of the short tasks; records nothing")
    arguments = parser.parse_args()
    tasks = ["import", "detect"] if arguments.quick else arguments.only
    rounds = 1 if arguments.quick else arguments.rounds
    data = str(arguments.data.resolve()) if arguments.data else ""
    with checkout_of(arguments.old, arguments.old_checkout) as old_dir:
        sides = {name: start(folder, data) for name, folder in (("old", old_dir), ("new", ROOT))}
        rows, ratios = [], {}
        for task in tasks:
            times: dict[str, list[float]] = {name: [] for name in sides}
            for round_index in range(WARM_ROUNDS + rounds):
                for name in list(sides)[:: 1 if round_index % 2 else -1]:  # each side is first in every second round
                    times[name].append(ask(sides[name], task))
            old, new = (measured[WARM_ROUNDS:] for measured in times.values())
            ratios[task] = round(statistics.median(after / before for before, after in zip(old, new, strict=True)), 3)
            rows.append(
                {
                    "task": TASKS[task].__doc__ or task,
                    "old": f"{statistics.median(old):.2f} s",
                    "new": f"{statistics.median(new):.2f} s",
                    "new / old": f"{ratios[task]:.2f}",
                }
            )
        for side in sides.values():
            _pipe(side.stdin).close()
            side.wait()
    show(f"Speed compared with {arguments.old}", rows, f"Medians of {rounds} pairs.", record=not arguments.quick)
    print(json.dumps(ratios))
    return 0


def start(checkout: Path, data: str) -> subprocess.Popen[str]:
    """Start the process of one side, which measures the `src` of a checkout."""
    from benchmarks.compare_commits import clean_environment

    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"import runpy; runpy.run_path({__file__!r})['answer']({data!r})"],
        cwd=checkout, env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ask(side: subprocess.Popen[str], task: str) -> float:
    """Return the seconds that one side takes for a task."""
    print(task, file=_pipe(side.stdin), flush=True)
    answer = _pipe(side.stdout).readline()
    if not answer:
        raise SystemExit(f"{task} failed in {side.args!r}; its error is above")
    return float(answer)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def answer(data: str) -> None:
    """Measure what the standard input names, with the library of the current folder."""
    sys.path.insert(0, str(Path.cwd()))
    out, sys.stdout = sys.stdout, sys.stderr  # the library's own prints do not mix with the answers
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(Path(folder), data)
        for line in sys.stdin:
            print(TASKS[line.strip()](subject), file=out, flush=True)


class Subject:
    """What the tasks of one side share; each part is made when it is first used, and is not measured."""

    def __init__(self, folder: Path, data: str) -> None:
        self.folder = folder
        self.data = data
        self.runs = 0

    def config(self, **overrides: Any) -> Any:
        """Load the demo profile with overrides, whose keys have "__" for the dot."""
        from src.utils import load_config

        self.runs += 1
        paths = {f"paths.{name}_dir": str(self.folder / f"{name}{self.runs}") for name in ("runs", "checkpoints")}
        given = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_config(
            Path.cwd() / "config.yaml", profile="demo",
            overrides={"device": "cpu", "precision": "float32", **paths, **given},
        )  # fmt: skip

    @cached_property
    def splits(self) -> Any:
        from src.data import prepare_datasets

        return prepare_datasets(self.config())

    @cached_property
    def stock(self) -> tuple[Any, Any]:
        from src.models import WhisperModelManager

        return WhisperModelManager(self.config()).initialize_model()

    @cached_property
    def vad(self) -> Any:
        from src.data import VoiceActivityDetector

        return VoiceActivityDetector(self.config().vad)

    @cached_property
    def audios(self) -> Sequence[Any]:
        from src.data import decode_audio

        return [decode_audio(clip).numpy() for clip in self.splits.test[:FILE_CLIPS]]

    @cached_property
    def recording(self) -> Any:
        """Test clips joined, ten minutes of them."""
        import numpy as np

        repeated = np.concatenate(self.audios)
        return np.tile(repeated, SPEECH_DETECTION_SEC * 16_000 // len(repeated) + 1)[: SPEECH_DETECTION_SEC * 16_000]

    @cached_property
    def engine(self) -> Any:
        from src.inference import load_engine
        from src.models import export_ctranslate2

        model, processor = self.stock
        target = self.folder / "ctranslate2"
        export_ctranslate2(model, target, processor=processor, quantization="int8", verify_clips=self.audios[:1])
        return load_engine(target, self.config())


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of an action."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def import_inference(subject: Subject) -> float:
    """`import src.inference` and its names, in a new process"""
    code = "import src.inference as i; i.BatchInference, i.StreamingASR, i.load_engine"
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))


def first_batch(subject: Subject) -> float:
    """clips listed, decoded, checked, split, until the first batch"""
    from src.data import create_dataloaders, prepare_datasets

    processor = subject.stock[1]
    config = subject.config(data__max_train=FIRST_BATCH_CLIPS, training__batch_size=16)
    if subject.data:
        config = subject.config(
            data__source="parquet", data__path=subject.data, data__max_train=FIRST_BATCH_CLIPS, training__batch_size=16
        )
    return seconds(lambda: next(iter(create_dataloaders(prepare_datasets(config), processor, config)[0])))


def train(subject: Subject) -> float:
    """one epoch of training with augmentation, validation and checkpoint included"""
    from src.data import create_loader
    from src.models import WhisperModelManager
    from src.training import WhisperTrainer
    from src.utils import set_seed

    config = subject.config(training__epochs=1, checkpoints__save_minutes=None, evaluation__bootstrap_samples=100)
    set_seed(config.seed)
    model, processor = WhisperModelManager(config).initialize_model()
    trainer = WhisperTrainer(
        model, processor,
        create_loader(subject.splits.train[:TRAIN_CLIPS], processor, config, shuffle=True),
        create_loader(subject.splits.validation[:4], processor, config),
        config,
    )  # fmt: skip
    return seconds(trainer.train)


def transcribe(subject: Subject) -> float:
    """clips in batches, stock model on torch"""
    from src.inference import BatchInference

    inference = BatchInference(*subject.stock, subject.config())
    return seconds(lambda: inference.transcribe_batch(subject.audios))


def stream(subject: Subject) -> float:
    """a live stream of 20 s with its clock standing still, CTranslate2 int8"""
    from src.inference import StreamingASR

    asr = StreamingASR(engine=subject.engine, vad=subject.vad, config=subject.config(), clock=lambda: 0.0)
    step = round(STREAM_FED_SEC * 16_000)

    def feed_all() -> None:
        for at in range(0, STREAM_SEC * 16_000, step):
            asr.feed(subject.recording[at : at + step])
        asr.flush()

    return seconds(feed_all)


def detect(subject: Subject) -> float:
    """speech detection of 10 minutes"""
    return seconds(lambda: subject.vad.speech_segments(subject.recording))


TASKS: Mapping[str, Callable[[Subject], float]] = {
    "import": import_inference,
    "first_batch": first_batch,
    "train": train,
    "transcribe": transcribe,
    "stream": stream,
    "detect": detect,
}

if __name__ == "__main__":
    sys.exit(main())
