"""What an epoch's training examples are made of: single clips or joined neighbours, with times, with the text before.

Whisper was trained on 30 s of running speech with timestamps and the text before. A data set of single sentences takes
that away from it; joining sentences of one speaker gives some of it back at no cost in recordings. What is made of
which clip is a pure function of the seed and the epoch, so that workers, processes and resumed runs agree unasked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from src.data.audio import SAMPLE_RATE
from src.data.labels import MAX_LABEL_TOKENS
from src.data.utterance import Utterance
from src.utils.config import MAX_AUDIO_SEC, CompositionConfig

MIN_GAP_SEC = 0.2  # pauses between sentences that are read aloud
MAX_GAP_SEC = 0.8
TIMESTAMPS_PER_CLIP = 2
MIN_PROMPT_TOKENS = 2  # the token that starts the previous text, and one of its own


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        indices: of its clips in the data set, in the order in which they are heard.
        gaps_sec: pauses between them, one fewer than clips; whole samples at 16 kHz.
        timestamps: its label carries times.
        previous: index of the clip whose text is its prompt, or None.
        duration_sec: of the clips and the pauses.
    """

    indices: tuple[int, ...]
    gaps_sec: tuple[float, ...] = ()
    timestamps: bool = False
    previous: int | None = None
    duration_sec: float = 0.0


class _Draws(NamedTuple):
    """Uniform numbers in [0, 1), one of each kind a clip, whatever the others lead to."""

    join: list[float]
    target: list[float]
    gap: list[float]
    timestamps: list[float]
    previous: list[float]


class ExamplePlanner:
    """Decides for each epoch which clips are joined, timed and prompted; every clip is in exactly one example.

    Clips of one speaker are neighbours in the order of the data set; clips without a speaker count as one group. A clip
    without text stands alone, without times or prompt. The shares are of clips (`concatenate_prob`) or of examples,
    where it is possible: a clip that leaves no room for a neighbour stays single, and before the first of a speaker
    there is no text.

    Args:
        utterances: checked, with durations.
        token_counts: text tokens of each, without special ones.
        prefix_tokens: special tokens before a text without timestamps.
        config: the shares; all 0 gives every clip by itself, in order.
        seed: with the epoch, decides everything.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        token_counts: Sequence[int],
        *,
        prefix_tokens: int,
        config: CompositionConfig,
        seed: int,
    ) -> None:
        self._durations = [utterance.duration_sec or 0.0 for utterance in utterances]
        self._counts = list(token_counts)
        self._room = MAX_LABEL_TOKENS - prefix_tokens - 1  # 1: the end token
        self._config = config
        self._max_sec = min(config.max_concatenated_sec, MAX_AUDIO_SEC)
        self._seed = seed
        groups: dict[str | None, list[int]] = {}
        for index, utterance in enumerate(utterances):
            if self._counts[index]:
                groups.setdefault(utterance.speaker, []).append(index)
        self._groups = list(groups.values())
        self._textless = [index for index, count in enumerate(self._counts) if not count]
        self._before = {b: a for group in self._groups for a, b in itertools.pairwise(group)}
        self._planned: tuple[int, list[Example]] | None = None  # the last epoch asked for

    @property
    def settings(self) -> dict[str, Any]:
        """What the examples depend on, beside the clips and the seed."""
        return self._config.model_dump(mode="json")

    def durations_sec(self, epoch: int) -> list[float]:
        """Return the seconds of an epoch's examples, pauses included."""
        return [example.duration_sec for example in self.plan(epoch)]

    def plan(self, epoch: int) -> list[Example]:
        """Return an epoch's examples, in the order of their first clips."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._compose(epoch)
        return self._planned[1]

    def _compose(self, epoch: int) -> list[Example]:
        rng = np.random.default_rng((self._seed, epoch))
        draws = _Draws(*rng.random((len(_Draws._fields), len(self._durations))).tolist())
        runs = [run for group in self._groups for run in self._join(group, draws)]
        examples = [self._example(run, draws) for run in runs]
        examples += [Example((index,), duration_sec=self._durations[index]) for index in self._textless]
        return sorted(examples, key=lambda example: example.indices)

    def _join(self, group: list[int], draws: _Draws) -> list[list[int]]:
        """Cut a speaker's clips into runs that fit an example, and keep a share of the runs; the rest fall apart."""
        if not self._config.concatenate_prob:
            return [[index] for index in group]
        kept: list[list[int]] = []
        at = 0
        while at < len(group):
            run = self._run(group, at, draws)
            at += len(run)
            # each clip is in one run, so that keeping a run with this probability joins this share of the clips
            kept += [run] if draws.join[run[0]] < self._config.concatenate_prob else [[index] for index in run]
        return kept

    def _run(self, group: list[int], at: int, draws: _Draws) -> list[int]:
        """Return a clip and its following neighbours up to a drawn length, at least two where two fit."""
        run = [group[at]]
        seconds = self._durations[group[at]]
        tokens = self._counts[group[at]] + TIMESTAMPS_PER_CLIP
        target_sec = 0.0
        for index in group[at + 1 :]:
            seconds += _gap_sec(draws, index) + self._durations[index]
            tokens += self._counts[index] + TIMESTAMPS_PER_CLIP
            if len(run) == 1:  # between two clips and the longest allowed
                target_sec = seconds + draws.target[run[0]] * (self._max_sec - seconds)
            if seconds > min(target_sec, self._max_sec) or tokens > self._room:
                break
            run.append(index)
        return run

    def _example(self, run: list[int], draws: _Draws) -> Example:
        first = run[0]
        gaps = tuple(_gap_sec(draws, index) for index in run[1:])
        tokens = sum(self._counts[index] for index in run)
        timed = tokens + TIMESTAMPS_PER_CLIP * len(run)
        timestamps = draws.timestamps[first] < self._config.timestamp_prob and timed <= self._room
        previous = self._before.get(first) if draws.previous[first] < self._config.previous_text_prob else None
        if (timed if timestamps else tokens) + MIN_PROMPT_TOKENS > self._room:
            previous = None
        return Example(
            indices=tuple(run),
            gaps_sec=gaps,
            timestamps=timestamps,
            previous=previous,
            duration_sec=sum(self._durations[index] for index in run) + sum(gaps),
        )


def _gap_sec(draws: _Draws, index: int) -> float:
    """Return the pause before a clip, in whole samples, so that sums in seconds are exact in samples."""
    return round((MIN_GAP_SEC + draws.gap[index] * (MAX_GAP_SEC - MIN_GAP_SEC)) * SAMPLE_RATE) / SAMPLE_RATE
