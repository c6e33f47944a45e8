"""Transcription jobs that survive a kill: one row per recording in a JSONL file, written as soon as it is known.

One process appends to the output itself. Of several, each appends to its own part next to it, and the main process
joins the parts at the end, in the order of the recordings. Parts of an earlier run count, whatever its number of
processes.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.utils.errors import DataError
from src.utils.files import atomic_file, claim, json_line, parse_json, read_json, write_json
from src.utils.runtime import from_main, rank, wait_for_all, world_size

if TYPE_CHECKING:
    from src.inference.files.transcribe import Transcription

logger = logging.getLogger(__name__)

SYNC_ROWS = 64  # a kill loses no row, a power cut at most this many


@dataclass(frozen=True)
class JobReport:
    """Contents of a job's output, for the recordings that were asked for."""

    recordings: int
    audio_sec: float  # of those with a text
    failed: tuple[tuple[str, str], ...]  # (source, reason) of those without
    truncated: tuple[str, ...] = ()  # sources whose text ended at a limit of tokens
    uncovered: tuple[str, ...] = ()  # sources whose text leaves speech out


def run_job(
    output: Path,
    sources: Sequence[str],
    transcribe: Callable[[list[str]], Iterable[Transcription]],
    *,
    settings: Mapping[str, Any],
    retry_errors: bool = False,
) -> JobReport:
    """Transcribe the recordings without a row, together with the other processes of the launcher.

    Only the main process reads `sources`; the folder of `output`, JSONL, is shared by all machines. `transcribe` gives
    a `Transcription` for each source that it gets, also for a bad one. `settings`, what the texts depend on as JSON
    takes it, are kept in `<output>.job.json`: other ones are refused. Each process returns the same report.
    """
    sources = list(dict.fromkeys(sources))
    with ExitStack() as stack:

        def begin() -> list[list[str]]:
            lock, fix = output.parent / f".{output.name}.lock", "give another output"
            stack.callback(claim(lock, stack, what=output, error=DataError, fix=fix, shared=False))
            rows = _read_rows(output)

            # the settings of a new job are kept, and others refused
            path = output.with_name(f"{output.name}.job.json")
            if not rows:
                write_json(path, settings)
            fix = f"remove it together with {output.name}, or give another output"
            before, now = read_json(path, dict, what="the settings of a job", fix=fix), json.loads(json.dumps(settings))
            other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if other:
                differences = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in other)
                raise DataError(f"{output}: begun with {differences}; go on with the same, or give another output")

            held = {s for s, row in rows.items() if row.is_current and (row.error is None or not retry_errors)}
            replaced = sum(source in rows and not rows[source].is_current for source in sources)
            if replaced:
                logger.warning("%s: %d recording(s) changed since their row was written; read again", output, replaced)
            pending = [source for source in sources if source not in held]
            if held:
                logger.info("%s holds %d recordings; %d are left", output, len(held), len(pending))
            return deal(pending, world_size())

        mine = from_main(begin)[rank()]
        stamps = {source: _stamp(source) for source in mine}  # of what is about to be read
        found = ({**each.to_json(), **stamps.get(each.source, {})} for each in transcribe(mine))
        append_rows(part_path(output, rank()) if world_size() > 1 else output, found)
        wait_for_all()
        return from_main(lambda: _finish(output, sources))


def _stamp(source: str) -> dict[str, int | None]:
    """Return the size and time of a recording's file, by which a replaced one is recognised."""
    try:
        found = Path(source).stat()
        return {"size_bytes": found.st_size, "modified_ns": found.st_mtime_ns}
    except (OSError, ValueError):  # decoding will report it
        return {"size_bytes": None, "modified_ns": None}


@contextmanager
def _files_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as err:
        raise DataError(f"{path}: cannot be read or written: {err}; make room, or give another output") from err


