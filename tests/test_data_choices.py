"""Each choice of data that needs no network, through the cells up to the training; `folder` makes the whole journey."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import soundfile

from src.data.audio import load_audio
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.utterance import Utterance
from tests.runtime import SETTINGS_OF_TESTS, TRAIN, Runtime


def _pack_common_voice(clips: Sequence[Utterance], folder: Path) -> Path:
    """Write an archive as Common Voice has them: the clips of one language, two folders down."""
    (folder / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence"]
    for clip in clips:
        soundfile.write(folder / "clips" / f"{clip.id}.mp3", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.speaker}\t{clip.id}.mp3\t{clip.text}")
    (folder / "train.tsv").write_text("\n".join(lines))
    return Path(shutil.make_archive(str(folder.parents[1]), "gztar", folder.parents[1]))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["common_voice", "parquet"])
def test_each_choice_of_data_that_needs_no_network(source: str, sample: list[Utterance], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus" / "cv-corpus-23.0" / "en"
    path = SAMPLE_PARQUET if source == "parquet" else _pack_common_voice(sample[::20], corpus)
    choice = {"data.source": source, "data.path": str(path), "training.epochs": 1}
    runtime = Runtime(tmp_path / "runtime", None)
    runtime.run({"PROFILE": "demo"}, overrides={**SETTINGS_OF_TESTS, **choice}, until=TRAIN)
    (epoch,) = runtime.rows("epoch")
    assert epoch["val_wer"] > 0
