"""A guard set: speech of another kind, measured with the stock and the tuned model, to show what training forgot.

It is in the languages of the training data: the test splits of LibriSpeech for English, and of FLEURS for others.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from src.data.labels import apply_case, letters_of, resolve_case
from src.data.loader import create_loader
from src.data.preparation import RecordingChecker, enforce_skip_policy
from src.data.sources.catalog import CLIP_TEXT, SAMPLE_CLIP, load_utterances
from src.data.sources.hub import MIN_SPEAKERS, spread, stream_general
from src.data.utterance import Utterance
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator
from src.evaluation.report.run_files import guard_name
from src.utils.config import Config, DataConfig
from src.utils.errors import DataError, SourceUnavailableError
from src.utils.languages import language_name
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GuardSet:
    """Checked speech that no training saw; each clip says its language."""

    name: str
    utterances: tuple[Utterance, ...]
    not_measured: Mapping[str, str] = field(default_factory=dict)  # why, by language of the training data

    @property
    def language(self) -> str | None:
        """The language of all clips; None if they have several, or say none."""
        languages = {u.language for u in self.utterances}
        return languages.pop() if len(languages) == 1 else None


def prepare_guard_set(config: Config, *, exclude: Sequence[Utterance] = ()) -> GuardSet | None:
    """Fetch and check the configured guard set; None with `guard.source: none`, or if there is no such speech.

    It is in the languages of `exclude`, the training data, else in `model.language`; clips that are part of these too
    (same id, same words) are left out. `data` says what to do with unusable recordings of a folder or of Parquet files.

    Raises:
        SourceUnavailableError: the chosen source is unavailable. "auto" takes the bundled clip instead of LibriSpeech,
            and leaves other languages out.
    """
    guard, data = config.guard, config.data
    if guard.source == "none":
        logger.info("no guard set (guard.source: none): what training forgets is not measured")
        return None
    parts_of_data = data.parts.values()
    same_path = guard.path is not None and guard.path.resolve() in {d.path.resolve() for d in parts_of_data if d.path}
    is_librispeech = any("librispeech" in d.chosen_sources for d in parts_of_data)
    if same_path or (guard.source in ("auto", "librispeech") and is_librispeech):
        what = "guard set: %s is among the sources of the training data too; speech from there is not of another kind"
        logger.warning(what, guard.path if same_path else "LibriSpeech")
    wanted = Counter(u.language for u in exclude if u.language) or Counter(filter(None, [config.model.language]))
    known, missing = {_identity(u) for u in exclude}, dict[str, str]()
    parts: list[tuple[str, list[Utterance]]] = []
    if guard.source == "auto":
        cap = math.ceil(guard.max_clips / max(1, len(wanted)))
        for language, _ in wanted.most_common() or [("en", 0)]:
            try:
                source = "librispeech" if language == "en" else "fleurs"
                parts.append(_take(source, config, known, cap, language=language))
            except SourceUnavailableError as err:
                if language != "en":
                    missing[language] = str(err)
                    continue
                logger.warning(
                    "guard set: the bundled public clip, which shows only a model that has lost everything; "
                    "LibriSpeech is unavailable (%s). guard.source: folder or parquet takes speech of yours", err,
                )  # fmt: skip
                parts.append(_take("clip", config, known, cap))
    else:
        name, utterances = _take(guard.source, config, known, guard.max_clips)
        if len(wanted) == 1:
            utterances = [replace(u, language=u.language or next(iter(wanted))) for u in utterances]
        other = {str(u.language) for u in utterances if wanted and u.language not in (None, *wanted)}
        if other:
            what = "guard set %s: its clips in %s are left out: the training data, or model.language, are in %s"
            logger.warning(what, name, ", ".join(sorted(other)), ", ".join(sorted(wanted)))
        parts.append((name, [u for u in utterances if u.language not in other]))
    for language, reason in missing.items():
        logger.warning(
            "guard set: what training forgets of %s (the language of the training data, or model.language) is not "
            "measured: %s. guard.source: folder or parquet takes speech of yours", language_name(language), reason,
        )  # fmt: skip
    parts = [part for part in parts if part[1]]
    if not parts:
        return None
    name, recased = " + ".join(name for name, _ in parts), list[Utterance]()
    for _, utterances in parts:  # recase the clips of each language by themselves
        texts: dict[str | None, list[str]] = {}
        for u in utterances:
            texts.setdefault(u.language, []).append(u.text)
        cases = {language: resolve_case(own, "auto") for language, own in texts.items()}
        recased += [replace(u, text=apply_case(u.text, cases[u.language], u.language)) for u in utterances]
    logger.info("guard set: %s, %d clip(s)", name, len(recased))
    return GuardSet(name, tuple(recased), missing)


def _identity(utterance: Utterance) -> tuple[str, str]:
    """The id and the letters of the text: recasing keeps both, and two corpora may both have a clip 0001."""
    return utterance.id.removeprefix(f"{utterance.meta.get('source')}/"), letters_of(utterance.text)


def _take(
    source: str, config: Config, known: Container[tuple[str, str]], cap: int, *, language: str = "en"
) -> tuple[str, list[Utterance]]:
    """Return a source's name and its checked clips, without those that are known."""
    name, data = str(config.guard.path), DataConfig(on_error="skip")  # corpora have clips beyond 30 s
    listed: Iterator[Utterance]
    if source == "clip":
        name, listed = "bundled public clip", iter([Utterance("jfk", SAMPLE_CLIP, CLIP_TEXT, language="en")])
    elif source in ("librispeech", "fleurs"):
        name, listed = stream_general(language, "test", task=config.model.task)
    else:
        keys = ("min_duration_sec", "max_duration_sec", "on_error", "max_skip_fraction")
        policy = {key: getattr(config.data, key) for key in keys}
        data = DataConfig.model_validate({"source": source, "path": config.guard.path, **policy})
        listed = iter(load_utterances(data))
    left_out = 0

    def fresh() -> Iterator[Utterance]:
        nonlocal left_out
        for utterance in listed:
            if _identity(utterance) in known:
                left_out += 1
            else:
                yield utterance

    checker = RecordingChecker(config.model_copy(update={"data": data}))
    clips: Iterator[Utterance] | list[Utterance] = fresh()
    if source == "librispeech":
        clips = spread(fresh(), max_per_speaker=math.ceil(cap / MIN_SPEAKERS))
    elif source != "fleurs":
        clips = list(fresh())
    checked = checker.take("guard", clips, None if source == "clip" else cap)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), data.max_skip_fraction)
    if not checked:
        reason = f"each of its {left_out} clips is in the training data too" if left_out else "no usable clip"
        raise DataError(f"guard set {name}: {reason}; set guard.source to other speech, or to none")
    if left_out:
        logger.warning("guard set %s: %d clip(s) of the training data left out", name, left_out)
    return name, checked


def evaluate_guard(
    models: Mapping[str, Any], processor: Any, guard: GuardSet, config: Config, *,
    experiment: ExperimentLogger | None = None,
) -> dict[str, EvaluationResult]:  # fmt: skip
    """Measure models ("stock", "tuned"), each in its own context; results are "stock (guard)" and "tuned (guard)"."""
    if experiment is not None:
        speakers = len({u.speaker for u in guard.utterances if u.speaker is not None})
        missing = dict(guard.not_measured)
        experiment.log("guard", set=guard.name, clips=len(guard.utterances), speakers=speakers, not_measured=missing)
    loader = create_loader(guard.utterances, processor, config)
    results: dict[str, EvaluationResult] = {}
    for name, model in {guard_name(name): model for name, model in models.items()}.items():
        found = results[name] = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name=name)
        logger.info("%s: %s %.3f on %d clip(s) of %s", name, found.metric, found.rate, found.n, guard.name)
        if experiment is not None:
            found.save(experiment)
    return results
