"""Results of a run as tables and sentences, the tuned model always compared with the stock model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import regex
from markupsafe import Markup

from src.data.report.findings import NOT_MEASURED, counted
from src.evaluation.evaluator import Prediction, compare_predictions
from src.evaluation.metrics import MIN_BLOCKS, PLAIN, PairedComparison
from src.evaluation.report import run_files
from src.evaluation.report.run_files import STOCK, TUNED, PredictionsByModel, Row, guard_name, is_guard, stock_first
from src.evaluation.slices import slice_rates
from src.utils.errors import DataError, visible
from src.utils.figures import BLUE, GREEN, ORANGE
from src.utils.languages import WHISPER_LANGUAGES, language_name
from src.utils.runtime import public

MAX_NAMED = 5  # clips in a sentence
FEW_BLOCKS = 10  # below it an interval is so wide that only large differences show
_BARE_MARK = regex.compile(r"(?<!\S)(?=\p{M})")
_MORE_RATES = {
    "match error rate (MER)": "mer",
    "word information lost (WIL)": "wil",
    "sentences with any error": "sentence_error_rate",
    "clips with a loop": "loop_rate",
    "clips with speech but without output": "empty_rate",
    "texts that ended at a limit": "truncated",
    "clips without speech": "empty_references",
}
_UNITS = {"WER": "words", "CER": "characters"}
_TITLES = {"WER": "word error rate", "CER": "character error rate"}
_PLACES = (
    "notebook.html", "report.html", "checkpoints/best_model_hf", "checkpoints/best_mix_hf", "ctranslate2_int8",
    "predictions.jsonl", "metrics.jsonl", "figures",
)  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """The error rate that decides, with its name; None where it was not measured."""

    name: str  # "WER", "CER", or "mean of 3 languages"
    rate: float | None
    low: float | None
    high: float | None

    @property
    def key(self) -> str:
        """The name for files: "wer", "cer" or "mean"."""
        return self.name.split()[0].lower()

    @property
    def title(self) -> str:
        """The name in full."""
        return title_of(self.name)

    @property
    def units(self) -> str:
        """What errors are counted in."""
        return _UNITS.get(self.name, "words and characters")

    @property
    def value(self) -> str:
        """The rate with its interval, if there is one."""
        rate, interval = number(self.rate), f" [{number(self.low)}, {number(self.high)}]"
        return rate if NOT_MEASURED in rate + interval else rate + interval

    def __str__(self) -> str:
        """As `CER 0.123 [0.101, 0.148]`."""
        return f"{self.name} {self.value}"


def title_of(name: str) -> str:
    """Return the name of a rate in full."""
    return _TITLES.get(name, f"error rate, {name}")


def headline(row: Row, prefix: str = "") -> Headline:
    """Return the headline of a row or a result; rows of older runs have a WER only, the second under the plain one.

    `prefix` is "val_" in rows of epochs, "offline_" in rows of streams, and "second_" for the second normaliser's.
    """
    older = "wer_plain" if prefix == "second_" else f"{prefix}wer"
    if row.get("metric") is None or (prefix == "second_" and "second_rate" not in row):
        return Headline("WER", *(row.get(f"{older}{end}") for end in ("", "_low", "_high")))
    languages = len(row.get("rates_by_language") or ())
    mean = f"mean of {languages} languages" if languages else "mean of the languages"
    name = mean if row["metric"] == "mean" else str(row["metric"])
    return Headline(name, *(row.get(f"{prefix}{end}") for end in ("rate", "low", "high")))


def second_label(row: Row) -> str:
    """Return the name of the headline under the second normaliser."""
    name, normalizer = headline(row).name, row.get("second_normalizer", PLAIN)
    if normalizer == PLAIN:  # of English, and in older runs
        return f"{name} plain"
    return "mean, second normaliser" if "+" in normalizer else f"{name}, {normalizer}"


@dataclass(frozen=True)
class RunSummary:
    """Results of a run; what was not measured is None or empty."""

    run_dir: Path
    epochs: Sequence[Row]  # of the last training
    evaluations: Mapping[str, Row]  # the last of each name ("stock", "tuned")
    predictions: PredictionsByModel  # those of the guard set included
    streaming: Row | None
    comparison: PairedComparison | None  # tuned against stock on the same clips
    guard: Mapping[str, Row]  # evaluations on the guard set ("stock (guard)", "tuned (guard)")
    guard_set: Row | None
    mix: Sequence[Row]  # the last sweep over mixes of stock and tuned weights, from share 0 to 1
    full_context: Row | None  # validation with clips padded to 30 s

    def figures(self) -> dict[str, float | None]:
        """Return the headline figures, named by their metric (`tuned_wer`); None for what was not measured."""
        stock, tuned = self.evaluations.get(STOCK, {}), self.evaluations.get(TUNED, {})
        usual = tuned or stock
        values = {
            f"{name}_{headline(row or usual).key}": headline(row).rate
            for name, row in ((STOCK, stock), (TUNED, tuned), ("streaming", self.streaming or {}))
        } | {"rtf": tuned.get("rtf")}
        return {key: None if value is None or math.isnan(value) else round(value, 4) for key, value in values.items()}

    def to_text(self) -> str:
        """Return tables, verdict and places of files as plain text, which is valid Markdown too."""
        parts = []
        if self.epochs:
            best = run_files.best_epoch(self.epochs)
            kept = "none was kept"
            if best:
                kept = f"{number(headline(best, 'val_').rate)} after epoch {best['epoch']}, which was kept"
            first = f"validation {headline(self.epochs[0], 'val_')} after the first"
            parts.append(f"training: {counted(len(self.epochs), 'epoch')}; {first}, {kept}")
        parts.append(describe_mix(self.mix))
        results = {**self.evaluations, **self.guard}
        parts.append(format_comparison(results, self.predictions) if results else "nothing was evaluated")
        parts.append(describe_guard_set(self.guard_set))
        if (row := self.streaming) is not None:
            streamed, offline = headline(row), headline(row, "offline_")
            cut = f"; {counted(row['truncated'], 'update')} ended at a limit of tokens" if row.get("truncated") else ""
            parts.append(
                f"streaming, {row['clips']} clips in {row['audio_sec']:.0f} s: {streamed.name} "
                f"{number(streamed.rate)}, the same clips one by one {number(offline.rate)}; RTF "
                f"{number(row['rtf'], 2)}, longest update {number(row['longest_update_sec'], 2)} s{cut}"
            )
        parts.append("\n".join(str(self.run_dir / place) for place in _PLACES if (self.run_dir / place).exists()))
        return "\n\n".join(filter(None, parts))


def summarize_run(run_dir: str | Path) -> RunSummary:
    """Read a run's files.

    Raises:
        DataError: the folder has no metrics, a line of a file is damaged, or the models were measured on different
            clips.
    """
    rows = run_files.load_metrics(run_dir)
    evaluations = run_files.latest_evaluations(rows)
    predictions = run_files.load_predictions(run_dir, guard=None)
    mix: list[Row] = []
    for row in rows:
        if row["event"] == "mix":
            mix = [row] if row["share"] == 0 else [*mix, row]  # share 0 begins a sweep
        elif row["event"] == "epoch":
            mix = []  # trained since: the sweep was of other weights
    both = {name: evaluations[name] for name in (STOCK, TUNED) if name in evaluations}
    return RunSummary(
        run_dir=Path(run_dir),
        epochs=run_files.last_training(rows)[1],
        evaluations=evaluations,
        predictions=predictions,
        streaming=run_files.last_row(rows, "streaming"),
        comparison=_compare_with_stock(both, predictions)[TUNED][1] if len(both) == 2 else None,
        guard=run_files.latest_evaluations(rows, guard=True),
        guard_set=run_files.last_row(rows, "guard"),
        mix=mix,
        full_context=run_files.last_row(rows, "full_context"),
    )


def main_model(names: Iterable[str]) -> str:
    """Return the model that a run is about: the tuned one, else the last that is not the stock model, else that."""
    ordered = stock_first(names)
    return TUNED if TUNED in ordered else ordered[-1]


def comparison_table(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> pd.DataFrame:
    """Return one row per model for reading, the stock model first, the others with their change against it.

    Results, by name, are `EvaluationResult`s or rows of metrics.jsonl, which need predictions for a verdict. Those of
    the guard set come last, compared with the stock model on the guard set.

    Raises:
        DataError: no result, or results of different clips.
    """
    if not results:
        raise DataError("comparison_table: no result given; evaluate a model first")
    rates = {name: _rates_of(results[name]) for name in stock_first(results)}
    labels = dict.fromkeys(label for found in rates.values() for label in found)  # sets may have other metrics
    rows: dict[str, dict[str, str]] = {}
    for name, found in rates.items():
        row = results[name]
        rows[name] = {**dict.fromkeys(labels, ""), **found} | {
            "audio context": row.get("audio_context", NOT_MEASURED),
            "normaliser": row.get("normalizer", NOT_MEASURED),
            **({"second normaliser": row["second_normalizer"]} if "second" in second_label(row) else {}),
            "clips": str(row.get("n", NOT_MEASURED)),
            "interval over": counted(row["num_blocks"], row["blocks"]) if row.get("num_blocks") else NOT_MEASURED,
        }
    for name, (stock, comparison) in _compare_with_stock(results, predictions or {}).items():
        before, after = headline(results[stock]), headline(results[name])
        rows[name][f"{after.name} change"] = relative_change(before.rate, after.rate)
        rows[name]["CER change"] = relative_change(results[stock].get("cer"), results[name].get("cer"))
        rows[name]["verdict"] = NOT_MEASURED if comparison is None else comparison.verdict
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def _rates_of(row: Row) -> dict[str, str]:
    """Return the rates of an evaluation for reading: the headline, the same under the second normaliser, the others."""
    first, others = headline(row), {"CER": number(row.get("cer"))}
    if first.key == "mean":
        others = {"WER, languages with spaces": number(row.get("wer")), **others}
    if second_label(row).endswith("plain"):
        others["CER plain"] = number(row.get("cer_plain"))
    return {
        first.name: first.value,
        second_label(row): headline(row, "second_").value,
        **({} if first.name == "CER" else others),
        "loss": number(row.get("loss")),
        "RTF": number(row.get("rtf")),
    }


def language_table(results: Mapping[str, Row]) -> pd.DataFrame:
    """Return one row per language with the headline of each result in it, and last their mean; empty for one language.

    The mean is of the languages' own headlines, each counting alike whatever its number of clips.
    """
    found = {name: row.get("rates_by_language") or {} for name, row in results.items()}
    languages = dict.fromkeys(code for rates in found.values() for code in rates)
    rows = []
    for code in languages if len(languages) > 1 else ():
        own = {name: fields_of(rates[code]) for name, rates in found.items() if code in rates}
        first = next(iter(own.values()))
        rates = {name: headline(own[name]).value if name in own else NOT_MEASURED for name in results}
        rows.append([label_of("language", code), first["n"], first["metric"], *rates.values(), first["normalizer"]])
    if rows:
        overall = [headline(row) for row in results.values()]
        clips = next(iter(results.values())).get("n", NOT_MEASURED)
        rows.append([overall[0].name, clips, "mean", *(each.value for each in overall), "each language counts alike"])
    return pd.DataFrame(rows, columns=["language", "clips", "metric", *results, "normaliser"])


def label_of(column: str, value: str) -> str:
    """Return the value of a slice for reading: languages by their names."""
    return language_name(value) if column == "language" and value in WHISPER_LANGUAGES else value


def fields_of(rate: Any) -> Row:
    """Return the rate of a language as a row, whether it was read from a file or measured."""
    return rate if isinstance(rate, Mapping) else vars(rate)


def format_comparison(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> str:
    """Return `comparison_table` as aligned Markdown, one column per model, and `describe_results`."""
    table = comparison_table(results, predictions).T
    lines = [markdown_table(["", *table.columns], table.itertuples()), ""]
    for guard in (False, True):
        languages = language_table({name: row for name, row in results.items() if is_guard(name) == guard})
        if len(languages):
            lines += [markdown_table(list(languages.columns), languages.itertuples(index=False)), ""]
    lines += map(escape_markdown, describe_results(results, predictions))
    return "\n".join(lines).rstrip()


def describe_results(results: Mapping[str, Row], predictions: PredictionsByModel | None = None) -> list[str]:
    """Return what each comparison with the stock model means, and where test set and guard set disagree."""
    compared = _compare_with_stock(results, predictions or {})
    verdicts = {name: comparison.verdict for name, (_, comparison) in compared.items() if comparison is not None}
    said: list[str] = []
    for name, (stock, comparison) in compared.items():
        if comparison is not None and is_guard(name):
            said.append(f"{name}: {comparison.verdict} on general speech, {describe_difference(comparison)}")
        elif comparison is not None:
            said.append(describe_comparison(comparison, tuned=name, stock=stock))
    said += [
        f"the {name} model is better on its own domain but worse on the guard set: use it for speech of its own "
        f"domain, and the {compared[name][0]} model for other speech"
        for name, verdict in verdicts.items()
        if (verdict, verdicts.get(guard_name(name))) == ("better", "worse")
    ]
    for name, row in results.items():
        if cut := [public(clip.id) for clip in _rows_of(name, row, predictions or {}) if clip.truncated]:
            shown = ", ".join(cut[:MAX_NAMED]) + (", ..." if len(cut) > MAX_NAMED else "")
            said.append(
                f"{name}: {counted(len(cut), 'text')} ended at a limit of tokens, not where the speech ends ({shown}): "
                "a loop, or inference.max_tokens_per_sec is too low for this speech"
            )
    return said


def _rows_of(name: str, result: Row, predictions: PredictionsByModel) -> Sequence[Prediction]:
    return getattr(result, "rows", None) or predictions.get(name, ())


def describe_comparison(comparison: PairedComparison, *, tuned: str = TUNED, stock: str = STOCK) -> str:
    """Return the verdict on the tuned model in one sentence, with the advice that follows."""
    advice = {
        "better": f"the {tuned} model is better than the {stock} one",
        "worse": f"the {tuned} model is WORSE: keep the {stock} model",
        "no difference shown": f"no difference shown: keep the {stock} model, or measure on more speakers",
        "too few to tell": f"too few to tell: keep the {stock} model, or measure on {MIN_BLOCKS} speakers or more",
    }[comparison.verdict]
    return f"{tuned} against {stock}: {describe_difference(comparison)}; {advice}"


def describe_difference(comparison: PairedComparison) -> str:
    """Return a difference in the headline with its interval and what was resampled."""
    blocks = counted(comparison.num_blocks, comparison.blocks)
    points = f"{headline(vars(comparison)).name} {100 * comparison.difference:+.1f} points"
    if math.isnan(comparison.low):
        return f"{points} (no interval from {blocks})"
    return f"{points} [{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}] over {blocks}"


def describe_guard_set(row: Row | None) -> str:
    """Return what the guard set consists of, and the languages that it lacks; empty without one."""
    if not row:
        return ""
    speakers = f" of {counted(row['speakers'], 'speaker')}" if row["speakers"] else ""
    missing = ", ".join(label_of("language", code) for code in row.get("not_measured") or ())
    lacking = f"; not measured: {missing}" if missing else ""
    return f"guard set: {row['set']}, {counted(row['clips'], 'clip')}{speakers}{lacking}"


def describe_mix(rows: Sequence[Row]) -> str:
    """Return the result of a sweep over mixes, from share 0 to 1, in one sentence; empty without one."""
    if not rows:
        return ""
    rates = ", ".join(f"{row['share']:g}: {number(headline(row).rate)}" for row in rows)
    metric = headline(rows[0]).name
    chosen = next(row["share"] for row in rows if row["chosen"])
    ends = {0: "none is below the stock weights: keep the stock model", 1: "the tuned weights: no mix was taken"}
    mix = f"the mix of share {chosen:g} was taken; these clips chose it, which flatters it: the test set judges"
    clips, meaning = counted(rows[0]["clips"], "validation clip"), ends.get(chosen, mix)
    return f"mix: {metric} on {clips} by share of tuned weights {rates}; {meaning}"


def more_rates(evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return the rates that `comparison_table` leaves out, for reading: one row per rate, one column per model."""
    table = {}
    for name, row in evaluations.items():
        units = headline(row).units
        table[name] = {label: number(row.get(key)) for label, key in _MORE_RATES.items()} | {
            # without silence there is none to invent words on
            f"{units} invented on them": number(row.get("hallucinated_words") if row.get("empty_references") else None),
            **{edits: number(row.get(edits)) for edits in ("substitutions", "deletions", "insertions")},
            f"{units} of the references": number(row.get("reference_words")),
        }
    return pd.DataFrame(table)


