from __future__ import annotations

import errno
from pathlib import Path

import pytest

from src.utils.atomic import atomic_folder, write_bytes_atomic, write_text_atomic


def test_folder_appears_at_the_end_with_its_content(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_error_leaves_nothing_new_and_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_replacing_leaves_no_file_of_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("old")
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_taken_name_is_refused(tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "out"
    if kind == "file":
        taken.write_text("x")
    else:
        (taken / "sub").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="out: exists already"), atomic_folder(taken):
        pass


def test_empty_folder_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "out" / "a").is_file()


def test_file_is_written_with_its_folder_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_text_atomic(path, "old\n")
    write_text_atomic(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")

    def half_then_full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_then_full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new content")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
