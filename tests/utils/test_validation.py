from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.utils import validation
from src.utils.config import Config
from src.utils.errors import ConfigError
from src.utils.validation import Check, CheckReport, EnvironmentReport, check_disk, environment_report, run_check

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"HF_TOKEN": "hf_NobodyMaySeeThis", "WANDB_API_KEY": "0123456789abcdef-NorThis"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnvironmentReport]:
    """Of the real environment, with tokens in it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        yield environment_report(Config.model_validate({"paths": {"runs_dir": home, "checkpoints_dir": home / "new"}}))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let packages have other versions than they have; None: not installed."""
    real = importlib.metadata.version

    def change(**versions: str | None) -> None:
        def version(name: str) -> str:
            found = versions.get(name, real(name) if name not in versions else None)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return change


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module before the real one, in new processes and in this one."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return put


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_environment_of_the_tests_is_in_order(report: EnvironmentReport) -> None:
    assert report.ok, report.to_text()
    checks = by_name(report.checks)
    assert {"Python", "packages", "torch", "torchaudio", "GPU", "FFmpeg", "microphone", "RAM", "runs"} <= set(checks)
    fit, needed = re.findall(r"\d+", checks["packages"].found)[:2]
    assert fit == needed


def test_tokens_are_seen_and_never_shown(report: EnvironmentReport) -> None:
    everything = report.to_text() + report._repr_html_() + repr(report)
    for name, value in SECRETS.items():
        assert by_name(report.checks)[name] == Check(name, "ok", "present in the environment")
        assert value not in everything


def test_absent_and_old_packages_are_errors_with_their_command(installed: Callable[..., None]) -> None:
    installed(jiwer=None, av="13.1.0", tqdm="4.68.0")
    checks = by_name(validation._check_packages())
    needed = validation.read_requirements("requirements.txt")
    for name in ("jiwer", "av"):
        assert checks[name].status == "error"
        assert checks[name].fix == f'pip install "{needed[name]}" -c constraints.txt'
    assert checks["packages"].status == "ok"
    assert "tqdm 4.68.0 (4.67.3)" in checks["packages"].found


@pytest.mark.parametrize(
    ("build", "fix"),
    [
        ("2.14.0", "pip install torch==2.11.0 torchaudio==2.11.0"),
        ("2.11.0+cpu", "pip uninstall -y torch torchaudio && pip install torch==2.11.0 torchaudio==2.11.0"),
    ],
)
def test_a_torchaudio_that_does_not_fit_torch_is_found(
    build: str, fix: str, stub: Callable[[str, str], None], installed: Callable[..., None]
) -> None:
    installed(torch=build, torchaudio="2.11.0")
    no = "is_available=lambda: False"
    stub(
        "torch",
        f"from types import SimpleNamespace as N\n__version__ = {build!r}\nversion = N(cuda=None)\n"
        f"cuda = N({no}, device_count=lambda: 0)\nbackends = N(mps=N({no}))\n",
    )
    stub("torchaudio", "raise OSError('libcudart.so.13: cannot open shared object file')")
    checks = by_name(validation._check_torch())
    assert checks["torch"].status == "ok"
    assert checks["torchaudio"].status == "error"
    assert "libcudart.so.13" in checks["torchaudio"].found
    assert checks["torchaudio"].fix == fix
    stub("torch", "import os; os.abort()")
    (check,) = validation._check_torch()
    assert (check.name, check.status) == ("torch", "error")


TORCH_STUB = """
from types import SimpleNamespace as N
__version__ = {build!r}
version = N(cuda={cuda!r})
gpu = N(name="Tesla T4", total_memory=15e9, major=7)
cuda = N(is_available=lambda: {gpu}, device_count=lambda: 1, get_device_properties=lambda index: gpu)
backends = N(mps=N(is_available=lambda: False))
"""


