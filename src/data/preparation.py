"""Check every recording, measure it and split by speaker: the same utterances in the same split on every machine.

The choice goes by a hash of the seed and the id, not by position: corpora are ordered by speaker, and their head is
no sample of them. Of a stream the first N that pass are taken: any other choice would cost a download of the whole.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import psutil
from tqdm.auto import tqdm

from src.data.audio import SAMPLE_RATE, AudioCache, decode
from src.data.labels import (
    CAPITAL_NOUNS,
    LabelCase,
    LabelStyle,
    group_texts,
    resolve_case,
    restyle,
    source_text,
    special_token,
    timed_parts,
)
from src.data.preprocessing import ClipStats, measure_clip
from src.data.sources.catalog import open_source
from src.data.sources.parts import AudioPart
from src.data.utterance import SPLIT_NAMES, SPLITS, AudioTrack, SkippedUtterance, Utterance, stable_hash
from src.data.vad import VoiceActivityDetector
from src.utils.config import MAX_AUDIO_SEC, Config, DataConfig, ModelConfig, SourceName
from src.utils.errors import AudioError, DataError, SourceUnavailableError
from src.utils.languages import code_of_language, language_name, normalize_plain, text_language
from src.utils.runtime import thread_pool

logger = logging.getLogger(__name__)

MAX_MEMORY_SHARE = 0.5  # of what is free, for the encoded recordings of a stream
MAX_VAD_CLIPS = 1_000  # speech is looked for in at most so many recordings
_CHUNK, _STREAM_CHUNK = 256, 32  # recordings decoded before counting how many are still wanted; each costs a download
_ENOUGH_TO_JUDGE = 50  # rows of a stream before too many failures end it

PAD_SEC = 0.25  # of silence around the words of a cut recording
SURPLUS_SEC = 0.5  # over `data.max_duration_sec`: cutters end with a frame or at a picture

Parts = dict[str, list[Utterance]]


@dataclass(frozen=True)
class DatasetSplits:
    """Checked utterances, disjoint by speaker where speakers are known."""

    train: list[Utterance]
    validation: list[Utterance]  # to choose the best epoch by
    test: list[Utterance]  # to measure the result on, once
    label_case: LabelCase  # how transcripts were recased, "auto" if languages differ; `with_label_case` changes it
    task: str = "transcribe"  # "translate": transcripts are English, whatever is spoken
    skipped: list[SkippedUtterance] = field(default_factory=list)  # what `on_error="skip"` left out
    shared_speakers: tuple[str, ...] = ()  # in more than one split (the source's own splits may)
    shared_texts: int = 0  # test transcripts that also occur in training
    source: str = "sample"  # the one that was taken
    stats: Mapping[str, ClipStats] = field(default_factory=dict, repr=False)  # of each recording, by utterance id

    def summary(self) -> list[dict[str, object]]:
        """Return one row per split: clips, minutes, speakers."""
        rows: list[dict[str, object]] = []
        for name, part in self.parts.items():
            minutes = round(sum(u.duration_sec or 0.0 for u in part) / 60, 1)
            speakers = len({u.speaker for u in part if u.speaker}) or None
            rows.append({"split": name, "clips": len(part), "minutes": minutes, "speakers": speakers})
        return rows

    @property
    def parts(self) -> Parts:
        """The splits by name."""
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def utterances(self) -> list[Utterance]:
        """Of all splits."""
        return [*self.train, *self.validation, *self.test]

    def with_label_case(self, chosen: LabelCase | Mapping[str | None, LabelStyle]) -> DatasetSplits:
        """Return the same utterances with their source's transcripts in another case, or a style for each language."""
        resolved = resolve_styles(self.parts, "auto" if isinstance(chosen, Mapping) else chosen)
        styles = {**resolved, **(chosen if isinstance(chosen, Mapping) else {})}
        cases = {styles[u.language].case for u in self.train}
        styled: dict[str, Any] = {
            name: [restyle(u, styles[u.language], self.task) for u in part] for name, part in self.parts.items()
        }
        return replace(self, **styled, label_case=cases.pop() if len(cases) == 1 else "auto")


def resolve_styles(parts: Parts, label_case: LabelCase) -> dict[str | None, LabelStyle]:
    """Choose the case of each language as `resolve_case` does, by its training transcripts if there are any."""
    everything = group_texts(chain(*parts.values()))
    texts = {**everything, **group_texts(parts["train"])}
    return {language: LabelStyle(resolve_case(texts[language], label_case)) for language in everything}


