"""A ZIP or tar file that was uploaded, as the folder that it holds."""

from __future__ import annotations

import hashlib
import logging
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from src.utils.errors import DataError, first_line
from src.utils.files import atomic_folder

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError)


def unpack(path: Path) -> Path:
    """Return a path as it is, or, of an archive, the folder that it holds.

    An archive is unpacked once, whole or not at all, below the system's folder for temporary files: its own folder may
    be on Google Drive, which is slow with many small files. Folders that hold nothing but one folder are stepped into.

    Raises:
        DataError: damaged, empty, with a member that would lie outside, or no space.
    """
    if not path.is_file() or not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return path
    found = path.stat()
    digest = hashlib.sha256(f"{path.resolve()}\t{found.st_size}\t{found.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "whisper_asr_archives" / digest
    if not folder.exists():
        _unpack_whole(path, folder)
    while len(inside := _visible(folder)) == 1 and inside[0].is_dir():
        folder = inside[0]
    if not inside:
        raise DataError(f"{path}: the archive is empty")
    return folder


def _unpack_whole(path: Path, folder: Path) -> None:
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
        raise DataError(
            f"{path}: cannot be unpacked to {folder}: {err.strerror or err}; free space there, or set TMPDIR to "
            "another disk"
        ) from err


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
