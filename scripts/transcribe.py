"""Transcribe files, folders, globs and manifests: text, captions, or rows of a job that goes on after a stop.

    python scripts/transcribe.py talk.mp3 --model tiny.en
    python scripts/transcribe.py lectures/ --model runs/demo/best_model_ct2 --format srt,txt --output captions/
    python scripts/transcribe.py "calls/**/*.wav" --model base --output calls.jsonl
    accelerate launch --num_processes 4 scripts/transcribe.py corpus.jsonl --model base --output texts.jsonl

Each recording has one language: that of its row in a manifest (column language), else --language, else that of the
model, else what the model hears in the first 30 s of speech.

Without `--output` and `--format` it prints. Captions go next to each recording, or into a folder; existing ones are not
written again. An output that ends in .jsonl gets one row per recording; the same command goes on where it stopped, with
any number of processes. Exit code: 0; 1 if a recording failed; 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_settings, check_model_path, load_settings, model_argument, path_argument
from scripts.recordings import Recording, caption_paths, find_recordings
from src.inference.captions import write_captions
from src.inference.files.jobs import deal, run_job
from src.inference.files.transcribe import Transcription
from src.utils.config import Config, flatten
from src.utils.errors import AudioError, DataError, WhisperASRError, did_you_mean, visible
from src.utils.files import write_text_atomic
from src.utils.languages import language_name
from src.utils.logging_config import setup_logging
from src.utils.runtime import from_main, gather_objects, is_main_process, join_processes, rank, world_size

if TYPE_CHECKING:
    from src.inference.files.transcribe import BatchInference

FORMATS = ("txt", "srt", "vtt", "tsv", "json")
TIMED_BY_WORDS = {"srt", "vtt", "tsv"}  # a segment of up to 28 s is no caption
PATIENCE = timedelta(days=7)  # of the process that is done first
Failure = tuple[str, str]  # source, reason


def main(given: Sequence[str] | None = None) -> int:
    return finish_with(run, parse_arguments(given))


def finish_with(run: Callable[[argparse.Namespace], Sequence[Failure]], arguments: argparse.Namespace) -> int:
    """Run, say what failed, and return the exit code."""
    setup_logging("INFO" if arguments.verbose else "WARNING")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal knows every script
    try:
        failed = run(arguments)
    except WhisperASRError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        return 1 if isinstance(err, AudioError) else 2
    except KeyboardInterrupt:
        print("stopped; with --output or --format the same command goes on from here", file=sys.stderr)
        return 130
    if failed and is_main_process():
        print(f"{len(failed)} recording(s) failed:", *(reason for _, reason in failed), sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR|FILE.jsonl", help="folder of captions, or a file of rows"
    )
    parser.add_argument(
        "--format", type=formats, default=(), metavar="LIST", help=f"of captions, by comma: {', '.join(FORMATS)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="write existing captions again")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=positive, metavar="N", help="batches at once on a CPU; default: one per core")
    return parser.parse_args(given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every way to transcribe."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="a file; a folder; a quoted glob; a list (.txt) or manifest (.jsonl, .csv, .tsv) of files",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        type=model_argument,
        required=True,
        help="a name such as tiny.en; a Hugging Face or CTranslate2 folder",
    )
    parser.add_argument("--engine", choices=("auto", "torch", "ctranslate2"))
    parser.add_argument("--compute-type", metavar="TYPE", help="int8, float16, float32, ...")
    parser.add_argument(
        "--language",
        help="code or name, such as de or German; default: that of the model, else what it hears in each recording",
    )
    parser.add_argument("--task", choices=("transcribe", "translate"))
    parser.add_argument("--mode", choices=("segments", "sequential"), default="segments", help="of long recordings")
    parser.add_argument(
        "--words", action="store_true", help="time each word (each character of scripts without spaces)"
    )
    parser.add_argument("--audio-track", type=positive, metavar="N", help="of videos with several, counted from 1")
    parser.add_argument("--prompt", help="text that could stand before each recording: its style, its names")
    parser.add_argument("--hotwords", help="names and terms to expect, with commas; or a .txt file")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="segments decoded at once")
    parser.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="of a bad recording")
    parser.add_argument("--retry-errors", action="store_true", help="try recordings again that failed before")
    add_settings(parser, has_profiles=False)
    parser.add_argument("--verbose", action="store_true", help="log what is done, and why")


def formats(text: str) -> tuple[str, ...]:
    """Read "srt,txt"."""
    names = tuple(dict.fromkeys(name.strip().lower().lstrip(".") for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is unknown{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}"
            )
    return names


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def run(arguments: argparse.Namespace) -> list[Failure]:
    """Transcribe what the arguments name; return what failed."""
    check_output(arguments.output, arguments.format)
    check_model_path(arguments.model)
    recordings = find_recordings(arguments.inputs)
    join_processes(patience=PATIENCE)
    config = configure(arguments, device=arguments.device or own_device())
    sources, languages = [recording.path for recording in recordings], languages_of(recordings)
    say_language(arguments, config)
    if is_rows(arguments.output):
        return run_rows(sources, arguments, config, lambda some: transcribe(some, languages, arguments, config))
    if arguments.output is not None or arguments.format:
        return run_captions(recordings, arguments, config)
    if world_size() > 1:
        raise DataError("several processes need --output: FILE.jsonl, or a folder for captions")

    def show(each: Transcription) -> None:
        text = visible(each.text)
        print(f"{visible(each.source)}\t{text}" if len(sources) > 1 else text, flush=True)

    return write_each(transcribe(sources, languages, arguments, config), show, arguments)


def write_each(
    found: Iterable[Transcription], write: Callable[[Transcription], None], arguments: argparse.Namespace
) -> list[Failure]:
    """Write each text, say what is heard and lost, and return what failed, of all processes."""
    failed, cut_off, gaps, heard = list[Failure](), list[str](), list[str](), list[str | None]()
    for each in found:
        try:
            if each.error is not None:
                raise AudioError(each.error)
            write(each)
        except AudioError as err:
            failed.append((each.source, str(err)))
            continue
        cut_off += [each.source] * each.truncated
        gaps += [each.source] * bool(each.uncovered)
        heard.append(each.language)
    failed, cut_off, gaps, heard = (
        [each for part in gather_objects(mine) for each in part] for mine in (failed, cut_off, gaps, heard)
    )
    if is_main_process():
        say_languages(heard, arguments)
        warn_of_losses(cut_off, gaps)
    return failed


def languages_of(recordings: Sequence[Recording]) -> dict[str, str]:
    """Return the languages that manifests give, by source."""
    return {recording.path: recording.language for recording in recordings if recording.language}


def say_language(arguments: argparse.Namespace, config: Config) -> None:
    """Say what `--language` was taken for."""
    code = config.model.language
    if arguments.language and code and is_main_process():
        print(f"language: {language_name(code)} ({code})", file=sys.stderr)


def say_languages(heard: Sequence[str | None], arguments: argparse.Namespace) -> None:
    """Say how many recordings are in each language, where `--language` does not."""
    counts = Counter(filter(None, heard))
    if counts and not arguments.language:
        names = (f"{language_name(code)} ({code}) {count}" for code, count in counts.most_common())
        print("languages of the recordings:", ", ".join(names), file=sys.stderr)


def warn_of_losses(cut_off: Sequence[str], gaps: Sequence[str]) -> None:
    """Name the recordings whose text may go on, and those whose text leaves speech out."""
    for sources, what in (
        (cut_off, "ended at a limit of tokens; raise inference.max_tokens_per_sec, or check the language"),
        (gaps, "leave speech out, at the times above; check the language, or set a lower inference.max_segment_sec"),
    ):
        if sources:
            print(f"{len(sources)} text(s) {what}:", *map(visible, sources), sep="\n  ", file=sys.stderr)


def is_rows(output: Path | None) -> bool:
    return output is not None and output.suffix.lower() == ".jsonl" and not output.is_dir()


def check_output(output: Path | None, asked: Sequence[str]) -> None:
    """Refuse an output that is neither a folder nor rows."""
    if is_rows(output) and asked:
        raise DataError(f"--output {output}: rows have no --format; leave it out, or give a folder for captions")
    if output is None or is_rows(output) or output.is_dir():
        return
    name = output.suffix.lower().lstrip(".")
    if name in FORMATS or output.exists():
        raise DataError(f"--output {output}: not a folder; give one, with --format {name or 'srt'}, or FILE.jsonl")


def configure(arguments: argparse.Namespace, *, device: str | None) -> Config:
    """Lay the options over the configuration; `--set` has the last word."""
    options = {
        "inference.engine": arguments.engine,
        "inference.compute_type": arguments.compute_type,
        "inference.batch_size": arguments.batch_size,
        "inference.initial_prompt": arguments.prompt,
        "inference.hotwords": arguments.hotwords,
        "data.audio_track": arguments.audio_track,
        "model.language": arguments.language,
        "model.task": arguments.task,
        "device": device,
    }
    return load_settings(arguments, {key: value for key, value in options.items() if value is not None})


def own_device() -> str | None:
    """Return this process's GPU, where several processes share a machine."""
    if world_size() == 1:
        return None
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else None


