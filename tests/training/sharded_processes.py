"""Trains a small model in one process, or shared out to those that the launcher starts; run by test_sharding.

python -m torch.distributed.run --nproc_per_node 2 tests/training/sharded_processes.py <folder> <folder of the model>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import WhisperProcessor

from src.data.batching import Batches, LengthBatchSampler
from src.data.checking import check_utterance
from src.data.loader import create_loader
from src.data.sources.catalog import load_utterances
from src.evaluation.evaluator import ModelEvaluator
from src.models.dynamic_context import DynamicWhisper
from src.training import updates
from src.training.progress import Progress
from src.training.sharding import Piece, in_step
from src.training.trainer import WhisperTrainer
from src.utils.config import Config, DataConfig, load_config
from src.utils.distributed import rank, world_size

CLIPS, VALIDATION, BATCH, EPOCHS = 8, 3, 2, 2
STOP_AFTER = 3  # updates: one of the second epoch's two
LORA = {
    "method": "lora", "gradient_checkpointing": True, "epochs": 1, "full_context_prob": 0.0,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
}  # fmt: skip


class StoppedError(Exception):
    """Stands for a kill."""


def same_batches(sampler: LengthBatchSampler, epoch: int) -> Batches:
    """Deal out the same batches in the same order, whatever the number of processes."""
    everything = [list(range(at, at + BATCH)) for at in range(0, CLIPS, BATCH)]
    return everything[sampler.shard.rank :: sampler.shard.world_size]


def configure(folder: Path, **training: Any) -> Config:
    """Full context in half of the batches: processes then cut theirs into other numbers of pieces."""
    base = {
        "epochs": EPOCHS, "batch_size": BATCH, "gradient_accumulation_steps": 2 // world_size(), "method": "full",
        "learning_rate": 1e-3, "full_context_prob": 0.5, "shard_model": world_size() > 1,
    }  # fmt: skip
    return load_config(
        None,
        overrides={
            "device": "cpu",
            "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
            "augmentation": {"enabled": False},
            "training": {**base, **training},
            "inference": {"batch_size": 1, "max_tokens_per_sec": 2.0},
            "evaluation": {"bootstrap_samples": 100},
            "checkpoints": {"save_minutes": 0, "save_total_limit": 10},
        },
    )


class Bench:
    """Makes trainers of the same model and clips, and notes what they end with."""

    def __init__(self, folder: Path, model_folder: Path) -> None:
        self.folder = folder
        self._model_folder = model_folder
        train = sorted(
            (u for u in load_utterances(DataConfig()) if u.meta["split"] == "train"), key=lambda u: u.duration_sec or 0
        )
        self._clips = [check_utterance(utterance, DataConfig()) for utterance in train[:CLIPS]]
        self.found: dict[str, Any] = {
            "processes": world_size(),
            "clips": [clip.id for clip in self._clips[:VALIDATION]],
        }

    def trainer(self, name: str, **training: Any) -> WhisperTrainer:
        """Make one with a folder of its own."""
        config = configure(self.folder / name, **training)
        model = DynamicWhisper.from_pretrained(self._model_folder)
        processor = WhisperProcessor.from_pretrained(self._model_folder)
        loader = create_loader(self._clips, processor, config, shuffle=True)
        loader.batch_sampler._plan = MethodType(same_batches, loader.batch_sampler)  # type: ignore[method-assign]
        self.validation = create_loader(self._clips[:VALIDATION], processor, config)
        trainer = WhisperTrainer(model, processor, loader, self.validation, config)
        trainer._report_full_context = lambda: None  # type: ignore[method-assign]  # a second validation, for its time
        return trainer

    def finish(self, trainer: WhisperTrainer, name: str) -> None:
        """Train to the end; keep the last epoch's whole weights, and what an evaluation of the best ones gives."""
        restore_best = trainer._saver.restore_best

        def keep_last(progress: Progress) -> None:
            self._keep(trainer, f"{name}-last")
            restore_best(progress)

        trainer._saver.restore_best = keep_last  # type: ignore[method-assign]
        history = trainer.train()
        self._keep(trainer, f"{name}-best")
        shards = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        evaluated = ModelEvaluator(trainer.merged_model(), trainer.processor, trainer.config).evaluate_dataset(
            self.validation
        )
        self.found[name] = {
            "history": history, "ids": [row.id for row in evaluated.rows], "wer": evaluated.wer,
            "wrote": trainer.experiment is not None,
            "held": sum(p.to_local().numel() for p in shards),
            "all": sum(p.numel() for p in trainer.model.parameters()),
        }  # fmt: skip

    def _keep(self, trainer: WhisperTrainer, name: str) -> None:
        weights = dict(trainer.merged_model().named_parameters())
        save_file({key: p.detach() for key, p in weights.items()}, self.folder / f"{name}-{rank()}.safetensors")


def count_fillers(found: dict[str, Any]) -> None:
    """Note how many passes without a loss this process makes."""

    def counted(pieces: Sequence[Piece]) -> list[Piece]:
        more = in_step(pieces)
        found["fillers"] += len(more) - len(pieces)
        return more

    found["fillers"] = 0
    updates.in_step = counted


def stop_in_the_middle(trainer: WhisperTrainer) -> None:
    """Train until a checkpoint in the middle of an epoch is written."""
    save_if_due = trainer._saver.save_if_due

    def save_and_stop(progress: Progress) -> None:
        save_if_due(progress)
        if progress.step == STOP_AFTER:
            raise StoppedError

    trainer._saver.save_if_due = save_and_stop  # type: ignore[method-assign]
    try:
        trainer.train()
    except StoppedError:
        return
    raise AssertionError("it was not stopped")


def main(folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    bench = Bench(folder, model_folder)
    count_fillers(bench.found)
    bench.finish(bench.trainer("straight"), "straight")
    bench.finish(bench.trainer("lora", **LORA), "lora")
    if world_size() > 1:
        stop_in_the_middle(bench.trainer("resumed"))
        resumed = bench.trainer("resumed")
        checkpoint = resumed.resume().checkpoint
        assert checkpoint is not None
        bench.found["resumed from"] = checkpoint.name
        bench.finish(resumed, "resumed")
        plain = bench.trainer("plain", shard_model=False)
        plain.resume(checkpoint)
        bench.finish(plain, "plain")
        (run,) = (path for path in (folder / "plain" / "checkpoints").iterdir() if path.name != "best_model_hf")
        shared_again = bench.trainer("again")
        shared_again.resume(run / "checkpoint-00000004")
        bench.finish(shared_again, "again")
    (folder / f"found-{rank()}.json").write_text(json.dumps(bench.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
