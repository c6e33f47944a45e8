"""Scripts that several processes run together on the CPU, as torch's launcher starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(script: Path, folder: Path, processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a script in so many processes; it gets the folder, which is made here, and the arguments."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), *map(str, arguments)]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def collect(folder: Path, process: subprocess.Popen[str], processes: int) -> list[dict[str, Any]]:
    """Wait, and return what each found: it leaves `found-<rank>.json` in the folder."""
    try:
        code = process.wait(timeout=300)
    finally:
        process.terminate()  # the launcher takes its processes along
    assert code == 0, (folder / "log.txt").read_text()[-4000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]
