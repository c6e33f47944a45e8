"""Tables of a run, always with the stock model beside the tuned one; all can be made again from the run's files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from src.evaluation.metrics import Bootstrap, PairedComparison
from src.evaluation.report.forgetting import (
    Forgetting,
    describe_guard,
    describe_interval,
    describe_trade,
    guard_name,
    is_guard,
)
from src.evaluation.results import EvaluationResult, Prediction, compare_predictions
from src.utils.errors import DataError

NOT_MEASURED = "not measured"
STOCK, TUNED = "stock", "tuned"
Row = Mapping[str, Any]
PredictionsByModel = Mapping[str, Sequence[Prediction]]


@dataclass(frozen=True)
class RunSummary:
    """What a run found.

    Attributes:
        run_dir: where it is.
        epochs: one row an epoch, of the last training.
        evaluations: last row of each evaluation by name ("stock", "tuned").
        predictions: rows by model, those of the guard set too.
        streaming: last streaming row, or None.
        comparison: tuned against stock on the same clips, or None where one is missing.
        forgetting: what the guard set showed, and the sweep over mixes with the stock weights; empty in older runs.
    """

    run_dir: Path
    epochs: Sequence[Row]
    evaluations: Mapping[str, Row]
    predictions: PredictionsByModel
    streaming: Row | None
    comparison: PairedComparison | None
    forgetting: Forgetting = field(default_factory=Forgetting)

    def figures(self) -> dict[str, float | None]:
        """Return the headline figures; None where something was not measured."""
        stock, tuned = self.evaluations.get(STOCK, {}), self.evaluations.get(TUNED, {})
        streaming = self.streaming or {}
        return {
            "stock_wer": _rounded(stock.get("wer")),
            "tuned_wer": _rounded(tuned.get("wer")),
            "streaming_wer": _rounded(streaming.get("wer")),
            "rtf": _rounded(tuned.get("rtf")),
        }

    def to_text(self) -> str:
        """Return tables, verdict and places as plain text, which is valid Markdown too."""
        parts = [_describe_training(self.epochs), self.forgetting.describe_mix()]
        evaluations = {**self.evaluations, **self.forgetting.guard}
        parts.append(format_comparison(evaluations, self.predictions) if evaluations else "nothing was evaluated")
        parts.append(self.forgetting.describe_guard_set())
        if self.streaming is not None:
            parts.append(_describe_streaming(self.streaming))
        parts.append("\n".join(f"{name:<18} {path}" for name, path in _places(self.run_dir) if path.exists()))
        return "\n\n".join(part for part in parts if part)


def comparison_table(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> pd.DataFrame:
    """Return one row a model for reading, the stock model first, the others with their change against it.

    Results of the guard set come last, compared with the stock model's on the guard set.

    Args:
        results: by name; `EvaluationResult`s or rows of metrics.jsonl.
        predictions: by name, for the verdict; taken from the `EvaluationResult`s by default.
    Raises: DataError: no result, or results of different clips.
    """
    if not results:
        raise DataError("comparison_table: no result given; evaluate a model first")
    rows: dict[str, dict[str, str]] = {name: _measures(results[name]) for name in stock_first(results)}
    for stock, name in _pairs(results):
        comparison = _compare(stock, name, results, predictions or {})
        rows[name]["WER change"] = _change(results[stock].get("wer"), results[name].get("wer"))
        rows[name]["CER change"] = _change(results[stock].get("cer"), results[name].get("cer"))
        rows[name]["verdict"] = NOT_MEASURED if comparison is None else comparison.verdict
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def format_comparison(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> str:
    """Return `comparison_table` as aligned Markdown, a model a column, then what it means in a sentence a model.

    Raises: DataError: as `comparison_table`.
    """
    table = comparison_table(results, predictions).T.reset_index(names="")
    cells = [[str(cell) for cell in row] for row in (table.columns, *table.to_numpy().tolist())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    said = _describe_pairs(results, predictions or {})
    return "\n".join([*lines, *([""] if said else []), *said])


def describe_comparison(comparison: PairedComparison, *, tuned: str = TUNED, stock: str = STOCK) -> str:
    """Return the verdict on the tuned model in one sentence, with the advice that follows."""
    advice = {
        "better": f"the {tuned} model is better than the {stock} one",
        "worse": f"the {tuned} model is WORSE: keep the {stock} model",
        "no difference shown": f"no difference shown: keep the {stock} model, or measure on more speakers",
    }[comparison.verdict]
    points = f"{100 * comparison.difference:+.1f} points {describe_interval(comparison)}"
    return f"{tuned} against {stock}: WER {points}; {advice}"


def summarize_run(run_dir: str | Path) -> RunSummary:
    """Read a run's files.

    Raises: DataError: the folder has no metrics, a line of them is damaged, or the models saw different clips.
    """
    rows = load_metrics(run_dir)
    evaluations = latest_evaluations(rows)
    streaming = [row for row in rows if row["event"] == "streaming"]
    predictions = {**load_predictions(run_dir), **load_predictions(run_dir, guard=True)}
    return RunSummary(
        run_dir=Path(run_dir),
        epochs=last_training(rows)[1],
        evaluations=evaluations,
        predictions=predictions,
        streaming=streaming[-1] if streaming else None,
        comparison=_compare(STOCK, TUNED, evaluations, predictions) if {STOCK, TUNED} <= set(evaluations) else None,
        forgetting=Forgetting.from_rows(rows),
    )


def load_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, given the run's folder or the file.

    Raises: DataError: absent, or a line that is not a JSON object with an event, by number.
    """
    return _read_jsonl(_file_in(run_dir, "metrics.jsonl"), key="event")


