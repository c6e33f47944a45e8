"""The whole journey in a real kernel: sessions that are killed, Google Drive that stays, and other people's data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
import soundfile
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from src.data.audio import load_audio
from src.data.sources import SAMPLES_DIR
from src.data.utterance import Utterance

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "whisper_asr_colab.ipynb"
START, SETTINGS, TRAIN, TABLE = "cell-02", "cell-06b", "cell-22", "cell-25"
SETTINGS_OF_TESTS = {
    "data.max_train": 16, "data.max_validation": 4, "data.max_test": 8, "training.epochs": 2, "training.batch_size": 4,
    "checkpoints.save_minutes": None, "checkpoints.mirror_mb_per_sec": 1e6, "evaluation.bootstrap_samples": 200,
}  # fmt: skip
DRIVE = """
from pathlib import PosixPath
from src.utils import colab

class MountPoint(PosixPath):
    def is_mount(self):
        return self.is_symlink()

colab.MOUNT_POINT = MountPoint({point!r})  # where a test may write
"""
Cells = list[Any]


class Runtime:
    """A fresh machine with the repository's files, in which sessions run; a kernel sees Colab, and perhaps a Drive.

    Args:
        folder: made here; holds a copy of every tracked file.
        drive: stands for Google Drive; None: this is no Colab.
    """

    def __init__(self, folder: Path, drive: Path | None) -> None:
        self.folder, self._drive = folder, drive
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        for name in listed.stdout.decode().splitlines():
            if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)

    def run(
        self,
        form: Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] = SETTINGS_OF_TESTS,
        first: str = START,
        until: str | None = None,
        kill_at: str | None = None,
        when: Callable[[], bool] = lambda: True,
    ) -> Cells:
        """Run the start cell, then all from `first` on, with what a user fills in and ticks.

        Args:
            until: the last cell that runs.
            kill_at: cell in which the kernel is killed as soon as `when` is true.
        Returns: the cells that were executed.
        """
        notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
        notebook.cells = _chosen([c for c in notebook.cells if c.cell_type == "code"], first, until)
        _fill_in(notebook.cells, form)
        if first == START:
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


def table(cells: Cells) -> str:
    """Return the table of stock and tuned model, less what depends on the machine's speed."""
    (cell,) = (cell for cell in cells if cell.id == TABLE)
    text = next(output.data["text/plain"] for output in cell.outputs if "text/html" in output.get("data", {}))
    return re.sub(r"[\d.]+(?= +(full|dynamic) )", "", text)  # the column before the audio context is RTF


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    return tmp_path / "drive"


@pytest.mark.slow
def test_three_kills_cost_nothing(drive: Path, tmp_path: Path) -> None:
    form = {"PROFILE": "demo", "USE_DRIVE": True}
    Runtime(tmp_path / "1", drive).run(form, kill_at="cell-09")  # before there is anything to keep
    assert not list(drive.rglob("checkpoint-*"))

    kept = drive / "MyDrive" / "whisper_asr"
    Runtime(tmp_path / "2", drive).run(form, kill_at=TRAIN, when=lambda: any(kept.glob("*/checkpoint-*")))

    third = Runtime(tmp_path / "3", drive)
    done = third.run(form, kill_at="cell-30")
    assert [row["step"] for row in third.rows("train_step")] == list(range(1, 9))
    assert [row["epoch"] for row in third.rows("epoch")] == [1, 2]

    fourth = Runtime(tmp_path / "4", drive)
    last = fourth.run({"USE_DRIVE": True, "QUICK_RESTART": True}, first=TRAIN)
    assert fourth.rows("train_step") == third.rows("train_step")  # none was made again
    assert table(last) == table(done)
    assert (kept / "result" / "model.safetensors").stat().st_size > 0
    assert list((kept / "runs").glob("*/report.html"))


def _write_folder(clips: Sequence[Utterance], folder: Path) -> None:
    lines = ["file_name,text,speaker"]
    for number, clip in enumerate(clips):
        soundfile.write(folder / f"{number}.wav", load_audio(clip.audio), 16_000)
        lines.append(f"{number}.wav,{clip.text},{clip.speaker}")
    (folder / "metadata.csv").write_text("\n".join(lines))


def _write_common_voice(clips: Sequence[Utterance], folder: Path) -> None:
    (folder / "clips").mkdir()
    lines = ["client_id\tpath\tsentence"]
    for clip in clips:
        soundfile.write(folder / "clips" / f"{clip.id}.mp3", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.speaker}\t{clip.id}.mp3\t{clip.text}")
    (folder / "train.tsv").write_text("\n".join(lines))


def _copy_parquet(clips: Sequence[Utterance], folder: Path) -> None:
    for file in SAMPLES_DIR.glob("*.parquet"):
        shutil.copy(file, folder)


WRITERS = {"folder": _write_folder, "common_voice": _write_common_voice, "parquet": _copy_parquet}


@pytest.mark.slow
@pytest.mark.parametrize("source", WRITERS)
def test_each_choice_of_data_that_needs_no_network(source: str, sample: list[Utterance], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[source](sample[::20], data)
    choice = {"data.source": source, "data.path": str(data), "training.epochs": 1}
    runtime = Runtime(tmp_path / "runtime", None)
    runtime.run({"PROFILE": "demo"}, overrides={**SETTINGS_OF_TESTS, **choice}, until=TRAIN)
    (epoch,) = runtime.rows("epoch")
    assert epoch["val_wer"] > 0
