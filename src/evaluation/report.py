"""Tables of a run, always with the stock model beside the tuned one; all can be made again from the run's files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.evaluation.evaluator import Prediction, compare_predictions
from src.evaluation.metrics import MetricsCalculator, PairedComparison
from src.evaluation.text import WHISPER_ENGLISH
from src.utils.errors import DataError

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class RunSummary:
    """What a run found.

    Attributes:
        run_dir: where it is.
        evaluations: last row of each evaluation by name ("stock", "tuned").
        streaming: last streaming row, or None.
        comparison: tuned against stock on the same clips, or None where one is missing.
    """

    run_dir: Path
    evaluations: Mapping[str, Mapping[str, Any]]
    streaming: Mapping[str, Any] | None
    comparison: PairedComparison | None

    def figures(self) -> dict[str, float | None]:
        """Return the headline figures; None where something was not measured."""
        stock, tuned = self.evaluations.get("stock", {}), self.evaluations.get("tuned", {})
        streaming = self.streaming or {}
        return {
            "stock_wer": _rounded(stock.get("wer")),
            "tuned_wer": _rounded(tuned.get("wer")),
            "streaming_wer": _rounded(streaming.get("wer")),
            "rtf": _rounded(tuned.get("rtf")),
        }

    def to_text(self) -> str:
        """Return tables, verdict and places as plain text."""
        parts = [comparison_table(self.evaluations).to_string()] if self.evaluations else ["nothing was evaluated"]
        if self.comparison is not None:
            parts.append(describe_comparison(self.comparison))
        if self.streaming is not None:
            parts.append(
                "streaming, {clips} clips in {audio_sec:.0f} s: WER {wer:.3f}, the same clips one by one "
                "{offline_wer:.3f}; RTF {rtf:.2f}, longest update {longest_update_sec:.2f} s".format(**self.streaming)
            )
        parts.append("\n".join(f"{name:<18} {path}" for name, path in _places(self.run_dir) if path.exists()))
        return "\n\n".join(parts)


def comparison_table(results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a model: WER with interval under both normalisers, CER, loss, RTF.

    Args:
        results: by name; `EvaluationResult`s or rows of metrics.jsonl.
    """
    table = pd.DataFrame(
        {
            name: {
                "WER": _interval(row, "wer"),
                "WER plain": _interval(row, "wer_plain"),
                "CER": _number(row.get("cer"), 3),
                "loss": _number(row.get("loss"), 3),
                "RTF": _number(row.get("rtf"), 3),
                "audio context": row.get("audio_context", NOT_MEASURED),
                "clips": row.get("n", NOT_MEASURED),
            }
            for name, row in results.items()
        }
    )
    return table.T


def describe_comparison(comparison: PairedComparison) -> str:
    """Return the verdict on the tuned model in one sentence, with the advice that follows."""
    low, high = 100 * comparison.low, 100 * comparison.high
    interval = f"WER {100 * comparison.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"
    advice = {
        "better": "the tuned model is better than the stock one",
        "worse": "the tuned model is WORSE: keep the stock model",
        "no difference shown": "no difference shown: keep the stock model, or measure on more speakers",
    }[comparison.verdict]
    return f"tuned against stock: {interval}; {advice}"


def summarize_run(run_dir: Path) -> RunSummary:
    """Read a run's files.

    Raises: DataError: the folder has no metrics, or a line of them is damaged.
    """
    rows = load_metrics(run_dir)
    evaluations = {row["name"]: row for row in rows if row["event"] == "evaluation"}
    streaming = [row for row in rows if row["event"] == "streaming"]
    predictions = load_predictions(run_dir)
    comparison = None
    if {"stock", "tuned"} <= set(predictions) and "tuned" in evaluations:
        tuned = evaluations["tuned"]
        language = "en" if tuned["normalizer"] == WHISPER_ENGLISH else "other"
        calculator = MetricsCalculator(language, confidence=tuned["confidence"])
        comparison = compare_predictions(predictions["stock"], predictions["tuned"], calculator)
    return RunSummary(run_dir, evaluations, streaming[-1] if streaming else None, comparison)


def load_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl.

    Raises: DataError: absent, or a line that is not JSON, by number.
    """
    return _read_jsonl(Path(run_dir) / "metrics.jsonl")


def load_predictions(run_dir: Path) -> dict[str, list[Prediction]]:
    """Read predictions.jsonl: rows by model; the last row of a clip counts, so that a repeated evaluation replaces."""
    path = Path(run_dir) / "predictions.jsonl"
    models: dict[str, dict[str, Prediction]] = {}
    for row in _read_jsonl(path) if path.exists() else []:
        model = row.pop("model")
        models.setdefault(model, {})[row["id"]] = Prediction(**row)
    return {model: list(rows.values()) for model, rows in models.items()}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file; was the run started, and is this its folder?") from err
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as err:
            raise DataError(f"{path}, line {number}: not JSON ({err}); if a crash cut it, remove the line") from err
    return rows


def _places(run_dir: Path) -> list[tuple[str, Path]]:
    return [
        ("notebook", run_dir / "notebook.html"),
        ("best model", run_dir / "checkpoints" / "best_model_hf"),
        ("for faster-whisper", run_dir / "ctranslate2_int8"),
        ("predictions", run_dir / "predictions.jsonl"),
        ("metrics", run_dir / "metrics.jsonl"),
        ("figures", run_dir / "figures"),
    ]


def _interval(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None or row.get(f"{key}_low") is None:
        return _number(row.get(key), 3)
    return f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"


def _number(value: Any, digits: int) -> str:
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)
