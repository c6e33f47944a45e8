"""ZIP and tar files, unpacked once into a folder of this user, without trusting what they say.

`zipfile` and `tarfile` read the members; where these go, and how many bytes come out, is decided here. No link is made
on the disk that leads anywhere: a link to a file of the same archive becomes a second name of that file.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from src.utils.errors import DataError, first_line
from src.utils.files import atomic_folder, file_stamp, locked, recover_folder

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_RATIO = 100  # unpacked bytes per byte of the archive; silence in WAV files has more, a whole data set has not
ALLOWED_BYTES = 32 << 20  # whatever the ratio
MAX_DISK_SHARE = 0.9  # of the free space
MIN_MEMBER_BYTES = 1024  # of the archive per file, on average over more than:
ALLOWED_MEMBERS = 20_000
MAX_DEPTH = 32  # folders within folders
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 2000  # file systems have 255 for a name, and 4096 for a path
MORE_SPACE = "free space there, or set TMPDIR to another disk"  # what to do where `private_folder` is full
BLOCK_BYTES = 64 << 10  # read at once; a larger header in a tar file is refused
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, LookupError,
    OverflowError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
_elsewhere: dict[Path, Path] = {}  # folders with a random name, by the one that they stand for


class _Member(NamedTuple):
    name: str
    content: IO[bytes] | None = None  # of a file
    link: str | None = None  # the name to which a link leads, from the top of the archive


def unpack(path: Path) -> Path:
    """Return a path as it is, or, of a ZIP or tar file, the folder that it holds.

    An archive is unpacked once, whole or not at all, into the system's folder for temporary files: its own folder may
    be on Google Drive, which is slow with many small files. Folders that hold nothing but one folder are stepped into.

    Raises:
        DataError: if it is damaged (checksums are compared), empty or encrypted, has a member that would lie outside
            or is neither file nor folder, unpacks to much more than speech does, or there is no space.
    """
    if not path.is_file() or not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return path
    folder = private_folder("archives") / file_stamp(path)
    try:
        with locked(Path(f"{folder}.lock")):  # a second process waits, then finds the first one's work
            recover_folder(folder)
            if not folder.exists():
                logger.info("unpacking %s to %s", path, folder)
                with atomic_folder(folder) as partial:
                    partial.chmod(0o700)
                    _extract(path, partial)
    except (*_DAMAGED, OSError) as err:
        if isinstance(err, OSError) and err.errno is not None:  # gzip and bz2 say without a number what is damaged
            raise DataError(f"{path}: cannot be unpacked to {folder}: {err.strerror}; {MORE_SPACE}") from err
        raise DataError(f"{path}: cannot be unpacked ({first_line(err)[:200]}); pack or upload it again") from err
    inside = [folder]
    while len(inside) == 1 and inside[0].is_dir():
        folder = inside[0]
        inside = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    if not inside:
        raise DataError(f"{path}: the archive is empty")
    return folder


def private_folder(kind: str) -> Path:
    """Return a folder for temporary files that this user alone can enter; of a random name if its own is taken."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"whisper_asr_{kind}-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and (found.st_uid, found.st_mode & 0o077) == (user, 0)
        if is_own or os.name == "nt":  # there the folder for temporary files is the user's
            return folder
    except FileExistsError:  # a file
        pass
    except OSError as err:
        raise DataError(f"{folder}: cannot be made: {err.strerror}; set TMPDIR to a folder of yours") from err
    if not (own := _elsewhere.get(folder, folder)).is_dir() or own == folder:
        own = _elsewhere[folder] = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))  # 0700
        logger.warning("%s is a link, or open to others: this process uses %s", folder, own)
    return own


def _extract(path: Path, folder: Path) -> None:
    limits = _Limits(path, folder)
    files, links, written = set[PurePosixPath](), list[tuple[PurePosixPath, PurePosixPath]](), 0
    members = _read_zip(path, limits) if path.suffix.lower() == ".zip" else _read_tar(path, limits)
    for number, member in enumerate(members, start=1):
        limits.check(members=number)
        place = _place(path, member.name)
        if member.link is not None:  # after all files: it may come before the one to which it leads
            links.append((place, _place(path, member.link)))
            continue
        _make_folder(path, folder, place.parent if member.content else place)
        if member.content is None:
            continue
        files.add(place)
        try:
            with (folder / place).open("xb") as file:
                while block := member.content.read(BLOCK_BYTES):
                    written += len(block)
                    limits.check(size=written)
                    file.write(block)
        except (FileExistsError, IsADirectoryError) as err:
            raise _twice(path, place) from err
    for place, to in links:
        if to not in files:
            what = f"the link {_shown(place)} leads to {_shown(to)}, which is no file of the archive"
            raise DataError(f"{path}: {what}; pack the files instead of links to them (tar --dereference)")
        _make_folder(path, folder, place.parent)
        try:
            os.link(folder / to, folder / place)
        except FileExistsError as err:
            raise _twice(path, place) from err
        files.add(place)


