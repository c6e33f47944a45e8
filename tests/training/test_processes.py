"""Two processes on the CPU (gloo), with DDP and with a sharded model, against one that holds the whole model.

Its own script: python -m torch.distributed.run --nproc_per_node 2 test_processes.py <folder> <folder of the model>
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import WhisperProcessor

from src.data.loader import Batches, LengthBatchSampler, create_loader
from src.data.preparation import check_utterance
from src.data.sources.catalog import load_utterances
from src.evaluation.evaluator import ModelEvaluator
from src.models.dynamic_context import DynamicWhisper
from src.models.export import huggingface
from src.training import updates
from src.training.state import Progress
from src.training.trainer import WhisperTrainer
from src.training.updates import Piece, fill_up
from src.utils.config import DataConfig, load_config
from src.utils.runtime import rank, world_size

pytestmark = pytest.mark.slow
CLIPS, VALIDATION, BATCH = 8, 3, 2
HUNG_SEC = 150  # each training takes about 10 s, and 40 where many processes share the cores
STOP_AFTER = 3  # updates: one of the second epoch's two
# half of the batches at full context: processes then cut theirs into different numbers of pieces
SHARDED = {"shard_model": True, "full_context_prob": 0.5, "epochs": 2}
TRAININGS: dict[str, dict[str, Any]] = {
    "straight": SHARDED,
    "lora": {
        "shard_model": True, "method": "lora", "gradient_checkpointing": True, "full_context_prob": 0.0,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    },
    "ddp": {"full_context_prob": 0.0, "prefix_prob": 0.5},
}  # fmt: skip


def same_batches(sampler: LengthBatchSampler, epoch: int) -> Batches:
    """Deal out the same batches in the same order, whatever the number of processes."""
    everything = [list(range(at, at + BATCH)) for at in range(0, CLIPS, BATCH)]
    return everything[sampler.rank :: sampler.world_size]


class Bench:
    """Makes trainers of the same model and clips, and notes what they end with in `found`."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self.folder = folder
        self._model_folder = model_folder
        train = [u for u in load_utterances(DataConfig()) if u.meta["split"] == "train"]
        shortest = sorted(train, key=lambda u: u.duration_sec or 0)[:CLIPS]
        self._clips = [check_utterance(utterance, DataConfig()) for utterance in shortest]
        self.clips = [clip.id for clip in self._clips[:VALIDATION]]
        self.found: dict[str, Any] = {"processes": world_size(), "fillers": 0}

    def trainer(self, name: str, **training: Any) -> WhisperTrainer:
        """Make one with a folder of its own."""
        if world_size() > 1:
            faulthandler.dump_traceback_later(HUNG_SEC, exit=True)  # says where processes wait for each other
        place = self.folder / name
        base = {
            "epochs": 1, "batch_size": BATCH, "gradient_accumulation_steps": 2 // world_size(), "method": "full",
            "learning_rate": 1e-3, "full_context_prob": 0.0,
        }  # fmt: skip
        config = load_config(
            None,
            overrides={
                "device": "cpu",
                "paths": {n: str(place / n.removesuffix("_dir")) for n in ("runs_dir", "checkpoints_dir", "cache_dir")},
                "augmentation": {"enabled": False},
                "training": {**base, **training},
                "inference": {"batch_size": 1, "max_tokens_per_sec": 2.0},
                "evaluation": {"bootstrap_samples": 100},
                "checkpoints": {"save_minutes": 0, "save_total_limit": 10},
            },
        )
        model = DynamicWhisper.from_pretrained(self._model_folder)
        processor = WhisperProcessor.from_pretrained(self._model_folder)
        loader = create_loader(self._clips, processor, config, shuffle=True)
        loader.batch_sampler._plan = MethodType(same_batches, loader.batch_sampler)  # type: ignore[method-assign]
        validation = create_loader(self._clips[:VALIDATION], processor, config)  # 3 batches for 2 processes
        trainer = WhisperTrainer(model, processor, loader, validation, config)
        trainer._report_full_context = lambda: None  # type: ignore[method-assign]  # a second validation takes time
        return trainer

    def finish(self, name: str, trainer: WhisperTrainer) -> None:
        """Train to the end; keep the last epoch's whole weights, the best ones, and what an evaluation gives."""
        restore_best = trainer._saver.restore_best

        def keep_last(progress: Progress) -> None:
            self._keep(trainer, f"{name}-last")
            restore_best(progress)

        trainer._saver.restore_best = keep_last  # type: ignore[method-assign]
        history = trainer.train()
        self._keep(trainer, f"{name}-best")
        shards = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        evaluator = ModelEvaluator(trainer.merged_model(), trainer.processor, trainer.config)
        evaluated = evaluator.evaluate_dataset(trainer._val_loader)
        self.found[name] = {
            "history": history, "ids": [row.id for row in evaluated.rows], "wer": evaluated.wer,
            "wrote": trainer.experiment is not None,
            "held": sum(p.to_local().numel() for p in shards),
            "all": sum(p.numel() for p in trainer.model.parameters()),
        }  # fmt: skip

    def _keep(self, trainer: WhisperTrainer, name: str) -> None:
        weights = dict(trainer.merged_model().named_parameters())
        save_file({key: p.detach() for key, p in weights.items()}, self.folder / f"{name}-{rank()}.safetensors")


