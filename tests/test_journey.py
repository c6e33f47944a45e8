"""The whole journey: sessions that are killed, machines that come and go, a Drive that stays."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import soundfile

from src.data.audio import load_audio
from src.data.utterance import Utterance
from tests.runtime import SETTINGS_OF_TESTS, TRAIN, Cells, Runtime

TABLE = "cell-25"


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
    for number, clip in enumerate(sample[::20]):
        soundfile.write(folder / f"{number}.wav", load_audio(clip.audio), 16_000)
        lines.append(f"{number}.wav,{clip.text},{clip.speaker}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_three_kills_cost_nothing(drive: Path, recordings: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS_OF_TESTS, "data.source": "folder", "data.path": str(recordings)}
    session = partial(Runtime.run, form={"PROFILE": "demo", "USE_DRIVE": True}, overrides=settings)
    session(Runtime(tmp_path / "1", drive), kill_at="cell-09")  # before there is anything to keep
    assert not list(drive.rglob("checkpoint-*"))

    kept = drive / "MyDrive" / "whisper_asr"
    session(Runtime(tmp_path / "2", drive), kill_at=TRAIN, when=lambda: any(kept.glob("*/checkpoint-*")))

    third = Runtime(tmp_path / "3", drive)
    done = session(third, kill_at="cell-30")
    assert [row["step"] for row in third.rows("train_step")] == list(range(1, 9))
    assert [row["epoch"] for row in third.rows("epoch")] == [1, 2]

    fourth = Runtime(tmp_path / "4", drive)
    last = fourth.run({"USE_DRIVE": True, "QUICK_RESTART": True, "LAUNCH_PAGE": True}, first=TRAIN)
    assert fourth.rows("train_step") == third.rows("train_step")  # none was made again
    assert table(last) == table(done)
    (page,) = (cell for cell in last if cell.id == "page")
    assert "Demo(http://127.0.0.1:" in "".join(output.get("text", "") for output in page.outputs)
    assert (kept / "result" / "model.safetensors").stat().st_size > 0
    assert list((kept / "runs").glob("*/report.html"))
