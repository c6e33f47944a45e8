"""Evaluation by generation: the same decoder as everywhere, and the loss from the same encoder pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from src.data.labels import IGNORE_INDEX
from src.evaluation import metrics
from src.evaluation.metrics import Bootstrap, EditCounts, ErrorRates, Kind, MetricsCalculator, PairedComparison
from src.inference.engine_base import DecodingResult, encoded_batches
from src.inference.greedy import release_graphs
from src.inference.options import DecodingOptions
from src.inference.torch_engine import Encoded, TorchEngine, encode
from src.inference.words import Vocabulary
from src.models.dynamic_context import decoder_states, evaluation_mode, get_audio_context
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.files import json_line, read_run_rows, write_bytes_atomic
from src.utils.logging_config import ProgressBar
from src.utils.runtime import FittingSize, gather_objects, is_main_process, world_size
from src.utils.tracking import ExperimentLogger


@dataclass(frozen=True, kw_only=True)
class Prediction(EditCounts):
    """One decoded clip, with its edits in units of its normaliser."""

    id: str
    speaker: str | None
    duration_sec: float
    reference: str
    hypothesis: str
    avg_logprob: float  # mean of its tokens, natural; nan with beams
    latency_sec: float  # of its batch, divided by the batch's clips
    num_tokens: int | None = None  # text tokens of the hypothesis; None in rows of older runs, like the next two
    language: str | None = None  # of the speech, Whisper's code; None: nothing said which
    normalizer: str | None = None  # of its counts
    truncated: bool = False  # the text ended at a limit
    meta: Mapping[str, Any] = field(default_factory=dict)  # of the source (age, gender, ...), and `snr_db`

    @property
    def rate(self) -> float:
        """Error rate of this clip in units of its normaliser; nan if its reference is empty."""
        return self.errors / self.reference_words if self.reference_words else math.nan

    @property
    def kind(self) -> Kind:
        """What decides how it is counted."""
        return Kind(self.language or metrics.UNKNOWN, self.normalizer or metrics.PLAIN)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(ErrorRates, Mapping[str, Any]):
    """Rates of one model on one set, as attributes and as a read-only mapping (`results["rate"]`, `results.rate`)."""

    name: str  # of the model
    loss: float  # token-weighted mean cross-entropy in nats, teacher-forced
    audio_sec: float  # without padding
    compute_sec: float  # wall time of features, encoder and decoder; not of decoding files, nor of the loss
    audio_context: str  # "full" (each clip padded to 30 s) or "dynamic"
    rows: tuple[Prediction, ...] = field(repr=False)  # not a key of the mapping

    @property
    def rtf(self) -> float:
        """Real-time factor, a ratio of sums: compute_sec / audio_sec."""
        return self.compute_sec / self.audio_sec

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        if key == "rates_by_language":  # as in metrics.jsonl
            return {language: asdict(rate) for language, rate in self.rates_by_language.items()}
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
        """Put the rows into a JSONL file, in place of older rows of this model; it changes as a whole or not at all."""
        older = read_run_rows(path, key="model") if path.exists() else []
        rows = [row for row in older if row["model"] != self.name]
        rows += [{"model": self.name, "id": row.id, **asdict(row)} for row in self.rows]
        write_bytes_atomic(path, b"".join(map(json_line, rows)))


@dataclass(frozen=True)
class ModelComparison:
    """The stock and the tuned model on the same clips; `difference` is tuned against stock, negative is better."""

    stock: EvaluationResult
    tuned: EvaluationResult
    difference: PairedComparison


class _Measured(NamedTuple):
    rows: list[dict[str, Any]]  # of `Prediction`, before its text is counted
    loss_sum: Any  # float or tensor, over `tokens`, in nats; on the device until all batches are decoded
    tokens: int
    compute_sec: float

    @classmethod
    def joined(cls, parts: Sequence[_Measured]) -> _Measured:
        rows = [row for part in parts for row in part.rows]
        loss_sum, tokens = sum(part.loss_sum for part in parts), sum(part.tokens for part in parts)
        return cls(rows, loss_sum, tokens, sum(part.compute_sec for part in parts))


class ModelEvaluator:
    """Measures a model on loaders from `create_dataloaders`; a stock model is measured padded to 30 s.

    `config` gives `inference`, `evaluation` and `model.language`.
    """

    def __init__(self, model: Any, processor: Any, config: Config | None = None) -> None:
        self._model = model
        self._processor = processor
        self._config = config or Config()
        self._fitting = FittingSize()  # of batches: halved where memory runs out
        self._calculator = MetricsCalculator.from_config(self._config)
        multilingual = Vocabulary.of(processor.tokenizer).multilingual
        self._language = self._config.model.language or (None if multilingual else "en")  # of rows that say none

    def evaluate_dataset(self, loader: Any, *, name: str = "model") -> EvaluationResult:
        """Decode every clip of a loader and measure; processes that run together share the clips.

        Raises:
            DataError: no clip, no word in any reference, or a loader that left clips out.
            OutOfMemoryError: not even one clip fits into memory. Another error of the model passes through.
        """
        decoded = self._decode_batches(loader, desc=f"evaluating {name}")
        sampler = getattr(loader, "batch_sampler", None)
        if shared := world_size() > 1 and getattr(sampler, "world_size", 1) > 1:
            decoded = _Measured.joined(gather_objects(decoded))
        rows = self._count(decoded.rows)
        measured = len({row.id for row in rows}) if shared else len(rows)  # each clip must be there exactly once
        expected = len(loader.dataset) if hasattr(loader, "dataset") else measured
        if not measured == len(rows) == expected:
            raise DataError(
                f"{measured} clips were measured of {expected}: the loader leaves some out, or processes have other "
                "loaders; create it with `create_loader`, without `shuffle` and `drop_last`, alike in each process"
            )
        if not rows:
            raise DataError("the loader has no clip: there is nothing to measure")
        durations_sec = [row.duration_sec for row in rows]
        rates = self._calculator.compute(
            [row.reference for row in rows], [row.hypothesis for row in rows], [row.speaker for row in rows],
            languages=[row.language for row in rows], durations_sec=durations_sec,
            num_tokens=[row.num_tokens for row in rows], truncated=sum(row.truncated for row in rows),
        )  # fmt: skip
        return EvaluationResult(
            **vars(rates), name=name, loss=float(decoded.loss_sum) / decoded.tokens, audio_sec=sum(durations_sec),
            compute_sec=decoded.compute_sec, audio_context=get_audio_context(self._model.config), rows=tuple(rows),
        )  # fmt: skip

    def evaluate_with_samples(self, loader: Any, num_samples: int = 5) -> pd.DataFrame:
        """Decode some clips, at a stride over the whole loader (all, if it has fewer), and return them worst first.

        Returns:
            One row per clip: id, speaker, duration_sec, reference, hypothesis, rate, avg_logprob.
        """
        dataset = loader.dataset
        if num_samples < 1 or not len(dataset):
            raise DataError(f"num_samples is {num_samples} of {len(dataset)} clips; at least one clip is needed")
        picks = np.linspace(0, len(dataset) - 1, min(num_samples, len(dataset))).round().astype(int).tolist()
        size = self._config.inference.batch_size
        batches = [picks[at : at + size] for at in range(0, len(picks), size)]
        decoded = self._decode_batches(
            (loader.collate_fn([dataset[i] for i in batch]) for batch in batches), desc="samples", total=len(batches)
        )
        columns = ["id", "speaker", "duration_sec", "reference", "hypothesis", "rate", "avg_logprob"]
        rows = self._count(decoded.rows)
        table = pd.DataFrame([[getattr(row, column) for column in columns] for row in rows], columns=columns)
        return table.sort_values("rate", ascending=False, ignore_index=True, kind="stable")

    def compare(self, stock: Any, tuned: Any, loader: Any) -> ModelComparison:
        """Measure two models of this processor on the same clips, and test whether they differ."""
        first, second = (
            ModelEvaluator(model, self._processor, self._config).evaluate_dataset(loader, name=name)
            for name, model in (("stock", stock), ("tuned", tuned))
        )
        return ModelComparison(first, second, compare_predictions(first.rows, second.rows, self._calculator.bootstrap))

    def _count(self, rows: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        references, hypotheses = ([row[key] for row in rows] for key in ("reference", "hypothesis"))
        kinds = self._calculator.kinds_of(references, [row["language"] for row in rows])
        counts = self._calculator.count(references, hypotheses, kinds) if rows else []
        return [
            Prediction(**vars(count), **row, normalizer=kind.normalizer)
            for count, row, kind in zip(counts, rows, kinds, strict=True)
        ]

    def _decode_batches(self, batches: Iterable[Any], *, desc: str, total: int | None = None) -> _Measured:
        parts: list[_Measured] = []
        with evaluation_mode(self._model), torch.inference_mode():
            for batch in ProgressBar(batches, desc=desc, total=total, leave=False, disable=not is_main_process()):
                parts += self._fitting.run(partial(self._decode_rows, batch), batch["ids"])
        release_graphs(self._model)
        losses = torch.stack([torch.as_tensor(part.loss_sum) for part in parts]).tolist() if parts else []
        return _Measured.joined([part._replace(loss_sum=loss) for part, loss in zip(parts, losses, strict=True)])

    def _decode_rows(self, whole: Mapping[str, Any], first: int, last: int) -> _Measured:
        batch = {key: values[first:last] for key, values in whole.items()}
        audios, lengths, languages = batch["audio"], batch["audio_lengths"].tolist(), batch["languages"]
        options = DecodingOptions.from_config(self._config)
        engine, device = TorchEngine(self._model, self._processor), self._model.device

        def encode_rows(places: list[int], silence_sec: float) -> Encoded:
            return encode(self._model, audios[places], silence_sec, lengths=[lengths[i] for i in places])

        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        encoded = list(encoded_batches(engine, encode_rows, lengths, options))
        decoded: dict[int, DecodingResult] = {}
        for places, part in encoded:
            clips, spoken = [audios[i, : lengths[i]] for i in places], [languages[i] for i in places]
            decoded |= zip(places, engine.decode(part, clips, options, languages=spoken), strict=True)
        wait()
        compute_sec = time.perf_counter() - began

        inputs, labels = batch["decoder_input_ids"], batch["labels"]
        loss_sum = sum(sum_loss(self._model, part, inputs[places], labels[places]) for places, part in encoded)
        keys = {"id": "ids", "speaker": "speakers", "duration_sec": "durations", "reference": "texts", "meta": "meta"}
        rows = [
            {name: batch[key][i] for name, key in keys.items()}
            | {
                "hypothesis": result.text,
                "avg_logprob": result.avg_logprob,
                "latency_sec": compute_sec / len(audios),
                "num_tokens": len(result.tokens),
                "language": languages[i] or self._language,
                "truncated": result.truncated,
            }
            for i, result in sorted(decoded.items())
        ]
        tokens = int(np.count_nonzero(batch["labels"].numpy() != IGNORE_INDEX))
        return _Measured(rows, loss_sum, tokens, compute_sec)


def sum_loss(model: Any, encoded: Encoded, decoder_input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the teacher-forced loss of (B, L) labels in nats, summed over text and end tokens; on the device."""
    inputs = decoder_input_ids.to(model.device)
    embedded = model.model.decoder.embed_tokens(inputs)
    states = decoder_states(model, embedded, encoded.last_hidden_state, audio_mask=encoded.mask)
    logits = model.proj_out(states)  # (B, L, vocabulary)
    targets = labels.to(model.device).flatten()
    return functional.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def compare_predictions(
    first: Sequence[Prediction], second: Sequence[Prediction], bootstrap: Bootstrap | None = None
) -> PairedComparison:
    """Compare two models' rows by a paired bootstrap of their counts, matched by clip id."""
    other = {row.id: row for row in second}
    if not first or set(other) != {row.id for row in first} or not len(first) == len(second) == len(other):
        raise DataError(
            f"the models were measured on different clips ({len(first)} and {len(second)}) and cannot be compared; "
            "evaluate both on the same loader, whose ids are unique"
        )
    matched = [other[row.id] for row in first]
    names = [{a.normalizer, b.normalizer} - {None} for a, b in zip(first, matched, strict=True)]
    if other_names := next((each for each in names if len(each) > 1), None):
        raise DataError(
            f"the models were counted by {' and '.join(sorted(map(str, other_names)))}; evaluate both again"
        )
    if changed := [a.id for a, b in zip(first, matched, strict=True) if a.reference != b.reference]:
        raise DataError(
            f"the references of {len(changed)} clips differ (first: {changed[0]}); evaluate both models on one loader"
        )
    speakers, kinds = [row.speaker for row in first], [row.kind for row in first]
    return metrics.compare_counts(first, matched, speakers, bootstrap, kinds=kinds)