def prepare_datasets(config: Config, *, vad: VoiceActivityDetector | None = None) -> DatasetSplits:
    """List, check, split and recase the configured source; every recording is decoded once.

    Of `data.sources`, one that is unavailable gives way to the next; any other fault is raised.

    `vad` looks for speech in a sample of at most `MAX_VAD_CLIPS` recordings, for the data report.

    Raises:
        SourceUnavailableError: the source, or every one of `data.sources`, is unavailable.
        DataError: nothing usable, too few speakers to split, more than `max_skip_fraction` skipped; with
            `on_error="raise"` the first unusable recording, with a count of the others.
    """
    *others, last = config.data.chosen_sources
    for source in others:
        try:
            return _prepare(source, config, vad)
        except SourceUnavailableError as err:
            logger.warning("source %r is unavailable, going on to the next of data.sources: %s", source, err)
    return _prepare(last, config, vad)


def _prepare(source: SourceName, config: Config, vad: VoiceActivityDetector | None) -> DatasetSplits:
    data = config.data
    caps = {"train": data.max_train, "validation": data.max_validation, "test": data.max_test}
    opened = open_source(data, source)
    if isinstance(opened, dict):
        # of a stream, a split that is missing is cut from train: more is fetched there, and cut after the check
        fetched, fractions = dict(caps), {"validation": data.validation_fraction, "test": data.test_fraction}
        for_missing = sum(fraction for name, fraction in fractions.items() if name not in opened)
        if fetched["train"] is not None and for_missing:
            fetched["train"] = round(fetched["train"] / (1 - for_missing))
            logger.info("train: fetching %d clips, since validation or test is cut from them", fetched["train"])
        asked = [fetched[name] for name in opened]
        checker = RecordingChecker(config, vad=vad, expected=None if None in asked else sum(cap or 0 for cap in asked))
        taken = {n: checker.take(n, opened[n], fetched[n]) if n in opened else [] for n in SPLITS}
        parts = {name: part[: caps[name]] for name, part in cut_missing(taken, data, config.seed).items()}
    else:
        if data.cut:
            pieces = [piece for utterance in opened for piece in cut_at_pauses(utterance, data.max_duration_sec)]
            if len(pieces) > len(opened):
                logger.info("data.cut: %d recordings became %d clips", len(opened), len(pieces))
            opened = pieces
        given: Parts = {name: [] for name in SPLITS}
        for utterance in opened:
            split = str(utterance.meta.get("split") or "train").lower()
            if split not in SPLIT_NAMES:
                raise DataError(f"utterance {utterance.id}: unknown split {split!r}; use {', '.join(SPLIT_NAMES)}")
            given[SPLIT_NAMES[split]].append(utterance)
        if not given["train"]:
            raise DataError("no utterance is in the train split")
        parts = cut_missing(given, data, config.seed)
        expected = sum(min(len(part), caps[name] or len(part)) for name, part in parts.items())
        checker = RecordingChecker(config, vad=vad, expected=expected)
        parts = {name: checker.take(name, parts[name], caps[name]) for name in SPLITS}
    surplus = [found.duration_sec for found in checker.stats.values() if found.duration_sec > MAX_AUDIO_SEC]
    if surplus:
        what = "%d clip(s) are up to %.2f s longer than %g s; what is beyond is left out"
        logger.warning(what, len(surplus), max(surplus) - MAX_AUDIO_SEC, MAX_AUDIO_SEC)
    skipped = checker.skipped
    enforce_skip_policy(skipped, sum(map(len, parts.values())) + len(skipped), data.max_skip_fraction)
    for name, part in parts.items():
        if not part:
            raise DataError(f"the {name} split is empty after checking; {len(skipped)} recording(s) were skipped")
    for mark, count in checker.tokenless.items():
        what = "%d utterance(s) in %r, which has no token in Whisper: taken as model.language (%s)"
        logger.warning(what, count, mark, config.model.language)
    splits = DatasetSplits(
        parts["train"], parts["validation"], parts["test"], label_case="keep", task=config.model.task,
        skipped=skipped, source=source, stats=checker.stats, shared_speakers=find_shared_speakers(parts.values()),
    ).with_label_case(data.label_case)  # fmt: skip
    train_texts = {normalize_plain(u.text) for u in splits.train}
    splits = replace(splits, shared_texts=sum(normalize_plain(u.text) in train_texts for u in splits.test))
    for row in splits.summary():
        logger.info("%(split)s: %(clips)d clips, %(minutes).1f min, %(speakers)s speakers", row)
    if shared := len(splits.shared_speakers):
        logger.warning("%d speaker(s) are in more than one split: results flatter the model", shared)
    if splits.shared_texts:
        logger.info("%d of %d test transcripts also occur in training", splits.shared_texts, len(splits.test))
    for language, style in resolve_styles(parts, data.label_case).items():
        if style.case != "keep":
            named = "transcripts" if language is None else f"{language_name(language)} transcripts"
            is_written_so = text_language(language, config.model.task) in CAPITAL_NOUNS and style.case == "sentence"
            small = "; nouns stay in lower case" if is_written_so else ""
            logger.info("%s recased to %r%s", named, style.case, small)
    return splits


