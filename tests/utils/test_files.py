from __future__ import annotations

import errno
import hashlib
import logging
import math
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from src.utils.errors import DataError, WhisperASRError, WriteError
from src.utils.files import (
    LOCK,
    atomic_folder,
    claim,
    fsync_folder,
    json_line,
    load_english_spelling,
    locked,
    parse_json,
    read_hidden_name,
    read_json,
    read_run_rows,
    recover_folder,
    remove_folder,
    sha256_of,
    uninterrupted,
    write_bytes_atomic,
    write_json,
    write_text_atomic,
)
from tests.utils.full_disk import fill_disk
from tests.utils.holder import held

ROOT = Path(__file__).resolve().parents[2]
FILES = [f"part{i}" for i in range(6)]
DEAD = 2**22 + 1  # a process id above every Linux limit
can_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a fresh process imports for seconds"
)


def write_generation(output_dir: Path, generation: int, *, durable: bool = False) -> None:
    with atomic_folder(output_dir, replace=True, durable=durable) as folder:
        for name in FILES:
            (folder / name).write_text(str(generation))


def generation_of(output_dir: Path) -> int:
    """Return the one generation of all files; the folder must be whole."""
    assert sorted(path.name for path in output_dir.iterdir()) == FILES
    generations = {(output_dir / name).read_text() for name in FILES}
    assert len(generations) == 1
    return int(generations.pop())


def replace_and_die(output_dir: Path, fatal_step: int) -> None:
    """Replace once; the process is killed right before a certain one of the steps that change names or remove."""
    steps = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == fatal_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **options)

        return run

    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    os.unlink = counted(os.unlink)  # each file of the old folder
    os.rmdir = counted(os.rmdir)
    write_generation(output_dir, 1)
    os._exit(0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("between_renames", [False, True])
def test_error_leaves_nothing_new_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between_renames: bool
) -> None:
    write_generation(tmp_path / "out", 0)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and target.name == "out":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "a").write_text("new")
        if not between_renames:
            raise KeyboardInterrupt
    assert generation_of(tmp_path / "out") == 0
    assert names(tmp_path) == ["out"]


def test_folder_appears_at_the_end_without_a_file_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "stale").write_text("old")
        assert not out.exists()
    assert names(out) == ["stale"]
    write_generation(out, 1)
    assert generation_of(out) == 1
    remove_folder(out)
    assert names(tmp_path / "deep") == []


def test_taken_name_is_refused_and_an_empty_folder_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full" / "sub").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for taken in ("file", "full"):
        with pytest.raises(FileExistsError, match=taken), atomic_folder(tmp_path / taken):
            pass
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "empty") == ["a"]


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.json"
    write_text_atomic(path, "old\n")
    write_text_atomic(path, "naïve\n")
    fill_disk(monkeypatch)
    with pytest.raises(WriteError, match=f"{path}.*No space left"):
        write_bytes_atomic(path, b"new content")
    assert path.read_bytes() == "naïve\n".encode()
    assert names(path.parent) == ["a.json"]


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EDQUOT, "quota", "hidden"), WriteError),
        (SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"), WriteError),
        (Exception(f"{FULL} (os error 28)"), WriteError),  # of tokenizers
        (FileNotFoundError(errno.ENOENT, "no such file"), FileNotFoundError),
        (DataError(f"of this library, {FULL}"), DataError),
        (ValueError("another"), ValueError),
    ],
)
def test_a_full_disk_is_one_error_whichever_library_writes(
    tmp_path: Path, error: Exception, expected: type[Exception]
) -> None:
    out = tmp_path / "out"
    write_generation(out, 0)
    with pytest.raises(expected) as caught, atomic_folder(out, replace=True) as folder:
        (folder / "part0").write_text("1")
        raise error
    if expected is WriteError:
        assert isinstance(caught.value, WhisperASRError)
        assert str(out) in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # to other processes
    assert generation_of(out) == 0
    assert names(tmp_path) == ["out"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, also in the background, where processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_a_step_that_must_not_be_cut(tmp_path: Path) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    write_generation(tmp_path / "out", 0)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        write_generation(tmp_path / "out", 1)
    assert generation_of(tmp_path / "out") == 1
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_generation(tmp_path / "disk" / "real", 0)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "real")
    write_generation(out, 1)
    assert out.is_symlink()
    assert generation_of(out) == 1
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["real"]


