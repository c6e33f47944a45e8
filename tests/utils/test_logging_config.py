from __future__ import annotations

import io
import logging
import threading

import pytest

from src.utils.errors import visible
from src.utils.logging_config import ProgressBar, setup_logging


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


def test_a_bar_interrupted_while_it_is_drawn_keeps_no_lock_and_nothing_watches_it() -> None:
    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "loss=1" in text:
                raise KeyboardInterrupt
            return super().write(text)

    with pytest.raises(KeyboardInterrupt), ProgressBar(total=2, file=Screen()) as bar:
        bar.set_postfix(loss=1)
    screen, other = io.StringIO(), threading.Thread(target=lambda: ProgressBar([0], file=screen).close(), daemon=True)
    other.start()
    other.join(10)
    assert "0/1" in screen.getvalue()
    assert not [thread for thread in threading.enumerate() if getattr(thread, "tqdm_cls", None) is ProgressBar]
