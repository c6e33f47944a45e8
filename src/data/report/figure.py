"""Figure of a data report: six small panels, drawn from its tables alone, so that a saved report redraws."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from src.data.report.findings import CLIPPED_FRACTION, LONG_SILENCE_SEC, NOT_MEASURED, count_clips
from src.data.report.report import DataReport
from src.data.utterance import SPLITS
from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, NotebookFigure

SPLIT_COLORS = dict(zip(SPLITS, (BLUE, GREEN, ORANGE), strict=True))
MAX_POINTS = 4_000  # more overlap anyway, and make a slow figure
_BINS = 30


def draw_data_report(report: DataReport) -> NotebookFigure:
    """Draw amount, durations, pace, levels, silence, and how the model likes the label styles or else sample rates."""
    clips = report.clips
    with matplotlib.rc_context({**FIGURE_STYLE, "font.size": 9, "axes.titlesize": 10}):
        figure = NotebookFigure(figsize=(10, 5.8), layout="constrained")
        axes = figure.subplots(2, 3)
        _draw_amount(axes[0, 0], clips)
        _draw_durations(axes[0, 1], clips)
        _draw_pace(axes[0, 2], clips)
        _draw_levels(axes[1, 0], clips)
        _draw_silence(axes[1, 1], clips)
        if report.label_styles is not None and len(report.label_styles):
            _draw_styles(axes[1, 2], report.label_styles)
        else:
            _draw_rates(axes[1, 2], clips)
    return figure


def _draw_amount(axes: Axes, clips: pd.DataFrame) -> None:
    minutes = [float(clips.loc[clips["split"] == name, "duration_sec"].sum()) / 60 for name in SPLITS]
    axes.barh(SPLITS, minutes, color=[SPLIT_COLORS[name] for name in SPLITS], height=0.5)
    labels = []
    for place, (name, value) in enumerate(zip(SPLITS, minutes, strict=True)):
        part = clips[clips["split"] == name]
        speakers = int(part["speaker"].nunique())
        voices = f"\n{speakers or 'unknown'} speaker{'s' * (speakers != 1)}" if len(part) else ""
        labels.append(f"{name}\n{count_clips(len(part))}{voices}")
        axes.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(SPLITS)), labels, fontsize=8)
    axes.set(title="Amount", xlabel="minutes", xlim=(0, 1.2 * max(minutes) or 1))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _draw_durations(axes: Axes, clips: pd.DataFrame) -> None:
    parts = {name: clips.loc[clips["split"] == name, "duration_sec"] for name in SPLITS}
    present = {name: part.to_numpy(dtype=float) for name, part in parts.items() if len(part)}
    longest = float(clips["duration_sec"].max())
    axes.hist(
        list(present.values()), bins=list(np.linspace(0, longest, _BINS + 1)), stacked=True,
        color=[SPLIT_COLORS[name] for name in present], label=list(present),
    )  # fmt: skip
    axes.set(title="Durations", xlabel="seconds", ylabel="clips", xlim=(0, 1.03 * longest))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.legend(frameon=False, fontsize=8)


def _draw_pace(axes: Axes, clips: pd.DataFrame) -> None:
    odd = clips[clips["chars_per_sec_outlier"]]
    _scatter(axes, clips, odd, ("duration_sec", "chars_per_sec"), f"{count_clips(len(odd))} far off")
    median = float(clips["chars_per_sec"].median())
    axes.axhline(median, color=GREY, linestyle=":", label=f"median {median:.1f}")
    axes.set(title="Pace", xlabel="seconds", ylabel="characters per second", xlim=(0, None))
    axes.set_ylim(0, 1.3 * max(float(clips["chars_per_sec"].max()), 1.0))
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2, handlelength=1.2, columnspacing=1)


def _draw_levels(axes: Axes, clips: pd.DataFrame) -> None:
    clipped = clips[clips["clipped_fraction"] > CLIPPED_FRACTION]
    _scatter(axes, clips, clipped, ("loudness_dbfs", "peak_dbfs"), f"{count_clips(len(clipped))} cut off")
    axes.axhline(0, color=GREY, linestyle=":", label="full scale")
    axes.set(title="Levels", xlabel="loudness, dBFS", ylabel="peak, dBFS")
    lowest = float(clips["peak_dbfs"].min())
    axes.set_ylim(lowest - 3, max(float(clips["peak_dbfs"].max()), 0) + 0.3 * (6 - lowest))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2, handlelength=1.2, columnspacing=1)


def _scatter(axes: Axes, clips: pd.DataFrame, marked: pd.DataFrame, columns: tuple[str, str], label: str) -> None:
    """Draw at most 4,000 clips as points, and all marked ones as crosses."""
    x, y = columns
    shown = clips.iloc[:: math.ceil(len(clips) / MAX_POINTS)]
    axes.plot(shown[x], shown[y], ".", color=BLUE, alpha=0.4, markersize=4, rasterized=True)
    style: dict[str, Any] = {"color": ORANGE, "markersize": 6, "markeredgewidth": 1.5, "rasterized": True}
    axes.plot(marked[x], marked[y], "x", label=label, **style)


def _draw_silence(axes: Axes, clips: pd.DataFrame) -> None:
    heard = clips[clips["speech_fraction"].notna()]
    axes.set(title="Silence around speech", xlabel="seconds", ylabel="clips")
    ends = {"before": heard["leading_silence_sec"].dropna(), "after": heard["trailing_silence_sec"].dropna()}
    longest = max((float(part.max()) for part in ends.values() if len(part)), default=math.nan)
    if math.isnan(longest):
        reason = NOT_MEASURED if not len(heard) else "no speech found"
        axes.text(0.5, 0.5, reason, ha="center", color=GREY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    right = max(longest, 1.25 * LONG_SILENCE_SEC)
    bins = list(np.linspace(0, right, _BINS + 1))
    for (name, part), (color, style) in zip(ends.items(), ((BLUE, "-"), (ORANGE, "--")), strict=True):
        axes.hist(part, bins=bins, histtype="step", color=color, linestyle=style, linewidth=1.5, label=name)
    axes.axvline(LONG_SILENCE_SEC, color=GREY, linestyle=":", label="long")
    axes.set_xlim(0, right)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    mute = int((heard["speech_fraction"] == 0).sum())
    without = f"; {mute:,} without speech" if mute else ""
    axes.legend(frameon=False, fontsize=8, title=f"{count_clips(len(heard))}{without}", title_fontsize=8)


def _draw_rates(axes: Axes, clips: pd.DataFrame) -> None:
    counts = clips["sample_rate"].value_counts().sort_index()
    axes.bar([f"{rate / 1000:g}" for rate in counts.index], counts.to_numpy(), width=0.5, color=BLUE)
    for place, n in enumerate(counts):
        axes.annotate(f"{n:,}", (place, n), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set(title="Sample rates of the files", xlabel="kHz", ylabel="clips", xlim=(-0.8, len(counts) - 0.2))
    axes.margins(y=0.15)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(axis="x", visible=False)


def _draw_styles(axes: Axes, styles: pd.DataFrame) -> None:
    best = float(styles["nats"].min())
    places = list(range(len(styles)))
    axes.barh(places, styles["nats"], height=0.6, color=[GREEN if v == best else GREY for v in styles["nats"]])
    for place, value in enumerate(styles["nats"]):
        axes.annotate(f"{value:.1f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    rows = zip(styles["style"], styles["space"], strict=True)
    names = [style if space else f"{style},\nno space" for style, space in rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    n = int(styles["clips"].iloc[0])
    axes.set(
        title="Label styles", xlabel=f"nats per transcript, {count_clips(n)}", xlim=(0, 1.2 * styles["nats"].max())
    )
    axes.grid(axis="y", visible=False)
