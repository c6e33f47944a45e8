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
from typing import Any, BinaryIO

import pytest

from src.utils import colab
from src.utils.colab import MIRROR_MARKER
from src.utils.errors import WhisperASRError
from src.utils.mirror import STALL_SEC, DriveMirror, _Job

LONG_SEC = 20.0  # a limit that no good run comes near
GROUP: dict[str, Any] = {"group": "checkpoints", "keep": 1}
Fault = Callable[[BinaryIO, bytes], None]


class Drive:
    """A target, the faults of the next blocks that are written to it, and a clock that only sleeping moves."""

    def __init__(self, home: Path) -> None:
        self.home, self.target = home, home / "drive" / "whisper_asr"
        self.faults: list[Fault] = []
        self.n_blocks = 0
        self.now_sec = 0.0
        self.retry_waits_sec: list[float] = []
        self.mirrors: list[DriveMirror] = []

    def write(self, writer: BinaryIO, block: bytes) -> None:
        self.n_blocks += 1
        fault = self.faults.pop(0) if self.faults else None
        fault(writer, block) if fault else writer.write(block)

    def sleep(self, seconds: float) -> None:
        self.now_sec += seconds
        if seconds >= 1:
            self.retry_waits_sec.append(seconds)

    def mirror(self, max_mb_per_sec: float = 1e6) -> DriveMirror:
        mirror = DriveMirror(
            self.target, max_mb_per_sec=max_mb_per_sec, sleep=self.sleep, clock=lambda: self.now_sec
        )  # fmt: skip
        self.mirrors.append(mirror)
        return mirror

    def save(self, name: str, content: str, *, n_bytes: int = 100) -> Path:
        """Save a folder as a checkpoint store does: two files, one in a subfolder."""
        folder = self.home / name
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "model").write_bytes(content.encode() * n_bytes)
        (folder / "sub" / "config").write_text(content)
        return folder

    def names(self, folder: str = ".") -> list[str]:
        """All names in a folder of the target, hidden ones too, without the marker."""
        return sorted(path.name for path in (self.target / folder).iterdir() if path.name != MIRROR_MARKER)

    def content(self, name: str, *, n_bytes: int = 100) -> str:
        """The content of a whole copy; half a copy, or one with more than was saved, fails."""
        folder = self.target / name
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != MIRROR_MARKER]
        content = (folder / "sub" / "config").read_text()
        assert sorted(files) == [folder / "model", folder / "sub" / "config"]
        assert (folder / "model").read_bytes() == content.encode() * n_bytes
        return content


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Drive]:
    caplog.set_level(logging.WARNING, logger="src.utils")
    drive = Drive(tmp_path)
    monkeypatch.setattr(colab, "_write_block", drive.write)
    yield drive
    for mirror in drive.mirrors:
        assert mirror.close(LONG_SEC)
        assert not mirror._thread.is_alive()


def send(mirror: DriveMirror, *sources: Path, **options: Any) -> None:
    for source in sources:
        mirror.submit(source, **options)
    assert mirror.flush(LONG_SEC)


def failed(mirror: DriveMirror) -> list[str]:
    return [failure.name for failure in mirror.failures]


