"""Batches of similar length in an order that a stopped run can continue, decoded ahead of time by worker processes.

The order of an epoch is a pure function of the seed and the epoch. So the state of a loader is two numbers, resuming
decodes nothing twice, and several processes take their shares of one plan without communicating.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.audio import load_audio
from src.data.dataset import DataCollator, Example, ExamplePlanner, WhisperDataset, make_no_speech
from src.data.labels import LabelEncoder
from src.data.preparation import DatasetSplits, audio_cache, enforce_skip_policy, source_weights
from src.data.training_batches import TrainingBatches
from src.data.utterance import Utterance
from src.utils.config import MAX_AUDIO_SEC, CompositionConfig, Config
from src.utils.errors import CheckpointError, DataError, WhisperASRError
from src.utils.runtime import usable_cores

logger = logging.getLogger(__name__)

BUCKET_BATCHES = 32  # batches sorted together: enough to cut padding, few enough to keep batches mixed
OWN_LENGTH_SEC = 900.0  # 5 min did not teach it, 15 did (tiny.en, 3 epochs in batches of 8, benchmarks/small_data.py)
MAX_AUTO_WORKERS = 8  # more decode faster than any one GPU trains

Batch = dict[str, Any]
Batches = list[list[int]]
Packed = list["array[int]"]  # the same in a fifth of the memory


class Loaders(NamedTuple):
    """One loader per split."""

    train: SpeechLoader
    validation: SpeechLoader
    test: SpeechLoader


def create_dataloaders(splits: DatasetSplits, processor: Any, config: Config) -> Loaders:
    """Build the loaders of all splits as `create_loader` does, with `train` shuffled."""
    parts = splits.parts.items()
    return Loaders(**{name: create_loader(part, processor, config, shuffle=name == "train") for name, part in parts})


def create_loader(
    utterances: Sequence[Utterance], processor: Any, config: Config, *, shuffle: bool = False
) -> SpeechLoader:
    """Build one loader over checked utterances of one split.

    With `shuffle`, for training: composed examples in a new order each epoch, shared out where several processes train,
    and clips of a mix as often as `source_weights` says.
    Otherwise, for evaluation: single clips from long to short, dealt out in whole batches to the processes.

    Raises:
        DataError: a transcript over 448 tokens with `on_error="raise"`, or too many skipped.
    """
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    composition = config.composition if shuffle else CompositionConfig()
    no_speech = make_no_speech(utterances, fraction=composition.no_speech_fraction, seed=config.seed)
    load = cache.load_audio if (cache := audio_cache(config)) else load_audio
    dataset = WhisperDataset([*utterances, *no_speech], encoder, on_error=config.data.on_error, load=load)
    enforce_skip_policy(dataset.skipped, len(utterances), config.data.max_skip_fraction)
    prefix_tokens = len(dataset.prefix_of(0)) if len(dataset) else 0  # as many in each language
    planner = ExamplePlanner(
        dataset.utterances, dataset.token_counts, prefix_tokens=prefix_tokens, config=composition, seed=config.seed,
        weights=source_weights(dataset.utterances, config.data) if shuffle else {},
    )  # fmt: skip
    size = config.training.batch_size if shuffle else config.inference.batch_size
    budget, seconds = config.training.batch_seconds if shuffle else None, None
    if settle_audio_context(config, dataset.utterances)[1] == "full":  # every clip is padded to 30 s
        size = max(1, int(budget // MAX_AUDIO_SEC)) if isinstance(budget, float) else size
    elif budget == "auto" and len(dataset):
        seconds = round(size * statistics.fmean(planner.durations_sec(0)), 1)
        logger.info("a batch has up to %s s: %d clips of mean length (training.batch_seconds: auto)", seconds, size)
    elif budget != "auto":
        seconds = budget
    batches = LengthBatchSampler(
        planner.durations_sec, None if seconds else size, batch_seconds=seconds, shuffle=shuffle, seed=config.seed
    )
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    workers, reason = choose_workers(config.data.num_workers, on_cuda=on_cuda)
    if shuffle:  # once is enough: the other loaders choose alike
        logger.info("%d process(es) decode audio (%s)", workers, reason)
    keep_workers = shuffle and workers > 0  # evaluation is rare: its workers would hold memory between passes
    return SpeechLoader(
        dataset, DataCollator(encoder.end_token), batches, planner,
        num_workers=workers, persistent_workers=keep_workers,
    )  # fmt: skip


def settle_audio_context(
    config: Config, clips: Sequence[Utterance], known: Literal["dynamic", "full"] = "full"
) -> tuple[Config, Literal["dynamic", "full"]]:
    """Resolve `model.audio_context: auto` by the amount of speech that is trained on; return the context, too.

    A model that works at the audio's own length already (`known`) goes on with that.
    """
    if config.model.audio_context != "auto":
        return config, config.model.audio_context
    context: Literal["dynamic", "full"] = "dynamic" if learns_own_length(clips, known) else "full"
    model = config.model.model_copy(update={"audio_context": context})
    return config.model_copy(update={"model": model}), context


def learns_own_length(clips: Sequence[Utterance], known: Literal["dynamic", "full"]) -> bool:
    """Whether a model of this context knows the audio's own length, or there is enough speech to teach it."""
    return known == "dynamic" or any(
        sec >= OWN_LENGTH_SEC for sec in accumulate(clip.duration_sec or 0.0 for clip in clips)
    )


