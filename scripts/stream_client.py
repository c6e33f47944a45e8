"""Send a recording or the microphone to a caption server, and show the captions as they come.

    python scripts/stream_client.py --file talk.wav --captions talk.srt
    python scripts/stream_client.py --microphone 600 --url wss://captions.example --token-env CAPTION_TOKEN

    python scripts/stream_client.py --file talk.wav --simuleval logs/talk --reference talk.txt

Committed text goes to standard output, a line for each stretch of speech; in a terminal, words that may still change
are shown dim below it. Ctrl-C ends the audio, and the rest is still captioned.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import path_argument, reports_errors, run_main
from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.inference.captions import LiveCaptionWriter
from src.inference.server.client import stream_to_server
from src.inference.server.protocol import DTYPES, Done, LiveEvent
from src.inference.streaming.commit import Event
from src.inference.streaming.microphone import Microphone, in_real_time
from src.inference.streaming.simuleval import log_instance, write_log
from src.inference.streaming.view import printable
from src.utils.errors import ConfigError
from src.utils.languages import is_unspaced_character
from src.utils.logging_config import setup_logging

CLEAR_BELOW = "\x1b[J"
ROW_BELOW = "\x1bD\x1b[A"  # makes sure that there is one: the terminal scrolls at its bottom
DIM_BELOW = "\x1b7\x1b[B\r\x1b[?7l\x1b[2m{}\x1b[0m\x1b[K\x1b[?7h\x1b8"  # on that row, cut off; the cursor returns


@reports_errors
def main() -> int:
    arguments = parse_arguments()
    setup_logging("INFO")
    interrupted = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time, it stops at once
        interrupted.set()

    signal.signal(signal.SIGINT, interrupt)
    reason = asyncio.run(run(arguments, interrupted))
    if reason != "end":
        print(f"the server ended the session before the audio did ({reason}); stream the rest again", file=sys.stderr)
        return 1
    return 0


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=path_argument, help="recording, sent in real time")
    source.add_argument("--microphone", type=float, metavar="SEC", help="record for so long")
    parser.add_argument("--fast", action="store_true", help="send the recording as fast as the server takes it")
    parser.add_argument("--url", default="ws://127.0.0.1:8765", help="of the server; default: %(default)s")
    parser.add_argument(
        "--language", help="code or name such as de, German; auto: the model's, else detected; default: the server's"
    )
    parser.add_argument("--model", metavar="NAME", help="one of those that the server has; default: its first")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the server's token")
    parser.add_argument("--format", choices=list(DTYPES), default="s16le", help="on the wire; default: %(default)s")
    parser.add_argument("--captions", type=path_argument, metavar="FILE", help="write them too, as .srt or .vtt")
    parser.add_argument("--simuleval", type=path_argument, metavar="FOLDER", help="write a log of it for SimulEval")
    parser.add_argument("--reference", type=path_argument, metavar="FILE", help="what is said, for the log")
    return parser.parse_args(given)


def read_token(name: str | None) -> str | None:
    """Return the token in an environment variable; None where none is named."""
    if name is None:
        return None
    token = os.environ.get(name)
    if not token:
        raise ConfigError(f"--token-env {name}: no such environment variable; export {name}=... in this shell")
    return token


async def run(arguments: argparse.Namespace, interrupted: threading.Event) -> str:
    """Stream, show and write; return why the session ended."""
    blocks, sample_rate = open_source(arguments)
    stream = stream_to_server(
        arguments.url,
        until(interrupted, blocks),
        sample_rate=sample_rate,
        sample_format=arguments.format,
        language=arguments.language,
        model=arguments.model,
        token=read_token(arguments.token_env),
    )
    reference = "" if arguments.reference is None else arguments.reference.read_text(encoding="utf-8")
    events: list[Event] = []
    began_sec = time.monotonic()
    follows = False  # a commit on this line, at its end a final
    with ExitStack() as stack:
        writer = None if arguments.captions is None else stack.enter_context(LiveCaptionWriter(arguments.captions))
        async with aclosing(stream) as messages:
            async for message in messages:
                if isinstance(message, LiveEvent):
                    events.append(replace(message.event, emitted_at=time.monotonic() - began_sec))
                    print(render(message.event, follows=follows, terminal=sys.stdout.isatty()), end="", flush=True)
                    follows = message.kind == "commit" or (follows and message.kind == "partial")
                    if writer is not None:
                        writer.write(message.event)
    if arguments.simuleval is not None:
        log_events(arguments, events, " ".join(reference.split()))
    assert isinstance(message, Done)  # else it has raised
    return message.reason


def log_events(arguments: argparse.Namespace, events: Sequence[Event], reference: str) -> None:
    """Write the log of the stream, on this machine's clock."""
    heard_sec = max((event.audio_sec for event in events), default=0.0)
    letters = [c for event in events if event.kind == "commit" for c in event.text if c.isalpha()]
    unspaced = sum(map(is_unspaced_character, letters))
    instance = log_instance(
        events,
        name="microphone" if arguments.file is None else arguments.file.name,
        audio_sec=heard_sec,
        reference=reference,
        characters=2 * unspaced > len(letters),
        computed_sec=events[-1].emitted_at if arguments.fast and events else None,
    )
    write_log(arguments.simuleval, [instance])


def open_source(arguments: argparse.Namespace) -> tuple[Iterable[Waveform], int]:
    """Return blocks of samples, and their rate in Hz."""
    if arguments.microphone is not None:
        microphone = Microphone(arguments.microphone)
        return microphone.blocks(), microphone.sample_rate
    audio = load_audio(arguments.file, allow_silence=True)
    return ([audio] if arguments.fast else in_real_time(audio)), SAMPLE_RATE


def until(interrupted: threading.Event, blocks: Iterable[Waveform]) -> Iterator[Waveform]:
    """Yield blocks until the event is set."""
    for block in blocks:
        yield block
        if interrupted.is_set():
            return


def render(event: Event, *, terminal: bool, follows: bool = False) -> str:
    """Return what to print: commits as they come, a line end at each final; in a terminal, the partial dim below.

    `follows` says that a commit stands before it on the line.
    """
    text = printable(event.text)  # a server may be anybody's
    clear = CLEAR_BELOW if terminal else ""
    if event.kind == "commit":
        return clear + " " * (follows and event.space) + text
    if event.kind == "final":
        return f"{clear}\n"
    return clear + ROW_BELOW + DIM_BELOW.format(text) if terminal else ""


if __name__ == "__main__":
    run_main(main)
