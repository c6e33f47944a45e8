"""Sessions of the notebook in a real kernel, on machines that come and go."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "whisper_asr_colab.ipynb"
START, SETTINGS, TRAIN = "cell-02", "cell-06b", "cell-22"
SETTINGS_OF_TESTS = {
    "data.max_train": 16, "data.max_validation": 4, "data.max_test": 8, "training.epochs": 2, "training.batch_size": 4,
    "checkpoints.save_minutes": None, "checkpoints.mirror_mb_per_sec": 1e6, "evaluation.bootstrap_samples": 200,
}  # fmt: skip
DRIVE = """
from pathlib import PosixPath
from src.utils import runtime

class MountPoint(PosixPath):
    def is_mount(self):
        return self.is_symlink()

runtime.MOUNT_POINT = MountPoint({point!r})  # where a test may write
"""
Cells = list[Any]


class Runtime:
    """A fresh machine with the code, on which sessions run.

    Args:
        folder: made here; holds the code.
        drive: stands for Google Drive, and the kernels believe that they are in Colab; None: they are not.
    """

    def __init__(self, folder: Path, drive: Path | None) -> None:
        self.folder, self._drive = folder, drive
        shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("config.yaml", "requirements.txt"):
            shutil.copy(ROOT / name, folder)

    def run(
        self,
        form: Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] | None = None,
        first: str = START,
        until: str | None = None,
        kill_at: str | None = None,
        when: Callable[[], bool] = lambda: True,
    ) -> Cells:
        """Run the start cell, then all from `first` on, with what a user fills in and ticks.

        Args:
            overrides: in place of what the form of the data gives.
            until: the last cell that runs.
            kill_at: cell in which the kernel is killed as soon as `when` is true.
        Returns: the cells that were executed.
        """
        notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
        notebook.cells = _chosen([c for c in notebook.cells if c.cell_type == "code"], first, until)
        _fill_in(notebook.cells, form)
        if overrides is not None:
            at = 1 + [cell.id for cell in notebook.cells].index(SETTINGS)
            notebook.cells.insert(at, nbformat.v4.new_code_cell(f"OVERRIDES = {dict(overrides)!r}"))
        if self._drive is not None:
            mount = DRIVE.format(point=str(self.folder / "drive"))
            notebook.cells.insert(0, nbformat.v4.new_code_cell(mount))
        client = NotebookClient(notebook, timeout=600, kernel_name="python3")
        with client.setup_kernel(cwd=str(self.folder), env=self._environment()):
            for index, cell in enumerate(notebook.cells):
                if cell.id != kill_at:
                    client.execute_cell(cell, index)
                    continue
                pid = client.km.provisioner.pid  # type: ignore[union-attr]
                threading.Thread(target=_kill, args=(pid, when), daemon=True).start()
                with pytest.raises(DeadKernelError):
                    client.execute_cell(cell, index)
                return notebook.cells[:index]
        return list(notebook.cells)

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        if self._drive is not None:
            environment |= {"PYTHONPATH": str(ROOT / "tests" / "fake_colab"), "FAKE_COLAB_DRIVE": str(self._drive)}
        return environment

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Return the rows of an event in the metrics of the one run."""
        (metrics,) = self.folder.glob("runs/*/metrics.jsonl")
        found = map(json.loads, metrics.read_text().splitlines())
        return [row for row in found if row["event"] == event]


def _chosen(cells: Cells, first: str, until: str | None) -> Cells:
    ids = [cell.id for cell in cells]
    below = cells[ids.index(first) : None if until is None else ids.index(until) + 1]
    return below if first == START else [cells[ids.index(START)], *below]


def _fill_in(cells: Cells, form: Mapping[str, Any]) -> None:
    for name, value in form.items():
        places = [cell for cell in cells if re.search(rf"^{name} = .*#@param", cell.source, re.MULTILINE)]
        assert len(places) == 1, name
        places[0].source = re.sub(rf"^{name} = .*?(?=  #@param)", f"{name} = {value!r}", places[0].source, flags=re.M)


def _kill(pid: int, when: Callable[[], bool]) -> None:
    while not when():
        time.sleep(0.05)
    os.kill(pid, 9)
