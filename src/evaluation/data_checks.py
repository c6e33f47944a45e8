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
from tqdm.auto import tqdm

from src.data.dataset import decode_audio
from src.data.labels import IGNORE_INDEX, LabelCase, LabelEncoder, apply_case, resolve_case
from src.data.loader import create_loader
from src.data.preparation import DatasetSplits
from src.data.report.findings import Finding, count_clips, sort_findings
from src.data.report.report import DataReport, hashed_choice
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator, sum_loss
from src.evaluation.metrics import PLAIN, word_counts
from src.inference.torch_engine import encode
from src.inference.words import Vocabulary
from src.models.dynamic_context import evaluation_mode
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from src.utils.languages import language_name

logger = logging.getLogger(__name__)

STYLES: tuple[LabelCase, ...] = ("keep", "lower", "sentence")
MIN_GAP_NATS = 1.0  # per transcript; below it the choice of style makes no difference that a few clips could show
HARD_WER = 1.0
HEARD_CLIPS = 20
MIN_AGREEMENT = 0.8  # of the clips on their language
_STYLE_TOPIC, _HARD_TOPIC = "label style", "hard clips"


def fill_languages(splits: DatasetSplits, model: Any, processor: Any, config: Config) -> DatasetSplits:
    """Give rows that do not say their language the one that a model hears in them; all others stay as they are.

    It hears at most `HEARD_CLIPS` of those rows, chosen by hash, and one language is chosen for all of them in every
    split: by the sum of its log-probabilities. English-only models hear nothing but English.
    """
    unmarked = [u for u in splits.utterances if u.language is None]
    if not unmarked:
        return splits
    spoken = "en"
    if Vocabulary.of(processor.tokenizer).multilingual:
        chosen = hashed_choice(unmarked, HEARD_CLIPS, config.seed)
        heard = measure_languages(model, processor, chosen, config)
        total = heard.sum()
        spoken = str(total.idxmax())
        agreeing = int((heard.idxmax(axis=1) == spoken).sum())
        found = f"{count_clips(len(unmarked))} without a language: taken as {language_name(spoken)} ({spoken})"
        found += f", which the model hears in {agreeing} of {len(chosen)}"
        if agreeing < MIN_AGREEMENT * len(chosen):
            logger.warning("%s; set model.language if that is wrong, or add a column `language`", found)
        else:
            logger.info("%s", found)
    filled: dict[str, Any] = {
        name: [u if u.language is not None else replace(u, language=spoken) for u in part]
        for name, part in splits.parts.items()
    }
    return replace(splits, **filled)


@torch.inference_mode()
def measure_languages(model: Any, processor: Any, utterances: Sequence[Utterance], config: Config) -> pd.DataFrame:
    """Return the natural-log probability of each language, a column, in each utterance, a row."""
    vocabulary = Vocabulary.of(processor.tokenizer)
    rows: list[list[float]] = []
    size = config.inference.batch_size
    with evaluation_mode(model):
        for at in tqdm(range(0, len(utterances), size), desc="languages", leave=False):
            audios = [decode_audio(u) for u in utterances[at : at + size]]
            encoded = encode(model, audios, config.inference.trailing_silence_sec)
            start = torch.full((len(audios), 1), vocabulary.start, device=model.device)
            logits = model(encoder_outputs=encoded, decoder_input_ids=start, use_cache=False).logits[:, 0]
            rows += logits[:, list(vocabulary.languages.values())].float().log_softmax(dim=-1).tolist()
    return pd.DataFrame(rows, columns=list(vocabulary.languages), index=[u.id for u in utterances])


def add_model_checks(
    report: DataReport,
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    config: Config,
    *,
    max_hard_clips: int = 64,
) -> DataReport:
    """Return the report with the findings of a model; older findings of a model are replaced.

    `utterances` are those of the report, checked, with their source's text in `meta["source_text"]` if they were
    recased; at most `max_hard_clips` of them are decoded. The model is in evaluation mode.
    """
    styles = measure_label_styles(model, processor, utterances, config)
    hard = find_hard_clips(model, processor, utterances, config, max_clips=max_hard_clips)

    configured = resolve_case([_source_text(u) for u in utterances], config.data.label_case)
    costs, (best, gap_nats) = _costs(styles), _likeliest(styles, configured)
    findings = [finding for finding in report.findings if finding.topic not in (_STYLE_TOPIC, _HARD_TOPIC)]

    listed = ", ".join(f"{style} {costs[style]:.1f}" for style in STYLES)
    clips = count_clips(len(utterances))
    message = f"nats per transcript on {styles['clips'][0]} of {clips}: {listed}; configured: {configured}"
    advice = f"set data.label_case: {best}, unless the results must be written in another style"
    likelier = gap_nats >= MIN_GAP_NATS
    findings.append(Finding("warning" if likelier else "info", _STYLE_TOPIC, message, advice if likelier else ""))

    decoded = min(max_hard_clips, len(utterances))
    message = f"{len(hard):,} decoded with more errors than words, of {decoded:,} of {clips}"
    advice = "listen to them: the transcript may be of another clip or language, or there is no clear speech"
    ids = tuple(hard["id"].head(5))
    findings.append(Finding("warning" if ids else "info", _HARD_TOPIC, message, advice if ids else "", ids))
    return replace(report, findings=sort_findings(findings), label_styles=styles, hard_clips=hard)


