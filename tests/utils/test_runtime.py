from __future__ import annotations

import os
import random
import subprocess
import sys
import types
import weakref
import zipfile
from importlib.machinery import ModuleSpec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from src.utils import runtime
from src.utils.errors import CheckpointError, DeviceError, OutOfMemoryError, WhisperASRError
from src.utils.runtime import public

ROOT = Path(__file__).resolve().parents[2]


def test_the_seed_reaches_every_library() -> None:
    drawn = []
    for _ in range(2):
        runtime.set_seed(7)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is in the wheels for Linux")
@pytest.mark.parametrize(
    ("asked", "policy", "rounds"), [({}, "ACTIVE", 300_000), ({"OMP_WAIT_POLICY": "passive"}, "PASSIVE", 0)]
)
def test_threads_of_ctranslate2_wait_for_the_next_step_unless_told_otherwise(
    asked: dict[str, str], policy: str, rounds: int
) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | asked
    command = [sys.executable, "-c", "import src.inference.ct2_engine"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True
    )
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_only_auto_may_choose_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert runtime.get_device("auto").type in ("cpu", "mps")
    assert "no CUDA device" in caplog.text
    for name, problem in (("cuda", "Change runtime"), ("gpu", "'gpu'")):
        with pytest.raises(DeviceError, match=problem):
            runtime.get_device(name)


