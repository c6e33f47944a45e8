"""Check every recording, measure it and split by speaker: the same utterances in the same split on every machine.

Splits that the source gives are honoured; what is missing is cut from the training speakers. The
choice goes by a hash of the seed and the id, never by position: corpora are ordered by speaker, and
the head of one is not a sample of it. Streamed sources are the exception: there, the first N that
pass are taken, since any other choice would cost a download of the whole.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import psutil
from tqdm.auto import tqdm

from src.data.audio import AudioCache, decode
from src.data.labels import LabelCase, apply_case, resolve_case
from src.data.preprocessing import ClipStats, measure_clip
from src.data.sources.catalog import open_source
from src.data.utterance import SPLIT_NAMES, SPLITS, SkippedUtterance, Utterance, stable_hash
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config, DataConfig, SourceName
from src.utils.errors import AudioError, DataError, SourceUnavailableError

logger = logging.getLogger(__name__)

MAX_MEMORY_SHARE = 0.5  # of what is free, for the encoded recordings of a stream
MAX_VAD_CLIPS = 1_000  # speech is looked for in at most so many recordings
_CHUNK, _STREAM_CHUNK = 256, 32  # recordings decoded before counting how many are still wanted; each costs a download
_ENOUGH_TO_JUDGE = 50  # rows of a stream before too many failures end it

Parts = dict[str, list[Utterance]]


@dataclass(frozen=True)
class DatasetSplits:
    """Checked utterances, disjoint by speaker where speakers are known.

    Attributes:
        train: to train on.
        validation: to choose the best epoch by.
        test: to measure the result on, once.
        label_case: how transcripts were recased; `with_label_case` changes it.
        skipped: what `on_error="skip"` left out.
        shared_speakers: speakers that occur in more than one split (the source's own splits may).
        shared_texts: number of test transcripts that also occur in training.
        source: the one that was taken.
        stats: what was measured on each recording while it was checked, by utterance id.
    """

    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]
    label_case: LabelCase
    skipped: list[SkippedUtterance] = field(default_factory=list)
    shared_speakers: tuple[str, ...] = ()
    shared_texts: int = 0
    source: str = "sample"
    stats: Mapping[str, ClipStats] = field(default_factory=dict, repr=False)

    def summary(self) -> list[dict[str, object]]:
        """Return one row per split: clips, minutes, speakers."""
        return [
            {
                "split": name,
                "clips": len(part),
                "minutes": round(sum(u.duration_sec or 0.0 for u in part) / 60, 1),
                "speakers": len({u.speaker for u in part if u.speaker}) or None,
            }
            for name, part in self.parts.items()
        ]

    @property
    def parts(self) -> Parts:
        """The splits by name."""
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def utterances(self) -> list[Utterance]:
        """Of all splits."""
        return [*self.train, *self.validation, *self.test]

    def with_label_case(self, label_case: LabelCase) -> DatasetSplits:
        """Return the same utterances with their source's transcripts in another case."""
        recased: dict[str, Any] = dict(_recased(self.parts, label_case))
        return replace(self, **recased, label_case=label_case)


def prepare_datasets(config: Config, *, vad: VoiceActivityDetector | None = None) -> DatasetSplits:
    """List, check, split and recase the configured source; every recording is decoded once.

    Of `data.sources`, one that is unavailable gives way to the next; any other fault is raised.

    Args:
        config: `data` and `seed`; `model.language` that the transcripts must have.
        vad: looks for speech in a sample of at most `MAX_VAD_CLIPS` recordings, for the data report.

    Returns:
        Splits capped at `max_*`, or at what exists.

    Raises:
        SourceUnavailableError: the source, or every one of `data.sources`, is unavailable.
        DataError: nothing usable, too few speakers to split, more than `max_skip_fraction` skipped, another language
            than `model.language`; with `on_error="raise"` the first unusable recording, with a count of the others.
    """
    *others, last = config.data.chosen_sources
    for source in others:
        try:
            return _prepare(source, config, vad)
        except SourceUnavailableError as err:
            logger.warning("source %r is unavailable, going on to the next of data.sources: %s", source, err)
    return _prepare(last, config, vad)


def _prepare(source: SourceName, config: Config, vad: VoiceActivityDetector | None) -> DatasetSplits:
    caps = {"train": config.data.max_train, "validation": config.data.max_validation, "test": config.data.max_test}
    opened = open_source(config.data, source)
    if isinstance(opened, dict):
        parts, checker = _take_from_streams(opened, caps, config, vad)
    else:
        if not opened:
            raise DataError(f"source {source!r} ({config.data.path or 'bundled'}) has no utterance")
        parts = cut_missing(assign_splits(opened), config.data, config.seed)
        expected = sum(min(len(part), caps[name] or len(part)) for name, part in parts.items())
        checker = RecordingChecker(config, vad=vad, expected=expected)
        parts = {name: checker.take(name, parts[name], caps[name]) for name in SPLITS}
    skipped = checker.skipped
    enforce_skip_policy(skipped, sum(map(len, parts.values())) + len(skipped), config.data.max_skip_fraction)
    for name, part in parts.items():
        if not part:
            raise DataError(f"the {name} split is empty after checking; {len(skipped)} recording(s) were skipped")
    _refuse_other_language(parts["train"], config)
    label_case = resolve_case([u.text for u in parts["train"]], config.data.label_case)
    recased = _recased(parts, label_case)
    train_texts = {u.text.lower() for u in recased["train"]}
    splits = DatasetSplits(
        **recased,
        label_case=label_case,
        skipped=skipped,
        shared_speakers=find_shared_speakers(recased.values()),
        shared_texts=sum(u.text.lower() in train_texts for u in recased["test"]),
        source=source,
        stats=checker.stats,
    )
    _log(splits)
    return splits


def _take_from_streams(
    streams: Mapping[str, Iterator[Utterance]],
    caps: Mapping[str, int | None],
    config: Config,
    vad: VoiceActivityDetector | None,
) -> tuple[Parts, RecordingChecker]:
    """Take the first N of each split that pass; what a missing split needs is taken from train as well."""
    fetched = dict(caps)
    fractions = {"validation": config.data.validation_fraction, "test": config.data.test_fraction}
    for_missing = sum(fraction for name, fraction in fractions.items() if name not in streams)
    if fetched["train"] is not None and for_missing:
        fetched["train"] = round(fetched["train"] / (1 - for_missing))
        logger.info("train: fetching %d clips, since validation or test is cut from them", fetched["train"])
    asked = [fetched[name] for name in streams]
    expected = None if None in asked else sum(cap for cap in asked if cap is not None)
    checker = RecordingChecker(config, vad=vad, expected=expected)
    parts: Parts = {name: [] for name in SPLITS}
    for name, stream in streams.items():
        parts[name] = checker.take_stream(name, stream, fetched[name])
    cut = cut_missing(parts, config.data, config.seed)
    return {name: part[: caps[name]] for name, part in cut.items()}, checker


# checking


def check_utterance(utterance: Utterance, config: DataConfig) -> Utterance:
    """Decode one recording and check it; as `inspect_utterance`, without the measurements."""
    return inspect_utterance(utterance, config)[0]


def inspect_utterance(
    utterance: Utterance,
    config: DataConfig,
    *,
    cache: AudioCache | None = None,
    vad: VoiceActivityDetector | None = None,
) -> tuple[Utterance, ClipStats]:
    """Decode one recording, check it and measure it.

    Args:
        utterance: its recording is decoded.
        config: bounds of the duration.
        cache: keeps what was decoded.
        vad: looks for speech.

    Returns:
        The utterance with its duration, and what was measured.

    Raises:
        DataError: an empty transcript, or a duration out of bounds.
        AudioError: not decodable, silent, NaN, ...
    """
    line = f" (line {utterance.meta['line']} of the manifest)" if "line" in utterance.meta else ""
    where = f"utterance {utterance.id}{line}"
    if not utterance.text.strip():
        raise DataError(f"{where}: the transcript is empty; fill it in or remove the row")
    try:
        decoded = (decode if cache is None else cache.decode)(
            utterance.audio, name=utterance.audio_name, max_sec=config.max_duration_sec
        )
    except AudioError as err:
        raise AudioError(f"{where}: {err}") from err
    stats = measure_clip(decoded, vad=vad)
    if not config.min_duration_sec <= stats.duration_sec <= config.max_duration_sec:
        raise DataError(
            f"{where}: {stats.duration_sec:.2f} s, allowed are {config.min_duration_sec} to "
            f"{config.max_duration_sec} s (data.min_duration_sec, data.max_duration_sec); cut it at a pause"
        )
    meta = {"snr_db": round(stats.snr_db, 1), **utterance.meta}  # what the source knows is better than an estimate
    return replace(utterance, duration_sec=stats.duration_sec, meta=meta), stats


class RecordingChecker:
    """Checks recordings until enough have passed, and keeps what was measured and what was left out.

    Args:
        config: `data` says what may pass, what happens to the rest, and whether decoded audio is cached.
        vad: looks for speech in a sample of the recordings.
        expected: how many recordings will be checked in all, for the size of the sample; None if unknown.

    Attributes:
        stats: of each recording that passed, by utterance id; speech is looked for in a sample of them, at most
            `MAX_VAD_CLIPS`, chosen by hash.
        skipped: what `on_error="skip"` left out.
    """

    def __init__(
        self, config: Config, *, vad: VoiceActivityDetector | None = None, expected: int | None = None
    ) -> None:
        self.stats: dict[str, ClipStats] = {}
        self.skipped: list[SkippedUtterance] = []
        self._config = config
        self._cache = audio_cache(config)
        self._vad = vad
        self._sampled_share = 1.0 if not expected else MAX_VAD_CLIPS / expected
        self._sampled = 0

    def take(self, name: str, part: Sequence[Utterance], cap: int | None) -> list[Utterance]:
        """Check recordings in hashed order until `cap` have passed; return them in the source's order."""
        position = {u.id: index for index, u in enumerate(part)}
        queue = sorted(part, key=lambda u: stable_hash(self._config.seed, u.id)) if cap is not None else part
        total = len(part) if cap is None else min(cap, len(part))
        passed = [u for chunk in self._check(name, iter(queue), total, _CHUNK) for u in chunk]
        _log_fewer(name, cap, len(passed))
        return sorted(passed, key=lambda u: position[u.id])

    def take_stream(self, name: str, stream: Iterator[Utterance], cap: int | None) -> list[Utterance]:
        """Take the first `cap` recordings of a stream that pass.

        Raises:
            DataError: more than `max_skip_fraction` fail, or the recordings do not fit into memory.
        """
        if cap is None:
            logger.warning("%s: data.max_%s is not set, so the whole stream is downloaded", name, name)
        free_bytes = MAX_MEMORY_SHARE * psutil.virtual_memory().available
        skipped_before = len(self.skipped)
        passed: list[Utterance] = []
        held_bytes = 0
        for chunk in self._check(name, stream, cap, _STREAM_CHUNK):
            passed += chunk
            held_bytes += sum(len(u.audio) for u in chunk if isinstance(u.audio, bytes))
            if held_bytes > free_bytes:
                raise DataError(
                    f"{name}: {len(passed)} clips hold {held_bytes / 1e9:.1f} GB, half of the free memory; set "
                    f"data.max_{name} to about {len(passed) // 2}, or download the files and use data.source: parquet"
                )
            skipped = self.skipped[skipped_before:]
            if len(passed) + len(skipped) >= _ENOUGH_TO_JUDGE:
                fraction = self._config.data.max_skip_fraction
                enforce_skip_policy(skipped, len(passed) + len(skipped), fraction, log=False)
        _log_fewer(name, cap, len(passed))
        return passed

    def _check(
        self, name: str, waiting: Iterator[Utterance], wanted: int | None, chunk_size: int
    ) -> Iterator[list[Utterance]]:
        """Yield what passed of each chunk until `wanted` have; the first failure raises where the policy is "raise"."""
        missing = wanted
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=wanted, desc=f"checking {name}", leave=False) as bar,
        ):
            while chunk := list(islice(waiting, chunk_size if missing is None else min(chunk_size, missing))):
                passed: list[Utterance] = []
                failures: list[SkippedUtterance] = []
                for outcome in pool.map(self._inspect_or_skip, chunk, [self._detector_for(u) for u in chunk]):
                    if isinstance(outcome, SkippedUtterance):
                        failures.append(outcome)
                    else:
                        utterance, self.stats[outcome[0].id] = outcome
                        passed.append(utterance)
                if failures and self._config.data.on_error == "raise":
                    more = f"\n({len(failures) - 1} more like it)" if len(failures) > 1 else ""
                    raise DataError(f'{failures[0].reason}; or set data.on_error to "skip"{more}')
                self.skipped += failures
                missing = None if missing is None else missing - len(passed)
                bar.update(len(passed))
                yield passed

    def _detector_for(self, utterance: Utterance) -> VoiceActivityDetector | None:
        """Return the detector for a sample of the recordings, by hash."""
        place = int(stable_hash(self._config.seed, utterance.id)[:8], 16) / 16**8
        if place >= self._sampled_share or self._sampled >= MAX_VAD_CLIPS:
            return None
        self._sampled += 1
        return self._vad

    def _inspect_or_skip(
        self, utterance: Utterance, vad: VoiceActivityDetector | None
    ) -> tuple[Utterance, ClipStats] | SkippedUtterance:
        try:
            return inspect_utterance(utterance, self._config.data, cache=self._cache, vad=vad)
        except DataError as err:
            return SkippedUtterance(utterance.id, str(err))


