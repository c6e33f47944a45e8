"""Run the notebook with the demo profile, offline, and print what it found.

    python scripts/run_demo.py [--quick]

Writes runs/demo/: the executed notebook (HTML), config, environment, metrics.jsonl, predictions.jsonl, figures, the
best model and its CTranslate2 export. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nbformat
import papermill
from nbconvert import HTMLExporter

from scripts.command_line import path_argument
from src.utils.tracking import check_run_id

NOTEBOOK = ROOT / "whisper_asr_colab.ipynb"
QUICK = {
    "data": {"max_train": 48, "max_validation": 4, "max_test": 6},
    "training": {"epochs": 1, "batch_size": 3},  # 16 updates: enough for the model to know when to stop
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-id", default="demo", help="folder under --runs-dir; it is replaced")
    parser.add_argument("--runs-dir", type=path_argument, default=ROOT / "runs")
    parser.add_argument("--quick", action="store_true", help="a few clips, one epoch: shows that everything runs")
    arguments = parser.parse_args()
    run_dir = arguments.runs_dir.resolve() / check_run_id(arguments.run_id)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    print(f"running {NOTEBOOK.name} with the demo profile; this takes some minutes", flush=True)
    began = time.perf_counter()
    execute_notebook(run_dir, QUICK if arguments.quick else {})
    # loads torch: not while the kernel needs the memory and cores
    from src.evaluation.report.summary import summarize_run

    summary = summarize_run(run_dir)
    print(summary.to_text())
    print(f"\ntotal {time.perf_counter() - began:.0f} s")
    print(json.dumps(summary.figures()))
    return 0


def execute_notebook(run_dir: Path, overrides: dict[str, Any]) -> None:
    """Execute the notebook in a fresh kernel; leave notebook.html, or notebook.ipynb with the failed cell's error."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo promises to work without a network
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    executed = run_dir / "notebook.ipynb"
    paths = {"runs_dir": str(run_dir.parent), "checkpoints_dir": str(run_dir / "checkpoints")}
    papermill.execute_notebook(
        NOTEBOOK,
        executed,
        parameters={"PROFILE": "demo", "RUN_ID": run_dir.name, "OVERRIDES": {**overrides, "paths": paths}},
        kernel_name="python3",
        cwd=ROOT,
        progress_bar={"desc": "notebook"},
    )
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(executed, as_version=4))
    (run_dir / "notebook.html").write_text(html, encoding="utf-8")
    executed.unlink()


if __name__ == "__main__":
    sys.exit(main())
