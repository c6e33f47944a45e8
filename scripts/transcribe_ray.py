"""Transcribe on a Ray cluster: one model per actor, a few files per task, one output that goes on after a stop.

    python scripts/transcribe_ray.py corpus.jsonl --model base --output texts.jsonl --actors 2
    python scripts/transcribe_ray.py corpus.jsonl --model small --output texts.jsonl --address auto --actors 16 --gpus 1

Ray Data (ray.io) moves the files' names and the texts, never the audio: every machine needs this checkout, the model
and the recordings at the same paths. Without `--address` Ray runs on this machine. The other options are those of
scripts/transcribe.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import check_model_path, path_argument
from scripts.recordings import find_recordings
from scripts.transcribe import (
    Failure,
    add_arguments,
    configure,
    finish_with,
    iter_options,
    languages_of,
    load_inference,
    positive,
    run_rows,
    say_language,
)  # fmt: skip
from src.inference.files.transcribe import Transcription
from src.utils.config import Config
from src.utils.errors import MissingDependencyError


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE.jsonl", required=True, help="rows, on this machine"
    )
    parser.add_argument("--address", help="of the cluster, auto for the one that this machine is part of")
    parser.add_argument("--actors", type=positive, default=2, metavar="N", help="models at once; default: %(default)s")
    parser.add_argument("--cpus", type=positive, default=1, metavar="N", help="cores of an actor")
    parser.add_argument("--gpus", type=float, default=0.0, metavar="N", help="of an actor, such as 0.5")
    parser.add_argument("--files", type=positive, default=16, metavar="N", help="of a task; a stop loses at most these")
    return finish_with(run, parser.parse_args(given))


def run(arguments: argparse.Namespace) -> list[Failure]:
    """Complete a job of rows."""
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError("Ray is not installed: pip install 'ray[data]'")
    check_model_path(arguments.model)
    recordings = find_recordings(arguments.inputs)
    config = configure(arguments, device="cuda" if arguments.gpus else None)
    recordings = [replace(recording, path=str(Path(recording.path).resolve())) for recording in recordings]
    sources, languages = [recording.path for recording in recordings], languages_of(recordings)
    say_language(arguments, config)
    return run_rows(sources, arguments, config, lambda some: on_ray(some, languages, arguments, config))


def on_ray(
    sources: Sequence[str], languages: Mapping[str, str], arguments: argparse.Namespace, config: Config
) -> Iterator[Transcription]:
    """Let actors transcribe; yield what is done as it comes."""
    if not sources:
        return
    import ray

    ray.init(
        address=arguments.address,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}},
    )
    try:
        tasks = -(-len(sources) // arguments.files)
        found = ray.data.from_items([{"source": source} for source in sources], override_num_blocks=tasks).map_batches(
            Transcriber,
            fn_constructor_args=(
                arguments.model,
                config,
                arguments.cpus,
                iter_options(arguments) | {"languages": languages},
            ),
            batch_size=arguments.files,
            compute=ray.data.ActorPoolStrategy(size=min(arguments.actors, tasks)),
            num_cpus=arguments.cpus,
            num_gpus=arguments.gpus,
        )
        for row in found.iter_rows():
            yield pickle.loads(row["transcription"])  # made by our own actors
    finally:
        ray.shutdown()


class Transcriber:
    """An actor: a model, loaded once."""

    def __init__(self, model: str, config: Config, cores: int, options: dict[str, Any]) -> None:
        self._inference = load_inference(model, config, workers=cores)
        self._options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Transcribe the files of a task."""
        sources = [str(source) for source in batch["source"]]
        found = self._inference.transcribe_iter(sources, **self._options)
        return {"transcription": [pickle.dumps(transcription) for transcription in found]}


if __name__ == "__main__":
    sys.exit(main())
