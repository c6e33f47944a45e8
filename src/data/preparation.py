"""Check every recording, then split by speaker: the same utterances in the same split on every machine.

Splits that the source gives are honoured; what is missing is cut from the training speakers. Choice goes by a hash of
the seed and the id, never by position: corpora are ordered by speaker, and the head of one is not a sample of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.labels import LabelCase, apply_case, resolve_case
from src.data.sources import SPLIT_NAMES, load_utterances
from src.data.utterance import Utterance
from src.utils.config_schema import Config, DataConfig
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

_CHUNK = 256  # recordings decoded before counting again how many are still wanted


@dataclass(frozen=True)
class SkippedUtterance:
    """A row that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class DatasetSplits:
    """Checked utterances, disjoint by speaker where speakers are known.

    Attributes:
        skipped: what `on_error="skip"` left out.
        label_case: how transcripts were recased.
        shared_speakers: speakers that occur in more than one split (the source's own splits may).
        shared_texts: number of test transcripts that also occur in training.
    """

    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]
    label_case: LabelCase
    skipped: list[SkippedUtterance] = field(default_factory=list)
    shared_speakers: tuple[str, ...] = ()
    shared_texts: int = 0

    def summary(self) -> list[dict[str, object]]:
        """Return one row a split: clips, minutes, speakers."""
        return [
            {
                "split": name,
                "clips": len(part),
                "minutes": round(sum(u.duration_sec or 0.0 for u in part) / 60, 1),
                "speakers": len({u.speaker for u in part if u.speaker}) or None,
            }
            for name, part in (("train", self.train), ("validation", self.validation), ("test", self.test))
        ]


def prepare_datasets(config: Config) -> DatasetSplits:
    """List, split, check and recase the configured source.

    Returns: splits capped at `max_*`, or at what exists.
    Raises:
        DataError: nothing usable, too few speakers to split, more than `max_skip_fraction` skipped; with
            `on_error="raise"` the first unusable recording, with a count of the others.
    """
    parts = _assign_splits(load_utterances(config.data), config.data, config.seed)
    caps = {"train": config.data.max_train, "validation": config.data.max_validation, "test": config.data.max_test}
    skipped: list[SkippedUtterance] = []
    checked = {name: _check_part(name, part, caps[name], config, skipped) for name, part in parts.items()}
    enforce_skip_policy(skipped, sum(map(len, checked.values())) + len(skipped), config.data.max_skip_fraction)
    for name, part in checked.items():
        if not part:
            raise DataError(f"the {name} split is empty after checking; {len(skipped)} recording(s) were skipped")
    label_case = resolve_case([u.text for u in checked["train"]], config.data.label_case)
    recased = {k: [replace(u, text=apply_case(u.text, label_case)) for u in part] for k, part in checked.items()}
    train_texts = {u.text.lower() for u in recased["train"]}
    splits = DatasetSplits(
        **recased,
        label_case=label_case,
        skipped=skipped,
        shared_speakers=_shared_speakers(recased.values()),
        shared_texts=sum(u.text.lower() in train_texts for u in recased["test"]),
    )
    _log(splits)
    return splits


def enforce_skip_policy(skipped: Sequence[SkippedUtterance], total: int, max_skip_fraction: float) -> None:
    """Raise `DataError` when more than the allowed share of utterances was skipped; log the rest."""
    if not skipped:
        return
    listed = "".join(f"\n  - {row.id}: {row.reason}" for row in skipped[:20])
    if len(skipped) > max_skip_fraction * total:
        raise DataError(
            f"{len(skipped)} of {total} utterances cannot be used, more than data.max_skip_fraction "
            f"({max_skip_fraction:.0%}) allows:{listed}"
        )
    logger.warning("skipped %d of %d utterances:%s", len(skipped), total, listed)


