"""Mixes of stock and tuned weights: a straight line between the two, measured on the validation set.

A point on the line often keeps most of what tuning gained and loses less of what the stock model knew.
Source: WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
from src.models.export.verify import choose_clips
from src.utils.config import Config
from src.utils.errors import ModelError
from src.utils.runtime import broadcast_object, is_main_process, wait_for_all
from src.utils.tracking import ExperimentLogger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixResult:
    """Error rates of all mixes on the validation set, and the best of them."""

    rows: tuple[dict[str, Any], ...]  # by share of the tuned weights: share, metric, rate, audio_context, clips, chosen
    best_share: float  # with the lowest rate; 0 is the stock model
    saved_to: Path | None = None  # folder of the saved mix; None if none won, or no folder was given

    @property
    def keep_stock(self) -> bool:
        """Whether no share has a lower rate than the stock model."""
        return self.best_share == 0

    def to_frame(self) -> pd.DataFrame:
        """Return `rows` as a table."""
        return pd.DataFrame(self.rows)

    def describe(self) -> str:
        """Return the result in one sentence."""
        return describe_mix(self.rows)


def choose_mix(
    model: DynamicWhisper,
    stock_model: DynamicWhisper,
    processor: Any,
    val_loader: Any,
    config: Config,
    *,
    output_dir: Path | None = None,
    experiment: ExperimentLogger | None = None,
) -> MixResult:
    """Measure mixes of stock and tuned weights on the validation set, and put the best one into the model.

    The lowest headline wins; of equal ones, the one with more of the stock weights, since what was changed less has
    forgotten less. If the stock model itself wins, the model stays as it was tuned.

    Args:
        model: tuned, plain (LoRA: its `merged_model`); changed in place, and unchanged if the sweep is interrupted.
        stock_model: that it was tuned from; measured in its own context, mixes in the tuned model's.
        processor: of both.
        val_loader: of the validation set; the test set must not choose.
        config: of the evaluation; `training.mix_shares`.
        output_dir: where a winning mix is saved with `export_huggingface`; an older export there is replaced.
        experiment: gets one row "mix" per share.

    Raises:
        ModelError: models of other keys or shapes, or the same model twice.
        DataError: nothing to measure on.
    """
    if model is stock_model:
        raise ModelError(
            "the stock model is the tuned model itself, since training changes a model in place; load the stock "
            "weights again with WhisperModelManager(config).initialize_model()"
        )
    stock, current = stock_model.state_dict(), model.state_dict()
    copies = {tensor.data_ptr(): tensor.to("cpu", copy=True) for tensor in current.values()}  # tied weights once
    tuned = {name: copies[tensor.data_ptr()] for name, tensor in current.items()}
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (stock, tuned)]
    odd = sorted(name for name in {**stock, **tuned} if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        raise ModelError(
            f"{len(odd)} weights of the stock and the tuned model do not fit, the first is {odd[0]}. Pass the stock "
            "model of the same variant, and for LoRA the merged_model of the tuned one"
        )
    final_share = 1.0
    try:
        first = ModelEvaluator(stock_model, processor, config).evaluate_dataset(val_loader, name="stock")
        rates = {0.0: first.rate}
        evaluator = ModelEvaluator(model, processor, config)
        for share in (*sorted({*config.training.mix_shares}), 1.0):
            load_mix(model, stock, tuned, share)
            rates[share] = evaluator.evaluate_dataset(val_loader, name=f"mix {share:g}").rate
        best_share = broadcast_object(min(rates, key=lambda share: (rates[share], share)))
        final_share = best_share or 1.0
    finally:  # an interrupt leaves the model as it was tuned
        load_mix(model, stock, tuned, final_share)
    tuned_context = get_audio_context(model.config)
    rows = tuple(
        {
            "share": share,
            "metric": first.metric,
            "rate": rate,
            "audio_context": tuned_context if share else first.audio_context,
            "clips": first.n,
            "chosen": share == best_share,
        }
        for share, rate in rates.items()
    )
    result = MixResult(rows, best_share)
    if experiment is not None:
        for row in rows:
            experiment.log("mix", **row)
    logger.log(logging.WARNING if result.keep_stock else logging.INFO, "%s", result.describe())
    if output_dir is not None and 0 < best_share < 1:
        if is_main_process():
            clips = choose_clips(val_loader, config.seed)
            export_huggingface(model, processor, output_dir, provenance={"mix": rows}, verify_clips=clips)
        wait_for_all()
        result = replace(result, saved_to=output_dir)
    return result


@torch.no_grad()
def load_mix(model: DynamicWhisper, stock: Mapping[str, Tensor], tuned: Mapping[str, Tensor], share: float) -> None:
    """Put (1 - share) * stock + share * tuned into a model; exactly the stock weights at 0, the tuned ones at 1."""
    targets = model.state_dict()  # the parameters' own memory
    for name, end in tuned.items():  # one after the other: a whole mix is never in memory with the two models
        start = stock[name].to(device=end.device, dtype=torch.float32)
        targets[name].copy_(torch.lerp(start, end.float(), share))
