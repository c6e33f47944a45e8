from __future__ import annotations

from pathlib import Path

import pytest

from src.data.preparation import prepare_datasets
from src.data.report.report import DataReport, build_data_report
from src.utils.config import load_config
from tests.evaluation.run_files import epoch, evaluation, prediction, steps, write


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    metrics = [
        *steps(90), epoch(1, 0.33, True), epoch(2, 0.27, True), evaluation("stock", 0.37), evaluation("tuned", 0.27),
        {"event": "streaming", "clips": 25, "audio_sec": 100.0, "wer": 0.3, "offline_wer": 0.28, "rtf": 0.3,
         "longest_update_sec": 0.5},
    ]  # fmt: skip
    predictions = [prediction("stock", i, 2) for i in range(40)] + [prediction("tuned", i, i % 2) for i in range(40)]
    return write(tmp_path / "run", metrics, predictions)


@pytest.fixture(scope="session")
def data_report() -> DataReport:
    few = {"max_train": 4, "max_validation": 2, "max_test": 2}
    config = load_config(None, overrides={"device": "cpu", "data": few})
    return build_data_report(prepare_datasets(config), config)
