"""Figures of a run's evaluation, drawn from its files alone: error rates, slices, kinds of errors and speed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from src.data.report.findings import NOT_MEASURED, counted
from src.evaluation.evaluator import compare_predictions
from src.evaluation.metrics import PLAIN, UNKNOWN, align_words, sum_counts
from src.evaluation.report import run_files
from src.evaluation.report.run_files import STOCK, TUNED, Row
from src.evaluation.report.summary import Headline, describe_difference, headline, label_of, main_model, number
from src.evaluation.slices import slice_rates
from src.evaluation.visualization.style import annotate, drawable, gap, mark_powers, new_figure, show_note, styles_of
from src.evaluation.visualization.training import TrainingVisualizer
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREEN, GREY, ORANGE

MAX_SLICES = 12  # one row each; more do not fit into four inches
MAX_WORDS = 15  # of a panel of confusions
MAX_TIMINGS = 14  # rows of engines and batch sizes
MAX_SINGLE = 5  # engines among the modes
UNITS = {"duration_sec": " s", "duration": " s", "age": " years", "snr_db": " dB"}
EDITS = {"substitute": "substitutions", "delete": "deletions", "insert": "insertions"}
HOW_TO_MEASURE = "measure with LatencyBenchmark (src/evaluation/latency.py) and save the results"
_OUTSIDE: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1)}  # legend next to a panel
_Rate = tuple[float, float, float]  # value, low and high; nan for what was not measured


class EvaluationVisualizer:
    """Comparisons of one run; what was not measured stays blank, and is a DataError if it is the whole figure.

    Most figures can be drawn on a part of a page, `on`, as `comprehensive` does.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = run_dir
        rows = run_files.load_metrics(run_dir)
        self._evaluations = run_files.latest_evaluations(rows)
        if not self._evaluations:
            raise DataError(f"{run_dir}: nothing was evaluated yet; evaluate and save first")
        self._predictions = run_files.load_predictions(run_dir)
        self._styles = styles_of({**self._evaluations, **self._predictions})
        self._latencies = latest_latencies(rows)
        self._streaming = run_files.last_row(rows, "streaming")

    def comprehensive(self, column: str = "duration_sec") -> Figure:
        """Draw all on one page: training, comparison, errors, slices of a column, latency, and ways of inference."""
        rows: list[list[tuple[str, Callable[..., Figure]]]] = [
            [("training", lambda on: TrainingVisualizer(self._run_dir).training_analysis(on=on))],
            [("comparison", self.stock_against_tuned), ("kinds of errors", self.error_types)],
            [("slices", partial(self.wer_by_slice, column)), ("latency", self.latency_distribution)],
            [("ways of inference", self.modes)],
        ]
        with new_figure(18, 19) as figure:
            bands = figure.subfigures(len(rows), 1, height_ratios=(6.2, 3.8, 4.4, 3.6))
            for band, parts in zip(bands, rows, strict=True):
                ratios = (8, 10)[: len(parts)]  # as wide as they are alone
                places = np.atleast_1d(band.subfigures(1, len(parts), wspace=0.03, width_ratios=ratios))
                for place, (name, draw) in zip(places, parts, strict=True):
                    try:
                        draw(on=place)
                    except DataError:
                        show_note(place.subplots(), f"{name}: {NOT_MEASURED}")
            figure.suptitle(f"Run {drawable(Path(self._run_dir).name)}", fontsize=14, fontweight="bold")
        return figure

    def stock_against_tuned(self, *, on: SubFigure | None = None) -> Figure:
        """Draw the headline with intervals under both normalisers, one bar per model, and the models' difference."""
        first = next(iter(self._evaluations.values()))
        caption = counted(first["n"], "clip")
        if headline(first).low is not None:
            caption += f"; {first['confidence']:.0%} bootstrap intervals over {first['num_blocks']} {first['blocks']}s"
        stock, tuned = (self._predictions.get(name, []) for name in (STOCK, TUNED))
        if stock and tuned and {STOCK, TUNED} <= set(self._evaluations):  # intervals may overlap although one is better
            difference = compare_predictions(stock, tuned, run_files.bootstrap_of(self._evaluations[TUNED]))
            caption += f"\n{TUNED} against {STOCK}: {difference.verdict}; {describe_difference(difference)}"
        rated = self._evaluations.items()
        rates = {name: [_rate_of(headline(row)), _rate_of(headline(row, "second_"))] for name, row in rated}
        names = first["normalizer"], first.get("second_normalizer", PLAIN)
        with new_figure(8, 3.6, caption, on=on) as figure:
            axes = figure.subplots()
            self._draw_bars(axes, [name.replace(" + ", "\n") for name in names], rates)
            title = headline(first).title
            axes.set(title=f"{title.capitalize()} by normaliser", ylabel=f"{headline(first).name}, test set")
            axes.legend(**_OUTSIDE)
        return figure

    def wer_by_duration(self) -> Figure:
        """Draw the headline with intervals by clip length.

        Ranges instead of one point per clip: the rate of a clip of four words is 0, 1/4, 1/2, ..., and a cloud of these
        hides what the sums show.
        """
        return self.wer_by_slice("duration_sec")

    def wer_by_slice(self, column: str, *, on: SubFigure | None = None) -> Figure:
        """Draw the headline with intervals for each slice of a column, for each model, below the rate over all clips.

        Slices have the metrics of their languages, which their labels name if they differ. The column is one of
        `slice_columns`, or another one of the rows; of more than 12 slices the first are drawn.
        """
        if not self._predictions:
            raise DataError(f"{self._run_dir}: no predictions; evaluate a model and save")
        found = {
            name: slice_rates(rows, column, bootstrap=run_files.bootstrap_of(self._evaluations.get(name, {})))
            for name, rows in self._predictions.items()
        }
        values = list(dict.fromkeys(part.value for parts in found.values() for part in parts))
        shown = values[:MAX_SLICES]
        models = {}  # (rows, 4): clips, rate and its interval
        for name, parts in found.items():
            overall = self._evaluations.get(name, {})
            by_value = {part.value: (part.n, part.rate, part.low, part.high) for part in parts}
            rows = [by_value.get(value, (0, math.nan, math.nan, math.nan)) for value in shown]
            models[name] = np.array([(overall.get("n", 0), *_rate_of(headline(overall))), *rows])
        metrics = {part.value: part.metric for parts in found.values() for part in parts}
        whole = headline(next(iter(self._evaluations.values()), {}))
        metric = whole.name if set(metrics.values()) <= {whole.name} else "error rate"
        labels = ["all"] + [
            drawable(label_of(column, value)) + UNITS.get(column, "") * (value != UNKNOWN) for value in shown
        ]
        if metric != whole.name:  # of several languages
            named = [whole.name, *(metrics[value] for value in shown)]
            labels = [f"{label}, {name}" for label, name in zip(labels, named, strict=True)]
        sizes = [list(dict.fromkeys(n)) for n in zip(*(table[:, 0] for table in models.values()), strict=True)]
        ticks = [
            f"{label}, {' / '.join(f'{n:,.0f}' for n in each)} clip{'s' * (each != [1])}"  # models may differ in these
            for label, each in zip(labels, sizes, strict=True)
        ]
        measured = [part for parts in found.values() for part in parts if math.isfinite(part.low)]
        notes = [f"{len(shown)} of {len(values)} slices are drawn"] if len(values) > len(shown) else []
        over = " or ".join(sorted({f"{part.blocks}s" for part in measured}))
        notes += [f"bootstrap intervals over {over}"] if over else []
        with new_figure(8, min(4.0, 1.5 + 0.4 * len(labels)), "; ".join(notes), on=on) as figure:
            axes = figure.subplots()
            for index, (name, table) in enumerate(models.items()):
                _, rates, low, high = table.T
                style = self._styles[name]
                # models side by side, so that intervals do not hide one another
                places = np.arange(len(labels)) + 0.5 / len(models) * (index - (len(models) - 1) / 2)
                axes.plot(rates, places, style.marker, color=style.color, label=drawable(name), clip_on=False)
                axes.hlines(places, low, high, color=style.color, linewidth=1.5)
                for place in places[np.isnan(rates)]:
                    annotate(axes, NOT_MEASURED, (0, place), (4, 0), va="center", color=GREY, fontsize=8)
            axes.axhline(0.5, color=GREY, linewidth=0.8)
            axes.set_yticks(range(len(labels)), ticks)
            title = metric[0].upper() + metric[1:]
            axes.set(title=f"{title} by {drawable(column.removesuffix('_sec'))}", xlabel=f"{metric}, test set")
            axes.set(xlim=(0, None), ylim=(len(labels) - 0.5, -0.5))
            axes.grid(axis="y", visible=False)
            axes.legend(**_OUTSIDE)
        return figure

    def error_types(self, *, on: SubFigure | None = None) -> Figure:
        """Draw substitutions, deletions and insertions as shares of words or characters, and clips that failed."""
        edits, clips = {}, {}
        counts_cut = any("truncated" in row for row in self._evaluations.values())  # older runs do not
        for name, row in self._evaluations.items():
            totals = [row.get(key) for key in (*EDITS.values(), "reference_words")]
            if None in totals:  # an older run logged no edits
                counts = sum_counts(self._predictions.get(name, ()))
                totals = [counts.substitutions, counts.deletions, counts.insertions, counts.reference_words]
            *errors, words = totals
            edits[name] = [(each / words if words else math.nan, math.nan, math.nan) for each in errors]
            failed = [gap(row.get("loop_rate")), gap(row.get("empty_rate"))]
            if counts_cut:
                failed.append(gap(row.get("truncated")) / row["n"])
            clips[name] = [(each, math.nan, math.nan) for each in failed]
        shown = headline(next(iter(self._evaluations.values())))
        caption = f"the three shares of a model add up to its {shown.name}"
        if shown.key == "mean":
            caption = "summed over the units of all languages, words or characters"
        caption += "; what failed is counted on the left too"
        with new_figure(10, 3.6, caption, on=on) as figure:
            left, right = figure.subplots(1, 2, width_ratios=(3, 2))
            self._draw_bars(left, list(EDITS.values()), edits)
            kind = {"WER": "Word errors", "CER": "Character errors"}.get(shown.name, "Errors")
            left.set(title=kind, ylabel=f"share of the reference's {shown.units}")
            self._draw_bars(right, ["loops", "empty outputs", *["ended at a limit"] * counts_cut], clips)
            right.set(title="Clips that failed", ylabel="share of the clips")
            left.legend(frameon=False)
        return figure

    def _draw_bars(self, axes: Axes, groups: Sequence[str], rates: Mapping[str, Sequence[_Rate]]) -> None:
        """Draw a bar per group and model, its interval, and its value above."""
        width = 0.8 / len(rates)
        for index, (name, given) in enumerate(rates.items()):
            places = np.arange(len(groups)) + width * (index - (len(rates) - 1) / 2)
            values, low, high = np.array(given).T
            style = self._styles[name]
            look: dict[str, Any] = {"color": style.color, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
            axes.bar(places, values, width=0.92 * width, label=drawable(name), **look)
            axes.vlines(places, low, high, color="black", linewidth=1.5)
            for place, value, top in zip(places, values, np.fmax(values, high), strict=True):
                measured = math.isfinite(value)
                annotate(
                    axes, number(value), (place, top if measured else 0), (0, 4), ha="center",
                    fontsize=9 if len(rates) <= 2 else 7, color="black" if measured else GREY,
                    rotation=0 if measured and len(rates) <= 4 else 90,
                )  # fmt: skip
        axes.set_xticks(range(len(groups)), groups)
        highest = np.nan_to_num([*rates.values()]).max()
        axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 1.2 * highest or 1))
        axes.grid(axis="x", visible=False)

    def confusions(self) -> Figure:
        """Draw the normalised words that the main model most often confuses, leaves out and inserts.

        Of languages without spaces these are characters.
        """
        model = main_model(self._evaluations)
        found: dict[str, Counter[str]] = {kind: Counter() for kind in EDITS.values()}
        for row in self._predictions.get(model, ()):
            normalizer = row.normalizer or self._evaluations[model]["normalizer"]
            for step in align_words(row.reference, row.hypothesis, normalizer):
                if step.edit != "equal":
                    words = filter(None, (step.reference, step.hypothesis))
                    found[EDITS[step.edit]][" → ".join(words)] += 1
        if not self._predictions.get(model):
            raise DataError(f"{self._run_dir}: no predictions of {model!r}; evaluate it and save")
        most = max(min(MAX_WORDS, len(counter)) for counter in found.values())
        changes: dict[str, Any] = {"font.size": 9, "axes.titlesize": 10}
        with new_figure(10, 4, f"most frequent errors, {drawable(model)}", **changes) as figure:
            panels = zip(figure.subplots(1, 3), found.items(), (ORANGE, BLUE, GREEN), strict=True)
            for axes, (kind, counter), color in panels:
                axes.set_title(f"{kind.capitalize()}: {counter.total():,}")
                if not counter:
                    show_note(axes, "none")
                    continue
                shown = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
                counts = [n for _, n in shown]
                bars = axes.barh(range(len(shown)), counts, height=0.6, color=color)
                axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
                axes.set_yticks(range(len(shown)), [drawable(words, max_chars=50) for words, _ in shown], fontsize=8)
                axes.set(xlim=(0, 1.15 * max(counts)), ylim=(most - 0.4, -0.6))  # bars as thick as in the other panels
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.grid(axis="y", visible=False)
                axes.set_xlabel(f"times; {len(shown)} of {len(counter):,} different")
        return figure

    def latency_distribution(self, *, on: SubFigure | None = None) -> Figure:
        """Draw how long clips take: each one's share of its batch, and median to 95th percentile of each engine."""
        times = {name: np.array([gap(row.latency_sec) for row in rows]) for name, rows in self._predictions.items()}
        times = {name: values[np.isfinite(values)] for name, values in times.items() if np.isfinite(values).any()}
        measured = [row for row in self._latencies if math.isfinite(gap(row.get("p50_sec")))]
        timings, omitted = measured[:MAX_TIMINGS], len(measured) > MAX_TIMINGS
        if not times and not timings:
            raise DataError(f"{self._run_dir}: no latency to draw; evaluate a model, or {HOW_TO_MEASURE}")
        caption = f"{MAX_TIMINGS} of {len(measured)} timings are drawn" if omitted else ""
        with new_figure(10, 4, caption, on=on) as figure:
            left, right = figure.subplots(1, 2)
            left.set_title("In the evaluation's batches")
            for name, values in times.items():
                style, (median, high) = self._styles[name], np.percentile(values, [50, 95])
                label = f"{drawable(name)}, {counted(len(values), 'clip')}: median {median:.3g} s, 95 % {high:.3g} s"
                left.ecdf(values, color=style.color, linestyle=style.line, linewidth=2, label=label)
            if times:
                left.set(xlabel="seconds per clip: its batch's time / clips in it", ylabel="share of the clips")
                left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
            right.set_title("By engine, median to 95th percentile")
            for place, row in enumerate(timings):
                median, high = row["p50_sec"], gap(row.get("p95_sec"))
                right.plot([median, high], [place, place], "o-", color=BLUE)
                text = f"{median:.3g} to {high:.3g}" if math.isfinite(high) else f"{median:.3g}"
                annotate(right, text, (np.fmax(median, high), place), (6, 0), va="center", fontsize=8)
            labels = [f"{drawable(row['engine'])}, batch of {row['batch_size']}" for row in timings]
            right.set_yticks(range(len(timings)), labels, fontsize=8)
            right.set(xlabel="seconds", ylim=(max(len(timings), 1) - 0.5, -0.5))
            right.margins(x=0.3)
            right.grid(axis="y", visible=False)
            for axes, drawn in ((left, times), (right, timings)):
                if drawn:
                    axes.set_xlim(left=0)
                else:
                    show_note(axes, NOT_MEASURED)
        return figure

    def rtf_by_batch(self) -> Figure:
        """Draw the real-time factor (compute time / audio time; less is faster) of each engine against batch size."""
        sizes = sorted({row["batch_size"] for row in self._latencies if math.isfinite(gap(row.get("rtf")))})
        if not sizes:
            raise DataError(f"{self._run_dir}: no real-time factor of any batch size; {HOW_TO_MEASURE}")
        with new_figure(8, 3.8) as figure:
            axes = figure.subplots()
            for engine, style in styles_of(dict.fromkeys(row["engine"] for row in self._latencies)).items():
                rows = [row for row in self._latencies if row["engine"] == engine and row["batch_size"] in sizes]
                places, values = [sizes.index(row["batch_size"]) for row in rows], [gap(row.get("rtf")) for row in rows]
                axes.plot(places, values, style.line, marker=style.marker, color=style.color, label=drawable(engine))
                for place, value in zip(places, values, strict=True):
                    if math.isfinite(value):
                        annotate(axes, f"{value:.3g}", (place, value), (0, 7), ha="center", fontsize=8)
            axes.set_yscale("log")
            axes.margins(y=0.2)
            mark_powers(axes.yaxis)
            axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axes.set(title="Real-time factor", xlabel="clips in a batch", ylabel="computing time / audio time")
            axes.set_xlim(-0.5, len(sizes) - 0.5)
            axes.legend(**_OUTSIDE)
        return figure

    def modes(self, *, on: SubFigure | None = None) -> Figure:
        """Draw error rate and real-time factor in batches, as a stream and clip by clip; blank if not measured.

        The main model's evaluation comes first. The stream is followed by the same clips in batches; timings with a
        batch of one are the single passes.
        """
        model, stream = main_model(self._evaluations), self._streaming
        evaluation = self._evaluations[model]
        overall = headline(evaluation)
        clips = counted(evaluation["n"], "clip")
        modes: list[tuple[str, Headline | None, float | None]] = [(f"batch, {clips}", overall, evaluation.get("rtf"))]
        if stream is None:
            modes.append(("streaming", None, None))
        else:
            clips = counted(stream["clips"], "clip")
            modes.append((f"streaming, {clips}", headline(stream), stream.get("rtf")))
            modes.append((f"batch, the stream's {clips}", headline(stream, "offline_"), None))
        single = [row for row in self._latencies if row["batch_size"] == 1][:MAX_SINGLE]
        modes += [(f"single pass, {drawable(row['engine'])}", headline(row), row.get("rtf")) for row in single]
        modes += [] if single else [("single pass", None, None)]
        kinds = {rate.name for _, rate, _ in modes if rate is not None and number(rate.rate) != NOT_MEASURED}
        names = [f"{name}: {rate.name}" if rate is not None and len(kinds) > 1 else name for name, rate, _ in modes]
        errors = [None if rate is None else rate.rate for _, rate, _ in modes]
        factors = [factor for _, _, factor in modes]
        caption = f"batch: {drawable(model)} model; stream and single pass: last measurement of the run; less is better"
        with new_figure(10, min(4.0, 1.4 + 0.4 * len(modes)), caption, on=on) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            for axes, values, color in ((left, errors, BLUE), (right, factors, ORANGE)):
                for place, value in enumerate(values):
                    width, measured = gap(value), number(value) != NOT_MEASURED
                    axes.barh(place, width, height=0.55, color=color)
                    point = (width if measured else 0.0, place)
                    annotate(axes, number(value), point, (4, 0), va="center", color="black" if measured else GREY)
                axes.set_xlim(0, 1.2 * np.nanmax([0.0, *map(gap, values)]) or 1)
                axes.grid(axis="y", visible=False)
            left.set(title="Accuracy", xlabel=overall.name if len(kinds) < 2 else "error rate")
            right.set(title="Speed", xlabel="real-time factor, computing time / audio time")
            left.set_yticks(range(len(modes)), names)
            left.invert_yaxis()
        return figure


def _rate_of(rate: Headline) -> _Rate:
    return gap(rate.rate), gap(rate.low), gap(rate.high)


def latest_latencies(rows: Sequence[Row]) -> list[Row]:
    """Return the last "latency" row of each model, engine and batch size, ordered by these.

    `engine` of the returned rows names the model too.
    """
    named = [{**row, "engine": f"{row['name']}, {row['engine']}"} for row in rows if row["event"] == "latency"]
    latest = {(row["engine"], int(row["batch_size"])): row for row in named}
    return [latest[key] for key in sorted(latest)]
