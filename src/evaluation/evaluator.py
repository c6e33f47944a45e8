"""Evaluation by generation: the same decoder as everywhere, the loss from the same encoder pass."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from src.data.labels import IGNORE_INDEX
from src.data.loader import Shard
from src.evaluation.edits import word_counts
from src.evaluation.metrics import MetricsCalculator
from src.evaluation.results import EvaluationResult, ModelComparison, Prediction, compare_predictions
from src.inference.decoding import decode, encode
from src.inference.options import DecodingOptions
from src.models.dynamic_context import evaluation_mode, get_audio_context
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.runtime import FittingSize, gather_objects, is_main_process, world_size


@dataclass(frozen=True)
class _Decoded:
    """What a pass over batches gives; rows lack the edit counts."""

    rows: list[dict[str, Any]]
    loss_sum: float  # nats
    tokens: int
    compute_sec: float


class ModelEvaluator:
    """Measures a model on loaders from `create_dataloaders`.

    Args:
        model: in the context that its config says: a stock model is measured padded to 30 s.
        processor: of the model.
        config: `inference`, `evaluation`, `model.language`; defaults without.
    """

    def __init__(self, model: Any, processor: Any, config: Config | None = None) -> None:
        self._model = model
        self._processor = processor
        self._config = config or Config()
        self._fitting = FittingSize()
        self._calculator = MetricsCalculator(
            self._config.model.language,
            bootstrap_samples=self._config.evaluation.bootstrap_samples,
            confidence=self._config.evaluation.confidence,
            seed=self._config.seed,
        )

    def evaluate_dataset(self, loader: Any, *, name: str = "model") -> EvaluationResult:
        """Decode every clip of a loader and measure; processes that run together share the clips out.

        Args:
            name: of the model, in tables and files.
        Raises: DataError: no clip, no word in any reference, or a loader that left clips out. OutOfMemoryError: not
            even one clip fits into memory. An error of the model passes through.
        """
        decoded = _gathered(self._decode_batches(loader, desc=f"evaluating {name}"), loader)
        rows = decoded.rows
        if not rows:
            raise DataError("the loader has no clip: there is nothing to measure")
        _check_complete(rows, loader)
        rates = self._calculator.compute(
            [row["reference"] for row in rows],
            [row["hypothesis"] for row in rows],
            [row["speaker"] for row in rows],
            durations_sec=[row["duration_sec"] for row in rows],
            num_tokens=[row["num_tokens"] for row in rows],
        )
        return EvaluationResult(
            **asdict(rates),
            name=name,
            loss=decoded.loss_sum / decoded.tokens,
            audio_sec=sum(row["duration_sec"] for row in rows),
            compute_sec=decoded.compute_sec,
            audio_context=get_audio_context(self._model.config),
            rows=self._count(rows),
        )

    def evaluate_with_samples(self, loader: Any, num_samples: int = 5) -> pd.DataFrame:
        """Decode some clips, at a stride over the whole loader, and return them with their texts, worst first.

        Args:
            num_samples: clips; all where there are fewer.
        Returns: one row a clip: id, speaker, duration_sec, reference, hypothesis, wer, avg_logprob.
        Raises: DataError: no clip, or none asked for.
        """
        dataset = loader.dataset
        if num_samples < 1:
            raise DataError(f"num_samples is {num_samples}; ask for at least one clip")
        picks = np.linspace(0, len(dataset) - 1, min(num_samples, len(dataset))).round().astype(int).tolist()
        size = self._config.inference.batch_size
        batches = [picks[at : at + size] for at in range(0, len(picks), size)]
        decoded = self._decode_batches(
            (loader.collate_fn([dataset[i] for i in batch]) for batch in batches), desc="samples", total=len(batches)
        )
        table = pd.DataFrame([{**asdict(row), "wer": row.wer} for row in self._count(decoded.rows)])
        shown = table[["id", "speaker", "duration_sec", "reference", "hypothesis", "wer", "avg_logprob"]]
        return shown.sort_values("wer", ascending=False, ignore_index=True, kind="stable")

    def compare(self, stock: Any, tuned: Any, loader: Any = None) -> ModelComparison:
        """Measure two models of this processor on the same clips, and say whether they differ.

        Args:
            stock, tuned: models, or what `evaluate_dataset` gave for them.
            loader: of the clips; needed where one of the two is a model.
        Raises: DataError: a model without a loader; results of other clips, or of another normaliser.
        """
        first, second = self._result_of(stock, "stock", loader), self._result_of(tuned, "tuned", loader)
        if first.normalizer != second.normalizer:
            raise DataError(
                f"{first.name!r} was measured with {first.normalizer}, {second.name!r} with {second.normalizer}; "
                "evaluate both with the same model.language"
            )
        return ModelComparison(first, second, compare_predictions(first.rows, second.rows, self._calculator.bootstrap))

    def _result_of(self, subject: Any, name: str, loader: Any) -> EvaluationResult:
        if isinstance(subject, EvaluationResult):
            return subject
        if loader is None:
            raise DataError(f"compare: the {name} model has not been measured; pass the loader to measure it on")
        return ModelEvaluator(subject, self._processor, self._config).evaluate_dataset(loader, name=name)

    def _count(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Prediction, ...]:
        counts = word_counts(
            [row["reference"] for row in rows], [row["hypothesis"] for row in rows], self._calculator.normalizer
        )
        return tuple(
            Prediction(
                **row,
                substitutions=count.substitutions,
                deletions=count.deletions,
                insertions=count.insertions,
                reference_words=count.reference,
            )
            for row, count in zip(rows, counts, strict=True)
        )

    def _decode_batches(self, batches: Iterable[Any], *, desc: str, total: int | None = None) -> _Decoded:
        """Decode batches in evaluation mode and give the model back in the mode it came in."""
        parts: list[_Decoded] = []
        with evaluation_mode(self._model), torch.inference_mode():
            for batch in tqdm(batches, desc=desc, total=total, leave=False, disable=not is_main_process()):
                parts += self._fitting.run(partial(self._decode_rows, batch), batch["ids"])
        return _joined(parts)

    def _decode_rows(self, whole: Mapping[str, Any], first: int, last: int) -> _Decoded:
        batch = _rows(whole, first, last)
        audios, lengths = batch["audio"], batch["audio_lengths"].tolist()
        options = DecodingOptions.from_config(self._config)
        self._synchronize()
        began = time.perf_counter()
        encoded = encode(self._model, audios, options.trailing_silence_sec, lengths=lengths)
        decoded = decode(self._model, self._processor, audios, options, lengths=lengths, encoder_outputs=encoded)
        self._synchronize()
        compute_sec = time.perf_counter() - began
        loss_sum, tokens = self._teacher_forced_loss(encoded, batch)
        rows = [
            {
                "id": batch["ids"][i],
                "speaker": batch["speakers"][i],
                "duration_sec": batch["durations"][i],
                "reference": batch["texts"][i],
                "hypothesis": result.text,
                "avg_logprob": result.avg_logprob,
                "latency_sec": compute_sec / len(audios),
                "num_tokens": len(result.tokens),
                "meta": batch["meta"][i],
            }
            for i, result in enumerate(decoded)
        ]
        return _Decoded(rows, loss_sum, tokens, compute_sec)

    def _teacher_forced_loss(self, encoded: Any, batch: Mapping[str, Any]) -> tuple[float, int]:
        """Return the summed cross-entropy in nats over the batch's text and end tokens, and their number."""
        device = encoded.last_hidden_state.device
        labels = batch["labels"].to(device)
        logits = self._model(
            encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"].to(device), use_cache=False
        ).logits  # (B, L, vocabulary)
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return float(loss), int((labels != IGNORE_INDEX).sum())

    def _synchronize(self) -> None:
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _rows(batch: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """Cut clips out of a batch; its padding stays."""
    return {key: values[first:last] for key, values in batch.items()}


def _check_complete(rows: Sequence[Mapping[str, Any]], loader: Any) -> None:
    """A rate over the clips that happened to come is no rate of the set."""
    expected = len(loader.dataset) if hasattr(loader, "dataset") else len(rows)
    if len(rows) != expected:
        raise DataError(
            f"{len(rows)} clips were measured of {expected}: the loader leaves some out; create it with "
            "`create_loader`, without `shuffle` and `drop_last`"
        )


def _gathered(decoded: _Decoded, loader: Any) -> _Decoded:
    """Join what several processes decoded of a loader that deals its batches out; every clip is there exactly once."""
    sampler = getattr(loader, "batch_sampler", None)
    if world_size() == 1 or getattr(sampler, "shard", Shard()).world_size == 1:
        return decoded
    joined = _joined(gather_objects(decoded))
    if len(joined.rows) != len(loader.dataset) or len({row["id"] for row in joined.rows}) != len(joined.rows):
        raise DataError(
            f"{len(joined.rows)} clips were measured of {len(loader.dataset)}: the processes were given other loaders; "
            "create the same one in each"
        )
    return joined


def _joined(parts: Sequence[_Decoded]) -> _Decoded:
    return _Decoded(
        rows=[row for part in parts for row in part.rows],
        loss_sum=sum(part.loss_sum for part in parts),
        tokens=sum(part.tokens for part in parts),
        compute_sec=sum(part.compute_sec for part in parts),
    )