@pytest.mark.parametrize(
    ("build", "colab", "status", "fix"),
    [
        ("2.14.0", False, "absent", "none is made for torch 2.14; nothing else needs it"),
        ("2.11.0", False, "absent", 'pip install --no-deps "torchaudio==2.11.*"'),
        ("2.10.0+cu128", False, "absent",
         'pip install --no-deps "torchaudio==2.10.*" --index-url https://download.pytorch.org/whl/cu128'),
        ("2.14.0+cu130", True, "error", "pip uninstall -y torchaudio"),
    ],
)  # fmt: skip
def test_an_absent_torchaudio_is_no_error_and_colabs_torch_stays(
    build: str, colab: bool, status: str, fix: str, stub: Callable[[str, str], None], installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    installed(torch=build, torchaudio="2.11.0" if colab else None)
    monkeypatch.setattr(validation, "in_colab", lambda: colab)
    stub("torch", TORCH_STUB.format(build=build, cuda=None, gpu=False))
    stub("torchaudio", "raise ImportError('no torchaudio')")
    check = by_name(validation._check_torch())["torchaudio"]
    assert (check.status, check.fix) == (status, fix)
    assert "torchaudio" not in by_name(validation._check_packages())


def test_cuda_13_and_a_gpu_without_bfloat16_are_found(
    stub: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "ctranslate2_cuda_problem", lambda: "its process ended with exit code -6")
    stub("torch", TORCH_STUB.format(build="2.14.0+cu130", cuda="13.0", gpu=True))
    stub("ctypes", "def CDLL(name): raise OSError(name + ': cannot open shared object file')")
    checks = by_name(validation._check_torch())
    assert checks["CTranslate2"].status == "warning"
    assert "CUDA 13.0: libcublas.so.12" in checks["CTranslate2"].found
    assert checks["CTranslate2"].fix.startswith("pip install nvidia-cublas-cu12")
    assert checks["bfloat16"].status == "ok"
    asked = Config.model_validate({"precision": "bfloat16"})
    refused = by_name(validation._check_torch(asked))["bfloat16"]
    assert (refused.status, refused.fix) == ("error", "precision: auto")


def test_a_broken_onnxruntime_is_an_error_with_its_command(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(**{"onnxruntime-gpu": "1.27.0"})
    (both,) = validation._check_onnxruntime()
    assert both.status == "warning" and "uninstall -y onnxruntime onnxruntime-gpu" in both.fix
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (check,) = validation._check_onnxruntime()
    assert check.status == "error" and check.fix.startswith("pip uninstall -y onnxruntime")


def test_drives_quota_is_compared_with_what_a_run_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = types.SimpleNamespace(is_mount=lambda: True)
    monkeypatch.setattr(validation, "MOUNT_POINT", point)
    monkeypatch.setattr(validation, "in_colab", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1e9))
    checks = by_name(validation._check_drive(Config()))
    assert checks["Google Drive"].status == "ok"
    assert checks["Drive's quota"].status == "warning"
    assert "drive.google.com" in checks["Drive's quota"].fix


def test_folders_that_cannot_be_written_are_errors() -> None:
    config = Config.model_validate({"paths": {"cache_dir": "/proc/1/cache"}})
    (check,) = validation._check_folders(config)
    assert (check.name, check.status) == ("paths.cache_dir", "error")


def test_a_gpu_is_named_and_its_absence_comes_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(**found: Any) -> Check:
        return validation._judge_gpu({"torch": "2.11.0", "cuda": "13.0", "mps": False, "gpus": [], **found})

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert gpu(gpus=[["Tesla T4", 15_828.3, 7]]) == Check("GPU", "ok", "Tesla T4, 15,828 MB")
    assert gpu(mps=True).status == "ok"
    assert gpu().status == "absent"
    monkeypatch.setattr(validation, "in_colab", lambda: True)
    assert gpu().fix == "Runtime > Change runtime type > T4 GPU"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert gpu().status == "warning"


@pytest.mark.parametrize("problem", [None, "RuntimeError: Library libcublas.so.12 is not found"])
def test_the_doctor_says_whether_ctranslate2_works_on_the_gpu(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = '{"torch": "2.11.0", "cuda": "13.0", "mps": false, "gpus": [["L4", 22000, 8]], "torchaudio": "2.11.0"}'
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, found, ""))
    monkeypatch.setattr(validation, "ctranslate2_cuda_problem", lambda: problem)
    check = list(validation._check_torch())[-1]
    assert check.name == "CTranslate2"
    assert (check.status, "nvidia-cublas-cu12" in check.fix) == (
        ("ok", False) if problem is None else ("warning", True)
    )


