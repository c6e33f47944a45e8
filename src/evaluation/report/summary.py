"""Results of a run as tables and sentences, the tuned model always compared with the stock model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from src.evaluation.evaluator import EvaluationResult, Prediction, compare_predictions
from src.evaluation.metrics import PairedComparison
from src.evaluation.report.run_files import (
    STOCK,
    TUNED,
    PredictionsByModel,
    Row,
    best_epoch,
    bootstrap_of,
    guard_name,
    is_guard,
    last_row,
    last_training,
    latest_evaluations,
    load_metrics,
    load_predictions,
    model_of,
    stock_first,
)
from src.evaluation.slices import Slice, slice_rates
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREEN, ORANGE

NOT_MEASURED = "not measured"
FEW_BLOCKS = 10  # below it a percentile interval is clearly too narrow
_RATES = {
    "WER": "wer",
    "WER plain": "wer_plain",
    "CER": "cer",
    "CER plain": "cer_plain",
    "loss": "loss",
    "RTF": "rtf",
}
_MORE_RATES = {  # label: (key, digits)
    "match error rate (MER)": ("mer", 3),
    "word information lost (WIL)": ("wil", 3),
    "sentences with any error": ("sentence_error_rate", 3),
    "clips with a loop": ("loop_rate", 3),
    "clips with speech but without output": ("empty_rate", 3),
    "clips without speech": ("empty_references", 0),
    "words invented on them": ("hallucinated_words", 0),
    **{edits: (edits, 0) for edits in ("substitutions", "deletions", "insertions")},
    "words of the references": ("reference_words", 0),
}


@dataclass(frozen=True)
class RunSummary:
    """Results of a run; what was not measured is None or empty.

    Attributes:
        run_dir: of the run.
        epochs: one row per epoch, of the last training.
        evaluations: last row of each evaluation by name ("stock", "tuned").
        predictions: rows by model, those of the guard set included.
        streaming: last streaming row.
        comparison: tuned against stock on the same clips.
        guard: last row of each evaluation on the guard set ("stock (guard)", "tuned (guard)").
        guard_set: row that describes the guard set.
        mix: rows of the last sweep over mixes of stock and tuned weights, from share 0 to 1.
        full_context: last row of the validation with clips padded to 30 s.
    """

    run_dir: Path
    epochs: Sequence[Row]
    evaluations: Mapping[str, Row]
    predictions: PredictionsByModel
    streaming: Row | None
    comparison: PairedComparison | None
    guard: Mapping[str, Row]
    guard_set: Row | None
    mix: Sequence[Row]
    full_context: Row | None

    def figures(self) -> dict[str, float | None]:
        """Return the headline figures; None for what was not measured."""
        stock, tuned = self.evaluations.get(STOCK, {}), self.evaluations.get(TUNED, {})
        values = {
            "stock_wer": stock.get("wer"),
            "tuned_wer": tuned.get("wer"),
            "streaming_wer": (self.streaming or {}).get("wer"),
            "rtf": tuned.get("rtf"),
        }
        return {key: None if value is None or math.isnan(value) else round(value, 4) for key, value in values.items()}

    def to_text(self) -> str:
        """Return tables, verdict and places of files as plain text, which is valid Markdown too."""
        results = {**self.evaluations, **self.guard}
        places = {
            "notebook": "notebook.html",
            "report": "report.html",
            "best model": "checkpoints/best_model_hf",
            "best mix": "checkpoints/best_mix_hf",
            "for faster-whisper": "ctranslate2_int8",
            "predictions": "predictions.jsonl",
            "metrics": "metrics.jsonl",
            "figures": "figures",
        }
        parts = [
            _describe_training(self.epochs),
            describe_mix(self.mix),
            format_comparison(results, self.predictions) if results else "nothing was evaluated",
            describe_guard_set(self.guard_set),
            _describe_streaming(self.streaming),
            "\n".join(
                f"{name:<18} {self.run_dir / path}" for name, path in places.items() if (self.run_dir / path).exists()
            ),
        ]
        return "\n\n".join(part for part in parts if part)


def summarize_run(run_dir: str | Path) -> RunSummary:
    """Read a run's files.

    Raises:
        DataError: the folder has no metrics, a line of a file is damaged, or the models were measured on different
            clips.
    """
    rows = load_metrics(run_dir)
    evaluations = latest_evaluations(rows)
    predictions = {**load_predictions(run_dir), **load_predictions(run_dir, guard=True)}
    mix: list[Row] = []
    for row in rows:
        if row["event"] == "mix":
            mix = [row] if row["share"] == 0 else [*mix, row]  # share 0 begins a sweep
        elif row["event"] == "epoch":
            mix = []  # trained since: the sweep was of other weights
    return RunSummary(
        run_dir=Path(run_dir),
        epochs=last_training(rows)[1],
        evaluations=evaluations,
        predictions=predictions,
        streaming=last_row(rows, "streaming"),
        comparison=_compare(STOCK, TUNED, evaluations, predictions) if {STOCK, TUNED} <= set(evaluations) else None,
        guard=latest_evaluations(rows, guard=True),
        guard_set=last_row(rows, "guard"),
        mix=mix,
        full_context=last_row(rows, "full_context"),
    )


def main_model(names: Iterable[str]) -> str:
    """Return the model that a run is about: the tuned one, else the last that is not the stock model, else that."""
    ordered = stock_first(names)
    return TUNED if TUNED in ordered else ordered[-1]


def comparison_table(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> pd.DataFrame:
    """Return one row per model for reading, the stock model first, the others with their change against it.

    Results of the guard set come last, compared with the stock model on the guard set.

    Args:
        results: by name; `EvaluationResult`s or rows of metrics.jsonl.
        predictions: by name, for the verdict; taken from the `EvaluationResult`s by default.

    Raises:
        DataError: no result, or results of different clips.
    """
    if not results:
        raise DataError("comparison_table: no result given; evaluate a model first")
    rows: dict[str, dict[str, str]] = {}
    for name in stock_first(results):
        row = results[name]
        rows[name] = {
            **{
                label: with_interval(row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"))
                for label, key in _RATES.items()
            },
            "audio context": row.get("audio_context", NOT_MEASURED),
            "normaliser": row.get("normalizer", NOT_MEASURED),
            "clips": str(row.get("n", NOT_MEASURED)),
            "interval over": counted(row["num_blocks"], row["blocks"]) if row.get("num_blocks") else NOT_MEASURED,
        }
    for name, stock in _stocks_of(results).items():
        comparison = _compare(stock, name, results, predictions or {})
        rows[name]["WER change"] = _change(results[stock].get("wer"), results[name].get("wer"))
        rows[name]["CER change"] = _change(results[stock].get("cer"), results[name].get("cer"))
        rows[name]["verdict"] = NOT_MEASURED if comparison is None else comparison.verdict
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def format_comparison(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> str:
    """Return `comparison_table` as aligned Markdown, one column per model, and `describe_results`."""
    table = comparison_table(results, predictions).T
    said = describe_results(results, predictions)
    return "\n".join([markdown_table(["", *table.columns], table.itertuples()), *([""] if said else []), *said])


def describe_results(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> list[str]:
    """Return what each comparison with the stock model means, and where test set and guard set disagree."""
    stocks = _stocks_of(results)
    compared = {name: _compare(stock, name, results, predictions or {}) for name, stock in stocks.items()}
    said: list[str] = []
    for name, comparison in compared.items():
        if is_guard(name):
            said.append(_describe_guard(results[stocks[name]], results[name], comparison))
        elif comparison is not None:
            said.append(describe_comparison(comparison, tuned=name, stock=stocks[name]))
    for name, own in compared.items():
        guard = compared.get(guard_name(name))
        if own is not None and guard is not None and (own.verdict, guard.verdict) == ("better", "worse"):
            stock, guard_stock = (results[stocks[each]]["wer"] for each in (name, guard_name(name)))
            said.append(
                f"the {name} model is better on its own domain (WER {stock:.3f} to {results[name]['wer']:.3f}) but "
                f"worse on the guard set ({guard_stock:.3f} to {results[guard_name(name)]['wer']:.3f}): use it for "
                f"speech of its own domain, and the {stocks[name]} model for other speech"
            )
    return said


def describe_comparison(comparison: PairedComparison, *, tuned: str = TUNED, stock: str = STOCK) -> str:
    """Return the verdict on the tuned model in one sentence, with the advice that follows."""
    advice = {
        "better": f"the {tuned} model is better than the {stock} one",
        "worse": f"the {tuned} model is WORSE: keep the {stock} model",
        "no difference shown": f"no difference shown: keep the {stock} model, or measure on more speakers",
    }[comparison.verdict]
    points = f"{100 * comparison.difference:+.1f} points {describe_interval(comparison)}"
    return f"{tuned} against {stock}: WER {points}; {advice}"


def describe_interval(comparison: PairedComparison) -> str:
    """Return the interval of a difference in points, what was resampled, and whether there was too little of it."""
    blocks = counted(comparison.num_blocks, comparison.blocks)
    if math.isnan(comparison.low):
        return f"(no interval from {blocks})"
    few = "; so few that the interval is too narrow" if comparison.num_blocks < FEW_BLOCKS else ""
    return f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}] over {blocks}{few}"


def describe_guard_set(row: Row | None) -> str:
    """Return what the guard set consists of; empty without one."""
    if row is None:
        return ""
    speakers = f" of {counted(row['speakers'], 'speaker')}" if row["speakers"] else ""
    return f"guard set: {row['set']}, {counted(row['clips'], 'clip')}{speakers}"


def describe_mix(rows: Sequence[Row]) -> str:
    """Return the result of a sweep over mixes in one sentence; empty without one.

    Args:
        rows: from share 0 to 1, each with share, wer, clips and chosen.
    """
    if not rows:
        return ""
    ends = {0: " (stock)", 1: " (tuned)"}
    wers = ", ".join(f"{row['share']:g}{ends.get(row['share'], '')} {row['wer']:.3f}" for row in rows)
    chosen = next(row["share"] for row in rows if row["chosen"])
    meaning = {
        0: "none is below the stock weights: keep the stock model",
        1: "the tuned weights are the lowest: no mix was taken",
    }.get(
        chosen,
        f"the mix of share {chosen:g} was taken; it was chosen by these clips, which flatters it: the test set judges",
    )
    return f"mix: WER on {counted(rows[0]['clips'], 'validation clip')} by share of tuned weights: {wers}; {meaning}"


def more_rates(evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return the rates that `comparison_table` leaves out, for reading: one row per rate, one column per model."""
    table = {}
    for name in stock_first(evaluations):
        row = evaluations[name]
        silence = bool(row.get("empty_references"))  # without silence there is none to invent words on
        table[name] = {
            label: number(row.get(key) if silence or key != "hallucinated_words" else None, digits)
            for label, (key, digits) in _MORE_RATES.items()
        }
    return pd.DataFrame(table)


