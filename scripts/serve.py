"""Serve live captions over a WebSocket, and files over OpenAI's API, on one port.

    python scripts/serve.py --model runs/demo/checkpoints/best_model_hf
    python scripts/serve.py --model tuned=runs/demo/checkpoints/best_model_hf --model stock=base --port 0

Prints the addresses when ready, and serves until Ctrl-C or SIGTERM; then every session is decoded to its end. Only this
machine can connect, unless `--host` says otherwise. scripts/stream_client.py is a client for live audio, whose wire
format is in src/inference/server/protocol.py; for files take any client of OpenAI's. docs/serving.md has both.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_settings, check_model_path, load_settings, model_argument, reports_errors, run_main
from scripts.stream_client import read_token
from src.data.vad import VoiceActivityDetector
from src.inference.engines import load_engine
from src.inference.server.host import LOOPBACK, ServedModel, ServerLimits
from src.inference.server.server import DEFAULT_PORT, CaptionServer
from src.utils import setup_logging
from src.utils.errors import ConfigError


@reports_errors
def main() -> int:
    arguments = parse_arguments()
    setup_logging("INFO")
    asyncio.run(serve(make_server(arguments), arguments.host, arguments.port))
    return 0


def parse_arguments() -> argparse.Namespace:
    limits = ServerLimits()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        action="append",
        type=named_model,
        required=True,
        metavar="[NAME=]MODEL",
        help="folder of a checkpoint, or a name such as tiny.en; may repeat: clients that name none, or whisper-1, "
        "get the first",
    )
    parser.add_argument("--host", default=LOOPBACK, help="to listen on; default: %(default)s, this machine only")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token of clients")
    parser.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="of a web page that may connect; may repeat"
    )
    parser.add_argument("--max-sessions", type=int, default=limits.max_sessions, help="default: %(default)s")
    parser.add_argument("--max-session-sec", type=float, default=limits.max_session_sec, help="default: %(default)s")
    parser.add_argument("--max-files", type=int, default=limits.max_files, help="at once; default: %(default)s")
    parser.add_argument(
        "--max-file-mb", type=float, default=limits.max_file_bytes / (1 << 20), help="default: %(default)g"
    )
    parser.add_argument("--idle-sec", type=float, default=limits.idle_sec, help="default: %(default)s")
    add_settings(parser)
    return parser.parse_args()


def named_model(text: str) -> tuple[str, str]:
    """Read NAME=MODEL; a model without a name has that of its folder."""
    name, _, model = text.partition("=") if re.match(r"[\w.-]+=", text) else ("", "", text)
    model = model_argument(model)
    name = name or Path(model).name
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r}: name it with letters, digits, '.', '_' or '-', as tuned={model}")
    return name, model


def make_server(arguments: argparse.Namespace) -> CaptionServer:
    """Load what all sessions share."""
    names = [name for name, _ in arguments.model]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--model: {', '.join(sorted(twice))} is given twice; name each, as in tuned=FOLDER")
    limits = ServerLimits(
        max_sessions=arguments.max_sessions,
        max_session_sec=arguments.max_session_sec,
        idle_sec=arguments.idle_sec,
        max_files=arguments.max_files,
        max_file_bytes=round(arguments.max_file_mb * (1 << 20)),
    )
    token = read_token(arguments.token_env)
    for _, model in arguments.model:
        check_model_path(model)
    models: dict[str, ServedModel] = {}
    for name, model in arguments.model:
        config = load_settings(arguments, {"model.variant": model})
        vad = next((each.vad for each in models.values()), None) or VoiceActivityDetector(config.vad)
        models[name] = ServedModel(load_engine(model, config), config, vad)
    return CaptionServer(models, limits=limits, token=token, origins=arguments.origin)


async def serve(server: CaptionServer, host: str, port: int) -> None:
    """Serve until the process is told to stop; told twice, it stops at once."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stopped.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    async with server.listen(host, port) as address:
        print(f"listening on {address}", flush=True)
        print(f"OpenAI's API: {address.replace('ws', 'http', 1)}/v1", flush=True)
        await stopped.wait()
        print("stopping: every session is decoded to its end", flush=True)


if __name__ == "__main__":
    run_main(main)