def test_a_microphone_needs_sounddevice_and_portaudio(
    stub: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("sounddevice", "raise OSError('PortAudio library not found')")
    (check,) = validation._check_microphone()
    assert (check.status, check.fix) == ("absent", "sudo apt-get install libportaudio2")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    (check,) = validation._check_microphone()
    assert (check.status, check.fix) == ("absent", "pip install sounddevice")


def test_colabs_secrets_are_asked_and_a_refusal_is_an_absence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    assert {check.status for check in validation._check_tokens()} == {"absent"}
    errors = types.SimpleNamespace(Error=LookupError)
    for refusal in (PermissionError, LookupError):

        def get(name: str, refusal: type[Exception] = refusal) -> str:
            if name == "WANDB_API_KEY":
                raise refusal(name)
            return SECRETS[name]

        userdata = types.SimpleNamespace(get=get, NotebookAccessError=PermissionError)
        monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(errors=errors, userdata=userdata))
        checks = by_name(validation._check_tokens())
        assert checks["HF_TOKEN"].found == "present in Colab's secrets"
        assert checks["WANDB_API_KEY"].status == "absent"


def test_a_full_disk_is_a_warning_with_its_command(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e6
    assert check_disk("disk", tmp_path / "not" / "yet", free / 2).status == "ok"
    assert check_disk("disk", tmp_path / "not" / "yet", free * 2).fix


def test_unfinished_files_of_earlier_runs_show(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"paths": {"runs_dir": tmp_path, "checkpoints_dir": tmp_path, "cache_dir": tmp_path}}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "run" / f".report.html.{2**22 + 1}.0a1b.partial").touch()
    checks = by_name(validation._check_kept(config))
    assert checks["runs"].found.startswith("1 ")
    assert checks["unfinished files"].status == "warning"


def test_a_check_that_fails_says_so_under_its_name_and_hides_no_other() -> None:
    def broken() -> Iterator[Check]:
        yield Check("half", "ok", "seen")
        raise AttributeError("no such thing\nand more")

    def wrong() -> Iterator[Check]:
        raise ConfigError("2 problems:\n  - a\n  - b")

    assert run_check("Drive", broken) == [Check("Drive", "error", "cannot be checked: AttributeError: no such thing")]
    assert run_check("config", wrong)[0].found.endswith("- b")


def test_a_report_reads_as_text_and_shows_in_light_and_dark_notebooks() -> None:
    report = CheckReport((Check("a", "ok", "fine"), Check("bcd", "error", "<3.11", 'pip install "x>=1"')))
    assert not report.ok
    text, html = report.to_text(), report._repr_html_()
    assert text.splitlines()[-1].endswith('pip install "x>=1"')
    assert "&lt;3.11" in html and "pip install &quot;x&gt;=1&quot;" in html
    assert "color" not in html


def test_the_doctor_works_with_a_broken_torch_and_ends_with_1(stub: Callable[[str, str], None]) -> None:
    stub("torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    done = run_doctor("--profile", "demo")
    assert done.returncode == 1, done.stderr
    assert "OSError: libtorch_cpu.so" in done.stdout
    assert "fix: pip install torch==2.11.0 torchaudio==2.11.0" in done.stdout
    assert {"to start from", "config", "RAM"} <= {line.strip()[8:23].strip() for line in done.stdout.splitlines()}
    assert not any(value in done.stdout + done.stderr for value in SECRETS.values())


@pytest.mark.parametrize("package", ["numpy", "psutil", "pydantic", "yaml"])
def test_a_broken_package_hides_no_other_check(package: str, stub: Callable[[str, str], None]) -> None:
    stub(package, "raise ImportError('broken on purpose')")
    stub("torch", "raise ImportError('no torch, which takes seconds')")
    done = run_doctor()
    assert done.returncode == 1, done.stderr
    assert {"Python", "packages", "torch", "HF_TOKEN"} <= {line[10:24].strip() for line in done.stdout.splitlines()}
    assert "broken on purpose" in done.stdout


def test_the_doctor_names_what_its_own_import_lacks(stub: Callable[[str, str], None]) -> None:
    stub("lazy_loader", "raise ModuleNotFoundError('absent', name='lazy_loader')")
    done = run_doctor()
    assert done.returncode == 1
    assert done.stdout.startswith("error: lazy_loader is not installed\nfix: pip install -r requirements.txt")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("make -s doctor PYTHON=/no/python", "Environment|Checks|not installed"),  # python3 answers instead
        ("HOME=/proc/1 {python} scripts/doctor.py", "paths.cache_dir"),
    ],
)
def test_the_doctor_answers_in_a_broken_environment(command: str, said: str, stub: Callable[[str, str], None]) -> None:
    stub("torch", "raise ImportError('no torch, which takes seconds')")
    command = command.format(python=sys.executable)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert re.search(said, done.stdout), done.stderr
    assert "Traceback" not in done.stderr


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **SECRETS})
