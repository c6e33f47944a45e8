"""Evaluation by generation: the same decoder as everywhere, the loss from the same encoder pass."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from src.data.labels import IGNORE_INDEX
from src.evaluation.metrics import MetricsCalculator, PairedComparison, word_counts
from src.inference.decoding import DecodingOptions, decode, encode
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.tracking import ExperimentLogger


@dataclass(frozen=True)
class Prediction:
    """One decoded clip.

    Attributes:
        substitutions, deletions, insertions, reference_words: under the result's normaliser.
        avg_logprob: mean natural-log probability of its tokens.
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
    def wer(self) -> float:
        """Word error rate of this clip; nan where its reference is empty."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / self.reference_words if self.reference_words else float("nan")


@dataclass(frozen=True, eq=False)
class EvaluationResult(Mapping[str, Any]):
    """Rates of one model on one set, as attributes and as a read-only mapping (`results["wer"]`, `results.wer`).

    Attributes: as `ErrorRates`, and
        name: of the model.
        loss: token-weighted mean cross-entropy in nats, teacher-forced.
        rtf: compute (features, encoder, decoder) over audio, a ratio of sums.
        rows: one `Prediction` a clip; not a key of the mapping.
    """

    name: str
    n: int
    normalizer: str
    wer: float
    wer_low: float
    wer_high: float
    cer: float
    wer_plain: float
    wer_plain_low: float
    wer_plain_high: float
    cer_plain: float
    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    blocks: str
    num_blocks: int
    confidence: float
    loss: float
    audio_sec: float
    compute_sec: float
    audio_context: str
    rows: tuple[Prediction, ...]

    @property
    def rtf(self) -> float:
        """Real-time factor."""
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
        return [f.name for f in fields(cls) if f.name != "rows"] + ["rtf"]

    def save(self, experiment: ExperimentLogger) -> None:
        """Append the rates to the run's metrics.jsonl and the rows to its predictions.jsonl."""
        with experiment.predictions_path.open("a", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps({"model": self.name, **asdict(row)}, ensure_ascii=False) + "\n")
        experiment.log("evaluation", **self)


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

    def evaluate_dataset(self, loader: Any, *, name: str = "model") -> EvaluationResult:
        """Decode every clip of a loader and measure.

        Raises: DataError: no clip, or no word in any reference. An error of the model passes through.
        """
        rows: list[dict[str, Any]] = []
        loss_sum, tokens, compute_sec = 0.0, 0, 0.0
        was_training = self._model.training
        self._model.eval()
        try:
            for batch in tqdm(loader, desc=f"evaluating {name}", leave=False):
                decoded, batch_loss, batch_tokens, batch_sec = self._evaluate_batch(batch)
                rows += decoded
                loss_sum, tokens, compute_sec = loss_sum + batch_loss, tokens + batch_tokens, compute_sec + batch_sec
        finally:
            self._model.train(was_training)
        if not rows:
            raise DataError("the loader has no clip: there is nothing to measure")
        calculator = self._calculator()
        texts = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
        rates = calculator.compute(*texts, [row["speaker"] for row in rows])
        counts = word_counts(*texts, calculator.normalizer)
        return EvaluationResult(
            name=name,
            **asdict(rates),
            loss=loss_sum / tokens,
            audio_sec=sum(row["duration_sec"] for row in rows),
            compute_sec=compute_sec,
            audio_context=self._model.audio_context,
            rows=tuple(
                Prediction(**row, substitutions=c.substitutions, deletions=c.deletions, insertions=c.insertions,
                           reference_words=c.reference)
                for row, c in zip(rows, counts, strict=True)
            ),
        )  # fmt: skip

    def evaluate_with_samples(self, loader: Any, num_samples: int = 5) -> pd.DataFrame:
        """Decode some clips, at a stride over the whole loader, and return them with their texts, worst first."""
        dataset = loader.dataset
        if not len(dataset):
            raise DataError("the loader has no clip: there is nothing to show")
        picks = np.linspace(0, len(dataset) - 1, min(num_samples, len(dataset))).round().astype(int)
        batch = loader.collate_fn([dataset[int(i)] for i in picks])
        result = self.evaluate_dataset([batch], name="samples")
        table = pd.DataFrame([{**asdict(row), "wer": row.wer} for row in result.rows])
        shown = table[["id", "duration_sec", "reference", "hypothesis", "wer", "avg_logprob"]]
        return shown.sort_values("wer", ascending=False, ignore_index=True)

    def compare(self, first: EvaluationResult, second: EvaluationResult) -> PairedComparison:
        """Compare two results on the same clips by a paired bootstrap; the difference is second minus first."""
        return compare_predictions(first.rows, second.rows, self._calculator())

    def _calculator(self) -> MetricsCalculator:
        return MetricsCalculator(
            self._config.model.language,
            bootstrap_samples=self._config.evaluation.bootstrap_samples,
            confidence=self._config.evaluation.confidence,
            seed=self._config.seed,
        )

    @torch.inference_mode()
    def _evaluate_batch(self, batch: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float, int, float]:
        """Return rows, summed loss in nats, number of label tokens, compute seconds."""
        audios = [audio[:n].numpy() for audio, n in zip(batch["audio"].cpu(), batch["audio_lengths"], strict=True)]
        options = DecodingOptions.from_config(self._config)
        self._synchronize()
        began = time.perf_counter()
        encoded = encode(self._model, audios, options.trailing_silence_sec)
        decoded = decode(self._model, self._processor, audios, options, encoder_outputs=encoded)
        self._synchronize()
        compute_sec = time.perf_counter() - began
        device = encoded.last_hidden_state.device
        labels = batch["labels"].to(device)
        logits = self._model(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"].to(device)).logits
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
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
        return rows, float(loss), int((labels != IGNORE_INDEX).sum()), compute_sec

    def _synchronize(self) -> None:
        if next(self._model.parameters()).device.type == "cuda":
            torch.cuda.synchronize()


def compare_predictions(
    first: Sequence[Prediction], second: Sequence[Prediction], calculator: MetricsCalculator
) -> PairedComparison:
    """Compare two models' rows by a paired bootstrap, matched by clip id.

    Raises: DataError: they are not of the same clips.
    """
    other = {row.id: row for row in second}
    if set(other) != {row.id for row in first}:
        raise DataError(
            f"the models were measured on different clips ({len(first)} and {len(second)}) and cannot be compared; "
            "evaluate both on the same loader"
        )
    return calculator.compare(
        [row.reference for row in first],
        [row.hypothesis for row in first],
        [other[row.id].hypothesis for row in first],
        [row.speaker for row in first],
    )
