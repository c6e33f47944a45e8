"""The background mirror on real folders: faults of the drive, crashes at any step, and what is never deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from src.utils import mirror as module
from src.utils import runtime
from src.utils.errors import WhisperASRError
from src.utils.mirror import MARKER, STALL_SEC, DriveMirror, _Job, copy_verified

LONG_SEC = 20.0  # a limit that no good run comes near
GROUP: dict[str, Any] = {"group": "checkpoints", "keep": 2}
Fault = Callable[[BinaryIO, bytes], object]


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
        self.retry_waits_sec += [seconds] if seconds >= 1 else []

    def mirror(self, max_mb_per_sec: float = 1e6) -> DriveMirror:
        self.mirrors.append(
            DriveMirror(self.target, max_mb_per_sec=max_mb_per_sec, sleep=self.sleep, clock=lambda: self.now_sec)
        )
        return self.mirrors[-1]

    def save(self, name: str, content: str, *, n_bytes: int = 100) -> Path:
        """Save a folder as a checkpoint store does: two files, one in a subfolder."""
        folder = self.home / name
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "model").write_bytes(content.encode() * n_bytes)
        (folder / "sub" / "config").write_text(content)
        return folder

    def names(self, folder: str = ".") -> list[str]:
        """All names in a folder of the target, hidden ones too, without the marker."""
        return sorted(path.name for path in (self.target / folder).iterdir() if path.name != MARKER)

    def content(self, name: str, *, n_bytes: int = 100) -> str:
        """The content of a whole copy; half a copy, or one with more than was saved, fails."""
        folder = self.target / name
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]
        content = (folder / "sub" / "config").read_text()
        assert sorted(files) == [folder / "model", folder / "sub" / "config"]
        assert (folder / "model").read_bytes() == content.encode() * n_bytes
        return content


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Drive]:
    caplog.set_level(logging.WARNING, logger="src.utils")
    drive = Drive(tmp_path)
    monkeypatch.setattr(module, "_write_block", drive.write)
    yield drive
    assert all(mirror.flush(LONG_SEC) for mirror in drive.mirrors)


def send(mirror: DriveMirror, *sources: Path, **options: Any) -> None:
    for source in sources:
        mirror.submit(source, **options)
    assert mirror.flush(LONG_SEC)


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def cut(writer: BinaryIO, block: bytes) -> None:
    writer.write(block[:-1])


def flipped(writer: BinaryIO, block: bytes) -> None:
    writer.write(bytes([block[0] ^ 1]) + block[1:])


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
    assert not mirror.failures and not caplog.records
    least_sec = (2 * 3_000_001 - (1 << 18)) / 2e6  # written and read back; the last block does not wait
    assert least_sec <= drive.now_sec <= least_sec + 1.1


@pytest.mark.parametrize("fault", [full, cut, flipped])
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
    (message,), ((name, reason),) = caplog.messages, mirror.failures.items()
    assert name == "best" in message and reason in message
    send(mirror, drive.home / "best")  # the fault has passed
    assert drive.content("best") == "b"
    assert not mirror.failures


def test_a_newer_folder_of_the_group_makes_up_for_a_failure_and_a_surprise_ends_no_thread(drive: Drive) -> None:
    mirror = drive.mirror()
    drive.faults = [lambda *_: 1 / 0]
    send(mirror, drive.save("c-1", "a"), group="checkpoints")
    assert mirror.failures == {"c-1": "ZeroDivisionError: division by zero"}
    send(mirror, drive.save("other", "a"))
    assert list(mirror.failures) == ["c-1"]
    send(mirror, drive.save("c-2", "b"), group="checkpoints")
    assert not mirror.failures
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
    assert not mirror.failures


def test_a_target_that_cannot_be_used_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MOUNT_POINT", tmp_path / "content" / "drive")
    (tmp_path / "earlier").mkdir()
    ledger = '{"format":1,"folders":{"c-0":{"group":null,"order":1,"files":{}}},"pending":{}}'
    (tmp_path / "earlier" / MARKER).write_text(ledger)
    (tmp_path / "taken" / MARKER).mkdir(parents=True)
    for target in (f"earlier/{MARKER}/below", "content/drive/MyDrive/x", "earlier", "taken"):
        with pytest.raises(WhisperASRError, match=target):
            DriveMirror(tmp_path / target, max_mb_per_sec=1)
    assert not (tmp_path / "content").exists()
    assert (tmp_path / "earlier" / MARKER).read_text() == ledger


@pytest.mark.parametrize(("total", "free", "arrives"), [(10**12, 10**6, False), (10**12, 10**11, True), (0, 0, True)])
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
    mirror.submit(sources[0], **GROUP)
    assert hang.begun.wait(LONG_SEC)
    for source in sources[1:3]:
        mirror.submit(source, **GROUP)
    assert [mirror.is_busy(source) for source in sources] == [True, False, True, False]
    assert not caplog.records
    drive.now_sec += STALL_SEC
    for _ in range(2):
        mirror.submit(sources[3], **GROUP)
    assert [mirror.is_busy(source) for source in sources] == [True, False, False, True]
    assert len(caplog.messages) == 1 and "c-0" in caplog.messages[0]
    assert not mirror.flush(0.01)
    assert "c-0, c-3" in caplog.messages[1]
    threads = [each for each in threading.enumerate() if each.name == "drive-mirror"]
    assert threads and all(each.daemon for each in threads)  # the interpreter ends while the drive hangs
    hang.release.set()
    assert mirror.flush(LONG_SEC)
    assert drive.names() == ["c-0", "c-3"]
    assert not any(mirror.is_busy(source) for source in sources)


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
    assert not mirror.failures and not caplog.records
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
    assert sorted(mirror.failures) == ["absent", "damaged", "empty", "foreign", "link", "linked"]
    assert drive.retry_waits_sec == []
    assert (drive.names(), drive.names("foreign")) == (["foreign"], ["mine.txt"])
    for name in ("../x", "/x", "a/../x", ".hidden", "a\\b", "."):
        with pytest.raises(WhisperASRError) as caught:
            mirror.submit(foreign, name=name)
        assert repr(name) in str(caught.value)


def test_of_a_group_the_newest_stay_also_across_restarts(drive: Drive) -> None:
    for start in (0, 3):
        mirror = drive.mirror()
        for i in range(start, start + 3):
            send(mirror, drive.save(f"c-{i}", str(i)), **GROUP)
        send(mirror, drive.save("best", str(start)))
    assert drive.names() == ["best", "c-4", "c-5"]
    assert [drive.content(f"c-{i}") for i in (4, 5)] == ["4", "5"]
    shutil.rmtree(drive.target / "c-5")  # by the user: it does not count
    send(mirror, drive.save("c-6", "6"), **GROUP)
    assert drive.names() == ["best", "c-4", "c-6"]


class Crash(BaseException):
    """The process ends here: nothing more reaches the drive."""


class Countdown:
    """Lets some steps that change the drive happen, then ends the process; afterwards every step fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drive: Path) -> None:
        self.left, self._drive = float("inf"), drive
        for name in ("mkdir", "rename", "unlink", "rmdir", "write_text"):
            monkeypatch.setattr(Path, name, self._counted(getattr(Path, name)))
        monkeypatch.setattr(shutil, "rmtree", self._counted(shutil.rmtree))
        monkeypatch.setattr(os, "truncate", self._counted(os.truncate))

    def _counted(self, step: Callable[..., object]) -> Callable[..., object]:
        def counted(path: Path, *args: object, **kwargs: object) -> object:
            self.left -= Path(path).is_relative_to(self._drive)
            if self.left < 0 and Path(path).is_relative_to(self._drive):
                raise Crash
            return step(path, *args, **kwargs)

        return counted


