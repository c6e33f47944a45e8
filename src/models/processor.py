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

from src.data.labels import (
    MAX_FIRST_TIME_SEC,
    MAX_LABEL_TOKENS,
    MULTILINGUAL_END_TOKEN,
    NUM_TIMESTAMPS,
    TIMESTAMP_STEP_SEC,
)
from src.utils.errors import ModelError
from src.utils.files import load_english_spelling, load_json

END_TOKEN = "<|endoftext|>"
START_TOKEN = "<|startoftranscript|>"
NO_TIMESTAMPS_TOKEN = "<|notimestamps|>"
ORDINARY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def build_processor(tokenizer_file: Path, *, num_mel_bins: int, vocab_size: int) -> WhisperProcessor:
    """Build tokenizer and feature extractor from a `tokenizer.json` that fits the model's embedding."""
    try:
        spec = load_json(tokenizer_file)
        ids = {token["content"]: int(token["id"]) for token in spec["added_tokens"]}
        specials = sorted((t["content"] for t in spec["added_tokens"] if t["special"]), key=ids.__getitem__)
        first_timestamp = ids[NO_TIMESTAMPS_TOKEN] + 1
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise ModelError(
            f"{tokenizer_file}: absent or not a Whisper tokenizer ({type(err).__name__}: {err}); copy tokenizer.json "
            "of the same openai/whisper-* variant there"
        ) from err
    for step in range(NUM_TIMESTAMPS):  # older files lack the 1,501 timestamp tokens
        name = f"<|{step * TIMESTAMP_STEP_SEC:.2f}|>"
        if name not in ids:
            spec["added_tokens"].append({"id": first_timestamp + step, "content": name, **ORDINARY})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        Path(folder, "normalizer.json").write_text(json.dumps(dict(load_english_spelling())), encoding="utf-8")
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
    processor.feature_extractor.save_pretrained(folder)  # preprocessor_config.json
    processor.tokenizer.save_vocabulary(str(folder))  # vocab.json, merges.txt
    spelling = processor.tokenizer.english_spelling_normalizer
    _write_json(folder / "normalizer.json", dict(load_english_spelling() if spelling is None else spelling), sort=True)
    # transformers 4 takes `extra_special_tokens` for a mapping, and fails at a list
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        _write_json(folder / "tokenizer_config.json", config, sort=False)


def token_rules(tokenizer: Any) -> dict[str, Any]:
    """Return what a generation config says about the tokens of a Whisper tokenizer."""
    names = (END_TOKEN, START_TOKEN, "<|startofprev|>", "<|transcribe|>", "<|translate|>", NO_TIMESTAMPS_TOKEN)
    ids = [tokenizer.backend_tokenizer.token_to_id(name) for name in names]  # None: the token is absent
    if missing := [name for name, at in zip(names, ids, strict=True) if at is None]:
        raise ModelError(f"not a Whisper tokenizer: it has no {', '.join(missing)}")
    end, start, previous, transcribe, translate, no_timestamps = ids
    rules: dict[str, Any] = {
        "eos_token_id": end,
        "decoder_start_token_id": start,
        "no_timestamps_token_id": no_timestamps,
        "prev_sot_token_id": previous,
        "is_multilingual": end == MULTILINGUAL_END_TOKEN,
    }
    if rules["is_multilingual"]:
        # every token between the start and the tasks is a language: 99, or 100 since large-v3
        rules["lang_to_id"] = {tokenizer.convert_ids_to_tokens(i): i for i in range(start + 1, translate)}
        rules["task_to_id"] = {"transcribe": transcribe, "translate": translate}
    return rules


def generation_defaults(end: int) -> dict[str, int]:
    """Return what the generation configs of all Whisper models have in common besides `token_rules`."""
    return {
        "bos_token_id": end,
        "pad_token_id": end,
        "max_initial_timestamp_index": round(MAX_FIRST_TIME_SEC / TIMESTAMP_STEP_SEC),  # 50
        "max_length": MAX_LABEL_TOKENS,
    }


def _write_json(path: Path, content: dict[str, Any], *, sort: bool) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort)
    path.write_text(text + "\n", encoding="utf-8")