def deal(sources: Sequence[str], shares: int) -> list[list[str]]:
    """Deal recordings out so that all shares take about as long: the largest first, each to the smallest share.

    Sizes are of files. A second of speech has ten times the bytes in one format than in another, so each format is
    dealt out by itself.
    """
    sizes = {source: _stamp(source)["size_bytes"] or 0 for source in sources}
    held: dict[str, list[int]] = defaultdict(lambda: [0] * shares)  # bytes by format
    dealt: list[set[str]] = [set() for _ in range(shares)]
    for source in sorted(sources, key=lambda source: (sizes[source], source), reverse=True):
        loads = held[Path(source).suffix.lower()]
        share = min(range(shares), key=lambda i: (loads[i], len(dealt[i])))
        loads[share] += sizes[source]
        dealt[share].add(source)
    return [[source for source in sources if source in each] for each in dealt]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each out of this process at once; a last line that a kill has cut off is removed first."""
    whole = max((row.offset + row.size for row in _scan(path)), default=0)
    with _files_of(path):
        file = path.open("ab")
        file.truncate(whole)
    try:
        for number, row in enumerate(rows, start=1):
            with _files_of(path):
                file.write(json_line(row))
                file.flush()
                if number % SYNC_ROWS == 0:
                    os.fsync(file.fileno())
    finally:
        with _files_of(path), file:
            os.fsync(file.fileno())


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
    truncated: bool
    uncovered: bool
    stamp: Mapping[str, int | None]  # empty in rows of older versions

    @cached_property
    def is_current(self) -> bool:
        """Whether the recording is still the one that was read; also where it is no longer there."""
        now = _stamp(self.source)
        return not self.stamp or now["size_bytes"] is None or now == self.stamp


def _read_rows(output: Path) -> dict[str, _Row]:
    """Return the row of each source, parts included.

    It is the newest, but never one of an older recording or an error where there is one of today's, or a text.
    """
    rows: dict[str, _Row] = {}
    for row in itertools.chain.from_iterable(map(_scan, [output, *_parts(output)])):
        before = rows.get(row.source, row)
        if (row.is_current, row.error is None) >= (before.is_current, before.error is None):
            rows[row.source] = row
    return rows


def _scan(path: Path) -> Iterator[_Row]:
    """Yield the rows of a file, if it exists; a damaged last line is none, one before it an error."""
    offset, damaged = 0, 0
    if not path.is_file():
        return
    with _files_of(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if damaged:
                raise DataError(f"{path}, line {damaged}: not a row of a transcription job; remove the line")
            try:
                fields = parse_json(line) if line.endswith(b"\n") else {}
                source, error = fields["source"], fields["error"]
                truncated, uncovered = bool(fields.get("truncated")), bool(fields.get("uncovered"))
                duration_sec = float(fields["duration_sec"] or 0)
                stamp = {key: fields[key] for key in ("size_bytes", "modified_ns") if key in fields}
                yield _Row(path, offset, len(line), source, duration_sec, error, truncated, uncovered, stamp)
            except (ValueError, TypeError, KeyError):
                damaged = number
            offset += len(line)


def _finish(output: Path, sources: Sequence[str]) -> JobReport:
    """Join all parts into the output, in the order of the sources; rows of other sources stay, after them."""
    rows = _read_rows(output)
    missing = [source for source in sources if source not in rows]
    if missing:
        raise DataError(
            f"{output}: {len(missing)} of {len(sources)} recordings have no row, the first is {missing[0]}; "
            "start the job again, on several machines with the output in a folder that they share"
        )
    ordered = [rows[source] for source in dict.fromkeys([*sources, *rows])]
    ends = [0, *(row.offset + row.size for row in ordered)]
    in_place = all(row.path == output and row.offset == end for row, end in zip(ordered, ends, strict=False))
    with _files_of(output), ExitStack() as stack:
        if not in_place or output.stat().st_size != ends[-1]:
            files = {path: stack.enter_context(path.open("rb")) for path in {row.path for row in ordered}}
            with atomic_file(output, durable=True) as joined:
                for row in ordered:
                    files[row.path].seek(row.offset)
                    joined.write(files[row.path].read(row.size))
        for part in _parts(output):  # their rows are in it
            part.unlink()
    asked = [rows[source] for source in sources]
    failed = tuple((row.source, row.error) for row in asked if row.error is not None)
    truncated = tuple(row.source for row in asked if row.truncated)
    uncovered = tuple(row.source for row in asked if row.uncovered)
    return JobReport(len(asked), sum(row.duration_sec for row in asked), failed, truncated, uncovered)
