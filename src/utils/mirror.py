"""Checked copies of finished folders elsewhere, for example on Google Drive; in the background while training goes on.

target/.mirror.json               says that this is a mirror; it is missing while a drive is unmounted
target/<name>                     a whole, verified copy; its own .mirror.json lists what was written
target/.<name>.<token>.partial    being copied
target/.<name>.<token>.replaced   the last good copy, until the new one has taken its name
target/.<name>.<token>.removed    being deleted

Writes to a mounted Drive stall and vanish, so every file is read back; links do not work there. Colab uploads from its
own cache: a checked copy has certainly reached Google only after `google.colab.drive.flush_and_unmount()` (colabtools
issue 659). One process at a time may write a target.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from pydantic import BaseModel

from src.utils.errors import WhisperASRError
from src.utils.files import LOCK, fsync, load_json, sha256_of, write_text_atomic
from src.utils.runtime import is_on_unmounted_drive

logger = logging.getLogger(__name__)

MARKER = ".mirror.json"
RETRY_WAITS_SEC = (1.0, 4.0, 16.0)
STALL_SEC = 300.0
_BLOCK_BYTES = 1 << 18
_SPARE_BYTES = 16 << 20  # what others write meanwhile
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16})\.(?P<kind>partial|replaced|removed)")
_live_tokens: set[str] = set()  # copies that this process is making: not remains of a crash


class _RefusedError(WhisperASRError):
    """Copying again cannot help."""


class _Marker(BaseModel):
    """Content of .mirror.json in a copied folder."""

    name: str  # relative to the target: a folder that was renamed or copied by hand is not the mirror's
    group: str | None
    order: int
    files: dict[str, int]  # name to size in bytes


class _Job(NamedTuple):
    source: Path
    name: str
    group: str | None = None
    keep: int | None = None

    @property
    def series(self) -> str:
        """Of folders of one group only the newest matters."""
        return self.group or self.name


class DriveMirror:
    """Copies folders into a target, one after another, on its own thread.

    The caller never waits and never sees an error of the drive: a folder that cannot be copied is a warning and an
    entry in `failures`, and the last good copy stays. Only folders whose own .mirror.json has their name are ever
    replaced or removed, and of these only the files that were copied.

    The target is made now if absent, never later: `WhisperASRError` if it cannot be written, or is on a Google Drive
    that is not mounted. `max_mb_per_sec` counts 10^6 bytes, written and read back.
    """

    def __init__(
        self, target: Path, *, max_mb_per_sec: float,
        sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.target = target.absolute()
        self._bytes_per_sec, self._sleep, self._clock = max_mb_per_sec * 1e6, sleep, clock
        self._changed = threading.Condition()  # guards what follows; never held while a file is accessed
        self._queue: dict[str, _Job] = {}  # by series, as the failures
        self._current: _Job | None = None
        self._failed: dict[str, tuple[str, str]] = {}
        self._stall_reported = False
        self._due_sec = self._progress_sec = clock()
        self._prepare_target()
        threading.Thread(target=self._run, name="drive-mirror", daemon=True).start()

    @property
    def failures(self) -> dict[str, str]:
        """Reason by folder without a copy, until its name, or a newer folder of its group, has been copied."""
        with self._changed:
            return dict(self._failed.values())

    def submit(
        self, source: Path, *, name: str | None = None, keep: int | None = None, group: str | None = None
    ) -> None:
        """Queue a finished folder and return at once; it replaces a waiting one of the same name or group.

        Args:
            source: must not change until its copy is done, see `is_busy`; dropped if it is deleted before.
            name: relative path in the target; the folder's own name by default.
            keep: how many of the mirror's copies of its group stay, next to each other; None keeps all.
            group: folders that succeed each other.
        """
        job = _Job(source.absolute(), name or source.absolute().name, group, keep)
        parts = PurePosixPath(job.name).parts
        if not parts or "\\" in job.name or any(part.startswith((".", "/")) for part in parts):
            raise WhisperASRError(f"{job.name!r}: not a relative path of visible names, as in 'run/checkpoint-1'")
        if not job.source.is_dir():
            self._fail(job, "no such folder; save it first")
            return
        with self._changed:
            self._queue.pop(job.series, None)
            self._queue[job.series] = job
            self._changed.notify_all()
            current, stalled_sec = self._current, self._clock() - self._progress_sec
        if current is not None and stalled_sec >= STALL_SEC and not self._stall_reported:
            self._stall_reported = True
            logger.warning(
                "mirror: the copy of %s to %s has stood still for %.0f s: the drive hangs; training goes on; "
                "mount the drive again", current.name, self.target, stalled_sec,
            )  # fmt: skip

    def is_busy(self, source: Path) -> bool:
        """Whether a folder waits or is being copied, so that it must not be deleted."""
        with self._changed:
            return any(job.source == source.absolute() for job in self._unfinished())

    def _unfinished(self) -> list[_Job]:
        return [job for job in (self._current, *self._queue.values()) if job is not None]

    def flush(self, timeout_sec: float | None = None) -> bool:
        """Wait until every submitted folder is copied or has failed; False, with a warning, if the time has passed."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._unfinished(), timeout_sec)
            names = ", ".join(job.name for job in self._unfinished())
        if not done:
            logger.warning("mirror: still without a copy in %s after %.0f s: %s", self.target, timeout_sec, names)
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                self._current = job = self._queue.pop(next(iter(self._queue)))
                self._progress_sec, self._stall_reported = self._clock(), False
            try:
                self._copy_with_retries(job)
            except Exception as err:  # noqa: BLE001  the thread's boundary
                known = isinstance(err, OSError | WhisperASRError)
                self._fail(job, str(err) if known else f"{type(err).__name__}: {err}")
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _copy_with_retries(self, job: _Job) -> None:
        for wait_sec in (*RETRY_WAITS_SEC, None):
            try:
                n_bytes = self._copy(job)
                break
            except (OSError, WhisperASRError) as err:
                if not job.source.is_dir():
                    logger.info("mirror: %s was deleted before its copy was whole", job.source)
                    return
                if wait_sec is None or isinstance(err, _RefusedError):
                    raise
                logger.info("mirror: %s: %s; next try in %.0f s", job.name, err, wait_sec)
                self._sleep(wait_sec)
        logger.info("mirror: copied and checked %s (%.1f MB) in %s", job.name, n_bytes / 1e6, self.target)
        with self._changed:
            self._failed.pop(job.series, None)
        folder = (self.target / job.name).parent
        try:
            self._recover(folder)  # removes the copy that was replaced
            if job.keep is not None:
                group = sorted((m.order, path) for path, m in self._copies(folder) if m.group == job.group)
                for _, path in group[: -job.keep]:
                    self._remove_copy(path, path)
        except OSError as err:
            logger.warning("mirror: older copies in %s stay for now: %s", self.target, err)

    def _copy(self, job: _Job) -> int:
        """Copy a folder; an older copy keeps the name until the new one is whole and checked."""
        if is_on_unmounted_drive(self.target) or not (self.target / MARKER).is_file():
            raise WhisperASRError(f"{self.target} is not there any more; mount the drive again (mount_drive in Colab)")
        final = self.target / job.name
        self._recover(final.parent)
        files = _list_files(job.source)
        if os.path.lexists(final) and self._read_marker(final) is None:
            raise _RefusedError(f"{final} exists and was not written by this mirror; move it away or mirror elsewhere")
        sizes = {file: size for file, (size, *_) in files.items()}
        n_bytes, usage = sum(sizes.values()), shutil.disk_usage(self.target)
        is_known = usage.total > 0 and 0 <= usage.free <= usage.total  # some mounts report zeros or nonsense
        if is_known and usage.free < n_bytes + _SPARE_BYTES:
            raise WhisperASRError(
                f"{self.target}: {(n_bytes + _SPARE_BYTES) / 1e6:.0f} MB needed, {usage.free / 1e6:.0f} MB free; "
                "free space there (also its trash), or lower checkpoints.save_total_limit"
            )

        order = 1 + max((marker.order for _, marker in self._copies(final.parent)), default=0)
        token = secrets.token_hex(8)
        partial, replaced = _hidden(final, token, "partial"), _hidden(final, token, "replaced")
        _live_tokens.add(token)
        try:
            self._make_folder(partial)
            marker = _Marker(name=job.name, group=job.group, order=order, files=sizes).model_dump_json()
            (partial / MARKER).write_text(marker, encoding="utf-8")
            if (partial / MARKER).read_text(encoding="utf-8") != marker:
                raise WhisperASRError(f"{partial / MARKER}: differs from what was written; the target is not reliable")
            copied = {}
            for file in files:
                self._make_folder((partial / file).parent)
                copied[file] = _copy_file(job.source / file, partial / file, self._spend)
            if _list_files(job.source) != files:
                raise WhisperASRError(f"{job.source}: changed while it was copied; submit finished folders only")
            _check_manifest(job.source, copied)
            # take the name
            if os.path.lexists(final):
                final.rename(replaced)
            partial.rename(final)
        except BaseException:
            with contextlib.suppress(OSError):  # else the next copy or start does it
                if os.path.lexists(replaced) and not os.path.lexists(final):
                    replaced.rename(final)
                if partial.is_dir():
                    _delete(partial)
            raise
        finally:
            _live_tokens.discard(token)
        return n_bytes

    def _spend(self, n_bytes: int) -> None:
        """Wait until this many more bytes may pass; an idle time earns no burst."""
        self._progress_sec = now = self._clock()
        if self._due_sec > now:
            self._sleep(self._due_sec - now)
        self._due_sec = max(self._due_sec, now) + n_bytes / self._bytes_per_sec

    def _prepare_target(self) -> None:
        if is_on_unmounted_drive(self.target):
            raise WhisperASRError(
                f"{self.target}: Google Drive is not mounted; call mount_drive first, or mirror elsewhere"
            )
        marker = self.target / MARKER
        try:
            self.target.mkdir(parents=True, exist_ok=True)
            if marker.is_file() and b'"folders"' in marker.read_bytes():
                raise WhisperASRError(
                    f"{self.target}: its {MARKER} is of an earlier version; mirror to a new folder, or delete "
                    "that file: older copies then stay until you delete them, and block their names"
                )
            write_text_atomic(marker, '{"format": 2}')
        except OSError as err:
            raise WhisperASRError(f"{self.target}: cannot be written: {err}; free space, or mirror elsewhere") from err
        try:
            for folder in (self.target, *self.target.glob("[!.]*/")):
                self._recover(folder)
        except OSError as err:
            logger.warning("%s: remains of a crash stay for now: %s", self.target, err)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder below the target, but never the target."""
        for parent in reversed((folder, *folder.parents)):
            if parent != self.target and parent.is_relative_to(self.target):
                parent.mkdir(exist_ok=True)

    def _recover(self, folder: Path) -> None:
        """Finish in a folder of copies what a killed process, or a fault of the drive, left unfinished."""
        for path in sorted(folder.glob(".*")):
            match = _HIDDEN.fullmatch(path.name)
            if match is None or match["token"] in _live_tokens:
                continue
            final = folder / match["name"]
            if self._read_marker(path, final) is None:
                with contextlib.suppress(OSError):  # not empty: not ours
                    path.rmdir()
            elif match["kind"] == "partial":
                _delete(path)
            elif match["kind"] == "replaced" and not os.path.lexists(final):
                path.rename(final)
                logger.warning("%s was missing after a fault; its last good copy is restored", final)
            else:
                self._remove_copy(path, final)

    def _copies(self, folder: Path) -> list[tuple[Path, _Marker]]:
        visible = folder.glob("[!.]*/") if folder.is_dir() else ()
        return [(path, marker) for path in visible if (marker := self._read_marker(path)) is not None]

    def _read_marker(self, folder: Path, final: Path | None = None) -> _Marker | None:
        """Return the marker of a copy whose name is, or was, `final`; None if the folder is not the mirror's."""
        if not (folder / MARKER).is_file():  # a pipe would never end
            return None
        try:
            marker = _Marker.model_validate(load_json(folder / MARKER))
        except (FileNotFoundError, ValueError):
            return None
        return marker if marker.name == (final or folder).relative_to(self.target).as_posix() else None

    def _remove_copy(self, folder: Path, final: Path) -> None:
        """Delete the files that were copied; other content stays under a visible name, without the marker."""
        marker, token = self._read_marker(folder, final), secrets.token_hex(8)
        doomed = _hidden(final, token, "removed")
        folder.rename(doomed)  # no half of it is ever seen under its name
        expected, is_ours = {} if marker is None else marker.files, True
        for path in sorted(doomed.rglob("*"), reverse=True):  # a folder after its content
            status, name = path.lstat(), path.relative_to(doomed).as_posix()
            is_file, is_copied = stat.S_ISREG(status.st_mode), status.st_size in (0, expected.get(name))
            if stat.S_ISDIR(status.st_mode):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
            elif is_file and is_copied and name in expected:  # 0 bytes: a crash came before its end
                _unlink(path)
            elif name != MARKER:
                is_ours = False
        if is_ours:
            _delete(doomed)
            return
        kept = final.with_name(f"{final.name}.kept-{token}")
        doomed.rename(kept)
        (kept / MARKER).unlink()
        logger.warning("%s has what this mirror did not write; delete it yourself if you do not need it", kept)

    def _fail(self, job: _Job, reason: str) -> None:
        with self._changed:
            self._failed[job.series] = (job.name, reason)
        advice = "the last good copy stays; check that the drive is mounted and has space"
        logger.warning("mirror: %s has no copy in %s: %s; %s", job.name, self.target, reason, advice)


