"""Quick restart: all that a new runtime needs to go on from the newest whole checkpoint, made again by one call.

A checkpoint holds its configuration, so nothing has to be chosen again. Data and stock weights come from where they
came from the first time; the data must be those that the training saw, else the restart is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.data.labels import LabelCase
from src.data.loader import Loaders, create_dataloaders
from src.data.preparation import DatasetSplits, prepare_datasets
from src.models.dynamic_context import DynamicWhisper
from src.models.whisper_model import WhisperModelManager
from src.training.checkpoint import read_values
from src.training.resume import find_checkpoint
from src.training.trainer import WhisperTrainer
from src.utils.config import DEFAULT_CONFIG_PATH, Config, flatten, load_config, load_profiles
from src.utils.data_versions import DatasetVersion, DataVersionManager
from src.utils.errors import CheckpointError, ConfigError
from src.utils.runtime import set_seed
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

_LABEL_CASES: tuple[LabelCase, ...] = ("keep", "lower", "sentence")


class RestartedRun(NamedTuple):
    """A run as it stood, in the order in which it is made.

    Attributes:
        config: as saved; the mirror and the cache are those of now.
        experiment: goes on in the run's folder, with the rows of metrics that the checkpoint holds.
        splits: with transcripts as they come from the source.
        data_version: of all clips.
        labelled_splits: with transcripts as they were trained on.
        loaders: of these.
        model: with the weights of the checkpoint; those of the best epoch, where the training had ended.
        trainer: `train` goes on; `history` is the run's.
    """

    config: Config
    experiment: ExperimentLogger
    splits: DatasetSplits
    data_version: DatasetVersion
    labelled_splits: DatasetSplits
    loaders: Loaders
    manager: WhisperModelManager
    model: DynamicWhisper
    processor: Any
    trainer: WhisperTrainer


def restart(mirror_dir: Path | None = None, *, config_path: str | Path = DEFAULT_CONFIG_PATH) -> RestartedRun:
    """Find the newest whole checkpoint of any run, here or in the mirror, and make its run again.

    Args:
        mirror_dir: folder with copies of checkpoints, such as one on Google Drive; None searches here alone.
        config_path: says, with its profiles, where checkpoints lie on this machine, and where the cache.
    Raises: CheckpointError: there is none, it is of another version of this code, or the data are not those that it
        was trained on. And what making the data and the model raises.
    """
    here = load_config(config_path)
    configs = [here, *load_profiles(config_path).values()]
    roots = [config.paths.checkpoints_dir for config in configs] + ([] if mirror_dir is None else [mirror_dir])
    report = find_checkpoint(list(dict.fromkeys(roots)), None)
    logger.info("%s", report)
    if report.checkpoint is None:
        raise CheckpointError(f"{report}; train first, or name the folder that has copies of checkpoints")
    values = read_values(report.checkpoint)
    config = _restore_config(report.checkpoint, values["config"], here, mirror_dir)
    experiment = ExperimentLogger(config, run_id=values["run"])
    set_seed(config.seed)
    splits = prepare_datasets(config)
    versions = DataVersionManager(experiment.dir / "data_versions")
    data_version = versions.log_dataset_version(
        dataset_name=splits.source, version=experiment.run_id, metadata={}, utterances=splits.utterances
    )
    manager = WhisperModelManager(config)
    model, processor = manager.initialize_model()
    labelled_splits, loaders = _label_as_trained(report.checkpoint, values["data_version"], splits, processor, config)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config, experiment=experiment)
    trainer.resume("auto")
    if trainer.ended:
        trainer.restore_best()
    return RestartedRun(
        config, experiment, splits, data_version, labelled_splits, loaders, manager, model, processor, trainer
    )


def _restore_config(checkpoint: Path, saved: Mapping[str, Any], here: Config, mirror_dir: Path | None) -> Config:
    now = {"paths": {"cache_dir": here.paths.cache_dir}, "checkpoints": {"mirror_dir": mirror_dir}}
    try:
        return load_config(None, overrides={**flatten(saved), **flatten(now)})
    except ConfigError as err:
        raise CheckpointError(
            f"{checkpoint}: its settings are not those of this version ({err}); restart with the version that wrote it"
        ) from err


def _label_as_trained(
    checkpoint: Path, data_version: str, splits: DatasetSplits, processor: Any, config: Config
) -> tuple[DatasetSplits, Loaders]:
    """Find how the transcripts were cased: a checkpoint says what they were, not how they came about."""
    found = []
    for label_case in dict.fromkeys((splits.label_case, *_LABEL_CASES)):
        labelled = splits.with_label_case(label_case)
        loaders = create_dataloaders(labelled, processor, config)
        if loaders.train.data_version == data_version:
            logger.info("transcripts are in the case that was trained on: %s", label_case)
            return labelled, loaders
        found.append(loaders.train.data_version)
    raise CheckpointError(
        f"{checkpoint}: was trained on other data: {data_version} then, {' or '.join(dict.fromkeys(found))} now "
        f"(number of clips, and a hash of their names, lengths and texts); bring back what {splits.source!r} was then, "
        "or train anew"
    )
