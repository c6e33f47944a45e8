"""Check this machine and say how to fix what is missing: the first thing to run when something fails.

    python scripts/doctor.py [--config config.yaml] [--profile demo]

Works with absent or broken packages; exits with 1 if anything is an error. Tokens are never shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from src.utils.config import Config
    from src.utils.validation import Check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="default: the project's config.yaml")
    parser.add_argument("--profile", help="profile of the configuration whose needs are checked")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  what is imported below needs it
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"error: this is Python {found}, 3.11 or newer is needed\nfix: make doctor PYTHON=python3.13")
        return 1
    try:
        from src.utils.validation import CheckReport, environment_report, run_check
    except ModuleNotFoundError as err:
        fix = "pip install -r requirements.txt -c constraints.txt, or make setup"
        print(f"error: {err.name} is not installed\nfix: {fix}")
        return 1
    from src.utils.files import project_file

    loaded: list[Config] = []
    path = arguments.config or project_file("config.yaml")
    checks = run_check("config", lambda: load(path, arguments.profile, loaded))
    checks += environment_report(loaded[0] if loaded else None).checks
    if loaded:
        checks += run_check("to start from", lambda: list_stored(loaded[0]))
    report = CheckReport(tuple(checks))
    print(report.to_text())
    return 0 if report.ok else 1


def load(path: str | Path, profile: str | None, loaded: list[Config]) -> Iterator[Check]:
    """Load the configuration into the list."""
    from src.utils.config import load_config
    from src.utils.files import expand_path
    from src.utils.validation import Check

    loaded.append(load_config(expand_path(path), profile=profile))
    yield Check("config", "ok", f"{path}, profile {loaded[0].profile}")


def list_stored(config: Config) -> tuple[Check, ...]:
    """Look at data, weights and checkpoints; imports torch."""
    from src.training.restart import stored_report

    return stored_report(config).checks


if __name__ == "__main__":
    sys.exit(main())
