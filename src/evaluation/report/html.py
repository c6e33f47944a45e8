"""One HTML file of a run, to keep and to send: figures with intervals, slices, curves, clips to read and to hear.

Made from the run's files. The page holds everything, and its own content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template

import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure

from src.data.report.report import REPORT_FILE, DataReport
from src.data.utterance import Utterance
from src.evaluation.report.clips import AlignmentView, ViewOptions
from src.evaluation.report.forgetting import is_guard
from src.evaluation.report.origin import RunOrigin, read_origin
from src.evaluation.report.summary import (
    NOT_MEASURED,
    STOCK,
    TUNED,
    PredictionsByModel,
    Row,
    RunSummary,
    bootstrap_of,
    comparison_table,
    format_comparison,
    load_metrics,
    stock_first,
    summarize_run,
)
from src.evaluation.slices import Slice, slice_columns, slice_rates
from src.evaluation.visualization.evaluation import EvaluationVisualizer, TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, ORANGE
from src.utils.files import write_text_atomic
from src.utils.templates import read_template

NOTHING = '<p class="muted">Not shown: nothing was evaluated in this run; evaluate a model and save the result</p>'
_MORE_RATES = {  # label: (key, digits)
    "match error rate (MER)": ("mer", 3),
    "word information lost (WIL)": ("wil", 3),
    "sentences with any error": ("sentence_error_rate", 3),
    "clips with a loop": ("loop_rate", 3),
    "clips without output where somebody spoke": ("empty_rate", 3),
    "clips where nobody spoke": ("empty_references", 0),
    "words invented on them": ("hallucinated_words", 0),
    **{edits: (edits, 0) for edits in ("substitutions", "deletions", "insertions")},
    "words of the references": ("reference_words", 0),
}


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
        audio: recordings of the clips, so that the worst clips can be played.
        data_report: of the run; by default the one that was saved in its folder.
        figures: pictures by title; by default those that the run's files have the data for.
        options: how many clips are shown and can be played.
    Returns: path. About 1 kB a clip and 4 kB a second of sound.
    Raises: DataError: no metrics in the folder, a damaged file, or models measured on different clips. AudioError: a
        recording that cannot be decoded. OSError: the file cannot be written.
    """
    run, target = Path(run_dir), Path(path)
    summary, origin = summarize_run(run), read_origin(run)
    tested = {name: rows for name, rows in summary.predictions.items() if not is_guard(name)}
    sections = {
        "Result": _headline(summary),
        "More rates": _table(more_rates(summary.evaluations)) if summary.evaluations else NOTHING,
        "Slices": _slices(tested, summary.evaluations),
        "Pictures": _pictures(run, figures),
        "Clips": _clips(tested, summary, audio, options),
        "Data": _data(run, data_report),
        "How it was made": _origin(run, origin),
    }
    write_text_atomic(target, _page(f"Run {run.resolve().name}", _subtitle(run, origin), sections))
    return target


def main_model(names: Sequence[str]) -> str:
    """Return the model that a run is about: the tuned one, else the last that is not the stock model, else that."""
    return TUNED if TUNED in names else stock_first(names)[-1]


