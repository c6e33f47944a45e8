"""What a session can start from: the newest checkpoint, restarted by one call, and everything stored on this machine.

A checkpoint holds its configuration; data and stock weights come from where they came from the first time, and the data
must be those that the training saw.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache

from src.data.labels import Group, LabelCase, LabelStyle
from src.data.loader import Loaders, create_dataloaders
from src.data.preparation import DatasetSplits, prepare_datasets
from src.data.report.report import DataReport
from src.data.sources.catalog import SAMPLES_DIR
from src.evaluation.data_checks import choose_label_case, fill_languages
from src.inference.files.recordings import with_clips
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import read_provenance
from src.models.weights import HUB_REPOSITORIES, PACKAGED_MODELS
from src.models.whisper_model import WhisperModelManager
from src.training import checkpoint as checkpoints
from src.training import state as run_state
from src.training.checkpoint import WholeCheckpoint
from src.training.saver import BEST_MODEL_NAME
from src.training.trainer import WhisperTrainer
from src.utils.config import DEFAULT_CONFIG_PATH, Config, flatten, load_config, load_profiles
from src.utils.errors import CheckpointError, ConfigError, DataError, first_line
from src.utils.memory import size_mb
from src.utils.runtime import set_seed
from src.utils.tracking import ExperimentLogger
from src.utils.validation import Check, CheckReport
from src.utils.versioning import DatasetVersion, DataVersionManager

logger = logging.getLogger(__name__)


class RestartedRun(NamedTuple):
    """A run as it was, in the order in which it is made."""

    config: Config  # as saved, except for the mirror and the cache of now
    experiment: ExperimentLogger  # continues in the run's folder, with the rows of metrics that the checkpoint holds
    splits: DatasetSplits  # with transcripts as they come from the source
    data_version: DatasetVersion  # of all clips
    labelled_splits: DatasetSplits  # with transcripts as they were trained on
    loaders: Loaders  # of these
    manager: WhisperModelManager
    model: DynamicWhisper  # with the weights of the checkpoint, or of the best epoch if the training had ended
    processor: Any
    trainer: WhisperTrainer  # `train` continues the training; `history` is the run's


def restart(mirror_dir: Path | None = None, *, config_path: str | Path = DEFAULT_CONFIG_PATH) -> RestartedRun:
    """Restore the run of the newest whole checkpoint, on this disk or in the mirror.

    Args:
        mirror_dir: folder with copies of checkpoints, such as one on Google Drive; None searches only this disk.
        config_path: says, with its profiles, where checkpoints and the cache are on this machine.

    Raises:
        CheckpointError: there is no checkpoint, it is from another version of this code, or the data are not those
            that it was trained on.
    """
    here = load_config(config_path)
    configs = [here, *load_profiles(config_path).values()]
    roots = [config.paths.checkpoints_dir for config in configs] + ([] if mirror_dir is None else [mirror_dir])
    report = checkpoints.find_checkpoint(list(dict.fromkeys(roots)), None)
    logger.info("%s", report)
    if report.whole is None:
        raise CheckpointError(f"{report}; train first, or name the folder that has copies of checkpoints")
    now = {"paths": {"cache_dir": here.paths.cache_dir}, "checkpoints": {"mirror_dir": mirror_dir}}
    try:
        config = load_config(None, overrides={**flatten(report.whole.values["config"]), **flatten(now)})
    except ConfigError as err:
        raise CheckpointError(
            f"{report.checkpoint}: its settings are not those of this version ({err}); restart with the version that "
            "wrote it"
        ) from err
    experiment = ExperimentLogger(config, run_id=report.whole.values["run"])
    set_seed(config.seed)
    splits = prepare_datasets(with_clips(config))
    data_version = DataVersionManager(experiment.dir / "data_versions").log_dataset_version(
        dataset_name=splits.source, version=experiment.run_id, metadata={}, utterances=splits.utterances
    )
    manager = WhisperModelManager(config)
    model, processor = manager.initialize_model()
    splits = fill_languages(splits, model, processor, config)
    labelled_splits, loaders = _label_as_trained(report.whole, splits, processor, config, experiment.dir)
    trainer = WhisperTrainer(model, processor, loaders.train, loaders.validation, config, experiment=experiment)
    trainer.resume(report.whole)
    if trainer.ended:
        trainer.restore_best()
    return RestartedRun(
        config, experiment, splits, data_version, labelled_splits, loaders, manager, model, processor, trainer
    )


def _label_as_trained(
    checkpoint: WholeCheckpoint, splits: DatasetSplits, processor: Any, config: Config, run_dir: Path
) -> tuple[DatasetSplits, Loaders]:
    """Find the style of the transcripts: a checkpoint has their checksum, the run's data report what was likeliest."""
    data_version, found = checkpoint.values["data_version"], []
    cases: list[LabelCase | dict[str | None, LabelStyle] | dict[Group, LabelStyle]] = [splits.label_case]
    with contextlib.suppress(DataError):  # no report
        cases.append(choose_label_case(DataReport.load(run_dir), config))
    cases += ["keep", "lower", "sentence"]
    for label_case in (case for at, case in enumerate(cases) if case not in cases[:at]):
        labelled = splits.with_label_case(label_case)
        loaders = create_dataloaders(labelled, processor, config)
        if loaders.train.data_version == data_version:
            logger.info("transcripts are in the case that was trained on: %s", label_case)
            return labelled, loaders
        found.append(loaders.train.data_version)
    raise CheckpointError(
        f"{checkpoint.path}: was trained on other data: {data_version} then, {' or '.join(dict.fromkeys(found))} now "
        f"(number of clips, and a hash of their names, lengths and texts); restore {splits.source!r} as it was, or "
        "start a new training"
    )


