from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.utterance import Utterance
from src.evaluation.report.run_files import (
    last_training,
    load_metrics,
    load_predictions,
    read_origin,
)
from src.utils.errors import DataError
from src.utils.versioning import DataVersionManager
from tests.evaluation.run_files import append, epoch, prediction, steps

REVISION = "0123456789abcdef"


def test_a_repeated_prediction_replaces_the_first(run_dir: Path) -> None:
    append(run_dir, "predictions", prediction("tuned", 3, 4))
    rows = load_predictions(run_dir)["tuned"]
    assert len(rows) == 40
    assert next(row for row in rows if row.id == "u3").substitutions == 4
    (run_dir / "predictions.jsonl").unlink()
    assert load_predictions(run_dir) == {}


def test_absent_and_damaged_files_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        load_metrics(tmp_path)
    for text, line in (('{"event": "epoch"}\n{"event": "tra', 2), ('{"loss": 1}\n', 1), ("[]\n", 1)):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(DataError, match=rf"metrics\.jsonl, line {line}"):
            load_metrics(tmp_path)
    (run_dir / "predictions.jsonl").write_text('{"model": "stock", "id": "u1"}\n')
    with pytest.raises(DataError, match=r"predictions\.jsonl, line 1"):
        load_predictions(run_dir)
    (run_dir / "config.yaml").write_text("model: [")
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_origin(run_dir)


def test_updates_and_epochs_done_again_replace_the_older_ones() -> None:
    first = [*steps(4), epoch(1, 0.5, True), epoch(2, 0.4, True)]
    started_again = last_training([*first, *steps(4)[:2], epoch(1, 0.3, True)])
    assert [row["val_wer"] for row in started_again[1]] == [0.3]
    assert [row["step"] for row in started_again[0]] == [1, 2]
    resumed = last_training([*first, *steps(4)[3:], epoch(2, 0.3, True), epoch(3, 0.2, True)])
    assert [row["val_wer"] for row in resumed[1]] == [0.5, 0.3, 0.2]
    assert [row["step"] for row in resumed[0]] == [1, 2, 3, 4]


def test_the_commands_that_reproduce_a_run_come_from_its_files(run_dir: Path, sample: list[Utterance]) -> None:
    (run_dir / "env.json").write_text(json.dumps({"python": "3.11", "git_revision": f"{REVISION}+changes"}))
    (run_dir / "config.yaml").write_text("model: {variant: base.en}\npaths: {checkpoints_dir: kept}\n")
    DataVersionManager(run_dir / "data_versions").log_dataset_version(
        dataset_name="speech", version="v1", metadata={}, utterances=sample[:2]
    )
    origin = read_origin(run_dir)
    checkout, train, evaluate = origin.commands()
    assert checkout.startswith(f"git checkout {REVISION}  # ")
    assert train == f"python scripts/train.py --config {run_dir}/config.yaml"
    assert evaluate == (
        f"python scripts/evaluate.py --config {run_dir}/config.yaml --model kept/best_model_hf --stock base.en"
    )
    assert [version.version for version in origin.data_versions] == ["v1"]


def test_a_measurement_is_repeated_as_it_was_made(run_dir: Path) -> None:
    append(
        run_dir,
        "metrics",
        {"event": "measured", "model": "my model", "stock": None, "data": "d.parquet", "max_clips": 9},
    )
    assert read_origin(run_dir).commands()[-1] == (
        f"python scripts/evaluate.py --config {run_dir}/config.yaml --model 'my model' --data d.parquet --max-clips 9 "
        "--no-stock"
    )
