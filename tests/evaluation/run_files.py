"""Rows of a run's files, as the trainer and the evaluator write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RATES = {
    "n": 40, "normalizer": "whisper-english-v1", "cer": 0.2, "cer_plain": 0.2, "loss": 0.9, "rtf": 0.06,
    "confidence": 0.95, "blocks": "speaker", "num_blocks": 8, "audio_context": "dynamic",
}  # fmt: skip


def evaluation(name: str, wer: float) -> dict[str, Any]:
    return {
        "event": "evaluation", "name": name, **RATES, "wer": wer, "wer_low": wer - 0.05, "wer_high": wer + 0.05,
        "wer_plain": wer + 0.01, "wer_plain_low": wer - 0.04, "wer_plain_high": wer + 0.06,
    }  # fmt: skip


def prediction(model: str, i: int, errors: int) -> dict[str, Any]:
    hypothesis = " ".join(["the"] * (4 - errors) + ["x"] * errors)
    return {
        "model": model, "id": f"u{i}", "speaker": f"s{i % 8}", "duration_sec": 1.0 + i % 9,
        "reference": "the the the the",
        "hypothesis": hypothesis, "substitutions": errors, "deletions": 0, "insertions": 0, "reference_words": 4,
        "avg_logprob": -0.2, "latency_sec": 0.1,
    }  # fmt: skip


def epoch(number: int, wer: float | None, best: bool) -> dict[str, Any]:
    return {
        "event": "epoch", "epoch": number, "train_loss": 1 / number, "val_loss": 1.2 / number, "val_wer": wer,
        "val_cer": None if wer is None else wer / 2, "learning_rate": 1e-5, "is_best": best,
    }  # fmt: skip


def steps(n: int) -> list[dict[str, Any]]:
    return [
        {"event": "train_step", "step": i + 1, "epoch": 1 + 2 * i // n, "loss": 2 / (1 + i / 9), "samples_per_sec": 3.0}
        for i in range(n)
    ]


def guard_rows(stock: int, tuned: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics and predictions of a guard set of 40 clips of 8 speakers, with so many errors per clip of 4 words."""
    models = {"stock (guard)": stock, "tuned (guard)": tuned}
    metrics = [{"event": "guard", "set": "LibriSpeech test-clean", "clips": 40, "speakers": 8}]
    metrics += [evaluation(name, errors / 4) for name, errors in models.items()]
    return metrics, [prediction(name, i + 100, errors) for name, errors in models.items() for i in range(40)]


def append(run_dir: Path, name: str, *rows: dict[str, Any]) -> None:
    """Add rows to "metrics" or "predictions"."""
    with (run_dir / f"{name}.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def write(run_dir: Path, metrics: list[dict[str, Any]], predictions: list[dict[str, Any]] | None = None) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if predictions is not None:
        (run_dir / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    return run_dir