def test_what_was_made_inside_of_another_folder_is_removed_with_it(tmp_path: Path) -> None:
    inner = f"..out.{DEAD}.01.partial.{DEAD}.02.partial"
    for name in (f".out.{DEAD}.01.partial", inner):
        write_generation(tmp_path / name, 0)
    assert read_hidden_name(tmp_path / inner) == (tmp_path / "out", "partial", False)
    recover_folder(tmp_path / "out")
    assert names(tmp_path) == []


def test_any_name_of_a_file_can_be_written_and_is_cleaned_up_after(tmp_path: Path) -> None:
    for name in ("a" * 250, "\u5b57" * 83, "caf\udce9", "line\nend"):
        write_text_atomic(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    long = tmp_path / ("\u5b57" * 80)
    write_generation(long, 1)
    digest = hashlib.sha256(os.fsencode(long.name)).hexdigest()
    long.rename(tmp_path / f".{long.name[:50]}-{digest[:8]}.{DEAD}.0.replaced")
    recover_folder(long)
    assert (long / FILES[0]).read_text() == "1"


def test_texts_that_utf_8_cannot_hold_are_written_as_escapes(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "half \ud83d")
    assert (tmp_path / "a.txt").read_text() == r"half \ud83d"
    row = {"key": "half \ud83d, \u2028 \u2029 \x85 \r\n", "numbers": [1, math.nan, {"inf": math.inf}], "path": tmp_path}
    line = json_line(row)
    assert len(line.decode().splitlines()) == 1
    assert parse_json(line) == {**row, "numbers": [1, None, {"inf": None}], "path": str(tmp_path)}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, "{", b"\xff"])
def test_whatever_is_wrong_with_json_is_one_kind_of_error(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=r"a\.json: not a list .*; remove it"):
        read_json(path, list, what="a list", fix="remove it")
    with pytest.raises(DataError, match=r"a\.json, line 1: not a row of a run"):
        read_run_rows(path, key="event")


def test_json_is_read_back_and_wrong_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"naïve": 1})
    assert read_json(path, dict, what="x", fix="y") == {"naïve": 1}
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for content in ("{", "3"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"a\.json"):
            read_json(path, dict, what="settings", fix="remove it")
    for unusable in (path / "b.json", tmp_path):
        with pytest.raises(DataError, match=str(unusable)):
            read_json(unusable, dict, what="x", fix="y")
        with pytest.raises(DataError, match=str(unusable)):
            write_json(unusable, 1)


def claim_here(lock: Path, *, shared: bool = True) -> Callable[[], object]:
    return claim(lock, claim_here, what=lock, error=DataError, fix="take another", shared=shared)


def test_one_process_writes_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / ".lock"
    with held(lock) as process, pytest.raises(DataError, match=rf"{lock}: process {process} \(.*, or take another"):
        claim_here(lock)
    assert lock.exists()  # of a killed process
    first = claim_here(lock)
    assert f"process {os.getpid()} " in lock.read_text()
    second = claim_here(lock)  # another object of this process
    first()
    first()
    with pytest.raises(DataError, match=f"process {os.getpid()} "):
        claim_here(lock, shared=False)
    second()
    assert names(lock.parent) == []
    for content in ("", "\0\ud800", "process 1 (init)"):  # a file alone is no lock
        lock.write_text(content, errors="surrogatepass")
        claim_here(lock)()
    assert names(lock.parent) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=str(tmp_path / "file")):
        claim_here(tmp_path / "file" / ".lock")