def full(writer: BinaryIO, block: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def cut(writer: BinaryIO, block: bytes) -> None:
    writer.write(block[:-1])


def flipped(writer: BinaryIO, block: bytes) -> None:
    writer.write(bytes([block[0] ^ 1]) + block[1:])


def surprise(writer: BinaryIO, block: bytes) -> None:
    raise ZeroDivisionError("surprise")


class Hang:
    """A block that is written only once it is released."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self, writer: BinaryIO, block: bytes) -> None:
        self.begun.set()
        assert self.release.wait(LONG_SEC)
        writer.write(block)


def test_a_folder_arrives_whole_unlinked_and_at_the_rate_allowed(
    drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = drive.mirror(2.0)
    send(mirror, drive.save("checkpoint-1", "a", n_bytes=3_000_000), name="run/checkpoint-1")
    assert drive.content("run/checkpoint-1", n_bytes=3_000_000) == "a"
    files = [path for path in (drive.target / "run").rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in files)
    assert (drive.names(), drive.names("run")) == (["run"], ["checkpoint-1"])
    assert mirror.failures == [] and not caplog.records
    least_sec = (2 * 3_000_001 - (1 << 18)) / 2e6  # written and read back; the last block does not wait
    assert least_sec <= drive.now_sec <= least_sec + 1.1


@pytest.mark.parametrize("fault", [full, broken, cut, flipped])
def test_a_fault_is_tried_again_and_if_it_lasts_keeps_the_last_good_copy(
    drive: Drive, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    mirror = drive.mirror()
    drive.faults = [fault] * 2
    send(mirror, drive.save("best", "a"))
    assert drive.retry_waits_sec == [1.0, 4.0]
    assert drive.content("best") == "a" and not caplog.records
    drive.faults = [fault] * 4
    send(mirror, drive.save("best", "b"))
    assert drive.retry_waits_sec == [1.0, 4.0, 1.0, 4.0, 16.0]
    assert drive.content("best") == "a" and drive.names() == ["best"]
    (message,), (failure,) = caplog.messages, mirror.failures
    assert failure.name == "best" in message and failure.reason in message
    send(mirror, drive.home / "best")  # the fault has passed
    assert drive.content("best") == "b"
    assert mirror.failures == []


def test_a_newer_folder_of_the_group_makes_up_for_a_failure(drive: Drive) -> None:
    mirror = drive.mirror()
    drive.faults = [broken] * 4
    send(mirror, drive.save("c-1", "a"), group="checkpoints")
    send(mirror, drive.save("other", "a"))
    assert failed(mirror) == ["c-1"]
    send(mirror, drive.save("c-2", "b"), group="checkpoints")
    assert mirror.failures == []
    assert drive.names() == ["c-2", "other"]


def test_a_target_that_vanishes_is_never_made_again(drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    mirror, mount, aside = drive.mirror(), drive.target.parent, drive.home / "aside"

    def unmount(writer: BinaryIO, block: bytes) -> None:
        mount.rename(aside)
        writer.write(block)

    drive.faults = [unmount]
    send(mirror, drive.save("c-1", "a"), **GROUP)
    assert not mount.exists()
    assert len(caplog.messages) == 1
    drive.target.mkdir(parents=True)  # the mount point is an empty local folder now
    send(mirror, drive.save("c-2", "b"), **GROUP)
    assert list(drive.target.iterdir()) == []
    shutil.rmtree(mount)
    aside.rename(mount)  # mounted again
    send(mirror, drive.save("c-3", "c"), **GROUP)
    assert drive.names() == ["c-3"]
    assert mirror.failures == []


def test_a_target_that_cannot_be_used_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "content" / "drive")
    (tmp_path / "earlier").mkdir()
    ledger = '{"format":1,"folders":{"c-0":{"group":null,"order":1,"files":{}}},"pending":{}}'
    (tmp_path / "earlier" / MIRROR_MARKER).write_text(ledger)
    for target in (f"earlier/{MIRROR_MARKER}/below", "content/drive/MyDrive/x", "earlier"):
        with pytest.raises(WhisperASRError, match=target):
            DriveMirror(tmp_path / target, max_mb_per_sec=1)
    assert not (tmp_path / "content").exists()
    assert (tmp_path / "earlier" / MIRROR_MARKER).read_text() == ledger
    with pytest.raises(WhisperASRError, match="max_mb_per_sec"):
        DriveMirror(tmp_path / "drive", max_mb_per_sec=0)


@pytest.mark.parametrize(
    ("total", "free", "arrives"), [(10**12, 10**6, False), (10**12, 10**11, True), (0, 0, True), (10, 2**63, True)]
)
def test_free_space_is_checked_where_the_drive_knows_it(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, total: int, free: int, arrives: bool
) -> None:
    usage = shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    mirror = drive.mirror()
    send(mirror, drive.save("c-1", "a"))
    assert drive.names() == (["c-1"] if arrives else [])
    assert (drive.n_blocks > 0) == arrives
    assert len(mirror.failures) == (not arrives)


def test_submitting_returns_while_the_drive_hangs(drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    hang, mirror = Hang(), drive.mirror()
    drive.faults = [hang]
    sources = [drive.save(f"c-{i}", str(i)) for i in range(4)]
    mirror.submit(sources[0], group="checkpoints", keep=2)
    assert hang.begun.wait(LONG_SEC)
    for source in sources[1:3]:
        mirror.submit(source, group="checkpoints", keep=2)
    assert [mirror.is_busy(source) for source in sources] == [True, False, True, False]
    assert not caplog.records
    drive.now_sec += STALL_SEC
    for _ in range(2):
        mirror.submit(sources[3], group="checkpoints", keep=2)
    assert [mirror.is_busy(source) for source in sources] == [True, False, False, True]
    assert len(caplog.messages) == 1 and "c-0" in caplog.messages[0]
    assert not mirror.flush(0.01)
    assert "c-0, c-3" in caplog.messages[1]
    hang.release.set()
    assert mirror.flush(LONG_SEC)
    assert drive.names() == ["c-0", "c-3"]
    assert not any(mirror.is_busy(source) for source in sources)


def test_closing_ends_a_hanging_copy_as_a_failure(drive: Drive) -> None:
    hang, mirror = Hang(), drive.mirror()
    drive.faults = [hang]
    mirror.submit(drive.save("c-1", "a"))
    assert hang.begun.wait(LONG_SEC)
    mirror.submit(drive.save("c-2", "a"))
    assert not mirror.close(0.01)
    hang.release.set()
    assert mirror.flush(LONG_SEC)
    mirror.submit(drive.save("c-3", "a"))
    assert failed(mirror) == ["c-2", "c-1", "c-3"]
    assert drive.names() == []


@pytest.mark.slow  # imports the library in a fresh process
def test_the_interpreter_ends_while_the_drive_hangs(drive: Drive) -> None:
    code = (
        "import sys, threading; from pathlib import Path; from src.utils import colab; from src.utils.mirror import *\n"
        "hangs = threading.Event()\n"
        "colab._write_block = lambda writer, block: (hangs.set(), threading.Event().wait())\n"
        "mirror = DriveMirror(Path(sys.argv[1], 'drive'), max_mb_per_sec=10)\n"
        "mirror.submit(Path(sys.argv[1], 'c-1')); hangs.wait(); sys.exit(3)"
    )
    command = [sys.executable, "-c", code, str(drive.save("c-1", "a").parent)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], timeout=60, capture_output=True)
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("replaced", [False, True])
def test_a_source_deleted_during_its_copy_is_dropped_and_one_replaced_is_copied_again(
    drive: Drive, caplog: pytest.LogCaptureFixture, replaced: bool
) -> None:
    source, newer = drive.save("best", "a"), drive.save("newer", "b")

    def change(writer: BinaryIO, block: bytes) -> None:
        writer.write(block)
        shutil.rmtree(source)
        if replaced:
            newer.rename(source)

    drive.faults, mirror = [change], drive.mirror()
    send(mirror, source)
    assert drive.names() == (["best"] if replaced else [])
    assert not replaced or drive.content("best") == "b"
    assert mirror.failures == [] and not caplog.records
    assert len(drive.retry_waits_sec) == replaced


def test_what_cannot_be_copied_is_refused_without_trying_again(drive: Drive) -> None:
    mirror = drive.mirror()
    linked, foreign, empty = drive.save("linked", "a"), drive.save("foreign", "a"), drive.home / "empty"
    (linked / "other").symlink_to(empty)
    empty.mkdir()
    damaged = drive.save("damaged", "a")
    (damaged / "manifest.json").write_text(json.dumps({"files": {"model": {"size": 100, "sha256": "of other bytes"}}}))
    (drive.home / "link").symlink_to(foreign)
    (drive.target / "foreign").mkdir()
    (drive.target / "foreign" / "mine.txt").write_text("mine")
    send(mirror, linked, damaged, foreign, empty, drive.home / "absent", drive.home / "link")
    assert sorted(failed(mirror)) == ["absent", "damaged", "empty", "foreign", "link", "linked"]
    assert drive.retry_waits_sec == []
    assert (drive.names(), drive.names("foreign")) == (["foreign"], ["mine.txt"])


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".hidden", "a\\b", "run/.x"])
def test_a_name_outside_the_target_is_refused(drive: Drive, name: str) -> None:
    with pytest.raises(WhisperASRError) as caught:
        drive.mirror().submit(drive.save("c-1", "a"), name=name)
    assert repr(name) in str(caught.value)


def test_an_error_that_nobody_thought_of_is_a_failure_and_the_thread_lives(drive: Drive) -> None:
    drive.faults, mirror = [surprise], drive.mirror()
    send(mirror, drive.save("c-1", "a"), drive.save("c-2", "a"))
    assert [failure.reason for failure in mirror.failures] == ["ZeroDivisionError: surprise"]
    assert drive.names() == ["c-2"]


def test_of_a_group_the_newest_stay_also_across_restarts(drive: Drive) -> None:
    for start in (0, 3):
        mirror = drive.mirror()
        for i in range(start, start + 3):
            send(mirror, drive.save(f"c-{i}", str(i)), group="checkpoints", keep=2)
        send(mirror, drive.save("best", str(start)))
    assert drive.names() == ["best", "c-4", "c-5"]
    assert [drive.content(f"c-{i}") for i in (4, 5)] == ["4", "5"]
    shutil.rmtree(drive.target / "c-5")  # by the user: it does not count
    send(mirror, drive.save("c-6", "6"), group="checkpoints", keep=2)
    assert drive.names() == ["best", "c-4", "c-6"]
    with pytest.raises(WhisperASRError, match="keep=0"):
        mirror.submit(drive.home / "best", keep=0, group="checkpoints")


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


def test_a_crash_at_any_step_leaves_a_whole_copy_that_the_next_start_finds(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(monkeypatch, drive.target)
    outcomes: list[str] = []
    for n_steps in range(100):
        shutil.rmtree(drive.target, ignore_errors=True)
        first = drive.mirror()
        put(first, drive.save("best", "a"), "run/best")
        newer = drive.save("best", "b")
        countdown.left = n_steps
        try:
            put(first, newer, "run/best")
            break
        except Crash:
            countdown.left = n_steps // 3  # the recovery crashes as well
        with contextlib.suppress(Crash):
            drive.mirror()
        countdown.left = float("inf")
        second = drive.mirror()
        outcomes.append(drive.content("run/best"))
        assert drive.names("run") == ["best"], n_steps
        put(second, drive.save("best", "c"), "run/best")  # it is still known as the mirror's
        assert drive.content("run/best") == "c"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {"a", "b"}
    assert len(outcomes) > 10


def test_a_crash_at_any_step_of_pruning_ends_in_whole_copies(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    countdown = Countdown(monkeypatch, drive.target)
    sources = [drive.save(f"c-{i}", str(i)) for i in range(3)]
    for n_steps in range(100):
        shutil.rmtree(drive.target, ignore_errors=True)
        first = drive.mirror()
        for source in sources:
            put(first, source, keep=9)
        countdown.left = n_steps
        try:
            first._prune(drive.target, "checkpoints", 1)
            break
        except Crash:
            countdown.left = float("inf")
        second = drive.mirror()
        assert drive.content("c-2") == "2"
        assert [drive.content(name) for name in drive.names()] == [name[-1] for name in drive.names()]
        second._prune(drive.target, "checkpoints", 1)
        assert drive.names() == ["c-2"]
    assert n_steps > 8


def test_what_the_mirror_did_not_write_is_never_deleted(drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    target, foreign = drive.target, [".c-1.0123456789abcdef.partial", "c-1 (copy)", "c-7"]
    put(drive.mirror(), drive.save("c-0", "0"), keep=9)
    put(drive.mirror(), drive.save("c-1", "1"), keep=9)
    shutil.copytree(drive.save("c-8", "8"), target / foreign[0])
    shutil.copytree(target / "c-1", target / foreign[1])
    shutil.copytree(drive.save("c-7", "7"), target / foreign[2])
    (target / "c-0" / "notes.txt").write_text("mine")
    (target / "c-0" / "link").symlink_to(target / "c-7" / "model")
    (target / "c-0" / "sub" / "config").write_text("edited by hand")
    os.link(target / "c-0" / "model", drive.home / "kept_model")
    put(drive.mirror(), drive.save("c-2", "2"), keep=1)
    (kept,) = target.glob("c-0.kept-*")
    assert drive.names() == sorted([*foreign, kept.name, "c-2"])
    assert [drive.content(name) for name in foreign] == ["8", "1", "7"]
    assert sorted(path.name for path in kept.rglob("*")) == ["config", "link", "notes.txt", "sub"]
    assert (kept / "sub" / "config").read_text() == "edited by hand"
    assert (drive.home / "kept_model").read_text() == "0" * 100
    assert kept.name in caplog.text


def test_a_failed_second_rename_restores_the_last_good_copy_at_once(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, rename = drive.mirror(), Path.rename
    put(mirror, drive.save("best", "a"))

    def refuse(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            broken()
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="error"):
        patch.setattr(Path, "rename", refuse)
        put(mirror, drive.save("best", "b"))
    assert drive.content("best") == "a" and drive.names() == ["best"]


def test_a_second_mirror_leaves_the_firsts_unfinished_work_alone(drive: Drive) -> None:
    other = drive.save("other", "a")

    def meanwhile(writer: BinaryIO, block: bytes) -> None:
        put(drive.mirror(), other)  # a notebook cell that is run again
        writer.write(block)

    drive.faults = [meanwhile]
    put(drive.mirror(), drive.save("best", "a"))
    assert drive.content("best") == drive.content("other") == "a"
    assert drive.names() == ["best", "other"]


def test_remains_that_cannot_be_removed_do_not_stop_a_start(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(drive.mirror(), drive.save("best", "a"))
    (drive.target / "best").rename(drive.target / ".best.0123456789abcdef.replaced")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        drive.mirror()
    assert len(caplog.messages) == 1
    drive.mirror()
    assert drive.content("best") == "a"
