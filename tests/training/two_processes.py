"""Trains a few updates in as many processes as the launcher starts; run by test_distributed.

python -m torch.distributed.run --nproc_per_node 2 tests/training/two_processes.py <folder> <accumulation steps>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MethodType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from src.data.batching import Batches, LengthBatchSampler
from src.data.checking import check_utterance
from src.data.loader import create_loader
from src.data.sources.catalog import load_utterances
from src.evaluation.evaluator import ModelEvaluator
from src.models.whisper_model import WhisperModelManager
from src.training.trainer import WhisperTrainer
from src.utils.config import DataConfig, load_config
from src.utils.distributed import rank, world_size

CLIPS, BATCH = 12, 2


def same_batches(sampler: LengthBatchSampler, epoch: int) -> Batches:
    """Deal out the same batches in the same order, whatever the number of processes."""
    everything = [list(range(at, at + BATCH)) for at in range(0, CLIPS, BATCH)]
    return everything[sampler.shard.rank :: sampler.shard.world_size]


def main(folder: Path, accumulation_steps: int) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    config = load_config(
        None,
        overrides={
            "device": "cpu",
            "paths": {"runs_dir": str(folder / "runs"), "checkpoints_dir": str(folder / "checkpoints")},
            "training": {
                "epochs": 1, "batch_size": BATCH, "gradient_accumulation_steps": accumulation_steps, "prefix_prob": 0.5,
            },
            "inference": {"batch_size": 3},
            "checkpoints": {"save_minutes": 0},
        },
    )  # fmt: skip
    train = [u for u in load_utterances(DataConfig()) if u.meta["split"] == "train"]
    clips = [check_utterance(utterance, config.data) for utterance in train[::29][:CLIPS]]
    model, processor = WhisperModelManager(config).initialize_model("tiny.en")
    train_loader = create_loader(clips, processor, config, shuffle=True)
    train_loader.batch_sampler._plan = MethodType(same_batches, train_loader.batch_sampler)  # type: ignore[method-assign]
    val_loader = create_loader(clips[:7], processor, config)  # 3 batches: one process measures more than the other
    trainer = WhisperTrainer(model, processor, train_loader, val_loader, config)
    trainer.resume()
    history = trainer.train()
    evaluated = ModelEvaluator(model, processor, config).evaluate_dataset(val_loader)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / f"weights-{rank()}.safetensors")
    found = {
        "processes": world_size(), "history": history, "ids": [row.id for row in evaluated.rows],
        "wer": evaluated.wer, "wrote": trainer.experiment is not None, "clips": [clip.id for clip in clips[:7]],
    }  # fmt: skip
    (folder / f"found-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
