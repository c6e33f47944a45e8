"""Where the code runs: notebook, Google Drive, seed, device, precision, memory errors, processes that work together.

torch and NumPy are imported where they are used: they take seconds, and the environment doctor works without.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import unquote

from src.utils.errors import CheckpointError, DeviceError, OutOfMemoryError, WhisperASRError, first_line
from src.utils.files import PROJECT_ROOT, atomic_file, project_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "float16"]
MOUNT_POINT = Path("/content/drive")
TROUBLESHOOTING = "https://github.com/jimmy00415/COMP3057_Project/blob/main/docs/TROUBLESHOOTING.md"
_SECTIONS = {  # of that page, by class of error
    "ConfigError": "settings", "DataError": "data", "ModelError": "model", "DeviceError": "set-up",
    "CheckpointError": "restart", "WriteError": "training", "MissingDependencyError": "set-up",
}  # fmt: skip
_SLASH = r"(?:[/\\]|%2[Ff]|%5[Cc])"
_BEGIN = rf"(?:file(?::|%3[Aa])|[A-Za-z](?::|%3[Aa])|~[\w.-]*|\$\{{?\w+\}}?|%\w+%)?(?={_SLASH})"
_PLACE = re.compile(rf"{_BEGIN}|~[\w.-]*$")
# in a text: a path begins after what is no part of one, and not in a URL; its folders contain no spaces
_FOLDERS = re.compile(
    rf"(?<![\w./\\~$%}})\]>-])(?!(?<=:)//)(?:{_BEGIN})(?:{_SLASH}+(?:(?!{_SLASH})[^\s\"'<>|:*?])+)+{_SLASH}+(?=[\w.-])"
)
_HOMES = {"home", "Users", "users"}
CUBLAS_PACKAGE = "nvidia-cublas-cu12"  # CTranslate2 loads its library by name, whatever CUDA torch was built for
CUBLAS_FIX = f"pip install {CUBLAS_PACKAGE}"
_CT2_PROBE_SEC = 120.0
_CT2_PROBE = """
import sys
sys.modules["torch"] = None  # whose own libraries would be found, in a process that has imported it
import tempfile
import numpy as np
from src.utils.runtime import load_cublas
load_cublas()
import ctranslate2
from ctranslate2.specs.model_spec import visit_spec
from ctranslate2.specs.whisper_spec import WhisperSpec
d, tokens = 64, ["<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>", "a"]
shapes = {"conv1/weight": (d, 80, 3), "conv2/weight": (d, d, 3), "embeddings/weight": (len(tokens), d),
          "projection/weight": (len(tokens), d), "encodings": (1500, d), "self_attention/linear_0/weight": (3 * d, d),
          "attention/linear_1/weight": (2 * d, d), "self_attention/linear_1/weight": (d, d), "weight": (d, d),
          "gamma": (d,), "beta": (d,), "conv1/bias": (d,), "conv2/bias": (d,)}
random = np.random.default_rng(0)
def fill(layer, name, value):
    found = [shape for end, shape in shapes.items() if ("/" + name).endswith("/" + end)]
    if found and (value is None or "bias" in name or "encodings" in name):
        layer.__dict__[name.rpartition("/")[2]] = random.normal(size=found[0]).astype(np.float32) / 8
spec = WhisperSpec(1, 1, 1, 1)
visit_spec(spec, fill)
spec.register_vocabulary(tokens)
spec.validate()
with tempfile.TemporaryDirectory() as folder:
    spec.save(folder)
    model = ctranslate2.models.Whisper(folder, device=sys.argv[1], compute_type=sys.argv[2])
features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 100), dtype=np.float32))
encoded = model.encode(features, to_cpu=True).to(ctranslate2.DataType.float32)
sys.exit(0 if np.isfinite(np.array(encoded)).all() else "its numbers are not finite")
"""


def in_colab() -> bool:
    """Whether this Python runs in Google Colab."""
    has_google = importlib.util.find_spec("google") is not None  # find_spec of a child imports its parent
    return has_google and importlib.util.find_spec("google.colab") is not None


def in_notebook() -> bool:
    """Whether this runs in a Jupyter or Colab kernel, which can show more than text."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def start_session(drive_folder: str | None = None) -> Path | None:
    """Start a session of the notebook: install what Colab's image lacks, and mount Google Drive on request.

    From then on, errors of this library end in a link to what explains them. Return the folder on Drive, or None if
    none is named; raise `WhisperASRError` if pip or the mount fails.
    """
    if in_notebook():
        sys.modules["IPython"].get_ipython().set_custom_exc((WhisperASRError,), _show_with_link)
    if in_colab():
        requirements = project_file("requirements.txt")
        lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
        # a torchaudio that the image lacks may not fit its torch, and would break transformers
        packages = [line for line in lines if line and not line.startswith("torchaudio")]
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages])
        if done.returncode:
            raise WhisperASRError(
                f"pip could not install {requirements}, see above; run the cell again, or take a fresh runtime: "
                "Runtime > Disconnect and delete runtime"
            )
    return None if drive_folder is None else mount_drive(drive_folder)