def check_utterance(utterance: Utterance, config: DataConfig) -> Utterance:
    """Decode one recording and check it.

    Returns: the utterance with its duration.
    Raises: DataError: empty transcript, or a duration out of bounds. AudioError: not decodable, silent, NaN, ...
    """
    line = f" (line {utterance.meta['line']} of the manifest)" if "line" in utterance.meta else ""
    if not utterance.text.strip():
        raise DataError(f"utterance {utterance.id}{line}: the transcript is empty; fill it in or remove the row")
    name = str(utterance.audio) if isinstance(utterance.audio, Path) else "embedded audio"
    try:
        duration_sec = len(load_audio(utterance.audio, name=name)) / SAMPLE_RATE
    except AudioError as err:
        raise AudioError(f"utterance {utterance.id}{line}: {err}") from err
    if not config.min_duration_sec <= duration_sec <= config.max_duration_sec:
        raise DataError(
            f"utterance {utterance.id}{line}: {duration_sec:.2f} s, allowed are {config.min_duration_sec} to "
            f"{config.max_duration_sec} s (data.min_duration_sec, data.max_duration_sec); cut it at a pause"
        )
    return replace(utterance, duration_sec=duration_sec)


def _check_part(
    name: str, part: list[Utterance], cap: int | None, config: Config, skipped: list[SkippedUtterance]
) -> list[Utterance]:
    """Check recordings in hashed order until `cap` have passed; return them in the source's order."""
    position = {u.id: index for index, u in enumerate(part)}
    queue = sorted(part, key=lambda u: _hash(config.seed, u.id)) if cap is not None else part
    wanted = len(part) if cap is None else min(cap, len(part))
    if cap is not None and cap > len(part):
        logger.info("%s: %d asked for, %d exist; taking all of them", name, cap, len(part))
    passed: list[Utterance] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=wanted, desc=f"checking {name}", leave=False) as bar:
        for at in range(0, len(queue), _CHUNK):
            chunk = queue[at : at + max(_CHUNK, wanted - len(passed))]
            failures: list[SkippedUtterance] = []
            for outcome in pool.map(lambda u: _try_check(u, config.data), chunk):
                if isinstance(outcome, SkippedUtterance):
                    failures.append(outcome)
                elif len(passed) < wanted:
                    passed.append(outcome)
                    bar.update()
            if failures and config.data.on_error == "raise":
                more = f"\n({len(failures) - 1} more like it)" if len(failures) > 1 else ""
                raise DataError(f'{failures[0].reason}; or set data.on_error to "skip"{more}')
            skipped.extend(failures)
            if len(passed) >= wanted:
                break
    return sorted(passed, key=lambda u: position[u.id])


def _try_check(utterance: Utterance, config: DataConfig) -> Utterance | SkippedUtterance:
    try:
        return check_utterance(utterance, config)
    except DataError as err:
        return SkippedUtterance(utterance.id, str(err))


def _assign_splits(utterances: list[Utterance], config: DataConfig, seed: int) -> dict[str, list[Utterance]]:
    parts: dict[str, list[Utterance]] = {"train": [], "validation": [], "test": []}
    for utterance in utterances:
        given = str(utterance.meta.get("split") or "train").lower()
        if given not in SPLIT_NAMES:
            raise DataError(f"utterance {utterance.id}: unknown split {given!r}; use {', '.join(SPLIT_NAMES)}")
        parts[SPLIT_NAMES[given]].append(utterance)
    if not parts["train"]:
        raise DataError("no utterance is in the train split")
    total = len(parts["train"])
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if not parts[name]:
            parts["train"], parts[name] = _cut_by_speaker(parts["train"], max(1, round(fraction * total)), seed, name)
    return parts


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
    for speaker in sorted(counts, key=lambda s: _hash(seed, name + s)):
        if taken >= size or len(moved) == len(counts) - 1:
            break
        moved.add(speaker)
        taken += counts[speaker]
    return [u for u in pool if key(u) not in moved], [u for u in pool if key(u) in moved]


def _shared_speakers(parts: Iterable[list[Utterance]]) -> tuple[str, ...]:
    seen: set[str] = set()
    shared: set[str] = set()
    for part in parts:
        speakers = {u.speaker for u in part if u.speaker is not None}
        shared |= speakers & seen
        seen |= speakers
    return tuple(sorted(shared))


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _log(splits: DatasetSplits) -> None:
    for row in splits.summary():
        logger.info("%(split)s: %(clips)d clips, %(minutes).1f min, %(speakers)s speakers", row)
    if splits.shared_speakers:
        logger.warning(
            "%d speaker(s) are in more than one split: results flatter the model", len(splits.shared_speakers)
        )
    if splits.shared_texts:
        logger.info("%d of %d test transcripts also occur in training", splits.shared_texts, len(splits.test))
    if splits.label_case != "keep":
        logger.info("transcripts recased to %r", splits.label_case)
