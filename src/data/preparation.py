"""Check every recording, measure it and split by speaker: the same utterances in the same split on every machine.

The choice goes by a hash of the seed and the id, not by position: corpora are ordered by speaker, and their head is
no sample of them. Of a stream the first N that pass are taken: any other choice would cost a download of the whole.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import psutil

from src.data.audio import SAMPLE_RATE, AudioCache, decode
from src.data.labels import (
    CAPITAL_NOUNS,
    Group,
    LabelCase,
    LabelStyle,
    case_in,
    group_of,
    group_texts,
    letters_of,
    resolve_case,
    restyle,
    source_text,
    special_token,
    timed_parts,
)
from src.data.preprocessing import ClipStats, PackedStats, measure_clip
from src.data.sources.catalog import CLIP_TEXT, in_mix, load_utterances, open_source
from src.data.sources.hub import MIN_SPEAKERS, spread, stream_general
from src.data.sources.parts import AudioPart
from src.data.utterance import SPLIT_NAMES, SPLITS, AudioTrack, SkippedUtterance, Utterance, hashed_choice, stable_hash
from src.data.vad import VoiceActivityDetector
from src.utils.config import MAX_AUDIO_SEC, REPLAY, Config, DataConfig, ModelConfig, SourceName
from src.utils.errors import AudioError, DataError, SourceUnavailableError
from src.utils.languages import code_of_language, language_name, normalize_plain, text_language
from src.utils.logging_config import ProgressBar
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
    label_cases: Mapping[str, LabelCase] = field(default_factory=dict)  # as configured, by source of a mix
    skipped: list[SkippedUtterance] = field(default_factory=list)  # what `on_error="skip"` left out
    shared_speakers: tuple[str, ...] = ()  # in more than one split (the source's own splits may)
    shared_texts: int = 0  # test transcripts that also occur in training
    source: str = "sample"  # the one that was taken, or those of a mix
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

    def with_label_case(
        self, chosen: LabelCase | Mapping[str | None, LabelStyle] | Mapping[Group, LabelStyle]
    ) -> DatasetSplits:
        """Return the same utterances with their source's transcripts in another case, or a style for each language.

        In a mix it is one for each source and language, and sources that have a case of their own keep it.
        """
        names = self.label_cases
        styles = resolve_styles(self.parts, "auto" if isinstance(chosen, Mapping) else chosen, names)
        if isinstance(chosen, Mapping):
            styles |= {key if isinstance(key, tuple) else (None, key): style for key, style in chosen.items()}
        cases = {styles[group_of(u, names)].case for u in self.train}
        styled: dict[str, Any] = {
            name: [restyle(u, styles[group_of(u, names)], self.task) for u in part] for name, part in self.parts.items()
        }
        return replace(self, **styled, label_case=cases.pop() if len(cases) == 1 else "auto")


def resolve_styles(
    parts: Parts, label_case: LabelCase, label_cases: Mapping[str, LabelCase]
) -> dict[Group, LabelStyle]:
    """Choose the case of each group as `resolve_case` does, by its training transcripts if there are any."""
    texts = group_texts(chain(*parts.values()), label_cases) | group_texts(parts["train"], label_cases)
    cases = {group: resolve_case(own, case_in(group, label_case, label_cases)) for group, own in texts.items()}
    return {group: LabelStyle(case) for group, case in cases.items()}


def prepare_datasets(config: Config, *, vad: VoiceActivityDetector | None = None) -> DatasetSplits:
    """List, check, split and recase the configured sources; every recording is decoded once.

    Of `data.sources`, one that is unavailable gives way to the next; any other fault is raised. The sources of
    `data.mix` become one set: `meta["source"]` is the name of each, ids begin with it, and no speaker is in two splits,
    where the same name is the same person. Clips of `data.replay` are added to the training set.

    `vad` looks for speech in a sample of at most `MAX_VAD_CLIPS` recordings, for the data report.

    Raises:
        SourceUnavailableError: the source, one of `data.mix`, or every one of `data.sources`, is unavailable; or there
            is no general speech for `data.replay`.
        DataError: nothing usable, too few speakers to split, more than `max_skip_fraction` skipped; with
            `on_error="raise"` the first unusable recording, with a count of the others.
    """
    if config.data.mix:
        return _prepare({name: data.source for name, data in config.data.parts.items()}, config, vad)
    *others, last = config.data.chosen_sources
    for source in others:
        try:
            return _prepare({None: source}, config, vad)
        except SourceUnavailableError as err:
            logger.warning("source %r is unavailable, going on to the next of data.sources: %s", source, err)
    return _prepare({None: last}, config, vad)


def _prepare(
    sources: Mapping[str | None, SourceName], config: Config, vad: VoiceActivityDetector | None
) -> DatasetSplits:
    data = config.data
    opened = [_open(name, source, config, vad) for name, source in sources.items()]
    _split_by_speaker(opened, config)
    parts: Parts = {name: [] for name in SPLITS}
    for each in opened:
        caps, checker = each.caps, each.checker
        if each.is_checked:
            checked = {name: part[: caps[name]] for name, part in each.parts.items()}
        else:
            checker.expect(sum(min(len(part), caps[name] or len(part)) for name, part in each.parts.items()))
            checked = {name: checker.take(name, each.parts.pop(name), caps[name]) for name in SPLITS}
        seen = sum(map(len, checked.values())) + len(checker.skipped)
        enforce_skip_policy(checker.skipped, seen, each.data.max_skip_fraction)
        parts = {name: parts[name] + checked[name] for name in SPLITS}
    if data.mix:
        for name, cap in _caps(data).items():
            chosen = {u.id for u in hashed_choice(parts[name], cap, config.seed)}
            parts[name] = [u for u in parts[name] if u.id in chosen]
    checkers = [each.checker for each in opened]
    skipped = [row for checker in checkers for row in checker.skipped]
    for name, part in parts.items():
        if not part:
            raise DataError(f"the {name} split is empty after checking; {len(skipped)} recording(s) were skipped")
    if data.replay.share:
        replayed, checker = take_replay(parts, config)
        parts["train"] += replayed
        checkers.append(checker)
    stats = PackedStats(*(checker.stats for checker in checkers))
    if surplus := [found.duration_sec for found in stats.values() if found.duration_sec > MAX_AUDIO_SEC]:
        what = "%d clip(s) are up to %.2f s longer than %g s; what is beyond is left out"
        logger.warning(what, len(surplus), max(surplus) - MAX_AUDIO_SEC, MAX_AUDIO_SEC)
    for mark, count in sum((checker.tokenless for checker in checkers), Counter[str]()).items():
        what = "%d utterance(s) in %r, which has no token in Whisper: taken as model.language (%s)"
        logger.warning(what, count, mark, config.model.language)
    names = [name or source for name, source in sources.items()] + [REPLAY] * bool(data.replay.share)
    splits = DatasetSplits(
        parts["train"], parts["validation"], parts["test"], label_case="keep", task=config.model.task,
        label_cases=data.label_cases, skipped=skipped, source=" + ".join(names), stats=stats,
        shared_speakers=find_shared_speakers(parts.values()),
    ).with_label_case(data.label_case)  # fmt: skip
    train_texts = {normalize_plain(u.text) for u in splits.train}
    splits = replace(splits, shared_texts=sum(normalize_plain(u.text) in train_texts for u in splits.test))
    for row in splits.summary():
        logger.info("%(split)s: %(clips)d clips, %(minutes).1f min, %(speakers)s speakers", row)
    if shared := len(splits.shared_speakers):
        logger.warning("%d speaker(s) are in more than one split: results flatter the model", shared)
    if splits.shared_texts:
        logger.info("%d of %d test transcripts also occur in training", splits.shared_texts, len(splits.test))
    for (source, language), style in resolve_styles(parts, data.label_case, data.label_cases).items():
        if style.case != "keep":
            named = "" if language is None else f"{language_name(language)} "
            named += "transcripts" if source is None else f"transcripts of {source}"
            is_written_so = text_language(language, config.model.task) in CAPITAL_NOUNS and style.case == "sentence"
            small = "; nouns stay in lower case" if is_written_so else ""
            logger.info("%s recased to %r%s", named, style.case, small)
    return splits


@dataclass
class _Opened:
    """One source of a data set on its way: listed, then split, then checked; a stream is checked as it comes."""

    data: DataConfig
    parts: Parts
    caps: Mapping[str, int | None]
    checker: RecordingChecker
    is_checked: bool


def _caps(data: DataConfig) -> dict[str, int | None]:
    return {"train": data.max_train, "validation": data.max_validation, "test": data.max_test}


def _open(name: str | None, source: SourceName, config: Config, vad: VoiceActivityDetector | None) -> _Opened:
    """List a source, by the splits that it gives; of a stream fetch and check as many as are wanted."""
    data = config.data.parts[name]
    whole, caps = _caps(config.data), _caps(data)  # the sources of a mix have no more than the whole
    caps = {split: min((n for n in (cap, whole[split]) if n is not None), default=None) for split, cap in caps.items()}
    checker = RecordingChecker(config.model_copy(update={"data": data}), vad=vad)
    opened = open_source(data, source)
    if isinstance(opened, dict):
        # of a stream, a split that is missing is cut from train: more is fetched there, and cut after the check
        fetched, fractions = dict(caps), {"validation": data.validation_fraction, "test": data.test_fraction}
        for_missing = sum(fraction for split, fraction in fractions.items() if split not in opened)
        if fetched["train"] is not None and for_missing:
            fetched["train"] = round(fetched["train"] / (1 - for_missing))
            logger.info("train: fetching %d clips, since validation or test is cut from them", fetched["train"])
        asked = [fetched[split] for split in opened]
        checker.expect(None if None in asked else sum(cap or 0 for cap in asked))
        streams = {split: (in_mix(u, name) for u in stream) for split, stream in opened.items()}
        taken = {n: checker.take(n, streams[n], fetched[n]) if n in streams else [] for n in SPLITS}
        return _Opened(data, taken, caps, checker, is_checked=True)
    if data.cut:
        pieces = [piece for utterance in opened for piece in cut_at_pauses(utterance, data.max_duration_sec)]
        if len(pieces) > len(opened):
            logger.info("data.cut: %d recordings became %d clips", len(opened), len(pieces))
        opened = pieces
    given: Parts = {split: [] for split in SPLITS}
    for utterance in opened:
        if utterance.split is None:
            unknown = str(utterance.meta["split"]).lower()
            raise DataError(f"utterance {utterance.id}: unknown split {unknown!r}; use {', '.join(SPLIT_NAMES)}")
        given[utterance.split].append(in_mix(utterance, name))
    if not given["train"] and name is None:
        raise DataError("no utterance is in the train split")
    return _Opened(data, given, caps, checker, is_checked=False)


def _split_by_speaker(opened: Sequence[_Opened], config: Config) -> None:
    """Cut the splits that sources lack; in a mix no speaker is in two, and those of a test are left out of training."""
    if not config.data.mix:
        for each in opened:
            each.parts = cut_missing(each.parts, each.data, config.seed)
        return
    # where the speakers are by the splits that sources give themselves; a test goes first
    given = [(name, each) for name in SPLITS for each in opened if name != "train" or all(each.parts.values())]
    held = {u.speaker: name for name, each in given for u in each.parts[name] if u.speaker is not None}
    left_out = 0
    for each in opened:
        cut = cut_missing(each.parts, each.data, config.seed, held=held)
        each.parts = {name: [u for u in part if held.get(u.speaker or "", name) == name] for name, part in cut.items()}
        left_out += sum(map(len, cut.values())) - sum(map(len, each.parts.values()))
        held |= {u.speaker: name for name, part in each.parts.items() for u in part if u.speaker is not None}
    for name in SPLITS[::-1]:
        if not any(each.parts[name] for each in opened):
            fix = "add recordings of others, or a column `split`: train, validation, test"
            raise DataError(f"data.mix: no source has the speakers for a {name} split, which takes at least 2; {fix}")
    if left_out:
        what = "mix: %d clip(s) left out: their speakers are in the test or validation, maybe of another source; "
        logger.warning(what + "if they are other people, give them other names", left_out)


def source_weights(utterances: Iterable[Utterance], data: DataConfig) -> dict[str, float]:
    """Return how often clips are seen per epoch, by source, where that is not once.

    For `data.replay` it is what makes its clips the wanted share of all training examples.
    """
    weights = {name: each.weight for name, each in data.mixed.items()}
    counts = Counter(str(u.meta.get("source")) for u in utterances)
    if data.replay.share and (replayed := counts.pop(REPLAY, 0)):
        others = sum(count * weights.get(name, 1.0) for name, count in counts.items())
        weights[REPLAY] = data.replay.share / (1 - data.replay.share) * others / replayed
    return {name: weight for name, weight in weights.items() if weight != 1.0}


def take_replay(parts: Parts, config: Config) -> tuple[list[Utterance], RecordingChecker]:
    """Take as much general speech as `data.replay.share` needs, in the languages of the training set, and check it.

    It has no text or speaker of validation and test, and no text of the guard set. Clips that are in the training set
    already are taken only where there are no others.
    """
    replay = config.data.replay
    weights = source_weights(parts["train"], config.data)
    others = sum(weights.get(str(u.meta.get("source")), 1.0) for u in parts["train"])
    wanted = max(1, round(replay.share / (1 - replay.share) * others))
    measured = [*parts["validation"], *parts["test"]]
    texts = {letters_of(source_text(u)) for u in measured}
    guard = config.guard  # of a guard set that is not made yet: of corpora it takes the test splits
    if guard.source in ("folder", "parquet"):
        listed = load_utterances(DataConfig(source=guard.source, path=guard.path))
        texts |= {letters_of(source_text(u)) for u in hashed_choice(listed, guard.max_clips, config.seed)}
    else:
        texts.add(letters_of(CLIP_TEXT))
    trained = {letters_of(source_text(u)) for u in parts["train"]}
    speakers = {u.speaker for u in measured} - {None}
    languages = Counter(u.language for u in parts["train"] if u.language) or Counter([config.model.language or "en"])
    if not any(u.language for u in parts["train"]) and not config.model.variant.endswith(".en"):
        logger.warning("data.replay: in English, since no row says its language; set model.language")

    def usable(listed: Iterable[Utterance]) -> Iterator[Utterance]:
        for utterance in listed:
            is_spoken = utterance.language is None or code_of_language(utterance.language) in languages
            is_measured = letters_of(source_text(utterance)) in texts or utterance.speaker in speakers
            if is_spoken and not is_measured:
                yield in_mix(utterance, REPLAY)

    def is_new(utterance: Utterance) -> bool:
        return letters_of(source_text(utterance)) not in trained

    def take_listed(data: DataConfig, cap: int) -> list[Utterance]:
        candidates = list(usable(u for u in load_utterances(data) if u.split == "train"))
        new = [utterance for utterance in candidates if is_new(utterance)]
        if candidates and not new:
            logger.warning("data.replay: all of its clips are in the training set; set data.replay.source to others")
        return checker.take("replay", new or candidates, cap)

    checker = RecordingChecker(config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})}))
    taken: list[Utterance] = []
    names, missing = [], dict[str, str]()
    if replay.source in ("sample", "folder", "parquet"):
        names.append(str(replay.path or "the bundled sample"))
        taken += take_listed(DataConfig(source=replay.source, path=replay.path), wanted)
    else:
        only = Counter({"en": 1}) if replay.source == "librispeech" else languages
        for language, count in only.most_common():
            cap = math.ceil(wanted * count / only.total())
            try:
                name, stream = stream_general(language, "train", task=config.model.task)
                marked = (in_mix(u, language) for u in stream)  # FLEURS has the same ids in all languages
                spoken = spread(filter(is_new, usable(marked)), max_per_speaker=math.ceil(cap / MIN_SPEAKERS))
                taken += checker.take("replay", spoken, cap)
                names.append(name)
            except SourceUnavailableError as err:
                if replay.source == "librispeech":
                    raise
                if language == "en":
                    logger.warning("data.replay: the bundled sample, since LibriSpeech is unavailable (%s)", err)
                    taken += take_listed(DataConfig(), cap)
                    names.append("the bundled sample")
                else:
                    missing[language] = str(err)
    enforce_skip_policy(checker.skipped, len(taken) + len(checker.skipped), config.data.max_skip_fraction)
    reasons = "".join(f"; {language_name(language)}: {reason}" for language, reason in missing.items())
    if not taken:
        asked = " or ".join(names) or "general speech"
        fix = "set data.replay.source: folder or parquet, or data.replay.share: 0"
        raise SourceUnavailableError(f"data.replay: no clip of {asked} can be used{reasons}; {fix}")
    if missing:
        logger.warning("data.replay: not in each language of the data%s", reasons)
    what = "replay: %d clip(s) of %s, each seen %.2f times per epoch: %.0f%% of the training examples"
    logger.info(what, len(taken), " + ".join(names), wanted / len(taken), 100 * replay.share)
    return taken, checker


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
    starts, ends = [max(timed[0].start_sec - PAD_SEC, 0.0)], list[float]()
    for a, b in pairwise(timed):
        middle_sec = (a.end_sec + b.start_sec) / 2
        ends.append(min(a.end_sec + PAD_SEC, middle_sec))
        starts.append(max(b.start_sec - PAD_SEC, middle_sec))
    ends.append(timed[-1].end_sec + PAD_SEC)
    pieces, at = [], 0
    while at < len(timed):
        begin_sec = starts[at]
        last = max((i for i in range(at, len(timed)) if ends[i] - begin_sec <= max_sec), default=at)
        if last < len(timed) - 1:
            late = [i for i in range(at, last + 1) if ends[i] - begin_sec >= max_sec / 2] or [last]
            last = max(late, key=lambda i: timed[i + 1].start_sec - timed[i].end_sec)
        end_sec = whole.start_sec + ends[last]
        if last == len(timed) - 1 and whole.end_sec is not None:
            end_sec = min(end_sec, whole.end_sec)
        known_sec = None if math.isinf(end_sec) else end_sec
        part = replace(whole, start_sec=whole.start_sec + begin_sec, end_sec=known_sec)
        spoken = [(t.start_sec - begin_sec, t.text, t.end_sec - begin_sec) for t in timed[at : last + 1]]
        text = "".join(f"<|{start:.2f}|>{said}<|{end:.2f}|>" for start, said, end in spoken).removesuffix("<|inf|>")
        owner = utterance.speaker or utterance.id
        pieces.append(replace(utterance, id=f"{utterance.id} {part.times}", audio=part, text=text, speaker=owner))
        at = last + 1
    return pieces


# checking


def check_utterance(utterance: Utterance, config: DataConfig) -> Utterance:
    """Decode one recording and check it; as `inspect_utterance`, without the measurements."""
    return inspect_utterance(utterance, config)[0]


def inspect_utterance(
    utterance: Utterance, config: DataConfig, *, cache: AudioCache | None = None,
    vad: VoiceActivityDetector | None = None,
) -> tuple[Utterance, ClipStats]:  # fmt: skip
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
    stats = measure_clip(replace(decoded, samples=taken), vad=vad)
    stats = replace(stats, duration_sec=len(decoded.samples) / SAMPLE_RATE)
    if not config.min_duration_sec <= stats.duration_sec <= longest_sec:
        allowed = f"{config.min_duration_sec} to {config.max_duration_sec} s (data.min_duration_sec, max_duration_sec)"
        raise DataError(f"{where}: {stats.duration_sec:.2f} s, allowed are {allowed}; cut it at a pause")
    checked = replace(utterance, duration_sec=len(taken) / SAMPLE_RATE, snr_db=round(stats.snr_db, 1))
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
    return "" if utterance.line is None else f" (line {utterance.line} of the manifest)"


class RecordingChecker:
    """Checks recordings until enough have passed, and keeps what was measured (`stats`) and left out (`skipped`).

    `vad` looks for speech in at most `MAX_VAD_CLIPS` of them, chosen by hash among the number that is expected in all.
    """

    def __init__(self, config: Config, *, vad: VoiceActivityDetector | None = None) -> None:
        self.stats = PackedStats()
        self.skipped: list[SkippedUtterance] = []
        self.tokenless: Counter[str] = Counter()  # utterances by a mark of a language without a token in Whisper
        self._config = config
        self._cache = audio_cache(config)
        self._vad = vad
        self._sampled_share = 1.0
        self._sampled = 0

    def expect(self, number: int | None) -> None:
        """Say how many recordings will be checked in all, among which `vad` looks at a sample; None is unknown."""
        self._sampled_share = MAX_VAD_CLIPS / number if number else 1.0

    def take(self, name: str, part: Sequence[Utterance] | Iterator[Utterance], cap: int | None) -> list[Utterance]:
        """Check a list in hashed order, or a stream in its own, until `cap` have passed; return them as they came."""
        data, position = self._config.data, dict[str, int]()
        is_stream, chunk_size, waiting = not isinstance(part, Sequence), _STREAM_CHUNK, iter(part)
        total = cap
        if isinstance(part, Sequence):
            chunk_size, total = _CHUNK, len(part) if cap is None else min(cap, len(part))
            queue = deque(part)
            if cap is not None:
                position = {u.id: index for index, u in enumerate(part)}
                queue = deque(hashed_choice(part, None, self._config.seed))
            waiting = (queue.popleft() for _ in range(len(queue)))  # each is freed when it has been checked
        elif cap is None:
            logger.warning("%s: data.max_%s is not set, so the whole stream is downloaded", name, name)
        del part
        free_bytes = MAX_MEMORY_SHARE * psutil.virtual_memory().available
        passed: list[Utterance] = []
        skipped: list[SkippedUtterance] = []
        held_bytes = 0
        with thread_pool(os.cpu_count()) as pool, ProgressBar(total=total, desc=f"checking {name}", leave=False) as bar:
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
        elif cap is not None and cap < len(position):
            logger.info("%s: %d of %d are taken, as data.max_%s says", name, cap, len(position), name)
        return sorted(passed, key=lambda u: position[u.id]) if position else passed

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


def cut_missing(parts: Parts, config: DataConfig, seed: int, *, held: Mapping[str, str] | None = None) -> Parts:
    """Cut validation and test, where they are missing, from the training set: whole speakers, in hashed order.

    `held` is for a source among others: the splits in which speakers are already. Those move there, others do not
    follow them, and a source with one speaker has no split but training.
    """
    train, cut = parts["train"], dict(parts)
    total = len(train)
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if cut[name] or (held is not None and not train):
            continue
        if any(u.speaker is None for u in train):
            logger.warning("%s: speakers are unknown, so the split is by clip; one speaker may be on both sides", name)
        keys = [u.speaker if u.speaker is not None else f"clip:{u.id}" for u in train]
        counts = Counter(keys)
        if len(counts) < 2 and held is None:
            raise DataError(
                f"cannot cut a {name} split: {len(counts)} speaker(s) among {len(train)} training utterances, at least "
                "2 are needed; add recordings, or a column `split`: train, validation, test"
            )
        elsewhere = held or {}
        moved = {speaker for speaker in counts if elsewhere.get(speaker) == name}
        for speaker in sorted(counts, key=lambda s: stable_hash(seed, name + s))[:-1]:
            if sum(counts[s] for s in moved) >= max(1, round(fraction * total)):
                break
            if speaker not in elsewhere:
                moved.add(speaker)
        cut[name] = [u for u, key in zip(train, keys, strict=True) if key in moved]
        train = [u for u, key in zip(train, keys, strict=True) if key not in moved]
    return {**cut, "train": train}


def find_shared_speakers(parts: Iterable[Sequence[Utterance]]) -> tuple[str, ...]:
    """Return the speakers that occur in more than one part, sorted."""
    counts = Counter(speaker for part in parts for speaker in {u.speaker for u in part if u.speaker is not None})
    return tuple(sorted(speaker for speaker, count in counts.items() if count > 1))
