"""Which clips make a batch, in which order, and in which process: a pure function of the seed and the epoch.

Clips of similar length go together, so that little of a batch is padding. Every process computes the whole plan and
takes its own share; nothing is sent between them, and nothing is dropped or repeated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from src.utils.errors import DataError

BUCKET_BATCHES = 32  # batches sorted together: enough to cut padding, few enough to keep batches mixed

Batches = list[list[int]]


@dataclass(frozen=True)
class Shard:
    """Which of the processes that train together this one is."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank {self.rank} of {self.world_size} process(es): ranks go from 0 to the number less 1")


def current_shard() -> Shard:
    """Find this process's place among those that train together.

    From torch.distributed where it is initialised; else from the variables RANK and WORLD_SIZE, which launchers such as
    torchrun and accelerate set before anything is initialised; else there is one process.

    Raises: DataError: one variable without the other, or not a number in range.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return Shard()
    try:
        return Shard(int(rank or ""), int(world_size or ""))
    except ValueError as err:
        raise DataError(
            f"RANK is {rank!r} and WORLD_SIZE {world_size!r}: a launcher sets both, as numbers; unset them to run alone"
        ) from err


def batch_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Make the generator of everything that is drawn for one batch.

    It depends on no batch before, so a resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed: of the run.
        epoch: from 0.
        index: of the batch within the epoch, over all processes.
    Returns: a CPU generator.
    """
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of clips of similar length; every index exactly once an epoch, over all processes.

    For training, all processes get the same number of batches, and at each step batches of similar length: they wait
    for the slowest. Where the batches of an epoch do not divide by the processes, the largest are halved. For
    evaluation, where nobody waits, whole batches are dealt out in turn.

    Args:
        durations_sec: one a clip, or a function that gives them for an epoch, where epochs differ.
        batch_size: clips a batch at most.
        batch_seconds: instead of `batch_size`: clips x the longest of them, so padding included, at most. A clip that
            is longer by itself stands alone.
        shuffle: for training: mix clips and batches anew each epoch. Else from long to short: too little memory shows
            at once.
        seed: with the epoch, decides the order.
        rank, world_size: of this process; from `current_shard` by default.
    Raises: DataError: neither or both of `batch_size` and `batch_seconds`; when an epoch is planned, a duration that is
        not above 0, or clips that cannot be shared out to all processes.
    """

    def __init__(
        self,
        durations_sec: Sequence[float] | Callable[[int], Sequence[float]],
        batch_size: int | None = None,
        *,
        shuffle: bool,
        seed: int = 0,
        batch_seconds: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if (batch_size is None) == (batch_seconds is None):
            raise DataError(f"batches need a size or a budget: batch_size {batch_size}, batch_seconds {batch_seconds}")
        if (rank is None) != (world_size is None):
            raise DataError(f"rank {rank} and world_size {world_size}: give both or neither")
        self._durations_of = durations_sec if callable(durations_sec) else lambda epoch: durations_sec
        self.batch_size = batch_size
        self.batch_seconds = batch_seconds
        self.shuffle = shuffle
        self.seed = seed
        self.shard = current_shard() if rank is None or world_size is None else Shard(rank, world_size)
        self._epoch = 0
        self._planned: tuple[int, Batches] | None = None  # the last epoch asked for

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.batches(self._epoch))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self._epoch))

    def batches(self, epoch: int) -> Batches:
        """Return this process's batches of an epoch, in order."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def _plan(self, epoch: int) -> Batches:
        durations = self._durations_of(epoch)
        unusable = [index for index, duration in enumerate(durations) if not 0 < duration < math.inf]
        if unusable:
            raise DataError(
                f"clip {unusable[0]} has a duration of {durations[unusable[0]]} s; check the data set first"
            )
        everything = list(range(len(durations)))
        if not self.shuffle:  # no step waits for another: whole batches are dealt out in turn
            long_to_short = sorted(everything, key=durations.__getitem__, reverse=True)
            return self._cut(long_to_short, durations)[self.shard.rank :: self.shard.world_size]
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order = torch.randperm(len(everything), generator=generator).tolist()
        batches = [
            batch
            for bucket in self._buckets(order, durations)
            for batch in self._cut(sorted(bucket, key=durations.__getitem__), durations)
        ]
        steps = self._steps(batches, durations)
        return [steps[index][self.shard.rank] for index in torch.randperm(len(steps), generator=generator).tolist()]

    def _buckets(self, order: list[int], durations: Sequence[float]) -> Batches:
        """Cut a random order into pieces of about 32 batches."""
        if self.batch_size is not None:
            size = self.batch_size * BUCKET_BATCHES
            return [order[at : at + size] for at in range(0, len(order), size)]
        assert self.batch_seconds is not None
        buckets: Batches = [[]]
        seconds = 0.0
        for index in order:
            if seconds >= BUCKET_BATCHES * self.batch_seconds:
                buckets.append([])
                seconds = 0.0
            buckets[-1].append(index)
            seconds += durations[index]
        return buckets

    def _cut(self, order: list[int], durations: Sequence[float]) -> Batches:
        """Cut a sorted order into batches."""
        if self.batch_size is not None:
            return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        assert self.batch_seconds is not None
        batches: Batches = []
        longest = 0.0
        for index in order:
            longest = max(longest, durations[index])
            if batches and (len(batches[-1]) + 1) * longest <= self.batch_seconds:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = durations[index]
        return batches

    def _steps(self, batches: Batches, durations: Sequence[float]) -> list[Batches]:
        """Group batches into steps: one batch for each process, of similar length."""
        world_size = self.shard.world_size
        if world_size == 1:
            return [[batch] for batch in batches]
        clips = sum(map(len, batches))
        missing = -len(batches) % world_size if clips else world_size
        if clips < len(batches) + missing:
            raise DataError(
                f"{clips} clips in {len(batches)} batches cannot be shared out to {world_size} processes without "
                "repeating or dropping one: use fewer processes, more clips, or raise training.batch_size or "
                "training.batch_seconds, so that batches have clips to give"
            )
        for _ in range(missing):
            at = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[at]) // 2
            batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
        batches.sort(key=lambda batch: max(durations[i] for i in batch))
        return [batches[at : at + world_size] for at in range(0, len(batches), world_size)]
