"""What a run keeps: its whole state at intervals, and the best model, here and in the mirror."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.data.loader import SpeechLoader
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import ADAPTERS_FILE, export_huggingface, read_provenance
from src.training.checkpoint import CheckpointStore, TrainingState, checkpoint_path, clean_up, load_checkpoint
from src.training.methods import has_adapters, merged_model
from src.training.progress import Progress
from src.training.resume import ResumeReport, config_differences, find_checkpoint
from src.training.sharding import is_sharded, shard_all_like
from src.training.state import (
    frozen_digest,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    random_state,
    restore_random_state,
)
from src.training.updates import Updater
from src.utils.colab import copy_verified
from src.utils.config import Config
from src.utils.distributed import broadcast_object, is_main_process, sum_over_processes, wait_for_all
from src.utils.errors import CheckpointError
from src.utils.files import atomic_folder, recover_folder
from src.utils.mirror import DriveMirror
from src.utils.tracking import ExperimentLogger
from src.utils.versioning import get_git_revision

logger = logging.getLogger(__name__)

BEST_MODEL_NAME = "best_model_hf"
FLUSH_TIMEOUT_SEC = 600.0  # that the end of training waits for the mirror


class RunSaver:
    """Saves and restores one run; in all processes, of which the main one writes.

    Args:
        whole_model: gives the plain model: the model itself, or a copy where it is shared out to the processes.

    Attributes:
        best_model_dir: in Hugging Face format.
    """

    def __init__(
        self,
        config: Config,
        model: DynamicWhisper,
        processor: Any,
        optimizer: Any,
        updater: Updater,
        accelerator: Accelerator,
        loader: SpeechLoader,
        experiment: ExperimentLogger | None,
        whole_model: Callable[[], DynamicWhisper],
    ) -> None:
        self._config = config
        self._model = model
        self._processor = processor
        self._optimizer = optimizer
        self._updater = updater
        self._accelerator = accelerator
        self._loader = loader
        self._experiment = experiment
        self._whole_model = whole_model
        self._frozen = frozen_digest(model)
        self._saved_at_sec = time.monotonic()
        self._holds_best = False  # instead of the last epoch's weights
        self._resumed: Path | None = None  # it may lie in the mirror alone
        self.best_model_dir: Path = config.paths.checkpoints_dir / BEST_MODEL_NAME
        self._mirror = _make_mirror(config) if experiment is not None else None
        self._store: CheckpointStore | None = None
        if experiment is not None:
            folder = config.paths.checkpoints_dir / experiment.run_id
            clean_up(folder)
            recover_folder(self.best_model_dir)
            limit = config.checkpoints.save_total_limit
            self._store = CheckpointStore(folder, save_total_limit=limit, mirror=self._mirror)

    def start_clock(self) -> None:
        """Begin the interval to the next checkpoint."""
        self._saved_at_sec = time.monotonic()

    def save_if_due(self, progress: Progress) -> None:
        """Save where `save_minutes` have passed; the main process's clock decides for all."""
        minutes = self._config.checkpoints.save_minutes
        if minutes is None:
            return
        due = is_main_process() and time.monotonic() - self._saved_at_sec >= 60 * minutes
        if sum_over_processes([due], self._accelerator.device)[0]:
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Save the whole state. Training goes on where that fails: older checkpoints are whole, and it tries again."""
        self.start_clock()
        if self._store is None and is_sharded(self._model):
            self._collect_tensors()  # the main process needs the shards of all
        if self._store is not None:
            try:
                self._store.save(self._collect(progress), progress.step)
            except CheckpointError as err:
                logger.warning("no checkpoint was saved, training goes on: %s", err)
        wait_for_all()

    def export_best(self, progress: Progress) -> None:
        """Replace the best model on disk by the model as it is.

        Raises: CheckpointError: it cannot be written; the older one is whole, and so is the last checkpoint.
        """
        whole = self._whole_model()
        if self._experiment is not None:
            self._export(whole, progress, self._experiment.run_id)
        wait_for_all()

    def finish_export(self, progress: Progress) -> None:
        """Export the best model where an interrupt came between the end of its epoch and its export."""
        is_due = progress.best_epoch is not None and progress.best_epoch == progress.epochs_done
        if is_due and not progress.next_batch and not broadcast_object(_is_best(self.best_model_dir, progress)):
            self.export_best(progress)

    def restore_best(self, progress: Progress) -> None:
        """Put the best epoch's weights into the model, where the last epoch is not the best."""
        if progress.best_epoch is None or (progress.best_epoch == progress.epochs_done and not progress.next_batch):
            return
        if not _is_best(self.best_model_dir, progress):
            raise CheckpointError(
                f"{self.best_model_dir}: the model of epoch {progress.best_epoch}, the best of this training, is not "
                "there any more; give each training a paths.checkpoints_dir of its own, and resume from a checkpoint"
            )
        name = ADAPTERS_FILE if has_adapters(self._model) else "model.safetensors"
        tensors = shard_all_like(load_file(self.best_model_dir / name), self._model)
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        assert not unexpected and (name == ADAPTERS_FILE or set(missing) <= {"proj_out.weight"})  # tied
        self._holds_best = True
        logger.info("the model now holds the weights of epoch %d, the best by WER", progress.best_epoch)

    def restore_last(self, progress: Progress) -> None:
        """Put the last epoch's weights back, where training goes on after `restore_best`.

        Raises: CheckpointError: the last checkpoint is not there or damaged.
        """
        if not self._holds_best:
            return
        self._holds_best = False
        last = broadcast_object(None if self._store is None else checkpoint_path(self._store.folder, progress.step))
        assert last is not None
        if not last.exists() and self._resumed is not None and self._resumed.name == last.name:
            last = self._resumed
        load_model_tensors(self._model, load_checkpoint(last).tensors["model"])

    def resume(self, checkpoint: str | Path) -> tuple[ResumeReport, Progress | None]:
        """Find, check and take up a checkpoint.

        Raises: CheckpointError: a named one that cannot be taken up.
        """
        report = broadcast_object(self._find(checkpoint) if is_main_process() else None)
        assert report is not None
        logger.info("%s", report)
        if report.checkpoint is None:
            return report, None
        progress = self._restore(report.checkpoint)
        self._resumed = report.checkpoint
        if self._store is not None and checkpoint == "auto":  # the newest goes on in its folder, any other branches off
            self._store.folder = self._config.paths.checkpoints_dir / report.checkpoint.parent.name
        logger.info(
            "resumed at update %d, epoch %d, from %s", progress.step, progress.epochs_done + 1, report.checkpoint
        )
        return report, progress

    def flush(self) -> None:
        """Wait until the mirror has what is on the disk, and say what it could not copy."""
        if self._mirror is None:
            return
        self._mirror.flush(FLUSH_TIMEOUT_SEC)
        for failure in self._mirror.failures:
            logger.warning("not in the mirror %s: %s (%s)", self._mirror.target, failure.name, failure.reason)

    def _export(self, whole: DynamicWhisper, progress: Progress, run: str) -> None:
        made = {
            "training": progress.training_id, "run": run, "epoch": progress.best_epoch, "step": progress.step,
            "validation_wer": progress.best_wer, "git_revision": get_git_revision(),
            "data_version": self._data_version(),
        }  # fmt: skip
        adapters = model_tensors(whole) if has_adapters(whole) else None
        try:
            export_huggingface(
                merged_model(whole), self._processor, self.best_model_dir, provenance=made, adapters=adapters
            )
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"{self.best_model_dir}: cannot be written: {err}. Free space there and resume: the last checkpoint is "
                "whole"
            ) from err
        if self._mirror is not None:
            self._mirror.submit(self.best_model_dir)

    def _find(self, checkpoint: str | Path) -> ResumeReport:
        if checkpoint != "auto":
            return ResumeReport(Path(checkpoint), (), ())
        mirror = self._config.checkpoints.mirror_dir
        roots = [self._config.paths.checkpoints_dir, *([mirror] if mirror is not None else [])]
        made_from = {"frozen_parameters": self._frozen, "data_version": self._data_version()}
        return find_checkpoint(roots, self._config, made_from=made_from)

    def _data_version(self) -> str:
        return self._loader.data_version

    def _collect_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        return model_tensors(self._model), *optimizer_tensors(self._optimizer.optimizer, self._model)

    def _collect(self, progress: Progress) -> TrainingState:
        model, optimizer, optimizer_values = self._collect_tensors()
        rng, rng_values = random_state()
        scaler = self._accelerator.scaler
        assert self._experiment is not None
        values = {
            "run": self._experiment.run_id,
            "saved_at": time.time(),
            "progress": progress.state_dict(),
            "loader": self._loader.state_dict(),
            "updater": self._updater.state_dict(),
            "optimizer": optimizer_values,
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_values,
            "frozen_parameters": self._frozen,
            "config": self._config.model_dump(mode="json"),
            "data_version": self._data_version(),
            "git_revision": get_git_revision(),
        }
        rows = self._experiment.read_rows()
        return TrainingState({"model": model, "optimizer": optimizer, "rng": rng}, values, rows)

    def _restore(self, checkpoint: Path) -> Progress:
        state = load_checkpoint(checkpoint)
        values = state.values
        for difference in config_differences(values["config"], self._config):
            logger.warning("resuming with another setting: %s", difference)
        if values["frozen_parameters"] != self._frozen:
            raise CheckpointError(
                f"{checkpoint}: the parameters that were not trained differ from this model's; load its stock model"
            )
        try:
            progress = Progress.from_state(values["progress"])
            self._loader.load_state_dict(values["loader"])
            load_model_tensors(self._model, state.tensors["model"])
            load_optimizer_tensors(
                self._optimizer.optimizer, self._model, state.tensors["optimizer"], values["optimizer"]
            )
            self._updater.load_state_dict(values["updater"])
            if self._accelerator.scaler is not None and values["scaler"] is not None:
                self._accelerator.scaler.load_state_dict(values["scaler"])
            restore_random_state(state.tensors["rng"], values["rng"])
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(f"{checkpoint}: {err!r} in its state; train with the version that wrote it") from err
        except CheckpointError as err:
            raise CheckpointError(f"{checkpoint}: {err}") from err
        whole = self._whole_model()
        if self._experiment is not None:
            self._restore_best_on_disk(whole, progress, values["run"])
        progress = broadcast_object(progress)
        if self._experiment is not None:
            self._experiment.resume_at(progress.step, progress.epochs_done, metrics=state.metrics)
        return progress

    def _restore_best_on_disk(self, whole: DynamicWhisper, progress: Progress, run: str) -> None:
        """See that `best_model_hf` is the best epoch's, from the mirror or from the checkpoint where it must be."""
        if progress.best_epoch is None or _is_best(self.best_model_dir, progress):
            return
        mirror = self._config.checkpoints.mirror_dir
        if mirror is not None and _is_best(mirror / BEST_MODEL_NAME, progress):
            with atomic_folder(self.best_model_dir, replace=True) as folder:
                copy_verified(mirror / BEST_MODEL_NAME, folder)
        elif progress.best_epoch == progress.epochs_done and not progress.next_batch:
            self._export(whole, progress, run)  # the run was killed between this checkpoint and the export
        else:
            logger.warning(
                "%s: the model of epoch %d, the best until now, is not there; the best of the coming epochs is kept",
                self.best_model_dir, progress.best_epoch,
            )  # fmt: skip
            progress.best_epoch, progress.best_wer = None, math.inf


def _is_best(folder: Path, progress: Progress) -> bool:
    made = read_provenance(folder)
    return made.get("training") == progress.training_id and made.get("epoch") == progress.best_epoch


def _make_mirror(config: Config) -> DriveMirror | None:
    target = config.checkpoints.mirror_dir
    if target is None:
        return None
    return DriveMirror(target, max_mb_per_sec=config.checkpoints.mirror_mb_per_sec)