@pytest.mark.parametrize(
    ("asked", "device", "has_bfloat16", "chosen"),
    [
        ("auto", "cpu", False, "float32"), ("bfloat16", "cpu", False, "bfloat16"), ("float16", "cpu", False, None),
        ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float16"), ("bfloat16", "cuda", False, None),
        ("float16", "cuda", True, "float16"), ("float32", "cuda", True, "float32"),
    ],
)  # fmt: skip
def test_precision_is_what_the_device_computes(
    asked: str, device: str, has_bfloat16: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    if chosen is None:
        with pytest.raises(DeviceError, match="set precision: auto"):
            runtime.choose_precision(asked, torch.device(device))
    else:
        assert runtime.choose_precision(asked, torch.device(device)).precision == chosen


def test_cudnn_is_kept_out_of_attention_on_a_gpu_alone() -> None:
    try:
        runtime.keep_cudnn_out_of_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        runtime.keep_cudnn_out_of_attention(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, is_it: bool) -> None:
    assert runtime.is_out_of_memory(error) is is_it


class Tensors:
    """Stands for what did not fit."""


def test_memory_that_ran_out_is_free_again_when_the_error_leaves() -> None:
    held: list[weakref.ref[Tensors]] = []

    def work() -> None:
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(OutOfMemoryError, match=r"^out of memory: CUDA out of memory\.$"):
        runtime.in_memory(work)
    assert held[0]() is None
    assert runtime.in_memory(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="shapes differ"):
        runtime.in_memory(lambda: exec('raise RuntimeError("shapes differ")'))


def test_work_is_halved_until_it_fits_and_no_item_is_lost_or_repeated() -> None:
    sizes: list[int] = []

    def work(first: int, last: int) -> list[int]:
        sizes.append(last - first)
        if last - first > room:
            raise MemoryError
        return list(range(first, last))

    fitting, names = runtime.FittingSize(), [f"clip {number}" for number in range(7)]
    room = 2
    assert [*chain(*fitting.run(work, names))] == list(range(7))
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [*chain(*fitting.run(work, names[:2]))] == [0, 1]
    assert sizes[-2:] == [1, 1]  # the size is kept
    room = 0
    with pytest.raises(OutOfMemoryError, match="clip 0"):
        fitting.run(work, names)


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
    monkeypatch.setattr(runtime, "MOUNT_POINT", tmp_path / "drive")
    return drive


def test_drive_is_mounted_in_colab_alone(
    fake_colab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "drive" / "MyDrive" / "whisper_asr"
    assert runtime.in_colab()
    for _ in range(2):  # the cell may be run again
        assert runtime.mount_drive("whisper_asr") == folder
    assert folder.is_dir()
    assert runtime.is_on_unmounted_drive(folder)
    assert not runtime.is_on_unmounted_drive(tmp_path / "drive2")

    def refuse(point: str) -> None:
        raise ValueError("mount failed")

    fake_colab.mount = refuse  # type: ignore[attr-defined]
    with pytest.raises(WhisperASRError, match="mount failed"):
        runtime.mount_drive("whisper_asr")
    monkeypatch.undo()
    assert not runtime.in_colab()
    with pytest.raises(WhisperASRError, match="Colab"):
        runtime.mount_drive("whisper_asr")


def test_a_session_installs_what_colab_lacks_and_mounts_drive_if_it_is_wanted(
    fake_colab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    code = 0

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    assert runtime.start_session() is None
    assert runtime.start_session("whisper_asr") == tmp_path / "drive" / "MyDrive" / "whisper_asr"
    assert [command[1:4] for command in commands] == [["-m", "pip", "install"]] * 2
    assert "jiwer>=4.0" in commands[0]
    assert not any("torchaudio" in word for word in commands[0])  # one that the image lacks may not fit its torch
    code = 1
    with pytest.raises(WhisperASRError, match=r"requirements\.txt"):
        runtime.start_session()
    monkeypatch.setattr(runtime, "in_colab", lambda: False)
    assert runtime.start_session() is None
    assert len(commands) == 3


def test_results_are_one_archive_that_colab_downloads_and_drive_keeps(
    fake_colab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model, drive, downloaded = tmp_path / "runs" / "r1", tmp_path / "best", tmp_path / "mirror", []
    for name in ("runs/r1/figures/a.png", "runs/r1/report.html", "runs/r1/captions.srt", "runs/r1/checkpoints/state",
                 "runs/r1/.lock", "best/config.json", "best/model.safetensors", "best/.verification_clips.safetensors",
                 "mirror/kept"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    files = types.SimpleNamespace(download=downloaded.append)
    monkeypatch.setattr(sys.modules["google.colab"], "files", files, raising=False)
    archive = runtime.download_results(run, model_dir=model, mirror_dir=drive)
    inside = {"captions.srt", "figures/a.png", "model/config.json", "model/model.safetensors", "report.html"}
    assert set(zipfile.ZipFile(archive).namelist()) == inside
    assert set(zipfile.ZipFile(drive / "r1.zip").namelist()) == inside
    assert downloaded == [str(archive)]
    with pytest.raises(CheckpointError, match="QUICK_RESTART"):
        runtime.download_results(run, model_dir=tmp_path / "none")


def test_uploaded_files_are_a_folder_or_a_lone_archive(
    fake_colab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen: list[str] = ["a.wav", "metadata.csv"]

    def upload() -> dict[str, bytes]:
        for name in chosen:
            Path(name).write_text(name)
        return dict.fromkeys(chosen, b"")

    monkeypatch.setattr(sys.modules["google.colab"], "files", types.SimpleNamespace(upload=upload), raising=False)
    assert runtime.upload_files("up") == Path("up")
    assert {path.name for path in Path("up").iterdir()} == set(chosen)
    chosen[:] = ["talks.zip"]
    assert runtime.upload_files("up") == Path("up/talks.zip")
    chosen.clear()
    with pytest.raises(WhisperASRError, match="no file was uploaded"):
        runtime.upload_files("up")
    monkeypatch.setattr(runtime, "in_colab", lambda: False)
    with pytest.raises(WhisperASRError, match="DATA_PATH"):
        runtime.upload_files("up")


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ("/home/ann/my speech/x.wav", "x.wav"), ("/x", "x"), ("/home/ann", "~"), ("C:\\Users\\ann", "~"), ("~ann", "~"),
        ("~/speech", "speech"), ("~ann/a/speech", "speech"), ("$HOME/a/speech", "speech"), ("${DATA}/a/x", "x"),
        (r"C:\Users\ann\x.wav", "x.wav"), ("d:/ann/x.wav", "x.wav"), (r"%USERPROFILE%\a\x.wav", "x.wav"),
        (r"\\server\ann\x.wav", "x.wav"), ("//server/ann/x.wav", "x.wav"), (r"\\?\C:\ann\x.wav", "x.wav"),
        ("file:///home/ann/my%20x.wav", "my x.wav"), ("file:/home/ann/x.wav", "x.wav"),
        ("file://server/a/x.wav", "x.wav"),
        ("file:///C:/Users/ann/x.wav", "x.wav"), ("%2Fhome%2Fann%2Fx.wav", "x.wav"), ("file%3A%2F%2Fs%2Fa%2Fx", "x"),
        ("/content/drive/MyDrive/Ann/x", "x"), ("/content/drive/Shareddrives/Firm/x", "x"),
        ("clip 3: /home/ann/x.wav: truncated", "clip 3: x.wav: truncated"),
        ("--data=/home/ann/x.parquet", "--data=x.parquet"),
        (r"C:\Users\ann\x.wav: no such file", "x.wav: no such file"), ("see 'file:///home/ann/x.wav'", "see 'x.wav'"),
        (["/a/b", {"/a/k": ("/a/v", 1, None)}], ["b", {"k": ["v", 1, None]}]),
    ],
)  # fmt: skip
def test_no_private_folder_is_shown(private: Any, shown: Any) -> None:
    assert public(private) == shown


@pytest.mark.parametrize(
    "text",
    [
        "a/b.wav", "../x", "openai/whisper-tiny", "https://host/a/b/c", "see s3://bucket/a/b: 3", "3/4", "2026/11/30",
        "a: b/c", "</p>", "w/o: and/or", "C: drive", "", "~", "10% / 20 %",
    ],
)  # fmt: skip
def test_what_is_no_private_folder_is_shown_as_it_is(text: str) -> None:
    assert public(text) == text


def test_a_place_below_the_working_directory_is_shown_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert public(tmp_path / "a" / "b") == "a/b"
    assert public(f"file://{tmp_path}/a%20b/c") == "a b/c"
    assert public(f"x: {tmp_path}/a/b: damaged") == "x: a/b: damaged"
    monkeypatch.chdir("/")
    assert public("/home/ann/x") == "x"
    assert public("x: /home/ann/y: damaged") == "x: y: damaged"


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ({"returncode": 0}, None),
        ({"returncode": -6, "stderr": ""}, "exit code -6"),
        (
            {"returncode": 1, "stderr": "Traceback\nRuntimeError: Library libcublas.so.12 is not found\n"},
            "libcublas.so.12",
        ),
        (subprocess.TimeoutExpired("python", 120), "within 120 s"),
        (OSError("cannot allocate memory"), "cannot allocate memory"),
    ],
    ids=["works", "crashes", "lacks a library", "hangs", "cannot be started"],
)
def test_ctranslate2_is_tried_on_the_gpu_in_a_child_once(
    ending: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if isinstance(ending, Exception):
            raise ending
        return subprocess.CompletedProcess(command, **{"stderr": "", **ending})

    monkeypatch.setattr(subprocess, "run", run)
    runtime.ctranslate2_cuda_problem.cache_clear()
    problems = [runtime.ctranslate2_cuda_problem() for _ in range(2)]
    runtime.ctranslate2_cuda_problem.cache_clear()
    assert len(commands) == 1
    assert commands[0][-2:] == ["cuda", "float16"]
    assert (problems[0] is None) if said is None else (said in str(problems[0]))


def test_the_child_encodes_with_the_model_that_it_makes() -> None:
    assert runtime.ctranslate2_cuda_problem("cpu", "float32") is None
    assert "int3" in str(runtime.ctranslate2_cuda_problem("cpu", "int3"))
