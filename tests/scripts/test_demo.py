"""scripts/demo.py as its user runs it, and what it refuses."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from pathlib import Path

import pytest

from scripts import demo
from src.inference.ct2_engine import ct2_folder
from src.utils.config import load_config


@pytest.fixture(autouse=True)
def _logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "setup_logging", lambda level: None)  # it would last


@pytest.mark.slow
def test_the_page_is_served_until_the_process_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ct2_folder("tiny.en", quantization="int8", cache_dir=load_config(None).paths.cache_dir)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    seen: list[str] = []

    def visit(url: str) -> None:
        with urllib.request.urlopen(url) as answer:
            seen.append(answer.read().decode())
        os.kill(os.getpid(), signal.SIGTERM)

    def told(line: str, **_: bool) -> None:
        threading.Thread(target=visit, args=(line.removeprefix("open "),)).start()

    monkeypatch.setattr(demo, "print", told, raising=False)  # it tells when the handlers are there
    try:
        assert demo.main(["--model", str(folder), "--set", "device=cpu"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "Speech to text" in seen[0]


def test_a_model_that_is_not_there_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--model", str(tmp_path / "gone_hf")]) == 1
    assert "gone_hf: no such folder" in capsys.readouterr().err


def test_models_are_named_by_the_shortest_end_of_their_path() -> None:
    paths = ["tiny.en", "runs/a/best_hf", "runs/b/best_hf", "c/last_hf", "base", "/models/base"]
    assert list(demo.named(paths)) == ["tiny.en", "a/best_hf", "b/best_hf", "last_hf", "base", "models/base"]
