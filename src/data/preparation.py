"""Check every recording, then split by speaker: the same utterances in the same split on every machine.

Splits that the source gives are honoured; what is missing is cut from the training speakers. Choice goes by a hash of
the seed and the id, never by position: corpora are ordered by speaker, and the head of one is not a sample of it.
Streamed sources are the exception: there, the first N that pass are taken, since any other choice would cost a download
of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from src.data.checking import SkippedUtterance, check_listed, check_stream, enforce_skip_policy
from src.data.labels import LabelCase, apply_case, resolve_case
from src.data.preprocessing import ClipStats
from src.data.sources.catalog import Streams, open_source
from src.data.splitting import SPLITS, assign_splits, cut_missing, find_shared_speakers
from src.data.utterance import Utterance
from src.utils.config import Config, DataConfig, SourceName
from src.utils.errors import DataError, SourceUnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSplits:
    """Checked utterances, disjoint by speaker where speakers are known.

    Attributes:
        skipped: what `on_error="skip"` left out.
        label_case: how transcripts were recased; `with_label_case` changes it.
        shared_speakers: speakers that occur in more than one split (the source's own splits may).
        shared_texts: number of test transcripts that also occur in training.
        source: that was taken.
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

    @property
    def utterances(self) -> list[Utterance]:
        """Of all splits."""
        return [*self.train, *self.validation, *self.test]

    def with_label_case(self, label_case: LabelCase) -> DatasetSplits:
        """Return the same utterances with their source's transcripts in another case."""
        train, validation, test = (
            [_recased(u, label_case) for u in part] for part in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test, label_case=label_case)


def prepare_datasets(config: Config) -> DatasetSplits:
    """List, check, split and recase the configured source.

    Returns: splits capped at `max_*`, or at what exists.
    Raises:
        SourceUnavailableError: the source, or every one of `data.sources`, cannot be had.
        DataError: nothing usable, too few speakers to split, more than `max_skip_fraction` skipped, another language
            than `model.language`; with `on_error="raise"` the first unusable recording, with a count of the others.
    """
    source, parts, stats, skipped = _take_first_available(config)
    for name, part in parts.items():
        if not part:
            raise DataError(f"the {name} split is empty after checking; {len(skipped)} recording(s) were skipped")
    _refuse_other_language(parts["train"], config)
    label_case = resolve_case([u.text for u in parts["train"]], config.data.label_case)
    recased = {name: [_recased(u, label_case) for u in part] for name, part in parts.items()}
    train_texts = {u.text.lower() for u in recased["train"]}
    splits = DatasetSplits(
        **recased,
        label_case=label_case,
        skipped=skipped,
        shared_speakers=find_shared_speakers(recased.values()),
        shared_texts=sum(u.text.lower() in train_texts for u in recased["test"]),
        source=source,
        stats=stats,
    )
    _log(splits)
    return splits


_Prepared = tuple[SourceName, dict[str, list[Utterance]], dict[str, ClipStats], list[SkippedUtterance]]


def _take_first_available(config: Config) -> _Prepared:
    """Try the configured sources in order; only one that cannot be had at all gives way to the next."""
    *others, last = config.data.chosen_sources
    for source in others:
        try:
            return _prepare_source(source, config)
        except SourceUnavailableError as err:
            logger.warning("source %r cannot be had, going on to the next of data.sources: %s", source, err)
    return _prepare_source(last, config)


def _prepare_source(source: SourceName, config: Config) -> _Prepared:
    stats: dict[str, ClipStats] = {}
    skipped: list[SkippedUtterance] = []
    opened = open_source(config.data, source)
    if isinstance(opened, dict):
        parts = _take_from_streams(opened, config, stats, skipped)
    else:
        if not opened:
            raise DataError(f"source {source!r} ({config.data.path or 'bundled'}) has no utterance")
        parts = cut_missing(assign_splits(opened), config.data, config.seed)
        caps = _caps(config.data)
        parts = {name: check_listed(name, parts[name], caps[name], config, stats, skipped) for name in SPLITS}
    enforce_skip_policy(skipped, sum(map(len, parts.values())) + len(skipped), config.data.max_skip_fraction)
    return source, parts, stats, skipped


def _take_from_streams(
    streams: Streams, config: Config, stats: dict[str, ClipStats], skipped: list[SkippedUtterance]
) -> dict[str, list[Utterance]]:
    """Take the first N of each split that pass; what a missing split needs is taken from train as well."""
    caps = _caps(config.data)
    fractions = {"validation": config.data.validation_fraction, "test": config.data.test_fraction}
    for_missing = sum(fraction for name, fraction in fractions.items() if name not in streams)
    if caps["train"] is not None and for_missing:
        caps["train"] = round(caps["train"] / (1 - for_missing))
        logger.info("train: fetching %d clips, since validation or test is cut from them", caps["train"])
    taken = {name: check_stream(name, streams[name], caps[name], config, stats, skipped) for name in streams}
    parts = cut_missing({name: taken.get(name, []) for name in SPLITS}, config.data, config.seed)
    return {name: part[: _caps(config.data)[name]] for name, part in parts.items()}


def _caps(config: DataConfig) -> dict[str, int | None]:
    return {"train": config.max_train, "validation": config.max_validation, "test": config.max_test}


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


def _recased(utterance: Utterance, label_case: LabelCase) -> Utterance:
    source_text = str(utterance.meta.get("source_text", utterance.text))
    text = apply_case(source_text, label_case)
    if text == utterance.text:
        return utterance
    return replace(utterance, text=text, meta={**utterance.meta, "source_text": source_text})


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