def _log_fewer(name: str, cap: int | None, passed: int) -> None:
    if cap is not None and passed < cap:
        logger.info("%s: %d asked for, %d exist; taking all of them", name, cap, passed)


def audio_cache(config: Config) -> AudioCache | None:
    """Return the cache of decoded recordings, None where `data.cache_decoded` is off."""
    return AudioCache(config.paths.cache_dir / "audio") if config.data.cache_decoded else None


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


# splitting


def assign_splits(utterances: Sequence[Utterance]) -> Parts:
    """Sort utterances by the split that their source gives; those without one are for training.

    Raises:
        DataError: an unknown split's name, or nothing to train on.
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

    Raises:
        DataError: fewer than two speakers are left to cut from.
    """
    whole = dict(parts)
    total = len(whole["train"])
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if not whole[name]:
            whole["train"], whole[name] = _cut_by_speaker(whole["train"], max(1, round(fraction * total)), seed, name)
    return whole


def _cut_by_speaker(pool: list[Utterance], size: int, seed: int, name: str) -> tuple[list[Utterance], list[Utterance]]:
    """Move whole speakers out of `pool`, in hashed order, until `size` utterances are reached."""
    if any(u.speaker is None for u in pool):
        logger.warning("%s: speakers are unknown, so the split is by clip; one speaker may be on both sides", name)
    keys = [u.speaker if u.speaker is not None else f"clip:{u.id}" for u in pool]
    counts = Counter(keys)
    if len(counts) < 2:
        raise DataError(
            f"cannot cut a {name} split: {len(counts)} speaker(s) among {len(pool)} training utterances, at least 2 "
            "are needed; add recordings, or a `split` column with train, validation and test"
        )
    moved: set[str] = set()
    for speaker in sorted(counts, key=lambda s: stable_hash(seed, name + s))[:-1]:
        if sum(counts[s] for s in moved) >= size:
            break
        moved.add(speaker)
    rest = [u for u, key in zip(pool, keys, strict=True) if key not in moved]
    return rest, [u for u, key in zip(pool, keys, strict=True) if key in moved]


