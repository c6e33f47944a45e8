"""Check that what the Colab badge opens and clones is this checkout: by hand, before and after a push.

    python scripts/check_release.py [--repository https://github.com/you/fork]

Reads the badge and the start cell of the notebook, clones what they name, and compares. Needs the network;
changes nothing. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nbformat

from src.utils.errors import first_line
from src.utils.validation import Check, CheckReport

NOTEBOOK = "whisper_asr_colab.ipynb"
BADGE = re.compile(r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([\w./-]+)/([\w.-]+\.ipynb)")


class ReleaseReport(CheckReport):
    """What is published, compared with this checkout."""

    title = "Release"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", help="what is published; by default what the start cell clones")
    report = ReleaseReport(tuple(check_release(ROOT, parser.parse_args().repository)))
    print(report.to_text())
    return 0 if report.ok else 1


def check_release(checkout: Path, repository: str | None = None) -> Iterator[Check]:
    """Compare badge, clone target, `start_session` and notebook of what is published with those of a checkout."""
    cells = nbformat.read(checkout / NOTEBOOK, as_version=4).cells
    badge = next((found for cell in cells if (found := BADGE.search(cell.source))), None)
    targets = [found[1] for cell in cells if (found := re.search(r'^REPOSITORY = "([^"]+)"', cell.source, re.M))]
    if badge is None or len(targets) != 1:
        fix = f"the first cell of {NOTEBOOK} needs a badge, and one cell REPOSITORY"
        yield Check("notebook", "error", f"{'no' if badge is None else 'a'} badge, {len(targets)} clone targets", fix)
        return
    named, branch, path = badge.groups()
    agree = targets[0].removesuffix(".git").endswith(f"github.com/{named}") and path == NOTEBOOK
    yield _judge(
        "badge", agree, f"opens {path} of {named}, branch {branch}", f"it must name {targets[0]} and {NOTEBOOK}"
    )
    shown = BADGE.search((checkout / "README.md").read_text(encoding="utf-8"))
    same = shown is not None and shown[0] == badge[0]
    yield _judge("badge of README.md", same, shown[0] if shown else "none", f"write {badge[0]}")

    source = repository or targets[0]
    with tempfile.TemporaryDirectory() as folder:
        cloned = Path(folder, "clone")
        done = _git("clone", "--quiet", "--depth", "1", source, str(cloned))
        if done.returncode:
            fix = "make it public, or correct REPOSITORY; a private repository cannot be opened in Colab"
            yield Check("clone target", "error", f"{source} cannot be cloned: {first_line(done.stderr)}", fix)
            return
        published = _git("-C", str(cloned), "rev-parse", "--abbrev-ref", "HEAD").stdout.strip()
        fix = f"make {branch} the default branch, which the start cell clones"
        yield _judge("clone target", published == branch, f"{source}, default branch {published}", fix)
        theirs, ours = (_start_session(place) for place in (cloned, checkout))
        push = f"commit, and push to {branch} of {source}"
        found = "is not there" if theirs is None else "as here" if theirs == ours else "differs"
        yield _judge("start_session", theirs == ours and ours is not None, found, push)
        for name in (NOTEBOOK, "requirements.txt", "config.yaml"):
            yield _judge(name, *_same(cloned / name, checkout / name), push)
        commits = [_git("-C", str(place), "rev-parse", "HEAD").stdout.strip() for place in (cloned, checkout)]
        changed = _git("-C", str(checkout), "status", "--porcelain").stdout.splitlines()
        found = f"{commits[0][:10]} published, {commits[1][:10]} here, {len(changed)} files changed since"
        yield _judge("commit", commits[0] == commits[1] and not changed, found, push)


def _judge(name: str, is_ok: bool, found: str, fix: str) -> Check:
    return Check(name, "ok", found) if is_ok else Check(name, "error", found, fix)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


def _start_session(place: Path) -> str | None:
    """Return the function that the start cell imports, as it is written there."""
    file = place / "src" / "utils" / "runtime.py"
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "start_session"]
    return found[0] if found else None


def _same(theirs: Path, ours: Path) -> tuple[bool, str]:
    if not theirs.is_file():
        return False, "is not there"
    is_same = theirs.read_bytes() == ours.read_bytes()
    return is_same, "as here" if is_same else "differs"


if __name__ == "__main__":
    sys.exit(main())
