from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(*given: str) -> subprocess.Popen[str]:
    command = [sys.executable, "scripts/record.py", *given]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_stop_and_frees_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("Größe und Maß.\n\nZwei.\n", encoding="utf-8")
    with start(str(tmp_path / "kept"), "--sentences", str(sentences), "--language", "de") as process:
        assert process.stdout is not None
        opened = process.stdout.readline()
        assert httpx.get(opened.removeprefix("open ").strip()).status_code == 200
        with start(str(tmp_path / "kept"), "--sentences", str(sentences)) as second:
            _, said = second.communicate()
            assert (second.returncode, "writes there" in said.splitlines()[-1]) == (1, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_file_without_a_sentence_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with start(str(tmp_path / "kept"), "--sentences", str(tmp_path / "empty.txt")) as process:
        _, said = process.communicate()
        assert process.returncode == 1
        assert said.splitlines()[-1].startswith("DataError: ")
        assert not (tmp_path / "kept").exists()