class StoredReport(CheckReport):
    """Bundled data, weights and checkpoints on this machine."""

    title = "To start from"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on the disk; what its state should say is None if it cannot be read."""

    path: Path
    mb: float
    update: int | None = None
    epochs_done: int | None = None
    age: tuple[int, float, int] = (0, 0.0, 0)  # sorts from old to new
    problem: str = ""  # why it is damaged; empty if every file is as it was written
    differences: tuple[str, ...] = ()  # settings of another training; "auto" does not resume it


def stored_report(config: Config) -> StoredReport:
    """Report what a training can start from; every file of every checkpoint is read and compared."""
    samples = [path for path in sorted(SAMPLES_DIR.iterdir()) if path.suffix != ".md"]
    data = ", ".join(f"{path.name} {size_mb(path):.1f} MB" for path in samples)
    checks = [Check("bundled data", "ok", data), _check_weights(config.model.variant)]
    stored = stored_checkpoints(config)
    for each in stored:
        name, found = f"checkpoint {each.path.parent.name}/{each.path.name}", f"{each.mb:,.0f} MB"
        if each.problem:
            fix = "clean_up(config, checkpoints=spare_checkpoints(config)) lists it with what else can go"
            checks.append(Check(name, "warning", f"damaged, {found}: {each.problem}", fix))
            continue
        stale = f"; stale, of another training: {each.differences[0]}" if each.differences else ""
        found = f"whole, {found}, update {each.update}, {each.epochs_done} epoch(s) done{stale}"
        checks.append(Check(name, "ok", found))
    if not stored:
        checks.append(Check("checkpoints", "absent", f"none below {config.paths.checkpoints_dir}"))
    best = config.paths.checkpoints_dir / BEST_MODEL_NAME
    if best.is_dir():
        made = read_provenance(best)
        rate = made.get("validation_rate", made.get("validation_wer", math.nan))
        shown = f"{rate:.3f}" if isinstance(rate, float) else repr(rate)  # somebody else's
        measured = f"validation {made.get('validation_metric', 'WER')} {shown}"
        found = f"run {made.get('run')}, epoch {made.get('epoch')}"
        checks.append(Check("best model", "ok", f"{found}, {size_mb(best):,.0f} MB, {measured}"))
    return StoredReport(tuple(checks))


def stored_checkpoints(config: Config) -> list[StoredCheckpoint]:
    """Read and verify every checkpoint below `paths.checkpoints_dir`, run by run."""
    root = config.paths.checkpoints_dir
    runs = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [_inspect(path, config) for run in runs for path in checkpoints.list_checkpoints(run)]


def spare_checkpoints(config: Config) -> list[Path]:
    """Return the checkpoints that `clean_up` may remove: all except the newest whole one of each run."""
    newest: dict[Path, StoredCheckpoint] = {}
    stored = stored_checkpoints(config)
    for each in sorted((each for each in stored if not each.problem), key=lambda each: each.age):
        newest[each.path.parent] = each
    return [each.path for each in stored if each is not newest.get(each.path.parent)]


def _inspect(path: Path, config: Config) -> StoredCheckpoint:
    found: dict[str, Any] = {}
    try:
        values = checkpoints.read_values(path)
        found["update"], found["epochs_done"] = int(values["progress"]["step"]), int(values["progress"]["epochs_done"])
        found["age"] = checkpoints.age(path, values)
        found["differences"] = tuple(checkpoints.config_differences(values["config"], config))
        checkpoints.verify_checkpoint(path)
        run_state.check_values(values)
    except checkpoints.UNREADABLE as err:
        reason = first_line(err) if isinstance(err, CheckpointError) else f"{err!r} in its state"
        found["problem"] = reason.removeprefix(f"{path}: ")
    return StoredCheckpoint(path, size_mb(path), **found)


def _check_weights(wanted: str) -> Check:
    """Find the variants whose weights are on this machine."""
    here = [name for name, model in PACKAGED_MODELS.items() if model.problem() is None]
    for name, repository in HUB_REPOSITORIES.items():
        if isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
            here.append(name)
    found = f"here without a network: {', '.join(here) or 'none'}"
    if wanted in here or Path(wanted).is_dir():
        return Check("weights", "ok", f"{wanted}; {found}")
    fix = f"hf download {HUB_REPOSITORIES.get(wanted, wanted)}"
    return Check("weights", "absent", f"{wanted} has to be fetched; {found}", fix)
