"""Where utterances come from: one adapter per source, all giving `Utterance`.

Nothing is decoded here. An unavailable source raises; only `data.sources` names others to try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from src.data.sources.archives import unpack
from src.data.sources.folder import read_folder, utterances_from_rows
from src.data.sources.hub import stream_hub
from src.data.sources.parquet import read_parquet
from src.data.sources.parts import AudioPart
from src.data.sources.subtitles import find_transcribed
from src.data.utterance import AudioTrack, Utterance
from src.utils.config import DataConfig, SourceName, flatten
from src.utils.errors import ConfigError, DataError, SourceUnavailableError
from src.utils.languages import parse_language
from src.utils.runtime import MOUNT_POINT, in_colab, upload_files

SAMPLES_DIR = Path(__file__).parents[1] / "samples"
SAMPLE_PARQUET = SAMPLES_DIR / "speechocean762-mini.parquet"  # 500 clips of SpeechOcean762, see samples/README.md
SAMPLE_CLIP = SAMPLES_DIR / "jfk.flac"
CLIP_TEXT = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."

Streams = dict[str, Iterator[Utterance]]


MINDS14_SUBSETS = {  # by language; of English also en-GB and en-AU
    subset[:2]: subset
    for subset in (
        "cs-CZ", "de-DE", "en-US", "es-ES", "fr-FR", "it-IT", "ko-KR", "nl-NL", "pl-PL", "pt-PT", "ru-RU", "zh-CN"
    )
}  # fmt: skip


def choose_data(
    choice: str, path: str = "", language: str | None = None, *, hub: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return settings of `data` for what a user of the notebook chose.

    Args:
        choice: a source; "auto" is in Colab telephone speech of MInDS-14 in the language, for English with the bundled
            sample where the Hub does not answer, and elsewhere the sample; "upload" asks for files.
        path: of a folder or archive, also one below "My Drive".
        language: of the speech, in any notation; None or "auto" takes English for MInDS-14.
        hub: more of `data.hub`.
        overrides: settings that go before; if they name a source, nothing is chosen.

    Raises:
        ConfigError: MInDS-14 has no such language, or the path is nowhere.
        DataError: the language is none.
        WhisperASRError: no file was uploaded.
    """
    if {"data.source", "data.sources", "data.mix"} & set(flatten(overrides or {})):
        return {}
    options = {key: value for key, value in hub.items() if value}
    if choice == "upload":
        return {"source": "folder", "path": str(upload_files())}
    spoken = parse_language(language) if language and language != "auto" else "en"
    if choice == "minds14" or (choice == "auto" and in_colab()):
        if "config" not in options and spoken not in MINDS14_SUBSETS:
            known = ", ".join(MINDS14_SUBSETS)
            raise ConfigError(f"MInDS-14 has no language {language!r}, only {known}; choose another DATA_SOURCE")
        options = {"config": MINDS14_SUBSETS.get(spoken), **options}
        falls_back = choice == "auto" and spoken == "en"
        return {"source": "minds14", "sources": ["minds14", "sample"] if falls_back else [], "hub": options}
    if not path:
        return {"source": "sample" if choice == "auto" else choice, "hub": options}
    found = next(
        (each for each in (Path(path), MOUNT_POINT / "MyDrive" / path, MOUNT_POINT / path) if each.exists()), None
    )
    if found is None:
        on_drive = "" if MOUNT_POINT.exists() else "; for Google Drive tick USE_DRIVE and run the cell Start first"
        raise ConfigError(f"DATA_PATH {path!r}: no such file or folder here{on_drive}")
    return {"source": "folder" if choice == "auto" else choice, "path": str(found), "hub": options}


def load_utterances(config: DataConfig) -> list[Utterance]:
    """List all utterances of the first source, or of each that is mixed.

    One of the Hub is read to its end: `open_source` takes the first N.
    """
    if config.mix:
        return [in_mix(u, name) for name, data in config.parts.items() for u in load_utterances(data)]
    opened = open_source(config, config.chosen_sources[0])
    return opened if isinstance(opened, list) else [u for stream in opened.values() for u in stream]


def in_mix(utterance: Utterance, name: str | None) -> Utterance:
    """Return an utterance whose id and `meta` say its source; of a source without a name, as it is."""
    if name is None:
        return utterance
    return replace(utterance, id=f"{name}/{utterance.id}", meta={**utterance.meta, "source": name})


def open_source(config: DataConfig, source: SourceName) -> list[Utterance] | Streams:
    """Open a source: a list, with its splits in `meta["split"]`, or for the Hub one iterator per split.

    Raises `SourceUnavailableError` if it is unavailable, another `DataError` if it is invalid.
    """
    opened = SOURCES[source](config) if source in SOURCES else stream_hub(source, config.hub)
    if not opened:
        raise DataError(f"source {source!r} ({config.path or 'bundled'}) has no utterance")
    if config.audio_track is None:
        return opened
    with_track = partial(_with_track, number=config.audio_track)
    if isinstance(opened, list):
        return [with_track(utterance) for utterance in opened]
    return {name: map(with_track, stream) for name, stream in opened.items()}


def _with_track(utterance: Utterance, number: int) -> Utterance:
    """Return an utterance whose recording is one track of its file."""
    audio = utterance.audio
    if isinstance(audio, AudioPart):
        return replace(utterance, audio=replace(audio, track=number))
    return replace(utterance, audio=AudioTrack(audio, number))


def _load_common_voice(config: DataConfig) -> list[Utterance]:
    """Read an archive of Common Voice, extracted or not: clips/ and train.tsv, dev.tsv, test.tsv."""
    folder = _path(config)
    lists = {"train": folder / "train.tsv", "validation": folder / "dev.tsv", "test": folder / "test.tsv"}
    if not (folder / "clips").is_dir() or not lists["train"].is_file():
        what = "not a Common Voice archive, which has clips/ and train.tsv"
        fix = "set data.path to the archive of one language, or to where that was extracted (cv-corpus-23.0/en)"
        raise SourceUnavailableError(f"{folder}: {what}; {fix}")
    listed: list[Utterance] = []
    for split, manifest in lists.items():
        if manifest.is_file():
            listed += utterances_from_rows(manifest, audio_dir=folder / "clips", quoted=False, split=split)
    return listed


def _load_folder(config: DataConfig) -> list[Utterance]:
    folder = _path(config)
    try:
        return read_folder(folder)
    except SourceUnavailableError as err:
        if not find_transcribed(folder):
            raise
        fix = "cut them first: config = with_clips(config), from src.inference, or scripts/prepare.py"
        raise DataError(f"{folder}: long recordings with transcripts are no clips yet; {fix}") from err


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig requires it for these sources
    return unpack(config.path)


SOURCES: dict[SourceName, Callable[[DataConfig], list[Utterance]]] = {  # all others are of the Hub
    "sample": lambda c: read_parquet(SAMPLE_PARQUET, language="en"),
    "folder": _load_folder,
    "parquet": lambda c: read_parquet(_path(c), audio_column=c.hub.audio_column, text_column=c.hub.text_column),
    "common_voice": _load_common_voice,
}
