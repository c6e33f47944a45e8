"""The environment doctor: whether this machine can run the project, and the command that fixes what is missing.

A broken package must not hide the other findings: a check that fails reports that under its own name, torch is imported
in a separate process, which it may crash, and what imports NumPy, pydantic or psutil is imported where it is used.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from src.utils.errors import WhisperASRError, first_line
from src.utils.files import PROJECT_ROOT, project_file
from src.utils.runtime import CUBLAS_FIX, MOUNT_POINT, ctranslate2_cuda_problem, in_colab, installed_version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from src.utils.config import Config

logger = logging.getLogger(__name__)

Status = Literal["error", "warning", "absent", "ok"]
LOW_RAM_MB = 2_000.0  # training tiny.en takes 1.4 to 1.9 GB
RUN_DISK_MB = 1_000.0  # a run's figures and predictions, and an int8 export
_PROBE_TIMEOUT_SEC = 600.0  # the first import of torch takes minutes on a cold network disk or a busy machine
_CELL = 'style="text-align:left;vertical-align:top;white-space:normal;max-width:44em"'
_LOGINS = {  # token: the file that a login writes, what it then contains, the command, what works without
    "HF_TOKEN": ("~/.cache/huggingface/token", "", "hf auth login", "public models and data need none"),
    "WANDB_API_KEY": ("~/.netrc", "api.wandb.ai", "wandb login", "wandb then records offline"),
}
_TORCH_PROBE = """
import json
def show(**found): print(json.dumps(found), flush=True)
import torch
cuda = torch.cuda
gpus = [cuda.get_device_properties(i) for i in range(cuda.device_count())] if cuda.is_available() else []
show(torch=torch.__version__, cuda=torch.version.cuda, mps=torch.backends.mps.is_available(),
     gpus=[[gpu.name, gpu.total_memory / 1e6, gpu.major] for gpu in gpus])
if gpus:
    import ctypes
    try: ctypes.CDLL("libcublas.so.12")  # what CTranslate2 opens at its first encoding
    except OSError as err: show(cublas=str(err))
import torchaudio
show(torchaudio=torchaudio.__version__)
"""
BFLOAT16_MAJOR = 8  # compute capability from which NVIDIA GPUs have it: Ampere


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    status: Status  # "absent" is for what the project works without
    found: str
    fix: str = ""  # a command, or what to do


@dataclass(frozen=True)
class CheckReport:
    """Checks in the order in which they ran."""

    checks: tuple[Check, ...]
    title: ClassVar[str] = "Checks"

    @property
    def ok(self) -> bool:
        """Whether nothing is an error."""
        return all(check.status != "error" for check in self.checks)

    def to_text(self) -> str:
        """Return one line per check, and one for its fix."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.title}: {self._counts()}"]
        for check in self.checks:
            lines.append(f"  {check.status:8}{check.name:{width}}  {check.found}")
            lines += [f"{'':{width + 12}}fix: {check.fix}"] if check.fix else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = ""  # no colours of its own: it takes those of a light or a dark notebook
        for check in self.checks:
            name, found, fix = map(html.escape, (check.name, check.found, check.fix))
            status = check.status if check.status == "ok" else f"<b>{check.status}</b>"
            texts = (status, name, found + (f"<br><code>{fix}</code>" if fix else ""))
            rows += f"<tr>{''.join(f'<td {_CELL}>{text}</td>' for text in texts)}</tr>"
        return f"<p><b>{self.title}</b>: {self._counts()}</p><table>{rows}</table>"

    def _counts(self) -> str:
        counts = Counter(check.status for check in self.checks)
        return ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status])


class EnvironmentReport(CheckReport):
    """State of this machine and its packages; of a token it says only whether there is one."""

    title = "Environment"


def environment_report(config: Config | None = None) -> EnvironmentReport:
    """Check Python, packages, torch, GPU, audio, disk, memory, Drive and tokens.

    Takes as long as one import of torch. Nothing is changed; in Colab, the browser may ask whether the notebook may
    read the secrets HF_TOKEN and WANDB_API_KEY. `paths` and the model's size in `config` decide what the disk must
    hold; without it the working folder is checked.
    """
    python = f"{platform.python_version()} on {platform.platform()} (3.11 or newer is needed)"
    is_new, fix = sys.version_info >= (3, 11), "make PYTHON=python3.13 setup"
    named: dict[str, Callable[[], Iterable[Check]]] = {
        "Python": lambda: [_judge("Python", is_new, python, "error", fix)],
        "packages": _check_packages,
        "torch": lambda: _check_torch(config),
        "onnxruntime": _check_onnxruntime,
        "FFmpeg": _check_ffmpeg,
        "microphone": _check_microphone,
        "RAM and disk": lambda: _check_room(config),
        "runs and caches": lambda: () if config is None else _check_kept(config),
        "folders": lambda: () if config is None else _check_folders(config),
        "Google Drive": lambda: _check_drive(config),
        "tokens": _check_tokens,
    }
    return EnvironmentReport(tuple(found for name, check in named.items() for found in run_check(name, check)))