def load_predictions(path: str | Path, *, guard: bool = False) -> dict[str, list[Prediction]]:
    """Read predictions.jsonl, given the run's folder or the file: rows by model, the last one of a clip.

    Args:
        guard: give the guard set's instead of the test set's.
    Returns: nothing where a folder has no such file: rates can be shown without it, a verdict cannot be given.
    Raises: DataError: a line that is not a prediction, by number.
    """
    file = _file_in(path, "predictions.jsonl")
    if file != Path(path) and not file.exists():
        return {}
    models: dict[str, dict[str, Prediction]] = {}
    for number, row in enumerate(_read_jsonl(file, key="model"), start=1):
        model = row.pop("model")
        try:
            prediction = Prediction(**{**row, "avg_logprob": _nan_if_none(row.get("avg_logprob"))})
        except TypeError as err:
            raise DataError(f"{file}, line {number}: not a prediction ({err}); evaluate this model again") from err
        models.setdefault(model, {})[prediction.id] = prediction
    return {model: list(rows.values()) for model, rows in models.items() if is_guard(model) == guard}


def latest_evaluations(rows: Sequence[Row]) -> dict[str, Row]:
    """Return the last evaluation of each name on the test set: measuring again replaces."""
    return {row["name"]: row for row in rows if row["event"] == "evaluation" and not is_guard(row["name"])}


