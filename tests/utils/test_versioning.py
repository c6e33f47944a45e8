from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest

from src.data.utterance import Utterance
from src.utils.data_versions import DatasetVersion, DataVersionManager
from src.utils.errors import DataError
from src.utils.versioning import get_git_revision


class Cell:
    def read(self) -> bytes:
        return b"sound of c"


@pytest.fixture
def clips(tmp_path: Path) -> list[Utterance]:
    (tmp_path / "a.wav").write_bytes(b"sound of a")
    return [
        Utterance("a", tmp_path / "a.wav", "one"),
        Utterance("b", b"sound of b", "two"),
        Utterance("c", Cell(), "three"),
    ]


@pytest.fixture
def manager(tmp_path: Path) -> DataVersionManager:
    return DataVersionManager(tmp_path / "versions")


def log(manager: DataVersionManager, clips: list[Utterance], version: str = "v1") -> DatasetVersion:
    return manager.log_dataset_version(dataset_name="calls", version=version, metadata={"rate": 8000}, utterances=clips)


def test_version_is_one_file_that_is_read_back_as_it_was(manager: DataVersionManager, clips: list[Utterance]) -> None:
    record = log(manager, clips)
    assert manager.versions() == [record]
    assert (record.clips, record.metadata) == (3, {"rate": 8000})
    assert record.git_revision == get_git_revision()
    assert datetime.fromisoformat(record.time).utcoffset() is not None
    [file] = manager.path.iterdir()
    assert json.loads(file.read_text())["checksum"] == record.checksum


def test_metadata_alone_can_be_logged_and_renewed(tmp_path: Path) -> None:
    for size in (1, 2):
        DataVersionManager(str(tmp_path)).log_dataset_version(dataset_name="d", version="1", metadata={"size": size})
    [record] = DataVersionManager(tmp_path).versions("d")
    assert (record.metadata, record.clips, record.checksum) == ({"size": 2}, 0, None)
    with pytest.raises(DataError, match="logged without its utterances"):
        DataVersionManager(tmp_path).verify("d", "1", [])


def test_checksum_goes_by_content_and_not_by_order_or_kind_of_source(
    manager: DataVersionManager, clips: list[Utterance]
) -> None:
    checksum = log(manager, clips).checksum
    as_bytes = [replace(clips[0], audio=b"sound of a"), *clips[1:]]
    assert log(manager, clips[::-1]).checksum == log(manager, as_bytes).checksum == checksum
    others = [
        clips[:2],
        [*clips, clips[0]],
        [replace(clips[0], text="One"), *clips[1:]],
        [replace(clips[0], audio=b"sound of x"), *clips[1:]],
        [replace(clips[0], text="two"), replace(clips[1], text="one"), clips[2]],
    ]
    checksums = [log(manager, other, f"v{i + 2}").checksum for i, other in enumerate(others)]
    assert len({checksum, *checksums}) == len(others) + 1


def test_same_version_with_other_content_is_refused_and_stays(
    manager: DataVersionManager, clips: list[Utterance]
) -> None:
    record = log(manager, clips)
    with pytest.raises(DataError, match=r"calls v1 was logged .* with other content \(3 clips, now 2\)"):
        log(manager, clips[:2])
    assert manager.versions() == [record]


def test_verify_lists_what_was_added_removed_and_changed(manager: DataVersionManager, clips: list[Utterance]) -> None:
    log(manager, clips)
    manager.verify("calls", "v1", clips[::-1])
    now = [replace(clips[0], text="one!"), clips[1], replace(clips[1], id="d")]
    changes = manager.compare("calls", "v1", now)
    assert (changes.added, changes.removed, changes.changed) == (("d",), ("c",), ("a",))
    with pytest.raises(DataError, match=r"not calls v1 any more:\n  - added: d\n  - removed: c\n  - changed: a"):
        manager.verify("calls", "v1", now)
    with pytest.raises(DataError, match="changed: a"):
        manager.verify("calls", "v1", [*clips, clips[0]])


def test_unknown_version_is_refused_with_a_hint(manager: DataVersionManager, clips: list[Utterance]) -> None:
    log(manager, clips)
    with pytest.raises(DataError, match=r"no such version .*; did you mean 'calls v1'"):
        manager.verify("calls", "v11", clips)


def test_versions_of_one_data_set_are_told_apart(manager: DataVersionManager) -> None:
    for name in ("a/b", "a_b", "A_B", "../up", "ü", "x" * 300):
        manager.log_dataset_version(dataset_name=name, version="1.0 (new)", metadata={})
    names = [file.name for file in manager.path.iterdir()]
    assert len({name.lower() for name in names}) == 6
    assert all(name.isascii() and len(name) < 200 and not set(name) & set("/\\ ()") for name in names)
    assert len(manager.versions()) == 6
    assert [record.dataset_name for record in manager.versions("a/b")] == ["a/b"]
    assert manager.versions("nothing") == []


def test_metadata_that_are_no_json_are_refused(manager: DataVersionManager) -> None:
    for value in (object(), float("nan")):
        with pytest.raises(DataError, match="calls v1: the metadata cannot be written as JSON"):
            manager.log_dataset_version(dataset_name="calls", version="v1", metadata={"x": value})
    assert not manager.path.exists()


def test_absent_recording_is_told_by_id(manager: DataVersionManager, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"utterance q \(.*gone\.wav\): cannot be read"):
        log(manager, [Utterance("q", tmp_path / "gone.wav", "text")])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"digests": {}}', '{"digests": {"a": 1}}'])
def test_damaged_file_is_told_by_name(manager: DataVersionManager, content: str) -> None:
    manager.path.mkdir()
    (manager.path / "odd.json").write_text(content)
    with pytest.raises(DataError, match=r"odd\.json: not a data set version"):
        manager.versions()


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, clips: list[Utterance]) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        log(DataVersionManager(tmp_path / "taken"), clips)


def test_any_class_with_id_text_and_audio_will_do(manager: DataVersionManager) -> None:
    @dataclass
    class Row:
        id: str
        text: str
        audio: bytes

    record = manager.log_dataset_version(
        dataset_name="rows", version="1", metadata={}, utterances=(Row(str(i), "t", b"s") for i in range(2))
    )
    assert record.clips == 2


def test_git_revision_is_the_commit_and_marks_changes(tmp_path: Path) -> None:
    assert get_git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for arguments in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    revision = get_git_revision(tmp_path)
    assert revision is not None
    assert len(revision) == 40
    (tmp_path / "a").write_text("2")
    assert get_git_revision(tmp_path) == f"{revision}+changes"
