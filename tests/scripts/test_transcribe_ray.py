"""Bulk transcription on a local Ray, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from scripts.transcribe_ray import main
from src.data.sources.catalog import SAMPLE_CLIP


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'ray[data]'")
def test_two_actors_transcribe_each_file_once_and_a_second_run_nothing(tmp_path: Path) -> None:
    for name in "abc":
        shutil.copy(SAMPLE_CLIP, tmp_path / f"{name}.flac")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    output = tmp_path / "texts.jsonl"
    command = [str(tmp_path), "--model", "tiny.en", "--output", str(output), "--files", "2"]
    assert main(command) == 1  # one recording is bad
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["source"]).name for row in rows] == ["a.flac", "b.flac", "bad.wav", "c.flac"]
    assert {row["text"] for row in rows if row["error"] is None} == {rows[0]["text"]}
    written = output.read_bytes()
    assert main(command) == 1
    assert output.read_bytes() == written


def test_without_ray_the_line_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(SAMPLE_CLIP), "--model", "tiny.en", "--output", str(tmp_path / "a.jsonl")]) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err
