"""Splits by speaker, decided by a hash of the seed and the name: the same on every machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

from src.data.utterance import SPLIT_NAMES, Utterance
from src.utils.config import DataConfig
from src.utils.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
Parts = dict[str, list[Utterance]]


def assign_splits(utterances: Sequence[Utterance]) -> Parts:
    """Sort utterances by the split that their source gives; those without one are for training.

    Raises: DataError: an unknown split's name, or nothing to train on.
    """
    parts: Parts = {name: [] for name in SPLITS}
    for utterance in utterances:
        given = str(utterance.meta.get("split") or "train").lower()
        if given not in SPLIT_NAMES:
            raise DataError(f"utterance {utterance.id}: unknown split {given!r}; use {', '.join(SPLIT_NAMES)}")
        parts[SPLIT_NAMES[given]].append(utterance)
    if not parts["train"]:
        raise DataError("no utterance is in the train split")
    return parts


def cut_missing(parts: Parts, config: DataConfig, seed: int) -> Parts:
    """Cut validation and test, where they are missing, from the training speakers.

    Raises: DataError: fewer than two speakers are left to cut from.
    """
    whole = dict(parts)
    total = len(whole["train"])
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if not whole[name]:
            whole["train"], whole[name] = _cut_by_speaker(whole["train"], max(1, round(fraction * total)), seed, name)
    return whole


def find_shared_speakers(parts: Iterable[Sequence[Utterance]]) -> tuple[str, ...]:
    """Return the speakers that occur in more than one part, sorted."""
    seen: set[str] = set()
    shared: set[str] = set()
    for part in parts:
        speakers = {u.speaker for u in part if u.speaker is not None}
        shared |= speakers & seen
        seen |= speakers
    return tuple(sorted(shared))


def stable_hash(seed: int, text: str) -> str:
    """Return a hash that is the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _cut_by_speaker(pool: list[Utterance], size: int, seed: int, name: str) -> tuple[list[Utterance], list[Utterance]]:
    """Move whole speakers out of `pool`, in hashed order, until `size` utterances are reached."""
    if any(u.speaker is None for u in pool):
        logger.warning("%s: speakers are unknown, so the split is by clip; one speaker may be on both sides", name)

    def key(u: Utterance) -> str:
        return u.speaker if u.speaker is not None else f"clip:{u.id}"

    counts: dict[str, int] = {}
    for utterance in pool:
        counts[key(utterance)] = counts.get(key(utterance), 0) + 1
    if len(counts) < 2:
        raise DataError(
            f"cannot cut a {name} split: {len(counts)} speaker(s) among {len(pool)} training utterances, at least 2 "
            "are needed; add recordings, or a `split` column with train, validation and test"
        )
    moved: set[str] = set()
    taken = 0
    for speaker in sorted(counts, key=lambda s: stable_hash(seed, name + s)):
        if taken >= size or len(moved) == len(counts) - 1:
            break
        moved.add(speaker)
        taken += counts[speaker]
    return [u for u in pool if key(u) not in moved], [u for u in pool if key(u) in moved]