def cut_at_pauses(utterance: Utterance, max_sec: float) -> list[Utterance]:
    """Cut a longer recording at the longest pauses that the times of its transcript leave, into clips of `max_sec`.

    One without times, or that is no file, is returned as it is. The clips have the recording as their speaker where
    none is known, so that they share a split.
    """
    audio = utterance.audio
    file, track = (audio.audio, audio.number) if isinstance(audio, AudioTrack) else (audio, None)
    whole = AudioPart(file, 0.0, track=track) if isinstance(file, Path) else file
    try:
        timed = timed_parts(utterance.text, math.inf)
    except DataError:  # the check reports it
        timed = []
    if not timed or not isinstance(whole, AudioPart) or timed[-1].end_sec <= max_sec:
        return [utterance]
    # half of each pause, and at most `PAD_SEC` of it, stays on either side
    ends = [min(a.end_sec + PAD_SEC, (a.end_sec + b.start_sec) / 2) for a, b in pairwise(timed)]
    starts = [0.0, *(max(b.start_sec - PAD_SEC, (a.end_sec + b.start_sec) / 2) for a, b in pairwise(timed))]
    starts[0] = max(timed[0].start_sec - PAD_SEC, 0.0)
    ends.append(timed[-1].end_sec + PAD_SEC)
    pieces, at = [], 0
    while at < len(timed):
        begin_sec = starts[at]
        last = max((i for i in range(at, len(timed)) if ends[i] - begin_sec <= max_sec), default=at)
        if last < len(timed) - 1:
            late = [i for i in range(at, last + 1) if ends[i] - begin_sec >= max_sec / 2] or [last]
            last = max(late, key=lambda i: timed[i + 1].start_sec - timed[i].end_sec)
        end_sec = None if last == len(timed) - 1 and math.isinf(ends[last]) else whole.start_sec + ends[last]
        if last == len(timed) - 1 and whole.end_sec is not None:
            end_sec = whole.end_sec if end_sec is None else min(end_sec, whole.end_sec)
        part = replace(whole, start_sec=whole.start_sec + begin_sec, end_sec=end_sec)
        spoken = [
            f"<|{t.start_sec - begin_sec:.2f}|>{t.text}<|{t.end_sec - begin_sec:.2f}|>" for t in timed[at : last + 1]
        ]
        text = "".join(spoken).removesuffix("<|inf|>")
        owner = utterance.speaker or utterance.id
        pieces.append(replace(utterance, id=f"{utterance.id} {part.times}", audio=part, text=text, speaker=owner))
        at = last + 1
    return pieces


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
    """Decode one recording, check it and measure it; return the utterance with its duration, and what was measured."""
    where = f"utterance {utterance.id}{_line(utterance)}"
    if utterance.problem is not None:
        raise DataError(f"{where}: {utterance.problem}")
    if special := special_token(utterance.text):
        what = f"the transcript spells the special token {special}, which is no text"
        raise DataError(f"{where}: {what}; remove it, or give the language in a column language")
    if not source_text(utterance).strip():
        raise DataError(f"{where}: the transcript is empty; fill it in or remove the row")
    try:
        load = decode if cache is None else cache.decode
        longest_sec = config.max_duration_sec + SURPLUS_SEC
        decoded = load(utterance.audio, name=utterance.audio_name, max_sec=longest_sec, strict=True)
    except AudioError as err:
        raise AudioError(f"{where}: {err}") from err
    taken = decoded.samples[: round(MAX_AUDIO_SEC * SAMPLE_RATE)]
    stats = replace(
        measure_clip(replace(decoded, samples=taken), vad=vad), duration_sec=len(decoded.samples) / SAMPLE_RATE
    )
    if not config.min_duration_sec <= stats.duration_sec <= longest_sec:
        allowed = f"{config.min_duration_sec} to {config.max_duration_sec} s (data.min_duration_sec, max_duration_sec)"
        raise DataError(f"{where}: {stats.duration_sec:.2f} s, allowed are {allowed}; cut it at a pause")
    meta = {"snr_db": round(stats.snr_db, 1), **utterance.meta}  # what the source knows is better than an estimate
    checked = replace(utterance, duration_sec=len(taken) / SAMPLE_RATE, meta=meta)
    try:
        return restyle(checked, LabelStyle("keep")), stats  # takes the times out of its transcript
    except DataError as err:
        raise DataError(f"{where}: {err}") from err