def slice_table(column: str, predictions: PredictionsByModel, evaluations: Mapping[str, Row]) -> pd.DataFrame:
    """Return one row per slice, with the headline of each model that was measured on the main model's clips."""
    main = main_model(predictions)
    ids = {row.id for row in predictions[main]}
    slices = {
        name: slice_rates(rows, column, bootstrap=run_files.bootstrap_of(evaluations.get(name, {})))
        for name, rows in predictions.items()
        if {row.id for row in rows} == ids
    }
    parts = slices[main]
    metrics = {part.metric for part in parts}
    metric = metrics.pop() if len(metrics) == 1 else "error rate"
    units = _UNITS.get(metric, "words or characters")
    table = pd.DataFrame({column: part.value, "clips": part.n, units: part.reference_words} for part in parts)
    if metrics:  # several
        table["metric"] = [part.metric for part in parts]
    for name, own in slices.items():
        rates = {part.value: headline(vars(part)).value for part in own}
        table[f"{name}: {metric}"] = table[column].map(rates).fillna(NOT_MEASURED)
    table["interval over"] = [counted(part.num_blocks, part.blocks) for part in parts]
    table[column] = [label_of(column, value) for value in table[column]]
    return table


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for reading; a missing one is never a zero."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def relative_change(before: float | None, after: float | None) -> str:
    """Return the relative change in percent; empty if it has no meaning."""
    if NOT_MEASURED in (number(before), number(after)) or not before or after is None:
        return ""
    return f"{100 * (after - before) / before:+.1f} %"


