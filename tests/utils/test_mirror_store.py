"""What a mirror's target holds after a crash at any step, and what is never deleted from it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src.utils import mirror_store
from src.utils.colab import Pace
from src.utils.mirror_store import LEDGER, MirrorStore

STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "write_text")


class Crash(BaseException):
    """The process ends here: nothing more reaches the drive."""


def save(folder: Path, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model").write_text(content * 100)
    (folder / "config").write_text(content)
    return folder


def text_of(folder: Path) -> str | None:
    """The content of a whole copy, None if there is none; half a copy fails."""
    if not folder.exists():
        return None
    content = (folder / "config").read_text()
    assert (folder / "model").read_text() == content * 100
    return content


def below(target: Path) -> list[str]:
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.name != LEDGER)


def store_of(target: Path) -> MirrorStore:
    return MirrorStore(target, Pace())


def die(store: MirrorStore) -> None:
    """As the end of its process: its unfinished work becomes a left-over."""
    mirror_store._live_owners.discard(store._owner)


class Countdown:
    """Lets some steps that change the target happen, then ends the process; afterwards every step fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
        self.left = float("inf")
        for name in STEPS:
            monkeypatch.setattr(Path, name, self._counted(getattr(Path, name), target))
        monkeypatch.setattr(shutil, "rmtree", self._counted(shutil.rmtree, target))
        monkeypatch.setattr(os, "truncate", self._counted(os.truncate, target))

    def _counted(self, step: Callable[..., object], target: Path) -> Callable[..., object]:
        def counted(path: Path, *args: object, **kwargs: object) -> object:
            if Path(path).is_relative_to(target):
                self.left -= 1
                if self.left < 0:
                    raise Crash
            return step(path, *args, **kwargs)

        return counted


def test_a_crash_at_any_step_leaves_a_whole_copy_that_the_next_start_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(monkeypatch, tmp_path)
    source = save(tmp_path / "best", "a")
    n_steps, outcomes = 0, set()
    while True:
        target = tmp_path / f"drive-{n_steps}"
        countdown.left = float("inf")
        save(source, "a")
        first = store_of(target)
        first.put(source, "run/best")
        save(source, "b")
        countdown.left = n_steps
        try:
            first.put(source, "run/best")
            break
        except Crash:
            countdown.left = float("inf")
        die(first)
        second = store_of(target)
        found = text_of(target / "run" / "best")
        outcomes.add(found)
        assert found in ("a", "b"), n_steps
        assert below(target) == ["run", "run/best", "run/best/config", "run/best/model"], n_steps
        save(source, "c")
        second.put(source, "run/best")  # it is still known as ours
        assert text_of(target / "run" / "best") == "c"
        n_steps += 1
    assert outcomes == {"a", "b"}
    assert n_steps > 15


def test_a_crash_at_any_step_of_pruning_ends_in_whole_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    countdown = Countdown(monkeypatch, tmp_path)
    sources = [save(tmp_path / f"c-{i}", str(i)) for i in range(3)]
    n_steps = 0
    while True:
        target = tmp_path / f"drive-{n_steps}"
        countdown.left = float("inf")
        first = store_of(target)
        for source in sources:
            first.put(source, source.name, group="checkpoints")
        countdown.left = n_steps
        try:
            first.prune("checkpoints", 1)
            break
        except Crash:
            countdown.left = float("inf")
        die(first)
        second = store_of(target)
        assert [text_of(target / f"c-{i}") for i in (0, 1, 2)][-1] == "2"
        assert not [path for path in target.iterdir() if path.name.startswith(".") and path.name != LEDGER]
        second.prune("checkpoints", 1)
        assert below(target) == ["c-2", "c-2/config", "c-2/model"]
        n_steps += 1
    assert n_steps > 10


def test_a_crash_during_the_recovery_from_a_crash_is_recovered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(monkeypatch, tmp_path)
    whole, target = tmp_path / "whole", tmp_path / "drive"
    source = save(tmp_path / "best", "a")
    store_of(whole).put(source, "best")
    save(source, "b")
    n_recoveries = 0
    for n_steps in range(100):
        for n_recovery_steps in range(100):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(whole, target)
            first = store_of(target)
            countdown.left = n_steps
            try:
                first.put(source, "best")
            except Crash:
                die(first)
            else:
                assert n_recoveries > 50
                return
            countdown.left = n_recovery_steps
            try:
                store_of(target)
                break
            except Crash:
                n_recoveries += 1
            finally:
                countdown.left = float("inf")
                mirror_store._live_owners.clear()
            third = store_of(target)
            content = text_of(target / "best")
            ledger = mirror_store._Ledger.model_validate_json((target / LEDGER).read_bytes())
            assert content in ("a", "b")
            assert below(target) == ["best", "best/config", "best/model"]
            assert ledger.pending == {}
            assert ledger.folders["best"].files == {"config": 1, "model": 100}
            assert ledger.folders["best"].order == (1 if content == "a" else 2), (n_steps, n_recovery_steps)
            third.close()


