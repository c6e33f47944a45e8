"""Background copies of finished folders elsewhere, for example on Google Drive, while training goes on.

target/.mirror.json               says that this is a mirror; it is missing while a drive is unmounted
target/<name>                     a whole, verified copy; its own .mirror.json lists what was written
target/.<name>.<token>.partial    being copied
target/.<name>.<token>.replaced   the last good copy, until the new one has taken its name
target/.<name>.<token>.removed    being deleted

Only folders whose own .mirror.json has their name are ever replaced or removed, and of these only listed files.
`utils.files` does the same for local disks with process ids, which mean nothing on the next Colab machine. One process
at a time may write a target.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ValidationError

from src.utils.colab import MIRROR_MARKER, copy_file_checked, is_on_unmounted_drive
from src.utils.errors import WhisperASRError

logger = logging.getLogger(__name__)

RETRY_WAITS_SEC = (1.0, 4.0, 16.0)
STALL_SEC = 300.0
_JOIN_SEC = 5.0
_SPARE_BYTES = 16 << 20  # what others write meanwhile
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16})\.(?P<kind>partial|replaced|removed)")
_live_tokens: set[str] = set()  # copies that this process is making: not remains of a crash


class _RefusedError(WhisperASRError):
    """Copying again cannot help."""


class _SourceGoneError(WhisperASRError):
    """The source was deleted before its copy was whole."""


class _StoppedError(WhisperASRError):
    """The mirror is closed; ends the current copy."""


class _Marker(BaseModel):
    """Content of .mirror.json in a copied folder."""

    name: str  # relative to the target: a folder that was renamed or copied by hand is not the mirror's
    group: str | None
    order: int
    files: dict[str, int]  # name to size in bytes


@dataclass(frozen=True)
class MirrorFailure:
    """A folder without a copy: its name below the target, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Job:
    source: Path
    name: str
    group: str | None
    keep: int | None

    def replaces(self, other: _Job) -> bool:
        return self.name == other.name or (self.group is not None and self.group == other.group)


