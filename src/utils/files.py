"""Files and folders that are whole or absent, even after a crash: atomic writes, locks, JSON; files of the packages.

What is being written or replaced lies next to its final name as `.<name>.<process id>.<token>.partial` or `.replaced`;
a folder called `.replaced` is always whole. A folder is replaced by two renames, because no portable call exchanges two
names: a crash between them leaves the old folder as `.replaced`, and `recover_folder` restores it before the next write
or the next loading of a model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from src.utils.errors import ConfigError, DataError, WhisperASRError, WriteError, first_line, listed_problems

logger = logging.getLogger(__name__)

T = TypeVar("T")
PROJECT_ROOT = Path(__file__).resolve().parents[2]  # the checkout; of an installed package, site-packages
LOCK = ".lock"  # in a folder that one process at a time may write

MAX_JSON_BYTES = 256 << 20

_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}  # drives without it answer this
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_UNWRITABLE = _DISK_FULL | {
    errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV,
    errno.ENOTEMPTY,
}  # fmt: skip
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, 524}  # the last: NFS's ENOTSUPP
_PROCESS_TOKEN = secrets.token_hex(4)  # starts all tokens: a restarted container may reuse the old process id
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<token>[0-9a-f]+)\.(?P<kind>partial|replaced)")
_counter = itertools.count()
_LONG_NAME, _KEPT_NAME = 200, 150  # bytes; most file systems take names of 255, and a hidden one has up to 45 more
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # JSON escapes the others itself


def expand_path(path: str | Path) -> Path:
    """Return a path with `~` and environment variables (`$NAME`, `${NAME}`) replaced.

    Raises `ConfigError` if a variable is not set, a user is unknown, or no file can have this name.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111  pathlib raises other errors
    unset = [name for name in re.findall(r"\$\{?(\w+)", text) if name not in os.environ]
    if unset and not os.path.lexists(text):
        raise ConfigError(f"{text[:200]!r}: the variable {unset[0][:99]} is not set; set it or write the path in full")
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise ConfigError(f"{text[:200]!r}: no such user; write the path in full")
    try:
        raw = os.fsencode(expanded)
    except UnicodeEncodeError:  # half of a character
        raw = b"\0"
    if b"\0" in raw:
        raise ConfigError(f"{text[:200]!r}: no file can have this name; check where it comes from")
    if max(map(len, raw.split(b"/"))) > 255 or len(raw) > 4_000:
        raise ConfigError(f"'{text[:200]}...': too long for a path (255 bytes a name, 4,000 in all); check it")
    return Path(expanded)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; raises `OSError` if it cannot be read or is a device or pipe."""
    _refuse_special(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read, or is a folder, device or pipe, which is not opened.
        ValueError: it is damaged, not UTF-8, nested too deeply or larger than 256 MB.
    """
    _refuse_special(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MB")
    return parse_json(path.read_bytes())


def read_plain(path: Path) -> bytes:
    """Return the content of a file; raises `OSError` if it cannot be read or is a folder, device or pipe."""
    _refuse_special(path)
    return path.read_bytes()


def _refuse_special(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))


def write_text_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file as `write_bytes_atomic` does; line ends are kept, lone surrogates written as escapes."""
    write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"), durable=durable)


def write_bytes_atomic(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file as `atomic_file` does: other processes find the old content or the new one."""
    with atomic_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a hidden file next to `path`, open for writing; it takes that name at the end, or is removed on an error.

    After a power cut the file may be the old one, the new one or empty; if `durable`, the new one stays. The folder is
    made; `WriteError` is raised if it cannot be written.
    """
    partial = _hidden_name(path, "partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
            if durable:
                fsync(partial)
            partial.replace(path)
            if durable:
                fsync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what a full or read-only disk gives in a block, whichever library writes, as `WriteError` of `path`."""
    try:
        yield
    except (WhisperASRError, FileExistsError):
        raise
    except Exception as err:
        cause: BaseException | None = err
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                raise WriteError(cause.errno, os.strerror(cause.errno), str(path)) from err
            for number in _DISK_FULL:  # safetensors, tokenizers and ONNX have their own errors
                if os.strerror(number) in str(cause):
                    raise WriteError(number, os.strerror(number), str(path)) from err
            cause = cause.__cause__ or cause.__context__
        raise


