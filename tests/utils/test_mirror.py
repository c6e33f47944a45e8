"""The background mirror on real folders: faults of the drive, crashes at any step, and what is never deleted."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from src.utils import colab
from src.utils.colab import MIRROR_MARKER
from src.utils.errors import WhisperASRError
from src.utils.mirror import STALL_SEC, DriveMirror, _Job

LONG_SEC = 20.0  # a limit that no good run comes near
Make = Callable[..., DriveMirror]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_sec = 0.0
        self.slept_sec: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_sec.append(seconds)
        self.now_sec += seconds

    def clock(self) -> float:
        return self.now_sec


class Drive:
    """Faults of the next blocks; without one, a block is written."""

    def __init__(self) -> None:
        self.faults: list[Callable[[BinaryIO, bytes], None]] = []
        self.n_blocks = 0

    def write(self, writer: BinaryIO, block: bytes) -> None:
        self.n_blocks += 1
        fault = self.faults.pop(0) if self.faults else None
        fault(writer, block) if fault else writer.write(block)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    drive = Drive()
    monkeypatch.setattr(colab, "_write_block", drive.write)
    return drive


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "drive" / "whisper_asr"


@pytest.fixture
def make(time: Time, target: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Make]:
    caplog.set_level(logging.DEBUG, logger="src.utils")
    made: list[DriveMirror] = []

    def make(max_mb_per_sec: float = 1e6, **options: object) -> DriveMirror:
        options = {"sleep": time.sleep, "clock": time.clock, **options}
        made.append(DriveMirror(target, max_mb_per_sec=max_mb_per_sec, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for mirror in made:
        assert mirror.close(LONG_SEC)
        assert not mirror._thread.is_alive()


def save(folder: Path, content: str, *, n_bytes: int = 3000) -> Path:
    """Save a folder as a checkpoint store does: two files, one in a subfolder."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "model").write_bytes((content * n_bytes).encode()[:n_bytes])
    (folder / "sub" / "config").write_text(content)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MIRROR_MARKER)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names(target: Path) -> list[str]:
    """All names in a folder, hidden ones too, without the marker."""
    return sorted(path.name for path in target.iterdir() if path.name != MIRROR_MARKER)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def full(writer: BinaryIO, block: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(writer: BinaryIO, block: bytes) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def cut(writer: BinaryIO, block: bytes) -> None:
    writer.write(block[:-1])


def flipped(writer: BinaryIO, block: bytes) -> None:
    writer.write(bytes([block[0] ^ 1]) + block[1:])


def test_a_folder_arrives_whole_and_nothing_is_linked(
    make: Make, tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(tmp_path / "checkpoint-1", "a", n_bytes=3_000_000)
    mirror = make()
    mirror.submit(source, name="run/checkpoint-1")
    assert mirror.flush(LONG_SEC)
    copy = target / "run" / "checkpoint-1"
    assert content_of(copy) == content_of(source)
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in copy.rglob("*") if path.is_file())
    assert names(target) == ["run"]
    assert names(target / "run") == ["checkpoint-1"]
    assert mirror.failures == []
    assert not warnings(caplog)


def test_a_fault_that_passes_is_tried_again_with_growing_waits(
    make: Make, tmp_path: Path, target: Path, drive: Drive, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    drive.faults = [broken, broken]
    mirror = make()
    mirror.submit(save(tmp_path / "best", "a"))
    assert mirror.flush(LONG_SEC)
    assert [seconds for seconds in time.slept_sec if seconds >= 1] == [1.0, 4.0]
    assert content_of(target / "best") == content_of(tmp_path / "best")
    assert not warnings(caplog)


@pytest.mark.parametrize(
    ("fault", "reason"), [(full, "No space"), (broken, "error"), (cut, "differs"), (flipped, "differs")]
)
def test_a_lasting_fault_is_one_warning_and_keeps_the_last_good_copy(
    make: Make, tmp_path: Path, target: Path, drive: Drive, time: Time, caplog: pytest.LogCaptureFixture,
    fault: Callable[[BinaryIO, bytes], None], reason: str,
) -> None:  # fmt: skip
    mirror = make()
    mirror.submit(save(tmp_path / "best", "a"))
    assert mirror.flush(LONG_SEC)
    good = content_of(target / "best")
    drive.faults = [fault] * 4
    mirror.submit(save(tmp_path / "best", "b"))
    assert mirror.flush(LONG_SEC)
    assert [seconds for seconds in time.slept_sec if seconds >= 1] == [1.0, 4.0, 16.0]
    assert content_of(target / "best") == good
    assert names(target) == ["best"]
    (message,) = warnings(caplog)
    (failure,) = mirror.failures
    assert failure.name == "best" and failure.name in message
    assert reason in failure.reason and failure.reason in message
    mirror.submit(tmp_path / "best")  # the fault has passed
    assert mirror.flush(LONG_SEC)
    assert content_of(target / "best") == content_of(tmp_path / "best") != good
    assert mirror.failures == []


def test_a_newer_folder_of_the_group_makes_up_for_a_failure(
    make: Make, tmp_path: Path, target: Path, drive: Drive
) -> None:
    mirror = make()
    drive.faults = [broken] * 4
    mirror.submit(save(tmp_path / "c-1", "a"), group="checkpoints")
    mirror.submit(save(tmp_path / "other", "a"))
    assert mirror.flush(LONG_SEC)
    assert [failure.name for failure in mirror.failures] == ["c-1"]
    assert names(target) == ["other"]
    mirror.submit(save(tmp_path / "c-2", "b"), group="checkpoints")
    assert mirror.flush(LONG_SEC)
    assert mirror.failures == []
    assert names(target) == ["c-2", "other"]


def test_a_target_that_vanishes_is_told_and_never_made_again(
    make: Make, tmp_path: Path, target: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = make()
    aside = tmp_path / "aside"

    def unmount(writer: BinaryIO, block: bytes) -> None:
        target.parent.rename(aside)
        writer.write(block)

    drive.faults = [unmount]
    mirror.submit(save(tmp_path / "c-1", "a"), group="checkpoints", keep=1)
    assert mirror.flush(LONG_SEC)
    assert not target.parent.exists()
    assert len(warnings(caplog)) == 1
    target.mkdir(parents=True)  # the mount point is an empty local folder now
    mirror.submit(save(tmp_path / "c-2", "b"), group="checkpoints", keep=1)
    assert mirror.flush(LONG_SEC)
    assert list(target.iterdir()) == []
    shutil.rmtree(target.parent)
    aside.rename(target.parent)  # mounted again
    mirror.submit(save(tmp_path / "c-3", "c"), group="checkpoints", keep=1)
    assert mirror.flush(LONG_SEC)
    assert names(target) == ["c-3"]
    assert mirror.failures == []


def test_a_target_that_cannot_be_used_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WhisperASRError, match="below"):
        DriveMirror(tmp_path / "file" / "below", max_mb_per_sec=1)
    with pytest.raises(WhisperASRError, match="max_mb_per_sec"):
        DriveMirror(tmp_path / "drive", max_mb_per_sec=0)
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "content" / "drive")
    with pytest.raises(WhisperASRError, match="mount_drive"):
        DriveMirror(tmp_path / "content" / "drive" / "MyDrive" / "x", max_mb_per_sec=1)
    assert not (tmp_path / "content").exists()


@pytest.mark.parametrize(
    ("total", "free", "arrives"), [(10**12, 10**6, False), (10**12, 10**11, True), (0, 0, True), (10, 2**63, True)]
)
def test_free_space_is_checked_where_the_drive_knows_it(
    make: Make, tmp_path: Path, target: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch,
    total: int, free: int, arrives: bool,
) -> None:  # fmt: skip
    usage = shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    mirror = make()
    mirror.submit(save(tmp_path / "c-1", "a"))
    assert mirror.flush(LONG_SEC)
    assert (target / "c-1").exists() == arrives
    assert (drive.n_blocks > 0) == arrives
    assert len(mirror.failures) == (not arrives)


def test_bandwidth_is_bounded_and_training_is_not(make: Make, tmp_path: Path, target: Path, time: Time) -> None:
    mirror = make(2.0)
    source = save(tmp_path / "c-1", "a", n_bytes=9_000_000)
    n_bytes = sum(map(len, content_of(source).values()))
    mirror.submit(source)
    assert mirror.flush(LONG_SEC)
    assert content_of(target / "c-1") == content_of(source)
    least_sec = (2 * n_bytes - (1 << 18)) / 2e6  # written and read back; the last block does not wait
    assert least_sec <= time.now_sec <= least_sec + 1.1


def test_submitting_returns_while_the_drive_hangs(
    make: Make, tmp_path: Path, target: Path, drive: Drive, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, release = threading.Event(), threading.Event()

    def hang(writer: BinaryIO, block: bytes) -> None:
        hangs.set()
        assert release.wait(LONG_SEC)
        writer.write(block)

    drive.faults = [hang]
    mirror = make()
    sources = [save(tmp_path / f"c-{i}", str(i)) for i in range(4)]
    mirror.submit(sources[0], group="checkpoints", keep=2)
    assert hangs.wait(LONG_SEC)
    mirror.submit(sources[1], group="checkpoints", keep=2)
    mirror.submit(sources[2], group="checkpoints", keep=2)
    assert [mirror.is_busy(source) for source in sources] == [True, False, True, False]
    assert not warnings(caplog)
    time.now_sec += STALL_SEC
    mirror.submit(sources[3], group="checkpoints", keep=2)
    mirror.submit(sources[3], group="checkpoints", keep=2)
    assert [mirror.is_busy(source) for source in sources] == [True, False, False, True]
    assert len([message for message in warnings(caplog) if "drive hangs" in message]) == 1
    assert not mirror.flush(0.01)
    assert "still without a copy" in warnings(caplog)[-1]
    release.set()
    assert mirror.flush(LONG_SEC)
    assert names(target) == ["c-0", "c-3"]
    assert not any(mirror.is_busy(source) for source in sources)


def test_closing_ends_a_hanging_copy_as_a_failure(
    make: Make, tmp_path: Path, target: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, release = threading.Event(), threading.Event()

    def hang(writer: BinaryIO, block: bytes) -> None:
        hangs.set()
        assert release.wait(LONG_SEC)

    drive.faults = [hang]
    mirror = make()
    mirror.submit(save(tmp_path / "c-1", "a"))
    assert hangs.wait(LONG_SEC)
    mirror.submit(save(tmp_path / "c-2", "a"))
    assert not mirror.close(0.01)
    release.set()
    assert mirror.flush(LONG_SEC)
    mirror.submit(save(tmp_path / "c-3", "a"))
    assert [failure.name for failure in mirror.failures] == ["c-2", "c-1", "c-3"]
    assert all("closed" in failure.reason for failure in mirror.failures)
    assert names(target) == []


@pytest.mark.slow  # imports the library in a fresh process
def test_the_interpreter_ends_while_the_drive_hangs(tmp_path: Path) -> None:
    save(tmp_path / "c-1", "a")
    code = (
        "import sys, threading; from pathlib import Path; from src.utils import colab; from src.utils.mirror import *\n"
        "hangs = threading.Event()\n"
        "colab._write_block = lambda writer, block: (hangs.set(), threading.Event().wait())\n"
        "mirror = DriveMirror(Path(sys.argv[1], 'drive'), max_mb_per_sec=10)\n"
        "mirror.submit(Path(sys.argv[1], 'c-1')); hangs.wait(); sys.exit(3)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, timeout=60, capture_output=True)
    assert done.returncode == 3, done.stderr


def test_a_source_deleted_during_its_copy_is_dropped_quietly(
    make: Make, tmp_path: Path, target: Path, drive: Drive, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(tmp_path / "c-1", "a")

    def delete(writer: BinaryIO, block: bytes) -> None:
        shutil.rmtree(source)
        writer.write(block)

    drive.faults = [delete]
    mirror = make()
    mirror.submit(source)
    assert mirror.flush(LONG_SEC)
    assert mirror.failures == []
    assert not warnings(caplog)
    assert names(target) == []
    assert all(seconds < 1 for seconds in time.slept_sec)


def test_a_source_replaced_during_its_copy_is_copied_again(
    make: Make, tmp_path: Path, target: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    source, newer = save(tmp_path / "best", "a"), save(tmp_path / "newer", "b")

    def replace(writer: BinaryIO, block: bytes) -> None:
        writer.write(block)
        source.rename(tmp_path / "older")
        newer.rename(source)

    drive.faults = [replace]
    mirror = make()
    mirror.submit(source)
    assert mirror.flush(LONG_SEC)
    assert content_of(target / "best") == content_of(source)
    assert (target / "best" / "sub" / "config").read_text() == "b"
    assert not warnings(caplog)


def test_what_cannot_be_copied_is_refused_without_trying_again(
    make: Make, tmp_path: Path, target: Path, time: Time
) -> None:
    mirror = make()
    linked = save(tmp_path / "linked", "a")
    (linked / "other").symlink_to(tmp_path / "empty")
    damaged = save(tmp_path / "damaged", "a")
    (damaged / "manifest.json").write_text(json.dumps({"files": {"model": {"size": 3000, "sha256": "of other bytes"}}}))
    foreign = save(tmp_path / "foreign", "a")
    (target / "foreign").mkdir()
    (target / "foreign" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for source in (linked, damaged, foreign, tmp_path / "empty", tmp_path / "absent"):
        mirror.submit(source)
    assert mirror.flush(LONG_SEC)
    assert sorted(failure.name for failure in mirror.failures) == ["absent", "damaged", "empty", "foreign", "linked"]
    assert all(seconds < 1 for seconds in time.slept_sec)
    assert names(target) == ["foreign"]
    assert content_of(target / "foreign") == {"mine.txt": b"mine"}


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".hidden", "a\\b", "run/.x"])
def test_a_name_outside_the_target_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    mirror = make()
    with pytest.raises(WhisperASRError, match="relative path"):
        mirror.submit(save(tmp_path / "c-1", "a"), name=name)
    with pytest.raises(WhisperASRError, match="keep=0"):
        mirror.submit(tmp_path / "c-1", keep=0, group="checkpoints")


def test_an_error_that_nobody_thought_of_is_a_failure_and_the_thread_lives(
    make: Make, tmp_path: Path, target: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    def surprise(writer: BinaryIO, block: bytes) -> None:
        raise ZeroDivisionError("surprise")

    drive.faults = [surprise]
    mirror = make()
    mirror.submit(save(tmp_path / "c-1", "a"))
    mirror.submit(save(tmp_path / "c-2", "a"))
    assert mirror.flush(LONG_SEC)
    assert [failure.reason for failure in mirror.failures] == ["ZeroDivisionError: surprise"]
    assert len(warnings(caplog)) == 1
    assert names(target) == ["c-2"]


def test_of_a_group_the_newest_stay_also_across_restarts(make: Make, tmp_path: Path, target: Path) -> None:
    for start in (0, 3):
        mirror = make()
        for i in range(start, start + 3):
            mirror.submit(save(tmp_path / f"c-{i}", str(i)), group="checkpoints", keep=2)
            assert mirror.flush(LONG_SEC)
        mirror.submit(save(tmp_path / "best", str(start)))
        assert mirror.close(LONG_SEC)
    assert names(target) == ["best", "c-4", "c-5"]
    assert all(content_of(target / f"c-{i}") == content_of(tmp_path / f"c-{i}") for i in (4, 5))


class Crash(BaseException):
    """The process ends here: nothing more reaches the drive."""


class Countdown:
    """Lets some steps that change the drive happen, then ends the process; afterwards every step fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drive: Path) -> None:
        self.left = float("inf")
        for name in ("mkdir", "rename", "unlink", "rmdir", "write_text"):
            monkeypatch.setattr(Path, name, self._counted(getattr(Path, name), drive))
        monkeypatch.setattr(shutil, "rmtree", self._counted(shutil.rmtree, drive))
        monkeypatch.setattr(os, "truncate", self._counted(os.truncate, drive))

    def _counted(self, step: Callable[..., object], drive: Path) -> Callable[..., object]:
        def counted(path: Path, *args: object, **kwargs: object) -> object:
            if Path(path).is_relative_to(drive):
                self.left -= 1
                if self.left < 0:
                    raise Crash
            return step(path, *args, **kwargs)

        return counted


def put(mirror: DriveMirror, source: Path, name: str | None = None, keep: int | None = None) -> None:
    """Copy at once, in this thread."""
    group = "checkpoints" if keep is not None else None
    mirror._copy_with_retries(_Job(source, name or source.name, group, keep))


def generation_of(folder: Path) -> str:
    """The content of a whole copy; half a copy fails."""
    content = (folder / "sub" / "config").read_text()
    assert content_of(folder) == {"sub/config": content.encode(), "model": content.encode() * 100}
    return content


def save_small(folder: Path, content: str) -> Path:
    return save(folder, content, n_bytes=100)


def test_a_crash_at_any_step_leaves_a_whole_copy_that_the_next_start_finds(
    make: Make, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(monkeypatch, target)
    source = tmp_path / "best"
    outcomes: list[str] = []
    for n_steps in range(100):
        shutil.rmtree(target, ignore_errors=True)
        first = make()
        put(first, save_small(source, "a"), "run/best")
        save_small(source, "b")
        countdown.left = n_steps
        try:
            put(first, source, "run/best")
            break
        except Crash:
            countdown.left = n_steps // 3  # the recovery crashes as well
        with contextlib.suppress(Crash):
            make()
        countdown.left = float("inf")
        second = make()
        outcomes.append(generation_of(target / "run" / "best"))
        assert names(target / "run") == ["best"], n_steps
        put(second, save_small(source, "c"), "run/best")  # it is still known as the mirror's
        assert generation_of(target / "run" / "best") == "c"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {"a", "b"}
    assert len(outcomes) > 10


def test_a_crash_at_any_step_of_pruning_ends_in_whole_copies(
    make: Make, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(monkeypatch, target)
    sources = [save_small(tmp_path / f"c-{i}", str(i)) for i in range(3)]
    for n_steps in range(100):
        shutil.rmtree(target, ignore_errors=True)
        first = make()
        for source in sources:
            put(first, source, keep=9)
        countdown.left = n_steps
        try:
            first._prune(target, "checkpoints", 1)
            break
        except Crash:
            countdown.left = float("inf")
        second = make()
        assert generation_of(target / "c-2") == "2"
        assert [generation_of(target / name) for name in names(target)] == [name[-1] for name in names(target)]
        second._prune(target, "checkpoints", 1)
        assert names(target) == ["c-2"]
    assert n_steps > 8


def test_what_the_mirror_did_not_write_is_never_deleted(
    make: Make, tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = make()
    for name in ("c-0", "c-1"):
        put(mirror, save_small(tmp_path / name, name[-1]), keep=9)
    foreign = save_small(target / "c-7", "7")
    save_small(target / ".c-1.0123456789abcdef.partial", "8")
    shutil.copytree(target / "c-1", target / "c-1 (copy)")
    (target / "c-0" / "notes.txt").write_text("mine")
    (target / "c-0" / "link").symlink_to(foreign / "model")
    (target / "c-0" / "sub" / "config").write_text("edited by hand")
    os.link(target / "c-0" / "model", tmp_path / "kept_model")
    put(make(), save_small(tmp_path / "c-2", "2"), keep=1)
    (kept,) = target.glob("c-0.kept-*")
    assert names(target) == sorted([".c-1.0123456789abcdef.partial", kept.name, "c-1 (copy)", "c-2", "c-7"])
    assert [generation_of(target / name) for name in (".c-1.0123456789abcdef.partial", "c-1 (copy)", "c-7")] == list(
        "817"
    )
    assert sorted(path.name for path in kept.rglob("*")) == ["config", "link", "notes.txt", "sub"]
    assert (kept / "sub" / "config").read_text() == "edited by hand"
    assert (tmp_path / "kept_model").read_text() == "0" * 100
    assert kept.name in caplog.text


def test_a_folder_that_the_user_deleted_does_not_count(make: Make, tmp_path: Path, target: Path) -> None:
    mirror = make()
    for i in range(4):
        if i == 3:
            shutil.rmtree(target / "c-2")
        put(mirror, save_small(tmp_path / f"c-{i}", str(i)), keep=3)
    assert names(target) == ["c-0", "c-1", "c-3"]


def test_a_failed_second_rename_restores_the_last_good_copy_at_once(
    make: Make, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = make()
    put(mirror, save_small(tmp_path / "best", "a"))
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="error"):
        patch.setattr(Path, "rename", refuse)
        put(mirror, save_small(tmp_path / "best", "b"))
    assert generation_of(target / "best") == "a"
    assert names(target) == ["best"]


def test_a_second_mirror_leaves_the_firsts_unfinished_work_alone(
    make: Make, tmp_path: Path, target: Path, drive: Drive
) -> None:
    other = save_small(tmp_path / "other", "a")

    def meanwhile(writer: BinaryIO, block: bytes) -> None:
        put(make(), other)  # a notebook cell that is run again
        writer.write(block)

    drive.faults = [meanwhile]
    put(make(), save_small(tmp_path / "best", "a"))
    assert generation_of(target / "best") == generation_of(target / "other") == "a"
    assert names(target) == ["best", "other"]


def test_a_target_of_an_earlier_version_is_refused_with_the_reason(make: Make, target: Path) -> None:
    target.mkdir(parents=True)
    ledger = '{"format":1,"folders":{"c-0":{"group":null,"order":1,"files":{}}},"pending":{}}'
    (target / MIRROR_MARKER).write_text(ledger)
    with pytest.raises(WhisperASRError, match="earlier version"):
        make()
    assert (target / MIRROR_MARKER).read_text() == ledger


def test_remains_that_cannot_be_removed_do_not_stop_a_start(
    make: Make, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(make(), save_small(tmp_path / "best", "a"))
    (target / "best").rename(target / ".best.0123456789abcdef.replaced")

    def refuse(path: Path, *args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        make()
    assert len(warnings(caplog)) == 1
    make()
    assert generation_of(target / "best") == "a"
