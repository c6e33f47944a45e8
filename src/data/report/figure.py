"""Figure of a data report: six small panels, drawn from its tables alone, so that a saved report redraws."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from src.data.report.findings import CLIPPED_FRACTION, LONG_SILENCE_SEC, NOT_MEASURED, counted
from src.data.report.report import DataReport
from src.data.utterance import SPLITS
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure

SPLIT_COLORS = dict(zip(SPLITS, (BLUE, GREEN, ORANGE), strict=True))
MAX_LANGUAGES = 6  # with a median of their own
MAX_POINTS = 4_000  # more overlap anyway, and make a slow figure
_BINS = 30


def draw_data_report(report: DataReport) -> NotebookFigure:
    """Draw amount, durations, pace, levels, silence, and how the model likes the label styles or else sample rates."""
    clips, styles = report.clips, report.label_styles
    with matplotlib.rc_context({**FIGURE_STYLE, "font.size": 9, "axes.titlesize": 10, "legend.frameon": False}):
        figure = NotebookFigure(figsize=(10, 5.8), layout="constrained")
        amount, durations, pace, levels, silence, last = figure.subplots(2, 3).flat
        _draw_amount(amount, clips)
        parts = {name: clips.loc[clips["split"] == name, "duration_sec"] for name in SPLITS}
        bins = list(np.linspace(0, float(clips["duration_sec"].max()), _BINS + 1))
        colors = [SPLIT_COLORS[name] for name in parts]
        durations.hist(list(parts.values()), bins=bins, stacked=True, color=colors, label=list(parts))
        durations.set(title="Durations", xlabel="seconds", ylabel="clips", xlim=(0, None))
        durations.legend(fontsize=8)
        odd, clipped = clips["chars_per_sec_outlier"], clips["clipped_fraction"] > CLIPPED_FRACTION
        _scatter(pace, clips, "duration_sec", "chars_per_sec", odd, f"{counted(odd.sum())} far off")
        languages = clips["language"].fillna("")
        medians = clips.groupby(languages)["chars_per_sec"].median()[languages.value_counts().index[:MAX_LANGUAGES]]
        for index, median in enumerate(medians):
            label = f"median {median:.1f}" if len(medians) == 1 else "medians" if index == 0 else None
            pace.axhline(median, color=GREY, linestyle=":", label=label)
        if len(medians) > 1:
            pace.secondary_yaxis("right").set_yticks(medians, [code or "?" for code in medians.index], fontsize=8)
        pace.set(title="Pace", xlabel="seconds", ylabel="characters per second")
        _scatter(levels, clips, "loudness_dbfs", "peak_dbfs", clipped, f"{counted(clipped.sum())} cut off")
        levels.axhline(0, color=GREY, linestyle=":", label="full scale")
        levels.set(title="Levels", xlabel="loudness, dBFS", ylabel="peak, dBFS")
        for axes in (pace, levels):
            axes.margins(y=0.3)  # room for the legend
            axes.legend(fontsize=8, loc="upper left", ncols=2, handlelength=1.2, columnspacing=1)
        pace.set(xlim=(0, None), ylim=(0, None))
        _draw_silence(silence, clips)
        if styles is not None and len(styles):
            _draw_styles(last, styles)
        else:
            counts = clips["sample_rate"].value_counts().sort_index()
            bars = last.bar([f"{rate / 1000:g}" for rate in counts.index], counts, width=0.5, color=BLUE)
            last.bar_label(bars, padding=3, fontsize=8)
            last.set(title="Sample rates of the files", xlabel="kHz", ylabel="clips", xlim=(-0.8, len(counts) - 0.2))
            last.margins(y=0.15)
            last.grid(axis="x", visible=False)
        for axes in (durations, silence):
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _draw_amount(axes: Axes, clips: pd.DataFrame) -> None:
    found = clips.groupby("split").agg(sec=("duration_sec", "sum"), n=("id", "size"), speakers=("speaker", "nunique"))
    found = found.reindex(SPLITS, fill_value=0)
    bars = axes.barh(SPLITS, found["sec"] / 60, color=list(SPLIT_COLORS.values()), height=0.5)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    rows = zip(SPLITS, found["n"], found["speakers"], strict=True)
    labels = [f"{name}\n{counted(n)}\nspeakers: {speakers or 'unknown'}" for name, n, speakers in rows]
    axes.set_yticks(range(len(SPLITS)), labels, fontsize=8)
    axes.set(title="Amount", xlabel="minutes")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _scatter(axes: Axes, clips: pd.DataFrame, x: str, y: str, marked: pd.Series[bool], label: str) -> None:
    """Draw at most 4,000 clips as points, and all marked ones as crosses."""
    shown = clips.iloc[:: -(-len(clips) // MAX_POINTS)]
    axes.plot(shown[x], shown[y], ".", color=BLUE, alpha=0.4, markersize=4, rasterized=True)
    axes.plot(clips.loc[marked, x], clips.loc[marked, y], "x", color=ORANGE, label=label, rasterized=True)


def _draw_silence(axes: Axes, clips: pd.DataFrame) -> None:
    heard = clips[clips["speech_fraction"].notna()]
    ends = {"before": heard["leading_silence_sec"].dropna(), "after": heard["trailing_silence_sec"].dropna()}
    axes.set(title="Silence around speech", xlabel="seconds", ylabel="clips")
    if not any(map(len, ends.values())):
        reason = "no speech found" if len(heard) else NOT_MEASURED
        axes.text(0.5, 0.5, reason, ha="center", color=GREY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    bins = list(np.linspace(0, max(1.25 * LONG_SILENCE_SEC, *(part.max() for part in ends.values())), _BINS + 1))
    for (name, part), (color, style) in zip(ends.items(), ((BLUE, "-"), (ORANGE, "--")), strict=True):
        axes.hist(part, bins=bins, histtype="step", color=color, linestyle=style, linewidth=1.5, label=name)
    axes.axvline(LONG_SILENCE_SEC, color=GREY, linestyle=":", label="long")
    mute = int((heard["speech_fraction"] == 0).sum())
    axes.legend(fontsize=8, title=f"{counted(len(heard))}, {mute:,} without speech", title_fontsize=8)


def _draw_styles(axes: Axes, styles: pd.DataFrame) -> None:
    names = styles["style"] + styles["space"].map({True: "", False: ",\nno space"})
    if "language" in styles and styles["language"].nunique() > 1:
        names = styles["language"] + " " + names
    colors = [GREEN if nats == styles["nats"].min() else GREY for nats in styles["nats"]]
    bars = axes.barh(range(len(styles)), styles["nats"], height=0.6, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(styles)), list(names), fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Label styles", xlabel=f"nats per transcript, {counted(styles['clips'].iloc[0])}")
    axes.margins(x=0.2)
    axes.grid(axis="y", visible=False)