def stop_in_the_middle(trainer: WhisperTrainer) -> None:
    """Train until a checkpoint in the middle of an epoch is written."""
    save_if_due = trainer._saver.save_if_due

    def save_and_stop(progress: Progress) -> None:
        save_if_due(progress)
        if progress.step == STOP_AFTER:
            raise KeyboardInterrupt

    trainer._saver.save_if_due = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def main(folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    bench = Bench(folder, model_folder)

    def counted(pieces: Sequence[Piece]) -> list[Piece]:
        more = fill_up(pieces)
        bench.found["fillers"] += len(more) - len(pieces)
        return more

    updates.fill_up = counted
    huggingface._verify_huggingface = lambda *given: None  # takes most of the time of a short training
    for name, training in TRAININGS.items():
        bench.finish(name, bench.trainer(name, **training))
    stop_in_the_middle(bench.trainer("resumed", **SHARDED))
    resumed = bench.trainer("resumed", **SHARDED)
    checkpoint = resumed.resume().checkpoint
    assert checkpoint is not None
    bench.found["resumed from"] = checkpoint.name
    bench.finish("resumed", resumed)
    plain = bench.trainer("plain", **{**SHARDED, "shard_model": False})
    plain.resume(checkpoint)
    bench.finish("plain", plain)
    (run,) = (path for path in (folder / "plain" / "checkpoints").iterdir() if path.name != "best_model_hf")
    again = bench.trainer("again", **SHARDED)
    again.resume(run / "checkpoint-00000004")
    bench.finish("again", again)
    (folder / f"found-{rank()}.json").write_text(json.dumps(bench.found))


TWO = (*TRAININGS, "resumed", "plain", "again")  # trainings of the two processes


class Runs:
    """What one process and two processes found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.two = [json.loads((folder / "two" / f"found-{rank}.json").read_text()) for rank in range(2)]
        self.one: Bench

    def weights(self, processes: str, name: str, rank: int = 0) -> dict[str, Tensor]:
        return load_file(self.folder / processes / f"{name}-{rank}.safetensors")


def launch_two(folder: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc_per_node", "2", __file__, str(folder / "two"), str(folder / "model")]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _small: tuple[Any, Any]) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    for part in _small:
        part.save_pretrained(folder / "model")
    for name in ("one", "two"):
        (folder / name).mkdir()
    process = launch_two(folder)
    try:
        bench = Bench(folder / "one", folder / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface, "_verify_huggingface", lambda *given: None)  # as in the two processes
            for name, training in TRAININGS.items():
                bench.finish(name, bench.trainer(name, **{**training, "shard_model": False}))
        if process.wait(timeout=len(TWO) * HUNG_SEC) and "Timeout (" in (log := (folder / "log.txt").read_text()):
            warnings.warn(f"the processes waited for each other, and are started again: {log[-4000:]}", stacklevel=1)
            shutil.rmtree(folder / "two")
            (folder / "two").mkdir()
            process = launch_two(folder)
        assert process.wait(timeout=len(TWO) * HUNG_SEC) == 0, (folder / "log.txt").read_text()[-4000:]
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
    for process in range(2):
        best = runs.weights("two", f"{training}-best", process)
        assert set(best) == set(exported)
        assert all(torch.equal(exported[name], weight) for name, weight in best.items())


def test_one_run_and_its_checkpoints_are_on_the_disk(runs: Runs) -> None:
    place = runs.folder / "two" / "straight"
    assert len(list((place / "runs").iterdir())) == 1
    (run,) = (path for path in (place / "checkpoints").iterdir() if path.name != "best_model_hf")
    assert [path.name for path in sorted(run.iterdir())] == [f"checkpoint-{step:08d}" for step in range(1, 5)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