def copy_verified(source: Path, target: Path) -> int:
    """Copy a folder and return the number of bytes; each file is checked, and takes its name only when it is whole.

    Files that exist with equal content are left alone; nothing is deleted. Raises `WhisperASRError` if the source is
    absent, the target is full or gone, or a copy differs from its source.
    """
    if not source.is_dir():
        raise WhisperASRError(f"{source}: nothing to copy; train first")
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name not in (MARKER, LOCK))
    copied = 0
    for file in files:
        destination = target / file.relative_to(source)
        if destination.is_file() and sha256_of(destination) == sha256_of(file):
            continue
        partial = destination.with_name(destination.name + ".partial")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            copied += _copy_file(file, partial)[0]
            partial.replace(destination)
        except OSError as err:
            raise WhisperASRError(f"{destination}: cannot be written: {err}; free space, or mount Drive again") from err
        finally:
            with contextlib.suppress(OSError):  # the drive is gone
                partial.unlink()
    logger.info("copied %.1f MB of %s to %s", copied / 1e6, source, target)
    return copied


def _copy_file(
    file: Path, destination: Path, on_block: Callable[[int], None] = lambda n_bytes: None
) -> tuple[int, str]:
    """Copy one file's content, then read the copy back; return size and SHA-256. `on_block` may wait."""
    written, read, n_bytes = hashlib.sha256(), hashlib.sha256(), 0
    with file.open("rb") as reader, destination.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            on_block(len(block))
            _write_block(writer, block)
            written.update(block)
            n_bytes += len(block)
    fsync(destination, is_required=False)  # a full drive may say so only now
    with destination.open("rb") as copy:
        if hasattr(os, "posix_fadvise"):  # read from the drive rather than from memory
            with contextlib.suppress(OSError):
                os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := copy.read(_BLOCK_BYTES):
            on_block(len(block))
            read.update(block)
    if destination.stat().st_size != n_bytes or read.digest() != written.digest():
        raise WhisperASRError(f"{destination}: the copy differs from {file}; the target is not reliable, try again")
    return n_bytes, written.hexdigest()


