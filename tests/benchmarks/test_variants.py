"""The script's table, and a run with a variant whose weights are unavailable."""

from __future__ import annotations

import json

import pytest

from benchmarks import variants
from src.evaluation.variants import VariantFigures


def test_what_was_not_measured_is_blank_and_has_its_reason() -> None:
    cells = variants.table_row(VariantFigures("medium", "torch", reason="no network"))
    assert cells["not measured"] == "no network"
    assert {cells[name] for name in ("parameters", "weights", "memory", "RTF", "WER")} == {""}


@pytest.mark.slow
def test_each_variant_is_measured_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--quick", "--engine", "torch", "--variant", "medium", "--variant", "tiny.en"]
    monkeypatch.setattr("sys.argv", ["variants.py", *given])
    assert variants.main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["medium torch"] == {"rtf": None, "wer": None}
    assert 0 < figures["tiny.en torch"]["wer"] < 0.5