def file_stamp(path: Path) -> str:
    """Return a short hash of a file's path, size and time of change: of what was made from it, and not since."""
    found = path.stat()
    named = f"{path.resolve()}\t{found.st_size}\t{found.st_mtime_ns}"
    return hashlib.sha256(named.encode(errors="backslashreplace")).hexdigest()[:16]


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; whatever is wrong with it, also numbers of 5,000 digits and deep nesting, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def jsonable(value: Any) -> Any:
    """Return a value as JSON takes it: numbers that are not finite become None, paths become texts."""
    if isinstance(value, Mapping):
        return {key: jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of a JSONL file; line ends of any kind inside of texts are escaped."""
    text = json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_run_rows(path: Path, *, key: str) -> list[dict[str, Any]]:
    """Read the rows of a run's JSONL file, each with `key`; DataError if it is absent or a line is damaged."""
    rows: list[dict[str, Any]] = []
    try:
        _refuse_special(path)
        with path.open("rb") as file:  # as bytes, whose lines end at \n alone
            for line in file:
                row = parse_json(line)
                rows.append({key: row[key], **row})
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file; was the run started, and is this its folder?") from err
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}; give the folder of a run") from err
    except (ValueError, TypeError, KeyError) as err:
        raise DataError(
            f"{path}, line {len(rows) + 1}: not a row of a run ({err!r}); if a crash cut it, remove the line"
        ) from err
    return rows


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for a lock file, and hold it; other threads wait too. A dead process holds none, and none is left behind.

    The folder is made; raises `OSError` if it cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(path, fallback_to_soft=False)
    _acquire(lock, path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows refuses; one that waits sees that the file is gone
            path.unlink()
        lock.release()


def _acquire(lock: Any, path: Path) -> None:
    """Acquire a lock file if its file system supports locks; Google Drive in Colab does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: its file system has no locks; let one process at a time write there", path.parent)
        path.unlink(missing_ok=True)


def claim(
    path: Path, owner: object, *, what: Path, error: type[WhisperASRError], fix: str, shared: bool = True
) -> Callable[[], object]:
    """Take a lock file for as long as this process writes something; return what gives it back.

    It is given back at the latest when the owner is collected, or at exit. The kernel releases the lock of a killed
    process, and its file is taken over. Where the file system has no locks, there is a warning.

    Args:
        path: of the lock file, which describes this process while it is taken.
        owner: object that writes.
        what: the folder or file that is claimed, for the messages.
        error: raised if another process has it, or the lock file cannot be written; names that process.
        fix: what the message advises besides waiting.
        shared: other objects of this process may take it too.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, is_singleton=shared, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path)
    except Timeout as err:
        holder = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = path.read_text(encoding="utf-8")
        raise error(f"{what}: {holder or 'another process'} writes there; wait until it ends, or {fix}") from err
    except OSError as err:
        raise error(f"{what}: cannot be written: {err.strerror}; {fix}") from err
    if lock.lock_counter == 1:
        program, since = Path(sys.argv[0] or sys.executable).name, time.strftime("%Y-%m-%d %H:%M")
        with contextlib.suppress(OSError):  # a full disk, or Windows: it is locked, but without a name
            path.write_text(f"process {os.getpid()} ({program}, since {since})", encoding="utf-8")

    def give_back() -> None:
        if lock.lock_counter == 1:  # 0 in a forked process, or without locks
            with contextlib.suppress(OSError):  # Windows
                path.unlink()
        lock.release()

    return weakref.finalize(owner, give_back)


def read_json(path: Path, parse: Callable[[Any], T], *, what: str, fix: str) -> T:
    """Read a JSON file and parse its content; raises `DataError` if it cannot be read or is damaged.

    `parse` may raise ValueError, TypeError, KeyError, AttributeError or ArithmeticError for wrong content. The message
    says `what` the file should be ("a data set version"), and the `fix`.
    """
    try:
        return parse(load_json(path))
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}; {fix}") from err
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as err:
        problem = first_line(err)
        if callable(errors := getattr(err, "errors", None)):  # of pydantic
            problem = listed_problems(errors())
        raise DataError(f"{path}: not {what} ({problem}); {fix}") from err


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Write a JSON file as `atomic_file` does; raises `DataError` if its folder cannot be made or written."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        write_text_atomic(path, text, durable=durable)
    except OSError as err:
        raise DataError(f"{path}: cannot be written: {err.strerror}; choose another folder") from err