def with_language(utterance: Utterance, config: ModelConfig) -> Utterance:
    """Return the utterance with Whisper's code of its own language, else of `model.language`; None where both are.

    A language without a token in Whisper takes that of `model.language`.

    Raises:
        DataError: there is no such setting, or the variant knows English only.
    """
    own = utterance.language
    language = config.language if own is None else code_of_language(own) or config.language
    where = f"utterance {utterance.id}{_line(utterance)}"
    if own is not None and language is None:
        fix = "set model.language to the language whose token shall stand for it"
        raise DataError(f"{where}: its language {own!r} has no token in Whisper; {fix}")
    if language not in (None, "en") and config.variant.endswith(".en"):
        what = f"its language is {language_name(str(language))} ({own}), {config.variant!r} knows English only"
        raise DataError(f"{where}: {what}; set model.variant: {config.variant.removesuffix('.en')}")
    return utterance if language == own else replace(utterance, language=language)


def _line(utterance: Utterance) -> str:
    return f" (line {utterance.meta['line']} of the manifest)" if "line" in utterance.meta else ""


class RecordingChecker:
    """Checks recordings until enough have passed, and keeps what was measured (`stats`) and left out (`skipped`).

    `vad` looks for speech in at most `MAX_VAD_CLIPS` of them, chosen by hash among the number `expected` in all.
    """

    def __init__(
        self, config: Config, *, vad: VoiceActivityDetector | None = None, expected: int | None = None
    ) -> None:
        self.stats: dict[str, ClipStats] = {}
        self.skipped: list[SkippedUtterance] = []
        self.tokenless: Counter[str] = Counter()  # utterances by a mark of a language without a token in Whisper
        self._config = config
        self._cache = audio_cache(config)
        self._vad = vad
        self._sampled_share = 1.0 if not expected else MAX_VAD_CLIPS / expected
        self._sampled = 0

    def take(self, name: str, part: Sequence[Utterance] | Iterator[Utterance], cap: int | None) -> list[Utterance]:
        """Check a list in hashed order, or a stream in its own, until `cap` have passed; return them as they came."""
        data, queue, position = self._config.data, part, {}
        is_stream, chunk_size = not isinstance(part, Sequence), _STREAM_CHUNK
        if isinstance(part, Sequence):
            chunk_size, position = _CHUNK, {u.id: index for index, u in enumerate(part)}
            if cap is not None:
                queue = sorted(part, key=lambda u: stable_hash(self._config.seed, u.id))
        elif cap is None:
            logger.warning("%s: data.max_%s is not set, so the whole stream is downloaded", name, name)
        free_bytes = MAX_MEMORY_SHARE * psutil.virtual_memory().available
        passed: list[Utterance] = []
        skipped: list[SkippedUtterance] = []
        held_bytes, waiting = 0, iter(queue)
        total = cap if is_stream else min(len(position), len(position) if cap is None else cap)
        with thread_pool(os.cpu_count()) as pool, tqdm(total=total, desc=f"checking {name}", leave=False) as bar:
            while chunk := list(islice(waiting, chunk_size if cap is None else min(chunk_size, cap - len(passed)))):
                outcomes = pool.map(self._inspect_or_skip, chunk, [self._detector_for(u) for u in chunk])
                for given, outcome in zip(chunk, outcomes, strict=True):
                    if isinstance(outcome, SkippedUtterance):
                        skipped.append(outcome)
                    else:
                        utterance, self.stats[outcome[0].id] = outcome
                        passed.append(utterance)
                        if given.language is not None and code_of_language(given.language) is None:
                            self.tokenless[given.language] += 1
                        held_bytes += len(utterance.audio) if isinstance(utterance.audio, bytes) else 0
                        bar.update()
                if skipped and data.on_error == "raise":
                    more = f"\n({len(skipped) - 1} more like it)" if len(skipped) > 1 else ""
                    raise DataError(f'{skipped[0].reason}; or set data.on_error to "skip"{more}')
                if held_bytes > free_bytes:
                    what = f"{name}: {len(passed)} clips hold {held_bytes / 1e9:.1f} GB, half of the free memory"
                    fix = f"set data.max_{name} to {len(passed) // 2}, or download files for data.source: parquet"
                    raise DataError(f"{what}; {fix}")
                seen = len(passed) + len(skipped)
                if is_stream and seen >= _ENOUGH_TO_JUDGE and len(skipped) > data.max_skip_fraction * seen:
                    enforce_skip_policy(skipped, seen, data.max_skip_fraction)
        self.skipped += skipped
        if cap is not None and len(passed) < cap:
            logger.info("%s: %d asked for, %d exist; taking all of them", name, cap, len(passed))
        return passed if is_stream else sorted(passed, key=lambda u: position[u.id])

    def _detector_for(self, utterance: Utterance) -> VoiceActivityDetector | None:
        place = int(stable_hash(self._config.seed, utterance.id)[:8], 16) / 16**8
        if place >= self._sampled_share or self._sampled >= MAX_VAD_CLIPS:
            return None
        self._sampled += 1
        return self._vad

    def _inspect_or_skip(
        self, utterance: Utterance, vad: VoiceActivityDetector | None
    ) -> tuple[Utterance, ClipStats] | SkippedUtterance:
        try:
            utterance = with_language(utterance, self._config.model)
            return inspect_utterance(utterance, self._config.data, cache=self._cache, vad=vad)
        except DataError as err:
            return SkippedUtterance(utterance.id, str(err))


