"""Sources of a model's weights: a folder, the Hugging Face Hub, or an installed package.

The first source that has them is taken, what was tried is logged, and a failure lists every attempt with its reason.
Weights in CTranslate2 form are converted once into the cache.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from src.models import offline_weights
from src.models.offline_weights import CONFIG_FILE, MODEL_FILE, PACKAGED_MODELS, TOKENIZER_FILE, convert_once
from src.utils.config import VARIANTS
from src.utils.errors import ModelError, did_you_mean, first_line
from src.utils.files import recover_folder

logger = logging.getLogger(__name__)

HUB_TIMEOUT_SEC = 5.0  # for the first answer; the Hub's client itself waits forever
HUB_ERRORS = (httpx.TransportError, HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError)
HUB_FILES = ["*.json", "*.txt", "model.safetensors", "model-?????-of-?????.safetensors"]
HUB_REPOSITORIES = {
    **{name: f"openai/whisper-{name}" for name in VARIANTS},
    "distil": "distil-whisper/distil-large-v3",
}


@dataclass(frozen=True)
class ResolvedWeights:
    """A folder in Hugging Face format, and where it came from, for logs and model cards."""

    path: Path
    source: str


def resolve_weights(variant_or_path: str, *, cache_dir: Path) -> ResolvedWeights:
    """Find weights in Hugging Face format.

    Args:
        variant_or_path: a variant such as "base"; a folder with a Hugging Face or a CTranslate2 checkpoint (write
            `./base` for a folder that is named like a variant); or a repository of the Hub, "owner/name".
        cache_dir: conversions are kept under `cache_dir/weights`; downloads stay in the Hub's own cache.

    Returns:
        The first found of: the folder, the Hub's local cache, the Hub, an installed package.

    Raises:
        ModelError: unknown name, a damaged or incomplete folder, or no source has the weights (all are listed).
    """
    name, attempts = variant_or_path, list[str]()
    if name not in HUB_REPOSITORIES:
        folder = Path(name).expanduser()
        if not folder.exists():
            recover_folder(folder)  # a process was killed while it replaced the folder
        if folder.is_dir():
            return _from_folder(folder, cache_dir)
        if folder.exists():
            raise ModelError(f"{folder}: is a file; pass the folder that holds the checkpoint")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            what = "no such folder" if len(folder.parts) > 1 else "unknown variant"
            raise ModelError(
                f"{name!r}: {what}{did_you_mean(name, VARIANTS)}\n"
                f"Known: {', '.join(VARIANTS)}; the path of a folder; a repository of the Hub as 'owner/name'"
            )
        attempts.append(f"folder {name}: does not exist")
    repository, packaged = HUB_REPOSITORIES.get(name, name), PACKAGED_MODELS.get(name)
    found = _from_hub(repository, attempts)
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
    if (folder / MODEL_FILE).is_file() and _model_type(folder) is None:
        label = f"CTranslate2 folder {folder}"
        digest = offline_weights.combined_sha256([folder / name for name in (MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE)])
        name = folder.resolve().name
        path = convert_once(name, digest, label, cache_dir=cache_dir, convert=lambda target: _convert(folder, target))
        return ResolvedWeights(path, f"{label} (converted)")
    problem = _incomplete(folder)
    if problem:
        raise ModelError(
            f"{folder}: not a complete Whisper checkpoint: {problem}; save model and processor there again"
        )
    return ResolvedWeights(folder, "local folder")


def _from_hub(repository: str, attempts: list[str]) -> ResolvedWeights | None:
    """Take the local copy, else ask the Hub; what failed is added to the attempts."""
    for local in (True, False):
        where = f"local copy of {repository}" if local else f"Hugging Face Hub {repository}"
        if not local and constants.is_offline_mode():
            attempts.append(f"{where}: not asked, HF_HUB_OFFLINE is set")
            break
        try:
            if not local:
                logger.info("asking the Hugging Face Hub for %s", repository)
                HfApi().model_info(repository, timeout=HUB_TIMEOUT_SEC)  # fails fast; snapshot_download does not
            path = Path(snapshot_download(
                repository, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_SEC, local_files_only=local,
                ignore_patterns=["*/*"],  # other formats in subfolders
            ))  # fmt: skip
        except HUB_ERRORS as err:
            reason = "not downloaded yet" if local else f"{type(err).__name__}: {first_line(err)}"
            attempts.append(f"{where}: {reason}")
            continue
        problem = _incomplete(path)
        if problem is None:
            logger.info("weights: %s", where)
            return ResolvedWeights(path, f"Hugging Face Hub {repository}@{path.name}")
        attempts.append(f"{where}: incomplete: {problem}")
    return None


def _from_package(
    name: str, model: offline_weights.PackagedModel, cache_dir: Path, attempts: list[str]
) -> ResolvedWeights | None:
    def convert(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as assembled:
            offline_weights.assemble_packaged_model(model, Path(assembled))
            _convert(Path(assembled), target)

    try:
        path = convert_once(name, model.sha256, model.label, cache_dir=cache_dir, convert=convert)
    except ModelError as err:
        attempts.append(f"{model.label}: {err}")
        return None
    logger.warning("weights of %s: %s (%s)", name, model.label, "; ".join(attempts))
    return ResolvedWeights(path, f"{model.label} (converted)")


def _convert(ct2_dir: Path, target: Path) -> None:
    from src.models.ct2_converter import convert_ct2_to_hf  # torch and transformers: not where it was done before

    convert_ct2_to_hf(ct2_dir, target)


def _incomplete(folder: Path) -> str | None:
    """Say what a Hugging Face checkpoint lacks, None if nothing."""
    if _model_type(folder) != "whisper":
        return f"{CONFIG_FILE} is absent or not that of a Whisper model"
    wanted = [
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        (TOKENIZER_FILE, "vocab.json"),
        ("preprocessor_config.json", "processor_config.json"),
    ]
    missing = [" or ".join(names) for names in wanted if not any((folder / name).is_file() for name in names)]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    return f"no {', no '.join(missing)}" if missing else None


def _model_type(folder: Path) -> str | None:
    """The key that Hugging Face configs have and CTranslate2's do not."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise ModelError(f"{folder / CONFIG_FILE}: not JSON: {err}") from err
    return config.get("model_type") if isinstance(config, dict) else None