def find_shared_speakers(parts: Iterable[Sequence[Utterance]]) -> tuple[str, ...]:
    """Return the speakers that occur in more than one part, sorted."""
    counts = Counter(speaker for part in parts for speaker in {u.speaker for u in part if u.speaker is not None})
    return tuple(sorted(speaker for speaker, count in counts.items() if count > 1))


def _refuse_other_language(train: Sequence[Utterance], config: Config) -> None:
    """Labels begin with `model.language`: training them on another language would teach it wrongly."""
    wanted = config.model.language
    if wanted is None or config.model.task == "translate":
        return
    for utterance in train:
        spoken = (utterance.language or wanted).replace("_", "-").split("-")[0].lower()
        if len(spoken) == 2 and spoken != wanted:
            raise DataError(
                f"utterance {utterance.id}: its language is {utterance.language!r}, model.language is {wanted!r}; set "
                f"model.language: {spoken} and a multilingual variant, or choose other data"
            )


def _recased(parts: Parts, label_case: LabelCase) -> Parts:
    def recase(utterance: Utterance) -> Utterance:
        source_text = str(utterance.meta.get("source_text", utterance.text))
        text = apply_case(source_text, label_case)
        if text == utterance.text:
            return utterance
        return replace(utterance, text=text, meta={**utterance.meta, "source_text": source_text})

    return {name: [recase(utterance) for utterance in part] for name, part in parts.items()}


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
