"""CTranslate2 conversions of any weights, made once and kept in the cache.

Imports are where they are used: the Hub's client, torch and transformers take seconds, and most calls need none.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from src.utils.files import recover_folder


def ct2_folder(source: str, *, quantization: str, cache_dir: Path) -> Path:
    """Return a CTranslate2 folder with the weights of a model.

    Args:
        source: as `resolve_weights` takes it; a CTranslate2 folder is returned as it is.
        quantization: of the weights where they are converted: "int8", "float16", ...
        cache_dir: conversions are kept under `cache_dir/weights`.

    Raises:
        ModelError: no such weights, or the converted model does not give the source's text.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        recover_folder(folder)  # a process was killed while it replaced the folder
    if (folder / "model.bin").is_file():
        return folder
    from src.models.offline_weights import combined_sha256, convert_once
    from src.models.weights import resolve_weights

    weights = resolve_weights(source, cache_dir=cache_dir)
    files = sorted(file for pattern in ("*.safetensors", "pytorch_model.bin") for file in weights.path.glob(pattern))
    content = combined_sha256([*files, weights.path / "config.json", weights.path / "generation_config.json"])
    digest = hashlib.sha256(f"{content} {quantization}".encode()).hexdigest()

    def convert(target: Path) -> None:
        from src.models.export.ctranslate2 import export_ctranslate2

        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            exported = export_ctranslate2(weights.path, Path(scratch) / "exported", quantization=quantization)
            for file in exported.iterdir():
                file.rename(target / file.name)

    label = f"{weights.source}, as CTranslate2 {quantization}"
    return convert_once(f"{folder.name}-ct2-{quantization}", digest, label, cache_dir=cache_dir, convert=convert)