def slice_table(column: str, predictions: PredictionsByModel, evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return one row per slice, with the WER of each model that was measured on the main model's clips."""
    main = main_model(predictions)
    ids = {row.id for row in predictions[main]}
    names = [name for name in stock_first(predictions) if {row.id for row in predictions[name]} == ids]
    found = {
        name: slice_rates(predictions[name], column, bootstrap=bootstrap_of(evaluations.get(name, {})))
        for name in names
    }
    rates = {name: {part.value: slice_rate(part) for part in parts} for name, parts in found.items()}
    return pd.DataFrame(
        [
            {
                column: part.value,
                "clips": part.n,
                "words": part.reference_words,
                **{f"{name}: WER": rates[name].get(part.value, NOT_MEASURED) for name in names},
                "interval over": counted(part.num_blocks, part.blocks),
            }
            for part in found[main]
        ]
    )


def slice_rate(part: Slice) -> str:
    """Return the rate of a slice with its interval, for reading."""
    return with_interval(part.wer, part.low, part.high)


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return a rate for reading, with its interval if there is one."""
    interval = f"{number(low)}, {number(high)}"
    return number(value) if NOT_MEASURED in f"{number(value)} {interval}" else f"{number(value)} [{interval}]"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for reading; a missing one is never a zero."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def counted(count: int, noun: str) -> str:
    """Return "1 clip" or "2 clips"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an aligned Markdown table; cells may hold any text."""
    cells = [[escape_markdown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def escape_markdown(text: object) -> str:
    """Return a text of the data on one line, without the characters that would begin a cell or an HTML element."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def render(template: str, **values: object) -> str:
    """Return a page from `src/evaluation/templates`; in HTML all values are escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("src.evaluation"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.globals |= {
        "BLUE": BLUE,
        "ORANGE": ORANGE,
        "GREEN": GREEN,
        "STOCK": STOCK,
        "NOT_MEASURED": NOT_MEASURED,
    }
    environment.filters |= {
        "number": number,
        "counted": counted,
        "table": _html_table,
        "md": escape_markdown,
        "md_table": markdown_table,
    }
    return environment


def _html_table(frame: pd.DataFrame, *, index: bool = True) -> Markup:
    with pd.option_context("display.max_colwidth", None):
        return Markup('<div class="wide">{}</div>').format(Markup(frame.to_html(index=index, border=0, na_rep="")))


def _stocks_of(names: Iterable[str]) -> dict[str, str]:
    """Return the model to compare each other model with, first on the test set, then on the guard set."""
    ordered = stock_first(names)
    sets = [[name for name in ordered if is_guard(name) == guard] for guard in (False, True)]
    return {name: first for first, *others in filter(None, sets) for name in others}


def _compare(
    stock: str, name: str, results: Mapping[str, Row], predictions: PredictionsByModel
) -> PairedComparison | None:
    def rows_of(model: str) -> Sequence[Prediction]:
        result = results[model]
        return result.rows if isinstance(result, EvaluationResult) else predictions.get(model, ())

    before, after = rows_of(stock), rows_of(name)
    return compare_predictions(before, after, bootstrap_of(results[name])) if before and after else None


def _change(before: float | None, after: float | None) -> str:
    """Return the relative change in percent; empty if it has no meaning."""
    if NOT_MEASURED in (number(before), number(after)) or not before or after is None:
        return ""
    return f"{100 * (after - before) / before:+.1f} %"


def _describe_training(epochs: Sequence[Row]) -> str:
    if not epochs:
        return ""
    best = best_epoch(epochs)
    if best is None:
        return f"training: {counted(len(epochs), 'epoch')}, none with a validation WER"
    return (
        f"training: {counted(len(epochs), 'epoch')}; validation WER {number(epochs[0]['val_wer'])} after the first, "
        f"{number(best['val_wer'])} after epoch {best['epoch']}, which was kept"
    )


def _describe_streaming(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        f"streaming, {row['clips']} clips in {number(row['audio_sec'], 0)} s: WER {number(row['wer'])}, the same "
        f"clips one by one {number(row['offline_wer'])}; RTF {number(row['rtf'], 2)}, longest update "
        f"{number(row['longest_update_sec'], 2)} s"
    )


def _describe_guard(stock: Row, tuned: Row, comparison: PairedComparison | None) -> str:
    said = f"guard: {model_of(stock['name'])} WER {stock['wer']:.3f}, {model_of(tuned['name'])} {tuned['wer']:.3f}"
    if comparison is None:
        return f"{said}; no verdict, since the rows of its clips are absent"
    interval = describe_interval(comparison)
    if comparison.verdict == "no difference shown":
        return f"{said}: {100 * comparison.difference:+.1f} points {interval}: no difference shown on general speech"
    return f"{said}: {comparison.verdict} on general speech by {100 * abs(comparison.difference):.1f} points {interval}"
