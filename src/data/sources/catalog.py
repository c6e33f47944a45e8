"""Where utterances come from: one adapter per source, all giving `Utterance`.

Nothing is decoded here. An unavailable source raises; only `data.sources` names others to try.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from src.data.sources.folder import read_folder, utterances_from_rows
from src.data.sources.hub import stream_hub
from src.data.sources.parquet import read_parquet
from src.data.utterance import Utterance
from src.utils.config import DataConfig, SourceName
from src.utils.errors import DataError, SourceUnavailableError, first_line
from src.utils.files import atomic_folder

logger = logging.getLogger(__name__)

SAMPLES_DIR = Path(__file__).parents[1] / "samples"
SAMPLE_PARQUET = SAMPLES_DIR / "speechocean762-mini.parquet"  # 500 clips of SpeechOcean762, see samples/README.md
SAMPLE_CLIP = SAMPLES_DIR / "jfk.flac"
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError)

Streams = dict[str, Iterator[Utterance]]


def load_utterances(config: DataConfig) -> list[Utterance]:
    """List all utterances of the first source; one of the Hub is read to its end: `open_source` takes the first N."""
    opened = open_source(config, config.chosen_sources[0])
    return opened if isinstance(opened, list) else [u for stream in opened.values() for u in stream]


def open_source(config: DataConfig, source: SourceName) -> list[Utterance] | Streams:
    """Open a source: a list, with its splits in `meta["split"]`, or for the Hub one iterator per split.

    Raises `SourceUnavailableError` where it is unavailable, another `DataError` where it is not in order.
    """
    opened = SOURCES[source](config) if source in SOURCES else stream_hub(source, config.hub)
    if not opened:
        raise DataError(f"source {source!r} ({config.path or 'bundled'}) has no utterance")
    return opened


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


def _path(config: DataConfig) -> Path:
    assert config.path is not None  # DataConfig requires it for these sources
    return unpack(config.path.expanduser())


SOURCES: dict[SourceName, Callable[[DataConfig], list[Utterance]]] = {  # all others are of the Hub
    "sample": lambda c: read_parquet(SAMPLE_PARQUET, language="en"),
    "folder": lambda c: read_folder(_path(c)),
    "parquet": lambda c: read_parquet(_path(c), audio_column=c.hub.audio_column, text_column=c.hub.text_column),
    "common_voice": _load_common_voice,
}


def unpack(path: Path) -> Path:
    """Return a path as it is, or, of a ZIP or tar file, the folder that it holds.

    An archive is unpacked once, whole or not at all, below the system's folder for temporary files: its own folder may
    be on Google Drive, which is slow with many small files. Folders that hold nothing but one folder are stepped into.
    `DataError` is raised if it is damaged or empty, has a member that would lie outside, or there is no space.
    """
    if not path.is_file() or not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return path
    found = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}\t{found.st_size}\t{found.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "whisper_asr_archives" / digest
    if not folder.exists():
        logger.info("unpacking %s to %s", path, folder)
        try:
            with atomic_folder(folder) as partial:
                if path.suffix.lower() == ".zip":
                    with zipfile.ZipFile(path) as archive:
                        archive.extractall(partial)
                else:
                    with tarfile.open(path) as tar:
                        tar.extractall(partial, filter="data")
        except _DAMAGED as err:
            raise DataError(f"{path}: cannot be unpacked ({first_line(err)}); pack or upload it again") from err
        except OSError as err:
            fix = "free space there, or set TMPDIR to another disk"
            raise DataError(f"{path}: cannot be unpacked to {folder}: {err.strerror or err}; {fix}") from err
    inside = [folder]
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    if not inside:
        raise DataError(f"{path}: the archive is empty")
    return folder
