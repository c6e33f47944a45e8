"""Two processes on the CPU (gloo) against one, on the same global batches, with real weights and speech."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.launching import collect, launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "training" / "two_processes.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("distributed")
    return folder, {
        name: collect(folder / name, launch(SCRIPT, folder / name, processes, steps), processes)
        for name, processes, steps in (("one", 1, 2), ("two", 2, 1))
    }


Runs = tuple[Path, dict[str, list[dict[str, Any]]]]


def test_two_processes_make_the_updates_of_one_with_the_same_global_batch(runs: Runs) -> None:
    folder, found = runs
    assert [r["processes"] for r in found["two"]] == [2, 2]
    one, *two = (
        load_file(folder / name)
        for name in ("one/weights-0.safetensors", "two/weights-0.safetensors", "two/weights-1.safetensors")
    )
    for name, weight in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], weight, atol=1e-6, rtol=1e-5, msg=name)
    straight, shared = found["one"][0]["history"], found["two"][0]["history"]
    assert shared["train_loss"] == pytest.approx(straight["train_loss"], rel=1e-6)


def test_evaluation_gathers_every_clip_exactly_once_in_every_process(runs: Runs) -> None:
    found = runs[1]
    for result in (*found["one"], *found["two"]):
        assert sorted(result["ids"]) == sorted(result["clips"])
        assert result["wer"] == pytest.approx(found["one"][0]["wer"])
    assert found["two"][0]["history"] == found["two"][1]["history"]


def test_only_the_main_process_writes(runs: Runs) -> None:
    folder, found = runs
    assert [result["wrote"] for result in found["two"]] == [True, False]
    assert len(list((folder / "two" / "runs").iterdir())) == 1
    (run,) = (path for path in (folder / "two" / "checkpoints").iterdir() if path.name != "best_model_hf")
    assert [path.name for path in sorted(run.iterdir())] == ["checkpoint-00000002", "checkpoint-00000003"]
