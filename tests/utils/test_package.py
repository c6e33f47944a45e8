"""The package as pip installs it, in a folder of its own, used outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USE = """
import src
from src.data.sources.catalog import SAMPLE_CLIP, SAMPLE_PARQUET
from src.utils.config import former_keys, load_config, load_profiles
from src.utils.files import load_english_spelling, read_template
from src.utils.validation import read_requirements
from src.utils.versioning import get_git_revision

print(src.__file__)
assert SAMPLE_CLIP.is_file() and SAMPLE_PARQUET.is_file()
assert load_config(profile="demo").model.variant == "tiny.en"
assert "production" in load_profiles() and former_keys()
assert read_template("src.evaluation", "report.html") and read_template("src.inference", "record.js")
assert load_english_spelling() and read_requirements("requirements.txt") and read_requirements("constraints.txt")
assert get_git_revision() is None
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run(site: Path, folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_installed_finds_its_data_and_settings_anywhere(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, sys.executable, "-c", USE).strip() == str(installed / "src" / "__init__.py")


def test_every_command_is_a_script_of_its_name(installed: Path, tmp_path: Path) -> None:
    assert PROJECT["scripts"].keys() >= {"whisper-train", "whisper-evaluate", "whisper-transcribe", "whisper-serve"}
    for command, target in PROJECT["scripts"].items():
        script = installed / "scripts" / f"{command.removeprefix('whisper-').replace('-', '_')}.py"
        assert "\ndef main(" in script.read_text(), command
        assert target == ("scripts.doctor:main" if command == "whisper-doctor" else "scripts.command_line:run_command")
    shown = run(installed, tmp_path, str(installed / "bin" / "whisper-stream-client"), "--help")
    assert shown.startswith("usage: whisper-stream-client")


def test_the_wheel_holds_the_library_its_commands_and_what_they_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = {str(path.relative_to(ROOT)) for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    held = {name for name in names if ".dist-info/" not in name}
    assert held == kept | {f"src/{name}" for name in ("config.yaml", "constraints.txt", "requirements.txt")}


def test_requirements_and_locks_have_one_source() -> None:
    metadata = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    base = {re.split(r"[<>=]", line)[0].lower() for line in metadata if line}
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    demo = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements-demo.lock").read_text(), re.M)
    extras = {re.split(r"[<>=\[]", line)[0].lower()
              for lines in PROJECT["optional-dependencies"].values() for line in lines}  # fmt: skip
    assert {"demo", "serve", "onnx", "ggml", "trackers", "dev"} == PROJECT["optional-dependencies"].keys()
    assert base | extras <= pinned | {PROJECT["name"]}
    assert set(demo) <= set(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert base <= {name for name, _ in demo}
    assert not {"gradio", "wandb", "pytest", "triton"} & {name for name, _ in demo}
