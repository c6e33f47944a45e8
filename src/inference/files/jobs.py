"""Transcription jobs that a kill does not undo: a row a recording in a JSONL file, written as soon as it is known.

One process appends to the output itself. Of several, each appends to a part beside it, and the main process joins the
parts at the end, in the order of the recordings. Whatever parts an earlier run left count, of however many processes.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout

from src.inference.files.transcription import Transcription
from src.utils.distributed import from_main, rank, wait_for_all, world_size
from src.utils.errors import DataError
from src.utils.files import atomic_file
from src.utils.json_store import read_json, write_json

logger = logging.getLogger(__name__)

SYNC_ROWS = 64  # a kill loses no row; a power cut at most so many


@dataclass(frozen=True)
class JobReport:
    """What a job's output holds of the recordings that were asked for.

    Attributes:
        recordings: how many.
        audio_sec: of those with a text.
        failed: (source, reason) of those without.
    """

    recordings: int
    audio_sec: float
    failed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Row:
    """Where a row stands, and what decides about it."""

    path: Path
    offset: int
    size: int
    source: str
    duration_sec: float
    error: str | None


def run_job(
    output: Path,
    sources: Sequence[str],
    transcribe: Callable[[list[str]], Iterable[Transcription]],
    *,
    settings: Mapping[str, Any],
    retry_errors: bool = False,
) -> JobReport:
    """Transcribe what a job lacks, together with the other processes of the launcher.

    Args:
        output: JSONL; its folder is made, and shared by all machines.
        sources: paths; in other processes than the main one they are not looked at.
        transcribe: gives a `Transcription` for each source that it gets, also for a bad one.
        settings: what the texts depend on, as JSON takes it.
        retry_errors: transcribe those again that failed.
    Returns: the same in every process.
    Raises: DataError: as `TranscriptionJob`; and what `transcribe` raises.
    """
    with ExitStack() as stack:
        jobs: list[TranscriptionJob] = []  # the main process's

        def begin() -> list[list[str]]:
            jobs.append(stack.enter_context(TranscriptionJob(output, settings)))
            return deal(jobs[0].pending(sources, retry_errors=retry_errors), world_size())

        mine = from_main(begin)[rank()]
        with RowWriter(part_path(output, rank()) if world_size() > 1 else output) as rows:
            for transcription in transcribe(mine):
                rows.append(transcription.to_json())
        wait_for_all()
        return from_main(lambda: jobs[0].finish(sources))


class TranscriptionJob:
    """A job, as its main process holds it: nobody else may have it at the same time.

    Args:
        output: JSONL.
        settings: kept in `<output>.job.json`; a job goes on with the same only.
    Raises: DataError: the folder cannot be written, another process has the job, other settings, or a damaged row.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self._output = output
        self._lock = FileLock(output.parent / f".{output.name}.lock", timeout=0)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as err:
            raise DataError(f"{output}: another process works on it; wait for it, or give another output") from err
        except (OSError, NotImplementedError) as err:
            raise DataError(f"{output}: cannot be written: {err}; choose another folder") from err
        try:
            self._rows = _read_rows([output, *_parts(output)])
            _check_settings(output, settings, begun=bool(self._rows))
        except DataError:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def pending(self, sources: Sequence[str], *, retry_errors: bool = False) -> list[str]:
        """Return the sources that have no row yet, each once, in order; with `retry_errors` those that failed too."""
        held = {source for source, row in self._rows.items() if row.error is None or not retry_errors}
        pending = [source for source in dict.fromkeys(sources) if source not in held]
        if held:
            logger.info("%s holds %d recordings; %d are left", self._output, len(held), len(pending))
        return pending

    def finish(self, sources: Sequence[str]) -> JobReport:
        """Join all parts into the output, in the order of the sources, and remove them.

        Rows of other sources stay, behind them.

        Raises: DataError: a source has no row, or the output cannot be written.
        """
        self._rows = _read_rows([self._output, *_parts(self._output)])
        asked = list(dict.fromkeys(sources))
        missing = [source for source in asked if source not in self._rows]
        if missing:
            raise DataError(
                f"{self._output}: {len(missing)} of {len(asked)} recordings have no row, the first is {missing[0]}; "
                "start the job again, on several machines with the output in a folder that they share"
            )
        _join(self._output, [self._rows[source] for source in dict.fromkeys([*asked, *self._rows])])
        rows = [self._rows[source] for source in asked]
        return JobReport(
            len(rows),
            sum(row.duration_sec for row in rows),
            tuple((row.source, row.error) for row in rows if row.error is not None),
        )


