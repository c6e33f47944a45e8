"""Error rate on expected terms and on all other words: without them, with them as a prompt, and as a bias.

    python benchmarks/hotwords.py [--model FOLDER] [--data FILE] [--other FILE] [--clips N] [--quick]

The terms are the long words of the clips that other transcripts have at most once: a list of names and terms of a field
is like that. Twice as many rare words of the other transcripts, which are not said, are given with them. `--other`
names the Parquet with those transcripts; by default they are the training part of the bundled data. The last line
printed is one JSON object; the table is appended to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import add_data, load_clips, percent, points, read, recased, show
from scripts.command_line import model_argument, path_argument
from src.data.audio import load_audio
from src.data.labels import source_text
from src.data.sources.catalog import load_utterances
from src.data.utterance import Utterance
from src.evaluation.metrics import (
    EditCounts,
    align_words,
    compare_counts,
    error_rate,
    get_normalizer,
    headline_normalizer,
)
from src.inference.engine_base import Engine
from src.inference.engines import load_engine
from src.inference.hotwords import RARE_CHARACTERS
from src.inference.options import DecodingOptions
from src.utils.config import Config, load_config

NORMALIZER = headline_normalizer("en")
STRENGTHS = (1.0, 2.0, 3.0, 4.0)
BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=model_argument, default="tiny.en", help="a tuned folder, or a variant")
    add_data(parser)
    parser.add_argument("--other", type=path_argument, help="Parquet with other transcripts of the field")
    parser.add_argument("--clips", type=int, default=200, help="at a stride")
    parser.add_argument("--quick", action="store_true", help="under a minute: 16 clips, one engine; nothing recorded")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    clips = [
        recased(clip, Config().data) for clip in load_clips(arguments.data, 16 if arguments.quick else arguments.clips)
    ]
    others = read(arguments.other) if arguments.other else load_utterances(Config().data)
    others = [u for u in others if arguments.other or u.meta["split"] == "train"]
    terms, unsaid = choose_terms(clips, others)
    given = (*sorted(terms), *sorted(unsaid))

    rows, figures = [], {}
    for name in ("ctranslate2",) if arguments.quick else ("ctranslate2", "torch"):
        engine = load_engine(arguments.model, load_config(None, overrides={"device": "cpu"}), engine=name)
        plain = DecodingOptions(language="en")
        systems = {"without": plain, "as a prompt": replace(plain, prompt=", ".join(given))}
        for strength in STRENGTHS if name == "ctranslate2" and not arguments.quick else (plain.hotword_strength,):
            systems[f"bias of {strength:g}"] = replace(plain, hotwords=given, hotword_strength=strength)
        first: list[EditCounts] = []
        for label, options in systems.items():
            texts, sec = transcribe(engine, clips, options)
            on_terms, on_others, false = count(clips, texts, terms, terms | unsaid)
            first = first or on_others
            rates = [error_rate(counts) for counts in (on_terms, on_others)]
            others_changed = compare_counts(first, on_others, [clip.speaker for clip in clips])
            rows.append(
                {
                    "engine": name,
                    "terms": label,
                    "errors on terms": percent(rates[0]),
                    "on other words": percent(rates[1]),
                    "points on other words": points(others_changed),
                    "terms not said": str(false),
                    "time": f"{sec:.0f} s",
                }
            )
            figures[f"{name} {label}"] = {"terms": rates[0], "other_words": rates[1], "false_terms": false}
    said = sum(counts.reference_words for counts in on_terms)
    note = (
        f"{len(clips)} clips; {len(terms)} terms, said {said} times, and {len(unsaid)} that are not said. Errors on "
        "others are substitutions, deletions and insertions that are no term; an interval is of the difference."
    )
    show("Hotwords", rows, note, record=not (arguments.quick or arguments.no_record))
    print(json.dumps(figures))
    return 0


def choose_terms(clips: Sequence[Utterance], others: Sequence[Utterance]) -> tuple[set[str], set[str]]:
    """Return the words of clips that other transcripts have at most once, and words that only these have, once."""
    normalize = get_normalizer(NORMALIZER)
    said = {word for clip in clips for word in normalize(clip.text).split()}
    known = Counter(word for other in others for word in normalize(source_text(other)).split())
    terms = {word for word in said if known[word] <= 1 and len(word) >= RARE_CHARACTERS and word.isalpha()}
    rare = sorted(word for word in set(known) - said if known[word] == 1 and len(word) >= RARE_CHARACTERS)
    return terms, set(rare[:: max(1, len(rare) // (2 * len(terms)))][: 2 * len(terms)])


def transcribe(engine: Engine, clips: Sequence[Utterance], options: DecodingOptions) -> tuple[list[str], float]:
    """Return the texts, in order, and the seconds that decoding took."""
    audios = [load_audio(clip.audio) for clip in clips]
    texts, began = [""] * len(clips), time.perf_counter()
    order = sorted(range(len(clips)), key=lambda i: len(audios[i]))
    for places in (order[at : at + BATCH] for at in range(0, len(order), BATCH)):
        batch = [audios[i] for i in places]
        encoded = engine.encode(batch, options.trailing_silence_sec)
        for i, result in zip(places, engine.decode(encoded, batch, options), strict=True):
            texts[i] = result.text
    return texts, time.perf_counter() - began


def count(
    clips: Sequence[Utterance], texts: Sequence[str], terms: set[str], given: set[str]
) -> tuple[list[EditCounts], list[EditCounts], int]:
    """Return each clip's counts on the terms that it has and on its other words, and how many terms were not said."""
    on_terms, on_others, false = [], [], 0
    for clip, text in zip(clips, texts, strict=True):
        pairs: tuple[list[str], list[str]] = [], []
        for word in align_words(clip.text, text, NORMALIZER):
            pairs[word.reference not in terms].append(word.edit)
            false += word.edit in ("substitute", "insert") and word.hypothesis in given
        on_terms.append(_counts(pairs[0]))
        on_others.append(_counts(pairs[1]))
    return on_terms, on_others, false


def _counts(edits: Sequence[str]) -> EditCounts:
    parts = Counter(edits)
    reference = len(edits) - parts["insert"]
    return EditCounts(parts["substitute"], parts["delete"], parts["insert"], reference)


if __name__ == "__main__":
    sys.exit(main())
