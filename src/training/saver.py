"""Periodic checkpoints and the best model of a run, on the local disk and in the mirror."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from src.data.loader import SpeechLoader
from src.models.dynamic_context import DynamicWhisper
from src.models.export.huggingface import ADAPTERS_FILE, export_huggingface, read_provenance
from src.models.export.verify import SpokenClip
from src.training import checkpoint as checkpoints
from src.training import state as run_state
from src.training.checkpoint import CheckpointStore, ResumeReport, TrainingState, WholeCheckpoint, verify_checkpoint
from src.training.methods import adapter_settings, has_adapters, merged_model
from src.training.state import Progress
from src.training.updates import Updater
from src.utils.config import Config
from src.utils.errors import CheckpointError, first_line
from src.utils.files import LOCK, atomic_folder, recover_folder
from src.utils.mirror import DriveMirror, copy_verified
from src.utils.runtime import broadcast_object, from_main, is_main_process, sum_over_processes, wait_for_all
from src.utils.tracking import ExperimentLogger
from src.utils.versioning import get_git_revision

logger = logging.getLogger(__name__)

BEST_MODEL_NAME = "best_model_hf"
FLUSH_TIMEOUT_SEC = 600.0  # the longest wait for the mirror at the end of training


class RunSaver:
    """Saves and restores one run; in all processes, of which the main one, with an experiment, writes.

    `whole_model` returns the plain model: the model itself, or a copy if it is sharded. `verify_clips` returns speech
    that the best model's folder keeps, to verify exports with.
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
        verify_clips: Callable[[], Sequence[SpokenClip]],
        experiment: ExperimentLogger | None,
        whole_model: Callable[[], DynamicWhisper],
    ) -> None:
        self._config, self._processor, self._loader, self._experiment = config, processor, loader, experiment
        self._model, self._whole_model, self._verify_clips = model, whole_model, verify_clips
        self._optimizer, self._updater, self._accelerator = optimizer, updater, accelerator
        self._frozen = run_state.frozen_digest(model)
        self._saved_at_sec = time.monotonic()
        self._holds_best = False  # instead of the last epoch's weights
        self._resumed: Path | None = None  # may exist only in the mirror
        self.best_model_dir: Path = config.paths.checkpoints_dir / BEST_MODEL_NAME
        self.before_save: Callable[[], object] = lambda: None  # brings the progress up to date
        self._unlock: Callable[[], object] | None = None
        self._mirror: DriveMirror | None = None
        self._store: CheckpointStore | None = None
        if experiment is not None:
            settings, folder = config.checkpoints, config.paths.checkpoints_dir / experiment.run_id
            if settings.mirror_dir is not None:
                self._mirror = DriveMirror(settings.mirror_dir, max_mb_per_sec=settings.mirror_mb_per_sec)
            checkpoints.clean_up(folder)
            recover_folder(self.best_model_dir)
            older = [] if settings.mirror_dir is None else [settings.mirror_dir]
            self._store = CheckpointStore(
                folder, save_total_limit=settings.save_total_limit, mirror=self._mirror, older=older
            )

    def start_clock(self) -> None:
        """Start the interval to the next checkpoint."""
        self._saved_at_sec = time.monotonic()

    def lock(self) -> None:
        """Keep other processes out of `paths.checkpoints_dir` until `locked` ends, or raise `CheckpointError`."""

        def take() -> None:
            if self._store is not None and self._unlock is None:
                folder = self._config.paths.checkpoints_dir
                self._unlock = checkpoints.claim_folder(folder, self, folder / LOCK)

        from_main(take)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the lock for a block, then let other processes train there."""
        self.lock()
        try:
            yield
        finally:
            if self._store is not None and self._unlock is not None:
                self._store.unlock()
                self._unlock()
                self._unlock = None

    def save_if_due(self, progress: Progress) -> None:
        """Save if `save_minutes` have passed; the main process's clock decides for all."""
        minutes = self._config.checkpoints.save_minutes
        if minutes is None:
            return
        due = is_main_process() and time.monotonic() - self._saved_at_sec >= 60 * minutes
        if sum_over_processes([due], self._accelerator.device)[0]:
            self.before_save()
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Save the whole state. If that fails, training continues: older checkpoints are whole, and it tries again."""
        self.start_clock()
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self._model.parameters())
        if self._store is not None or is_sharded:  # the main process needs the shards of all
            state = self._collect(progress)
        if self._store is not None:
            try:
                self._store.save(state, progress.step)
            except CheckpointError as err:
                logger.warning("no checkpoint was saved, training goes on: %s", err)
        wait_for_all()

    def export_best(self, progress: Progress) -> None:
        """Replace the best model on disk by the current model."""
        whole = self._whole_model()
        if self._experiment is not None:
            self._export(whole, progress, self._experiment.run_id)
        wait_for_all()

    def finish_export(self, progress: Progress) -> None:
        """Export the best model if an interrupt came between the end of its epoch and its export."""
        if progress.best_is_last and not broadcast_object(_is_best(self.best_model_dir, progress)):
            self.export_best(progress)

    def restore_best(self, progress: Progress) -> None:
        """Put the best epoch's weights into the model if the last epoch is not the best."""
        if progress.best_epoch is None or progress.best_is_last:
            return
        if not _is_best(self.best_model_dir, progress):
            raise CheckpointError(
                f"{self.best_model_dir}: the model of epoch {progress.best_epoch}, the best of this training, is not "
                "there any more; give each training a paths.checkpoints_dir of its own, and resume from a checkpoint"
            )
        name = ADAPTERS_FILE if has_adapters(self._model) else "model.safetensors"
        run_state.load_weights(self._model, load_file(self.best_model_dir / name))
        self._holds_best = True
        logger.info("the model now holds the weights of epoch %d, the best by error rate", progress.best_epoch)

    def restore_last(self, progress: Progress) -> None:
        """Put the last epoch's weights back if training continues after `restore_best`."""
        if not self._holds_best:
            return
        self._holds_best = False
        store = self._store
        last = broadcast_object(None if store is None else checkpoints.checkpoint_path(store.folder, progress.step))
        assert last is not None
        if not last.exists() and self._resumed is not None and self._resumed.name == last.name:
            last = self._resumed
        run_state.load_model_tensors(self._model, verify_checkpoint(last).load().tensors["model"])

    def resume(self, checkpoint: str | Path | WholeCheckpoint) -> tuple[ResumeReport, Progress | None]:
        """Find, verify and take up a checkpoint: "auto", a folder, or one that is verified already."""

        def find() -> ResumeReport:
            if isinstance(checkpoint, WholeCheckpoint):
                return ResumeReport(checkpoint)
            if checkpoint != "auto":
                return ResumeReport(verify_checkpoint(Path(checkpoint)))
            folders = (self._config.paths.checkpoints_dir, self._config.checkpoints.mirror_dir)
            made_from = {"frozen_parameters": self._frozen, "data_version": self._loader.data_version}
            return checkpoints.find_checkpoint([f for f in folders if f], self._config, made_from=made_from)

        self.lock()
        report = from_main(find)
        logger.info("%s", report)
        if report.whole is None:
            return report, None
        progress = self._restore(report.whole)
        self._resumed = report.whole.path
        # the newest one continues in its folder; a named one branches off
        if self._store is not None and (checkpoint == "auto" or isinstance(checkpoint, WholeCheckpoint)):
            self._store.folder = self._config.paths.checkpoints_dir / report.whole.path.parent.name
        logger.info("resumed at update %d, epoch %d", progress.step, progress.epochs_done + 1)
        return report, progress

    def flush(self) -> None:
        """Wait until the mirror has what is on the disk, and log what it could not copy."""
        if self._mirror is None:
            return
        self._mirror.flush(FLUSH_TIMEOUT_SEC)
        for name, reason in self._mirror.failures.items():
            logger.warning("not in the mirror %s: %s (%s)", self._mirror.target, name, reason)

    def _export(self, whole: DynamicWhisper, progress: Progress, run: str) -> None:
        made = {
            "training": progress.training_id, "run": run, "epoch": progress.best_epoch, "step": progress.step,
            "validation_rate": progress.best_rate, "validation_metric": progress.metric,
            "git_revision": get_git_revision(), "data_version": self._loader.data_version,
        }  # fmt: skip
        adapters, settings = None, None
        if has_adapters(whole):
            adapters, settings = run_state.model_tensors(whole), adapter_settings(whole, self._config.model.variant)
        try:
            plain = merged_model(whole)
            export_huggingface(
                plain, self._processor, self.best_model_dir, provenance=made, adapters=adapters,
                adapter_settings=settings, verify_clips=self._verify_clips(),
            )  # fmt: skip
        except (OSError, SafetensorError) as err:
            raise CheckpointError(
                f"{self.best_model_dir}: cannot be written: {err}. The last checkpoint is whole: free space and resume"
            ) from err
        if self._mirror is not None:
            self._mirror.submit(self.best_model_dir)

    def _collect(self, progress: Progress) -> TrainingState:
        optimizer, optimizer_values = run_state.optimizer_tensors(self._optimizer.optimizer, self._model)
        rng, rng_values = run_state.random_state()
        scaler, experiment = self._accelerator.scaler, self._experiment
        values = {
            "run": "" if experiment is None else experiment.run_id,
            "saved_at": time.time(),
            "progress": progress.state_dict(),
            "loader": self._loader.state_dict(),
            "updater": self._updater.state_dict(),
            "optimizer": optimizer_values,
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_values,
            "frozen_parameters": self._frozen,
            "config": self._config.model_dump(mode="json"),
            "data_version": self._loader.data_version,
            "git_revision": get_git_revision(),
        }
        tensors = {"model": run_state.model_tensors(self._model), "optimizer": optimizer, "rng": rng}
        return TrainingState(tensors, values, "" if experiment is None else experiment.read_rows())

    def _restore(self, whole_checkpoint: WholeCheckpoint) -> Progress:
        checkpoint, values = whole_checkpoint.path, whole_checkpoint.values
        try:
            run_state.check_values(values)
        except checkpoints.UNREADABLE as err:
            problem = f"{first_line(err)} in its state; train with the version that wrote it"
            raise CheckpointError(f"{checkpoint}: {problem}") from err
        state = whole_checkpoint.load()
        for difference in checkpoints.config_differences(values["config"], self._config):
            logger.warning("resuming with another setting: %s", difference)
        if values["frozen_parameters"] != self._frozen:
            raise CheckpointError(
                f"{checkpoint}: the parameters that were not trained differ from this model's; load its stock model"
            )
        try:
            progress = Progress.from_state(values["progress"])
            self._loader.load_state_dict(values["loader"])
            run_state.load_model_tensors(self._model, state.tensors["model"])
            optimizer = self._optimizer.optimizer
            run_state.load_optimizer_tensors(optimizer, self._model, state.tensors["optimizer"], values["optimizer"])
            self._updater.load_state_dict(values["updater"])
            if self._accelerator.scaler is not None and values["scaler"] is not None:
                self._accelerator.scaler.load_state_dict(values["scaler"])
            run_state.restore_random_state(state.tensors["rng"], values["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as err:
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
        """Make `best_model_hf` the best epoch's model, from the mirror or from the checkpoint just loaded."""
        if progress.best_epoch is None or _is_best(self.best_model_dir, progress):
            return
        mirror = self._config.checkpoints.mirror_dir
        if mirror is not None and _is_best(mirror / BEST_MODEL_NAME, progress):
            with atomic_folder(self.best_model_dir, replace=True) as folder:
                copy_verified(mirror / BEST_MODEL_NAME, folder)
        elif progress.best_is_last:
            self._export(whole, progress, run)  # the run was killed between this checkpoint and the export
        else:
            logger.warning(
                "%s: the model of epoch %d, the best until now, is not there; the best of the coming epochs is kept",
                self.best_model_dir, progress.best_epoch,
            )  # fmt: skip
            progress.best_epoch, progress.best_rate = None, math.inf


def _is_best(folder: Path, progress: Progress) -> bool:
    made = read_provenance(folder)
    return made.get("training") == progress.training_id and made.get("epoch") == progress.best_epoch
