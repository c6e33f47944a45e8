"""A guard set: speech of another kind, measured with the stock and the tuned model, to show what training forgot.

LibriSpeech is sorted by speaker, so that its beginning would be two voices: rows are skipped until ten speakers were
heard, at the cost of downloading the rows in between.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from src.data.labels import apply_case, resolve_case
from src.data.loader import create_loader
from src.data.preparation import RecordingChecker, enforce_skip_policy
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


@dataclass(frozen=True)
class GuardSet:
    """Checked speech that no training saw, in one language (None if the source has none)."""

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
    """
    guard, data = config.guard, config.data
    if guard.source == "none":
        logger.info("no guard set (guard.source: none): what training forgets is not measured")
        return None
    if guard.source not in ("folder", "parquet") and _is_other_language("en", config):
        return None
    same_path = guard.path is not None and data.path is not None and guard.path.resolve() == data.path.resolve()
    if same_path or (guard.source in ("auto", "librispeech") and "librispeech" in data.chosen_sources):
        logger.warning(
            "guard set: %s is among the sources of the training data too; speech from there is not speech of "
            "another kind", guard.path if same_path else "LibriSpeech",
        )  # fmt: skip
    known = {_identity(u) for u in exclude}
    if guard.source == "auto":
        corpus = CORPORA["librispeech"].id
        try:
            if not Path(corpus).is_dir():  # without a network `datasets` itself asks for half a minute
                HfApi().dataset_info(corpus, timeout=HUB_TIMEOUT_SEC)
            name, utterances, left_out = _take("librispeech", config, known)
        except (*HUB_ERRORS, SourceUnavailableError) as err:
            reason = str(err) if isinstance(err, DataError) else f"{type(err).__name__}: {first_line(err)}"
            logger.warning(
                "guard set: the bundled public clip, which shows only a model that has lost everything; LibriSpeech is "
                "unavailable (%s). guard.source: folder or parquet takes speech of yours", reason,
            )  # fmt: skip
            name, utterances, left_out = _take("clip", config, known)
    else:
        name, utterances, left_out = _take(guard.source, config, known)
    if not utterances:
        reason = f"each of its {left_out} clips is in the training data too" if left_out else "no usable clip"
        raise DataError(f"guard set {name}: {reason}; set guard.source to other speech, or to none")
    if left_out:
        logger.warning("guard set %s: %d clip(s) of the training data left out", name, left_out)
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


def _identity(utterance: Utterance) -> tuple[str, str]:
    """The id and the letters of the text: recasing keeps both, and two corpora may both have a clip 0001."""
    return utterance.id, "".join(filter(str.isalnum, utterance.text.lower()))


def _take(source: str, config: Config, known: Container[tuple[str, str]]) -> tuple[str, list[Utterance], int]:
    """Return a source's name, its checked clips, and how many were left out because they are known."""
    name, data, cap = str(config.guard.path), DataConfig(), config.guard.max_clips
    listed: Iterable[Utterance]
    if source == "clip":
        name, listed = "bundled public clip", [Utterance("jfk", SAMPLE_CLIP, CLIP_TEXT, language="en")]
    elif source == "librispeech":
        data = DataConfig(source="librispeech", on_error="skip")  # it has clips beyond 30 s
        streams = open_source(data, "librispeech")
        assert isinstance(streams, dict)  # as every source of the Hub
        name, listed = "LibriSpeech test-clean", streams["test"]
    else:
        keys = ("min_duration_sec", "max_duration_sec", "on_error", "max_skip_fraction")
        policy = {key: getattr(config.data, key) for key in keys}
        data = DataConfig.model_validate({"source": source, "path": config.guard.path, **policy})
        listed = load_utterances(data)
    left_out = 0

    def fresh() -> Iterator[Utterance]:
        nonlocal left_out
        for utterance in listed:
            if _identity(utterance) in known:
                left_out += 1
            else:
                yield utterance

    checker = RecordingChecker(config.model_copy(update={"data": data}))
    clips: list[Utterance] | Iterator[Utterance]
    if source == "librispeech":
        clips = _spread(fresh(), max_per_speaker=math.ceil(cap / MIN_SPEAKERS))
    else:
        clips = list(fresh())
    checked = checker.take("guard", clips, None if source == "clip" else cap)
    enforce_skip_policy(checker.skipped, len(checked) + len(checker.skipped), data.max_skip_fraction)
    return name, checked, left_out


def _spread(stream: Iterator[Utterance], *, max_per_speaker: int) -> Iterator[Utterance]:
    taken: Counter[str | None] = Counter()
    for utterance in stream:
        if utterance.speaker is None or taken[utterance.speaker] < max_per_speaker:
            taken[utterance.speaker] += 1
            yield utterance


def evaluate_guard(
    models: Mapping[str, Any],
    processor: Any,
    guard: GuardSet,
    config: Config,
    *,
    experiment: ExperimentLogger | None = None,
) -> dict[str, EvaluationResult]:
    """Measure models, by name ("stock", "tuned"), on a guard set, each in its own context.

    Returns:
        Results named "stock (guard)", "tuned (guard)", as `summarize_run` expects them in a run.
    """
    if experiment is not None:
        speakers = len({u.speaker for u in guard.utterances if u.speaker is not None})
        experiment.log("guard", set=guard.name, clips=len(guard.utterances), speakers=speakers)
    loader = create_loader(guard.utterances, processor, config)
    results: dict[str, EvaluationResult] = {}
    for model_name, model in models.items():
        name = guard_name(model_name)
        results[name] = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name=name)
        found = results[name]
        logger.info("%s: %s %.3f on %d clip(s) of %s", name, found.metric, found.rate, found.n, guard.name)
        if experiment is not None:
            results[name].save(experiment)
    return results