def more_rates(evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return the rates that `comparison_table` leaves out: one row a rate, one column a model, for reading."""
    known = {name: dict(evaluations[name]) for name in stock_first(evaluations)}
    for row in known.values():
        if not row.get("empty_references"):  # no silence to invent words on
            row["hallucinated_words"] = None
    rates = _MORE_RATES.items()
    cells = {label: [shown(row.get(key), digits) for row in known.values()] for label, (key, digits) in rates}
    return pd.DataFrame.from_dict(cells, orient="index", columns=list(known))


def slice_table(column: str, predictions: PredictionsByModel, evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return one row a slice, with the WER of each model that was measured on the main model's clips.

    Args:
        predictions: rows of the test set by model.
        evaluations: by model; they say how intervals are drawn.
    Raises: DataError: as `slice_rates`.
    """
    main = main_model(list(predictions))
    ids = {row.id for row in predictions[main]}
    names = [name for name in stock_first(predictions) if {row.id for row in predictions[name]} == ids]
    found = {n: slice_rates(predictions[n], column, bootstrap=bootstrap_of(evaluations.get(n, {}))) for n in names}
    by_value = {name: {part.value: _rate(part) for part in parts} for name, parts in found.items()}
    return pd.DataFrame(
        [
            {
                column: part.value,
                "clips": part.n,
                "words": part.reference_words,
                **{f"{name}: WER": by_value[name].get(part.value, NOT_MEASURED) for name in names},
                "interval over": f"{part.num_blocks} {part.blocks}{'s' * (part.num_blocks != 1)}",
            }
            for part in found[main]
        ]
    )


def shown(value: float | None, digits: int = 3) -> str:
    """Return a figure for reading; one that is missing is never a zero."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _rate(part: Slice) -> str:
    interval = "" if math.isnan(part.low) else f" [{shown(part.low)}, {shown(part.high)}]"
    return shown(part.wer) + interval


def _page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    return Template(read_template("src.evaluation", "report.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        css=Template(read_template("src.evaluation", "report.css")).substitute(blue=BLUE, orange=ORANGE, green=GREEN),
        nav="\n".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in anchors.items()),
        sections="\n".join(f'<h2 id="{anchors[name]}">{name}</h2>\n{body}' for name, body in sections.items()),
    )


def _headline(summary: RunSummary) -> str:
    if not summary.evaluations:
        return NOTHING
    evaluations = {**summary.evaluations, **summary.forgetting.guard}
    table = comparison_table(evaluations, summary.predictions)
    changes: Mapping[str, str] = dict(table["WER change"]) if "WER change" in table else {}
    cards = [_card(name, evaluations[name], changes.get(name, "")) for name in stock_first(summary.evaluations)]
    verdict = summary.comparison.verdict.split()[0] if summary.comparison else "none"
    text = format_comparison(evaluations, summary.predictions)
    said = [line for line in text.splitlines() if line and not line.startswith("|")]
    said += [line for line in (summary.forgetting.describe_guard_set(), summary.forgetting.describe_mix()) if line]
    sentences = "".join(f"<p>{html.escape(line)}</p>" for line in said)
    box = f'<div class="verdict {html.escape(verdict)}">{sentences}</div>' if said else ""
    return f'<div class="cards">{"".join(cards)}</div>{box}{_table(table.T)}'


def _card(name: str, row: Row, change: str) -> str:
    low, high = row.get("wer_low"), row.get("wer_high")
    notes = [] if low is None or high is None else [f"{row['confidence']:.0%} interval {shown(low)} to {shown(high)}"]
    notes += [f"{change} against {STOCK}"] if change else []
    lines = "".join(f'<div class="muted">{html.escape(note)}</div>' for note in notes)
    figure = f'<div class="figure">{shown(row.get("wer"))}</div>'
    return f'<div class="card"><div>{html.escape(name)}: word error rate</div>{figure}{lines}</div>'


def _slices(predictions: PredictionsByModel, evaluations: Mapping[str, Row]) -> str:
    if not predictions:
        return _reason("predictions.jsonl holds no clips of the test set: evaluate and save first")
    columns = slice_columns(predictions[main_model(list(predictions))])
    if not columns:
        return _reason("the clips have no column that splits them into 2 to 12 slices")
    tables = {column: slice_table(column, predictions, evaluations) for column in columns}
    return "\n".join(f"<h3>{html.escape(c)}</h3>{_table(t, index=False)}" for c, t in tables.items())


def _pictures(run_dir: Path, figures: Mapping[str, Figure] | None) -> str:
    if figures is not None:
        return "\n".join(_picture(title, figure) for title, figure in figures.items()) or _reason("none was given")
    evaluated = cache(lambda: EvaluationVisualizer(run_dir))  # reads the run's files
    drawings: dict[str, Callable[[], Figure]] = {
        "Training": lambda: TrainingVisualizer(run_dir).training_analysis(),
        "Word error rate by model": lambda: evaluated().stock_against_tuned(),
        "Word error rate by clip length": lambda: evaluated().wer_by_duration(),
        "Kinds of errors": lambda: evaluated().error_types(),
        "Most frequent errors": lambda: evaluated().confusions(),
    }
    parts = []
    for title, draw in drawings.items():
        try:
            parts.append(_picture(title, draw()))
        except DataError as err:  # a run that did not train has no curves
            parts.append(f"<h3>{title}</h3>{_reason(str(err))}")
    return "\n".join(parts)


def _picture(title: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context(FIGURE_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    name, data = html.escape(title), base64.b64encode(buffer.getvalue()).decode()
    return f'<h3>{name}</h3><figure><img alt="{name}" src="data:image/svg+xml;base64,{data}"></figure>'


def _clips(
    predictions: PredictionsByModel,
    summary: RunSummary,
    audio: Iterable[Utterance],
    options: ViewOptions | None,
) -> str:
    names = [name for name in summary.evaluations if name in predictions]
    if not names:
        return _reason("predictions.jsonl holds no clips of the test set: evaluate and save first")
    main = main_model(names)
    beside = predictions[STOCK] if main == TUNED and summary.comparison is not None else ()
    normalizer = str(summary.evaluations[main]["normalizer"])
    view = AlignmentView(predictions[main], normalizer, audio, beside=beside, names=(main, STOCK), options=options)
    return view.to_html()


def _data(run_dir: Path, report: DataReport | None) -> str:
    if report is None and not (run_dir / REPORT_FILE).exists():
        return _reason(f"{REPORT_FILE} is not in the run's folder: build_data_report(...).save(run_dir) puts it there")
    shown_report = report or DataReport.load(run_dir)
    return f'<div class="wide data-report">{shown_report._repr_html_()}</div>'


def _origin(run_dir: Path, origin: RunOrigin) -> str:
    commands = "\n".join(origin.commands(run_dir))
    keys = ("dataset_name", "version", "clips", "checksum")
    versions = pd.DataFrame([{key: getattr(version, key) for key in keys} for version in origin.data_versions])
    facts = {**origin.environment, **origin.environment.get("packages", {})}
    facts = {key: "none" if value is None else str(value) for key, value in facts.items() if key != "packages"}
    environment = pd.DataFrame({"value": facts})
    config = yaml.safe_dump(dict(origin.config), sort_keys=False, allow_unicode=True)
    return "\n".join([
        f"<h3>To make it again</h3><pre>{html.escape(commands)}</pre>",
        "<h3>Data version</h3>",
        _table(versions, index=False) if len(versions) else _reason("no version of the data was logged in this run"),
        "<h3>Environment</h3>",
        _table(environment) if len(environment) else _reason("env.json is not in the run's folder"),
        f"<details><summary>configuration</summary><pre>{html.escape(config)}</pre></details>",
    ])  # fmt: skip


def _subtitle(run_dir: Path, origin: RunOrigin) -> str:
    times = [row["time"] for row in load_metrics(run_dir) if "time" in row]
    last = f"; last row of {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(times[-1]))}" if times else ""
    measured, config = origin.measured or {}, origin.config
    model = measured.get("model") or config.get("model", {}).get("variant", "model not named")
    data = measured.get("data") or config.get("data", {}).get("source", "data not named")
    return f"{model}; data: {data}{last}"


def _table(frame: pd.DataFrame, *, index: bool = True) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f'<div class="wide">{frame.to_html(index=index, border=0, na_rep="", escape=True)}</div>'


def _reason(text: str) -> str:
    return f'<p class="muted">Not shown: {html.escape(text)}</p>'
