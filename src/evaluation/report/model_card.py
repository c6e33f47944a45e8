"""README.md of an exported model, as the Hugging Face Hub reads it, made from a run's files alone.

Its limits follow from what was measured; what was not measured is said to be so.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCardData

from src.data.report.report import REPORT_FILE, DataReport
from src.data.sources.hub import CORPORA
from src.evaluation.report import summary as run_summary
from src.evaluation.report.run_files import Row, best_epoch, bootstrap_of, guard_name, read_origin
from src.evaluation.slices import slice_columns, slice_rates
from src.models.export.huggingface import read_provenance
from src.models.folder import read_settings
from src.models.weights import HUB_REPOSITORIES
from src.utils.config import flatten
from src.utils.errors import DataError, ModelError
from src.utils.files import write_text_atomic
from src.utils.languages import WHISPER_LANGUAGES, language_name
from src.utils.runtime import public

CARD_FILE = "README.md"
_PROVENANCE = (
    "run", "epoch", "step", "validation_metric", "validation_rate", "validation_wer", "git_revision", "data_version",
)  # fmt: skip
_HUB_CODES = {"jw": "jv"}  # Whisper's code, that of ISO 639
_SECTIONS = ("model", "data", "composition", "augmentation", "training")  # of the configuration


def write_model_card(
    model_dir: str | Path, run_dir: str | Path, *, name: str | None = None, license_id: str | None = None
) -> Path:
    """Write the card into the folder of an exported model, in place of an older one.

    Args:
        model_dir: written by `export_huggingface`.
        run_dir: of the run that measured the model, under the name "tuned" if it has several.
        name: of the model; the folder's by default.
        license_id: such as "apache-2.0"; left out if it is not given, since no file of a run names it.

    Raises:
        ModelError: no model in the folder.
        DataError: the run has no metrics or no evaluation, or a damaged file.
    """
    folder, run = Path(model_dir), Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no exported model (config.json is absent); export_huggingface writes one")
    summary, origin = run_summary.summarize_run(run), read_origin(run)
    if not summary.evaluations:
        raise DataError(f"{run_dir}: nothing was evaluated in this run; evaluate and save first, then write the card")
    main = run_summary.main_model(summary.evaluations)
    result, guard = summary.evaluations[main], summary.guard.get(guard_name(main))

    # what it was trained on
    trained = pd.DataFrame()
    splits = []
    if (run / REPORT_FILE).exists():
        report = DataReport.load(run)
        table = report.summary()[["split", "clips", "hours", "speakers", "median_sec"]]
        splits = [tuple(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row) for row in table.itertuples(False)]
        trained = report.languages().query("train > 0 and code.notna()")

    # front matter
    model, data, base = origin.config.get("model", {}), origin.config.get("data", {}), origin.base
    sources = data.get("mix") or [data]
    found = [CORPORA[s["source"]].id if s.get("source") in CORPORA else s.get("hub", {}).get("id") for s in sources]
    hub_ids = list(dict.fromkeys(filter(None, found)))
    one_id = found[0] or sources[0].get("source") if len(sources) == 1 else "mix"
    results = _eval_results(result, origin.data, str(one_id or "unknown"), split="test")
    if guard is not None:
        guard_set = str((summary.guard_set or {}).get("set", "guard set"))
        results += _eval_results(guard, guard_set, guard_set.lower().replace(" ", "-"), split=None)
    translates = model.get("task") == "translate"
    languages = list(trained["code"]) if len(trained) else []
    if not languages:  # without a data report: of the checkpoint, of the test set, or of the settings
        rates = None if translates else read_settings(folder / "config.json").get("tokens_per_sec")  # of transcripts
        configured = model.get("language") or ("en" if str(base).endswith(".en") else None)
        named = rates or result.get("rates_by_language") or {configured}
        languages = [code for code in named if code in WHISPER_LANGUAGES]
    codes = [_HUB_CODES.get(code, code) for code in languages]
    card = ModelCardData(
        language=codes[0] if len(codes) == 1 else codes or None,
        license=license_id,
        base_model=HUB_REPOSITORIES.get(base) if base else None,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "automatic-speech-recognition", "speech"] + ["speech-translation"] * translates,
        datasets=hub_ids or None,
        metrics=list(dict.fromkeys(each.metric_type for each in results)) or None,
        model_name=name or folder.resolve().name,
        eval_results=results,
    )

    # slices, worst first
    rows = summary.predictions.get(main, [])
    columns = slice_columns(rows) if rows else []
    slices = [part for column in columns for part in slice_rates(rows, column, bootstrap=bootstrap_of(result))]
    slices = sorted((part for part in slices if not math.isnan(part.rate)), key=lambda part: part.rate, reverse=True)
    shown = [vars(part) | {"value": run_summary.label_of(part.column, part.value)} for part in slices]
    provenance = read_provenance(folder)
    sections = {key: origin.config[key] for key in _SECTIONS if key in origin.config}
    text = run_summary.render(
        "model_card.md.jinja",
        front_matter=yaml.safe_dump(card.to_dict(), sort_keys=False, allow_unicode=True, width=math.inf),
        card=card,
        summary=summary,
        origin=origin,
        result=result,
        guard=guard,
        comparison=run_summary.format_comparison({**summary.evaluations, **summary.guard}, summary.predictions),
        slices=shown,
        splits=splits,
        trained=[(row.language, row.train) for row in trained.itertuples()],
        languages=[language_name(code) for code in languages],
        translates=translates,
        provenance={key: provenance[key] for key in _PROVENANCE if provenance.get(key) is not None},
        best=best_epoch(summary.epochs),
        settings=[(key, value) for key, value in flatten(sections).items() if value is not None and value != []],
        model_dir=str(public(folder)),
    )
    write_text_atomic(folder / CARD_FILE, text)
    return folder / CARD_FILE


def _eval_results(row: Row, set_name: str, set_type: str, *, split: str | None) -> list[EvalResult]:
    """Return rates in percent, as the Hub shows them, of each language; none for what was not measured."""
    first = run_summary.headline(row)
    found = [(None, first.key, first.rate, row.get("normalizer")), (None, "cer", row.get("cer"), row.get("normalizer"))]
    if first.key == "mean":
        rates = ((code, run_summary.fields_of(rate)) for code, rate in row["rates_by_language"].items())
        found = [(code, run_summary.headline(rate).key, rate["rate"], rate["normalizer"]) for code, rate in rates]
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic speech recognition",
            dataset_type=set_type,
            dataset_name=set_name if code is None else f"{set_name}, {run_summary.label_of('language', code)}",
            dataset_config=code,
            dataset_split=split,
            metric_type=key,
            metric_name=f"{key.upper()} in percent, {normalizer or 'normaliser not known'}",
            metric_value=round(100 * rate, 2),
        )
        for code, key, rate, normalizer in dict.fromkeys(found)
        if rate is not None
    ]
