"""What a person should know about the data before training: tables, findings and advice, kept in the run's folder.

No model is needed. `src.evaluation.data_checks` adds what only a model can tell, and the result is saved the same way.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.data.preparation import DatasetSplits
from src.data.report.findings import CLIPPED_FRACTION, LEVELS, Finding, find_all
from src.data.report.table import CLIP_TYPES, tabulate_clips
from src.data.utterance import SPLITS, SkippedUtterance
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREY, ORANGE
from src.utils.files import write_text_atomic

REPORT_FILE = "data_report.json"
CLIPS_FILE = "data_report_clips.csv"
MAX_VAD_CLIPS = 1000  # about 20 s on one CPU core, decoding included, at 4 s a clip
_LEVEL_COLORS = {"error": ORANGE, "warning": BLUE, "info": GREY}  # beside the word, which says it already
_SHOWN_SKIPPED = 20


@dataclass(frozen=True, eq=False)
class DataReport:
    """The data of one run.

    Attributes:
        source: that was taken.
        label_case: how transcripts were recased.
        clips: one row a clip, columns as in `CLIP_TYPES`; NA where something was not measured.
        findings: errors first.
        skipped: recordings that were left out while checking.
        label_styles: one row a style of writing, with what it costs the model; None where no model was asked.
        hard_clips: clips that the model gets wrong altogether; None where no model was asked.
    """

    source: str
    label_case: str
    clips: pd.DataFrame
    findings: tuple[Finding, ...]
    skipped: tuple[SkippedUtterance, ...] = ()
    label_styles: pd.DataFrame | None = None
    hard_clips: pd.DataFrame | None = None

    def summary(self) -> pd.DataFrame:
        """Return one row a split, an empty one too; shares are of its clips, NA where nothing was measured."""
        rows = [_summarize(name, self.clips[self.clips["split"] == name]) for name in SPLITS]
        return pd.DataFrame(rows).astype({"max_tokens": "Int64"})

    def findings_table(self) -> pd.DataFrame:
        """Return one row a finding, errors first."""
        rows = [{**asdict(finding), "ids": ", ".join(finding.ids)} for finding in self.findings]
        return pd.DataFrame(rows, columns=["level", "topic", "message", "advice", "ids"])

    def to_text(self) -> str:
        """Return the summary and the findings as plain text."""
        lines = [
            f"data: {self.source}, label case {self.label_case}",
            "",
            _format(self.summary()).set_index("split").T.to_string(),
        ]
        for finding in self.findings:
            lines += ["", f"{finding.level}: {finding.topic}: {finding.message}"]
            lines += [f"    {finding.advice}"] if finding.advice else []
            lines += [f"    for example {', '.join(finding.ids)}"] if finding.ids else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{sum(f.level == level for f in self.findings)} {level}" for level in LEVELS)
        parts = [
            f"<p><b>Data report</b>: {html.escape(self.source)}, label case {self.label_case}; findings: {counts}</p>",
            _table_html(_format(self.summary()).set_index("split").T.rename_axis("", axis=1).reset_index(names="")),
            _findings_html(self.findings),
        ]
        for title, frame in (("Label styles", self.label_styles), ("Hard clips", self.hard_clips)):
            if frame is not None and len(frame):
                parts += [f"<p><b>{title}</b></p>", _table_html(frame.round(3))]
        if self.skipped:
            rows = pd.DataFrame([asdict(row) for row in self.skipped[:_SHOWN_SKIPPED]])
            parts += [f"<p><b>Skipped</b>: {len(self.skipped)}</p>", _table_html(rows)]
        return "\n".join(parts)

    def save(self, run_dir: str | Path) -> tuple[Path, Path]:
        """Write data_report.json and data_report_clips.csv, each whole or not at all; return both paths."""
        folder = Path(run_dir)
        content = {
            "source": self.source,
            "label_case": self.label_case,
            "summary": _to_records(self.summary()),
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": [asdict(row) for row in self.skipped],
            "label_styles": None if self.label_styles is None else _to_records(self.label_styles),
            "hard_clips": None if self.hard_clips is None else _to_records(self.hard_clips),
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        report, clips = folder / REPORT_FILE, folder / CLIPS_FILE
        write_text_atomic(clips, self.clips.to_csv(index=False, lineterminator="\n"))
        write_text_atomic(report, text + "\n")
        return report, clips

    @classmethod
    def load(cls, run_dir: str | Path) -> DataReport:
        """Read a saved report.

        Raises: DataError: it is absent or damaged.
        """
        folder = Path(run_dir)
        try:
            content = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            clips = _read_clips(folder / CLIPS_FILE)
            return cls(
                source=content["source"],
                label_case=content["label_case"],
                clips=clips,
                findings=tuple(Finding(**{**row, "ids": tuple(row["ids"])}) for row in content["findings"]),
                skipped=tuple(SkippedUtterance(**row) for row in content["skipped"]),
                label_styles=_to_frame(content["label_styles"]),
                hard_clips=_to_frame(content["hard_clips"]),
            )
        except FileNotFoundError as err:
            raise DataError(f"{err.filename}: no such file; build the report and save it into this run first") from err
        except (ValueError, KeyError, TypeError) as err:
            raise DataError(f"{folder}: the data report is damaged ({err}); build it and save it again") from err


def build_data_report(
    splits: DatasetSplits,
    config: Config,
    *,
    tokenizer: Any | None = None,
    vad: VoiceActivityDetector | None = None,
    max_vad_clips: int = MAX_VAD_CLIPS,
) -> DataReport:
    """Look at prepared data.

    Args:
        splits: from `prepare_datasets`, which measured the recordings.
        config: `model.language` and `model.task` for the labels, `seed` for the choice of clips.
        tokenizer: of the model to train; without one tokens are not counted.
        vad: finds where speech is; without one silence before and after it, and its absence, are not measured.
        max_vad_clips: recordings to decode for it, chosen by hash.
    Raises: DataError: a clip without measurements, or a language unknown to the tokenizer. AudioError: a recording that
        can no longer be decoded.
    """
    clips = tabulate_clips(splits, config, tokenizer=tokenizer, vad=vad, max_vad_clips=max_vad_clips)
    skipped = tuple(splits.skipped)
    return DataReport(splits.source, splits.label_case, clips, find_all(clips, skipped), skipped)


def _summarize(name: str, clips: pd.DataFrame) -> dict[str, Any]:
    durations = clips["duration_sec"]
    heard = clips["speech_fraction"].dropna()
    return {
        "split": name,
        "clips": len(clips),
        "hours": float(durations.sum()) / 3600,
        "speakers": int(clips["speaker"].nunique()),
        "unknown_speaker_clips": int(clips["speaker"].isna().sum()),
        "median_sec": float(durations.median()),
        "p5_sec": float(durations.quantile(0.05)),
        "p95_sec": float(durations.quantile(0.95)),
        "chars_per_sec": float(clips["chars_per_sec"].median()),
        "sample_rates": ", ".join(str(rate) for rate in sorted(clips["sample_rate"].unique())),
        "loudness_dbfs": float(clips["loudness_dbfs"].median()),
        "clipped_share": float((clips["clipped_fraction"] > CLIPPED_FRACTION).mean()),
        "no_speech_share": float((heard == 0).mean()),
        "pace_outliers": int(clips["chars_per_sec_outlier"].sum()),
        "max_tokens": None if clips["tokens"].isna().all() else int(clips["tokens"].max()),
    }


def _format(summary: pd.DataFrame) -> pd.DataFrame:
    """Round for reading, with a dash where nothing was measured."""
    digits = {"hours": 2, "median_sec": 1, "p5_sec": 1, "p95_sec": 1, "chars_per_sec": 1, "loudness_dbfs": 1}
    rounded = summary.round({**digits, "clipped_share": 3, "no_speech_share": 3})
    return rounded.astype(object).where(rounded.notna(), "-")


def _table_html(frame: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):  # else transcripts and reasons end after 50 characters
        return str(frame.to_html(index=False, border=0, na_rep=""))


def _findings_html(findings: tuple[Finding, ...]) -> str:
    cell = 'style="text-align:left;vertical-align:top;white-space:normal;max-width:34em"'
    heads = "".join(f"<th {cell}>{name}</th>" for name in ("level", "topic", "found", "advice", "examples"))
    rows = []
    for f in findings:
        level = f'<b style="color:{_LEVEL_COLORS[f.level]}">{f.level}</b>'
        texts = (html.escape(text) for text in (f.topic, f.message, f.advice, ", ".join(f.ids)))
        rows.append("<tr>" + "".join(f"<td {cell}>{text}</td>" for text in (level, *texts)) + "</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _to_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows of plain Python values, None for NA."""
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=12))
    return records


def _to_frame(records: list[Mapping[str, Any]] | None) -> pd.DataFrame | None:
    return None if records is None else pd.DataFrame(records)


def _read_clips(path: Path) -> pd.DataFrame:
    """Read the table of clips; an empty cell is NA, but a transcript may well read "NA" or "None"."""
    cells = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    for column in ("speaker", "duplicate_audio_of"):
        cells[column] = cells[column].where(cells[column] != "", None)
    for column, kind in CLIP_TYPES.items():
        if kind == "bool":
            cells[column] = cells[column] == "True"
        elif kind.lower() in ("float64", "int64"):
            cells[column] = pd.to_numeric(cells[column].where(cells[column] != "", None))
    return cells[list(CLIP_TYPES)].astype(dict(CLIP_TYPES))