def _show_with_link(shell: Any, kind: type, error: WhisperASRError, trace: Any, tb_offset: int | None = None) -> Any:
    """Show an error as the notebook does, and where it is explained."""
    lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
    section = next((_SECTIONS[each.__name__] for each in kind.__mro__ if each.__name__ in _SECTIONS), "set-up")
    lines.append(f"If this fails again, see {TROUBLESHOOTING}#{section}")
    shell._showtraceback(kind, error, lines)
    return lines


def mount_drive(folder: str) -> Path:
    """Mount Google Drive; return a folder below "MyDrive", made if absent; `WhisperASRError` if that is refused."""
    if not in_colab():
        raise WhisperASRError("Google Drive can be mounted in Colab only; elsewhere copies can go to any folder")
    from google.colab import drive

    try:
        drive.mount(str(MOUNT_POINT))
        target = MOUNT_POINT / "MyDrive" / folder
        target.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as err:  # refused consent, quota, a time-out
        raise WhisperASRError(
            f"Google Drive could not be mounted: {err}; run the cell again, or continue without it"
        ) from err
    return target


def upload_files(folder: str | Path = "uploads") -> Path:
    """Ask for files with Colab's upload button; return the folder that has them, or a lone archive.

    Raises `WhisperASRError` outside Colab, and if nothing was chosen.
    """
    if not in_colab():
        raise WhisperASRError("files are uploaded in Colab only; elsewhere name their folder or ZIP: DATA_PATH")
    from google.colab import files

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = list(files.upload())  # into the working directory
    if not names:
        raise WhisperASRError(
            "no file was uploaded; run the cell again and choose recordings, with their table or texts"
        )
    for name in names:
        shutil.move(name, target / Path(name).name)
    alone = target / Path(names[0]).name
    return alone if len(names) == 1 and alone.suffix in (".zip", ".tar", ".gz", ".tgz") else target