def last_training(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the train_step and epoch rows of the last training in a run's metrics.

    A training that starts anew in the same run (a cell run twice) logs its epochs again: they replace the older ones.
    """
    steps: list[Row] = []
    epochs: list[Row] = []
    for row in rows:
        if row["event"] not in ("train_step", "epoch"):
            continue
        finished = epochs[-1]["epoch"] if epochs else 0
        current = math.ceil(row["epoch"])
        if current <= finished:
            steps = [step for step in steps if math.ceil(step["epoch"]) < current]
            epochs = [epoch for epoch in epochs if epoch["epoch"] < current]
        (steps if row["event"] == "train_step" else epochs).append(row)
    return steps, epochs


def best_epoch(epochs: Sequence[Row]) -> Row | None:
    """Return the epoch whose weights were kept, or None where no epoch had a WER."""
    best = [row for row in epochs if row["is_best"]]
    return best[-1] if best else None


def bootstrap_of(row: Row) -> Bootstrap:
    """Return how an evaluation's intervals were drawn, so that others of the run are drawn alike."""
    keys = {"samples": "bootstrap_samples", "confidence": "confidence", "seed": "bootstrap_seed"}
    return Bootstrap(**{name: row[key] for name, key in keys.items() if key in row})


def stock_first(names: Iterable[str]) -> list[str]:
    """Order models for reading: the stock model first, the others as they come, results of the guard set last."""
    return sorted(names, key=lambda name: (is_guard(name), name not in (STOCK, guard_name(STOCK))))


_MEASURES = {
    "WER": "wer",
    "WER plain": "wer_plain",
    "CER": "cer",
    "CER plain": "cer_plain",
    "loss": "loss",
    "RTF": "rtf",
}


def _measures(row: Row) -> dict[str, str]:
    measures = {label: _with_interval(row, key) for label, key in _MEASURES.items()}
    measures["audio context"] = row.get("audio_context", NOT_MEASURED)
    measures["normaliser"] = row.get("normalizer", NOT_MEASURED)
    measures["clips"] = str(row.get("n", NOT_MEASURED))
    count = row.get("num_blocks")
    measures["interval over"] = f"{count} {row['blocks']}{'s' * (count != 1)}" if count else NOT_MEASURED
    return measures


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (stock, other) for every model but the stock one, first on the test set, then on the guard set."""
    ordered = stock_first(names)
    sets = [[name for name in ordered if is_guard(name) == guard] for guard in (False, True)]
    return [(first, name) for first, *others in filter(None, sets) for name in others]


def _describe_pairs(results: Mapping[str, Row], predictions: PredictionsByModel) -> list[str]:
    """Say what each comparison means, and where the two sets disagree."""
    stocks = {name: stock for stock, name in _pairs(results)}
    compared = {name: _compare(stock, name, results, predictions) for name, stock in stocks.items()}
    said: list[str] = []
    for name, stock in stocks.items():
        comparison = compared[name]
        if is_guard(name):
            said.append(describe_guard(results[stock], results[name], comparison))
        elif comparison is not None:
            said.append(describe_comparison(comparison, tuned=name, stock=stock))
    for name, stock in stocks.items():
        own, guard = compared[name], compared.get(guard_name(name))
        if own is not None and guard is not None and (own.verdict, guard.verdict) == ("better", "worse"):
            on_guard = results[stocks[guard_name(name)]], results[guard_name(name)]
            said.append(describe_trade(results[stock], results[name], *on_guard))
    return said


def _compare(
    stock: str, name: str, results: Mapping[str, Row], predictions: PredictionsByModel
) -> PairedComparison | None:
    rows = [_rows_of(model, results[model], predictions) for model in (stock, name)]
    if not all(rows):
        return None
    return compare_predictions(rows[0], rows[1], bootstrap_of(results[name]))


def _rows_of(name: str, result: Row, predictions: PredictionsByModel) -> Sequence[Prediction]:
    return result.rows if isinstance(result, EvaluationResult) else predictions.get(name, ())


def _describe_training(epochs: Sequence[Row]) -> str:
    if not epochs:
        return ""
    best = best_epoch(epochs)
    number = f"{len(epochs)} epoch{'s' * (len(epochs) != 1)}"
    if best is None:
        return f"training: {number}, none with a validation WER"
    return (
        f"training: {number}; validation WER {_number(epochs[0]['val_wer'])} after the first, "
        f"{_number(best['val_wer'])} after epoch {best['epoch']}, which was kept"
    )


def _describe_streaming(row: Row) -> str:
    return (
        f"streaming, {row['clips']} clips in {_number(row['audio_sec'], 0)} s: WER {_number(row['wer'])}, the same "
        f"clips one by one {_number(row['offline_wer'])}; RTF {_number(row['rtf'], 2)}, longest update "
        f"{_number(row['longest_update_sec'], 2)} s"
    )


def _file_in(path: str | Path, name: str) -> Path:
    return Path(path) / name if Path(path).is_dir() else Path(path)


def _read_jsonl(path: Path, *, key: str) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file; was the run started, and is this its folder?") from err
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise DataError(f"{path}, line {number}: not JSON ({err}); if a crash cut it, remove the line") from err
        if not isinstance(row, dict) or key not in row:
            raise DataError(f"{path}, line {number}: no {key!r}; this is not a row of a run, remove the line")
        rows.append(row)
    return rows


def _places(run_dir: Path) -> list[tuple[str, Path]]:
    return [
        ("notebook", run_dir / "notebook.html"),
        ("report", run_dir / "report.html"),
        ("best model", run_dir / "checkpoints" / "best_model_hf"),
        ("best mix", run_dir / "checkpoints" / "best_mix_hf"),
        ("for faster-whisper", run_dir / "ctranslate2_int8"),
        ("predictions", run_dir / "predictions.jsonl"),
        ("metrics", run_dir / "metrics.jsonl"),
        ("figures", run_dir / "figures"),
    ]


def _with_interval(row: Row, key: str) -> str:
    low, high = (_number(row.get(f"{key}_{end}")) for end in ("low", "high"))
    value = _number(row.get(key))
    return value if NOT_MEASURED in (value, low, high) else f"{value} [{low}, {high}]"


def _change(before: float | None, after: float | None) -> str:
    """Relative change in percent; empty where there is none to tell."""
    if NOT_MEASURED in (_number(before), _number(after)) or not before or after is None:
        return ""
    return f"{100 * (after - before) / before:+.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 4)
