"""Serve live captions over a WebSocket: several sessions on one model.

    python scripts/serve.py --model runs/demo/checkpoints/best_model_hf
    python scripts/serve.py --model base --port 0 --max-sessions 2 --set model.language=de

Prints the address when ready, and serves until Ctrl-C or SIGTERM; then every session is decoded to its end. Only this
machine can connect, unless `--host` says otherwise. scripts/stream_client.py is a client; the wire format is in
src/inference/server/protocol.py.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_model, add_settings, check_model_path, load_settings, run_main
from scripts.stream_client import read_token
from src.data.vad import VoiceActivityDetector
from src.inference.engine_base import Engine
from src.inference.engines import load_engine
from src.inference.server.host import LOOPBACK, ServerLimits
from src.inference.server.server import DEFAULT_PORT, CaptionServer, SessionFactory
from src.inference.streaming.session import StreamingASR
from src.utils import setup_logging
from src.utils.config import Config
from src.utils.errors import ConfigError, DataError, WhisperASRError
from src.utils.languages import known_language, parse_language


def main() -> int:
    arguments = parse_arguments()
    setup_logging("INFO")
    logging.getLogger("websockets").setLevel(logging.WARNING)  # the server tells of sessions itself
    try:
        server = make_server(arguments)
        asyncio.run(serve(server, arguments.host, arguments.port))
    except WhisperASRError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    limits = ServerLimits()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--host", default=LOOPBACK, help="to listen on; default: %(default)s, this machine only")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token of clients")
    parser.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="of a web page that may connect; may repeat"
    )
    parser.add_argument("--max-sessions", type=int, default=limits.max_sessions, help="default: %(default)s")
    parser.add_argument("--max-session-sec", type=float, default=limits.max_session_sec, help="default: %(default)s")
    parser.add_argument("--idle-sec", type=float, default=limits.idle_sec, help="default: %(default)s")
    add_settings(parser)
    return parser.parse_args()


def make_server(arguments: argparse.Namespace) -> CaptionServer:
    """Load what all sessions share."""
    check_model_path(arguments.model)
    config = load_settings(arguments, {"model.variant": arguments.model})
    limits = ServerLimits(
        max_sessions=arguments.max_sessions, max_session_sec=arguments.max_session_sec, idle_sec=arguments.idle_sec
    )
    token = read_token(arguments.token_env)
    engine = load_engine(config.model.variant, config)
    make_session = session_factory(engine, VoiceActivityDetector(config.vad), config)
    return CaptionServer(make_session, limits=limits, token=token, origins=arguments.origin)


def session_factory(engine: Engine, vad: VoiceActivityDetector | None, config: Config) -> SessionFactory:
    """Return what makes a session for a mark of a language, "auto", or None for the language of `config`."""
    languages = engine.vocabulary.languages or {"en"}

    def make_session(language: str | None) -> StreamingASR:
        if language is None:
            return StreamingASR(engine=engine, vad=vad, config=config)
        try:
            code = None if language.strip().lower() == "auto" else known_language(parse_language(language), languages)
        except DataError as err:
            raise ConfigError(str(err)) from err
        spoken = config.model.model_copy(update={"language": code})
        return StreamingASR(engine=engine, vad=vad, config=config.model_copy(update={"model": spoken}))

    return make_session


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
        await stopped.wait()
        print("stopping: every session is decoded to its end", flush=True)


if __name__ == "__main__":
    run_main(main)
