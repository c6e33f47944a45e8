"""Cut long recordings with subtitles or plain text into a folder of clips to train on.

    python scripts/prepare.py lectures/ --output clips/
    python scripts/prepare.py lectures.zip --output clips/ --model small --language de

Recordings have transcripts of their name next to them: talk.mp3 with talk.srt, .vtt, .ass, .lrc, .TextGrid, .json (of
whisper or whisperX), or .txt. The model listens, the transcript is aligned with what it hears, and what does not match
is left out with its reason. The output has metadata.csv and FLAC files, which `data.source: folder` and any other tool
reads, and preparation.json with what was left out. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import (
    add_settings,
    check_model_path,
    load_settings,
    model_argument,
    path_argument,
    reports_errors,
    run_main,
)  # fmt: skip
from src.inference.files.matching import MIN_SCORE
from src.inference.files.recordings import prepare_recordings
from src.utils.logging_config import setup_logging


@reports_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", type=path_argument, help="folder, or archive, of recordings with transcripts")
    parser.add_argument("--output", type=path_argument, required=True, help="new folder for the clips")
    parser.add_argument("--model", type=model_argument, help="that listens: a name or a folder; default: model.variant")
    parser.add_argument("--language", help="of the recordings; default: model.language, else what the model hears")
    parser.add_argument(
        "--min-score", type=float, default=MIN_SCORE,
        help="of the least certain word of a clip, 0 at most; higher leaves out more (default: %(default)s)",
    )  # fmt: skip
    add_settings(parser)
    arguments = parser.parse_args()
    setup_logging("INFO")
    named = {"model.variant": arguments.model, "model.language": arguments.language}
    config = load_settings(arguments, {key: value for key, value in named.items() if value})
    check_model_path(config.model.variant)
    prepared = prepare_recordings(arguments.recordings, arguments.output, config, min_score=arguments.min_score)
    for reason, count in prepared.reasons().most_common():
        print(f"{count} passage(s) left out: {reason}")
    figures = {
        "clips": prepared.clips,
        "recordings": len(prepared.recordings),
        "rejected": len(prepared.rejected),
        "speech_share": round(prepared.speech_share, 4),
        "output": str(prepared.folder),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    run_main(main)