def choose_workers(setting: int | Literal["auto"], *, on_cuda: bool) -> tuple[int, str]:
    """Resolve `data.num_workers` to the number of processes that decode audio; return the reason, too."""
    if setting != "auto":
        return setting, "asked for"
    if not on_cuda:
        return 0, "the model computes on the same cores, and decoding is a small share of that"
    cores = usable_cores()
    return min(cores, MAX_AUTO_WORKERS), f"{cores} usable core(s) decode while the GPU computes"


class SpeechLoader:
    """Batches of an epoch, from any batch on: from its start or, once after `load_state_dict`, from where it stopped.

    `planner` says which clips make an example, `batch_sampler` which examples make a batch. `workers` has options of
    torch's DataLoader: `num_workers` processes decode, or this one where there are none.
    """

    def __init__(
        self, dataset: WhisperDataset, collate_fn: DataCollator, batch_sampler: LengthBatchSampler,
        planner: ExamplePlanner, **workers: Any,
    ) -> None:  # fmt: skip
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batch_sampler = batch_sampler
        self._planner = planner
        self._workers = workers
        self._remaining = _Remaining()  # of the current epoch
        self.prepare_with(None)
        self._epoch = 0
        self._handed_over = 0  # batches, not those that wait in a worker
        self._start = 0  # first batch of the next iteration

    def prepare_with(self, prepare: TrainingBatches | None) -> None:
        """Let the processes that decode make training batches of what they decode, from the next epoch on."""
        self._decoded: DataLoader[Batch | WhisperASRError] = DataLoader(
            _Batches(self.dataset, self.collate_fn, prepare, self.batch_sampler.seed),
            batch_size=None,  # batches come ready
            sampler=self._remaining,
            collate_fn=_as_it_is,  # torch's own would make tensors of NumPy's numbers in `meta`
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # otherwise each epoch would take a number from the global one
            **self._workers,
        )

    def __len__(self) -> int:
        """Return the batches of the whole current epoch in this process."""
        return self.batches_in(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; raise the `AudioError` of a recording that cannot be decoded, also in a worker."""
        epoch, examples = self._epoch, self._planner.plan(self._epoch)
        self._handed_over, self._start = self._start, 0
        batches = islice(enumerate(self.batch_sampler.batches(epoch)), self._handed_over, None)
        self._remaining.planned = (
            _PlannedBatch([examples[index] for index in batch], epoch, self.batch_sampler.number(at))
            for at, batch in batches
        )
        for batch in self._decoded:
            if isinstance(batch, WhisperASRError):
                raise batch
            self._handed_over += 1
            yield batch

    def batches_in(self, epoch: int) -> int:
        """Return the batches of an epoch in this process; epochs differ where examples are composed."""
        return len(self.batch_sampler.batches(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; its start, unless a state of this epoch has just been loaded."""
        if epoch != self._epoch:
            self._handed_over = self._start = 0
        self._epoch = epoch
        self.batch_sampler.set_epoch(epoch)

    @property
    def longest_label(self) -> int:
        """Tokens of the longest label of the current epoch, special tokens and prompt included."""
        return self._planner.longest_label(self._epoch)

    def durations_sec(self, epoch: int) -> Sequence[float]:
        """Return the seconds of an epoch's examples in all processes, pauses included."""
        return self._planner.durations_sec(epoch)

    @property
    def data_version(self) -> str:
        """Number of utterances, and a hash of their ids, lengths, texts, and languages other than English."""
        rows = [f"{u.id}\t{u.duration_sec}\t{u.text}\n" for u in self.dataset.utterances]
        rows += [f"{u.id}\t{u.language}\n" for u in self.dataset.utterances if u.language not in (None, "en")]
        rows += [f"{u.id}\t{u.label_space}\n" for u in self.dataset.utterances if u.label_space is not None]
        return f"{len(self.dataset)} ({hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]})"

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches handed over, and what both depend on; it can be saved as JSON."""
        sampler = self.batch_sampler
        weights = {"weights": self._planner.weights} if self._planner.weights else {}
        made_from = {
            "utterances": self.data_version,
            **{name: getattr(sampler, name) for name in ("batch_size", "batch_seconds", "shuffle", "seed")},
            "world_size": sampler.world_size,
            "composition": self._planner.config.model_dump(mode="json") | weights,
        }
        return {"epoch": self._epoch, "batches": self._handed_over, "made_from": made_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch after the last one handed over; the number of workers may be another.

        Raises `CheckpointError` for a state of other utterances, settings or number of processes; all are named.
        """
        try:
            epoch, batches, theirs = int(state["epoch"]), int(state["batches"]), dict(state["made_from"])
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError("not the state of a loader: it needs epoch, batches and made_from") from err
        ours = self.state_dict()["made_from"]
        other = [f"{key}: {theirs.get(key)} then, {ours[key]} now" for key in ours if theirs.get(key) != ours[key]]
        if other:
            fix = "restore what it was made from, or begin a new run"
            raise CheckpointError(f"the loader's state belongs to other batches: {'; '.join(other)}; {fix}")
        self.set_epoch(epoch)
        self._handed_over = self._start = batches


class _PlannedBatch(NamedTuple):
    examples: list[Example]
    epoch: int
    number: int  # over all processes


class _Remaining:
    """The batches of an epoch that are not decoded yet, each planned in its turn."""

    planned: Iterator[_PlannedBatch] = iter(())

    def __iter__(self) -> Iterator[_PlannedBatch]:
        return self.planned


@dataclass
class _Batches(Dataset[Batch | WhisperASRError]):
    """Whole batches, or the error that stopped one: raised in a worker, it would arrive as the text of a traceback."""

    dataset: WhisperDataset
    collate_fn: DataCollator
    prepare: TrainingBatches | None
    seed: int

    def __getitem__(self, planned: _PlannedBatch) -> Batch | WhisperASRError:
        try:
            batch = self.collate_fn([self.dataset[example] for example in planned.examples])
            if self.prepare is None:
                return batch
            return self.prepare(batch, batch_generator(self.seed, planned.epoch, planned.number))
        except WhisperASRError as err:
            return err


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    # a notebook's interrupt reaches the whole process group: the parent stops its workers, they need not report it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(eq=False)
class LengthBatchSampler(Sampler[list[int]]):
    """Batches of clips of similar length; every index exactly once per epoch, over all processes.

    With `shuffle`, for training: clips and batches are mixed again each epoch. All processes get the same number of
    batches, and at each step batches of similar length, since they wait for the slowest; where the batches of an epoch
    do not divide by the processes, the largest are halved. Otherwise, for evaluation: whole batches are dealt out in
    turn, from long to short: too little memory shows at once. `durations_sec` may be a function of the epoch.

    A batch has at most `batch_size` clips or, instead, at most `batch_seconds`: clips x the longest of them, so padding
    included. A clip that is longer by itself stands alone. `rank` and `world_size` are found by `current_shard`.

    Raises:
        DataError: neither or both limits; when an epoch is planned, too few clips for all processes.
    """

    durations_sec: Sequence[float] | Callable[[int], Sequence[float]]
    batch_size: int | None = None
    _: KW_ONLY
    shuffle: bool
    seed: int = 0
    batch_seconds: float | None = None
    rank: int = 0
    world_size: int = 0

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.batch_seconds is None):
            raise DataError(f"batches need a size or a budget: {self.batch_size} clips, {self.batch_seconds} seconds")
        if not self.world_size:
            self.rank, self.world_size = current_shard()
        self._epoch = 0
        self._planned: tuple[int, Packed] | None = None  # the last epoch asked for

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.batches(self._epoch))

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches(self._epoch))

    def batches(self, epoch: int) -> Packed:
        """Return this process's batches of an epoch, in order."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, [array("i", batch) for batch in self._plan(epoch)]
        return self._planned[1]

    def number(self, at: int) -> int:
        """Return the number over all processes of a batch of this one."""
        return at * self.world_size + self.rank

    def _plan(self, epoch: int) -> Batches:
        durations = self.durations_sec(epoch) if callable(self.durations_sec) else self.durations_sec
        if not self.shuffle:  # no step waits for another: whole batches are dealt out in turn
            long_to_short = sorted(range(len(durations)), key=durations.__getitem__, reverse=True)
            return self._cut(long_to_short, durations)[self.rank :: self.world_size]
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        # cut a random order into buckets of about 32 batches, and each, sorted by length, into batches
        limit = BUCKET_BATCHES * (self.batch_size or self.batch_seconds or 0)
        buckets: Batches = [[]]
        filled = 0.0
        for index in torch.randperm(len(durations), generator=generator).tolist():
            if filled >= limit:
                buckets.append([])
                filled = 0.0
            buckets[-1].append(index)
            filled += 1 if self.batch_size else durations[index]
        batches = [b for bucket in buckets for b in self._cut(sorted(bucket, key=durations.__getitem__), durations)]
        # one batch of each step is this process's
        steps = self._steps(batches, durations)
        return [steps[index][self.rank] for index in torch.randperm(len(steps), generator=generator).tolist()]

    def _cut(self, order: list[int], durations: Sequence[float]) -> Batches:
        """Cut a sorted order into batches."""
        batches: Batches = []
        longest = 0.0
        for index in order:
            longest = max(longest, durations[index])
            rows = len(batches[-1]) + 1 if batches else math.inf
            if (rows if self.batch_size else rows * longest) <= (self.batch_size or self.batch_seconds or 0):
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = durations[index]
        return batches

    def _steps(self, batches: Batches, durations: Sequence[float]) -> list[Batches]:
        """Group batches into steps: one batch for each process, of similar length."""
        if self.world_size == 1:
            return [[batch] for batch in batches]
        clips = sum(map(len, batches))
        missing = -len(batches) % self.world_size if clips else self.world_size
        if clips < len(batches) + missing:
            what = f"{clips} clips in {len(batches)} batches cannot be shared out to {self.world_size} processes"
            raise DataError(
                f"{what}: use fewer processes, more clips, or a larger training.batch_size or batch_seconds"
            )
        for _ in range(missing):
            at = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[at]) // 2
            batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
        batches.sort(key=lambda batch: max(durations[i] for i in batch))
        return [batches[at : at + self.world_size] for at in range(0, len(batches), self.world_size)]


def current_shard() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together.

    From torch.distributed where it is initialised; otherwise from the variables RANK and WORLD_SIZE, which launchers
    such as torchrun and accelerate set before anything is initialised; otherwise there is one process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return 0, 1
    if not (rank and world_size and rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise DataError(f"RANK is {rank!r} and WORLD_SIZE {world_size!r}: set both as launchers do, or unset them")
    return int(rank), int(world_size)


def batch_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Make the CPU generator of everything that is drawn for one batch, by its index over all processes.

    It depends on no batch before, so a resumed run draws what an uninterrupted one would have drawn.
    """
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
