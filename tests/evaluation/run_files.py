"""Rows of a run's files, as the trainer and the evaluator write them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.evaluation.evaluator import EvaluationResult, Prediction
from src.evaluation.metrics import MetricsCalculator

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


# reference, what the stock model hears, what the tuned one hears
SPOKEN = {
    "zh": [("我们去公园散步。", "我门去公元散步", "我们去公园散步"), ("请把门关上。", "请把门", "请把门关上")],
    "th": [("ช่วยปิดประตูด้วย", "ช่วยปิดปะตู", "ชวยปิดประตูด้วย"), ("หนาวมาก", "หนาว", "หนาวมาก")],
    "hi": [("बैठक शुक्रवार को होगी", "बैठक को होगा", "बैठक शुक्रवार को होगा"),
           ("दरवाज़ा बंद करो", "दरवाजा बन्द करो", "दरवाज़ा बंद करो")],
    "ar": [("أغلق الباب من فضلك", "أغلق باب فضلك", "أغلق الباب من فضلك"), ("كتب الولد", "كتب ولد", "كتب الولد")],
}  # fmt: skip


def spoken_results(*languages: str, cut: tuple[str, ...] = ()) -> dict[str, EvaluationResult]:
    """Measure what two models hear in `SPOKEN`, six clips and speakers per language; `cut` are ids of tuned texts."""
    calculator, results = MetricsCalculator(), {}
    for column, name in ((1, "stock"), (2, "tuned")):
        rows: list[dict[str, Any]] = [
            {"id": f"{language}{i}", "speaker": f"{language}-s{i}", "duration_sec": 1.0 + i, "reference": texts[0],
             "hypothesis": texts[column], "avg_logprob": -0.2, "latency_sec": 0.1, "language": language,
             "truncated": name == "tuned" and f"{language}{i}" in cut}
            for language in languages for i, texts in enumerate(3 * SPOKEN[language])
        ]  # fmt: skip
        references, hypotheses, speakers, spoken = (
            [row[key] for row in rows] for key in ("reference", "hypothesis", "speaker", "language")
        )
        kinds = calculator.kinds_of(references, spoken)
        counts = calculator.count(references, hypotheses, kinds)
        rates = calculator.compute(references, hypotheses, speakers, languages=spoken, truncated=len(cut))
        results[name] = EvaluationResult(
            **vars(rates), name=name, loss=0.5, audio_sec=60.0, compute_sec=6.0, audio_context="dynamic",
            rows=tuple(
                Prediction(**vars(count), **row, normalizer=kind.normalizer)
                for count, row, kind in zip(counts, rows, kinds, strict=True)
            ),
        )  # fmt: skip
    return results


def spoken_run(run_dir: Path, *languages: str, cut: tuple[str, ...] = ()) -> Path:
    """Write `spoken_results` as a run, with two epochs."""
    results = spoken_results(*languages, cut=cut)
    metric, best = results["tuned"].metric, results["tuned"].rate
    epochs = [
        epoch(i, None if metric == "CER" else rate, i == 2) | {"metric": metric, "val_rate": rate, "val_cer": rate / 2}
        for i, rate in ((1, 2 * best), (2, best))
    ]
    rows = [{"model": name, **asdict(row)} for name, result in results.items() for row in result.rows]
    evaluations = [
        json.loads(json.dumps({"event": "evaluation", **result}, default=vars), parse_constant=lambda _: None)
        for result in results.values()
    ]
    return write(run_dir, [*steps(20), *epochs, *evaluations], rows)
