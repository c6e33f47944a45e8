"""Transcription jobs that survive a kill: one row per recording in a JSONL file, written as soon as it is known.

One process appends to the output itself. Of several, each appends to its own part next to it, and the main process
joins the parts at the end, in the order of the recordings. Parts of an earlier run count, whatever its number of
processes.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from src.utils.errors import DataError
from src.utils.files import atomic_file, read_json, write_json
from src.utils.runtime import from_main, rank, wait_for_all, world_size

if TYPE_CHECKING:
    from src.inference.files.transcribe import Transcription

logger = logging.getLogger(__name__)

SYNC_ROWS = 64  # a kill loses no row, a power cut at most this many


@dataclass(frozen=True)
class JobReport:
    """Contents of a job's output, for the recordings that were asked for.

    Attributes:
        recordings: how many.
        audio_sec: of those with a text.
        failed: (source, reason) of those without.
    """

    recordings: int
    audio_sec: float
    failed: tuple[tuple[str, str], ...]


def run_job(
    output: Path,
    sources: Sequence[str],
    transcribe: Callable[[list[str]], Iterable[Transcription]],
    *,
    settings: Mapping[str, Any],
    retry_errors: bool = False,
) -> JobReport:
    """Transcribe the recordings without a row, together with the other processes of the launcher.

    Args:
        output: JSONL; its folder is made, and shared by all machines.
        sources: paths; only the main process reads them.
        transcribe: gives a `Transcription` for each source that it gets, also for a bad one.
        settings: what the texts depend on, as JSON takes it; kept in `<output>.job.json`.
        retry_errors: transcribe failed recordings again.

    Returns:
        The same report in every process.

    Raises:
        DataError: the folder cannot be written, another process has the job, the settings differ from those of its
            rows, or a row is damaged or missing.
    """
    with ExitStack() as stack:

        def begin() -> list[list[str]]:
            stack.enter_context(_locked(output))
            rows = _read_rows([output, *_parts(output)])
            _check_settings(output, settings, begun=bool(rows))
            held = {source for source, row in rows.items() if row.error is None or not retry_errors}
            pending = [source for source in dict.fromkeys(sources) if source not in held]
            if held:
                logger.info("%s holds %d recordings; %d are left", output, len(held), len(pending))
            return deal(pending, world_size())

        mine = from_main(begin)[rank()]
        with RowWriter(part_path(output, rank()) if world_size() > 1 else output) as rows:
            for transcription in transcribe(mine):
                rows.append(transcription.to_json())
        wait_for_all()
        return from_main(lambda: _finish(output, list(dict.fromkeys(sources))))


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other processes from the same job."""
    lock = FileLock(output.parent / f".{output.name}.lock", timeout=0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as err:
        raise DataError(f"{output}: another process works on it; wait for it, or give another output") from err
    except (OSError, NotImplementedError) as err:
        raise DataError(f"{output}: cannot be written: {err}; choose another folder") from err
    try:
        yield
    finally:
        lock.release()


def _check_settings(output: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    """Keep the settings of a new job; refuse to go on with others."""
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


def deal(sources: Sequence[str], shares: int) -> list[list[str]]:
    """Deal recordings out so that all shares take about as long: the largest first, each to the smallest share.

    Sizes are of files. A second of speech has ten times the bytes in one format than in another, so each format is
    dealt out by itself.
    """
    held: dict[str, list[int]] = defaultdict(lambda: [0] * shares)  # bytes by format
    counts, share_of = Counter[int](), {}
    for size, source in sorted(((_bytes(source), source) for source in sources), reverse=True):
        loads = held[Path(source).suffix.lower()]
        share = min(range(shares), key=lambda i: (loads[i], counts[i]))
        loads[share] += size
        counts[share] += 1
        share_of[source] = share
    return [[source for source in sources if share_of[source] == share] for share in range(shares)]


def _bytes(source: str) -> int:
    try:
        return Path(source).stat().st_size
    except (OSError, ValueError):  # decoding will report it
        return 0


class RowWriter:
    """Appends rows to a JSONL file; a last line that a kill has cut off is removed first.

    Raises:
        DataError: the file cannot be written, or a row in it is damaged.
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

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._sync()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, out of this process at once.

        Raises:
            DataError: the disk is full, or gone.
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
    """Return the file to which one of several processes appends its rows."""
    return output.with_name(f"{output.name}.part-{rank:05d}")


def _parts(output: Path) -> list[Path]:
    found = output.parent.glob(f"{glob.escape(output.name)}.part-*")
    return sorted(path for path in found if re.fullmatch(r"\.part-\d{5,}", path.suffix))


@dataclass(frozen=True)
class _Row:
    """The place of a row, and its fields that decide about it."""

    path: Path
    offset: int
    size: int
    source: str
    duration_sec: float
    error: str | None


def _read_rows(paths: Iterable[Path]) -> dict[str, _Row]:
    """Return the row of each source: the newest, but never an error where there is a text."""
    rows: dict[str, _Row] = {}
    for row in (row for path in paths for row in _scan(path)):
        if row.error is None or row.source not in rows or rows[row.source].error is not None:
            rows[row.source] = row
    return rows


def _scan(path: Path) -> Iterator[_Row]:
    """Yield the rows of a file, if it exists; a damaged last line is none.

    Raises:
        DataError: the file cannot be read, or a line before the last is damaged.
    """
    offset, damaged = 0, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if damaged:
                    raise DataError(f"{path}, line {damaged}: not a row of a transcription job; remove the line")
                try:
                    fields = json.loads(line)
                    source, error = fields["source"], fields["error"]
                    duration_sec = 0.0 if error is not None else float(fields["duration_sec"])
                    whole = line.endswith(b"\n")
                except (ValueError, TypeError, KeyError):
                    whole = False
                if whole:
                    yield _Row(path, offset, len(line), source, duration_sec, error)
                else:
                    damaged = number
                offset += len(line)
    except FileNotFoundError:
        return
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}; give another output") from err


def _finish(output: Path, sources: Sequence[str]) -> JobReport:
    """Join all parts into the output, in the order of the sources; rows of other sources stay, after them."""
    rows = _read_rows([output, *_parts(output)])
    missing = [source for source in sources if source not in rows]
    if missing:
        raise DataError(
            f"{output}: {len(missing)} of {len(sources)} recordings have no row, the first is {missing[0]}; "
            "start the job again, on several machines with the output in a folder that they share"
        )
    ordered = [rows[source] for source in dict.fromkeys([*sources, *rows])]
    ends = [0, *(row.offset + row.size for row in ordered)]
    in_place = all(row.path == output and row.offset == end for row, end in zip(ordered, ends, strict=False))
    try:
        if not in_place or output.stat().st_size != ends[-1]:
            with ExitStack() as stack:
                files = {path: stack.enter_context(path.open("rb")) for path in {row.path for row in ordered}}
                joined = stack.enter_context(atomic_file(output, durable=True))
                for row in ordered:
                    files[row.path].seek(row.offset)
                    joined.write(files[row.path].read(row.size))
        for part in _parts(output):  # their rows are in it
            part.unlink()
    except OSError as err:
        raise DataError(f"{output}: cannot be written: {err.strerror}; make room, and start again") from err
    asked = [rows[source] for source in sources]
    return JobReport(
        len(asked),
        sum(row.duration_sec for row in asked),
        tuple((row.source, row.error) for row in asked if row.error is not None),
    )