def _write_block(writer: BinaryIO, block: bytes) -> None:
    writer.write(block)


def _list_files(source: Path) -> dict[str, tuple[int, int, int]]:
    """Return the size of each file, and what else changes when it is rewritten or replaced."""
    found = {}
    for path in (source, *sorted(source.rglob("*"))):
        status, name = path.lstat(), path.relative_to(source).as_posix()
        if stat.S_ISREG(status.st_mode) and name != MARKER:
            found[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
        elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise _RefusedError(f"{path}: a link or device; the mirror takes plain files only, put a copy there")
    if not found:
        raise _RefusedError(f"{source}: contains no files")
    return found


def _check_manifest(source: Path, copied: dict[str, tuple[int, str]]) -> None:
    """Refuse a checkpoint whose files, as read, are not those of its manifest: it must not replace a good copy."""
    try:
        listed = load_json(source / "manifest.json")["files"]
        expected = {str(file): (int(entry["size"]), str(entry["sha256"])) for file, entry in listed.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return  # none, or a manifest of another kind
    if wrong := sorted(file for file, proof in expected.items() if copied.get(file) != proof):
        raise _RefusedError(f"{source}: {wrong[0]} disagrees with manifest.json; it is damaged, save it again")


def _delete(folder: Path) -> None:
    """Delete a hidden folder; the marker is last, so that a crash meanwhile leaves the folder recognisable."""
    for path in folder.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode) and path != folder / MARKER:
            _unlink(path)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def _unlink(file: Path) -> None:
    if file.lstat().st_nlink == 1:
        os.truncate(file, 0)  # Drive's trash counts towards the quota (gpt-2-simple issue 155)
    file.unlink()


def _hidden(final: Path, token: str, kind: str) -> Path:
    return final.with_name(f".{final.name}.{token}.{kind}")
