from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from scripts.command_line import model_argument, parse_setting, path_argument

ROOT = Path(__file__).resolve().parents[2]


def test_paths_and_models_are_expanded_as_the_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SPEECH", "/data")
    assert path_argument("~/x") == Path("/home/me/x")
    assert path_argument("$SPEECH/x") == Path("/data/x")
    assert [model_argument(name) for name in ("tiny.en", "./base", "openai/whisper-tiny", "~/m", "${SPEECH}/m")] == [
        "tiny.en", "./base", "openai/whisper-tiny", "/home/me/m", "/data/m",
    ]  # fmt: skip
    for read in (path_argument, model_argument):
        with pytest.raises(ArgumentTypeError, match="ABSENT is not set"):
            read("$ABSENT/x")


def test_no_option_takes_a_path_as_it_is() -> None:
    for script in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = script.read_text()
        if script.name not in ("doctor.py", "compare_speed.py"):  # which import nothing of this at their top
            assert "type=Path" not in text, script
        for option in re.findall(r'add_argument\(\s*"--(?:model|stock)",[^)]*', text):
            assert "_argument" in option or "VARIANT" in option, (script, option)


@pytest.mark.parametrize(
    "given", ["training.epochs", "a=[" + "[" * 5000, "a={b: 1, b: 2}", "a=!!int ''", "a=" + "9" * 5000]
)
def test_a_setting_that_is_not_one_ends_the_command(given: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_setting(given)
    assert len(str(caught.value)) < 10_000
    assert parse_setting("training.epochs=5") == ("training.epochs", 5)
