from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.report.summary import (
    NOT_MEASURED,
    comparison_table,
    describe_comparison,
    format_comparison,
    last_training,
    load_metrics,
    load_predictions,
    summarize_run,
)
from src.utils.errors import DataError
from tests.evaluation.run_files import epoch, evaluation, prediction, steps, write


def test_summary_is_read_back_from_the_runs_files(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    assert summary.figures() == {"stock_wer": 0.37, "tuned_wer": 0.27, "streaming_wer": 0.3, "rtf": 0.06}
    assert summary.comparison is not None
    assert summary.comparison.verdict == "better"
    text = summary.to_text()
    for part in ("0.370 [0.320, 0.420]", "0.270 [0.220, 0.320]", "the tuned model is better", "WER 0.300", "RTF 0.30"):
        assert part in text


def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    rows = [prediction("stock", i, i % 2) for i in range(40)] + [prediction("tuned", i, 3) for i in range(40)]
    summary = summarize_run(write(tmp_path / "r", [evaluation("stock", 0.1), evaluation("tuned", 0.7)], rows))
    assert summary.comparison is not None
    assert "keep the stock model" in describe_comparison(summary.comparison)


def test_what_was_not_measured_is_said_and_never_zero(tmp_path: Path) -> None:
    row = evaluation("stock", 0.37) | {"rtf": None, "wer_low": None, "wer_high": None}
    table = comparison_table({"stock": row})
    assert table.loc["stock", "RTF"] == NOT_MEASURED
    assert table.loc["stock", "WER"] == "0.370"
    figures = summarize_run(write(tmp_path / "r", [row])).figures()
    assert figures["tuned_wer"] is None


def test_a_repeated_evaluation_replaces_the_first(run_dir: Path) -> None:
    with (run_dir / "predictions.jsonl").open("a") as file:
        file.write(json.dumps(prediction("tuned", 3, 4)) + "\n")
    rows = load_predictions(run_dir)["tuned"]
    assert len(rows) == 40
    assert next(row for row in rows if row.id == "u3").substitutions == 4


def test_absent_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        load_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"event": "epoch"}\n{"event": "tra')
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_metrics(tmp_path)


def test_table_puts_stock_first_with_change_and_verdict(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    shuffled = dict(reversed(list(summary.evaluations.items())))
    table = comparison_table(shuffled, summary.predictions)
    assert list(table.index) == ["stock", "tuned"]
    assert list(table["verdict"]) == ["", "better"]
    assert table.loc["tuned", "WER change"] == "-27.0 %"
    assert comparison_table(shuffled).loc["tuned", "verdict"] == NOT_MEASURED


def test_text_has_a_model_a_column_and_the_advice(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    lines = format_comparison(summary.evaluations, summary.predictions).splitlines()
    assert lines[0].split() == ["|", "|", "stock", "|", "tuned", "|"]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert lines[-1].startswith("tuned against stock: WER -37.5 points [")


def test_few_speakers_are_called_few(run_dir: Path) -> None:
    comparison = summarize_run(run_dir).comparison
    assert comparison is not None
    assert "over 8 speakers; so few that the interval is too narrow" in describe_comparison(comparison)


def test_rates_without_predictions_make_a_table_without_a_verdict(run_dir: Path) -> None:
    (run_dir / "predictions.jsonl").unlink()
    summary = summarize_run(run_dir)
    assert summary.comparison is None
    assert NOT_MEASURED in summary.to_text()


def test_a_row_that_is_no_prediction_is_named(run_dir: Path) -> None:
    (run_dir / "predictions.jsonl").write_text('{"model": "stock", "id": "u1"}\n')
    with pytest.raises(DataError, match=r"predictions\.jsonl, line 1: not a prediction"):
        load_predictions(run_dir)


def test_a_training_started_again_replaces_the_older_one() -> None:
    again = [*steps(4), epoch(1, 0.5, True), epoch(2, 0.4, True), *steps(2), epoch(1, 0.3, True)]
    step_rows, epoch_rows = last_training(again)
    assert [row["val_wer"] for row in epoch_rows] == [0.3]
    assert len(step_rows) == 2


def test_resumed_training_goes_on_with_its_epochs() -> None:
    _, epoch_rows = last_training([epoch(1, 0.5, True), epoch(2, 0.4, True), epoch(2, 0.3, True), epoch(3, 0.2, True)])
    assert [row["val_wer"] for row in epoch_rows] == [0.5, 0.3, 0.2]


def guard_rows(stock: int, tuned: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a guard set of 40 clips of 8 speakers, with so many errors a clip of 4 words."""
    models = {"stock (guard)": stock, "tuned (guard)": tuned}
    metrics = [{"event": "guard", "set": "LibriSpeech test-clean", "clips": 40, "speakers": 8}]
    metrics += [evaluation(name, errors / 4) for name, errors in models.items()]
    return metrics, [prediction(name, i + 100, errors) for name, errors in models.items() for i in range(40)]


def add_rows(run_dir: Path, metrics: list[dict[str, Any]], predictions: list[dict[str, Any]] | None = None) -> None:
    for name, rows in (("metrics.jsonl", metrics), ("predictions.jsonl", predictions or [])):
        with (run_dir / name).open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def mix_rows(wers: dict[float, float], chosen: float) -> list[dict[str, Any]]:
    return [{"event": "mix", "share": s, "wer": w, "clips": 64, "chosen": s == chosen} for s, w in wers.items()]


def test_better_at_home_and_worse_elsewhere_is_said_with_both_figures(run_dir: Path) -> None:
    add_rows(run_dir, *guard_rows(1, 3))
    summary = summarize_run(run_dir)
    lines = summary.to_text().splitlines()
    assert "guard: stock WER 0.250, tuned 0.750: worse on general speech by 50.0 points" in summary.to_text()
    (trade,) = [line for line in lines if "own domain" in line]
    assert trade.startswith(
        "the tuned model is better on its own domain (WER 0.370 to 0.270) but worse on the guard set (0.250 to 0.750)"
    )
    assert "guard set: LibriSpeech test-clean, 40 clips of 8 speakers" in lines
    assert summary.figures()["tuned_wer"] == 0.27  # the guard set changes no headline


def test_the_guard_set_has_its_own_columns_and_verdict(run_dir: Path) -> None:
    add_rows(run_dir, *guard_rows(1, 3))
    summary = summarize_run(run_dir)
    table = comparison_table({**summary.forgetting.guard, **summary.evaluations}, summary.predictions)
    assert list(table.index) == ["stock", "tuned", "stock (guard)", "tuned (guard)"]
    assert list(table["verdict"]) == ["", "better", "", "worse"]
    assert table.loc["tuned (guard)", "WER change"] == "+200.0 %"


@pytest.mark.parametrize(("tuned", "said"), [(0, "better on general speech by 25.0"), (1, "no difference shown on")])
def test_nothing_forgotten_needs_no_warning(run_dir: Path, tuned: int, said: str) -> None:
    add_rows(run_dir, *guard_rows(1, tuned))
    text = summarize_run(run_dir).to_text()
    assert said in text
    assert "own domain" not in text


def test_guard_figures_without_their_clips_give_no_verdict(run_dir: Path) -> None:
    add_rows(run_dir, guard_rows(1, 3)[0])
    text = summarize_run(run_dir).to_text()
    assert "guard: stock WER 0.250, tuned 0.750; no verdict" in text
    assert "own domain" not in text


def test_older_runs_say_nothing_of_guards_and_mixes(run_dir: Path) -> None:
    text = summarize_run(run_dir).to_text()
    assert "guard" not in text
    assert "mix" not in text


@pytest.mark.parametrize(
    ("chosen", "said"),
    [(0, "keep the stock model"), (0.5, "the mix of share 0.5 was taken"), (1, "no mix was taken")],
)
def test_the_last_sweep_is_told(run_dir: Path, chosen: float, said: str) -> None:
    add_rows(run_dir, [*mix_rows({0: 0.9, 0.1: 0.8, 1: 0.7}, 1), *mix_rows({0: 0.4, 0.5: 0.3, 1: 0.35}, chosen)])
    (line,) = [line for line in summarize_run(run_dir).to_text().splitlines() if line.startswith("mix: ")]
    assert "WER on 64 validation clips" in line
    assert ": 0 (stock) 0.400, 0.5 0.300, 1 (tuned) 0.350; " in line
    assert said in line
    add_rows(run_dir, [epoch(3, 0.2, True)])
    assert summarize_run(run_dir).forgetting.mix == []  # of weights that are no longer
