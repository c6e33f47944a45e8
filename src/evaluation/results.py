"""What an evaluation found: one row a clip, the rates over all of them, and two models on the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from src.evaluation.edits import EditCounts
from src.evaluation.metrics import Bootstrap, ErrorRates, PairedComparison, compare_counts
from src.utils.errors import DataError
from src.utils.files import write_text_atomic
from src.utils.tracking import ExperimentLogger


@dataclass(frozen=True)
class Prediction:
    """One decoded clip.

    Attributes:
        substitutions, deletions, insertions, reference_words: under the result's normaliser.
        avg_logprob: mean natural-log probability of its tokens; nan with beams.
        latency_sec: of its batch, divided by the batch's clips.
        num_tokens: text tokens of the hypothesis; None in rows of older runs.
        meta: what else the source says of the clip (age, gender, ...), and `snr_db`; for `slice_rates`.
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
    num_tokens: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

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
class ModelComparison:
    """The stock and the tuned model on the same clips.

    Attributes:
        stock, tuned: results.
        difference: tuned against stock; negative is better.
    """

    stock: EvaluationResult
    tuned: EvaluationResult
    difference: PairedComparison


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