def download_results(run_dir: Path, *, model_dir: Path, mirror_dir: Path | None = None) -> Path:
    """Put a run's model, report, captions, tables and figures into one ZIP; in Colab, let the browser download it.

    Checkpoints, exports and hidden files, such as the recordings that verify an export, stay out. The archive lies next
    to the run's folder; `mirror_dir`, a folder on Drive, gets it, too.

    Raises:
        CheckpointError: there is no model yet.
        WriteError: the disk is full.
    """
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(
            f"{model_dir}: no model to download yet. Train first; after an interruption tick QUICK_RESTART in the cell "
            "Start and run all cells: what was finished is not computed again"
        )
    kept = [path for path in run_dir.iterdir() if path.is_file()]
    kept += [path for name in ("figures", "data_versions") for path in (run_dir / name).glob("*") if path.is_file()]
    members = {str(path.relative_to(run_dir)): path for path in kept}
    members |= {f"model/{path.relative_to(model_dir)}": path for path in model_dir.rglob("*") if path.is_file()}
    target = run_dir.parent / f"{run_dir.name}.zip"
    with atomic_file(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, path in sorted(members.items()):
            if not any(part.startswith(".") for part in Path(name).parts):
                kind = zipfile.ZIP_STORED if path.suffix == ".safetensors" else None  # weights shrink by a tenth
                archive.write(path, name, kind)
    logger.info("%s: %.0f MB", target.absolute(), target.stat().st_size / 1e6)
    if mirror_dir is not None:
        shutil.copyfile(target, mirror_dir / target.name)
        logger.info("on Drive: %s", mirror_dir / target.name)
    if in_colab():
        from google.colab import files

        files.download(str(target))
        logger.info("if the browser asks nothing: Colab's file pane, right-click %s, Download", target.name)
    return target


def is_on_unmounted_drive(path: Path) -> bool:
    """Whether a path lies on Google Drive while it is not mounted: writing there would fill the local disk."""
    return path.absolute().is_relative_to(MOUNT_POINT) and not MOUNT_POINT.is_mount()


def public(value: Any) -> Any:
    """Return a tree without private folders: of what lies below the working directory the path there, else the name.

    Texts are looked through for paths of any system and for file URLs; a path that is a whole text may contain spaces.
    """
    if isinstance(value, Mapping):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str | Path):
        return value
    text, here = str(value), Path.cwd()
    if ": " in text or not _PLACE.match(text):
        below_here = "" if here == Path(here.anchor) else f"{here}{os.sep}"
        return _FOLDERS.sub("", text.replace(below_here, ""))
    path = re.sub(r"^file:/*", "/", unquote(text))
    is_near = here != Path(here.anchor) and Path(path).is_relative_to(here)
    if is_near and not Path(path).is_relative_to(MOUNT_POINT):
        return str(Path(path).relative_to(here))
    found = PureWindowsPath(path)  # which knows both kinds of slashes
    return "~" if (path.startswith("~") and "~" in found.name) or found.parent.name in _HOMES else found.name


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def set_seed(seed: int) -> int:
    """Seed Python, NumPy and torch; return the seed."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # its limit; used by libraries that draw from the global state
    torch.manual_seed(seed)
    return seed


def get_device(name: str = "auto") -> torch.device:
    """Resolve "auto" (CUDA, else Apple's MPS, else CPU), or a name that torch accepts: "cpu", "cuda:1", "mps".

    Raises `DeviceError` if the named device is not on this machine; only "auto" may choose the CPU.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            chosen, reason = "cuda", torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            chosen, reason = "mps", "no CUDA device, Apple GPU present"
        else:
            chosen, reason = "cpu", "no CUDA device"
        logger.info("device: %s (%s)", chosen, reason)
        return torch.device(chosen)
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise DeviceError(f"device {name!r} is unknown to torch; use auto, cpu, cuda or cuda:N") from err
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r} was asked for, but torch sees no CUDA device. In Colab: Runtime > Change runtime "
            "type > GPU. Elsewhere: check nvidia-smi, or set device: auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but this machine has none; set device: auto")
    return device


@dataclass(frozen=True)
class PrecisionChoice:
    """The dtype of matrix products in training (master weights stay float32), and the reason."""

    precision: Precision
    reason: str


def choose_precision(precision: str, device: torch.device) -> PrecisionChoice:
    """Resolve "auto" for a device, or check a named precision; raises `DeviceError` if the device cannot compute it."""
    import torch

    if device.type != "cuda":
        if precision == "auto":
            return PrecisionChoice("float32", f"{device.type} gains nothing from 16 bits in training")
        if precision == "float16":
            raise DeviceError(f"float16 training needs a CUDA device, this is {device.type}; set precision: auto")
    elif precision in ("auto", "bfloat16"):
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bfloat16", f"{name} computes bfloat16")
        if precision == "bfloat16":
            raise DeviceError(f"{name} has no bfloat16; set precision: auto or float16")
        return PrecisionChoice("float16", f"{name} has no bfloat16; losses are scaled")
    return PrecisionChoice(cast(Precision, precision), "asked for")


def allow_tf32(device: torch.device) -> str:
    """Let float32 matrix products of an Ampere or newer GPU run in TF32; return what was done, for the log."""
    import torch

    if device.type != "cuda":
        return "TF32 off (no CUDA device)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"TF32 off ({torch.cuda.get_device_name(device)} has none)"
    torch.set_float32_matmul_precision("high")
    return f"TF32 on ({torch.cuda.get_device_name(device)} has it)"


@cache
def ctranslate2_cuda_problem(device: str = "cuda", compute_type: str = "float16") -> str | None:
    """Return why CTranslate2 cannot compute on this machine's CUDA device, None if it can; tried once per process.

    A child process encodes with a tiny random model: a library that is absent shows at the first product of matrices
    only, and may end the process.
    """
    command = [sys.executable, "-c", _CT2_PROBE, device, compute_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CT2_PROBE_SEC, cwd=PROJECT_ROOT)
    except subprocess.TimeoutExpired:
        return f"no answer within {_CT2_PROBE_SEC:.0f} s"
    except OSError as err:
        return f"it cannot be tried: {err}"
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if "libcublas" in done.stderr:
        said = [next(line for line in said if "libcublas" in line)]
    return said[-1] if said else f"its process ended with exit code {done.returncode}"


