"""A copy of finished folders elsewhere, for example on Google Drive, made in the background while training goes on.

The caller is never made to wait and never meets an error of the drive: a folder that cannot be copied is a warning and
an entry in `failures`, and the last good copy stays. What may be lost in return is the newest folder. Links are never
made, and a source that holds one is refused.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from src.utils.colab import Pace
from src.utils.errors import WhisperASRError
from src.utils.mirror_store import MirrorStore, RefusedError, SourceGoneError, check_name

logger = logging.getLogger(__name__)

RETRY_WAITS_SEC = (1.0, 4.0, 16.0)
STALL_SEC = 300.0
_JOIN_SEC = 5.0
_ADVICE = "the last good copy stays, later folders are tried; check that the drive is mounted and has space"


@dataclass(frozen=True)
class MirrorFailure:
    """A folder that has no copy.

    Attributes:
        name: below the target.
        reason: for people.
    """

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


class _StoppedError(Exception):
    """The mirror is closed; ends the copy that is going on."""


class DriveMirror:
    """Copies folders into a target, one after another, on a thread of its own.

    Args:
        target: made now if absent; when it vanishes later it is a fault, and is not made again.
        max_mb_per_sec: millions of bytes a second that writing and reading back take at most.
        keep: by group, how many folders stay in the target, for submissions that do not say it.
        sleep: takes seconds.
        clock: gives seconds; never goes back.
    Raises: WhisperASRError: the target cannot be made or written now, or is on a Google Drive that is not mounted.
    """

    def __init__(
        self,
        target: Path,
        *,
        max_mb_per_sec: float,
        keep: Mapping[str, int] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not max_mb_per_sec > 0:
            raise WhisperASRError(f"max_mb_per_sec is {max_mb_per_sec}; give a rate above 0")
        self.target = _absolute(target)
        self._keep, self._sleep, self._clock = dict(keep or {}), sleep, clock
        self._changed = threading.Condition()  # guards what follows; never held while a file is touched
        self._queue: list[_Job] = []
        self._current: _Job | None = None
        self._failed: list[tuple[_Job, MirrorFailure]] = []
        self._closed = self._stall_told = False
        self._progress_sec = clock()
        pace = Pace(max_mb_per_sec * 1e6, sleep=sleep, clock=clock, on_block=self._note_progress)
        self._store = MirrorStore(self.target, pace)
        self._thread = threading.Thread(target=self._run, name="drive-mirror", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> list[MirrorFailure]:
        """Folders without a copy; one leaves when its name, or a newer folder of its group, has been copied."""
        with self._changed:
            return [failure for _, failure in self._failed]

    def submit(
        self, source: Path, *, name: str | None = None, keep: int | None = None, group: str | None = None
    ) -> None:
        """Queue a finished folder and return at once.

        It takes the place of one that still waits under the same name or in the same group. A folder that is deleted
        before its copy is whole is dropped.

        Args:
            source: not changed until its copy is done, see `is_busy`.
            name: relative path in the target; None: the folder's own name.
            keep: of its group, how many of the mirror's copies stay; None: all, or as the mirror was told.
            group: folders that follow one another.
        Raises: WhisperASRError: the arguments are wrong.
        """
        job = _Job(_absolute(source), name or _absolute(source).name, group, self._keep_of(group, keep))
        try:
            check_name(job.name)
        except ValueError as err:
            raise WhisperASRError(str(err)) from err
        if not job.source.is_dir():
            self._record(job, "no such folder; submit it after it is saved")
            return
        with self._changed:
            is_closed = self._closed
            waiting = [other for other in self._queue if job.replaces(other)]
            if not is_closed:
                self._queue = [other for other in self._queue if other not in waiting] + [job]
                self._changed.notify_all()
        if is_closed:
            self._record(job, "the mirror is closed; make a new one")
            return
        for other in waiting:
            logger.debug("mirror: %s is not copied, %s is newer", other.name, job.name)
        self._warn_of_stall()

    def is_busy(self, source: Path) -> bool:
        """Whether a folder waits or is being copied, so that it must not be deleted."""
        source = _absolute(source)
        with self._changed:
            jobs = [*self._queue, self._current]
        return any(job is not None and job.source == source for job in jobs)

    def flush(self, timeout_sec: float | None = None) -> bool:
        """Wait until every submitted folder is copied or has failed; see `failures`.

        Args: timeout_sec: None waits for ever, also for a drive that hangs.
        Returns: False, with a warning, when the time has passed.
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
        """Flush, then stop the thread; what is not done by then fails.

        Returns: as of `flush`.
        """
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
        try:
            while (job := self._next()) is not None:
                try:
                    self._copy(job)
                except Exception as err:  # noqa: BLE001  the thread's boundary
                    self._record(job, _reason(err))
                finally:
                    with self._changed:
                        self._current = None
                        self._changed.notify_all()
        finally:
            self._store.close()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._current = self._queue.pop(0) if self._queue and not self._closed else None
            self._progress_sec, self._stall_told = self._clock(), False
            return self._current

    def _copy(self, job: _Job) -> None:
        try:
            n_bytes = self._put_with_retries(job)
        except SourceGoneError as err:
            logger.info("mirror: %s", err)
            return
        logger.info("mirror: copied and checked %s (%.1f MB) in %s", job.name, n_bytes / 1e6, self.target)
        with self._changed:
            self._failed = [pair for pair in self._failed if not job.replaces(pair[0])]
        if job.group is None or job.keep is None:
            return
        try:
            for name in self._store.prune(job.group, job.keep):
                logger.debug("mirror: removed %s from %s", name, self.target)
        except (OSError, WhisperASRError) as err:
            logger.warning("mirror: older copies in %s stay for now: %s", self.target, _reason(err))

    def _put_with_retries(self, job: _Job) -> int:
        for wait_sec in RETRY_WAITS_SEC:
            try:
                return self._store.put(job.source, job.name, group=job.group)
            except (RefusedError, SourceGoneError):
                raise
            except (OSError, WhisperASRError) as err:
                logger.info("mirror: %s: %s; next try in %.0f s", job.name, _reason(err), wait_sec)
            self._sleep(wait_sec)
            self._note_progress()
        return self._store.put(job.source, job.name, group=job.group)

    def _note_progress(self) -> None:
        if self._closed:
            raise _StoppedError("the mirror was closed before the copy was whole")
        self._progress_sec = self._clock()

    def _warn_of_stall(self) -> None:
        with self._changed:
            job, stalled_sec = self._current, self._clock() - self._progress_sec
            if job is None or self._stall_told or stalled_sec < STALL_SEC:
                return
            self._stall_told = True
        logger.warning(
            "mirror: the copy of %s to %s has stood still for %.0f s: the drive hangs; training goes on; "
            "mount the drive again", job.name, self.target, stalled_sec,
        )  # fmt: skip

    def _record(self, job: _Job, reason: str) -> None:
        with self._changed:
            others = [pair for pair in self._failed if pair[0].name != job.name]
            self._failed = [*others, (job, MirrorFailure(job.name, reason))]
        logger.warning("mirror: %s has no copy in %s: %s; %s", job.name, self.target, reason, _ADVICE)

    def _keep_of(self, group: str | None, keep: int | None) -> int | None:
        if keep is not None and (keep < 1 or group is None):
            raise WhisperASRError(f"keep={keep}, group={group!r}: keep at least 1 folder of a named group")
        return keep if keep is not None or group is None else self._keep.get(group)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  resolve() would ask the disk


def _reason(err: Exception) -> str:
    if isinstance(err, OSError):
        return f"{err.strerror or err}" + (f" ({err.filename})" if err.filename else "")
    return str(err) if isinstance(err, WhisperASRError | _StoppedError) else f"{type(err).__name__}: {err}"
