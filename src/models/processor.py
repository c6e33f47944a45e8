"""A complete Whisper processor, from a `tokenizer.json` to a folder like those of openai/whisper-* on the Hub.

transformers 5 saves less than other tools read: without `normalizer.json` the tokenizer's `normalize` fails after a
reload, and faster-whisper and transformers 4 look for `preprocessor_config.json`. So `save_processor` writes all of it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from src.data.labels import MAX_LABEL_TOKENS, NUM_TIMESTAMPS, TIMESTAMP_STEP_SEC
from src.utils.errors import ModelError
from src.utils.files import load_english_spelling

END_TOKEN = "<|endoftext|>"
START_TOKEN = "<|startoftranscript|>"
NO_TIMESTAMPS_TOKEN = "<|notimestamps|>"


def build_processor(tokenizer_file: Path, *, num_mel_bins: int, vocab_size: int) -> WhisperProcessor:
    """Build tokenizer and feature extractor.

    Args:
        tokenizer_file: a `tokenizer.json`; older ones lack the 1,501 timestamp tokens, which are then appended.
        num_mel_bins: 80, or 128 for large-v3 and turbo.
        vocab_size: rows of the model's embedding.

    Raises:
        ModelError: no such file, not a Whisper tokenizer, or not this model's.
    """
    spec = _read_tokenizer(tokenizer_file)
    specials = [t["content"] for t in sorted(spec["added_tokens"], key=lambda t: int(t["id"])) if t["special"]]
    _append_timestamps(spec)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "normalizer.json").write_text(_spelling_json(), encoding="utf-8")
        # in order of id: transformers takes the last special token's id + 1 for the first timestamp
        tokenizer = WhisperTokenizer.from_pretrained(
            folder, pad_token=END_TOKEN, extra_special_tokens=specials, model_max_length=MAX_LABEL_TOKENS
        )
    if len(tokenizer) != vocab_size:
        raise ModelError(
            f"{tokenizer_file}: {len(tokenizer)} tokens, but the model has {vocab_size}; "
            "take the tokenizer.json of the same Whisper variant"
        )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=num_mel_bins), tokenizer)


def save_processor(processor: WhisperProcessor, folder: Path) -> None:
    """Write every file that transformers 4 and 5, faster-whisper and `tokenizer.normalize` read."""
    processor.save_pretrained(folder)
    _name_special_tokens_as_before(folder / "tokenizer_config.json")
    processor.feature_extractor.save_pretrained(folder)  # preprocessor_config.json
    processor.tokenizer.save_vocabulary(str(folder))  # vocab.json, merges.txt
    spelling = processor.tokenizer.english_spelling_normalizer
    text = _spelling_json() if spelling is None else json.dumps(dict(spelling), indent=2, sort_keys=True)
    (folder / "normalizer.json").write_text(text + "\n", encoding="utf-8")


def _name_special_tokens_as_before(config_file: Path) -> None:
    """Let transformers 4 read the list too: it takes `extra_special_tokens` for a mapping, and fails."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_tokenizer(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ModelError(
            f"{path}: no such file; copy tokenizer.json of the same openai/whisper-* variant there"
        ) from err
    except ValueError as err:  # JSONDecodeError and UnicodeDecodeError
        raise ModelError(f"{path}: not a tokenizer: {err}") from err
    names = {t["content"] for t in spec.get("added_tokens", [])} if isinstance(spec, dict) else set()
    missing = {END_TOKEN, START_TOKEN, NO_TIMESTAMPS_TOKEN} - names
    if missing:
        raise ModelError(f"{path}: not a Whisper tokenizer, it has no {', '.join(sorted(missing))}")
    return dict(spec)


def _append_timestamps(spec: dict[str, Any]) -> None:
    known = {t["content"] for t in spec["added_tokens"]}
    first = next(t["id"] for t in spec["added_tokens"] if t["content"] == NO_TIMESTAMPS_TOKEN) + 1
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    for step in range(NUM_TIMESTAMPS):
        name = f"<|{step * TIMESTAMP_STEP_SEC:.2f}|>"
        if name not in known:
            spec["added_tokens"].append({"id": first + step, "content": name, **shape})


def _spelling_json() -> str:
    return json.dumps(dict(load_english_spelling()), indent=2, sort_keys=True)