class RowWriter:
    """Appends rows to a JSONL file; a last line that a kill has cut off is removed first.

    Raises: DataError: the file cannot be written, or a row in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._unsynced = path, 0
        whole = max((row.offset + row.size for row in _scan(path)), default=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(whole)
        except OSError as err:
            raise DataError(f"{path}: cannot be written: {err.strerror}; choose another folder") from err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            self._sync()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, out of this process at once.

        Raises: DataError: the disk is full, or gone.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode("utf-8", "backslashreplace"))  # names that are not UTF-8: as JSON escapes them
            self._file.flush()
            self._unsynced += 1
            if self._unsynced >= SYNC_ROWS:
                self._sync()
        except OSError as err:
            raise DataError(f"{self._path}: cannot be written: {err.strerror}; make room, and start again") from err

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0


def part_path(output: Path, rank: int) -> Path:
    """Return where a process of several appends its rows."""
    return output.with_name(f"{output.name}.part-{rank:05d}")


def deal(sources: Sequence[str], shares: int) -> list[list[str]]:
    """Deal recordings out so that all shares take about as long: the largest first, each to whom has the least.

    Sizes are of files. A second of speech has ten times the bytes in one format than in another: each format is dealt
    out for itself.
    """
    held: dict[str, list[int]] = defaultdict(lambda: [0] * shares)  # bytes by format
    counts, share_of = Counter[int](), {}
    for size, source in sorted(((_bytes(source), source) for source in sources), reverse=True):
        loads = held[Path(source).suffix.lower()]
        share = min(range(shares), key=lambda i: (loads[i], counts[i]))
        loads[share] += size
        counts[share] += 1
        share_of[source] = share
    dealt: list[list[str]] = [[] for _ in range(shares)]
    for source in sources:
        dealt[share_of[source]].append(source)
    return dealt


def _bytes(source: str) -> int:
    try:
        return Path(source).stat().st_size
    except (OSError, ValueError):  # the engine will say what is wrong with it
        return 0


def _parts(output: Path) -> list[Path]:
    found = output.parent.glob(f"{glob.escape(output.name)}.part-*")
    return sorted(path for path in found if re.fullmatch(r"\.part-\d{5,}", path.suffix))


def _check_settings(output: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    """Keep the settings of a new job; refuse others than an old one has."""
    path = output.with_name(f"{output.name}.job.json")
    if not begun:
        write_json(path, settings)
        return
    if not path.exists():
        raise DataError(f"{output}: holds rows, but no {path.name} says how they were made; give another output")
    fix = f"remove it together with {output.name}, or give another output"
    before = read_json(path, dict, what="the settings of a job", fix=fix)
    now = json.loads(json.dumps(settings))
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        differences = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in other)
        raise DataError(f"{output}: begun with {differences}; go on with the same, or give another output")


def _read_rows(paths: Iterable[Path]) -> dict[str, _Row]:
    """Return the row of each source: the newest, but never an error where there is a text."""
    rows: dict[str, _Row] = {}
    for row in (row for path in paths for row in _scan(path)):
        if row.error is None or row.source not in rows or rows[row.source].error is not None:
            rows[row.source] = row
    return rows


def _scan(path: Path) -> Iterator[_Row]:
    """Yield the rows of a file, if it is there; a broken last line is none.

    Raises: DataError: the file cannot be read, or a line before the last is broken.
    """
    offset, broken = 0, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if broken:
                    raise DataError(f"{path}, line {broken}: not a row of a transcription job; remove the line")
                row = _parse(line, path, offset)
                offset += len(line)
                if row is None:
                    broken = number
                else:
                    yield row
    except FileNotFoundError:
        return
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}; give another output") from err


def _parse(line: bytes, path: Path, offset: int) -> _Row | None:
    try:
        fields = json.loads(line)
        source, error = fields["source"], fields["error"]
        duration_sec = 0.0 if error is not None else float(fields["duration_sec"])
    except (ValueError, TypeError, KeyError):
        return None
    return _Row(path, offset, len(line), source, duration_sec, error) if line.endswith(b"\n") else None


def _join(output: Path, rows: Sequence[_Row]) -> None:
    """Write rows, in order, as the output's content, and remove the parts: their rows are in it."""
    parts = _parts(output)
    ends = [0, *(row.offset + row.size for row in rows)]
    in_place = all(row.path == output and row.offset == end for row, end in zip(rows, ends, strict=False))
    try:
        if not in_place or output.stat().st_size != ends[-1]:
            with ExitStack() as stack:
                files = {path: stack.enter_context(path.open("rb")) for path in {row.path for row in rows}}
                joined = stack.enter_context(atomic_file(output, durable=True))
                for row in rows:
                    joined.write(_bytes_of(row, files[row.path]))
        for part in parts:
            part.unlink()
    except OSError as err:
        raise DataError(f"{output}: cannot be written: {err.strerror}; make room, and start again") from err


def _bytes_of(row: _Row, file: BinaryIO) -> bytes:
    file.seek(row.offset)
    return file.read(row.size)
