"""Fine-tune on one or several processes, GPUs or machines.

    python scripts/train.py --config config.yaml --profile demo
    accelerate launch --num_processes 4 scripts/train.py --config config.yaml
    accelerate launch --num_processes 4 scripts/train.py --set training.shard_model=true

A stopped run resumes from its newest checkpoint when the same command is given again; `--fresh` starts from the
beginning. Settings are overridden by `--set training.epochs=5`. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accelerate import PartialState

from scripts.command_line import add_settings, load_settings, reports_errors, run_main
from src.data import create_dataloaders, prepare_datasets
from src.evaluation import fill_languages
from src.inference import with_clips
from src.models import WhisperModelManager
from src.training import WhisperTrainer
from src.utils import setup_logging
from src.utils.config import Config
from src.utils.runtime import is_main_process, world_size


@reports_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_settings(parser)
    parser.add_argument("--fresh", action="store_true", help="start from the beginning, although there is a checkpoint")
    arguments = parser.parse_args()
    config = load_settings(arguments)
    PartialState(cpu=config.device == "cpu")  # joins the processes that the launcher has started
    setup_logging("INFO" if is_main_process() else "WARNING")
    if world_size() > 1 and config.device == "auto":
        config = config.model_copy(update={"device": str(PartialState().device)})
    figures = train(config, fresh=arguments.fresh)
    if is_main_process():
        print(json.dumps(figures))
    return 0


def train(config: Config, *, fresh: bool) -> dict[str, Any]:
    """Run one training in this process and the others of the launcher."""
    splits = prepare_datasets(with_clips(config))
    model, processor = WhisperModelManager(config).initialize_model()
    splits = fill_languages(splits, model, processor, config)
    loaders = create_dataloaders(splits, processor, config)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config)
    if not fresh:
        trainer.resume("auto")
    history = trainer.train()
    return {
        "processes": world_size(),
        "epochs": len(history["epoch"]),
        "best_epoch": trainer.best_epoch,
        "best_val_rate": min(history["val_rate"]),
        "best_model": str(trainer.best_model_dir),
    }


if __name__ == "__main__":
    run_main(main)
