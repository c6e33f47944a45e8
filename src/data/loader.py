"""Loaders: batches in an order that a stopped run can take up again, decoded ahead of time by worker processes.

The order is planned in the main process for a whole epoch (`composition`, `batching`), so the state of a loader is two
numbers, and resuming skips no audio that it would have to decode first.
"""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.audio import AudioCache, load_audio
from src.data.batching import LengthBatchSampler
from src.data.checking import enforce_skip_policy
from src.data.composition import Example, ExamplePlanner
from src.data.dataset import AudioLoader, DataCollator, WhisperDataset
from src.data.labels import LabelEncoder
from src.data.no_speech import make_no_speech
from src.data.preparation import DatasetSplits
from src.data.utterance import Utterance
from src.utils.config import MAX_AUDIO_SEC, CompositionConfig, Config
from src.utils.errors import CheckpointError, WhisperASRError
from src.utils.runtime import usable_cores

logger = logging.getLogger(__name__)

PREFETCH_BATCHES = 2  # a worker; a batch of 16 clips of 10 s is 10 MB of shared memory
MAX_AUTO_WORKERS = 8  # more decode faster than any one GPU trains

Batch = dict[str, Any]


@dataclass(frozen=True)
class WorkerChoice:
    """How many processes decode audio, and why."""

    count: int
    reason: str


def choose_workers(setting: int | Literal["auto"], *, on_cuda: bool, cores: int | None = None) -> WorkerChoice:
    """Resolve `data.num_workers`.

    Args:
        setting: a number, or "auto".
        on_cuda: the model computes on a CUDA device, and the cores are free to decode.
        cores: usable ones; those that this process may run on by default.
    """
    if setting != "auto":
        return WorkerChoice(setting, "asked for")
    if not on_cuda:
        return WorkerChoice(0, "the model computes on the same cores, and decoding is a small share of that")
    usable = usable_cores() if cores is None else cores
    count = min(usable, MAX_AUTO_WORKERS)
    return WorkerChoice(count, f"{usable} usable core(s) decode while the GPU computes")


