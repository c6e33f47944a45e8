"""Record sentences from the browser into a folder to train on, each checked at once for level, clipping and silence.

    python scripts/record.py recordings/ --sentences sentences.txt --speaker ann --language de
    python scripts/record.py recordings/ --set data.source=folder --set data.path=speech/

Without `--sentences`, the page shows transcripts of the data that have all its words early. The folder has FLAC files
and metadata.csv, for `data.source: folder`. Started again, it goes on with the sentences not yet recorded. Only this
machine reaches the page, unless `--host` or `--share` says otherwise. It needs gradio 6: pip install gradio.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import add_settings, load_settings, path_argument, reports_errors, run_main
from scripts.demo import serve
from src.inference.server.host import LOOPBACK
from src.inference.server.recorder import launch_recorder
from src.utils.logging_config import setup_logging


@reports_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=path_argument, help="for the recordings: new, or one recorded into before")
    parser.add_argument("--sentences", type=path_argument, help="text file with one per line; default: of the data")
    parser.add_argument("--speaker", default="", help="that the page begins with")
    parser.add_argument("--language", help="of the sentences; default: model.language")
    parser.add_argument("--host", default=LOOPBACK, help="to listen on; default: %(default)s, this machine only")
    parser.add_argument("--port", type=int, help="default: a free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="open a public address through Gradio's servers")
    add_settings(parser)
    given = parser.parse_args()
    setup_logging("INFO")
    config = load_settings(given, {"model.language": given.language} if given.language else {})
    page = launch_recorder(
        given.folder, given.sentences, config=config, speaker=given.speaker, share=given.share,
        server_name=given.host, port=given.port,
    )  # fmt: skip
    serve(page)
    return 0


if __name__ == "__main__":
    run_main(main)
