from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from src.data.sources.archives import unpack
from src.data.sources.catalog import load_utterances
from src.utils.config import DataConfig
from src.utils.errors import DataError


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A folder of recordings."""
    folder = tmp_path / "speech" / "mine"
    folder.mkdir(parents=True)
    (folder / "a.wav").write_bytes(b"nothing is decoded here")
    (folder / "metadata.csv").write_text("file_name,text\na.wav,hello\n")
    return folder


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_a_packed_folder_is_the_folder(speech: Path, tmp_path: Path, kind: str) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), kind, speech.parent))
    (utterance,) = load_utterances(DataConfig(source="folder", path=archive))
    assert (utterance.id, utterance.text) == ("a.wav", "hello")
    folder = unpack(archive)
    (folder / "a.wav").unlink()
    assert unpack(archive) == folder  # once
    assert not (folder / "a.wav").exists()


def test_what_is_no_archive_stays_what_it_is(speech: Path, tmp_path: Path) -> None:
    assert unpack(speech) == speech
    assert unpack(speech / "a.wav") == speech / "a.wav"
    assert unpack(tmp_path / "absent.zip") == tmp_path / "absent.zip"


def test_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("mine/metadata.csv", "file_name,text\n")
        archive.writestr("__MACOSX/mine/._metadata.csv", "")
    assert unpack(tmp_path / "mac.zip").name == "mine"


def test_a_changed_archive_is_unpacked_again(speech: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", speech))
    before = unpack(archive)
    (speech / "b.wav").write_bytes(b"")
    shutil.make_archive(str(tmp_path / "packed"), "zip", speech)
    assert unpack(archive) != before
    assert (unpack(archive) / "b.wav").exists()


def test_a_cut_archive_is_named_and_leaves_nothing(speech: Path, tmp_path: Path) -> None:
    for kind in ("zip", "gztar"):
        archive = Path(shutil.make_archive(str(tmp_path / "cut"), kind, speech))
        archive.write_bytes(archive.read_bytes()[:-30])
        with pytest.raises(DataError, match=rf"{archive.name}: cannot be unpacked .*upload it again"):
            unpack(archive)
    assert not list((tmp_path / "tmp" / "whisper_asr_archives").iterdir())


def test_an_empty_archive_and_a_way_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(DataError, match=r"empty\.zip: the archive is empty"):
        unpack(tmp_path / "empty.zip")
    (tmp_path / "evil").write_text("")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.add(tmp_path / "evil", arcname="../../evil")
    with pytest.raises(DataError, match=r"evil\.tar: cannot be unpacked .*outside"):
        unpack(tmp_path / "evil.tar")
