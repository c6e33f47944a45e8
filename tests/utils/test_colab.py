from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import pytest

from src.utils import colab
from src.utils.errors import WhisperASRError


@pytest.fixture
def fake_colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The narrowest stand-in for Colab: `google.colab.drive.mount`, which makes a folder."""
    drive = ModuleType("google.colab.drive")
    drive.mount = lambda point: (Path(point) / "MyDrive").mkdir(parents=True, exist_ok=True)  # type: ignore[attr-defined]
    package = ModuleType("google.colab")
    package.drive = drive  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("google.colab", None)
    google = ModuleType("google")
    google.__spec__, google.__path__ = ModuleSpec("google", None), []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "drive")
    return drive


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "best model"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (folder / "nested" / "config.json").write_text("{}")
    return folder


def test_mounting_outside_colab_is_refused() -> None:
    assert not colab.in_colab()
    with pytest.raises(WhisperASRError, match="Colab"):
        colab.mount_drive("whisper_asr")


def test_mounting_in_colab_gives_the_folder(fake_colab: ModuleType, tmp_path: Path) -> None:
    assert colab.in_colab()
    assert colab.mount_drive("whisper_asr") == tmp_path / "drive" / "MyDrive" / "whisper_asr"
    assert colab.mount_drive("whisper_asr").is_dir()  # the cell may be run again


def test_a_refused_mount_says_what_to_do(fake_colab: ModuleType) -> None:
    def refuse(point: str) -> None:
        raise ValueError("mount failed")

    fake_colab.mount = refuse  # type: ignore[attr-defined]
    with pytest.raises(WhisperASRError, match="mount failed"):
        colab.mount_drive("whisper_asr")


def test_a_folder_is_copied_whole_and_only_once(model_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "drive"
    (target).mkdir()
    (target / "notes.txt").write_text("mine")
    assert colab.copy_verified(model_folder, target) == 256 * 5000 + 2
    assert colab.copy_verified(model_folder, target) == 0
    assert (target / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert sorted(p.name for p in target.rglob("*")) == ["config.json", "model.safetensors", "nested", "notes.txt"]


def test_a_copy_that_differs_is_refused_and_the_old_one_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "drive"
    target.mkdir()
    (target / "model.safetensors").write_text("the last good copy")
    monkeypatch.setattr(colab, "_write_block", lambda writer, block: writer.write(block[:100]))
    with pytest.raises(WhisperASRError, match="differs"):
        colab.copy_verified(model_folder, target)
    assert (target / "model.safetensors").read_text() == "the last good copy"


def test_a_full_target_is_named(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: BinaryIO, block: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(colab, "_write_block", full)
    with pytest.raises(WhisperASRError, match="No space left"):
        colab.copy_verified(model_folder, tmp_path / "drive")
    with pytest.raises(WhisperASRError, match="absent"):
        colab.copy_verified(tmp_path / "absent", tmp_path / "drive")


def test_a_path_on_an_unmounted_drive_is_told_from_a_local_one(fake_colab: ModuleType, tmp_path: Path) -> None:
    assert colab.is_on_unmounted_drive(tmp_path / "drive" / "MyDrive" / "whisper_asr")
    assert not colab.is_on_unmounted_drive(tmp_path / "drive2")


def test_a_session_starts_with_what_colab_lacks_and_drive_if_it_is_wanted(
    fake_colab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    code = 0

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    assert colab.start_session() is None
    assert colab.start_session("whisper_asr") == tmp_path / "drive" / "MyDrive" / "whisper_asr"
    assert [command[1:4] for command in commands] == [["-m", "pip", "install"]] * 2
    code = 1
    with pytest.raises(WhisperASRError, match=r"requirements\.txt"):
        colab.start_session()


def test_a_session_elsewhere_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert colab.start_session() is None
