"""What only a model can tell about data: which style of transcripts it finds likeliest, and which clips it gets wrong.

Meant for the stock model, before training. A model of full context encodes 30 s for each clip, about 0.9 s of computing
for tiny.en on a CPU core, so both checks look at a few clips, chosen by a hash, and say how many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from src.data.dataset import decode_audio
from src.data.labels import IGNORE_INDEX, EncodedLabel, LabelCase, LabelEncoder, apply_case, resolve_case
from src.data.loader import create_loader
from src.data.report.findings import Finding, count_clips, sort_findings
from src.data.report.report import DataReport, hashed_choice
from src.data.utterance import Utterance
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.text import PLAIN, word_counts
from src.inference.decoding import encode
from src.utils.config import Config
from src.utils.errors import DataError, ModelError

STYLES: tuple[LabelCase, ...] = ("keep", "lower", "sentence")
MIN_GAP_NATS = 1.0  # a transcript; below it the choice of style makes no difference that a few clips could show
HARD_WER = 1.0
_STYLE_TOPIC, _HARD_TOPIC = "label style", "hard clips"


@dataclass(frozen=True)
class StyleCost:
    """What one way of writing costs.

    Attributes:
        style: as for `data.label_case`; "keep" is the source's own.
        space: whether the text begins with the space that Whisper always writes; labels always have it.
        nats: teacher-forced negative log-likelihood of text and end token, summed over a transcript, mean of the clips.
        example: the first clip's transcript.
    """

    style: LabelCase
    space: bool
    nats: float
    example: str


@dataclass(frozen=True)
class LabelStyles:
    """Costs of the styles on the same clips.

    Attributes:
        costs: every style with the space, then without.
        configured: the style of the configuration, "auto" resolved.
        checked, total: clips that were measured, and of how many they were chosen.
    """

    costs: tuple[StyleCost, ...]
    configured: LabelCase
    checked: int
    total: int

    @property
    def best(self) -> LabelCase:
        """The cheapest style, with the space; the configured one where it is no dearer."""
        return min(STYLES, key=lambda style: (round(self._nats(style), 6), style != self.configured))

    @property
    def gap_nats(self) -> float:
        """What the configured style costs more than the best one, nats a transcript."""
        return self._nats(self.configured) - self._nats(self.best)

    def table(self) -> pd.DataFrame:
        """Return one row a way of writing: style, space, nats, clips, example."""
        rows = [
            {"style": c.style, "space": c.space, "nats": c.nats, "clips": self.checked, "example": c.example}
            for c in self.costs
        ]
        return pd.DataFrame(rows)

    def describe(self) -> str:
        """Return the result in a sentence."""
        listed = ", ".join(f"{style} {self._nats(style):.1f}" for style in STYLES)
        found = f"nats a transcript on {self.checked:,} of {count_clips(self.total)}: {listed}; "
        if self.gap_nats < MIN_GAP_NATS:
            return found + f"{self.configured!r}, as configured, is as likely to the model as any"
        return found + f"{self.best!r} is {self.gap_nats:.1f} nats likelier than {self.configured!r}, as configured"

    def _nats(self, style: LabelCase) -> float:
        return next(cost.nats for cost in self.costs if cost.space and cost.style == style)


@dataclass(frozen=True, eq=False)
class HardClips:
    """Clips with a WER above 1: the model invents text, or hears another text or language than the transcript.

    Attributes:
        frame: one row a clip, worst first: id, duration_sec, reference, hypothesis, wer (the lower one of both
            normalisers: "3 4 2 8" for "three four two eight" is no mistake of the data).
        checked, total: clips that were decoded, and of how many they were chosen.
    """

    frame: pd.DataFrame
    checked: int
    total: int

    def describe(self) -> str:
        """Return the result in a sentence."""
        return (
            f"{count_clips(len(self.frame))} of {self.checked:,} decoded with more errors than words; "
            f"{self.checked:,} of {self.total:,} were looked at"
        )


def measure_label_styles(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, num_clips: int = 16
) -> LabelStyles:
    """Measure how likely the transcripts are to a model in each style of writing.

    Args:
        model: in evaluation mode and in the context that its config says.
        utterances: with their source's text in `meta["source_text"]` where they were recased.
        num_clips: chosen by hash; all where there are fewer.
    Raises: DataError: no utterance, or a transcript over 448 tokens. ModelError: the model is in training mode.
    """
    if model.training:
        raise ModelError("the model is in training mode, whose dropout blurs the result; call model.eval() first")
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    chosen = hashed_choice(utterances, num_clips, config.seed)
    encoder = LabelEncoder(processor.tokenizer, language=config.model.language, task=config.model.task)
    ways = [(style, space) for space in (True, False) for style in STYLES]
    sums = dict.fromkeys(ways, 0.0)
    size = config.inference.batch_size
    for at in tqdm(range(0, len(chosen), size), desc="label styles", leave=False):
        batch = chosen[at : at + size]
        encoded = encode(model, [decode_audio(u) for u in batch], config.inference.trailing_silence_sec)
        for style, space in ways:
            texts = [apply_case(_source_text(u), style).strip() for u in batch]
            labels = [_encode_label(encoder, processor.tokenizer, text, space=space) for text in texts]
            sums[style, space] += _negative_log_likelihood(model, encoded, labels)
    first = _source_text(chosen[0])
    costs = tuple(StyleCost(s, space, sums[s, space] / len(chosen), apply_case(first, s)) for s, space in ways)
    configured = resolve_case([_source_text(u) for u in utterances], config.data.label_case)
    return LabelStyles(costs, configured, len(chosen), len(utterances))


def find_hard_clips(
    model: Any, processor: Any, utterances: Sequence[Utterance], config: Config, *, max_clips: int = 64
) -> HardClips:
    """Decode some clips as evaluation does and return those with a WER above 1.

    Args:
        model: in the context that its config says.
        utterances: checked.
        max_clips: chosen by hash; all where there are fewer.
    Raises: DataError: no utterance, or no word in any transcript.
    """
    if not utterances:
        raise DataError("no utterance: there is nothing to measure")
    chosen = hashed_choice(utterances, max_clips, config.seed)
    # workers would take longer to start than these clips take to decode
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    loader = create_loader(chosen, processor, alone)
    result = ModelEvaluator(model, processor, config).evaluate_dataset(loader, name="hard clips")
    plain = word_counts([row.reference for row in result.rows], [row.hypothesis for row in result.rows], PLAIN)
    rows = []
    for row, count in zip(result.rows, plain, strict=True):
        wer = (
            min(row.wer, count.errors / count.reference_words)
            if row.reference_words and count.reference_words
            else math.nan
        )
        rows.append((row.id, row.duration_sec, row.reference, row.hypothesis, wer))
    frame = pd.DataFrame(rows, columns=["id", "duration_sec", "reference", "hypothesis", "wer"])
    frame = frame[frame["wer"] > HARD_WER]
    frame = frame.sort_values("wer", ascending=False, ignore_index=True, kind="stable")
    return HardClips(frame, len(result.rows), len(utterances))


def add_model_checks(
    report: DataReport,
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    config: Config,
    *,
    num_style_clips: int = 16,
    max_hard_clips: int = 64,
) -> DataReport:
    """Return the report with what a model says about the data; older answers of a model are replaced.

    Raises: DataError, ModelError: as `measure_label_styles` and `find_hard_clips`.
    """
    styles = measure_label_styles(model, processor, utterances, config, num_clips=num_style_clips)
    hard = find_hard_clips(model, processor, utterances, config, max_clips=max_hard_clips)
    kept = [finding for finding in report.findings if finding.topic not in (_STYLE_TOPIC, _HARD_TOPIC)]
    findings = sort_findings([*kept, _style_finding(styles), _hard_finding(hard)])
    return replace(report, findings=findings, label_styles=styles.table(), hard_clips=hard.frame)


def choose_label_case(report: DataReport, config: Config) -> LabelCase:
    """Return the case to train with: what the configuration asks for, or with "auto" the likeliest to the model.

    Args:
        report: from `add_model_checks`.
        config: `data.label_case`.
    Raises: DataError: "auto", and no model was asked.
    """
    if config.data.label_case != "auto":
        return config.data.label_case
    if report.label_styles is None:
        raise DataError("the report has no label styles; pass it through add_model_checks first")
    costs: dict[LabelCase, float] = {
        row["style"]: row["nats"] for row in report.label_styles.to_dict("records") if row["space"]
    }
    current = next(style for style in STYLES if style == report.label_case)
    best = min(STYLES, key=costs.__getitem__)
    return best if costs[current] - costs[best] >= MIN_GAP_NATS else current


def _style_finding(styles: LabelStyles) -> Finding:
    if styles.gap_nats < MIN_GAP_NATS:
        return Finding("info", _STYLE_TOPIC, styles.describe())
    advice = f"set data.label_case: {styles.best}, unless the results must be written in another style"
    return Finding("warning", _STYLE_TOPIC, styles.describe(), advice)


def _hard_finding(hard: HardClips) -> Finding:
    if hard.frame.empty:
        return Finding("info", _HARD_TOPIC, hard.describe())
    advice = "listen to them: the transcript may be another clip's or in another language, or there is no clear speech"
    return Finding("warning", _HARD_TOPIC, hard.describe(), advice, tuple(hard.frame["id"].head(5)))


def _source_text(utterance: Utterance) -> str:
    return str(utterance.meta.get("source_text", utterance.text))


def _encode_label(encoder: LabelEncoder, tokenizer: Any, text: str, *, space: bool) -> EncodedLabel:
    return encoder.encode(text) if space else encoder.label(tokenizer.encode(text, add_special_tokens=False))


@torch.inference_mode()
def _negative_log_likelihood(model: Any, encoded: Any, labels: Sequence[EncodedLabel]) -> float:
    """Return nats, summed over the labels of a batch whose audio is encoded already."""
    device = next(model.parameters()).device

    def pad(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    inputs = pad([label.decoder_input_ids for label in labels], 0)  # (B, L)
    targets = pad([label.labels for label in labels], IGNORE_INDEX)  # (B, L)
    logits = model(encoder_outputs=encoded, decoder_input_ids=inputs, use_cache=False).logits  # (B, L, vocabulary)
    nats = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return float(nats)
