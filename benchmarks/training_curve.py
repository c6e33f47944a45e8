"""Table and figure of the real run of benchmarks/training.py: error rate by updates and by minutes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from src.utils.figures import BLUE, FIGURE_STYLE, GREEN, GREY, ORANGE, save_figure

Figures = Mapping[str, Any]


def curve_table(stock: Figures, ours: Figures, hf: Figures) -> list[dict[str, str]]:
    """Return one row per epoch; the peer has the first only."""
    before = f"{100 * stock['wer_full']:.1f} %"
    rows = [_row("0", "0", "-", before, before, "0.0 min", "0.0 min")]
    for point in ours["by_epoch"]:
        first = point["epoch"] == 1
        rows.append(
            _row(
                str(point["epoch"]),
                str(point["updates"]),
                f"{100 * point['wer_own']:.1f} %",
                f"{100 * point['wer_full']:.1f} %",
                f"{100 * hf['wer_full']:.1f} %" if first else "-",
                f"{(ours['prep_sec'] + point['train_sec']) / 60:.1f} min",
                f"{(hf['prep_sec'] + hf['train_sec']) / 60:.1f} min" if first else "-",
            )
        )
    memory = [f"{side['peak_mb']:.0f} MB" for side in (ours, hf)]
    rows.append(_row("peak memory", "-", "-", memory[0], memory[1], "-", "-"))
    return rows


def draw_curve(stock: Figures, ours: Figures, hf: Figures, folder: Path) -> tuple[Path, Path]:
    """Draw training_curve.png and .svg; return both paths."""
    points = ours["by_epoch"]
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        by_updates, by_minutes = figure.subplots(1, 2, sharey=True)
        ours_x = {
            by_updates: [point["updates"] for point in points],
            by_minutes: [(ours["prep_sec"] + point["train_sec"]) / 60 for point in points],
        }
        hf_x = {by_updates: points[0]["updates"], by_minutes: (hf["prep_sec"] + hf["train_sec"]) / 60}
        start = 100 * stock["wer_full"]
        for axes in (by_updates, by_minutes):
            axes.axhline(start, color=GREY, linestyle=":", label="before training, 30 s")
            for key, color, label in (("wer_own", BLUE, "ours, own length"), ("wer_full", GREEN, "ours, 30 s")):
                axes.plot(ours_x[axes], [100 * point[key] for point in points], "o-", color=color, label=label)
            axes.plot(hf_x[axes], 100 * hf["wer_full"], "s", color=ORANGE, label="Seq2SeqTrainer, 30 s, epoch 1")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        by_updates.set(title="Word error rate by updates", xlabel="updates", ylabel="WER, %")
        by_minutes.set(title="and by time", xlabel="minutes of preparation and training")
        by_updates.legend(frameon=False, fontsize=8)
    return save_figure(figure, folder, "training_curve")


def _row(epoch: str, updates: str, own: str, full: str, hf: str, minutes: str, hf_minutes: str) -> dict[str, str]:
    return {
        "epoch": epoch,
        "updates": updates,
        "ours, own length": own,
        "ours, 30 s": full,
        "Seq2SeqTrainer, 30 s": hf,
        "time, ours": minutes,
        "time, Seq2SeqTrainer": hf_minutes,
    }