def choose_label_case(report: DataReport, config: Config) -> LabelCase:
    """Return the case to train with: the configured one, or with "auto" the likeliest by `add_model_checks`."""
    if config.data.label_case != "auto":
        return config.data.label_case
    if report.label_styles is None:
        raise DataError("the report has no label styles; pass it through add_model_checks first")
    current = next(style for style in STYLES if style == report.label_case)
    best, gap_nats = _likeliest(report.label_styles, current)
    return best if gap_nats >= MIN_GAP_NATS else current


def _costs(styles: pd.DataFrame) -> dict[LabelCase, float]:
    return {row["style"]: row["nats"] for row in styles.to_dict("records") if row["space"]}


def _likeliest(styles: pd.DataFrame, configured: LabelCase) -> tuple[LabelCase, float]:
    """Return the cheapest style, and how many nats per transcript the configured one costs more; 0 if they tie."""
    costs = _costs(styles)
    best = min(STYLES, key=lambda style: (round(costs[style], 6), style != configured))
    return best, costs[configured] - costs[best]


@torch.inference_mode()
def measure_label_styles(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, num_clips: int = 16
) -> pd.DataFrame:
    """Measure how likely the transcripts of clips chosen by hash are to a model in each style of writing.

    Returns:
        One row per style and space: style ("keep" is the source's own), space (whether the text begins with the space
        that Whisper always writes; labels always have it), nats (teacher-forced negative log-likelihood of text and end
        token, summed over a transcript, mean of the clips), clips, example (the first clip's transcript).
    """
    if model.training:
        raise ModelError("the model is in training mode, whose dropout blurs the result; call model.eval() first")
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    chosen = hashed_choice(utterances, num_clips, config.seed)
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    tokenize, pad = processor.tokenizer.encode, partial(pad_sequence, batch_first=True)
    ways = [(style, space) for space in (True, False) for style in STYLES]
    sums = dict.fromkeys(ways, 0.0)
    size = config.inference.batch_size
    for at in tqdm(range(0, len(chosen), size), desc="label styles", leave=False):
        batch = chosen[at : at + size]
        encoded = encode(model, [decode_audio(u) for u in batch], config.inference.trailing_silence_sec)
        for style, space in ways:
            texts = [apply_case(_source_text(u), style).strip() for u in batch]
            tokens = [tokenize(" " * space + text, add_special_tokens=False) if text else () for text in texts]
            labels = [encoder.label(each, language=u.language) for each, u in zip(tokens, batch, strict=True)]
            inputs = pad([torch.tensor(label.decoder_input_ids) for label in labels])  # (B, L)
            targets = pad([torch.tensor(label.labels) for label in labels], padding_value=IGNORE_INDEX)  # (B, L)
            sums[style, space] += sum_loss(model, encoded, inputs, targets)
    first = _source_text(chosen[0])
    rows = [(s, space, sums[s, space] / len(chosen), len(chosen), apply_case(first, s)) for s, space in ways]
    return pd.DataFrame(rows, columns=["style", "space", "nats", "clips", "example"])


def _source_text(utterance: Utterance) -> str:
    return str(utterance.meta.get("source_text", utterance.text))


def find_hard_clips(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, max_clips: int = 64
) -> pd.DataFrame:
    """Decode some clips as evaluation does and return those with a WER above 1.

    There the model invents text, or hears another text or language than the transcript. Clips are chosen by hash.

    Returns:
        One row per clip, worst first: id, duration_sec, reference, hypothesis, wer (the lower one of both normalisers:
        "3 4 2 8" for "three four two eight" is no mistake of the data).
    """
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    chosen = hashed_choice(utterances, max_clips, config.seed)
    # workers would take longer to start than these clips take to decode
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    loader = create_loader(chosen, processor, alone)
    decoded = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name="hard clips").rows
    plain = word_counts([row.reference for row in decoded], [row.hypothesis for row in decoded], PLAIN)
    rows = [
        (row.id, row.duration_sec, row.reference, row.hypothesis, min(row.rate, count.errors / count.reference_words))
        for row, count in zip(decoded, plain, strict=True)
        if row.reference_words and count.reference_words
    ]
    frame = pd.DataFrame(rows, columns=["id", "duration_sec", "reference", "hypothesis", "wer"])
    worst = frame[frame["wer"] > HARD_WER]
    return worst.sort_values("wer", ascending=False, ignore_index=True, kind="stable")
