"""Two processes on the CPU (gloo), with DDP and with a sharded model, against one that holds the whole model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.models.export import huggingface
from tests.training.processes import TRAININGS, Bench

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("processes.py")
TWO = (*TRAININGS, "resumed", "plain", "again")  # trainings of the two processes


class Runs:
    """What one process and two processes found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.two = [json.loads((folder / "two" / f"found-{rank}.json").read_text()) for rank in range(2)]
        self.one: Bench

    def weights(self, processes: str, name: str, rank: int = 0) -> dict[str, Tensor]:
        return load_file(self.folder / processes / f"{name}-{rank}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _small: tuple[Any, Any]) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    for part in _small:
        part.save_pretrained(folder / "model")
    for name in ("one", "two"):
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, str(SCRIPT), str(folder / "two"), str(folder / "model")],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        bench = Bench(folder / "one", folder / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface, "_verify_huggingface", lambda *given: None)  # as in the two processes
            for name, training in TRAININGS.items():
                bench.finish(name, bench.trainer(name, **{**training, "shard_model": False}))
        assert process.wait(timeout=300) == 0, (folder / "log.txt").read_text()[-4000:]
    finally:
        process.terminate()  # the launcher takes its processes along
    found = Runs(folder)
    found.one = bench
    return found


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_make_the_updates_of_one(runs: Runs, training: str) -> None:
    assert [result["processes"] for result in runs.two] == [2, 2]
    end, other = (runs.weights("two", f"{training}-last", rank) for rank in range(2))
    assert_near(end, runs.weights("one", f"{training}-last"))
    assert all(torch.equal(other[name], weight) for name, weight in end.items())
    straight, shared = runs.one.found[training]["history"], runs.two[0][training]["history"]
    assert shared == runs.two[1][training]["history"]
    for key in ("train_loss", "val_loss"):
        assert shared[key] == pytest.approx(straight[key], rel=1e-5)
    start = load_file(runs.folder / "model" / "model.safetensors")
    assert not torch.allclose(end["model.encoder.layers.0.fc1.weight"], start["model.encoder.layers.0.fc1.weight"])
    for result in (runs.one.found, *runs.two):  # an evaluation gathers every clip exactly once in every process
        assert sorted(result[training]["ids"]) == sorted(runs.one.clips)
        assert result[training]["wer"] == pytest.approx(runs.one.found[training]["wer"])


def test_each_process_holds_half_of_the_parameters_and_fills_up_its_passes(runs: Runs) -> None:
    held, total = [result["straight"]["held"] for result in runs.two], runs.two[0]["straight"]["all"]
    assert sum(held) == total
    assert held == pytest.approx([total / 2] * 2, rel=0.01)
    assert sum(result["fillers"] for result in runs.two) > 0  # they cut a batch into different numbers of pieces


def test_a_run_stopped_within_an_epoch_ends_bit_for_bit_as_one_that_was_not(runs: Runs) -> None:
    assert runs.two[0]["resumed from"] == "checkpoint-00000003"
    straight, resumed = (runs.weights("two", f"{name}-last") for name in ("straight", "resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


@pytest.mark.parametrize("training", ["plain", "again"])
def test_checkpoints_go_from_shards_to_whole_models_and_back(runs: Runs, training: str) -> None:
    assert_near(runs.weights("two", f"{training}-last"), runs.weights("two", "straight-last"))


@pytest.mark.parametrize("training", TWO)
def test_the_main_process_alone_writes_and_exports_the_whole_best_weights(runs: Runs, training: str) -> None:
    assert [result[training]["wrote"] for result in runs.two] == [True, False]
    exported = load_file(runs.folder / "two" / training / "checkpoints" / "best_model_hf" / "model.safetensors")
    for rank in range(2):
        best = runs.weights("two", f"{training}-best", rank)
        assert set(best) == set(exported)
        assert all(torch.equal(exported[name], weight) for name, weight in best.items())


def test_one_run_and_its_checkpoints_are_on_the_disk(runs: Runs) -> None:
    place = runs.folder / "two" / "straight"
    assert len(list((place / "runs").iterdir())) == 1
    (run,) = (path for path in (place / "checkpoints").iterdir() if path.name != "best_model_hf")
    assert [path.name for path in sorted(run.iterdir())] == [f"checkpoint-{step:08d}" for step in range(1, 5)]
