"""Mixes of stock and tuned weights: a straight line between the two, measured on the validation set.

A point on the line often keeps most of what tuning gained and loses less of what the stock model knew. It costs no
training, one evaluation per share, and nothing when the mix is used.
Source: WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903:
theta = (1 - share) * theta_stock + share * theta_tuned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.report.summary import describe_mix
from src.models.dynamic_context import DynamicWhisper, get_audio_context
from src.models.export.huggingface import export_huggingface
from src.utils.config import Config
from src.utils.errors import DataError, ModelError
from src.utils.runtime import broadcast_object, is_main_process, wait_for_all
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixResult:
    """Word error rates of all mixes, and the best of them.

    Attributes:
        shares: of the tuned weights, ascending; 0 is the stock model, 1 the tuned one.
        wers: of each share, on the validation set.
        audio_contexts: in which each was measured: the stock model in its own, the others in the tuned model's.
        clips: of the validation set. The lowest of several rates on one set flatters; few clips flatter more.
        best_share: with the lowest WER.
        keep_stock: no share has a lower WER than the stock model.
        saved_to: folder of the saved mix; None if none won, or no folder was given.
    """

    shares: tuple[float, ...]
    wers: tuple[float, ...]
    audio_contexts: tuple[str, ...]
    clips: int
    best_share: float
    keep_stock: bool
    saved_to: Path | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per share: share, wer, audio_context, clips, chosen."""
        measured = zip(self.shares, self.wers, self.audio_contexts, strict=True)
        return [
            {"share": share, "wer": wer, "audio_context": context, "clips": self.clips}
            | {"chosen": share == self.best_share}
            for share, wer, context in measured
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return `rows` as a table."""
        return pd.DataFrame(self.rows())

    def describe(self) -> str:
        """Return the result in one sentence."""
        return describe_mix(self.rows())


def choose_mix(
    model: DynamicWhisper,
    stock_model: DynamicWhisper,
    processor: Any,
    val_loader: Any,
    config: Config,
    *,
    shares: Sequence[float] | None = None,
    tuned_wer: float | None = None,
    output_dir: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    experiment: ExperimentLogger | None = None,
) -> MixResult:
    """Measure mixes of stock and tuned weights, and put the best one into the model.

    The lowest WER wins; of equal ones, the one with more of the stock weights, since what was changed less has
    forgotten less and equal is no gain. If the stock model itself wins, the model stays as it was tuned.

    Args:
        model: tuned, plain (LoRA: its `merged_model`); changed in place, and unchanged if the sweep is interrupted.
        stock_model: that it was tuned from; measured in its own context, mixes in the tuned model's.
        processor: of both.
        val_loader: of the validation set; the test set must not choose.
        config: of the evaluation; `training.mix_shares`.
        shares: of the tuned weights, between 0 and 1; `training.mix_shares` by default.
        tuned_wer: of the model on this loader and in this precision, if it is known already.
        output_dir: where a winning mix is saved with `export_huggingface`; an older export there is replaced.
        provenance: of the tuned model, for the file saved with the mix, which also says its share.
        experiment: gets one row "mix" per share.

    Returns:
        All rates, and what was chosen.

    Raises:
        ModelError: models of other keys or shapes, the same model twice, or a share outside of 0 to 1.
        DataError: nothing to measure on, or `tuned_wer` is not finite.
    """
    tried = sorted({*(config.training.mix_shares if shares is None else shares)})
    _check_request(model, stock_model, tried, tuned_wer)
    stock, tuned = stock_model.state_dict(), _cpu_copy(model.state_dict())
    final_share = 1.0
    try:
        first = ModelEvaluator(stock_model, processor, config).evaluate_dataset(val_loader, name="stock")
        wers = {0.0: first.wer}
        evaluator = ModelEvaluator(model, processor, config)
        for share in tried if tuned_wer is not None else (*tried, 1.0):
            load_mix(model, stock, tuned, share)
            wers[share] = evaluator.evaluate_dataset(val_loader, name=f"mix {share:g}").wer
        wers[1.0] = wers[1.0] if tuned_wer is None else tuned_wer
        best_share = broadcast_object(min(wers, key=lambda share: (wers[share], share)))
        final_share = best_share or 1.0
    finally:  # an interrupt leaves the model as it was tuned
        load_mix(model, stock, tuned, final_share)
    contexts = (first.audio_context, *[get_audio_context(model.config)] * (len(wers) - 1))
    result = MixResult(tuple(wers), tuple(wers.values()), contexts, first.n, best_share, keep_stock=best_share == 0)
    if experiment is not None:
        for row in result.rows():
            experiment.log("mix", **row)
    logger.log(logging.WARNING if result.keep_stock else logging.INFO, "%s", result.describe())
    if output_dir is not None and 0 < best_share < 1:
        if is_main_process():
            export_huggingface(model, processor, output_dir, provenance={**(provenance or {}), "mix": result.rows()})
        wait_for_all()
        result = replace(result, saved_to=output_dir)
    return result


def _check_request(
    model: DynamicWhisper, stock_model: DynamicWhisper, shares: Sequence[float], tuned_wer: float | None
) -> None:
    if model is stock_model:
        raise ModelError(
            "the stock model is the tuned model itself, since training changes a model in place; load the stock "
            "weights again with WhisperModelManager(config).initialize_model()"
        )
    stock, tuned = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()} for each in (stock_model, model)
    )
    odd = [name for name in sorted({**stock, **tuned}) if stock.get(name) != tuned.get(name)]
    if odd:
        raise ModelError(
            f"{len(odd)} weights of the stock and the tuned model do not fit, the first is {odd[0]} (stock: "
            f"{stock.get(odd[0], 'absent')}, tuned: {tuned.get(odd[0], 'absent')}). Pass the stock model of the same "
            "variant, and for LoRA the merged_model of the tuned one"
        )
    outside = [share for share in shares if not 0 < share < 1]
    if outside:
        raise ModelError(f"shares {outside}: give shares of the tuned weights between 0 and 1; 0 and 1 are tried too")
    if tuned_wer is not None and not math.isfinite(tuned_wer):
        raise DataError(f"tuned_wer is {tuned_wer}; pass the model's WER on this loader, or None to measure it")


@torch.no_grad()
def load_mix(model: DynamicWhisper, stock: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> None:
    """Put (1 - share) * stock + share * tuned into a model; exactly the stock weights at 0, the tuned ones at 1."""
    targets = model.state_dict()  # the parameters' own memory
    for name, end in tuned.items():  # one after the other: a whole mix is never in memory with the two models
        start = stock[name].to(device=end.device, dtype=torch.float32)
        targets[name].copy_(torch.lerp(start, end.float(), share))


def _cpu_copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU; tied weights once."""
    copies = {tensor.data_ptr(): tensor.detach().to("cpu", copy=True) for tensor in state.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in state.items()}