def load_cublas() -> None:
    """Load pip's libcublas.so.12, from nvidia-cublas-cu12, where CTranslate2 finds it: it looks into no such folder."""
    try:
        folder = metadata.distribution(CUBLAS_PACKAGE).locate_file("nvidia/cublas/lib")
        for library in ("libcublasLt.so.12", "libcublas.so.12"):
            ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    except metadata.PackageNotFoundError:
        logger.debug("%s is not installed: the system's cuBLAS is used, if there is any", CUBLAS_PACKAGE)
    except OSError as err:
        logger.debug("%s: %s", CUBLAS_PACKAGE, err)  # CTranslate2 says what it lacks


def keep_cudnn_out_of_attention(device: torch.device) -> None:
    """Leave attention on a CUDA device to the other backends, in this whole process.

    On Hopper and newer GPUs torch tries cuDNN first, which builds a plan for every new shape: with torch 2.11 about
    half a second forward and again backward (https://github.com/modelscope/FunASR/issues/3704). Audio at its own length
    and a decoder's growing cache have a new shape at nearly every call.
    """
    import torch

    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def usable_cores() -> int:
    """Return this process's share of the cores that it may run on; a container may have fewer than the machine.

    Processes that train together on one machine share them; launchers set their number in LOCAL_WORLD_SIZE.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_threads() -> int:
    """Return how many threads this process may compute with: OMP_NUM_THREADS, which launchers set, or its cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


@contextmanager
def thread_pool(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads; an error or Ctrl-C drops what has not begun, instead of waiting for all of it."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_memory(work: Callable[[], T]) -> T:
    """Return what `work` returns; if memory runs out, release what it held and raise `OutOfMemoryError`."""
    try:
        return work()
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        problem = first_line(err)
    release_memory()
    raise OutOfMemoryError(f"out of memory: {problem}")


class FittingSize:
    """How many items fit into memory at once: halved when memory runs out, and kept for later calls."""

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, work: Callable[[int, int], T], names: Sequence[str]) -> list[T]:
        """Work on all items, in as few parts as fit; return the result of each part.

        `work` takes the first item's index and the index after the last one. An `OutOfMemoryError` has the name of the
        item that does not fit alone.
        """
        results: list[T] = []
        done = 0
        while done < len(names):
            size = min(self.most or len(names), len(names) - done)
            try:
                results.append(in_memory(partial(work, done, done + size)))
                done += size
            except OutOfMemoryError as err:
                if size == 1:
                    fix = "lower inference.num_beams or take a smaller model"
                    raise OutOfMemoryError(f"{names[done]} alone: {err}; {fix}") from err
                self.most = size // 2
                logger.warning("%s with %d clips: from now on at most %d at once", err, size, self.most)
        return results


def release_memory() -> None:
    """Collect garbage, and return torch's cache of GPU memory.

    After memory ran out, call it outside of the except block: inside, the error's frames hold what did not fit.
    """
    gc.collect()
    torch = sys.modules.get("torch")  # without an import it holds nothing
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU or the machine had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    text = str(error)
    return "out of memory" in text.lower() or "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def join_processes(*, patience: timedelta) -> None:
    """Join the processes that torchrun or `accelerate launch` has started; `patience` is the longest wait for the last.

    What follows works with torch.distributed alone: accelerate's helpers would choose the device of a process that
    only transcribes. A process that has not joined others is alone, and everything is the identity.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=patience)


def world_size() -> int:
    """Return the number of processes that work together."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """Return the index of this process among them, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def is_main_process() -> bool:
    """Whether this is the one process that writes."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return every process's value, by rank, in all of them; pickled between processes of one run, never on disk."""
    gathered = [value] * world_size()
    if group := _group():
        group.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """Return the main process's value in all of them."""
    holder = [value]
    if group := _group():
        group.broadcast_object_list(holder, src=0)
    return holder[0]


def from_main(make: Callable[[], T]) -> T:
    """Return what the main process makes, in all of them; its `WhisperASRError` is raised in all of them, too."""
    made: T | WhisperASRError | None = None
    if is_main_process():
        try:
            made = make()
        except WhisperASRError as err:
            made = err
    made = broadcast_object(made)
    if isinstance(made, WhisperASRError):
        raise made
    return cast(T, made)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum of each value over all processes, in float64; the device is the CPU for gloo, the GPU for nccl."""
    group = _group()
    if group is None:
        return list(values)
    import torch

    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    group.all_reduce(total)
    return [float(value) for value in total.tolist()]


def wait_for_all() -> None:
    """Return when every process has arrived here."""
    if group := _group():
        group.barrier()


def _group() -> Any | None:
    """Return torch.distributed if this process has joined others."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed
