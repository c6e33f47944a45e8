"""Sources of data that need no network, up to the first batch; the journey takes `folder` through the notebook."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile

from src.data import create_dataloaders, prepare_datasets
from src.data.audio import load_audio
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.utterance import Utterance
from src.utils import load_config
from tests.runtime import ROOT, SETTINGS_OF_TESTS


def _pack_common_voice(clips: Sequence[Utterance], folder: Path) -> Path:
    """Write an archive as Common Voice has them: the clips of one language, two folders down."""
    (folder / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence"]
    for clip in clips:
        soundfile.write(folder / "clips" / f"{clip.id}.mp3", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.speaker}\t{clip.id}.mp3\t{clip.text}")
    (folder / "train.tsv").write_text("\n".join(lines))
    return Path(shutil.make_archive(str(folder.parents[1]), "gztar", folder.parents[1]))


@pytest.mark.parametrize("source", ["common_voice", "parquet"])
def test_a_source_without_network_gives_batches(
    source: str, sample: list[Utterance], tiny_en: tuple[Any, Any], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus" / "cv-corpus-23.0" / "en"
    path = SAMPLE_PARQUET if source == "parquet" else _pack_common_voice(sample[::20], corpus)
    overrides = {**SETTINGS_OF_TESTS, "data.source": source, "data.path": str(path), "device": "cpu"}
    config = load_config(ROOT / "config.yaml", profile="demo", overrides=overrides)
    splits = prepare_datasets(config)
    assert not {u.speaker for u in splits.train} & {u.speaker for u in splits.test}
    loaders = create_dataloaders(splits, tiny_en[1], config)
    batch = next(iter(loaders.train))
    assert len(batch["ids"]) == config.training.batch_size
    assert (batch["labels"] >= 0).any(dim=1).all()
