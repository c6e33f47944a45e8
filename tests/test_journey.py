"""The whole journey: sessions that are killed, machines that come and go, a Drive that stays; other sources of data."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import soundfile
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from src.data import create_dataloaders, prepare_datasets
from src.data.audio import load_audio
from src.data.sources.catalog import SAMPLE_PARQUET
from src.data.utterance import Utterance
from src.inference.server.recorder import RecordingFolder
from src.utils import load_config
from tests.data.hub_layout import write_librispeech, write_minds14

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "whisper_asr_colab.ipynb"
START, SETTINGS, DATA, TRAIN, TABLE = "cell-02", "cell-06b", "cell-09", "cell-22", "cell-25"
SETTINGS_OF_TESTS = {
    "data.max_train": 8, "data.max_validation": 4, "data.max_test": 8, "training.epochs": 2, "training.batch_size": 4,
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
# imports torch once more, in a process of its own
NO_DOCTOR = "from src.utils import validation; validation._check_torch = lambda config=None: ()"
Cells = list[Any]


class Runtime:
    """A fresh machine with the code in a new folder, on which sessions run; a folder stands for Google Drive."""

    def __init__(self, folder: Path, drive: Path) -> None:
        self.folder, self._drive = folder, drive
        # with its bytecode, but for what another process writes now
        shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.pyc.*"))
        for name in ("config.yaml", "requirements.txt"):
            shutil.copy(ROOT / name, folder)

    def run(
        self,
        form: Mapping[str, Any],
        *,
        overrides: Mapping[str, Any] | None = None,
        kill_at: str | None = None,
        when: Callable[[], bool] = lambda: True,
    ) -> Cells:
        """Run all cells, with what a user fills in and ticks.

        `overrides` are in place of what the form of the data gives. In the cell `kill_at` the kernel is killed as soon
        as `when` is true. Returns the cells that were executed.
        """
        chosen = filled(form)
        if overrides is not None:
            made = nbformat.v4.new_code_cell(f"OVERRIDES = {dict(overrides)!r}")
            chosen.insert(1 + [cell.id for cell in chosen].index(SETTINGS), made)
        return self.execute(chosen, kill_at=kill_at, when=when)

    def execute(self, cells: Cells, *, kill_at: str | None = None, when: Callable[[], bool] = lambda: True) -> Cells:
        """Run cells in a kernel."""
        mount = nbformat.v4.new_code_cell(DRIVE.format(point=str(self.folder / "drive")))
        notebook = nbformat.v4.new_notebook(cells=[mount, *cells])
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "PYTHONPATH": str(ROOT / "tests" / "fake_colab"), "FAKE_COLAB_DRIVE": str(self._drive),
            "FAKE_COLAB_UPLOADS": str(self._drive / "uploads"),
        }  # fmt: skip
        client = NotebookClient(notebook, timeout=600, kernel_name="python3")
        with client.setup_kernel(cwd=str(self.folder), env=environment):
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

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Return the rows of an event in the metrics of the one run."""
        (metrics,) = self.folder.glob("runs/*/metrics.jsonl")
        found = map(json.loads, metrics.read_text().splitlines())
        return [row for row in found if row["event"] == event]


