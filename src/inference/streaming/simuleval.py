"""Streams as SimulEval logs them, so that it and OmniSTEval can score them beside other systems.

A line of `instances.log` (https://github.com/facebookresearch/SimulEval, Ma et al. 2020) has, for each word of the
prediction, how much audio was heard when it was committed (`delays`) and when that was (`elapsed`), both in ms; in
scripts without spaces, for each character. OmniSTEval (https://pypi.org/project/OmniSTEval, Polák et al. 2025) cuts a
long stream into the segments of `segments.yaml`, whose transcripts are the lines of `references.txt`:

    simuleval --score-only --output FOLDER --quality-metrics BLEU --latency-metrics LAAL AL --computation-aware
    omnisteval longform --speech_segmentation FOLDER/segments.yaml --ref_sentences_file FOLDER/references.txt \
        --hypothesis_file FOLDER/instances.log --word_level
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.inference.streaming.commit import Event

LOG_FILE, SEGMENTS_FILE, REFERENCES_FILE = "instances.log", "segments.yaml", "references.txt"
SPEECH_TO_TEXT = "source_type: speech\ntarget_type: text\n"  # config.yaml, which SimulEval expects next to the log


def log_instance(
    events: Sequence[Event],
    *,
    name: str,
    audio_sec: float,
    reference: str = "",
    characters: bool = False,
    computed_sec: float | None = None,
    index: int = 0,
) -> dict[str, Any]:
    """Return one line of `instances.log`: of a recording's events, its name and length, and what was said in it.

    With `characters` these have times, not words: `--char_level`, `--eval-latency-unit char`. `computed_sec` is None
    where the events' clock is a listener's, 0 when the audio begins. Else the audio was fed as fast as it was taken,
    and the clock advanced so far until the last event; `elapsed` is then the audio heard plus the computing until then,
    as SimulEval itself has it (`--fix_simuleval_emission_ca` of OmniSTEval).
    """
    commits = [event for event in events if event.kind == "commit"]
    began_at = 0.0 if computed_sec is None else max((event.emitted_at for event in events), default=0.0) - computed_sec
    text, delays, elapsed = "", list[float](), list[float]()
    for event in commits:
        text += " " * bool(event.space and text) + event.text
        units = len("".join(text.split())) if characters else len(text.split())
        heard = 0.0 if computed_sec is None else event.audio_sec
        # a commit without a space before it continues the last word, which is whole with it
        known = len(delays) - (not characters and not event.space and bool(delays))
        delays[known:] = [1_000 * event.audio_sec] * (units - known)
        elapsed[known:] = [1_000 * (heard + event.emitted_at - began_at)] * (units - known)
    return {
        "index": index,
        "prediction": "".join(text.split()) if characters else " ".join(text.split()),
        "delays": delays,
        "elapsed": elapsed,
        "prediction_length": len(delays),
        "reference": reference,
        "source": [name],
        "source_length": 1_000 * audio_sec,
    }


def write_log(
    folder: Path, instances: Sequence[dict[str, Any]], segments: Sequence[Sequence[tuple[str, float, float]]] = ()
) -> None:
    """Write a folder for SimulEval and OmniSTEval; files that are there are replaced.

    `segments` has for each instance the transcripts in order, each with its beginning and end in seconds; by default
    the references, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(instance, ensure_ascii=False) for instance in instances]
    cut = segments or [[(each["reference"], 0.0, each["source_length"] / 1_000)] for each in instances]
    rows = [
        (each["source"][0], text, begin, end)
        for each, parts in zip(instances, cut, strict=True)
        for text, begin, end in parts
    ]
    # JSON is YAML
    listed = [json.dumps({"wav": wav, "offset": begin, "duration": end - begin}) for wav, _, begin, end in rows]
    for name, content in {
        LOG_FILE: lines,
        SEGMENTS_FILE: [f"- {line}" for line in listed],
        REFERENCES_FILE: [" ".join(text.split()) for _, text, _, _ in rows],
        "config.yaml": SPEECH_TO_TEXT.splitlines(),
    }.items():
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
