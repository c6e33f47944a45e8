"""Every recording is decoded once before training; what cannot be used is refused, or counted and left out, by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from tqdm.auto import tqdm

from src.data.audio import decode
from src.data.preprocessing import ClipStats, measure_clip
from src.data.splitting import stable_hash
from src.data.utterance import EncodedAudio, Utterance
from src.utils.config import Config, DataConfig
from src.utils.errors import AudioError, DataError

logger = logging.getLogger(__name__)

_CHUNK = 256  # recordings decoded before counting again how many are still wanted
_STREAM_CHUNK = 32  # likewise, where each costs a download
_ENOUGH_TO_JUDGE = 50  # rows of a stream before too many failures end it
MAX_MEMORY_SHARE = 0.5  # of what is free, for the encoded recordings of a stream


@dataclass(frozen=True)
class SkippedUtterance:
    """A row that was left out, and why."""

    id: str
    reason: str


Checked = tuple[Utterance, ClipStats]


def check_utterance(utterance: Utterance, config: DataConfig) -> Utterance:
    """Decode one recording and check it.

    Returns: the utterance with its duration.
    Raises: DataError: empty transcript, or a duration out of bounds. AudioError: not decodable, silent, NaN, ...
    """
    return inspect_utterance(utterance, config)[0]


def inspect_utterance(utterance: Utterance, config: DataConfig) -> Checked:
    """Check one recording and measure it in the same pass.

    Returns: the utterance with its duration, and what was measured.
    Raises: DataError, AudioError: as `check_utterance`.
    """
    line = f" (line {utterance.meta['line']} of the manifest)" if "line" in utterance.meta else ""
    if not utterance.text.strip():
        raise DataError(f"utterance {utterance.id}{line}: the transcript is empty; fill it in or remove the row")
    try:
        decoded = decode(utterance.audio, name=audio_name(utterance), max_sec=config.max_duration_sec)
    except AudioError as err:
        raise AudioError(f"utterance {utterance.id}{line}: {err}") from err
    stats = measure_clip(decoded)
    if not config.min_duration_sec <= stats.duration_sec <= config.max_duration_sec:
        raise DataError(
            f"utterance {utterance.id}{line}: {stats.duration_sec:.2f} s, allowed are {config.min_duration_sec} to "
            f"{config.max_duration_sec} s (data.min_duration_sec, data.max_duration_sec); cut it at a pause"
        )
    meta = {"snr_db": round(stats.snr_db, 1), **utterance.meta}  # what the source knows is better than an estimate
    return replace(utterance, duration_sec=stats.duration_sec, meta=meta), stats


def audio_name(utterance: Utterance) -> str:
    """Return what to call a recording in an error."""
    return str(utterance.audio) if isinstance(utterance.audio, Path | EncodedAudio) else "embedded audio"


def check_listed(
    name: str,
    part: list[Utterance],
    cap: int | None,
    config: Config,
    stats: dict[str, ClipStats],
    skipped: list[SkippedUtterance],
) -> list[Utterance]:
    """Check recordings in hashed order until `cap` have passed; return them in the source's order.

    Fills `stats` and `skipped`.
    """
    position = {u.id: index for index, u in enumerate(part)}
    queue = sorted(part, key=lambda u: stable_hash(config.seed, u.id)) if cap is not None else part
    wanted = len(part) if cap is None else min(cap, len(part))
    if cap is not None and cap > len(part):
        logger.info("%s: %d asked for, %d exist; taking all of them", name, cap, len(part))
    passed: list[Utterance] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=wanted, desc=f"checking {name}", leave=False) as bar:
        at = 0
        while at < len(queue) and len(passed) < wanted:
            chunk = queue[at : at + max(_CHUNK, wanted - len(passed))]
            at += len(chunk)
            passed += _check_chunk(pool, chunk, wanted - len(passed), config.data, stats, skipped, bar)
    return sorted(passed, key=lambda u: position[u.id])


def check_stream(
    name: str,
    stream: Iterator[Utterance],
    cap: int | None,
    config: Config,
    stats: dict[str, ClipStats],
    skipped: list[SkippedUtterance],
) -> list[Utterance]:
    """Take the first `cap` recordings of a stream that pass.

    Raises: DataError: more than `max_skip_fraction` fail, or the recordings do not fit into memory.
    """
    if cap is None:
        logger.warning("%s: data.max_%s is not set, so the whole stream is downloaded", name, name)
    free_bytes = MAX_MEMORY_SHARE * psutil.virtual_memory().available
    passed: list[Utterance] = []
    seen = held_bytes = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=cap, desc=f"fetching {name}", leave=False) as bar:
        while cap is None or len(passed) < cap:
            wanted = _STREAM_CHUNK if cap is None else min(_STREAM_CHUNK, cap - len(passed))
            chunk = list(islice(stream, wanted))
            if not chunk:
                break
            seen += len(chunk)
            passed += _check_chunk(pool, chunk, wanted, config.data, stats, skipped, bar)
            held_bytes += sum(len(u.audio) for u in chunk if isinstance(u.audio, bytes))
            if held_bytes > free_bytes:
                raise DataError(
                    f"{name}: {len(passed)} clips hold {held_bytes / 1e9:.1f} GB, half of the free memory; set "
                    f"data.max_{name} to about {len(passed) // 2}, or download the files and use data.source: parquet"
                )
            if seen >= _ENOUGH_TO_JUDGE:
                enforce_skip_policy(skipped, seen, config.data.max_skip_fraction, log=False)
    if cap is not None and len(passed) < cap:
        logger.info("%s: %d asked for, %d exist; taking all of them", name, cap, len(passed))
    return passed


def enforce_skip_policy(
    skipped: Sequence[SkippedUtterance], total: int, max_skip_fraction: float, *, log: bool = True
) -> None:
    """Raise `DataError` when more than the allowed share of utterances was skipped; log the rest."""
    if not skipped:
        return
    listed = "".join(f"\n  - {row.id}: {row.reason}" for row in skipped[:20])
    if len(skipped) > max_skip_fraction * total:
        raise DataError(
            f"{len(skipped)} of {total} utterances cannot be used, more than data.max_skip_fraction "
            f"({max_skip_fraction:.0%}) allows:{listed}"
        )
    if log:
        logger.warning("skipped %d of %d utterances:%s", len(skipped), total, listed)


def _check_chunk(
    pool: ThreadPoolExecutor,
    chunk: Sequence[Utterance],
    wanted: int,
    config: DataConfig,
    stats: dict[str, ClipStats],
    skipped: list[SkippedUtterance],
    bar: tqdm[Any],
) -> list[Utterance]:
    """Check a chunk and return at most `wanted` that passed; the first failure raises where the policy is "raise"."""
    passed: list[Utterance] = []
    failures: list[SkippedUtterance] = []
    for outcome in pool.map(lambda u: _try_check(u, config), chunk):
        if isinstance(outcome, SkippedUtterance):
            failures.append(outcome)
        elif len(passed) < wanted:
            utterance, measured = outcome
            passed.append(utterance)
            stats[utterance.id] = measured
            bar.update()
    if failures and config.on_error == "raise":
        more = f"\n({len(failures) - 1} more like it)" if len(failures) > 1 else ""
        raise DataError(f'{failures[0].reason}; or set data.on_error to "skip"{more}')
    skipped.extend(failures)
    return passed


def _try_check(utterance: Utterance, config: DataConfig) -> Checked | SkippedUtterance:
    try:
        return inspect_utterance(utterance, config)
    except DataError as err:
        return SkippedUtterance(utterance.id, str(err))