def run_check(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """Return what a check finds; its own failure is a finding too."""
    try:
        return list(check())
    except Exception as err:  # boundary: one broken package must not hide the other findings
        logger.debug("check %r failed", name, exc_info=True)
        text = str(err) if isinstance(err, WhisperASRError) else f"{type(err).__name__}: {first_line(err)}"
        return [Check(name, "error", f"cannot be checked: {text}")]


def _judge(name: str, is_ok: bool, found: str, otherwise: Status, fix: str) -> Check:
    return Check(name, "ok", found) if is_ok else Check(name, otherwise, found, fix)


def _check_packages() -> Iterator[Check]:
    """Compare the installed versions with the bounds, and with the tested set."""
    needed, tested = read_requirements("requirements.txt"), read_requirements("constraints.txt")
    unfit, others = [], []
    for name, requirement in needed.items():
        version = installed_version(name)
        if name == "torchaudio":  # training goes on without it; see `_check_torch`
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "is not installed" if version is None else f"{version}, needs {requirement.specifier}"
            unfit.append(Check(name, "error", found, _install(name)))
        elif name in tested and not tested[name].specifier.contains(version, prereleases=True):
            others.append(f"{name} {version} ({str(tested[name].specifier).removeprefix('==')})")
    differing = f"differing from constraints.txt, the tested set: {', '.join(others)}" if others else "none untested"
    required = len(needed.keys() - {"torchaudio"})
    yield Check("packages", "ok", f"{required - len(unfit)} of {required} fit requirements.txt; {differing}")
    yield from unfit


def read_requirements(file: str) -> dict[str, Requirement]:
    """Return the lines of requirements.txt or constraints.txt that apply to this machine, by canonical name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line.split("#")[0].strip() for line in project_file(file).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): r for r in found if r.marker is None or r.marker.evaluate()}


def _install(name: str) -> str:
    # not with the constraints in Colab: they would replace what a newer image ships
    constraints = "" if in_colab() else " -c constraints.txt"
    return f'pip install "{read_requirements("requirements.txt")[name]}"{constraints}'


def _check_torch(config: Config | None = None) -> Iterator[Check]:
    """Import torch, then torchaudio, in a separate process, and judge how far it got."""
    command = [sys.executable, "-c", _TORCH_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_SEC, cwd=PROJECT_ROOT)
    except subprocess.TimeoutExpired:  # its text contains the whole command
        yield Check("torch", "error", f"is not imported within {_PROBE_TIMEOUT_SEC:.0f} s", _torch_fix())
        return
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if "torch" not in found:
        yield Check("torch", "error", f"does not import: {problem}", _torch_fix())
        return
    yield Check("torch", "ok", f"{found['torch']}, CUDA {found['cuda'] or 'is not in this build'}")
    yield _judge_torchaudio(found, problem)
    yield _judge_gpu(found)
    if older := [gpu[0] for gpu in found["gpus"] if len(gpu) > 2 and gpu[2] < BFLOAT16_MAJOR]:
        text = f"{', '.join(older)} has no bfloat16; training takes float16 and scales its losses"
        asked = config is not None and config.precision == "bfloat16"
        yield _judge("bfloat16", not asked, text, "error", "precision: auto")
    if found["gpus"] and installed_version("ctranslate2") is not None:
        lacking = ctranslate2_cuda_problem()
        text = f"needs CUDA 12 on a GPU, torch brings CUDA {found['cuda']}: {found.get('cublas', lacking)}"
        fix = f"{CUBLAS_FIX} (until then a GPU transcribes through torch)"
        yield _judge("CTranslate2", lacking is None, text if lacking else "computes on the GPU", "warning", fix)


def _judge_torchaudio(found: dict[str, Any], problem: str) -> Check:
    """Judge whether torchaudio fits torch; its last release, 2.11, fits that torch and none after it."""
    if "torchaudio" in found:
        return Check("torchaudio", "ok", f"{found['torchaudio']} imports together with it")
    version, release = installed_version("torchaudio"), ".".join(found["torch"].split("+")[0].split(".")[:2])
    has_one = tuple(map(int, release.split("."))) <= (2, 11)
    build = found["torch"].partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    install = f'pip install --no-deps "torchaudio=={release}.*"{index}'
    if version is None:
        text = "is not installed: augmentation goes without speed, pitch, rooms and telephone"
        fix = install if has_one else f"none is made for torch {release}; nothing else needs it"
        return Check("torchaudio", "absent", text, fix)
    text = (
        f"{version} does not import together with torch {found['torch']} ({problem}), so transformers does not either"
    )
    if in_colab():  # torch stays as it is
        return Check("torchaudio", "error", text, install if has_one else "pip uninstall -y torchaudio")
    return Check("torchaudio", "error", text, _torch_fix())


def _torch_fix() -> str:
    pins = read_requirements("constraints.txt")
    # pip takes a build such as 2.11.0+cpu for 2.11.0, and would leave it
    first = "pip uninstall -y torch torchaudio && " if "+" in (installed_version("torch") or "") else ""
    return f"{first}pip install {pins['torch']} {pins['torchaudio']}"


def _judge_gpu(found: dict[str, Any]) -> Check:
    if found["gpus"]:
        return Check("GPU", "ok", ", ".join(f"{name}, {mb:,.0f} MB" for name, mb, *_ in found["gpus"]))
    if found["mps"]:
        return Check("GPU", "ok", "Apple GPU, which shares the RAM")
    if shutil.which("nvidia-smi"):
        text = f"nvidia-smi is here, but torch {found['torch']} sees no CUDA device: another build or driver is needed"
        return Check("GPU", "warning", text, "nvidia-smi" if found["cuda"] else _torch_fix())
    if in_colab():
        return Check("GPU", "absent", "none in this runtime", "Runtime > Change runtime type > T4 GPU")
    return Check("GPU", "absent", "none; a CPU is enough for the demo profile, tiny and base models, and streaming")


def _check_onnxruntime() -> Iterator[Check]:
    names = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
    if not names:  # among the packages that are not installed
        return
    again = f"pip uninstall -y {' '.join(names)} && {_install('onnxruntime')}"
    try:
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]

        providers = ", ".join(onnxruntime.get_available_providers())
    except (ImportError, OSError, AttributeError) as err:  # the last one of two packages in one folder
        text = f"which detects speech, does not import: {first_line(err)}"
        yield Check("onnxruntime", "error", text, again)
        return
    found = f"{onnxruntime.__version__} imports ({providers})"
    yield _judge("onnxruntime", len(names) == 1, found, "warning", f"two packages share its folder: {again}")


def _check_ffmpeg() -> Iterator[Check]:
    try:
        import av
    except (ImportError, OSError) as err:
        text = f"PyAV, which ships it, does not import: {first_line(err)}"
        yield Check("FFmpeg", "error", text, _install("av") + " --force-reinstall --no-deps")
        return
    codecs = ".".join(map(str, av.library_versions["libavcodec"]))
    yield Check("FFmpeg", "ok", f"PyAV {av.__version__} ships its libraries (libavcodec {codecs})")


def _check_microphone() -> Iterator[Check]:
    if in_colab():
        yield Check("microphone", "ok", "the browser's is used")
        return
    try:
        import sounddevice  # type: ignore[import-not-found, unused-ignore]

        yield Check("microphone", "ok", str(sounddevice.query_devices(kind="input")["name"]))
    except ModuleNotFoundError:
        yield Check("microphone", "absent", "sounddevice is not installed", "pip install sounddevice")
    except OSError:  # sounddevice raises it where it finds no PortAudio
        text = "sounddevice is installed, the PortAudio library is not"
        yield Check("microphone", "absent", text, "sudo apt-get install libportaudio2")
    except (sounddevice.PortAudioError, ValueError) as err:
        yield Check("microphone", "absent", f"no input device: {first_line(err)}", "python -m sounddevice")


def _check_room(config: Config | None) -> Iterator[Check]:
    """Check RAM and the disks that a run writes to; without a configuration, the disk of the working folder."""
    import psutil

    memory, fix = psutil.virtual_memory(), "close other programs, and restart other notebooks' kernels"
    found = f"{memory.available / 1e6:,.0f} MB available of {memory.total / 1e6:,.0f} MB"
    yield _judge("RAM", memory.available >= 1e6 * LOW_RAM_MB, found, "warning", fix)
    if config is None:
        yield check_disk("disk", Path(), RUN_DISK_MB)
        return
    yield check_disk("disk of runs", config.paths.runs_dir, RUN_DISK_MB)
    yield check_disk("disk of checkpoints", config.paths.checkpoints_dir, _checkpoints_mb(config))


def _checkpoints_mb(config: Config) -> float:
    """Return the most that checkpoints and best model of a run take; 0 where the model's size is unknown."""
    from src.utils.memory import PARAMETERS_M, run_disk_mb

    parameters = 1e6 * PARAMETERS_M.get(config.model.variant.removesuffix(".en"), 0.0)
    return run_disk_mb(parameters, trained=parameters, kept=config.checkpoints.save_total_limit)


def check_disk(name: str, folder: Path, needs_mb: float) -> Check:
    """Compare the free space at a folder, which need not exist yet, with the most that a run writes; 0 is unknown."""
    from src.utils.memory import CLEAN_UP_HINT, existing_folder

    free_mb = shutil.disk_usage(existing_folder(folder)).free / 1e6
    needs = f"a run writes up to {needs_mb:,.0f} MB" if needs_mb else "what a run writes depends on the model"
    found = f"{free_mb:,.0f} MB free at {folder.absolute()}; {needs}"
    return _judge(name, free_mb >= needs_mb, found, "warning", CLEAN_UP_HINT)


def _check_kept(config: Config) -> Iterator[Check]:
    """Check what earlier runs left: their folders, the caches, and what killed processes half wrote."""
    from src.utils.memory import CLEAN_UP_HINT, find_unfinished, size_mb

    runs = sorted(path.parent for path in config.paths.runs_dir.glob("*/metrics.jsonl"))
    yield Check("runs", "ok", f"{len(runs)} in {config.paths.runs_dir}, {sum(map(size_mb, runs)):,.0f} MB")
    caches = sorted(path for path in config.paths.cache_dir.glob("*") if path.is_dir())
    sizes = ", ".join(f"{path.name} {size_mb(path):,.0f} MB" for path in caches)
    yield Check("caches", "ok", f"{config.paths.cache_dir}: {sizes or 'empty'}")
    if unfinished := find_unfinished(config):
        found = f"{len(unfinished)} of killed processes, {sum(each.mb for each in unfinished):,.0f} MB"
        yield Check("unfinished files", "warning", found, CLEAN_UP_HINT)


def _check_folders(config: Config) -> Iterator[Check]:
    """Try whether the folders of runs, checkpoints and caches can be written to."""
    from src.utils.memory import existing_folder

    for key in ("runs_dir", "checkpoints_dir", "cache_dir"):
        folder = getattr(config.paths, key)
        try:
            tempfile.TemporaryFile(dir=existing_folder(folder)).close()
        except OSError as err:
            text = f"{folder} cannot be written: {err.strerror or err}"
            yield Check(f"paths.{key}", "error", text, f"paths.{key}: a folder of yours, such as /tmp/whisper_asr")


def _check_drive(config: Config | None = None) -> Iterator[Check]:
    if not in_colab():
        return
    is_mounted, fix = MOUNT_POINT.is_mount(), "from src.utils import mount_drive; mount_drive('whisper_asr')"
    found = f"mounted at {MOUNT_POINT}" if is_mounted else "not mounted: a lost session loses its checkpoints"
    yield _judge("Google Drive", is_mounted, found, "absent", fix)
    if is_mounted and config is not None:
        needs_mb = _checkpoints_mb(config)
        free_mb = shutil.disk_usage(MOUNT_POINT).free / 1e6
        text = f"{free_mb:,.0f} MB free on Drive; copies of a run take up to {needs_mb:,.0f} MB"
        fix = (
            "https://drive.google.com/drive/quota: remove files and empty the trash; "
            "or checkpoints.save_total_limit: 1, or a smaller model.variant"
        )
        yield _judge("Drive's quota", free_mb >= needs_mb, text, "warning", fix)


def _check_tokens() -> Iterator[Check]:
    for name, (file, mark, login, without) in _LOGINS.items():
        place = _token_place(name, file, mark)
        yield _judge(name, bool(place), f"present in {place}" if place else f"not found; {without}", "absent", login)


def _token_place(name: str, file: str, mark: str) -> str | None:
    """Say where a token is, None if nowhere; its value is neither stored nor shown."""
    if os.environ.get(name):
        return "the environment"
    with contextlib.suppress(OSError):
        if mark in Path(file).expanduser().read_text(encoding="utf-8", errors="replace"):
            return file
    if "google.colab" not in sys.modules:  # a script there has no notebook to ask for secrets
        return None
    from google.colab import errors, userdata

    try:
        return "Colab's secrets" if userdata.get(name) else None
    except (userdata.NotebookAccessError, errors.Error):  # refused, or no such secret
        return None