class DriveMirror:
    """Copies folders into a target, one after another, on its own thread.

    The caller never waits and never sees an error of the drive: a folder that cannot be copied is a warning and an
    entry in `failures`, and the last good copy stays. Links are never made, and a source with one is refused.

    Args:
        target: made now if absent. If it vanishes later, it is not made again.
        max_mb_per_sec: limit for writing and reading back, 10^6 bytes per second.
        sleep: waits for seconds.
        clock: returns seconds; never goes back.

    Raises:
        WhisperASRError: if the target cannot be made or written, or is on a Google Drive that is not mounted.
    """

    def __init__(
        self,
        target: Path,
        *,
        max_mb_per_sec: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not max_mb_per_sec > 0:
            raise WhisperASRError(f"max_mb_per_sec is {max_mb_per_sec}; give a rate above 0")
        self.target = _absolute(target)
        self._bytes_per_sec, self._sleep, self._clock = max_mb_per_sec * 1e6, sleep, clock
        self._changed = threading.Condition()  # guards what follows; never held while a file is accessed
        self._queue: list[_Job] = []
        self._current: _Job | None = None
        self._failed: list[tuple[_Job, MirrorFailure]] = []
        self._closed = self._stall_reported = False
        self._due_sec = self._progress_sec = clock()
        self._prepare_target()
        self._thread = threading.Thread(target=self._run, name="drive-mirror", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> list[MirrorFailure]:
        """Folders without a copy; an entry leaves when its name, or a newer folder of its group, has been copied."""
        with self._changed:
            return [failure for _, failure in self._failed]

    def submit(
        self, source: Path, *, name: str | None = None, keep: int | None = None, group: str | None = None
    ) -> None:
        """Queue a finished folder and return at once.

        It replaces a waiting one of the same name or group. A folder that is deleted before its copy is whole is
        dropped.

        Args:
            source: must not change until its copy is done, see `is_busy`.
            name: relative path in the target; the folder's own name by default.
            keep: how many of the mirror's copies of its group stay, next to each other; None keeps all.
            group: folders that succeed each other.

        Raises:
            WhisperASRError: if the arguments are wrong.
        """
        job = _Job(_absolute(source), name or _absolute(source).name, group, keep)
        parts = PurePosixPath(job.name).parts
        if not parts or "\\" in job.name or any(part.startswith((".", "/")) for part in parts):
            raise WhisperASRError(f"{job.name!r}: not a relative path of visible names, as in 'run/checkpoint-1'")
        if keep is not None and (keep < 1 or group is None):
            raise WhisperASRError(f"keep={keep}, group={group!r}: keep at least 1 folder of a named group")
        if not job.source.is_dir():
            self._record(job, "no such folder; save it first")
            return
        with self._changed:
            is_closed = self._closed
            if not is_closed:
                self._queue = [other for other in self._queue if not job.replaces(other)] + [job]
                self._changed.notify_all()
        if is_closed:
            self._record(job, "the mirror is closed; make a new one")
            return
        self._warn_of_stall()

    def is_busy(self, source: Path) -> bool:
        """Whether a folder waits or is being copied, so that it must not be deleted."""
        source = _absolute(source)
        with self._changed:
            jobs = [*self._queue, self._current]
        return any(job is not None and job.source == source for job in jobs)

    def flush(self, timeout_sec: float | None = None) -> bool:
        """Wait until every submitted folder is copied or has failed; False, with a warning, if the time has passed.

        Without a time limit this waits even for a drive that hangs.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not self._queue and self._current is None, timeout_sec)
            names = [job.name for job in (self._current, *self._queue) if job is not None]
        if not done:
            logger.warning(
                "mirror: after %.0f s still without a copy in %s: %s; wait longer, or copy by hand",
                timeout_sec, self.target, ", ".join(names),
            )  # fmt: skip
        return done

    def close(self, timeout_sec: float | None = None) -> bool:
        """Flush, then stop the thread; what is not done by then fails. Returns what `flush` returns."""
        done = self.flush(timeout_sec)
        with self._changed:
            self._closed = True
            dropped, self._queue = self._queue, []
            self._changed.notify_all()
        for job in dropped:
            self._record(job, "the mirror was closed before its turn")
        self._thread.join(_JOIN_SEC if done else 0.0)  # a thread that hangs in a dead mount ends with the process
        return done

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._copy_with_retries(job)
            except _SourceGoneError as err:
                logger.info("mirror: %s", err)
            except Exception as err:  # noqa: BLE001  the thread's boundary
                self._record(job, _reason(err))
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._current = self._queue.pop(0) if self._queue and not self._closed else None
            self._progress_sec, self._stall_reported = self._clock(), False
            return self._current

    def _copy_with_retries(self, job: _Job) -> None:
        for wait_sec in (*RETRY_WAITS_SEC, None):
            try:
                n_bytes = self._copy(job)
                break
            except (_RefusedError, _SourceGoneError, _StoppedError):
                raise
            except (OSError, WhisperASRError) as err:
                if isinstance(err, OSError) and not job.source.is_dir():
                    raise _SourceGoneError(f"{job.source}: was deleted before its copy was whole") from err
                if wait_sec is None:
                    raise
                logger.info("mirror: %s: %s; next try in %.0f s", job.name, _reason(err), wait_sec)
                self._sleep(wait_sec)
                self._note_progress()
        logger.info("mirror: copied and checked %s (%.1f MB) in %s", job.name, n_bytes / 1e6, self.target)
        with self._changed:
            self._failed = [pair for pair in self._failed if not job.replaces(pair[0])]
        folder = (self.target / job.name).parent
        try:
            self._recover(folder)  # removes the copy that was replaced
            if job.keep is not None:
                self._prune(folder, job.group, job.keep)
        except OSError as err:
            logger.warning("mirror: older copies in %s stay for now: %s", self.target, _reason(err))

    def _copy(self, job: _Job) -> int:
        """Copy a folder; an older copy keeps the name until the new one is whole and checked."""
        self._check_target()
        final = self.target / job.name
        self._recover(final.parent)
        files = _list_files(job.source)
        if os.path.lexists(final) and self._read_marker(final) is None:
            raise _RefusedError(f"{final} exists and was not written by this mirror; move it away or mirror elsewhere")
        sizes = {file: status.st_size for file, status in files.items()}
        self._check_space(sum(sizes.values()))

        order = 1 + max((marker.order for _, marker in self._copies(final.parent)), default=0)
        token = secrets.token_hex(8)
        partial, replaced = _hidden(final, token, "partial"), _hidden(final, token, "replaced")
        _live_tokens.add(token)
        try:
            self._make_folder(partial)
            _write_marker(partial, _Marker(name=job.name, group=job.group, order=order, files=sizes))
            copied = {}
            for file in files:
                self._make_folder((partial / file).parent)
                copied[file] = copy_file_checked(job.source / file, partial / file, self._spend)
            if _stamps(_list_files(job.source)) != _stamps(files):
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
                    _remove_partial(partial)
            raise
        finally:
            _live_tokens.discard(token)
        return sum(sizes.values())

    def _spend(self, n_bytes: int) -> None:
        """Wait until this many more bytes may pass; an idle time earns no burst."""
        self._note_progress()
        now = self._clock()
        if self._due_sec > now:
            self._sleep(self._due_sec - now)
        self._due_sec = max(self._due_sec, now) + n_bytes / self._bytes_per_sec

    def _note_progress(self) -> None:
        if self._closed:
            raise _StoppedError("the mirror was closed before the copy was whole")
        self._progress_sec = self._clock()

    def _prepare_target(self) -> None:
        if is_on_unmounted_drive(self.target):
            raise WhisperASRError(
                f"{self.target}: Google Drive is not mounted; call mount_drive first, or mirror elsewhere"
            )
        try:
            self.target.mkdir(parents=True, exist_ok=True)
            root_marker = self.target / MIRROR_MARKER
            if root_marker.exists() and b'"folders"' in root_marker.read_bytes():
                raise WhisperASRError(
                    f"{self.target}: its {MIRROR_MARKER} is of an earlier version; mirror to a new folder, or delete "
                    "that file: older copies then stay until you delete them, and block their names"
                )
            root_marker.write_text('{"format": 2}', encoding="utf-8")
        except OSError as err:
            raise WhisperASRError(
                f"{self.target}: cannot take the mirror: {err.strerror or err}; free space, mount it, or mirror "
                "elsewhere"
            ) from err
        try:
            for folder in (self.target, *self.target.glob("[!.]*/")):
                self._recover(folder)
        except OSError as err:
            logger.warning("%s: remains of a crash stay for now: %s", self.target, _reason(err))

    def _check_target(self) -> None:
        if is_on_unmounted_drive(self.target) or not (self.target / MIRROR_MARKER).is_file():
            raise WhisperASRError(f"{self.target} is not there any more; mount the drive again (mount_drive in Colab)")

    def _check_space(self, n_bytes: int) -> None:
        usage = shutil.disk_usage(self.target)
        is_known = usage.total > 0 and 0 <= usage.free <= usage.total  # some mounts report zeros or nonsense
        if is_known and usage.free < n_bytes + _SPARE_BYTES:
            raise WhisperASRError(
                f"{self.target}: {(n_bytes + _SPARE_BYTES) / 1e6:.0f} MB needed, {usage.free / 1e6:.0f} MB free; "
                "free space there (also its trash), or lower checkpoints.save_total_limit"
            )

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
                _remove_partial(path)
            elif match["kind"] == "replaced" and not os.path.lexists(final):
                path.rename(final)
                logger.warning("%s was missing after a fault; its last good copy is restored", final)
            else:
                self._remove_copy(path, final)

    def _prune(self, folder: Path, group: str | None, keep: int) -> None:
        """Remove all but the newest copies of a group."""
        ours = sorted((marker.order, path) for path, marker in self._copies(folder) if marker.group == group)
        for _, path in ours[:-keep]:
            self._remove_copy(path, path)
            logger.debug("mirror: removed %s", path)

    def _copies(self, folder: Path) -> list[tuple[Path, _Marker]]:
        visible = folder.glob("[!.]*/") if folder.is_dir() else ()
        return [(path, marker) for path in visible if (marker := self._read_marker(path)) is not None]

    def _read_marker(self, folder: Path, final: Path | None = None) -> _Marker | None:
        """Return the marker of a copy whose name is, or was, `final`; None if the folder is not the mirror's."""
        try:
            marker = _Marker.model_validate_json((folder / MIRROR_MARKER).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None
        own_name = (final or folder).relative_to(self.target).as_posix()
        is_safe = all(".." not in PurePosixPath(file).parts and not file.startswith("/") for file in marker.files)
        return marker if marker.name == own_name and is_safe else None

    def _remove_copy(self, folder: Path, final: Path) -> None:
        """Delete the files that were copied, if they have their size; other content stays under a visible name."""
        marker, token = self._read_marker(folder, final), secrets.token_hex(8)
        doomed = _hidden(final, token, "removed")
        folder.rename(doomed)  # no half of it is ever seen under its name
        for file, size in marker.files.items() if marker else ():
            path = doomed / file
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_size in (0, size):
                    if status.st_nlink == 1:  # emptied: Drive's trash counts towards the quota (gpt-2-simple issue 155)
                        os.truncate(path, 0)
                    path.unlink()
            for parent in PurePosixPath(file).parents[:-1]:
                with contextlib.suppress(OSError):  # not empty
                    (doomed / parent).rmdir()
        if any(path.name != MIRROR_MARKER for path in doomed.iterdir()):
            kept = final.with_name(f"{final.name}.kept-{token}")
            doomed.rename(kept)
            (kept / MIRROR_MARKER).unlink()
            logger.warning("%s contains what this mirror did not write; delete it yourself if you do not need it", kept)
        else:
            shutil.rmtree(doomed)

    def _warn_of_stall(self) -> None:
        with self._changed:
            job, stalled_sec = self._current, self._clock() - self._progress_sec
            if job is None or self._stall_reported or stalled_sec < STALL_SEC:
                return
            self._stall_reported = True
        logger.warning(
            "mirror: the copy of %s to %s has stood still for %.0f s: the drive hangs; training goes on; "
            "mount the drive again", job.name, self.target, stalled_sec,
        )  # fmt: skip

    def _record(self, job: _Job, reason: str) -> None:
        with self._changed:
            others = [pair for pair in self._failed if pair[0].name != job.name]
            self._failed = [*others, (job, MirrorFailure(job.name, reason))]
        logger.warning(
            "mirror: %s has no copy in %s: %s; the last good copy stays, later folders are tried; check that the drive "
            "is mounted and has space", job.name, self.target, reason,
        )  # fmt: skip


def _list_files(source: Path) -> dict[str, os.stat_result]:
    if source.is_symlink():
        raise _RefusedError(f"{source}: a link; submit the folder that it leads to")
    found = {}
    for path in sorted(source.rglob("*")):
        status, name = path.lstat(), path.relative_to(source).as_posix()
        if stat.S_ISREG(status.st_mode) and name != MIRROR_MARKER:
            found[name] = status
        elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise _RefusedError(f"{path}: a link or device; the mirror takes plain files only, put a copy there")
    if not source.is_dir():
        raise _SourceGoneError(f"{source}: was deleted before its copy was whole")
    if not found:
        raise _RefusedError(f"{source}: contains no files")
    return found


def _stamps(files: dict[str, os.stat_result]) -> dict[str, tuple[int, int, int]]:
    """Return what changes when a file is rewritten or replaced."""
    return {file: (status.st_size, status.st_mtime_ns, status.st_ino) for file, status in files.items()}


def _check_manifest(source: Path, copied: dict[str, tuple[int, str]]) -> None:
    """Refuse a checkpoint whose files, as read, are not those of its manifest: it must not replace a good copy."""
    try:
        listed = json.loads((source / "manifest.json").read_bytes())["files"]
        expected = {str(file): (int(entry["size"]), str(entry["sha256"])) for file, entry in listed.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or a manifest of another kind
    wrong = sorted(file for file, proof in expected.items() if copied.get(file) != proof)
    if wrong:
        raise _RefusedError(f"{source}: {wrong[0]} disagrees with manifest.json; it is damaged, save it again")


def _write_marker(folder: Path, marker: _Marker) -> None:
    path, text = folder / MIRROR_MARKER, marker.model_dump_json()
    path.write_text(text, encoding="utf-8")
    if path.read_text(encoding="utf-8") != text:
        raise WhisperASRError(f"{path}: differs from what was written; the target is not reliable, try again")


def _remove_partial(partial: Path) -> None:
    """Delete an unfinished copy; the marker is last, so that a crash meanwhile leaves it recognisable."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MIRROR_MARKER):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    partial.rmdir()


def _hidden(final: Path, token: str, kind: str) -> Path:
    return final.with_name(f".{final.name}.{token}.{kind}")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  resolve() would access the disk


def _reason(err: Exception) -> str:
    if isinstance(err, OSError):
        return f"{err.strerror or err}" + (f" ({err.filename})" if err.filename else "")
    return str(err) if isinstance(err, WhisperASRError) else f"{type(err).__name__}: {err}"
