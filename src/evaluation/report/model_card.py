"""README.md of an exported model, as the Hugging Face Hub reads it, made from a run's files alone.

What it says of the model's limits follows from what was measured; what was not measured is said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from src.data.report.report import REPORT_FILE, DataReport
from src.data.sources.hub import CORPORA
from src.evaluation.report.forgetting import FEW_BLOCKS, guard_name
from src.evaluation.report.html import main_model, more_rates, shown
from src.evaluation.report.origin import RunOrigin, read_origin
from src.evaluation.report.summary import (
    NOT_MEASURED,
    STOCK,
    Row,
    RunSummary,
    best_epoch,
    bootstrap_of,
    describe_comparison,
    format_comparison,
    load_metrics,
    summarize_run,
)
from src.evaluation.slices import Slice, slice_columns, slice_rates
from src.models.export.huggingface import read_provenance
from src.models.weights import HUB_REPOSITORIES
from src.utils.config import flatten
from src.utils.errors import DataError, ModelError
from src.utils.files import write_text_atomic

CARD_FILE = "README.md"
MAX_SLICES = 15
MAX_WORSE_SLICES = 5  # among the limits
_TRAINING_SECTIONS = ("model", "data", "composition", "augmentation", "training")


@dataclass(frozen=True)
class _Facts:
    """All that a card is written from."""

    model_dir: Path
    run_dir: Path
    summary: RunSummary
    origin: RunOrigin
    provenance: Mapping[str, Any]
    main: str
    slices: Sequence[Slice]
    full_context: Row | None

    @property
    def result(self) -> Row:
        return self.summary.evaluations[self.main]

    @property
    def guard(self) -> Row | None:
        return self.summary.forgetting.guard.get(guard_name(self.main))


def write_model_card(
    model_dir: str | Path, run_dir: str | Path, *, name: str | None = None, license_id: str | None = None
) -> Path:
    """Write the card into the folder of an exported model; an older one is replaced as a whole.

    Args:
        model_dir: of `export_huggingface`.
        run_dir: of the run that measured the model, under the name "tuned" where it has several.
        name: of the model; the folder's by default.
        license_id: such as "apache-2.0"; left out where it is not given, since no file of a run says it.
    Returns: the card's path.
    Raises: ModelError: no model in the folder. DataError: the run has no metrics or no evaluation, or a damaged file.
    """
    folder, run = Path(model_dir), Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no exported model (config.json is absent); export_huggingface writes one")
    facts = _collect(folder, run)
    data = _front_matter(facts, name or folder.resolve().name, license_id)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(facts, data)}"
    parsed = ModelCard(text).data
    if parsed.to_dict() != data.to_dict():
        raise ModelError(f"{folder}: the card's front matter does not read back as it was written; choose another name")
    write_text_atomic(folder / CARD_FILE, text)
    return folder / CARD_FILE


def _collect(model_dir: Path, run_dir: Path) -> _Facts:
    summary = summarize_run(run_dir)
    if not summary.evaluations:
        raise DataError(f"{run_dir}: nothing was evaluated in this run; evaluate and save first, then write the card")
    main = main_model(list(summary.evaluations))
    rows = summary.predictions.get(main, [])
    bootstrap = bootstrap_of(summary.evaluations[main])
    slices = [part for c in (slice_columns(rows) if rows else ()) for part in slice_rates(rows, c, bootstrap=bootstrap)]
    measured = [part for part in slices if not math.isnan(part.wer)]
    padded = [row for row in load_metrics(run_dir) if row["event"] == "full_context"]
    return _Facts(
        model_dir=model_dir,
        run_dir=run_dir,
        summary=summary,
        origin=read_origin(run_dir),
        provenance=read_provenance(model_dir),
        main=main,
        slices=sorted(measured, key=lambda part: part.wer, reverse=True),
        full_context=padded[-1] if padded else None,
    )


def _front_matter(facts: _Facts, name: str, license_id: str | None) -> ModelCardData:
    model, source = facts.origin.config.get("model", {}), facts.origin.config.get("data", {}).get("source")
    hub_id = CORPORA[source].id if source in CORPORA else facts.origin.config.get("data", {}).get("hub", {}).get("id")
    base = facts.origin.base
    test_set = _data_name(facts), hub_id or str(source or "unknown")
    results = _eval_results(facts.result, *test_set, split="test")
    if facts.guard is not None:
        guard_set = str((facts.summary.forgetting.guard_set or {}).get("set", "guard set"))
        results += _eval_results(facts.guard, guard_set, guard_set.lower().replace(" ", "-"), split=None)
    return ModelCardData(
        language=model.get("language") or ("en" if str(base).endswith(".en") else None),
        license=license_id,
        base_model=HUB_REPOSITORIES.get(base) if base else None,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "automatic-speech-recognition", "speech"],
        datasets=[hub_id] if hub_id else None,
        metrics=["wer", "cer"],
        model_name=name,
        eval_results=results,
    )


def _eval_results(row: Row, set_name: str, set_type: str, *, split: str | None) -> list[EvalResult]:
    """Rates in percent, as the Hub shows them; none for what was not measured."""
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic speech recognition",
            dataset_type=set_type,
            dataset_name=set_name,
            dataset_split=split,
            metric_type=key,
            metric_name=f"{key.upper()} in percent, {row.get('normalizer', 'normaliser not known')}",
            metric_value=round(100 * row[key], 2),
        )
        for key in ("wer", "cer")
        if row.get(key) is not None
    ]


def _body(facts: _Facts, data: ModelCardData) -> str:
    sections = {
        "Result": _result(facts),
        "Where it is worst": _worst(facts),
        "Data": _data(facts),
        "How it was trained": _training(facts),
        "Intended use": _use(facts, data),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(facts)),
        "How to load it": _loading(facts),
        "To make it again": f"```\n{chr(10).join(facts.origin.commands(facts.run_dir))}\n```",
    }
    base = facts.origin.base
    begun = f"{data.base_model or base}" if base else "a stock model that the run's files do not name"
    title = f"# {data.model_name}\n\nWhisper, begun from {begun}. Every figure here was read from the files of one run."
    return "\n\n".join([title, *(f"## {heading}\n\n{text}" for heading, text in sections.items())]) + "\n"


def _result(facts: _Facts) -> str:
    summary = facts.summary
    parts = [format_comparison({**summary.evaluations, **summary.forgetting.guard}, summary.predictions)]
    if STOCK not in summary.evaluations:
        parts.append(f"The stock model beside it: {NOT_MEASURED}, so whether tuning helped is not known.")
    parts.append(summary.forgetting.describe_guard_set() or f"Guard set (speech of another kind): {NOT_MEASURED}.")
    rates = more_rates(summary.evaluations)
    parts.append(_markdown(["rate", *rates.columns], [(label, *row) for label, row in rates.T.items()]))
    return "\n\n".join(parts)


def _worst(facts: _Facts) -> str:
    if not facts.slices:
        return f"Slices: {NOT_MEASURED}; the run holds no clips, or no column that splits them."
    heads = ("column", "slice", "clips", "WER", "interval", "interval over")
    rows = [(s.column, s.value, s.n, shown(s.wer), _interval(s), _blocks(s)) for s in facts.slices[:MAX_SLICES]]
    left_out = len(facts.slices) - len(rows)
    return _markdown(heads, rows) + (f"\n\n{left_out} slices with a lower WER are left out." if left_out else "")


def _data(facts: _Facts) -> str:
    lines = [f"Source: {_data_name(facts)}."]
    for version in facts.origin.data_versions:
        checksum = version.checksum or NOT_MEASURED
        lines.append(f"Version {version.version} of {version.dataset_name}: {version.clips} clips, SHA-256 {checksum}.")
    if not facts.origin.data_versions:
        lines.append(f"Version of the data: {NOT_MEASURED}.")
    if not (facts.run_dir / REPORT_FILE).exists():
        return "\n\n".join([*lines, f"Clips, hours and speakers of each split: {NOT_MEASURED}."])
    summary = DataReport.load(facts.run_dir).summary()
    columns = ["split", "clips", "hours", "speakers", "median_sec"]
    rows = [tuple(f"{v:.2f}" if isinstance(v, float) else v for v in row) for row in summary[columns].itertuples(False)]
    return "\n\n".join([*lines, _markdown(columns, rows)])


def _training(facts: _Facts) -> str:
    keys = ("run", "epoch", "step", "validation_wer", "git_revision", "data_version")
    made = [f"- {key}: {facts.provenance[key]}" for key in keys if facts.provenance.get(key) is not None]
    parts = ["The exported weights say of themselves:\n\n" + "\n".join(made)] if made else []
    if not facts.origin.trained:
        parts.append(f"This run measured the model and did not train it: hyper-parameters {NOT_MEASURED}.")
        return "\n\n".join(parts)
    epochs, best = facts.summary.epochs, best_epoch(facts.summary.epochs)
    kept = "no epoch had a validation WER" if best is None else f"epoch {best['epoch']} was kept, the best by WER"
    mixed = facts.summary.forgetting.describe_mix()
    parts.append(f"{len(epochs)} epoch{'s' * (len(epochs) != 1)}; {kept}. {mixed}".strip())
    sections = {key: facts.origin.config[key] for key in _TRAINING_SECTIONS if key in facts.origin.config}
    settings = {key: value for key, value in flatten(sections).items() if value is not None and value != []}
    table = _markdown(("setting", "value"), list(settings.items()))
    parts.append(f"<details><summary>every setting</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _use(facts: _Facts, data: ModelCardData) -> str:
    context = facts.result.get("audio_context")
    heard = {
        "dynamic": "It hears audio at its own length, 0.1 to 30 s.",
        "full": "It hears audio padded to 30 s, as stock Whisper.",
    }.get(str(context), f"Audio context: {NOT_MEASURED}.")
    language = f"speech in {data.language!r}" if data.language else "speech"
    return (
        f"Transcribing {language} that resembles {_data_name(facts)}: such speakers, microphones and sentences. "
        f"{heard} Longer recordings are to be cut at pauses. Check it on recordings of your own before relying on it."
    )


def _limits(facts: _Facts) -> list[str]:
    """Return what follows from the measured facts, and what is not known."""
    row, comparison = facts.result, facts.summary.comparison
    limits = [] if comparison is None or comparison.verdict == "better" else [describe_comparison(comparison) + "."]
    if comparison is None:
        limits.append(f"Whether it is better than the stock model: {NOT_MEASURED}.")
    if facts.guard is None:
        limits.append(f"What it has forgotten of other speech: {NOT_MEASURED}.")
    limits += _limits_of_rates(row)
    beyond = [s for s in facts.slices if row.get("wer") is not None and s.low > row["wer"]]
    limits += [
        f"Worse than on the whole set where {s.column} is {s.value}: WER {shown(s.wer)} {_interval(s)} against "
        f"{shown(row.get('wer'))}."
        for s in beyond[:MAX_WORSE_SLICES]
    ]
    if row.get("audio_context") == "dynamic":
        padded = facts.full_context or {}
        limits.append(
            f"Padded to 30 s, as plain transformers does it: validation WER {shown(padded.get('val_wer'))}; at its own "
            f"length {shown(padded.get('own_length_wer'))}."
        )
    if facts.summary.streaming is None:
        limits.append(f"Streaming: {NOT_MEASURED}.")
    return limits


def _limits_of_rates(row: Row) -> list[str]:
    limits: list[str] = []
    few = row.get("num_blocks") is not None and row["num_blocks"] < FEW_BLOCKS
    if few:
        limits.append(f"Measured on {row['num_blocks']} {row['blocks']}s: so few that the intervals are too narrow.")
    if row.get("blocks") == "clip":
        limits.append("The speakers of the test set are not known: the intervals say nothing of other voices.")
    if row.get("loop_rate") is None or row["loop_rate"] > 0:
        limits.append(f"Share of clips that repeat themselves or outrun the audio: {shown(row.get('loop_rate'))}.")
    if row.get("empty_rate") is None or row["empty_rate"] > 0:
        limits.append(f"Share of clips with speech for which it gives nothing: {shown(row.get('empty_rate'))}.")
    silent = row.get("empty_references")
    words = f"{row.get('hallucinated_words')} on {silent} clips" if silent else NOT_MEASURED
    limits.append(f"Words invented where nobody speaks: {words}.")
    return limits


def _loading(facts: _Facts) -> str:
    folder = facts.model_dir
    return f"""With the library that made it, at the audio's own length, recordings of any length:

```python
from src.inference import BatchInference
from src.models import WhisperModelManager
from src.utils import load_config

config = load_config(overrides={{"model.variant": "{folder}"}})
model, processor = WhisperModelManager(config).initialize_model()
print(BatchInference(model, processor, config).transcribe_batch(["speech.wav"])[0].text)
```

With plain transformers, which pads to 30 s:

```python
from transformers import pipeline

recognizer = pipeline("automatic-speech-recognition", model="{folder}")
print(recognizer("speech.wav")["text"])
```"""


def _data_name(facts: _Facts) -> str:
    data, measured = facts.origin.config.get("data", {}), facts.origin.measured or {}
    place = measured.get("data") or data.get("path") or data.get("hub", {}).get("id")
    source = data.get("source", "data that the run's files do not name")
    return f"{source} ({Path(place).name})" if place else str(source)


def _interval(part: Slice) -> str:
    return "" if math.isnan(part.low) else f"[{shown(part.low)}, {shown(part.high)}]"


def _blocks(part: Slice) -> str:
    return f"{part.num_blocks} {part.blocks}{'s' * (part.num_blocks != 1)}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay a table out; what stands in cells may be the user's."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
