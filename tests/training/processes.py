"""Trains small models in one process, or in those that torch's launcher starts; run by test_processes.

python -m torch.distributed.run --nproc_per_node 2 tests/training/processes.py <folder> <folder of the model>
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

CLIPS, VALIDATION, BATCH = 8, 3, 2
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


class StoppedError(Exception):
    """Stands for a kill."""


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