def on_circle(text: str) -> str:
    """Return a text for reading: a combining mark that nothing carries stands on a dotted circle."""
    return str(_BARE_MARK.sub("\u25cc", text))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an aligned Markdown table; cells may hold any text."""
    cells = [[escape_markdown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def escape_markdown(text: object) -> str:
    """Return a text of the data on one line, without what would begin a cell, an HTML element or an image."""
    line = visible(" ".join(str(text).split()))
    return line.replace("|", "\\|").replace("<", "&lt;").replace("![", "!\\[")


def render(template: str, **values: object) -> str:
    """Return a page from `src/evaluation/templates`; in HTML all values are escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("src.evaluation"), autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.globals |= {"BLUE": BLUE, "ORANGE": ORANGE, "GREEN": GREEN, "STOCK": STOCK}
    environment.globals |= {"NOT_MEASURED": NOT_MEASURED, "FEW_BLOCKS": FEW_BLOCKS}
    functions = (headline, describe_comparison, describe_guard_set, describe_mix, language_table, more_rates)
    environment.globals |= {function.__name__: function for function in functions}
    environment.filters |= {"number": number, "counted": counted, "table": _html_table}
    environment.filters |= {"md": escape_markdown, "md_table": markdown_table, "visible": visible}
    return environment


def _html_table(frame: pd.DataFrame, *, index: bool = True) -> Markup:
    with pd.option_context("display.max_colwidth", None):
        return Markup('<div class="wide">{}</div>').format(Markup(frame.to_html(index=index, border=0, na_rep="")))


def _compare_with_stock(
    results: Mapping[str, Row], predictions: PredictionsByModel
) -> dict[str, tuple[str, PairedComparison | None]]:
    """Return for each other model the stock model of its set, test or guard, and their comparison clip by clip."""
    compared = {}
    for guard in (False, True):
        names = [name for name in stock_first(results) if is_guard(name) == guard]
        rows = [_rows_of(name, results[name], predictions) for name in names]
        for name, own in zip(names[1:], rows[1:], strict=True):
            both = rows[0] and own
            settings = run_files.bootstrap_of(results[name])
            compared[name] = names[0], compare_predictions(rows[0], own, settings) if both else None
    return compared
