from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.evaluation.report.run_files import load_predictions
from src.evaluation.report.summary import (
    NOT_MEASURED,
    comparison_table,
    describe_comparison,
    escape_markdown,
    format_comparison,
    headline,
    language_table,
    main_model,
    markdown_table,
    more_rates,
    number,
    slice_table,
    summarize_run,
)
from src.utils.errors import DataError
from tests.evaluation.run_files import (
    append,
    epoch,
    evaluation,
    guard_rows,
    prediction,
    spoken_results,
    spoken_run,
    write,
)


def test_a_summary_is_read_from_the_runs_files(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    assert summary.figures() == {"stock_wer": 0.37, "tuned_wer": 0.27, "streaming_wer": 0.3, "rtf": 0.06}
    text = summary.to_text()
    for part in ("0.370 [0.320, 0.420]", "0.270 [0.220, 0.320]", "WER 0.300", "RTF 0.30", "epoch 2", "8 speakers"):
        assert part in text
    assert str(run_dir / "predictions.jsonl") in text
    assert "guard" not in text
    assert "mix" not in text


@pytest.mark.parametrize(("tuned", "verdict"), [(0, "better"), (2, "no difference shown"), (3, "worse")])
def test_the_verdict_and_its_advice(tmp_path: Path, tuned: int, verdict: str) -> None:
    rows = [prediction("stock", i, 2) for i in range(40)] + [prediction("tuned", i, tuned) for i in range(40)]
    metrics = [evaluation("stock", 0.5), evaluation("tuned", tuned / 4)]
    comparison = summarize_run(write(tmp_path / "r", metrics, rows)).comparison
    assert comparison is not None
    assert comparison.verdict == verdict
    assert ("keep the stock model" in describe_comparison(comparison)) == (verdict != "better")


def test_what_was_not_measured_is_said_and_never_zero(tmp_path: Path) -> None:
    row = evaluation("stock", 0.37) | {"rtf": None, "wer_low": None, "wer_high": None}
    table = comparison_table({"stock": row})
    assert (table.loc["stock", "RTF"], table.loc["stock", "WER"]) == (NOT_MEASURED, "0.370")
    assert summarize_run(write(tmp_path / "r", [row])).figures()["tuned_wer"] is None
    unmeasured = summarize_run(write(tmp_path / "r", [epoch(1, None, False)])).to_text()
    assert "nothing was evaluated" in unmeasured
    assert NOT_MEASURED in unmeasured
    with pytest.raises(DataError):
        comparison_table({})


def test_one_clip_has_no_interval_and_a_missing_rate_no_change(tmp_path: Path) -> None:
    metrics = [evaluation("stock", 0.0) | {"cer": None}, evaluation("tuned", 0.25)]
    summary = summarize_run(write(tmp_path / "r", metrics, [prediction("stock", 0, 0), prediction("tuned", 0, 1)]))
    table = comparison_table(summary.evaluations, summary.predictions)
    assert list(table.loc["tuned", ["WER change", "CER change"]]) == ["", ""]
    assert table.loc["tuned", "verdict"] == "too few to tell"
    assert "no interval from 1 clip); too few to tell: keep the stock model, or measure on 5" in summary.to_text()


def test_the_table_puts_stock_first_with_change_and_verdict(run_dir: Path) -> None:
    summary = summarize_run(run_dir)
    shuffled = dict(reversed(list(summary.evaluations.items())))
    table = comparison_table(shuffled, summary.predictions)
    assert list(table.index) == ["stock", "tuned"]
    assert list(table["verdict"]) == ["", "better"]
    assert table.loc["tuned", "WER change"] == "-27.0 %"
    lines = format_comparison(shuffled, summary.predictions).splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert "-37.5 points" in lines[-1]
    # rates without predictions make a table without a verdict
    (run_dir / "predictions.jsonl").unlink()
    assert summarize_run(run_dir).comparison is None
    assert comparison_table(summary.evaluations).loc["tuned", "verdict"] == NOT_MEASURED


def test_cells_of_a_markdown_table_cannot_break_it() -> None:
    table = markdown_table(["a", "b|c"], [("# x\n| y", "<b>"), ("---", 1)])
    assert [line.replace("\\|", "").count("|") for line in table.splitlines()] == [3] * 4
    assert "<" not in table


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[31m\0", r"a\x1b[31m\x00"), ("![x](http://e/x.png)", r"!\[x](http://e/x.png)"), ("a\nb<i>", "a b&lt;i>")],
)
def test_a_text_brings_no_control_character_picture_or_element_into_a_card(text: str, shown: str) -> None:
    assert escape_markdown(text) == shown


@pytest.mark.parametrize(("tuned", "verdict"), [(3, "worse"), (1, "no difference shown"), (0, "better")])
def test_better_at_home_and_worse_elsewhere_is_said(run_dir: Path, tuned: int, verdict: str) -> None:
    metrics, predictions = guard_rows(1, tuned)
    append(run_dir, "metrics", *metrics)
    append(run_dir, "predictions", *predictions)
    summary = summarize_run(run_dir)
    assert ("own domain" in summary.to_text()) == (verdict == "worse")
    assert "LibriSpeech test-clean, 40 clips of 8 speakers" in summary.to_text()
    assert summary.figures()["tuned_wer"] == 0.27  # the guard set changes no headline
    table = comparison_table({**summary.guard, **summary.evaluations}, summary.predictions)
    assert list(table.index) == ["stock", "tuned", "stock (guard)", "tuned (guard)"]
    assert list(table["verdict"]) == ["", "better", "", verdict]
    assert table.loc["tuned (guard)", "WER change"] == f"{100 * (tuned - 1):+.1f} %"


@pytest.mark.parametrize(("chosen", "said"), [(0, "keep the stock model"), (0.5, "share 0.5"), (1, "no mix")])
def test_the_last_sweep_over_mixes(run_dir: Path, chosen: float, said: str) -> None:
    def sweep(wers: dict[float, float], chosen: float) -> list[dict[str, Any]]:
        return [{"event": "mix", "share": s, "wer": w, "clips": 64, "chosen": s == chosen} for s, w in wers.items()]

    append(run_dir, "metrics", *sweep({0: 0.9, 0.1: 0.8, 1: 0.7}, 1), *sweep({0: 0.4, 0.5: 0.3, 1: 0.35}, chosen))
    (line,) = [line for line in summarize_run(run_dir).to_text().splitlines() if line.startswith("mix: ")]
    assert "0: 0.400, 0.5: 0.300, 1: 0.350" in line
    assert said in line
    append(run_dir, "metrics", epoch(3, 0.2, True))
    assert summarize_run(run_dir).mix == []  # of weights that are no longer


def test_slices_of_both_models_are_in_one_table(run_dir: Path) -> None:
    table = slice_table("speaker", load_predictions(run_dir), summarize_run(run_dir).evaluations)
    assert list(table.columns) == ["speaker", "clips", "words", "stock: WER", "tuned: WER", "interval over"]
    assert table["clips"].sum() == 40
    assert set(table["stock: WER"].str[:5]) == {"0.500"}
    assert set(table["tuned: WER"].str[:5]) == {"0.000", "0.250"}


def test_rates_that_were_not_measured_are_never_zero() -> None:
    full = evaluation("tuned", 0.2) | {"mer": 0.31, "empty_references": 0, "hallucinated_words": 0, "insertions": 1234}
    table = more_rates({"stock": evaluation("stock", 0.3), "tuned": full})
    assert list(table.loc["match error rate (MER)"]) == [NOT_MEASURED, "0.310"]
    assert table.loc["words invented on them", "tuned"] == NOT_MEASURED  # there was no silence to invent them on
    assert table.loc["insertions", "tuned"] == "1,234"


def test_a_run_is_about_the_tuned_model() -> None:
    found = [main_model(names) for names in (["tuned", "stock", "other"], ["stock", "mixed"], ["stock"])]
    assert found == ["tuned", "mixed", "stock"]


def test_the_headline_has_its_name_and_its_normaliser(tmp_path: Path) -> None:
    both = {languages: spoken_results(*languages) for languages in (("zh",), ("hi",), ("zh", "th", "hi"))}
    names = {languages: headline(found["tuned"]).name for languages, found in both.items()}
    assert names == {("zh",): "CER", ("hi",): "WER", ("zh", "th", "hi"): "mean of 3 languages"}
    chinese, hindi, mixed = (comparison_table(found) for found in both.values())
    assert list(chinese.columns[:3]) == ["CER", "CER, whisper-basic-v1-unspaced", "loss"]
    assert list(hindi.columns[:4]) == ["WER", "WER, whisper-basic-v1", "CER", "loss"]
    assert hindi.loc["tuned", "normaliser"] == "plain-v2"
    assert {"mean of 3 languages", "mean of 3 languages change", "second normaliser"} <= set(mixed.columns)
    low, high = both["zh",]["tuned"].low, both["zh",]["tuned"].high
    assert chinese.loc["stock", "CER"].startswith(f"{number(both['zh',]['stock'].rate)} [")
    assert str(headline(both["zh",]["tuned"])) == f"CER 0.000 [{low:.3f}, {high:.3f}]"
    summary = summarize_run(spoken_run(tmp_path / "zh", "zh"))
    assert set(summary.figures()) == {"stock_cer", "tuned_cer", "streaming_cer", "rtf"}
    text = summary.to_text()
    assert "validation CER" in text and "CER -" in text and "WER" not in text
    assert "mean of the languages -" in summarize_run(spoken_run(tmp_path / "m", "zh", "hi")).to_text()


def test_each_language_has_a_row_with_its_own_metric_and_the_mean_says_how_it_is_made(tmp_path: Path) -> None:
    results = spoken_results("zh", "th", "hi", "ar")
    table = language_table(results).set_index("language")
    metrics = dict(zip(table.index, table["metric"], strict=True))
    assert metrics == {"Arabic": "WER", "Hindi": "WER", "Thai": "CER", "Chinese": "CER", "mean of 4 languages": "mean"}
    assert table["clips"].tolist() == [6, 6, 6, 6, 24]
    assert table.loc["Hindi", "stock"].startswith(number((2 + 2) / (4 + 3)))
    assert table.loc["mean of 4 languages", "normaliser"] == "each language counts alike"
    rates = [results["stock"].rates_by_language[code].rate for code in ("zh", "th", "hi", "ar")]
    assert table.loc["mean of 4 languages", "stock"].startswith(number(sum(rates) / 4))
    assert language_table(spoken_results("zh")).empty
    summary = summarize_run(spoken_run(tmp_path / "run", "zh", "th", "hi", "ar"))  # the same from files
    assert language_table(summary.evaluations).set_index("language").equals(table)
    assert "| Thai " in format_comparison(summary.evaluations, summary.predictions)
    slices = slice_table("language", summary.predictions, summary.evaluations)
    assert list(slices.columns[:4]) == ["language", "clips", "words or characters", "metric"]
    assert set(slices["language"]) == {"Arabic", "Hindi", "Thai", "Chinese"}


def test_texts_that_ended_at_a_limit_are_counted_and_named(tmp_path: Path) -> None:
    summary = summarize_run(spoken_run(tmp_path / "run", "hi", cut=("hi1", "hi4")))
    (line,) = [line for line in summary.to_text().splitlines() if "limit" in line]
    assert line.startswith("tuned: 2 texts ") and "(hi1, hi4)" in line
    assert more_rates(summary.evaluations).loc["texts that ended at a limit", "tuned"] == "2"