class _Limits:
    """How much may come out of an archive."""

    def __init__(self, path: Path, folder: Path) -> None:
        packed, self._path, self._where = path.stat().st_size, path, folder.parent
        self._members = max(ALLOWED_MEMBERS, packed // MIN_MEMBER_BYTES)
        self._by_ratio = max(ALLOWED_BYTES, MAX_RATIO * packed)
        self._size = int(MAX_DISK_SHARE * shutil.disk_usage(folder).free)

    def check(self, *, members: int = 0, size: int = 0) -> None:
        """Raise `DataError` if there are more files or bytes."""
        if members > self._members:
            raise DataError(f"{self._path}: has more than {self._members:,} files for its size; pack it in parts")
        if size > self._by_ratio:
            fix = "if that is right, unpack it yourself and set data.path to the folder"
            raise DataError(f"{self._path}: unpacks to {MAX_RATIO} times its own size or more; {fix}")
        if size > self._size:
            what = f"unpacks to more than the {self._size >> 20:,} MB of {self._where}"
            raise DataError(f"{self._path}: {what}; {MORE_SPACE}")


def _place(path: Path, name: str) -> PurePosixPath:
    """Return where a member goes below the folder; raises `DataError` for a name that cannot be there."""
    name = name.replace("\\", "/")  # from Windows
    place = PurePosixPath(posixpath.normpath(name))
    problem = None
    if name.startswith("/") or os.path.splitdrive(name)[0] or ".." in name.split("/"):
        problem = "would lie outside the folder"
    elif len(place.parts) > MAX_DEPTH:
        problem = f"lies deeper than {MAX_DEPTH} folders"
    elif max(len(os.fsencode(part)) for part in (*place.parts, "")) > MAX_NAME_BYTES or len(name) > MAX_PATH_BYTES:
        problem = f"has a name of more than {MAX_NAME_BYTES} bytes, or a path of more than {MAX_PATH_BYTES}"
    elif "\0" in name:
        problem = "has a name that no file can have"
    if problem:
        raise DataError(f"{path}: the member {_shown(name)} {problem}; pack the archive again without it")
    return place


def _make_folder(path: Path, folder: Path, place: PurePosixPath) -> None:
    for parent in (*reversed(place.parents), place):
        try:
            (folder / parent).mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as err:
            raise _twice(path, parent) from err


def _twice(path: Path, place: PurePosixPath) -> DataError:
    return DataError(f"{path}: has two members of the name {_shown(place)}; pack it again with one of them")


def _neither(path: Path, name: str) -> DataError:
    return DataError(f"{path}: {_shown(name)} is neither file nor folder; pack the archive again without it")


def _shown(name: PurePosixPath | str) -> str:
    return repr(str(name) if len(str(name)) <= 120 else f"{str(name)[:60]}...{str(name)[-60:]}")


def _read_zip(path: Path, limits: _Limits) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        limits.check(members=len(members), size=sum(info.file_size for info in members))
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - BLOCK_BYTES - 22))
            _, _, end = file.read().rpartition(b"PK\5\6")  # the last record; zipfile does not read its number of files
        if struct.unpack_from("<H", end, 6)[0] not in (len(members) & 0xFFFF, 0xFFFF):
            raise zipfile.BadZipFile("its directory is damaged")
        for info in members:
            kind, shown = stat.S_IFMT(info.external_attr >> 16), _shown(info.filename)
            if info.flag_bits & 1:
                fix = "unpack it with the password, and set data.path to the folder"
                raise DataError(f"{path}: {shown} is encrypted; {fix}")
            if info.is_dir():
                yield _Member(info.filename)
                continue
            if kind not in (0, stat.S_IFREG, stat.S_IFLNK):
                raise _neither(path, info.filename)
            try:
                content = archive.open(info)
            except NotImplementedError as err:
                method = zipfile.compressor_names.get(info.compress_type, f"method {info.compress_type}")  # type: ignore[attr-defined]
                fix = "unpack it with another program, and set data.path to the folder"
                raise DataError(f"{path}: {shown} is packed with {method}, which cannot be read here; {fix}") from err
            with content:
                if kind == stat.S_IFLNK:
                    to = content.read(BLOCK_BYTES).decode()
                    yield _Member(info.filename, link=_leads_to(info.filename, to))
                    continue
                yield _Member(info.filename, content)  # whose end compares the checksum
                if content.tell() != info.file_size:
                    raise zipfile.BadZipFile(f"{shown} has not the size that the directory says")


def _read_tar(path: Path, limits: _Limits) -> Iterator[_Member]:
    with path.open("rb") as file:
        magic = file.read(6)
    opener: Any = next((opener for mark, opener in _OPENERS if magic.startswith(mark)), open)
    with opener(path, "rb") as file:
        stream = _Forward(file, limits)
        with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a million of them take a gigabyte
                if info.isdir():
                    yield _Member(info.name)
                elif info.issym():
                    yield _Member(info.name, link=_leads_to(info.name, info.linkname))
                elif info.islnk():
                    yield _Member(info.name, link=posixpath.normpath(info.linkname))
                elif info.isfile() and (content := archive.extractfile(info)) is not None:
                    yield _Member(info.name, content.raw)  # type: ignore[attr-defined]  # else it reads larger blocks
                else:
                    raise _neither(path, info.name)
        if stream.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError("a header is damaged, or the end is absent")
        while block := stream.read(BLOCK_BYTES):  # to the checksum of the compressed data
            if block.strip(b"\0"):
                raise tarfile.ReadError("something comes after its end")


def _leads_to(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


class _Forward:
    """A file for tarfile that is read once, from begin to end, in blocks of bounded size."""

    def __init__(self, file: IO[bytes], limits: _Limits) -> None:
        self._file, self._limits, self._position = file, limits, 0
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= BLOCK_BYTES:
            raise tarfile.ReadError(f"a header has {size:,} bytes, more than {BLOCK_BYTES:,}")
        self.last = self._file.read(size)
        self._position += len(self.last)
        self._limits.check(size=self._position)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a member begins before the end of another")
        while self._position < position and self.read(min(position - self._position, BLOCK_BYTES)):
            pass
