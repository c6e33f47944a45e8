"""The folder that a mirror writes: whole folders under their names, and a ledger of what is ours and what is open.

target/.mirror.json                  the ledger, written before each step: a crash leaves nothing that it does not know
target/<name>                        whole and checked
target/.<name>.<token>.partial       being copied
target/.<name>.<token>.replaced      the last good copy, while the new one takes its name
target/.<name>.<token>.removed       being deleted

`utils.atomic` does this for local disks. It tells left-overs from work in progress by process ids, which mean nothing
in the next Colab machine, and a drive cannot exchange two names; hence a ledger and two renames. One process at a time
may write a target.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ValidationError

from src.utils.colab import Pace, copy_file_checked, is_on_unmounted_drive
from src.utils.errors import WhisperASRError

logger = logging.getLogger(__name__)

LEDGER = ".mirror.json"
_SPARE_BYTES = 16 << 20  # the ledger, and what others write meanwhile
_live_owners: set[str] = set()  # stores of this process in use: their unfinished work is not a left-over


class RefusedError(WhisperASRError):
    """Copying again cannot help."""


class SourceGoneError(WhisperASRError):
    """The source was deleted before its copy was whole."""


def check_name(name: str) -> str:
    """Return a name if it stays below the target and cannot be confused with a hidden one.

    Raises: ValueError: it does not.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or any(part.startswith((".", "/")) for part in parts):
        raise ValueError(f"{name!r}: not a relative path of visible names, as in 'run/checkpoint-1'")
    return name


def _check_file(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r}: not below its folder")
    return name


class _Entry(BaseModel):
    group: str | None
    order: int
    files: dict[Annotated[str, AfterValidator(_check_file)], int]  # name to size in bytes


class _Pending(BaseModel):
    name: Annotated[str, AfterValidator(check_name)]
    owner: str
    new: _Entry | None = None  # set once the partial folder is whole


class _Ledger(BaseModel):
    format: Literal[1] = 1
    folders: dict[Annotated[str, AfterValidator(check_name)], _Entry] = {}
    pending: dict[str, _Pending] = {}  # by token


class _Stamp(NamedTuple):
    """What changes when a file is rewritten or replaced."""

    size: int
    mtime_ns: int
    inode: int


