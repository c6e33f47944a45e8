"""Find the cross-attention heads that time words, for a checkpoint that lists none.

    python scripts/find_alignment_heads.py --model checkpoints/best_model_hf [--data FILE.parquet] [--write]

Prints the heads and how they agree with those of the upper half of the layers, which serve without a list, and with the
listed ones. `--write` puts them into the folder's generation_config.json: torch, transformers and every later export
then use them. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import check_model_path
from src.data.dataset import decode_audio
from src.data.sources import load_utterances
from src.inference.head_search import DEFAULT_COUNT, find_alignment_heads, write_alignment_heads
from src.models.whisper_model import WhisperModelManager
from src.utils.config import load_config
from src.utils.errors import WhisperASRError
from src.utils.logging_config import setup_logging


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint, or a name such as base")
    parser.add_argument("--data", type=Path, help="Parquet in the Hugging Face audio layout; default: bundled test set")
    parser.add_argument("--clips", type=int, default=24, help="at a stride over all; default: %(default)s")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="heads at most; default: %(default)s")
    parser.add_argument("--language", default="en", help="of the clips; default: %(default)s")
    parser.add_argument("--write", action="store_true", help="into the folder's generation_config.json")
    setup_logging("WARNING")
    try:
        return run(parser.parse_args(given))
    except WhisperASRError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Search, print, and write if asked."""
    check_model_path(arguments.model)
    data = {"source": "parquet", "path": str(arguments.data)} if arguments.data else {"source": "sample"}
    config = load_config(None, overrides={"data": data, "model": {"language": arguments.language}})
    found = [u for u in load_utterances(config.data) if u.meta.get("split", "test") == "test"]
    clips = found[:: max(1, len(found) // arguments.clips)][: arguments.clips]
    model, processor = WhisperModelManager(config).initialize_model(arguments.model)
    audios, texts = [decode_audio(u).numpy() for u in clips], [u.text for u in clips]
    search = find_alignment_heads(model, processor, audios, texts, count=arguments.count, language=arguments.language)
    for each in search.scores[: arguments.count]:
        print(f"layer {each.head[0]}, head {each.head[1]}: {each.score:.2f}")
    if arguments.write:
        print(f"written to {write_alignment_heads(Path(arguments.model), search.heads)}")
    figures = {
        "heads": search.heads,
        "clips": search.clips,
        "words": search.words,
        "upper_half_sec": search.upper_half_sec,
        "listed_sec": search.listed_sec,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
