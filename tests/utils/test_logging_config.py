from __future__ import annotations

import logging

import pytest

from src.utils.errors import visible
from src.utils.logging_config import setup_logging


def test_no_name_can_write_a_line_of_the_log_or_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        setup_logging()
        logging.getLogger("x").warning("%s: skipped", "a\n12:00:00 ERROR x: forged \x1b[2J\r\u2028\udce9.wav")
    finally:
        root.handlers[:], root.level = before
    first, second = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.endswith("WARNING x: a")
    assert second == r"    12:00:00 ERROR x: forged \x1b[2J\r\u2028\udce9.wav: skipped"


def test_ordinary_names_of_any_script_stay_as_they_are() -> None:
    for name in ("naïve café.wav", "漢字 नमस्ते", "می\u200cخواهم", "a\\nb"):
        assert visible(name) == name
