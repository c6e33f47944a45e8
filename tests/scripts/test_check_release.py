"""The release check sees what a user of the badge would meet: a repository on the disk stands for the published one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.check_release import NOTEBOOK, check_release
from src.utils.validation import Check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "src" / "utils").mkdir(parents=True)
    for name in (NOTEBOOK, "README.md", "requirements.txt", "config.yaml", "src/utils/runtime.py"):
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q", "-b", "main")
    commit(folder)
    return folder


@pytest.fixture
def published(checkout: Path, tmp_path: Path) -> Path:
    git(checkout, "clone", "-q", "--bare", str(checkout), str(tmp_path / "published.git"))
    return tmp_path / "published.git"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "state")


def problems(checkout: Path, published: Path) -> dict[str, Check]:
    return {check.name: check for check in check_release(checkout, published.as_uri()) if check.status != "ok"}


def test_what_is_published_as_it_is_here_is_in_order(checkout: Path, published: Path) -> None:
    assert problems(checkout, published) == {}


def test_what_was_not_pushed_is_found(checkout: Path, published: Path) -> None:
    runtime = checkout / "src" / "utils" / "runtime.py"
    runtime.write_text(runtime.read_text().replace("def start_session(", "def begin_session("))
    (checkout / "requirements.txt").write_text("torch\n")
    found = problems(checkout, published)
    assert set(found) == {"start_session", "requirements.txt", "commit"}
    assert "push to main" in found["commit"].fix


def test_the_project_of_before_under_the_address_is_found(checkout: Path, tmp_path: Path) -> None:
    """Its notebook has a space in its name, and it has no start_session."""
    before = tmp_path / "before"
    before.mkdir()
    git(before, "init", "-q", "-b", "master")
    (before / "whisper_asr_colab .ipynb").write_text("{}")
    commit(before)
    found = problems(checkout, before)
    assert {"clone target", "start_session", NOTEBOOK, "commit"} <= set(found)
    assert found[NOTEBOOK].found == "is not there"


def test_a_badge_of_another_repository_and_an_absent_one_are_found(checkout: Path, tmp_path: Path) -> None:
    notebook = checkout / NOTEBOOK
    notebook.write_text(notebook.read_text().replace("github/jimmy00415/", "github/somebody/"))
    found = problems(checkout, tmp_path / "nowhere")
    assert set(found) == {"badge", "badge of README.md", "clone target"}