def test_a_failed_second_rename_puts_the_last_good_copy_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "drive")
    store.put(save(tmp_path / "best", "a"), "best")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            store.put(save(tmp_path / "best", "b"), "best")
        assert text_of(tmp_path / "drive" / "best") == "a"
    store.put(tmp_path / "best", "best")
    assert text_of(tmp_path / "drive" / "best") == "b"
    assert below(tmp_path / "drive") == ["best", "best/config", "best/model"]


def test_what_the_mirror_did_not_write_is_never_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "drive"
    store = store_of(target)
    outside = tmp_path / "outside"
    outside.write_text("outside")
    for name in ("c-0", "c-1"):
        store.put(save(tmp_path / name, name), name, group="checkpoints")
    foreign = save(target / "c-7", "foreign")
    save(target / ".c-1.0123456789abcdef.partial", "looks like ours")
    (target / "c-0" / "notes.txt").write_text("mine")
    (target / "c-0" / "link").symlink_to(outside)
    (target / "c-0" / "config").write_text("edited by hand")
    os.link(target / "c-0" / "model", tmp_path / "kept_model")
    store.put(save(tmp_path / "c-2", "2"), "c-2", group="checkpoints")
    assert store.prune("checkpoints", 1) == ["c-0", "c-1"]
    assert text_of(foreign) == "foreign"
    assert text_of(target / ".c-1.0123456789abcdef.partial") == "looks like ours"
    (kept,) = target.glob("c-0.kept-*")
    assert (kept / "notes.txt").read_text() == "mine"
    assert (kept / "config").read_text() == "edited by hand"
    assert (kept / "link").is_symlink()
    assert outside.read_text() == "outside"
    assert (tmp_path / "kept_model").read_text() == "c-0" * 100
    assert sorted(path.name for path in kept.iterdir()) == ["config", "link", "notes.txt"]
    assert "delete it yourself" in caplog.text
    store.close()
    again = store_of(target)
    assert again.prune("checkpoints", 1) == []


def test_a_folder_that_the_user_deleted_does_not_count(tmp_path: Path) -> None:
    target = tmp_path / "drive"
    store = store_of(target)
    for i in range(3):
        store.put(save(tmp_path / f"c-{i}", str(i)), f"c-{i}", group="checkpoints")
    shutil.rmtree(target / "c-2")
    assert store.prune("checkpoints", 2) == []
    assert below(target)[0] == "c-0"


def test_a_second_mirror_leaves_the_firsts_unfinished_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "drive"
    first = store_of(target)
    source, other = save(tmp_path / "best", "a"), save(tmp_path / "other", "a")
    check = mirror_store._check_source

    def meanwhile(*args: object) -> None:
        monkeypatch.setattr(mirror_store, "_check_source", check)
        second = store_of(target)  # a notebook cell that is run again
        second.put(other, "other")

    monkeypatch.setattr(mirror_store, "_check_source", meanwhile)
    first.put(source, "best")
    assert text_of(target / "best") == text_of(target / "other") == "a"
    third = store_of(target)
    third.put(save(other, "b"), "other")
    third.put(save(source, "b"), "best")
    assert text_of(target / "best") == text_of(target / "other") == "b"


@pytest.mark.parametrize(
    "text", ["{", '{"format": 9}', '{"folders": {"../x": {"group": null, "order": 1, "files": {}}}}']
)
def test_a_damaged_ledger_is_set_aside_and_nothing_it_listed_is_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    target = tmp_path / "drive"
    store = store_of(target)
    store.put(save(tmp_path / "c-0", "0"), "c-0", group="checkpoints")
    store.close()
    (target / LEDGER).write_text(text)
    again = store_of(target)
    assert "is damaged" in caplog.text
    assert [path.read_text() for path in target.glob(f"{LEDGER}.damaged-*")] == [text]
    again.put(save(tmp_path / "c-1", "1"), "c-1", group="checkpoints")
    assert again.prune("checkpoints", 1) == []
    assert text_of(target / "c-0") == "0"


def test_left_overs_that_cannot_be_cleaned_up_do_not_stop_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    target = tmp_path / "drive"
    first = store_of(target)
    first._begin("best")
    die(first)

    def refuse(path: Path, *args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        store_of(target)
    assert "left-overs of a crash stay for now" in caplog.text
