"""Serve a web page to try models on: live captions, files, and two models side by side.

    python scripts/demo.py --model tiny.en
    python scripts/demo.py --model runs/demo/checkpoints/best_model_hf --stock tiny.en
    python scripts/demo.py --model draft_hf --model final_hf --stock base --share

Prints the address, and serves until Ctrl-C or SIGTERM. Only this machine can open it, unless `--host` or `--share` says
otherwise. It needs gradio 6: pip install gradio.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_settings, check_model_path, load_settings, model_argument, reports_errors, run_main
from src.inference.server.host import LOOPBACK, ServerLimits
from src.inference.server.page import MAX_UPLOAD_SEC, launch_demo
from src.inference.server.served import ServedPage
from src.utils.logging_config import setup_logging


@reports_errors
def main(given: Sequence[str] | None = None) -> int:
    limits = ServerLimits()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=model_argument,
        action="append",
        required=True,
        help="folder of a checkpoint, or a name such as tiny.en; may repeat",
    )
    parser.add_argument("--stock", type=model_argument, metavar="VARIANT", help="to compare with, such as tiny.en")
    parser.add_argument("--share", action="store_true", help="open a public address through Gradio's servers")
    parser.add_argument("--host", default=LOOPBACK, help="to listen on; default: %(default)s, this machine only")
    parser.add_argument("--port", type=int, help="default: a free one from 7860 on")
    parser.add_argument(
        "--max-sessions", type=int, default=limits.max_sessions, help="microphones; default: %(default)s"
    )
    parser.add_argument(
        "--max-upload-sec", type=float, default=MAX_UPLOAD_SEC, metavar="SEC", help="of a file; default: %(default)g"
    )
    add_settings(parser, has_profiles=False)
    arguments = parser.parse_args(given)
    setup_logging("INFO")
    for model in arguments.model:
        check_model_path(model)
    page = launch_demo(
        models=named(arguments.model),
        stock=arguments.stock,
        config=load_settings(arguments),
        share=arguments.share,
        server_name=arguments.host,
        port=arguments.port,
        limits=ServerLimits(max_sessions=arguments.max_sessions),
        max_upload_sec=arguments.max_upload_sec,
    )
    serve(page)
    return 0


def named(models: Sequence[str]) -> dict[str, str]:
    """Give each model the shortest end of its path that no other has, such as "draft/best_model_hf"."""
    names = {}
    for model in models:
        parts = Path(model).parts
        ends = ["/".join(parts[-size:]) for size in range(1, len(parts) + 1)]
        others = [other for other in models if other != model]
        alone = (end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others))
        names[next(alone, model)] = model
    return names


def serve(page: ServedPage) -> None:
    """Serve until the process is told to stop."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with page:
        print(f"open {page.share_url or page.url}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    run_main(main)
