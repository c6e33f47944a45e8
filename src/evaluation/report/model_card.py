"""README.md of an exported model, as the Hugging Face Hub reads it, made from a run's files alone.

Its limits follow from what was measured; what was not measured is said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from src.data.report.report import REPORT_FILE, DataReport
from src.data.sources.hub import CORPORA
from src.evaluation.report.run_files import Row, RunOrigin, best_epoch, bootstrap_of, guard_name, read_origin
from src.evaluation.report.summary import (
    FEW_BLOCKS,
    NOT_MEASURED,
    RunSummary,
    counted,
    describe_comparison,
    describe_guard_set,
    describe_mix,
    format_comparison,
    main_model,
    more_rates,
    number,
    render,
    slice_rate,
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
_PROVENANCE = ("run", "epoch", "step", "validation_wer", "git_revision", "data_version")
_SECTIONS = ("model", "data", "composition", "augmentation", "training")  # of the configuration


def write_model_card(
    model_dir: str | Path, run_dir: str | Path, *, name: str | None = None, license_id: str | None = None
) -> Path:
    """Write the card into the folder of an exported model; an older one is replaced as a whole.

    Args:
        model_dir: written by `export_huggingface`.
        run_dir: of the run that measured the model, under the name "tuned" if it has several.
        name: of the model; the folder's by default.
        license_id: such as "apache-2.0"; left out if it is not given, since no file of a run names it.

    Returns:
        The card's path.

    Raises:
        ModelError: no model in the folder.
        DataError: the run has no metrics or no evaluation, or a damaged file.
    """
    folder, run = Path(model_dir), Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no exported model (config.json is absent); export_huggingface writes one")
    summary, origin = summarize_run(run), read_origin(run)
    if not summary.evaluations:
        raise DataError(f"{run_dir}: nothing was evaluated in this run; evaluate and save first, then write the card")
    main = main_model(summary.evaluations)
    result, guard = summary.evaluations[main], summary.guard.get(guard_name(main))
    slices = _worst_slices(summary, main)
    card = _front_matter(summary, origin, result, guard, name or folder.resolve().name, license_id)
    provenance = read_provenance(folder)
    sections = {key: origin.config[key] for key in _SECTIONS if key in origin.config}
    text = render(
        "model_card.md.jinja",
        front_matter=yaml.safe_dump(card.to_dict(), sort_keys=False, allow_unicode=True, width=math.inf),
        name=card.model_name,
        base=card.base_model or origin.base,
        language=card.language,
        data=_data_name(origin),
        result=result,
        evaluations=summary.evaluations,
        comparison=format_comparison({**summary.evaluations, **summary.guard}, summary.predictions),
        guard_set=describe_guard_set(summary.guard_set),
        more_rates=more_rates(summary.evaluations),
        slices=[
            (part.column, part.value, part.n, slice_rate(part), counted(part.num_blocks, part.blocks))
            for part in slices[:MAX_SLICES]
        ],
        omitted=max(0, len(slices) - MAX_SLICES),
        origin=origin,
        splits=_splits(run),
        provenance={key: provenance[key] for key in _PROVENANCE if provenance.get(key) is not None},
        epochs=summary.epochs,
        best=best_epoch(summary.epochs),
        mix=describe_mix(summary.mix),
        settings=[(key, value) for key, value in flatten(sections).items() if value is not None and value != []],
        limits=_limits(summary, result, guard, slices),
        model_dir=str(folder),
    )
    write_text_atomic(folder / CARD_FILE, text)
    return folder / CARD_FILE


def _worst_slices(summary: RunSummary, main: str) -> list[Slice]:
    rows = summary.predictions.get(main, [])
    bootstrap = bootstrap_of(summary.evaluations[main])
    columns = slice_columns(rows) if rows else []
    slices = [part for column in columns for part in slice_rates(rows, column, bootstrap=bootstrap)]
    return sorted((part for part in slices if not math.isnan(part.wer)), key=lambda part: part.wer, reverse=True)


def _front_matter(
    summary: RunSummary, origin: RunOrigin, result: Row, guard: Row | None, name: str, license_id: str | None
) -> ModelCardData:
    model, data, base = origin.config.get("model", {}), origin.config.get("data", {}), origin.base
    source = data.get("source")
    hub_id = CORPORA[source].id if source in CORPORA else data.get("hub", {}).get("id")
    results = _eval_results(result, _data_name(origin), hub_id or str(source or "unknown"), split="test")
    if guard is not None:
        guard_set = str((summary.guard_set or {}).get("set", "guard set"))
        results += _eval_results(guard, guard_set, guard_set.lower().replace(" ", "-"), split=None)
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
    """Return rates in percent, as the Hub shows them; none for what was not measured."""
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


def _data_name(origin: RunOrigin) -> str:
    data = origin.config.get("data", {})
    place = (origin.measured or {}).get("data") or data.get("path") or data.get("hub", {}).get("id")
    source = data.get("source", "data that the run's files do not name")
    return f"{source} ({Path(place).name})" if place else str(source)


def _splits(run_dir: Path) -> list[tuple[str, ...]]:
    if not (run_dir / REPORT_FILE).exists():
        return []
    summary = DataReport.load(run_dir).summary()[["split", "clips", "hours", "speakers", "median_sec"]]
    return [tuple(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row) for row in summary.itertuples(False)]


def _limits(summary: RunSummary, result: Row, guard: Row | None, slices: Sequence[Slice]) -> list[str]:
    """Return what follows from the measurements, and what is not known."""
    comparison = summary.comparison
    limits = []
    if comparison is None:
        limits.append(f"Whether it is better than the stock model: {NOT_MEASURED}.")
    elif comparison.verdict != "better":
        limits.append(describe_comparison(comparison) + ".")
    if guard is None:
        limits.append(f"What it has forgotten of other speech: {NOT_MEASURED}.")
    if result.get("num_blocks") is not None and result["num_blocks"] < FEW_BLOCKS:
        blocks = counted(result["num_blocks"], result["blocks"])
        limits.append(f"Measured on {blocks}: so few that the intervals are too narrow.")
    if result.get("blocks") == "clip":
        limits.append("The speakers of the test set are not known: the intervals say nothing of other voices.")
    if result.get("loop_rate") != 0:
        limits.append(f"Share of clips that repeat themselves or outrun the audio: {number(result.get('loop_rate'))}.")
    if result.get("empty_rate") != 0:
        limits.append(f"Share of clips with speech for which it gives nothing: {number(result.get('empty_rate'))}.")
    silent = result.get("empty_references")
    words = f"{result.get('hallucinated_words')} on {counted(silent, 'clip')}" if silent else NOT_MEASURED
    limits.append(f"Words invented where nobody speaks: {words}.")
    wer = result.get("wer")
    worse = [part for part in slices if wer is not None and part.low > wer][:MAX_WORSE_SLICES]
    limits += [
        f"Worse than on the whole set where {part.column} is {part.value}: WER {slice_rate(part)} against "
        f"{number(wer)}."
        for part in worse
    ]
    if result.get("audio_context") == "dynamic":
        padded = summary.full_context or {}
        limits.append(
            f"Padded to 30 s, as plain transformers does it: validation WER {number(padded.get('val_wer'))}; at its "
            f"own length {number(padded.get('own_length_wer'))}."
        )
    if summary.streaming is None:
        limits.append(f"Streaming: {NOT_MEASURED}.")
    return limits
