"""A small model shared out to two processes on the CPU (gloo), against one process that holds it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.training.loss import TokenLoss
from src.training.sharding import _check, shard_model
from src.utils.config import TrainingConfig
from src.utils.errors import ConfigError, DeviceError, ModelError
from tests.training.launching import collect, launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "training" / "sharded_processes.py"
TWO = ("straight", "lora", "resumed", "plain", "again")  # trainings of the two processes

Runs = tuple[Path, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _small: tuple[Any, Any]) -> Runs:
    folder = tmp_path_factory.mktemp("sharding")
    for part in _small:
        part.save_pretrained(folder / "model")
    started = {name: (launch(SCRIPT, folder / name, n, folder / "model"), n) for name, n in (("one", 1), ("two", 2))}
    return folder, {name: collect(folder / name, process, n) for name, (process, n) in started.items()}


def weights(runs: Runs, processes: str, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(runs[0] / processes / f"{name}-{rank}.safetensors")


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["straight", "lora"])
def test_two_processes_with_shards_make_the_updates_of_one_that_holds_the_model(runs: Runs, training: str) -> None:
    found = runs[1]
    assert [result["processes"] for result in found["two"]] == [2, 2]
    assert_near(weights(runs, "two", f"{training}-last"), weights(runs, "one", f"{training}-last"))
    assert sum(result["fillers"] for result in found["two"]) > 0  # they cut a batch into other numbers of pieces
    straight, shared = found["one"][0][training]["history"], found["two"][0][training]["history"]
    assert shared["train_loss"] == pytest.approx(straight["train_loss"], rel=1e-5)
    assert shared["val_loss"] == pytest.approx(straight["val_loss"], rel=1e-5)
    start = load_file(runs[0] / "model" / "model.safetensors")
    end = weights(runs, "two", f"{training}-last")
    assert not torch.allclose(end["model.encoder.layers.0.fc1.weight"], start["model.encoder.layers.0.fc1.weight"])


@pytest.mark.slow
def test_each_process_holds_about_half_of_the_parameters(runs: Runs) -> None:
    held = [result["straight"]["held"] for result in runs[1]["two"]]
    total = runs[1]["two"][0]["straight"]["all"]
    assert sum(held) == total
    assert all(share == pytest.approx(total / 2, rel=0.01) for share in held)


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_ends_bit_for_bit_as_one_that_was_not(runs: Runs) -> None:
    assert runs[1]["two"][0]["resumed from"] == "checkpoint-00000003"
    straight = weights(runs, "two", "straight-last")
    for rank in range(2):
        resumed = weights(runs, "two", "resumed-last", rank)
        assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


@pytest.mark.slow
@pytest.mark.parametrize("training", ["plain", "again"])
def test_checkpoints_go_from_shards_to_whole_models_and_back(runs: Runs, training: str) -> None:
    assert_near(weights(runs, "two", f"{training}-last"), weights(runs, "two", "straight-last"))


@pytest.mark.slow
def test_evaluation_gathers_every_clip_exactly_once_in_every_process(runs: Runs) -> None:
    for training in ("straight", "lora"):
        results = [result[training] for result in (*runs[1]["one"], *runs[1]["two"])]
        for result in results:
            assert sorted(result["ids"]) == sorted(runs[1]["one"][0]["clips"])
            assert result["wer"] == pytest.approx(results[0]["wer"])
        assert results[1]["history"] == results[2]["history"]


@pytest.mark.slow
@pytest.mark.parametrize("training", TWO)
def test_the_exported_model_holds_the_whole_best_weights(runs: Runs, training: str) -> None:
    exported = load_file(runs[0] / "two" / training / "checkpoints" / "best_model_hf" / "model.safetensors")
    for rank in range(2):
        best = weights(runs, "two", f"{training}-best", rank)
        assert set(best) == set(exported)
        assert all(torch.equal(exported[name], weight) for name, weight in best.items())


@pytest.mark.slow
def test_only_the_main_process_writes(runs: Runs) -> None:
    assert [[result[name]["wrote"] for name in TWO] for result in runs[1]["two"]] == [[True] * 5, [False] * 5]
    assert len(list((runs[0] / "two" / "straight" / "runs").iterdir())) == 1
    checkpoints = runs[0] / "two" / "straight" / "checkpoints"
    (run,) = (path for path in checkpoints.iterdir() if path.name != "best_model_hf")
    assert [path.name for path in sorted(run.iterdir())] == [f"checkpoint-{step:08d}" for step in range(1, 5)]


def test_one_process_holds_the_whole_model_and_says_so(
    small: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert shard_model(TokenLoss(small[0]), TrainingConfig(shard_model=True), mixed_precision="no") is None
    assert "training.shard_model does nothing: one process trains" in caplog.text


def test_what_does_not_go_with_shards_is_refused(small: tuple[Any, Any]) -> None:
    model = small[0]
    with pytest.raises(DeviceError, match="not float16"):
        _check(model, TrainingConfig(), "fp16")
    with pytest.raises(ConfigError, match="compile: True"):
        _check(model, TrainingConfig(compile=True), "no")
    with pytest.raises(ConfigError, match="optimizer: adamw_8bit"):
        _check(model, TrainingConfig(optimizer="adamw_8bit"), "bf16")
    model.config.decoder_layerdrop = 0.1
    with pytest.raises(ModelError, match="decoder_layerdrop"):
        _check(model, TrainingConfig(), "no")
