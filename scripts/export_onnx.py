"""Export a checkpoint to ONNX, see scripts/export.py for the other formats.

    python scripts/export_onnx.py --model checkpoints/best_model_hf --output exports/onnx --int8

Needs the optional packages onnx, onnxruntime and onnxscript. The last line printed is the folder; an error is one line,
with exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.command_line import run_main
from scripts.export import add_model_and_output
from scripts.export import main as export


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_and_output(parser)
    parser.add_argument("--int8", action="store_true", help="quantise the weights: a third of the size, or less")
    arguments = parser.parse_args(given)
    given = ["--model", arguments.model, "--output", str(arguments.output), "--format", "onnx"]
    return export([*given, "--quantization", "int8" if arguments.int8 else "none"])


if __name__ == "__main__":
    run_main(main)