def audio_cache(config: Config) -> AudioCache | None:
    """Return the cache of decoded recordings, None where `data.cache_decoded` is off."""
    return AudioCache(config.paths.cache_dir / "audio") if config.data.cache_decoded else None


def enforce_skip_policy(skipped: Sequence[SkippedUtterance], total: int, max_skip_fraction: float) -> None:
    """Raise `DataError` when more than the allowed share of utterances was skipped; log the rest."""
    listed = "".join(f"\n  - {row.id}: {row.reason}" for row in skipped[:20])
    if len(skipped) > max_skip_fraction * total:
        raise DataError(
            f"{len(skipped)} of {total} utterances cannot be used, more than data.max_skip_fraction "
            f"({max_skip_fraction:.0%}) allows:{listed}"
        )
    if skipped:
        logger.warning("skipped %d of %d utterances:%s", len(skipped), total, listed)


# splitting


def cut_missing(parts: Parts, config: DataConfig, seed: int) -> Parts:
    """Cut validation and test, where they are missing, from the training set: whole speakers, in hashed order."""
    train, cut = parts["train"], dict(parts)
    total = len(train)
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if cut[name]:
            continue
        if any(u.speaker is None for u in train):
            logger.warning("%s: speakers are unknown, so the split is by clip; one speaker may be on both sides", name)
        keys = [u.speaker if u.speaker is not None else f"clip:{u.id}" for u in train]
        counts = Counter(keys)
        if len(counts) < 2:
            raise DataError(
                f"cannot cut a {name} split: {len(counts)} speaker(s) among {len(train)} training utterances, at least "
                "2 are needed; add recordings, or a column `split`: train, validation, test"
            )
        moved: set[str] = set()
        for speaker in sorted(counts, key=lambda s: stable_hash(seed, name + s))[:-1]:
            if sum(counts[s] for s in moved) >= max(1, round(fraction * total)):
                break
            moved.add(speaker)
        cut[name] = [u for u, key in zip(train, keys, strict=True) if key in moved]
        train = [u for u, key in zip(train, keys, strict=True) if key not in moved]
    return {**cut, "train": train}


def find_shared_speakers(parts: Iterable[Sequence[Utterance]]) -> tuple[str, ...]:
    """Return the speakers that occur in more than one part, sorted."""
    counts = Counter(speaker for part in parts for speaker in {u.speaker for u in part if u.speaker is not None})
    return tuple(sorted(speaker for speaker, count in counts.items() if count > 1))
