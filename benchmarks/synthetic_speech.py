"""Folder data sets in nine languages, spoken by espeak-ng (Debian: apt-get install espeak-ng).

A sentence is one choice of each part in sentences.yaml: no two clips have the same text, but every word may occur in
each split. It shows what depends on the script and the tokens of a language; it is no measure of recognition.
"""

from __future__ import annotations

import csv
import itertools
import random
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from src.utils.errors import DataError

SENTENCES = Path(__file__).with_name("sentences.yaml")
SPEAKERS = {  # variants of espeak-ng's voices, by split
    **dict.fromkeys(("m1", "m3", "m5", "f1", "f2"), "train"),
    "f3": "validation",
    **dict.fromkeys(("m7", "f5"), "test"),
}
WORDS_PER_MIN = (150, 157, 164, 171, 178)


@dataclass(frozen=True)
class Spoken:
    """A language: espeak-ng's voice, what joins the parts of a sentence, and the choices of each part."""

    voice: str
    joint: str
    parts: list[list[str]]

    def sentences(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Return different sentences, each as it is written and as it is read."""
        choices = [[choice.split(" = ") for choice in part] for part in self.parts]
        drawn = random.Random(seed).sample(list(itertools.product(*choices)), count)
        return [
            (self.joint.join(each[0] for each in chosen), " ".join(each[-1] for each in chosen)) for chosen in drawn
        ]


LANGUAGES = {code: Spoken(**each) for code, each in yaml.safe_load(SENTENCES.read_text(encoding="utf-8")).items()}


def write_folder(folder: Path, marks: dict[str, str], clips: int, *, seed: int = 0) -> Path:
    """Write a folder data set: wav files and `metadata.csv`.

    Args:
        folder: made if it is missing.
        marks: what the column `language` says, by code of `LANGUAGES`; "" leaves it blank.
        clips: of each language, a multiple of the speakers' number.
        seed: of the choice of sentences.

    Raises:
        DataError: espeak-ng is not installed, or has no such voice.
    """
    if shutil.which("espeak-ng") is None:
        raise DataError("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rows, jobs = [], []
    for code, mark in marks.items():
        spoken = LANGUAGES[code]
        for index, (text, read) in enumerate(spoken.sentences(clips, seed)):
            variant = list(SPEAKERS)[index % len(SPEAKERS)]
            name = f"wav/{code}-{index:03d}.wav"
            speed = WORDS_PER_MIN[index % len(WORDS_PER_MIN)]
            jobs.append(["-v", f"{spoken.voice}+{variant}", "-s", str(speed), "-w", str(folder / name), read])
            rows.append((name, text, f"{code}-{variant}", SPEAKERS[variant], mark))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_speak, jobs))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text", "speaker", "split", "language"), *rows])
    return folder


def _speak(arguments: Sequence[str]) -> None:
    made = subprocess.run(["espeak-ng", *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        raise DataError(f"espeak-ng {' '.join(arguments[:2])}: {made.stderr.strip()}")