class MirrorStore:
    """One target folder. Not for two threads at once.

    Args:
        target: made if absent; never made again when it vanishes.
        pace: of all copying.
    Raises: WhisperASRError: the target cannot be made or written, or is on a Google Drive that is not mounted.
    """

    def __init__(self, target: Path, pace: Pace) -> None:
        self.target = target
        self._pace = pace
        self._owner = secrets.token_hex(8)
        if is_on_unmounted_drive(target):
            raise WhisperASRError(f"{target}: Google Drive is not mounted; call mount_drive first, or mirror elsewhere")
        try:
            target.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(target / LEDGER):
                self._save(_Ledger())
            self._set_aside_if_damaged()
        except OSError as err:
            raise WhisperASRError(
                f"{target}: cannot take the mirror: {err.strerror or err}; free space, mount it, or mirror elsewhere"
            ) from err
        _live_owners.add(self._owner)
        try:
            self._recover()
        except OSError as err:
            logger.warning("%s: left-overs of a crash stay for now: %s; they are tried again", target, err)

    def close(self) -> None:
        """What this store leaves unfinished is from now on a left-over that the next one cleans up."""
        _live_owners.discard(self._owner)

    def put(self, source: Path, name: str, *, group: str | None = None) -> int:
        """Copy a folder under a name; an older copy keeps the name until the new one is whole and checked.

        Returns: bytes copied.
        Raises:
            RefusedError: the source holds links or disagrees with its manifest, or the name is taken by someone else.
            SourceGoneError: the source is gone.
            WhisperASRError: the target is gone or too full, or gave back other bytes; or the source changed meanwhile.
            OSError: anything else that failed.
        """
        try:
            return self._put(source, name, group)
        except OSError as err:
            if not source.is_dir():
                raise SourceGoneError(f"{source}: was deleted before its copy was whole") from err
            raise

    def prune(self, group: str, keep: int) -> list[str]:
        """Remove the older folders of a group that this ledger lists, so that the newest `keep` stay.

        Of a folder only the files that were copied are deleted; what was added or changed stays, and is told.

        Returns: names removed.
        Raises: OSError, WhisperASRError: as of `put`.
        """
        folders = self._load().folders
        ours = [name for name, entry in folders.items() if entry.group == group and (self.target / name).is_dir()]
        old = sorted(ours, key=lambda name: folders[name].order)[:-keep]
        for name in old:
            token = self._begin(name)
            (self.target / name).rename(self._hidden(name, token, "removed"))
            self._finish(token)
        return old

    def _put(self, source: Path, name: str, group: str | None) -> int:
        self._recover()
        files = _list_files(source)
        final = self.target / name
        if os.path.lexists(final) and name not in self._load().folders:
            raise RefusedError(f"{final} exists and was not written by this mirror; move it away or mirror elsewhere")
        self._check_space(sum(file.size for file in files.values()))
        token = self._begin(name)
        partial = self._hidden(name, token, "partial")
        try:
            digests = self._copy(source, files, partial)
            _check_source(source, files, digests)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # what stays is in the ledger
            raise
        sizes = {file: size for file, (size, _) in digests.items()}
        self._note_whole(token, group, sizes)
        self._place(name, token)
        self._finish(token)
        return sum(sizes.values())

    def _copy(self, source: Path, files: Iterable[str], partial: Path) -> dict[str, tuple[int, str]]:
        self._make_dirs(partial)
        digests = {}
        for file in files:
            destination = partial / file
            self._make_dirs(destination.parent)
            digests[file] = copy_file_checked(source / file, destination, self._pace)
        return digests

    def _make_dirs(self, folder: Path) -> None:
        """Make a folder below the target, but never the target."""
        for parent in reversed((folder, *folder.parents)):
            if parent != self.target and parent.is_relative_to(self.target):
                parent.mkdir(exist_ok=True)

    def _place(self, name: str, token: str) -> None:
        final, replaced = self.target / name, self._hidden(name, token, "replaced")
        if os.path.lexists(final):
            final.rename(replaced)
        try:
            self._hidden(name, token, "partial").rename(final)
        except BaseException:
            if os.path.lexists(replaced) and not os.path.lexists(final):
                with contextlib.suppress(OSError):  # else the next start or try does it
                    replaced.rename(final)
            raise

    def _begin(self, name: str) -> str:
        ledger, token = self._load(), secrets.token_hex(8)
        ledger.pending[token] = _Pending(name=name, owner=self._owner)
        self._save(ledger)
        return token

    def _note_whole(self, token: str, group: str | None, sizes: dict[str, int]) -> None:
        ledger = self._load()
        order = 1 + max((entry.order for entry in ledger.folders.values()), default=0)
        self._pending(ledger, token).new = _Entry(group=group, order=order, files=sizes)
        self._save(ledger)

    def _recover(self) -> None:
        for path in self.target.glob(f"{LEDGER}.*.partial"):
            if path.name.split(".")[-2] not in _live_owners:
                path.unlink(missing_ok=True)
        for token, pending in self._load().pending.items():
            if pending.owner == self._owner or pending.owner not in _live_owners:
                self._finish(token)

    def _finish(self, token: str) -> None:
        """Bring one unfinished piece of work to a clean end, wherever it stopped."""
        ledger = self._load()
        pending = self._pending(ledger, token)
        name, final = pending.name, self.target / pending.name
        partial, replaced, removed = (self._hidden(name, token, word) for word in ("partial", "replaced", "removed"))
        if os.path.lexists(partial):
            pending.new = None  # first: a missing partial folder says that it has taken its name
            self._save(ledger)
            shutil.rmtree(partial)
        if not os.path.lexists(final):
            pending.new = None
            if os.path.lexists(replaced):
                replaced.rename(final)
                logger.warning("%s was missing after a fault; its last good copy is back", final)
        elif os.path.lexists(replaced):
            replaced.rename(removed)
        if os.path.lexists(removed):
            old = ledger.folders.get(name)
            _remove_written(removed, old.files if old else {}, final.with_name(f"{final.name}.kept-{token}"))
        if pending.new is not None:
            ledger.folders[name] = pending.new
        elif not os.path.lexists(final):
            ledger.folders.pop(name, None)
        del ledger.pending[token]
        self._save(ledger)

    def _pending(self, ledger: _Ledger, token: str) -> _Pending:
        if token not in ledger.pending:
            raise WhisperASRError(f"{self.target / LEDGER}: another process changed it; let one at a time write there")
        return ledger.pending[token]

    def _hidden(self, name: str, token: str, suffix: str) -> Path:
        path = self.target / name
        return path.with_name(f".{path.name}.{token}.{suffix}")

    def _check_space(self, n_bytes: int) -> None:
        usage = shutil.disk_usage(self.target)
        is_known = usage.total > 0 and 0 <= usage.free <= usage.total  # some mounts report zeros or nonsense
        if is_known and usage.free < n_bytes + _SPARE_BYTES:
            raise WhisperASRError(
                f"{self.target}: {(n_bytes + _SPARE_BYTES) / 1e6:.0f} MB needed, {usage.free / 1e6:.0f} MB free; "
                "free space there (also its trash), or lower checkpoints.save_total_limit"
            )

    def _load(self) -> _Ledger:
        if is_on_unmounted_drive(self.target) or not (self.target / LEDGER).is_file():
            raise WhisperASRError(f"{self.target} is not there any more; mount the drive again (mount_drive in Colab)")
        try:
            return _Ledger.model_validate_json((self.target / LEDGER).read_bytes())
        except ValidationError as err:
            raise WhisperASRError(f"{self.target / LEDGER}: damaged; rename it, and start the run again") from err

    def _set_aside_if_damaged(self) -> None:
        path = self.target / LEDGER
        try:
            _Ledger.model_validate_json(path.read_bytes())
        except ValidationError:
            aside = path.with_name(f"{LEDGER}.damaged-{self._owner}")
            path.rename(aside)
            logger.warning("%s is damaged, now %s; what it listed stays until you delete it", path, aside.name)
            self._save(_Ledger())

    def _save(self, ledger: _Ledger) -> None:
        partial = self.target / f"{LEDGER}.{self._owner}.partial"
        try:
            partial.write_text(ledger.model_dump_json(), encoding="utf-8")
            partial.replace(self.target / LEDGER)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def _list_files(source: Path) -> dict[str, _Stamp]:
    if source.is_symlink():
        raise RefusedError(f"{source}: a link; submit the folder that it leads to")
    found = {}
    for path in sorted(source.rglob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            name = path.relative_to(source).as_posix()
            found[name] = _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
        elif not stat.S_ISDIR(status.st_mode):
            raise RefusedError(f"{path}: a link or device; the mirror takes plain files only, put a copy there")
    if not source.is_dir():
        raise SourceGoneError(f"{source}: was deleted before its copy was whole")
    if not found:
        raise RefusedError(f"{source}: holds no files")
    return found


def _check_source(source: Path, before: Mapping[str, _Stamp], digests: Mapping[str, tuple[int, str]]) -> None:
    if _list_files(source) != before or any(digests[file][0] != stamp.size for file, stamp in before.items()):
        raise WhisperASRError(f"{source}: changed while it was copied; submit finished folders only")
    try:
        listed = json.loads((source / "manifest.json").read_bytes())["files"]
        expected = {str(file): (int(entry["size"]), str(entry["sha256"])) for file, entry in listed.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or a manifest of another kind
    wrong = sorted(file for file, proof in expected.items() if digests.get(file) != proof)
    if wrong:
        raise RefusedError(f"{source}: {wrong[0]} disagrees with manifest.json; it is damaged, save it again")


def _remove_written(folder: Path, files: Mapping[str, int], kept: Path) -> None:
    """Delete the files that were copied, as long as they have their size; the rest stays under the name `kept`."""
    for file, size in files.items():
        path = folder / file
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size in (0, size):
                if status.st_nlink == 1:  # emptied: Drive's trash counts towards the quota (gpt-2-simple issue 155)
                    os.truncate(path, 0)
                path.unlink()
    folders = {folder / parent for file in files for parent in PurePosixPath(file).parents}
    for path in sorted(folders | {folder}, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()
    if os.path.lexists(folder):
        folder.rename(kept)
        logger.warning("%s holds what this mirror did not write; delete it yourself if it is of no use", kept)
