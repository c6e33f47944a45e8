"""Where utterances come from: one adapter per source, all giving `Utterance`.

Adapters list recordings and transcripts; nothing is decoded here. An unavailable source raises: there
is no other source to switch to in silence. `data.sources` names the ones to try, in order;
`prepare_datasets` says which it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from src.data.sources.archives import unpack
from src.data.sources.folder import read_folder, utterances_from_rows
from src.data.sources.hub import stream_hub
from src.data.sources.parquet import read_parquet
from src.data.utterance import Utterance
from src.utils.config import DataConfig, SourceName
from src.utils.errors import DataError, SourceUnavailableError

SAMPLES_DIR = Path(__file__).parents[1] / "samples"
SAMPLE_PARQUET = SAMPLES_DIR / "speechocean762-mini.parquet"  # 500 clips of SpeechOcean762, see samples/README.md
SAMPLE_CLIP = SAMPLES_DIR / "jfk.flac"

Streams = dict[str, Iterator[Utterance]]


def load_utterances(config: DataConfig, source: SourceName | None = None) -> list[Utterance]:
    """List all utterances of a source.

    Args:
        config: where it lies.
        source: `data.source` by default. One of the Hub is read to its end: use `open_source` to take the first N.

    Raises:
        DataError: source empty, manifest absent or with unknown columns, duplicate ids.
    """
    name = source or config.chosen_sources[0]
    opened = open_source(config, name)
    listed = opened if isinstance(opened, list) else [u for stream in opened.values() for u in stream]
    if not listed:
        raise DataError(f"source {name!r} ({config.path or 'bundled'}) has no utterance")
    return listed


def open_source(config: DataConfig, source: SourceName) -> list[Utterance] | Streams:
    """Open a source.

    Returns:
        A list, with the split in `meta["split"]` where the source gives one; or, for the Hub, one iterator per split.

    Raises:
        SourceUnavailableError: it is unavailable.
        DataError: it is available, and not in order.
    """
    return SOURCES[source](config)


def _load_parquet(config: DataConfig) -> list[Utterance]:
    return read_parquet(_path(config), audio_column=config.hub.audio_column, text_column=config.hub.text_column)


def _load_common_voice(config: DataConfig) -> list[Utterance]:
    """Read an archive of Common Voice, extracted or not: clips/ and train.tsv, dev.tsv, test.tsv."""
    folder = _path(config)
    lists = {"train": folder / "train.tsv", "validation": folder / "dev.tsv", "test": folder / "test.tsv"}
    if not (folder / "clips").is_dir() or not lists["train"].is_file():
        raise SourceUnavailableError(
            f"{folder}: not a Common Voice archive, which has clips/ and train.tsv; set data.path to the archive of "
            "one language, or to where that was extracted, for example cv-corpus-23.0/en"
        )
    listed: list[Utterance] = []
    for split, manifest in lists.items():
        if manifest.is_file():
            listed += utterances_from_rows(manifest, audio_dir=folder / "clips", quoted=False, split=split)
    return listed


def _stream(source: str, config: DataConfig) -> Streams:
    return stream_hub(source, config.hub)


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig requires it for these sources
    return unpack(config.path.expanduser())


SOURCES: dict[SourceName, Callable[[DataConfig], list[Utterance] | Streams]] = {
    "sample": lambda config: read_parquet(SAMPLE_PARQUET, language="en"),
    "folder": lambda config: read_folder(_path(config)),
    "parquet": _load_parquet,
    "common_voice": _load_common_voice,
    **{name: partial(_stream, name) for name in ("minds14", "librispeech", "speechocean762", "hub")},
}
