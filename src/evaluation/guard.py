"""A guard set: speech of another kind, measured with the stock and the tuned model, which shows what training forgot.

By default it is a part of LibriSpeech's test-clean, where the Hub answers, else the bundled public clip, which can only
show a model that has lost everything. LibriSpeech comes speaker by speaker, so that its head would be two voices:
rows are passed over until ten have spoken, at the cost of downloading what lies between.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from src.data.labels import apply_case, resolve_case
from src.data.loader import create_loader
from src.data.preparation import RecordingChecker, check_utterance, enforce_skip_policy
from src.data.sources.catalog import SAMPLE_CLIP, load_utterances, open_source
from src.data.sources.hub import CORPORA
from src.data.utterance import Utterance
from src.evaluation.evaluator import EvaluationResult, ModelEvaluator
from src.evaluation.report.run_files import guard_name
from src.models.weights import HUB_ERRORS, HUB_TIMEOUT_SEC
from src.utils.config import Config, DataConfig
from src.utils.errors import DataError, SourceUnavailableError, first_line
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)

CLIP_TEXT = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."
MIN_SPEAKERS = 10  # of a streamed guard set: an interval over fewer is clearly too narrow
_ENGLISH_SOURCES = frozenset({"auto", "clip", "librispeech"})


@dataclass(frozen=True)
class GuardSet:
    """Checked speech that no training saw.

    Attributes:
        name: for tables and logs.
        utterances: with durations.
        language: code of all of them; None where the source does not say.
    """

    name: str
    utterances: tuple[Utterance, ...]
    language: str | None


def prepare_guard_set(config: Config, *, exclude: Sequence[Utterance] = ()) -> GuardSet | None:
    """Fetch and check the configured guard set.

    Args:
        config: `guard`; `data` says what to do with unusable recordings of a folder or of Parquet files.
        exclude: the training data; what is of it too (same id, same words) is left out.
    Returns: the set, or None where there is none: `guard.source: none`, or English for a model of another language.
    Raises:
        SourceUnavailableError: the source that was asked for cannot be had; "auto" takes the bundled clip instead.
        DataError: nothing usable, several languages, or nothing that is not in the training data too.
    """
    source = config.guard.source
    if source == "none":
        logger.info("no guard set (guard.source: none): what training forgets is not measured")
        return None
    if source in _ENGLISH_SOURCES and _is_other_language("en", config):
        return None
    _warn_of_the_same_source(config)
    fresh = _Fresh(exclude)
    if source == "auto":
        guard = _take_first_available(config, fresh)
    elif source == "clip":
        guard = _bundled_clip(config, fresh)
    else:
        guard = _from_librispeech(config, fresh) if source == "librispeech" else _from_files(config, fresh)
    if _is_other_language(guard.language, config):
        return None
    logger.info("guard set: %s, %d clip(s)", guard.name, len(guard.utterances))
    return guard


def evaluate_guard(
    models: Mapping[str, Any],
    processor: Any,
    guard: GuardSet,
    config: Config,
    *,
    experiment: ExperimentLogger | None = None,
) -> dict[str, EvaluationResult]:
    """Measure models on a guard set, each in its own context.

    Args:
        models: by name, "stock" and "tuned".
        processor: of all of them.
        experiment: the run that keeps the results, so that `summarize_run` finds them.
    Returns: results named "stock (guard)", "tuned (guard)"; none where the guard set is in another language.
    Raises: DataError: as `create_loader` and `ModelEvaluator`.
    """
    if _is_other_language(guard.language, config):
        return {}
    if experiment is not None:
        speakers = len({u.speaker for u in guard.utterances if u.speaker is not None})
        experiment.log("guard", set=guard.name, clips=len(guard.utterances), speakers=speakers)
    loader = create_loader(guard.utterances, processor, config)
    results: dict[str, EvaluationResult] = {}
    for model_name, model in models.items():
        name = guard_name(model_name)
        results[name] = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name=name)
        logger.info("%s: WER %.3f on %d clip(s) of %s", name, results[name].wer, results[name].n, guard.name)
        if experiment is not None:
            results[name].save(experiment)
    return results


class _Fresh:
    """Leaves out what is in the training data too, and remembers whether that was all."""

    def __init__(self, exclude: Iterable[Utterance]) -> None:
        self._known = {_identity(u) for u in exclude}
        self.left_out = 0

    def __call__(self, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
        for utterance in utterances:
            if _identity(utterance) in self._known:
                self.left_out += 1
            else:
                yield utterance

    def finish(self, name: str, utterances: Sequence[Utterance]) -> GuardSet:
        """Recase what was checked, and make the set of it."""
        if not utterances and self.left_out:
            raise DataError(
                f"guard set {name}: each of its {self.left_out} clips is in the training data too, so it shows nothing "
                "of what is forgotten; set guard.source to other speech, or to none"
            )
        if not utterances:
            raise DataError(f"guard set {name}: no usable clip; set guard.source to other speech, or to none")
        if self.left_out:
            logger.warning("guard set %s: %d clip(s) of the training data left out", name, self.left_out)
        case = resolve_case([u.text for u in utterances], "auto")
        recased = tuple(replace(u, text=apply_case(u.text, case)) for u in utterances)
        return GuardSet(name, recased, _common_language(name, recased))


def _take_first_available(config: Config, fresh: _Fresh) -> GuardSet:
    reason = _why_the_hub_is_silent(CORPORA["librispeech"].id)
    if reason is None:
        try:
            return _from_librispeech(config, fresh)
        except SourceUnavailableError as err:
            reason = str(err)
    logger.warning(
        "guard set: the bundled public clip, which shows only a model that has lost everything; LibriSpeech cannot be "
        "had (%s). guard.source: folder or parquet takes speech of yours", reason,
    )  # fmt: skip
    return _bundled_clip(config, fresh)


def _why_the_hub_is_silent(data_set: str) -> str | None:
    """Ask the Hub once: `datasets` itself asks for half a minute before it says that there is no network."""
    if Path(data_set).is_dir():
        return None
    try:
        HfApi().dataset_info(data_set, timeout=HUB_TIMEOUT_SEC)
    except HUB_ERRORS as err:
        return f"{type(err).__name__}: {first_line(err)}"
    return None


def _bundled_clip(config: Config, fresh: _Fresh) -> GuardSet:
    clip = Utterance("jfk", SAMPLE_CLIP, CLIP_TEXT, language="en")
    checked = [check_utterance(u, DataConfig()) for u in fresh([clip])]
    return fresh.finish("bundled public clip", checked)


def _from_librispeech(config: Config, fresh: _Fresh) -> GuardSet:
    data = DataConfig(source="librispeech", on_error="skip")  # it has clips beyond 30 s
    streams = open_source(data, "librispeech")
    assert isinstance(streams, dict)  # as every source of the Hub
    clips = config.guard.max_clips
    stream = _spread(fresh(streams["test"]), max_per_speaker=math.ceil(clips / MIN_SPEAKERS))
    checker = RecordingChecker(config.model_copy(update={"data": data}))
    checked = checker.take_stream("guard", stream, clips)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), data.max_skip_fraction)
    return fresh.finish("LibriSpeech test-clean", checked)


def _spread(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
    taken: Counter[str | None] = Counter()
    for utterance in stream:
        if utterance.speaker is None or taken[utterance.speaker] < max_per_speaker:
            taken[utterance.speaker] += 1
            yield utterance


def _from_files(config: Config, fresh: _Fresh) -> GuardSet:
    keys = ("min_duration_sec", "max_duration_sec", "on_error", "max_skip_fraction")
    data = DataConfig.model_validate(
        {"source": config.guard.source, "path": config.guard.path, **{key: getattr(config.data, key) for key in keys}}
    )
    listed = list(fresh(load_utterances(data)))
    checker = RecordingChecker(config.model_copy(update={"data": data}))
    checked = checker.take("guard", listed, config.guard.max_clips)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), data.max_skip_fraction)
    return fresh.finish(str(config.guard.path), checked)


def _warn_of_the_same_source(config: Config) -> None:
    guard, data = config.guard, config.data
    same_path = guard.path is not None and data.path is not None and guard.path.resolve() == data.path.resolve()
    if same_path or (guard.source in ("auto", "librispeech") and "librispeech" in data.chosen_sources):
        logger.warning(
            "guard set: %s is among the sources of the training data too; where that was taken, the guard set is no "
            "speech of another kind", guard.path if same_path else "LibriSpeech",
        )  # fmt: skip


def _identity(utterance: Utterance) -> tuple[str, str]:
    """The id and the letters of the text: recasing keeps both, and two corpora may both have a clip 0001."""
    return utterance.id, "".join(filter(str.isalnum, utterance.text.lower()))


def _common_language(name: str, utterances: Sequence[Utterance]) -> str | None:
    codes = {u.language.replace("_", "-").split("-")[0].lower() for u in utterances if u.language}
    if len(codes) > 1:
        raise DataError(f"guard set {name}: it is in {', '.join(sorted(codes))}; keep the clips of one language")
    return codes.pop() if codes else None


def _is_other_language(language: str | None, config: Config) -> bool:
    wanted = config.model.language
    if language is None or wanted is None or language == wanted:
        return False
    logger.warning("no guard set: it is in %r, the model transcribes %r (model.language)", language, wanted)
    return True
