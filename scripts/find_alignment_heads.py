"""Find the cross-attention heads that time words, for a fine-tuned or distilled checkpoint that lists none.

    python scripts/find_alignment_heads.py --model checkpoints/best_model_hf
    python scripts/find_alignment_heads.py --model checkpoints/best_model_hf --write
    python scripts/find_alignment_heads.py --model FOLDER --data FILE.parquet --language de --write

Without `--data` they are found with bundled English speech; give a model of another language its own, in which each
clip may say its language. `--write` puts them into the folder's generation_config.json, for torch, transformers and
every later export to CTranslate2. The last line printed is one JSON object; an error is one line, with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_model, check_model_path, path_argument, print_result, run_main
from scripts.evaluate import source_of
from src.data.audio import load_audio
from src.data.labels import apply_case, resolve_case
from src.data.preparation import with_language
from src.data.sources.catalog import load_utterances
from src.data.utterance import Utterance
from src.inference.alignment_heads import DEFAULT_COUNT, HeadSearch, find_alignment_heads, write_alignment_heads
from src.inference.files.recordings import with_clips
from src.models.whisper_model import WhisperModelManager
from src.utils.config import MAX_AUDIO_SEC, Config, load_config
from src.utils.errors import ModelError
from src.utils.logging_config import setup_logging

DEFAULT_CLIPS = 12  # three give the same heads of tiny.en and base (2026-11-28)
SHOWN_BELOW = 3  # heads that were just not taken


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--data", type=path_argument, help="Parquet file, or a folder with audio and metadata.csv")
    parser.add_argument("--language", help="of clips that do not say theirs; by default the checkpoint's, or detected")
    parser.add_argument("--clips", type=int, default=DEFAULT_CLIPS, help="to search with, at a stride over all")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="heads at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="put them into the folder's generation_config.json")
    arguments = parser.parse_args(given)
    if arguments.clips < 1 or arguments.count < 1:
        parser.error("--clips and --count: at least 1")
    setup_logging("INFO")
    return print_result(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> str:
    """Find, print, and write if asked; return the figures of the last line as JSON."""
    check_model_path(arguments.model)
    overrides = {"device": arguments.device, "data.source": "sample", "data.sources": []}
    overrides["model.language"] = arguments.language
    if arguments.data is not None:
        overrides |= {"data.source": source_of(arguments.data), "data.path": str(arguments.data)}
    config = load_config(None, overrides=overrides)
    manager = WhisperModelManager(config)
    model, processor = manager.initialize_model(arguments.model)
    folder = Path(arguments.model).expanduser()
    if arguments.write and (manager.weights is None or manager.weights.path != folder):
        raise ModelError(
            f"--write: {arguments.model} is not a Hugging Face folder; make one: scripts/export.py --format hf"
        )
    clips = choose_clips(config, arguments.clips)
    found = find_alignment_heads(
        model,
        processor,
        [load_audio(clip.audio, name=clip.audio_name, max_sec=MAX_AUDIO_SEC) for clip in clips],
        [clip.text for clip in clips],
        count=arguments.count,
        language=config.model.language,
        languages=[clip.language for clip in clips],
    )
    print("\n".join(describe(found)))
    if arguments.write:
        print(f"written: {write_alignment_heads(folder, found.heads)}")
    score = round(max(found.scores.values()), 4)
    return json.dumps({"alignment_heads": found.heads, "score": score, "words": found.words})


def choose_clips(config: Config, count: int) -> list[Utterance]:
    """Take clips at a stride, but none of a test split, and recase their transcripts where they are all capitals."""
    listed = load_utterances(with_clips(config).data)
    usable = [clip for clip in listed if clip.split != "test"] or listed
    taken = [with_language(clip, config.model) for clip in usable[:: max(1, len(usable) // count)][:count]]
    case = resolve_case([clip.text for clip in taken], config.data.label_case)
    return [replace(clip, text=apply_case(clip.text, case, clip.language)) for clip in taken]


def describe(found: HeadSearch) -> list[str]:
    """Return the heads with their scores, then how far their word times lie from others."""
    lines = ["layer  head  score  taken"]
    for (layer, head), score in list(found.scores.items())[: len(found.heads) + SHOWN_BELOW]:
        lines.append(f"{layer:5d} {head:5d} {score:6.2f}  {'yes' if (layer, head) in found.heads else 'no'}")
    listed = (
        "none that exist are listed"
        if found.listed_sec is None
        else f"{found.listed_sec:.2f} s from those listed so far"
    )
    lines.append(
        f"{found.words} words of {found.clips} clips: word ends lie, in the median, {found.upper_half_sec:.2f} s from "
        f"those by all heads of the upper half of the layers; {listed}"
    )
    return lines


if __name__ == "__main__":
    run_main(main)
