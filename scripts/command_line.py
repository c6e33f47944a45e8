"""What the command lines of several scripts share; it imports nothing heavy."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from src.utils.config import parse_yaml
from src.utils.errors import ConfigError, ModelError
from src.utils.files import expand_path

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code; Ctrl-C is one line, not a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; nothing is left half-written, and the same command can be given again", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse_setting(text: str) -> tuple[str, Any]:
    """Read "training.epochs=5"; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--set {text}: write KEY=VALUE, for example training.epochs=5")
    try:
        return key.strip(), parse_yaml(value)
    except ConfigError as err:
        raise SystemExit(f"--set {text[:200]}: {err}") from err


def path_argument(text: str) -> Path:
    """Read a path; the shell leaves `~` and variables in `--output=~/x` and in quotes as they are."""
    try:
        return expand_path(text)
    except ConfigError as err:
        raise ArgumentTypeError(str(err)) from err


def model_argument(text: str) -> str:
    """Read a name of a model or the path of its folder; `./base` stays distinct from `base`."""
    return str(path_argument(text)) if text.startswith("~") or "$" in text else text


def check_model_path(model: str) -> None:
    """Refuse a path that is not there before the Hub is asked for it as if it were a repository."""
    path = Path(model)
    if path.exists() or len(path.parts) < 2 or not (path.is_absolute() or path.parent.is_dir()):
        return
    found = sorted(str(each.parent) for each in path.parent.glob("*/config.json"))
    known = f"checkpoints beside it: {', '.join(found)}" if found else "train first: scripts/train.py writes it"
    raise ModelError(f"--model {model}: no such folder; {known}")
