"""Another process that holds a lock file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from pathlib import Path
from src.utils.errors import DataError
from src.utils.files import claim
path = Path(sys.argv[1])
claim(path, sys, what=path, error=DataError, fix="")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(lock: Path) -> Iterator[int]:
    """Hold a lock file in another process for a block; yield its id; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(lock)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()