def filled(form: Mapping[str, Any]) -> Cells:
    """Return the code cells of the notebook, with what a user fills in and ticks."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for name, value in form.items():
        (place,) = (cell for cell in cells if re.search(rf"^{name} = .*#@param", cell.source, re.MULTILINE))
        place.source = re.sub(rf"^{name} = .*?(?=  #@param)", f"{name} = {value!r}", place.source, flags=re.M)
    return cells


def printed(cell: Any) -> str:
    """Return what a cell printed and logged."""
    return "".join(output.get("text", "") for output in cell.outputs)


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


@pytest.fixture
def recordings(drive: Path, sample: list[Utterance]) -> Path:
    """A folder on Drive, as people have theirs."""
    folder = drive / "MyDrive" / "recordings"
    folder.mkdir(parents=True)
    lines = ["file_name,text,speaker"]
    short = (clip for clip in sample[::8] if len(load_audio(clip.audio)) < 3.5 * 16_000)  # streamed in real time
    for number, clip in enumerate(islice(short, 25)):
        soundfile.write(folder / f"{number}.wav", load_audio(clip.audio), 16_000)
        lines.append(f"{number}.wav,{clip.text},{clip.speaker}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_three_kills_cost_nothing(drive: Path, recordings: Path, tmp_path: Path) -> None:
    form = {"PROFILE": "demo", "USE_DRIVE": True, "DATA_SOURCE": "folder", "DATA_PATH": "recordings"}
    session = partial(Runtime.run, form=form, overrides=SETTINGS_OF_TESTS)
    session(Runtime(tmp_path / "1", drive), kill_at=DATA)  # before there is anything to keep
    assert not list(drive.rglob("checkpoint-*"))

    kept = drive / "MyDrive" / "whisper_asr"
    session(Runtime(tmp_path / "2", drive), kill_at=TRAIN, when=lambda: any(kept.glob("*/checkpoint-*")))

    third = Runtime(tmp_path / "3", drive)
    done = session(third, kill_at="figures")
    assert [row["step"] for row in third.rows("train_step")] == list(range(1, 5))
    assert [row["epoch"] for row in third.rows("epoch")] == [1, 2]

    fourth = Runtime(tmp_path / "4", drive)
    last = fourth.run({"USE_DRIVE": True, "QUICK_RESTART": True, "LAUNCH_PAGE": True})
    assert fourth.rows("train_step") == third.rows("train_step")  # none was made again
    assert table(last) == table(done)
    said = {cell.id: printed(cell) for cell in last}
    assert all("done, from checkpoint" in said[each] for each in (DATA, "cell-16", "cell-18", TRAIN))
    assert "Demo(http://127.0.0.1:" in said["page"]
    assert (kept / "result" / "model.safetensors").stat().st_size > 0
    assert list((kept / "runs").glob("*/report.html"))


@pytest.mark.slow
def test_each_choice_of_data_is_loaded_in_colab(
    drive: Path, recordings: Path, sample: list[Utterance], tmp_path: Path
) -> None:
    """In one session, one after the other, without a network: data sets of the Hub are folders laid out as there."""
    colab, clips = Runtime(tmp_path / "colab", drive), sample[::20]
    (drive / "uploads").mkdir()
    shutil.make_archive(str(drive / "uploads" / "speech"), "zip", recordings)
    shutil.make_archive(str(drive / "MyDrive" / "speech"), "zip", recordings)
    own = RecordingFolder(colab.folder / "own")  # one person, in an earlier session
    for clip in clips[:5]:
        samples = np.rint(load_audio(clip.audio) * 32_767).astype(np.int16)
        own.keep(samples, 16_000, text=clip.text, speaker="Ann", language="en", date=datetime.now(UTC))
    own.give_back()
    calls = write_minds14(tmp_path / "minds14", clips)
    books = write_librispeech(
        tmp_path / "books", {"train.100": clips[:9], "validation": clips[9:12], "test": clips[12:]}
    )
    spoken = _pack_common_voice(clips, tmp_path / "corpus" / "cv-corpus-23.0" / "en")
    choices: dict[str, dict[str, Any]] = {
        "sample": {"DATA_SOURCE": "auto"},  # the log says why
        "folder": {"DATA_SOURCE": "folder", "DATA_PATH": "recordings"},
        "folder, a ZIP": {"DATA_SOURCE": "auto", "DATA_PATH": "speech.zip"},
        "folder, uploaded": {"DATA_SOURCE": "upload"},
        "folder, recorded": {"DATA_SOURCE": "folder", "DATA_PATH": "own", "RECORD": True, "FOLDER": "own"},
        "sample, chosen": {"DATA_SOURCE": "sample"},
        "minds14": {"DATA_SOURCE": "minds14", "HUB_ID": str(calls)},
        "librispeech": {"DATA_SOURCE": "librispeech", "HUB_ID": str(books)},
        "hub": {"DATA_SOURCE": "auto", "HUB_ID": str(calls), "HUB_CONFIG": "en-US"},
        "common_voice": {"DATA_SOURCE": "common_voice", "DATA_PATH": str(spoken)},
        "parquet": {"DATA_SOURCE": "parquet", "DATA_PATH": str(SAMPLE_PARQUET)},
    }
    few = {"PROFILE": "demo", "USE_DRIVE": True, "TRAIN_SAMPLES": 8, "VAL_SAMPLES": 2, "TEST_SAMPLES": 2}
    cells: Cells = [nbformat.v4.new_code_cell(NO_DOCTOR)]
    for number, form in enumerate(choices.values()):
        chosen = filled({**few, **form})
        chosen = chosen[: 1 + [cell.id for cell in chosen].index(DATA)]
        cells += [cell for cell in chosen if number == 0 or cell.id != START]
    names = [cell.id for cell in cells]
    done = colab.execute(cells)[1:]  # with other ids, where one was there twice
    loaded = [printed(cell) for name, cell in zip(names, done, strict=True) if name == DATA]
    for name, said in zip(choices, loaded, strict=True):
        assert f"{name.partition(',')[0]} | checksum" in said, said
    assert "source 'minds14' is unavailable" in loaded[0]
    pages = [printed(cell) for name, cell in zip(names, done, strict=True) if name == "record"]
    assert [("http://127.0.0.1:" in said) for said in pages] == ["RECORD" in form for form in choices.values()]


def _pack_common_voice(clips: Sequence[Utterance], folder: Path) -> Path:
    """Write an archive as Common Voice has them: the clips of one language, two folders down."""
    (folder / "clips").mkdir(parents=True)
    lines = ["client_id\tpath\tsentence"]
    for clip in clips:
        soundfile.write(folder / "clips" / f"{clip.id}.mp3", load_audio(clip.audio), 16_000)
        lines.append(f"{clip.speaker}\t{clip.id}.mp3\t{clip.text}")
    (folder / "train.tsv").write_text("\n".join(lines))
    return Path(shutil.make_archive(str(folder.parents[1]), "gztar", folder.parents[1]))


@pytest.mark.parametrize("source", ["common_voice", "parquet"])
def test_a_source_without_network_gives_batches(
    source: str, sample: list[Utterance], tiny_en: tuple[Any, Any], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus" / "cv-corpus-23.0" / "en"
    path = SAMPLE_PARQUET if source == "parquet" else _pack_common_voice(sample[::20], corpus)
    overrides = {**SETTINGS_OF_TESTS, "data.source": source, "data.path": str(path), "device": "cpu"}
    config = load_config(ROOT / "config.yaml", profile="demo", overrides=overrides)
    splits = prepare_datasets(config)
    assert not {u.speaker for u in splits.train} & {u.speaker for u in splits.test}
    loaders = create_dataloaders(splits, tiny_en[1], config)
    batch = next(iter(loaders.train))
    assert len(batch["ids"]) == config.training.batch_size
    assert (batch["labels"] >= 0).any(dim=1).all()
