"""What the command lines of several scripts share; it imports nothing heavy."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from src.utils.config import Config, load_config, parse_yaml
from src.utils.errors import ConfigError, ModelError, WhisperASRError
from src.utils.files import expand_path, project_file
from src.utils.runtime import is_main_process

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code; Ctrl-C is one line, not a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; nothing is left half-written, and the same command can be given again", file=sys.stderr)
        sys.exit(INTERRUPTED)


def reports_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Make of what a user can correct one line of the main process, and exit code 1."""

    @wraps(main)
    def reporting(*given: Any) -> int:
        try:
            return main(*given)
        except WhisperASRError as err:
            if is_main_process():
                print(f"{type(err).__name__}: {err}", file=sys.stderr)
            return 1

    return reporting


def print_result(work: Callable[[], object]) -> int:
    """Print what work gives as the last line, or its error, files included, as one line; return the exit code."""
    try:
        print(work())
    except (WhisperASRError, OSError) as err:
        print(f"{type(err).__name__}: {' '.join(str(err).split())}", file=sys.stderr)
        return 2
    return 0


def run_command() -> NoReturn:
    """Run the script that an installed command is named after: `whisper-train` is scripts/train.py."""
    script = Path(sys.argv[0]).stem.removeprefix("whisper-").replace("-", "_")
    run_main(importlib.import_module(f"scripts.{script}").main)


def add_settings(parser: ArgumentParser, *, has_profiles: bool = True) -> None:
    """Add the options that `load_settings` reads."""
    parser.add_argument("--config", type=path_argument, default=project_file("config.yaml"))
    parser.set_defaults(profile=None)
    if has_profiles:
        parser.add_argument("--profile", help="one of the file's profiles")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting; may repeat"
    )


def load_settings(arguments: Namespace, options: Mapping[str, Any] | None = None) -> Config:
    """Lay what other options mean over the configuration; `--set` has the last word."""
    overrides = {**(options or {}), **parse_settings(arguments)}
    return load_config(arguments.config, profile=arguments.profile, overrides=overrides)


def parse_settings(arguments: Namespace) -> dict[str, Any]:
    """Read all `--set`."""
    return dict(map(parse_setting, arguments.set))


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


def add_model(parser: ArgumentParser) -> None:
    """Add the option that names a model."""
    parser.add_argument(
        "--model", type=model_argument, required=True, help="folder of a checkpoint, or a name such as tiny.en"
    )


def check_model_path(model: str) -> None:
    """Refuse a path that is not there before the Hub is asked for it as if it were a repository."""
    path = Path(model)
    if path.exists() or len(path.parts) < 2 or not (path.is_absolute() or path.parent.is_dir()):
        return
    found = sorted(str(each.parent) for each in path.parent.glob("*/config.json"))
    known = f"checkpoints beside it: {', '.join(found)}" if found else "train first: scripts/train.py writes it"
    raise ModelError(f"--model {model}: no such folder; {known}")