@can_fork
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, 524])
def test_where_the_file_system_has_no_locks_work_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "a" / "x.lock"):
        pass
    owner = logging.getLogger()
    claim(tmp_path / LOCK, owner, what=tmp_path, error=DataError, fix="wait")()
    assert "has no locks" in caplog.text
    assert [*tmp_path.rglob("*lock")] == []


def test_a_forked_process_neither_holds_nor_gives_back_its_parents_lock(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    give_back = claim_here(lock)
    child = multiprocessing.get_context("fork").Process(target=give_back)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert lock.exists()
    with pytest.raises(DataError):
        claim_here(lock, shared=False)
    give_back()
    assert not lock.exists()


@can_fork
def test_kill_at_any_step_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    seen: list[int] = []
    for fatal_step in range(1, 30):
        out = tmp_path / str(fatal_step) / "out"
        write_generation(out, 0)
        process = multiprocessing.get_context("fork").Process(target=replace_and_die, args=(out, fatal_step))
        process.start()
        process.join()
        assert all(generation_of(folder) == 0 for folder in out.parent.glob(".*.replaced"))
        recover_folder(out)
        seen.append(generation_of(out))
        assert names(out.parent) == ["out"]
        if process.exitcode == 0:  # it lived through all of its steps
            break
    assert process.exitcode == 0
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_newest_replaced_folder_is_restored_and_other_remains_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for generation, name in enumerate([f".out.{DEAD}.01.replaced", f".out.{DEAD}.00.replaced"]):
        write_generation(tmp_path / name, generation)
        time.sleep(0.02)  # the clock of a file system ticks every few ms
    write_generation(tmp_path / f".out.{DEAD}.02.partial", 7)
    (tmp_path / f".out.{DEAD}.03.partial").write_text("of a file")
    others = [f".out.more.{DEAD}.00.partial", ".out.txt", "out.1.00.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    recover_folder(out)
    assert generation_of(out) == 1
    write_generation(tmp_path / f".out.{DEAD}.00.replaced", 0)
    recover_folder(out)  # the one that is there stays
    recover_folder(tmp_path / "absent" / "out")
    assert generation_of(out) == 1
    assert names(tmp_path) == sorted([*others, "out"])


def test_hidden_folders_of_running_processes_stay_unless_an_earlier_one_had_the_id(tmp_path: Path) -> None:
    out, others = tmp_path / "out", tmp_path / f".out.{os.getppid()}.00.replaced"
    others.mkdir()
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        recover_folder(out)
    assert names(tmp_path) == sorted([others.name, "out"])
    remove_folder(out)
    write_generation(tmp_path / f".out.{os.getpid()}.00.replaced", 3)  # before a container started again
    recover_folder(out)
    assert generation_of(out) == 3


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")
def test_durable_writes_sync_content_before_the_name_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync
    (tmp_path / "nested" / "sub").mkdir(parents=True)
    (tmp_path / "nested" / "sub" / "broken").symlink_to(tmp_path / "nowhere")

    def recorded(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", recorded)
    write_generation(tmp_path / "out", 0)
    assert synced == []
    write_generation(tmp_path / "out", 1, durable=True)
    assert sorted(synced[: len(FILES)]) == FILES
    assert synced[len(FILES)].endswith(".partial")
    assert synced[len(FILES) + 1 :] == [tmp_path.name]
    fsync_folder(tmp_path / "nested")  # a link is not followed
    assert synced[-2:] == ["sub", "nested"]
    synced.clear()
    write_text_atomic(tmp_path / "a.json", "1", durable=True)
    assert synced[0].startswith(".a.json.")
    assert synced[1:] == [tmp_path.name]


def test_the_spelling_map_is_that_of_openai_whisper_and_read_only() -> None:
    file = ROOT / "src" / "utils" / "english_spelling.json"
    assert sha256_of(file) == "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465"
    spelling = load_english_spelling()
    assert len(spelling) == 1739
    assert (spelling["colour"], spelling["accessorise"]) == ("color", "accessorize")
    with pytest.raises(TypeError):
        spelling["colour"] = "x"  # type: ignore[index]
