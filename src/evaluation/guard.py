"""A guard set: speech of another kind, measured with the stock and the tuned model, to show what training forgot.

By default it is a part of LibriSpeech's test-clean if the Hub answers, otherwise the bundled public clip, which can
only show a model that has lost everything. LibriSpeech is sorted by speaker, so that its beginning would be two voices:
rows are skipped until ten speakers were heard, at the cost of downloading the rows in between.
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
        language: code of all of them; None if the source has none.
    """

    name: str
    utterances: tuple[Utterance, ...]
    language: str | None


def prepare_guard_set(config: Config, *, exclude: Sequence[Utterance] = ()) -> GuardSet | None:
    """Fetch and check the configured guard set.

    Args:
        config: `guard`; `data` says what to do with unusable recordings of a folder or of Parquet files.
        exclude: the training data; clips that are part of it too (same id, same words) are left out.

    Returns:
        None with `guard.source: none`, and if the set is in another language than the model's.

    Raises:
        SourceUnavailableError: the chosen source is unavailable; "auto" takes the bundled clip instead.
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
    take = {"auto": _first_available, "clip": _bundled_clip, "librispeech": _from_librispeech}.get(source, _from_files)
    name, utterances = take(config, fresh)
    if not utterances and fresh.left_out:
        raise DataError(
            f"guard set {name}: each of its {fresh.left_out} clips is in the training data too, so it shows nothing "
            "of what is forgotten; set guard.source to other speech, or to none"
        )
    if not utterances:
        raise DataError(f"guard set {name}: no usable clip; set guard.source to other speech, or to none")
    if fresh.left_out:
        logger.warning("guard set %s: %d clip(s) of the training data left out", name, fresh.left_out)
    languages = {u.language.replace("_", "-").split("-")[0].lower() for u in utterances if u.language}
    if len(languages) > 1:
        raise DataError(f"guard set {name}: it is in {', '.join(sorted(languages))}; keep the clips of one language")
    language = next(iter(languages), None)
    if _is_other_language(language, config):
        return None
    case = resolve_case([u.text for u in utterances], "auto")
    logger.info("guard set: %s, %d clip(s)", name, len(utterances))
    return GuardSet(name, tuple(replace(u, text=apply_case(u.text, case)) for u in utterances), language)


def _is_other_language(language: str | None, config: Config) -> bool:
    wanted = config.model.language
    if language is None or wanted is None or language == wanted:
        return False
    logger.warning("no guard set: it is in %r, the model transcribes %r (model.language)", language, wanted)
    return True


def _warn_of_the_same_source(config: Config) -> None:
    guard, data = config.guard, config.data
    same_path = guard.path is not None and data.path is not None and guard.path.resolve() == data.path.resolve()
    if same_path or (guard.source in ("auto", "librispeech") and "librispeech" in data.chosen_sources):
        logger.warning(
            "guard set: %s is among the sources of the training data too; speech from there is not speech of "
            "another kind", guard.path if same_path else "LibriSpeech",
        )  # fmt: skip


class _Fresh:
    """Filters out the training data, and counts how much that was."""

    def __init__(self, exclude: Iterable[Utterance]) -> None:
        self._known = {self._identity(u) for u in exclude}
        self.left_out = 0

    def __call__(self, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
        for utterance in utterances:
            if self._identity(utterance) in self._known:
                self.left_out += 1
            else:
                yield utterance

    @staticmethod
    def _identity(utterance: Utterance) -> tuple[str, str]:
        """The id and the letters of the text: recasing keeps both, and two corpora may both have a clip 0001."""
        return utterance.id, "".join(filter(str.isalnum, utterance.text.lower()))


def _first_available(config: Config, fresh: _Fresh) -> tuple[str, list[Utterance]]:
    corpus = CORPORA["librispeech"].id
    try:
        if not Path(corpus).is_dir():  # without a network `datasets` itself asks for half a minute
            HfApi().dataset_info(corpus, timeout=HUB_TIMEOUT_SEC)
        return _from_librispeech(config, fresh)
    except HUB_ERRORS as err:
        reason = f"{type(err).__name__}: {first_line(err)}"
    except SourceUnavailableError as err:
        reason = str(err)
    logger.warning(
        "guard set: the bundled public clip, which shows only a model that has lost everything; LibriSpeech is "
        "unavailable (%s). guard.source: folder or parquet takes speech of yours", reason,
    )  # fmt: skip
    return _bundled_clip(config, fresh)


def _bundled_clip(config: Config, fresh: _Fresh) -> tuple[str, list[Utterance]]:
    clip = Utterance("jfk", SAMPLE_CLIP, CLIP_TEXT, language="en")
    return "bundled public clip", [check_utterance(u, DataConfig()) for u in fresh([clip])]


def _from_librispeech(config: Config, fresh: _Fresh) -> tuple[str, list[Utterance]]:
    data = DataConfig(source="librispeech", on_error="skip")  # it has clips beyond 30 s
    streams = open_source(data, "librispeech")
    assert isinstance(streams, dict)  # as every source of the Hub
    stream = _spread(fresh(streams["test"]), max_per_speaker=math.ceil(config.guard.max_clips / MIN_SPEAKERS))
    return "LibriSpeech test-clean", _check(stream, data, config)


def _spread(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
    taken: Counter[str | None] = Counter()
    for utterance in stream:
        if utterance.speaker is None or taken[utterance.speaker] < max_per_speaker:
            taken[utterance.speaker] += 1
            yield utterance


def _from_files(config: Config, fresh: _Fresh) -> tuple[str, list[Utterance]]:
    keys = ("min_duration_sec", "max_duration_sec", "on_error", "max_skip_fraction")
    data = DataConfig.model_validate(
        {"source": config.guard.source, "path": config.guard.path, **{key: getattr(config.data, key) for key in keys}}
    )
    return str(config.guard.path), _check(list(fresh(load_utterances(data))), data, config)


def _check(clips: list[Utterance] | Iterator[Utterance], data: DataConfig, config: Config) -> list[Utterance]:
    checker = RecordingChecker(config.model_copy(update={"data": data}))
    checked = checker.take("guard", clips, config.guard.max_clips)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), data.max_skip_fraction)
    return checked


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
        guard: from `prepare_guard_set`.
        config: as for `ModelEvaluator`.
        experiment: the run that records the results, so that `summarize_run` finds them.

    Returns:
        Results named "stock (guard)", "tuned (guard)"; none if the guard set is in another language.

    Raises:
        DataError: as `create_loader` and `ModelEvaluator`.
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