def transcribe(
    sources: Sequence[str], languages: Mapping[str, str], arguments: argparse.Namespace, config: Config
) -> Iterator[Transcription]:
    """Load the model, unless there is nothing to do, and transcribe."""
    if sources:
        workers = arguments.workers or (1 if len(sources) == 1 else None)
        inference = load_inference(arguments.model, config, workers=workers)
        yield from inference.transcribe_iter(sources, languages=languages, **iter_options(arguments))


def load_inference(model: str, config: Config, *, workers: int | None) -> BatchInference:
    """Load the model; what it needs is imported only now, as that takes time."""
    from src.inference.engines import load_engine
    from src.inference.files.transcribe import BatchInference

    return BatchInference(config=config, engine=load_engine(model, config, workers=workers))


def iter_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `transcribe_iter`."""
    return {"word_timestamps": arguments.words, "on_error": arguments.on_error, "mode": arguments.mode}


def run_rows(
    sources: Sequence[str],
    arguments: argparse.Namespace,
    config: Config,
    transcribe: Callable[[list[str]], Iterable[Transcription]],
) -> list[Failure]:
    """Complete a job of rows, print what its output holds, and return what failed."""
    depends_on = {
        "model": config.model.model_dump(mode="json", include={"language", "task"}),
        "inference": config.inference.model_dump(mode="json", exclude={"batch_size"}),
        "vad": config.vad.model_dump(mode="json"),
        "data": {"audio_track": config.data.audio_track},
    }
    settings = {"model": arguments.model, "mode": arguments.mode, "words": arguments.words, **flatten(depends_on)}
    report = run_job(arguments.output, sources, transcribe, settings=settings, retry_errors=arguments.retry_errors)
    if is_main_process():
        held = f"{report.recordings} recordings, {report.audio_sec / 3600:.2f} h of audio"
        print(f"{arguments.output}: {held}", file=sys.stderr)
        warn_of_losses(report.truncated, report.uncovered)
    return list(report.failed)


def run_captions(recordings: Sequence[Recording], arguments: argparse.Namespace, config: Config) -> list[Failure]:
    """Write the missing captions, together with the other processes."""
    asked = arguments.format or ("txt",)
    wanted = from_main(lambda: wanted_captions(recordings, asked, arguments))
    pending = [source for source, paths in wanted.items() if paths]
    if len(pending) < len(wanted) and is_main_process():
        print(f"{len(wanted) - len(pending)} have captions already; --overwrite writes them again", file=sys.stderr)
    mine = from_main(lambda: deal(pending, world_size()))[rank()]
    arguments.words |= arguments.mode == "segments" and bool(TIMED_BY_WORDS & set(asked))

    def write(each: Transcription) -> None:
        for name, path in wanted[each.source].items():
            write_caption(path, name, each, task=config.model.task)

    return write_each(transcribe(mine, languages_of(recordings), arguments, config), write, arguments)


def wanted_captions(
    recordings: Sequence[Recording], asked: Sequence[str], arguments: argparse.Namespace
) -> dict[str, dict[str, Path]]:
    """Return the captions to write of each recording, by format."""
    wanted: dict[str, dict[str, Path]] = {}
    older = 0
    for source, paths in caption_paths(recordings, asked, arguments.output).items():
        there = {name for name, path in paths.items() if os.path.exists(path) and not arguments.overwrite}  # noqa: PTH110
        wanted[source] = {name: path for name, path in paths.items() if name not in there}
        older += any(os.path.getmtime(paths[name]) < _modified(source) for name in there)  # noqa: PTH204
    if older:
        print(f"captions of {older} recording(s) are older than these; --overwrite writes them again", file=sys.stderr)
    for folder in {path.parent for paths in wanted.values() for path in paths.values()}:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise DataError(f"{there}: captions cannot be written there; give a folder of yours with --output")
    return wanted


def _modified(source: str) -> float:
    return os.path.getmtime(source) if os.path.exists(source) else 0.0  # noqa: PTH110, PTH204


def write_caption(path: Path, name: str, transcription: Transcription, *, task: str = "transcribe") -> None:
    """Write one recording's captions in a format; as text, one segment per line."""
    try:
        if name == "txt":
            lines = (" ".join(segment.text.split()) for segment in transcription.segments)
            write_text_atomic(path, "".join(f"{line}\n" for line in lines))
            return
        losses: Any = {"truncated": transcription.truncated, "uncovered": transcription.uncovered}
        write_captions(path, transcription.cues(task=task), language=transcription.language, **losses)
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:
            raise AudioError(f"{visible(path)}: the name is too long for captions; rename the recording") from err
        raise DataError(f"{path}: cannot be written: {err.strerror}; give a folder of yours with --output") from err


if __name__ == "__main__":
    sys.exit(main())