def put(mirror: DriveMirror, source: Path, name: str | None = None, keep: int | None = None) -> None:
    """Copy at once, in this thread."""
    mirror._copy_with_retries(_Job(source, name or source.name, "checkpoints" if keep else None, keep))


def crash_anywhere(drive: Drive, monkeypatch: pytest.MonkeyPatch, *puts: tuple[Any, ...]) -> Iterator[DriveMirror]:
    """End the process after 0, 1, 2, ... steps of the last `put`; yield the mirror of the start after."""
    countdown = Countdown(monkeypatch, drive.target)
    for n_steps in range(100):
        shutil.rmtree(drive.target, ignore_errors=True)
        first = drive.mirror()
        for each in puts[:-1]:
            put(first, *each)
        countdown.left = n_steps
        try:
            put(first, *puts[-1])
            break
        except Crash:
            countdown.left = n_steps // 3  # the recovery crashes as well
        with contextlib.suppress(Crash):
            drive.mirror()
        countdown.left = float("inf")
        yield drive.mirror()
    assert n_steps > 10


def test_a_crash_at_any_step_leaves_a_whole_copy_that_the_next_start_finds(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer, newest = (drive.save(f"{name}/best", name) for name in "abc")
    outcomes: list[str] = []
    for second in crash_anywhere(drive, monkeypatch, (older, "run/best"), (newer, "run/best")):
        outcomes.append(drive.content("run/best"))
        assert drive.names("run") == ["best"]
        put(second, newest, "run/best")  # it is still known as the mirror's
        assert drive.content("run/best") == "c"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {"a", "b"}


def test_a_crash_at_any_step_of_pruning_ends_in_whole_copies(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [drive.save(f"c-{i}", str(i)) for i in range(4)]
    puts = [(source, source.name, 9) for source in sources[:3]]
    for second in crash_anywhere(drive, monkeypatch, *puts, (sources[3], "c-3", 1)):
        assert drive.names()[-1] in ("c-2", "c-3")
        assert [drive.content(name) for name in drive.names()] == [name[-1] for name in drive.names()]
        put(second, sources[3], keep=1)
        assert drive.names() == ["c-3"]


@pytest.mark.parametrize("change", ["notes.txt", "empty", "link", "config"])
def test_what_the_mirror_did_not_write_is_never_deleted_and_its_own_files_are(
    drive: Drive, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    target, foreign = drive.target, [".c-1.0123456789abcdef.partial", "c-1 (copy)", "c-7"]
    for name in ("c-0", "c-1"):
        put(drive.mirror(), drive.save(name, name[-1]), keep=9)
    shutil.copytree(drive.save("c-8", "8"), target / foreign[0])
    shutil.copytree(target / "c-1", target / foreign[1])
    shutil.copytree(drive.save("c-7", "7"), target / foreign[2])
    os.link(target / "c-1" / "model", drive.home / "kept_model")
    for name in ("pipe", "folder"):
        (target / name).mkdir()
    os.mkfifo(target / "pipe" / MARKER)  # opened, it would never end
    (target / "folder" / MARKER).mkdir()
    foreign += ["folder", "pipe"]
    if change == "link":
        (target / "c-0" / "sub" / "link").symlink_to(target / "c-7" / "model")
    else:
        (target / "c-0" / "sub" / change).write_text("" if change == "empty" else "mine, by hand")
    put(drive.mirror(), drive.save("c-2", "2"), keep=1)
    (kept,) = target.glob("c-0.kept-*")
    assert drive.names() == sorted([*foreign, kept.name, "c-2"])
    assert [drive.content(name) for name in foreign[:3]] == ["8", "1", "7"]
    assert sorted(path.name for path in kept.rglob("*")) == sorted(["sub", change])
    assert (drive.home / "kept_model").read_text() == "1" * 100
    assert kept.name in caplog.text


def test_a_failed_second_rename_restores_the_last_good_copy_at_once(
    drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, rename = drive.mirror(), Path.rename
    put(mirror, drive.save("best", "a"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "rename", lambda path, to: full() if path.suffix == ".partial" else rename(path, to))
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
        patch.setattr(Path, "rename", full)
        drive.mirror()
    assert len(caplog.messages) == 1
    drive.mirror()
    assert drive.content("best") == "a"


def test_a_folder_is_copied_once_and_a_copy_that_fails_keeps_the_old_one(drive: Drive) -> None:
    source, target = drive.save("best", "a"), drive.home / "plain"
    assert [copy_verified(source, target), copy_verified(source, target)] == [101, 0]
    (target / "notes.txt").write_text("mine")
    drive.save("best", "b")
    for fault, message in ((cut, "differs"), (full, "No space left")):
        drive.faults = [fault]
        with pytest.raises(WhisperASRError, match=message):
            copy_verified(source, target)
        assert (target / "model").read_text() == "a" * 100
    assert copy_verified(source, target) == 101
    assert {"notes.txt", "model", "sub"} <= {path.name for path in target.iterdir()}
    with pytest.raises(WhisperASRError, match="absent"):
        copy_verified(drive.home / "absent", target)