class SpeechLoader:
    """Batches of an epoch, from any batch on.

    Iterating gives the current epoch from its start; once after `load_state_dict`, from where the state was taken.

    Args:
        dataset: gives an example.
        collate_fn: makes a batch of examples.
        batch_sampler: which examples make a batch.
        planner: which clips make an example.
        num_workers: processes that decode; 0 decodes in this one.
        keep_workers: keep them between epochs.
        pin_memory: copy batches to where a CUDA device can fetch them without waiting.
    """

    def __init__(
        self,
        dataset: WhisperDataset,
        collate_fn: DataCollator,
        batch_sampler: LengthBatchSampler,
        planner: ExamplePlanner,
        *,
        num_workers: int = 0,
        keep_workers: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batch_sampler = batch_sampler
        self.num_workers = num_workers
        self._planner = planner
        self._queue = _Queue()
        self._decoded: DataLoader[Batch | WhisperASRError] = DataLoader(
            _Batches(dataset, collate_fn),
            batch_size=None,  # batches come ready
            sampler=self._queue,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            prefetch_factor=PREFETCH_BATCHES if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # its own: else each epoch would take a number from the global one
        )
        self._epoch = 0
        self._handed_over = 0  # batches, not those that wait in a worker
        self._start = 0  # first batch of the next iteration

    def __len__(self) -> int:
        """Return the batches of the whole current epoch in this process."""
        return self.batches_in(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches.

        Raises: AudioError: a recording that cannot be decoded, with its utterance, also from a worker.
        """
        examples = self._planner.plan(self._epoch)
        self._handed_over, self._start = self._start, 0
        batches = self.batch_sampler.batches(self._epoch)[self._handed_over :]
        self._queue.batches = [[examples[index] for index in batch] for batch in batches]
        for batch in self._decoded:
            if isinstance(batch, WhisperASRError):
                raise batch
            self._handed_over += 1
            yield batch

    def batches_in(self, epoch: int) -> int:
        """Return the batches of an epoch in this process; epochs differ where examples are composed."""
        return len(self.batch_sampler.batches(epoch))

    @property
    def start(self) -> int:
        """Index of the batch with which the next iteration begins: 0, unless a state has just been loaded."""
        return self._start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; its start, unless a state of this epoch has just been loaded."""
        if epoch != self._epoch:
            self._handed_over = self._start = 0
        self._epoch = epoch
        self.batch_sampler.set_epoch(epoch)

    @property
    def data_version(self) -> str:
        """Number of utterances, and a hash of their ids, lengths and texts."""
        digest = hashlib.sha256()
        for utterance in self.dataset.utterances:
            digest.update(f"{utterance.id}\t{utterance.duration_sec}\t{utterance.text}\n".encode())
        return f"{len(self.dataset)} ({digest.hexdigest()[:16]})"

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches handed over, and what both depend on; it can be saved as JSON."""
        return {"epoch": self._epoch, "batches": self._handed_over, "made_from": self._made_from()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch after the last one handed over. The number of workers may be another.

        Raises: CheckpointError: a state of other utterances, settings or number of processes; all are named.
        """
        try:
            epoch, batches, theirs = int(state["epoch"]), int(state["batches"]), dict(state["made_from"])
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError("not the state of a loader: it needs epoch, batches and made_from") from err
        ours = self._made_from()
        other = [f"{key}: {theirs.get(key)} then, {ours[key]} now" for key in ours if theirs.get(key) != ours[key]]
        if other:
            raise CheckpointError(
                "the loader's state belongs to other batches and cannot be taken up: "
                + "; ".join(other)
                + ". Restore what it was made from, or begin a new run"
            )
        self.set_epoch(epoch)
        self._handed_over = self._start = batches

    def _made_from(self) -> dict[str, Any]:
        sampler = self.batch_sampler
        return {
            "utterances": self.data_version,
            "batch_size": sampler.batch_size,
            "batch_seconds": sampler.batch_seconds,
            "shuffle": sampler.shuffle,
            "seed": sampler.seed,
            "world_size": sampler.shard.world_size,
            "composition": self._planner.settings,
        }


class Loaders(NamedTuple):
    """One loader a split."""

    train: SpeechLoader
    validation: SpeechLoader
    test: SpeechLoader


def create_dataloaders(splits: DatasetSplits, processor: Any, config: Config) -> Loaders:
    """Build the loaders of all splits for one model.

    Args:
        splits: from `prepare_datasets`.
        processor: of the model; its tokenizer encodes the labels.
        config: batch sizes, composition, workers, language.
    Raises: DataError: a transcript over 448 tokens with `on_error="raise"`, or too many skipped.
    """
    return Loaders(
        train=create_loader(splits.train, processor, config, shuffle=True),
        validation=create_loader(splits.validation, processor, config),
        test=create_loader(splits.test, processor, config),
    )


def create_loader(
    utterances: Sequence[Utterance], processor: Any, config: Config, *, shuffle: bool = False
) -> SpeechLoader:
    """Build one loader over checked utterances.

    Args:
        shuffle: for training: composed examples in a new order each epoch, shared out where several processes train.
            Else for evaluation: single clips from long to short, dealt out in whole batches to the processes.
    Raises: DataError: as `create_dataloaders`.
    """
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    composition = config.composition if shuffle else CompositionConfig()
    made = make_no_speech(utterances, fraction=composition.no_speech_fraction, seed=config.seed)
    dataset = WhisperDataset([*utterances, *made], encoder, on_error=config.data.on_error, load=_audio_loader(config))
    enforce_skip_policy(dataset.skipped, len(utterances), config.data.max_skip_fraction)
    planner = ExamplePlanner(
        dataset.utterances,
        [len(tokens) for tokens in dataset.tokens],
        prefix_tokens=len(encoder.prefix),
        config=composition,
        seed=config.seed,
    )
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    workers = choose_workers(config.data.num_workers, on_cuda=on_cuda)
    if shuffle:  # once is enough: the others choose alike
        logger.info("%d process(es) decode audio (%s)", workers.count, workers.reason)
    return SpeechLoader(
        dataset,
        DataCollator(encoder.end_token),
        _training_batches(planner, config) if shuffle else _evaluation_batches(planner, config),
        planner,
        num_workers=workers.count,
        keep_workers=shuffle,  # evaluation is rare: its workers would hold memory between passes
        pin_memory=on_cuda,
    )


def _training_batches(planner: ExamplePlanner, config: Config) -> LengthBatchSampler:
    size: int | None = config.training.batch_size
    seconds = config.training.batch_seconds
    if seconds is not None:
        size = None
        if config.model.audio_context == "full":  # every clip is padded to 30 s
            size, seconds = max(1, int(seconds // MAX_AUDIO_SEC)), None
    batches = LengthBatchSampler(planner.durations_sec, size, batch_seconds=seconds, shuffle=True, seed=config.seed)
    if seconds is not None and config.training.full_context_prob:
        padded_sec = MAX_AUDIO_SEC * max(map(len, batches), default=0)
        if padded_sec > seconds:
            logger.warning(
                "training.full_context_prob pads some batches to 30 s a clip: these hold up to %.0f s, more than "
                "training.batch_seconds (%.0f)", padded_sec, seconds,
            )  # fmt: skip
    return batches


def _evaluation_batches(planner: ExamplePlanner, config: Config) -> LengthBatchSampler:
    return LengthBatchSampler(planner.durations_sec, config.inference.batch_size, shuffle=False)


def _audio_loader(config: Config) -> AudioLoader:
    return AudioCache(config.paths.cache_dir / "audio").load_audio if config.data.cache_decoded else load_audio


class _Queue(Sampler[list[Example]]):
    """The batches that are left of an epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Example]] = []

    def __iter__(self) -> Iterator[list[Example]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Batches(Dataset[Batch | WhisperASRError]):
    """Whole batches, or the error that stopped one.

    DataLoader would raise a worker's error anew with the worker's whole traceback as its message; given back as a
    value, the error arrives as it was.
    """

    def __init__(self, dataset: WhisperDataset, collate_fn: DataCollator) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn

    def __getitem__(self, examples: list[Example]) -> Batch | WhisperASRError:
        try:
            return self._collate_fn([self._dataset[example] for example in examples])
        except WhisperASRError as err:
            return err


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # a notebook's interrupt reaches the whole process group: the parent stops its workers, they need not say so too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
