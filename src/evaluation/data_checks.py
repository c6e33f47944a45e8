"""Checks of the data by a model before training: the likeliest style of transcripts, and clips that it gets wrong.

A model of full context encodes 30 s for each clip, so both look at a few clips, chosen by a hash, and say how many.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from src.data.dataset import decode_audio
from src.data.labels import (
    CAPITAL_NOUNS,
    IGNORE_INDEX,
    Group,
    LabelCase,
    LabelEncoder,
    LabelStyle,
    apply_case,
    case_in,
    group_of,
    resolve_case,
    source_text,
)
from src.data.loader import create_loader
from src.data.preparation import DatasetSplits
from src.data.report.findings import Finding, counted, fits_script, languages_of_script, sort_findings
from src.data.report.report import DataReport
from src.data.utterance import Utterance, hashed_choice
from src.evaluation.evaluator import ModelEvaluator, sum_loss
from src.evaluation.metrics import second_normalizer, word_counts
from src.inference.torch_engine import encode, language_logprobs
from src.inference.words import Vocabulary
from src.models.dynamic_context import evaluation_mode
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from src.utils.languages import UNSPACED, language_name, text_language
from src.utils.logging_config import ProgressBar

logger = logging.getLogger(__name__)

STYLES: tuple[LabelCase, ...] = ("keep", "lower", "sentence")
MIN_GAP_NATS = 1.0  # per transcript; below it the choice of style makes no difference that a few clips could show
HARD_RATE = 1.0
HEARD_CLIPS = 20
MIN_AGREEMENT = 0.8  # of the clips on their language
_STYLE_TOPIC, _HARD_TOPIC = "label style", "hard clips"


def fill_languages(splits: DatasetSplits, model: Any, processor: Any, config: Config) -> DatasetSplits:
    """Give rows that do not say their language the one that a model hears in them; all others stay as they are.

    It hears at most `HEARD_CLIPS` of those rows, chosen by hash, and one language is chosen for all of them in every
    split: by the sum of its log-probabilities, among the languages of the transcripts' script (base hears Urdu in
    Hindi). English-only models hear nothing but English.
    """
    unmarked = [u for u in splits.utterances if u.language is None]
    if not unmarked:
        return splits
    spoken = "en"
    if Vocabulary.of(processor.tokenizer).multilingual:
        chosen = hashed_choice(unmarked, HEARD_CLIPS, config.seed)
        heard = measure_languages(model, processor, chosen, config)
        translated = config.model.task == "translate"
        if not translated:
            heard = heard[languages_of_script([u.text for u in chosen], list(heard.columns))]
        spoken = str(heard.sum().idxmax())
        each = zip(heard.idxmax(axis=1), chosen, strict=False)
        agreeing = sum(code == spoken and (translated or fits_script(u.text, spoken)) for code, u in each)
        found = f"{counted(len(unmarked))} without a language: taken as {language_name(spoken)} ({spoken})"
        found += f", which the model hears in {agreeing} of {len(chosen)}"
        if agreeing < MIN_AGREEMENT * len(chosen):
            logger.warning("%s; set model.language if that is wrong, or add a column `language`", found)
        else:
            logger.info("%s", found)
    filled: dict[str, Any] = {
        name: [u if u.language is not None else replace(u, language=spoken) for u in part]
        for name, part in splits.parts.items()
    }
    return replace(splits, **filled).with_label_case(config.data.label_case)  # capitals depend on the language


@torch.inference_mode()
def measure_languages(model: Any, processor: Any, utterances: Sequence[Utterance], config: Config) -> pd.DataFrame:
    """Return the natural-log probability of each language, a column, in each utterance, a row."""
    vocabulary = Vocabulary.of(processor.tokenizer)
    rows: list[list[float]] = []
    size = config.inference.batch_size
    with evaluation_mode(model):
        for at in ProgressBar(range(0, len(utterances), size), desc="languages", leave=False):
            audios = [decode_audio(u) for u in utterances[at : at + size]]
            encoded = encode(model, audios, config.inference.trailing_silence_sec)
            rows += language_logprobs(model, vocabulary, encoded).tolist()
    return pd.DataFrame(rows, columns=list(vocabulary.languages), index=[u.id for u in utterances])


def add_model_checks(
    report: DataReport, model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *,
    max_hard_clips: int = 64,
) -> DataReport:  # fmt: skip
    """Return the report with the findings of a model; older findings of a model are replaced.

    `utterances` are those of the report, checked, with their source's text in `meta["source_text"]` if they were
    recased; at most `max_hard_clips` of them are decoded. The model is in evaluation mode.
    """
    styles = measure_label_styles(model, processor, utterances, config)
    hard = find_hard_clips(model, processor, utterances, config, max_clips=max_hard_clips)

    findings = [finding for finding in report.findings if finding.topic not in (_STYLE_TOPIC, _HARD_TOPIC)]
    groups = _groups(styles)
    for (source, language), table in groups.items():
        current, best, gap_nats = _likeliest(table, (source, language), config)
        name = "" if len(groups) < 2 else f"{', '.join(filter(None, (source, language_name(str(language)))))}: "
        costs = {_named(style): nats for style, nats in _costs(table).items()}
        listed = ", ".join(f"{style} {nats:.1f}" for style, nats in costs.items())
        message = f"{name}nats per transcript on {table['clips'].iloc[0]} of {counted(len(utterances))}: {listed}"
        message += f"; configured: {_named(current)}"
        if text_language(str(language), config.model.task) in CAPITAL_NOUNS and "sentence" in (current.case, best.case):
            message += "; in sentence case nouns stay small"
        advice = f"set data.label_case: {best.case}, unless the results must be written in another style"
        if best.case == current.case:
            advice = "with_label_case(choose_label_case(report, config)) takes the likelier one"
        likelier = gap_nats >= MIN_GAP_NATS
        findings.append(Finding("warning" if likelier else "info", _STYLE_TOPIC, message, advice if likelier else ""))

    decoded = min(max_hard_clips, len(utterances))
    clips = counted(len(utterances))
    message = f"{len(hard):,} decoded with more errors than words, of {decoded:,} of {clips}"
    advice = "listen to them: the transcript may be of another clip or language, or there is no clear speech"
    ids = tuple(hard["id"].head(5))
    findings.append(Finding("warning" if ids else "info", _HARD_TOPIC, message, advice if ids else "", ids))
    return replace(report, findings=sort_findings(findings), label_styles=styles, hard_clips=hard)


def choose_label_case(
    report: DataReport, config: Config
) -> LabelCase | dict[str | None, LabelStyle] | dict[Group, LabelStyle]:
    """Return how to write the transcripts in training, for `DatasetSplits.with_label_case`.

    With "auto" it is the likeliest case by `add_model_checks`, else the configured one; and the space that labels begin
    with is the likelier one. Where languages or the sources of a mix differ in that, it is one style for each.

    Raises:
        DataError: the report has no label styles, or older ones.
    """
    if report.label_styles is None or "language" not in report.label_styles:  # or of before languages were told apart
        if config.data.label_case != "auto":
            return config.data.label_case
        raise DataError("the report has no label styles; pass it through add_model_checks first")
    chosen: dict[Group, LabelStyle] = {}
    for group, table in _groups(report.label_styles).items():
        current, best, gap_nats = _likeliest(table, group, config)
        chosen[group] = best if gap_nats >= MIN_GAP_NATS else current
    if "source" in report.label_styles:
        return chosen
    first, *others = set(chosen.values())
    if not others and first.space is None:
        return first.case
    return {language: style for (_, language), style in chosen.items()}


def _groups(styles: pd.DataFrame) -> dict[Group, pd.DataFrame]:
    """Return the rows of each group of transcripts; a table without a mix has no column source."""
    keys = [styles.get("source", pd.Series(None, styles.index, dtype=object)), styles["language"]]
    named = [column.astype(object).where(column.notna(), None) for column in keys]
    groups = pd.Series(list(zip(*named, strict=True)), styles.index)
    return {group: styles[[each == group for each in groups]] for group in dict.fromkeys(groups)}


def _costs(table: pd.DataFrame) -> dict[LabelStyle, float]:
    """Return the nats of each style of one language; the space that it has by default is None."""
    default = bool(table.loc[table["configured"], "space"].iloc[0])
    rows = table.to_dict("records")
    return {LabelStyle(r["style"], None if r["space"] == default else r["space"]): r["nats"] for r in rows}


def _likeliest(table: pd.DataFrame, group: Group, config: Config) -> tuple[LabelStyle, LabelStyle, float]:
    """Return the configured style, the cheapest allowed, and how many nats per transcript it saves; 0 if they tie."""
    costs, is_free = _costs(table), case_in(group, config.data.label_case, config.data.label_cases) == "auto"
    current = LabelStyle(table.loc[table["configured"], "style"].iloc[0])
    allowed = [style for style in costs if is_free or style.case == current.case]
    best = min(allowed, key=lambda style: (round(costs[style], 6), style != current, style.space is not None))
    return current, best, costs[current] - costs[best]


def _named(style: LabelStyle) -> str:
    return style.case + {None: "", True: " with a space", False: " without a space"}[style.space]


@torch.inference_mode()
def measure_label_styles(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, num_clips: int = 16
) -> pd.DataFrame:
    """Measure how likely the transcripts of clips chosen by hash are to a model in each style of writing.

    Returns:
        One row per language, style and space, in a mix per source too (a column source): language, style ("keep" is
        the source's own), space (whether the text begins with one), nats (teacher-forced negative log-likelihood of
        text and end token, summed over a transcript, mean of the clips), clips, example (the first clip's transcript),
        configured (by `data.label_case`, with the space that is usual in the language).
    """
    if model.training:
        raise ModelError("the model is in training mode, whose dropout blurs the result; call model.eval() first")
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    sources, groups = config.data.label_cases, dict[Group, list[Utterance]]()
    for utterance in utterances:
        source, language = group_of(utterance, sources)
        groups.setdefault((source, language or config.model.language), []).append(utterance)
    each = max(num_clips // 4, num_clips // len(groups))
    rows = []
    for (source, language), spoken in groups.items():
        written = text_language(language, config.model.task)
        usual = written not in UNSPACED
        wanted = case_in((source, language), config.data.label_case, sources)
        configured = resolve_case([source_text(u) for u in spoken], wanted)
        chosen = hashed_choice(spoken, each, config.seed)
        nats = _measure_styles(model, processor, chosen, language, config)
        first = source_text(chosen[0])
        rows += [
            (source, language, case, space, total / len(chosen), len(chosen), apply_case(first, case, written),
             (case, space) == (configured, usual))
            for (case, space), total in nats.items()
        ]  # fmt: skip
    columns = ["source", "language", "style", "space", "nats", "clips", "example", "configured"]
    return pd.DataFrame(rows, columns=columns).drop(columns=[] if sources else ["source"])


def _measure_styles(
    model: Any, processor: Any, utterances: Sequence[Utterance], language: str | None, config: Config
) -> dict[tuple[LabelCase, bool], float]:
    """Return the nats of all utterances, which are in one language, by case and space."""
    encoder = LabelEncoder(processor.tokenizer, language=language, task=config.model.task)
    written = text_language(language, config.model.task)
    pad = partial(pad_sequence, batch_first=True)
    sums = {(case, space): 0.0 for space in (True, False) for case in STYLES}
    size = config.inference.batch_size
    for at in ProgressBar(range(0, len(utterances), size), desc="label styles", leave=False):
        batch = utterances[at : at + size]
        encoded = encode(model, [decode_audio(u) for u in batch], config.inference.trailing_silence_sec)
        for case, space in sums:
            texts = [apply_case(source_text(u), case, written) for u in batch]
            labels = [encoder.label(encoder.tokenize(text, space=space)) for text in texts]
            inputs = pad([torch.tensor(label.decoder_input_ids) for label in labels])  # (B, L)
            targets = pad([torch.tensor(label.labels) for label in labels], padding_value=IGNORE_INDEX)  # (B, L)
            sums[case, space] += float(sum_loss(model, encoded, inputs, targets))
    return sums


def find_hard_clips(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, max_clips: int = 64
) -> pd.DataFrame:
    """Decode some clips as evaluation does and return those with an error rate above 1.

    There the model invents text, or hears another text or language than the transcript. Clips are chosen by hash.

    Returns:
        One row per clip, worst first: id, duration_sec, reference, hypothesis, rate (the lower one of both
        normalisers: "3 4 2 8" for "three four two eight" is no mistake of the data).
    """
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    chosen = hashed_choice(utterances, max_clips, config.seed)
    # workers would take longer to start than these clips take to decode
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    loader = create_loader(chosen, processor, alone)
    decoded = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name="hard clips").rows
    rows = []
    for row in decoded:
        second = second_normalizer(text_language(row.language, config.model.task), [row.reference])
        (count,) = word_counts([row.reference], [row.hypothesis], second)
        if row.reference_words and count.reference_words:
            rate = min(row.rate, count.errors / count.reference_words)
            rows.append((row.id, row.duration_sec, row.reference, row.hypothesis, rate))
    frame = pd.DataFrame(rows, columns=["id", "duration_sec", "reference", "hypothesis", "rate"])
    worst = frame[frame["rate"] > HARD_RATE]
    return worst.sort_values("rate", ascending=False, ignore_index=True, kind="stable")
