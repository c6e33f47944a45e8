"""Evaluation by generation: the same decoder as everywhere, the loss from the same encoder pass."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from src.data.batching import Shard
from src.data.labels import IGNORE_INDEX
from src.evaluation.metrics import (
    Bootstrap,
    EditCounts,
    ErrorRates,
    MetricsCalculator,
    PairedComparison,
    compare_counts,
    word_counts,
)
from src.inference.decoding import DecodingOptions, decode, encode
from src.models.dynamic_context import get_audio_context
from src.utils.atomic import write_text_atomic
from src.utils.config import Config
from src.utils.distributed import gather_objects, is_main_process, world_size
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger


@dataclass(frozen=True)
class Prediction:
    """One decoded clip.

    Attributes:
        substitutions, deletions, insertions, reference_words: under the result's normaliser.
        avg_logprob: mean natural-log probability of its tokens; nan with beams.
        latency_sec: of its batch, divided by the batch's clips.
    """

    id: str
    speaker: str | None
    duration_sec: float
    reference: str
    hypothesis: str
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    avg_logprob: float
    latency_sec: float

    @property
    def counts(self) -> EditCounts:
        """Word edits."""
        return EditCounts(self.substitutions, self.deletions, self.insertions, self.reference_words)

    @property
    def wer(self) -> float:
        """Word error rate of this clip; nan where its reference is empty."""
        return self.counts.errors / self.reference_words if self.reference_words else math.nan


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(ErrorRates, Mapping[str, Any]):
    """Rates of one model on one set, as attributes and as a read-only mapping (`results["wer"]`, `results.wer`).

    Attributes: as `ErrorRates`, and
        name: of the model.
        loss: token-weighted mean cross-entropy in nats, teacher-forced.
        audio_sec: audio measured, without padding.
        compute_sec: wall time of features, encoder and decoder; not of decoding files, nor of the loss.
        audio_context: "full" (each clip padded to 30 s) or "dynamic".
        rows: one `Prediction` a clip; not a key of the mapping.
    """

    name: str
    loss: float
    audio_sec: float
    compute_sec: float
    audio_context: str
    rows: tuple[Prediction, ...] = field(repr=False)

    @property
    def rtf(self) -> float:
        """Real-time factor, a ratio of sums: compute_sec / audio_sec."""
        return self.compute_sec / self.audio_sec

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    @classmethod
    def _keys(cls) -> list[str]:
        return ["name", *(f.name for f in fields(cls) if f.name not in ("name", "rows")), "rtf"]

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the rates to the run's metrics.jsonl and put the rows into its predictions.jsonl."""
        self.write_predictions(experiment.predictions_path)
        experiment.log("evaluation", **self)

    def write_predictions(self, path: Path) -> None:
        """Put the rows into a JSONL file, in place of older rows of this model; others stay.

        The file changes as a whole or not at all, so that measuring twice never leaves a mixture.
        """
        older = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [line for line in older if json.loads(line)["model"] != self.name]
        for row in self.rows:
            values = {key: None if value != value else value for key, value in asdict(row).items()}  # nan is not JSON
            lines.append(json.dumps({"model": self.name, **values}, ensure_ascii=False, allow_nan=False))
        write_text_atomic(path, "".join(f"{line}\n" for line in lines))


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
        Raises: DataError: no clip, or no word in any reference. An error of the model passes through.
        """
        decoded = _gathered(self._decode_batches(loader, desc=f"evaluating {name}"), loader)
        rows = decoded.rows
        if not rows:
            raise DataError("the loader has no clip: there is nothing to measure")
        rates = self._calculator.compute(
            [row["reference"] for row in rows], [row["hypothesis"] for row in rows], [row["speaker"] for row in rows]
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

    def compare(self, first: EvaluationResult, second: EvaluationResult) -> PairedComparison:
        """Compare two results on the same clips (stock, then tuned) with this evaluator's intervals.

        Raises: DataError: other clips, or another normaliser.
        """
        if first.normalizer != second.normalizer:
            raise DataError(
                f"{first.name!r} was measured with {first.normalizer}, {second.name!r} with {second.normalizer}; "
                "evaluate both with the same model.language"
            )
        return compare_predictions(first.rows, second.rows, self._calculator.bootstrap)

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
        with _evaluation_mode(self._model), torch.inference_mode():
            for batch in tqdm(batches, desc=desc, total=total, leave=False, disable=not is_main_process()):
                parts.append(self._decode_batch(batch))
        return _joined(parts)

    def _decode_batch(self, batch: Mapping[str, Any]) -> _Decoded:
        audios = [audio[:n].numpy() for audio, n in zip(batch["audio"].cpu(), batch["audio_lengths"], strict=True)]
        options = DecodingOptions.from_config(self._config)
        self._synchronize()
        began = time.perf_counter()
        encoded = encode(self._model, audios, options.trailing_silence_sec)
        decoded = decode(self._model, self._processor, audios, options, encoder_outputs=encoded)
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


def compare_predictions(
    first: Sequence[Prediction], second: Sequence[Prediction], bootstrap: Bootstrap | None = None
) -> PairedComparison:
    """Compare two models' rows by a paired bootstrap of their counts, matched by clip id.

    Raises: DataError: they are not of the same clips with the same references, or an id stands twice.
    """
    other = {row.id: row for row in second}
    if not first or set(other) != {row.id for row in first} or not len(first) == len(second) == len(other):
        raise DataError(
            f"the models were measured on different clips ({len(first)} and {len(second)}) and cannot be compared; "
            "evaluate both on the same loader, whose ids are unique"
        )
    matched = [other[row.id] for row in first]
    changed = [a.id for a, b in zip(first, matched, strict=True) if a.reference != b.reference]
    if changed:
        raise DataError(
            f"the references of {len(changed)} clips differ between the models (first: {changed[0]}); "
            "evaluate both on the same loader"
        )
    return compare_counts(
        [row.counts for row in first], [row.counts for row in matched], [row.speaker for row in first], bootstrap
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


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    # module by module: part of a model may be frozen in evaluation mode while the rest trains
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
