"""One HTML file of a run, to keep and to send: rates with intervals, slices, curves, clips to read and to hear.

Made from the run's files. The page holds everything, and its own content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
import time
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from markupsafe import Markup

from src.data.report.report import REPORT_FILE, DataReport
from src.data.utterance import Utterance
from src.evaluation.report import summary as run_summary
from src.evaluation.report.clips import AlignmentView
from src.evaluation.report.run_files import STOCK, TUNED, is_guard, load_metrics, read_origin
from src.evaluation.slices import slice_columns
from src.evaluation.visualization.evaluation import EvaluationVisualizer
from src.evaluation.visualization.training import TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import FIGURE_STYLE
from src.utils.files import write_text_atomic


def write_html_report(run_dir: str | Path, path: str | Path, *, audio: Iterable[Utterance] = ()) -> Path:
    """Write a run as one HTML file of about 1 kB per clip and 4 kB per second of sound, in place of an older one.

    With `audio`, recordings of the clips, the worst clips can be played.

    Raises:
        DataError: no metrics in the folder, a damaged file, or models measured on different clips.
    """
    run, target = Path(run_dir), Path(path)
    summary, origin = run_summary.summarize_run(run), read_origin(run)
    evaluations, predictions = summary.evaluations, summary.predictions

    # rates, verdicts and slices
    results = {**evaluations, **summary.guard}
    table = run_summary.comparison_table(results, predictions) if evaluations else pd.DataFrame()
    changes = {
        name: str(table.at[name, column])
        for name, row in evaluations.items()
        if (column := f"{run_summary.headline(row).name} change") in table
    }
    said = [
        *run_summary.describe_results(results, predictions),
        run_summary.describe_guard_set(summary.guard_set),
        run_summary.describe_mix(summary.mix),
    ]
    tested = {name: rows for name, rows in predictions.items() if not is_guard(name)}
    columns = slice_columns(tested[run_summary.main_model(tested)]) if tested else []

    # figures that the run's files have the data for, or the reason
    evaluated = cache(lambda: EvaluationVisualizer(run))
    drawings = {
        "Training": lambda: TrainingVisualizer(run).training_analysis(),
        "Error rate by model": lambda: evaluated().stock_against_tuned(),
        **({"Error rate by language": lambda: evaluated().wer_by_slice("language")} if "language" in columns else {}),
        "Error rate by clip length": lambda: evaluated().wer_by_duration(),
        "Kinds of errors": lambda: evaluated().error_types(),
        "Most frequent errors": lambda: evaluated().confusions(),
    }
    figures: list[tuple[str, str, str]] = []  # title, SVG in base64, reason
    for title, draw in drawings.items():
        buffer = io.BytesIO()
        try:
            with matplotlib.rc_context({**FIGURE_STYLE, "svg.fonttype": "none"}), warnings.catch_warnings():
                # the browser draws the texts, with more fonts
                warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
                draw().savefig(buffer, format="svg", metadata={"Date": None})
        except DataError as err:  # a run that did not train has no curves
            figures.append((title, "", str(err)))
            continue
        figures.append((title, base64.b64encode(buffer.getvalue()).decode(), ""))

    # clips of the main model, compared with the stock model
    clips = None
    if names := [name for name in evaluations if name in predictions]:
        main = run_summary.main_model(names)
        beside = predictions[STOCK] if main == TUNED and summary.comparison is not None else ()
        normalizer = str(evaluations[main]["normalizer"])
        view = AlignmentView(predictions[main], normalizer, audio, beside=beside, names=(main, STOCK))
        clips = Markup(view.to_html())

    # where the results come from
    times = [row["time"] for row in load_metrics(run) if "time" in row]
    facts = {**origin.environment, **origin.environment.get("packages", {})}
    facts = {key: "none" if value is None else str(value) for key, value in facts.items() if key != "packages"}
    page = run_summary.render(
        "report.html",
        title=f"Run {run.resolve().name}",
        model=origin.measured.get("model") or origin.config.get("model", {}).get("variant", "model not named"),
        data=origin.data,
        last_time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(times[-1])) if times else "",
        evaluations=evaluations,
        changes=changes,
        guard=summary.guard,
        said=list(filter(None, said)),
        verdict=summary.comparison.verdict.split()[0] if summary.comparison else "none",
        comparison=table.T,
        tested=tested,
        no_clips="predictions.jsonl holds no clips of the test set: evaluate and save first",
        slice_tables={column: run_summary.slice_table(column, tested, evaluations) for column in columns},
        figures=figures,
        clips=clips,
        data_report=Markup(DataReport.load(run)._repr_html_()) if (run / REPORT_FILE).exists() else None,
        commands=origin.commands(),
        versions=pd.DataFrame(
            map(vars, origin.data_versions), columns=["dataset_name", "version", "clips", "checksum"]
        ),
        environment=pd.DataFrame({"value": facts}),
        config=yaml.safe_dump(dict(origin.config), sort_keys=False, allow_unicode=True),
    )
    write_text_atomic(target, page)
    return target