@contextmanager
def atomic_folder(output_dir: Path, *, replace: bool = False, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden folder next to `output_dir`; it takes that name at the end, or is removed on an error.

    A killed process leaves the old folder or the new one, whole; call `recover_folder` before the next use. Two
    processes that replace one folder need a lock.

    Args:
        output_dir: absent or an empty folder, else a FileExistsError is raised; unless `replace`. A `WriteError` is
            raised if the disk is full.
        replace: an older folder of that name stays until the new one is complete, then is removed.
        durable: also after a power cut; waits for the disk to write everything.
    """
    if output_dir.is_symlink():  # to another disk: the link stays
        output_dir = output_dir.resolve()
    _refuse_taken(output_dir, replace)
    if replace:
        recover_folder(output_dir)
    replaced = _hidden_name(output_dir, "replaced")
    with writing(output_dir), hidden_folder(output_dir) as partial:
        yield partial
        if durable:
            fsync_folder(partial)
        with uninterrupted():
            _refuse_taken(output_dir, replace)
            try:
                if output_dir.is_dir() and replace:
                    output_dir.rename(replaced)
                elif output_dir.is_dir():
                    output_dir.rmdir()  # fails if another process has written something into it meanwhile
                partial.rename(output_dir)
            finally:
                if replaced.exists() and not output_dir.exists():  # an error between the two renames
                    replaced.rename(output_dir)
            if replaced.exists():
                remove_folder(replaced)
        if durable:
            fsync(output_dir.parent)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield a folder with a hidden name next to `path`, removed at the end, or by `recover_folder` after a kill."""
    folder = _hidden_name(path, "partial")
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        with uninterrupted():
            _remove(folder)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back in the main thread until a short block has ended."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *interrupt: held.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


def _refuse_taken(output_dir: Path, replace: bool) -> None:
    is_free = replace or not output_dir.is_dir() or not any(output_dir.iterdir())
    if not is_free or output_dir.is_file():
        raise FileExistsError(f"{output_dir}: exists already; remove it, or choose another output folder")


def recover_folder(output_dir: Path) -> None:
    """Clean up after a process that was killed while it wrote `output_dir`: the folder is then whole, or absent.

    If the folder is absent and older ones lie under hidden names, the newest of these is restored. Other hidden
    remains of dead processes are removed, those of running processes never: the process id tells which run, so the
    folder must not be written by another machine at the same time.
    """
    remains: list[tuple[int, Path]] = []
    for path in output_dir.parent.iterdir() if output_dir.parent.is_dir() else ():
        hidden = read_hidden_name(path)
        if hidden is not None and hidden.final.name == _short(output_dir.name) and not hidden.is_in_use:
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                remains.append((path.lstat().st_ctime_ns, path))
    for _, path in sorted(remains, reverse=True):  # from new to old
        with contextlib.suppress(FileNotFoundError):
            if path.suffix == ".replaced" and not os.path.lexists(output_dir):
                path.rename(output_dir)
                logger.warning("%s was missing after a crash; its older content is restored", output_dir)
            else:
                remove_folder(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or file, under a hidden name, so that no half of it is ever seen under its own name."""
    hidden = read_hidden_name(folder)
    doomed = _hidden_name(hidden.final if hidden else folder, "partial")
    with uninterrupted():
        folder.rename(doomed)
        _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


class HiddenName(NamedTuple):
    """The meaning of a hidden name."""

    final: Path  # what the file or folder becomes, or was; a long name is shortened
    kind: str  # "partial" or "replaced"
    is_in_use: bool  # whether the process that chose the name is still running


def read_hidden_name(path: Path) -> HiddenName | None:
    """Return the meaning of a hidden name of this module; None for any other name."""
    match = _HIDDEN.fullmatch(path.name)
    if match is None:
        return None
    import psutil  # the doctor works without

    process = int(match["process"])
    is_own = process == os.getpid()
    is_in_use = match["token"].startswith(_PROCESS_TOKEN) if is_own else bool(psutil.pid_exists(process))
    final = path.with_name(match["name"])
    outer = read_hidden_name(final)  # of a folder that was made inside the making of another
    return HiddenName(outer.final if outer else final, match["kind"], is_in_use)


def _hidden_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{_short(path.name)}.{os.getpid()}.{_PROCESS_TOKEN}{next(_counter):04x}.{kind}")


def _short(name: str) -> str:
    """Return a name that leaves room for what a hidden one adds: of a long one the beginning, with a hash."""
    raw = os.fsencode(name)
    if len(raw) <= _LONG_NAME:
        return name
    return f"{raw[:_KEPT_NAME].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:8]}"


def fsync_folder(folder: Path) -> None:
    """Wait until every file below a folder, and the folders themselves, are on the disk.

    Folders are left out on Windows and on drives that cannot do it. macOS may keep data in the drive's own cache.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                fsync(path)
        fsync(Path(parent))


def fsync(path: Path, *, is_required: bool = True) -> None:
    """Wait until a file or folder is on the disk; only a file where it `is_required` must be able to do it."""
    is_dir = path.is_dir()
    if is_dir and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno not in _NO_FSYNC or (is_required and not is_dir):
            raise
    finally:
        os.close(handle)


@cache
def project_file(name: str) -> Path:
    """Return a file such as `config.yaml`: that of the checkout, or the copy that an installed package has."""
    installed = PROJECT_ROOT / "src" / name
    return installed if installed.is_file() else PROJECT_ROOT / name


def read_template(package: str, name: str) -> str:
    """Return a file of `templates/` in a package such as "src.evaluation"."""
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")


@cache
def load_english_spelling() -> MappingProxyType[str, str]:
    """Return the map from British to American spelling of Whisper's English normaliser (1,739 words, lower case).

    `english_spelling.json` is `whisper/normalizers/english.json` of openai-whisper 20250625 (PyPI source archive, MIT
    licence, Copyright (c) 2022 OpenAI), unchanged. Hugging Face checkpoints have the same map in `normalizer.json`.
    """
    text = resources.files("src.utils").joinpath("english_spelling.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))
