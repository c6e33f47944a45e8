"""One HTML file of a run, to keep and to send: rates with intervals, slices, curves, clips to read and to hear.

Made from the run's files. The page holds everything, and its own content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import matplotlib
import pandas as pd
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from src.data.report.report import REPORT_FILE, DataReport
from src.data.utterance import Utterance
from src.evaluation.report.clips import AlignmentView, ViewOptions
from src.evaluation.report.run_files import (
    STOCK,
    TUNED,
    RunOrigin,
    is_guard,
    load_metrics,
    read_origin,
    stock_first,
)
from src.evaluation.report.summary import (
    RunSummary,
    comparison_table,
    describe_guard_set,
    describe_mix,
    describe_results,
    main_model,
    more_rates,
    render,
    slice_table,
    summarize_run,
)
from src.evaluation.slices import slice_columns
from src.evaluation.visualization.evaluation import EvaluationVisualizer
from src.evaluation.visualization.training import TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import FIGURE_STYLE
from src.utils.files import write_text_atomic


def write_html_report(
    run_dir: str | Path,
    path: str | Path,
    *,
    audio: Iterable[Utterance] = (),
    data_report: DataReport | None = None,
    figures: Mapping[str, Figure] | None = None,
    options: ViewOptions | None = None,
) -> Path:
    """Write a run as one HTML file; an older one is replaced as a whole.

    Args:
        run_dir: of the run.
        path: of the file. It has about 1 kB per clip and 4 kB per second of sound.
        audio: recordings of the clips, so that the worst clips can be played.
        data_report: of the run; by default the one that was saved in its folder.
        figures: by title; by default those that the run's files have the data for.
        options: how many clips are shown and can be played.

    Returns:
        The file's path.

    Raises:
        DataError: no metrics in the folder, a damaged file, or models measured on different clips.
        AudioError: a recording that cannot be decoded.
        OSError: the file cannot be written.
    """
    run, target = Path(run_dir), Path(path)
    summary, origin = summarize_run(run), read_origin(run)
    tested = {name: rows for name, rows in summary.predictions.items() if not is_guard(name)}
    columns = slice_columns(tested[main_model(tested)]) if tested else []
    if data_report is None and (run / REPORT_FILE).exists():
        data_report = DataReport.load(run)
    page = render(
        "report.html",
        title=f"Run {run.resolve().name}",
        **_result(summary),
        tested=tested,
        no_clips="predictions.jsonl holds no clips of the test set: evaluate and save first",
        slice_tables={column: slice_table(column, tested, summary.evaluations) for column in columns},
        figures=_draw_all(run) if figures is None else [(name, _encode(each), "") for name, each in figures.items()],
        clips=_clips(summary, audio, options),
        data_report=data_report and Markup(data_report._repr_html_()),
        **_origin(origin),
    )
    write_text_atomic(target, page)
    return target


def _result(summary: RunSummary) -> dict[str, object]:
    results = {**summary.evaluations, **summary.guard}
    if not summary.evaluations:
        return {"evaluations": {}}
    table = comparison_table(results, summary.predictions)
    said = describe_results(results, summary.predictions)
    said += [describe_guard_set(summary.guard_set), describe_mix(summary.mix)]
    return {
        "evaluations": {name: summary.evaluations[name] for name in stock_first(summary.evaluations)},
        "changes": table.get("WER change", pd.Series("", table.index)).to_dict(),
        "said": [line for line in said if line],
        "verdict": summary.comparison.verdict.split()[0] if summary.comparison else "none",
        "comparison": table.T,
        "more_rates": more_rates(summary.evaluations),
    }


def _draw_all(run_dir: Path) -> list[tuple[str, str, str]]:
    """Return title, SVG in base64 and, where there is nothing to draw, the reason."""
    evaluated = cache(lambda: EvaluationVisualizer(run_dir))  # reads the run's files
    drawings = {
        "Training": lambda: TrainingVisualizer(run_dir).training_analysis(),
        "Word error rate by model": lambda: evaluated().stock_against_tuned(),
        "Word error rate by clip length": lambda: evaluated().wer_by_duration(),
        "Kinds of errors": lambda: evaluated().error_types(),
        "Most frequent errors": lambda: evaluated().confusions(),
    }
    drawn = []
    for title, draw in drawings.items():
        try:
            drawn.append((title, _encode(draw()), ""))
        except DataError as err:  # a run that did not train has no curves
            drawn.append((title, "", str(err)))
    return drawn


def _encode(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context(FIGURE_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _clips(summary: RunSummary, audio: Iterable[Utterance], options: ViewOptions | None) -> Markup | None:
    names = [name for name in summary.evaluations if name in summary.predictions]
    if not names:
        return None
    main = main_model(names)
    view = AlignmentView(
        summary.predictions[main],
        str(summary.evaluations[main]["normalizer"]),
        audio,
        beside=summary.predictions[STOCK] if main == TUNED and summary.comparison is not None else (),
        names=(main, STOCK),
        options=options,
    )
    return Markup(view.to_html())


def _origin(origin: RunOrigin) -> dict[str, object]:
    times = [row["time"] for row in load_metrics(origin.run_dir) if "time" in row]
    measured, config = origin.measured or {}, origin.config
    versions = pd.DataFrame(
        [
            {key: getattr(version, key) for key in ("dataset_name", "version", "clips", "checksum")}
            for version in origin.data_versions
        ]
    )
    facts = {**origin.environment, **origin.environment.get("packages", {})}
    facts = {key: "none" if value is None else str(value) for key, value in facts.items() if key != "packages"}
    return {
        "model": measured.get("model") or config.get("model", {}).get("variant", "model not named"),
        "data": measured.get("data") or config.get("data", {}).get("source", "data not named"),
        "last_time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(times[-1])) if times else "",
        "commands": origin.commands(),
        "versions": versions if len(versions) else None,
        "environment": pd.DataFrame({"value": facts}) if facts else None,
        "config": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    }
