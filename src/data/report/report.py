"""The data report: tables, findings and advice to read before training, kept in the run's folder.

No model is needed. `src.evaluation.data_checks` adds what only a model can tell, and the result is saved the same way.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from src.data.labels import LabelEncoder, group_of
from src.data.preparation import DatasetSplits
from src.data.report.findings import CLIPPED_FRACTION, LEVELS, Finding, find_all, sort_findings, text_keys
from src.data.sources.subtitles import PREPARATION_FILE
from src.data.utterance import SPLITS, SkippedUtterance, Utterance
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.files import read_json, read_plain, write_json, write_text_atomic
from src.utils.languages import is_unspaced_text, language_name
from src.utils.runtime import public

CLIP_TYPES = {
    "id": "str", "split": "str", "speaker": "object", "language": "object", "source": "object",
    "duration_sec": "float64", "text": "str", "characters": "int64", "chars_per_sec": "float64",
    "chars_per_sec_outlier": "bool", "sample_rate": "int64", "channels": "int64", "peak_dbfs": "float64",
    "clipped_fraction": "float64", "loudness_dbfs": "float64", "silent_fraction": "float64", "bandwidth_hz": "float64",
    "leading_silence_sec": "float64", "trailing_silence_sec": "float64", "speech_fraction": "float64",
    "tokens": "Int64", "duplicate_audio_of": "object", "duplicate_text_count": "int64", "audio_sha256": "str",
}  # fmt: skip
_TEXT_COLUMNS = [name for name, kind in CLIP_TYPES.items() if kind in ("str", "object")]
_FORMULA = re.compile(r"'*(\s*[=+\-@＝＋－＠]|[\t\r\n])")  # what begins one in some spreadsheet
OUTLIER_SCORE = 3.5
MIN_CLIPS_FOR_OUTLIERS = 10
_MIN_LOG_SPREAD = 0.1  # 10%: where all clips speak at one rate, not every small difference is an outlier

_TABLES = ("label_styles", "hard_clips", "recordings", "rejected", "doubtful")  # of a report, each None if it has none
REPORT_FILE = "data_report.json"
CLIPS_FILE = "data_report_clips.csv"
_SHOWN_SKIPPED = 20
_SHOWN_DOUBTFUL = 10
LITTLE_COVERED = 0.8  # share of the speech of recordings that is in the clips
_STYLE = "text-align: left; vertical-align: top; white-space: normal; max-width: 34em"  # prose, not numbers


@dataclass(frozen=True, eq=False)
class DataReport:
    """The data of one run; the tables of a model's view are None where no model was asked."""

    source: str
    label_case: str  # how transcripts were recased
    clips: pd.DataFrame  # one row per clip, columns as in `CLIP_TYPES`; NA where something was not measured
    findings: tuple[Finding, ...]  # errors first
    skipped: tuple[SkippedUtterance, ...] = ()
    label_styles: pd.DataFrame | None = None  # one row per style of writing, with what it costs the model
    hard_clips: pd.DataFrame | None = None  # clips that the model gets wrong altogether
    recordings: pd.DataFrame | None = None  # one row per recording that was cut into clips, with how much of its speech
    rejected: pd.DataFrame | None = None  # passages of their transcripts that were left out, with the reason
    doubtful: pd.DataFrame | None = None  # clips of theirs whose text matches worst: to listen to

    def summary(self) -> pd.DataFrame:
        """Return one row per split, an empty one too; shares are of its clips, NA where nothing was measured."""
        rows = []
        for name in SPLITS:
            clips = self.clips[self.clips["split"] == name]
            durations, heard = clips["duration_sec"], clips["speech_fraction"].dropna()
            rows.append({
                "split": name,
                "clips": len(clips),
                "hours": durations.sum() / 3600,
                "speakers": clips["speaker"].nunique(),
                "unknown_speaker_clips": clips["speaker"].isna().sum(),
                "median_sec": durations.median(),
                "p5_sec": durations.quantile(0.05),
                "p95_sec": durations.quantile(0.95),
                "chars_per_sec": clips["chars_per_sec"].median(),
                "sample_rates": ", ".join(map(str, sorted(clips["sample_rate"].unique()))),
                "loudness_dbfs": clips["loudness_dbfs"].median(),
                "clipped_share": (clips["clipped_fraction"] > CLIPPED_FRACTION).mean(),
                "no_speech_share": (heard == 0).mean(),
                "pace_outliers": clips["chars_per_sec_outlier"].sum(),
                "max_tokens": clips["tokens"].max(),
            })  # fmt: skip
        return pd.DataFrame(rows).astype({"max_tokens": "Int64"})

    def languages(self) -> pd.DataFrame:
        """Return one row per language, the largest first; words are NA in texts without spaces between them."""
        table = self._counted_by("language").rename(columns={"language": "code"})
        names = [language_name(str(code)) if code else "not marked" for code in table["code"]]
        table.insert(0, "language", names)
        return table.assign(code=table["code"].where(table["code"] != "", None))

    def sources(self) -> pd.DataFrame:
        """Return one row per source of a mix, the largest first, with the columns of `languages`; else none."""
        if self.clips["source"].isna().all():
            return pd.DataFrame()
        return self._counted_by("source").replace({"source": {"": "data"}})

    def _counted_by(self, column: str) -> pd.DataFrame:
        rows = []
        for value, clips in self.clips.groupby(self.clips[column].fillna(""), sort=False):
            texts = clips["text"]
            rows.append({
                column: value,
                **{name: int((clips["split"] == name).sum()) for name in SPLITS},
                "hours": clips["duration_sec"].sum() / 3600,
                "words": pd.NA if is_unspaced_text("".join(texts[:100])) else texts.str.split().str.len().sum(),
                "characters": texts.map(lambda text: len("".join(text.split()))).sum(),  # without spaces
                "chars_per_sec": clips["chars_per_sec"].median(),
                "max_tokens": clips["tokens"].max(),
            })  # fmt: skip
        table = pd.DataFrame(rows).astype({"words": "Int64", "max_tokens": "Int64"})
        return table.sort_values(list(SPLITS), ascending=False, ignore_index=True)

    def findings_table(self) -> pd.DataFrame:
        """Return one row per finding, errors first."""
        rows = [{**asdict(finding), "ids": ", ".join(finding.ids)} for finding in self.findings]
        return pd.DataFrame(rows, columns=["level", "topic", "message", "advice", "ids"])

    def to_text(self) -> str:
        """Return the summary and the findings as plain text."""
        lines = [f"data: {self.source}, label case {self.label_case}", "", self._shown_summary().to_string()]
        for table in (self.languages(), self.sources()):
            lines += ["", _rounded(table).to_string(index=False)] if len(table) else []
        if self.recordings is not None:
            lines += ["", self.recordings.to_string(index=False)]
        for finding in self.findings:
            lines += ["", f"{finding.level}: {finding.topic}: {finding.message}"]
            lines += [f"    {finding.advice}"] if finding.advice else []
            lines += [f"    for example {', '.join(finding.ids)}"] if finding.ids else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{sum(f.level == level for f in self.findings)} {level}" for level in LEVELS)
        skipped = pd.DataFrame([asdict(row) for row in self.skipped[:_SHOWN_SKIPPED]])
        tables = (
            (f"Data report: {self.source}, label case {self.label_case}; findings: {counts}",
             self._shown_summary().rename_axis(None, axis=1).reset_index(names="")),
            ("Languages", _rounded(self.languages())),
            ("Sources", _rounded(self.sources())),
            ("Findings", self.findings_table()),
            ("Label styles", self.label_styles),
            ("Hard clips", self.hard_clips),
            ("Recordings that were cut into clips", self.recordings),
            (f"Passages left out: {0 if self.rejected is None else len(self.rejected)}",
             None if self.rejected is None else self.rejected[:_SHOWN_SKIPPED]),
            ("Clips whose text matches worst: listen to them", self.doubtful),
            (f"Skipped: {len(self.skipped)}", skipped),
        )  # fmt: skip
        parts = [f"<style>.data-report-table td, .data-report-table th {{{_STYLE}}}</style>"]
        with pd.option_context("display.max_colwidth", None):  # else transcripts and reasons end after 50 characters
            for title, table in tables:
                if table is not None and len(table):
                    shown = table.round(3).to_html(index=False, border=0, na_rep="", classes="data-report-table")
                    for clip in table.get("audio", ()) if table is self.doubtful else ():
                        cell = html.escape(str(clip), quote=False)
                        shown = shown.replace(f"<td>{cell}</td>", f"<td>{_player(Path(str(clip)))}</td>")
                    parts.append(f"<p><b>{html.escape(title)}</b></p>{shown}")
        return "\n".join(parts)

    def _shown_summary(self) -> pd.DataFrame:
        """Return the summary rounded for reading, one column per split, with a dash where nothing was measured."""
        return _rounded(self.summary()).set_index("split").T

    def save(self, run_dir: str | Path) -> tuple[Path, Path]:
        """Write data_report.json and data_report_clips.csv, each whole or not at all; return both paths."""
        report, clips = Path(run_dir) / REPORT_FILE, Path(run_dir) / CLIPS_FILE
        tables = {"summary": self.summary(), "languages": self.languages(), "sources": self.sources()}
        tables |= {name: getattr(self, name) for name in _TABLES}
        if self.doubtful is not None and "audio" in self.doubtful:
            names = self.doubtful["audio"].map(lambda clip: Path(str(clip)).name)
            tables["doubtful"] = self.doubtful.assign(audio=names)
        content = {
            "source": self.source, "label_case": self.label_case,
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": [asdict(row) for row in self.skipped],
            **{  # plain Python values, None for NA
                name: None if table is None else json.loads(table.to_json(orient="records", double_precision=12))
                for name, table in tables.items()
            },
        }  # fmt: skip

        def quote(cell: Any) -> Any:  # a formula gets an apostrophe, by which spreadsheets take it for text
            return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell

        quoted = self.clips.assign(**{name: self.clips[name].map(quote) for name in _TEXT_COLUMNS})
        write_text_atomic(clips, quoted.to_csv(index=False, lineterminator="\n"))
        write_json(report, content)
        return report, clips

    @classmethod
    def load(cls, run_dir: str | Path) -> DataReport:
        """Read a saved report.

        Raises:
            DataError: it is absent or damaged.
        """

        def parse(content: dict[str, Any]) -> DataReport:
            tables = {name: content.get(name) for name in _TABLES}  # older reports have fewer
            return cls(
                source=content["source"], label_case=content["label_case"],
                clips=_read_clips(Path(run_dir) / CLIPS_FILE),
                findings=tuple(Finding(**{**row, "ids": tuple(row["ids"])}) for row in content["findings"]),
                skipped=tuple(SkippedUtterance(**row) for row in content["skipped"]),
                **{name: None if rows is None else pd.DataFrame(rows) for name, rows in tables.items()},
            )  # fmt: skip

        return read_json(Path(run_dir) / REPORT_FILE, parse, what="a data report", fix="build it and save it again")


def build_data_report(splits: DatasetSplits, config: Config, *, tokenizer: Any | None = None) -> DataReport:
    """Look at data from `prepare_datasets`, which measured the recordings; with its `vad`, where speech is in them.

    The labels are in `model.language` and `model.task`; without the tokenizer of the model to train their tokens are
    not counted.

    Raises:
        DataError: a clip without measurements, or a language unknown to the tokenizer.
    """
    utterances = splits.utterances
    if (unmeasured := next((u.id for u in utterances if u.id not in splits.stats), None)) is not None:
        raise DataError(f"utterance {unmeasured}: it was not measured; take the splits from prepare_datasets")
    clips = pd.DataFrame([asdict(splits.stats[u.id]) for u in utterances])
    places = _private_places(config)
    names = [_without_places(u.id, places) for u in utterances]  # a manifest may name files by their whole paths
    clips["id"] = names if len(set(names)) == len(names) else [u.id for u in utterances]
    clips["split"] = [name for name, part in splits.parts.items() for _ in part]
    clips["speaker"] = [u.speaker for u in utterances]
    clips["language"] = pd.Series([u.language for u in utterances], dtype=object)
    clips["source"] = pd.Series([group_of(u, splits.label_cases)[0] for u in utterances], dtype=object)
    clips["text"] = [u.text for u in utterances]
    clips["characters"] = clips["text"].str.strip().str.len()
    clips["chars_per_sec"] = clips["characters"] / clips["duration_sec"]
    paces = clips.groupby(clips["language"].fillna(""))["chars_per_sec"]
    clips["chars_per_sec_outlier"] = paces.transform(find_rate_outliers).astype(bool)
    first = clips.groupby("audio_sha256")["id"].transform("first")
    clips["duplicate_audio_of"] = first.astype(object).where(first != clips["id"], None)
    keys = text_keys(clips)
    clips["duplicate_text_count"] = keys.groupby(keys).transform("size")
    clips["tokens"] = pd.NA
    if tokenizer is not None:  # the decoder's positions, prefix and end token included
        encoder = LabelEncoder(tokenizer, language=config.model.language, task=config.model.task)
        special = 1 + len(encoder.prefix_for(config.model.language or "en"))  # as many in each language
        clips["tokens"] = [len(encoder.tokenize(u.text, u.language)) + special for u in utterances]
    clips = clips[list(CLIP_TYPES)].astype(CLIP_TYPES)
    skipped = tuple(
        SkippedUtterance(_without_places(row.id, places), _without_places(row.reason, places)) for row in splits.skipped
    )
    tables, findings = _tables_of_recordings(utterances, places), [*find_all(clips, skipped, config.model.task)]
    if tables:
        recordings, rejected = tables["recordings"], tables["rejected"]
        share = float(recordings["covered_sec"].sum() / max(1e-9, recordings["speech_sec"].sum()))
        message = (
            f"{share:.0%} of the speech of {len(recordings)} is in the clips; {len(rejected)} passages were left out"
        )
        advice = "read the reasons, and whether transcripts and recordings belong together; a larger model hears more"
        findings.append(Finding("warning" if share < LITTLE_COVERED else "info", "recordings", message, advice))
    return DataReport(splits.source, splits.label_case, clips, sort_findings(findings), skipped, **tables)


def _tables_of_recordings(utterances: Sequence[Utterance], places: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return what became of long recordings, if the clips were cut from some."""
    folders = {u.audio.parent for u in utterances if isinstance(u.audio, Path) and "recording_start" in u.meta}
    files = [folder / PREPARATION_FILE for folder in sorted(folders) if (folder / PREPARATION_FILE).is_file()]
    if not files:
        return {}
    found = [read_json(file, dict, what="a preparation", fix="cut the recordings again") for file in files]
    scored = [(float(u.meta["score"]), u) for u in utterances if u.meta.get("score")]
    worst = sorted(scored, key=lambda each: each[0])[:_SHOWN_DOUBTFUL]
    doubtful = [
        {"id": u.id, "score": score, "text": u.text, "audio": str(Path(u.audio_name).resolve())} for score, u in worst
    ]
    rejected = [row for part in found for row in part["rejected"]]
    return {
        "recordings": pd.DataFrame([row for part in found for row in part["recordings"]]),
        "rejected": pd.DataFrame([row | {"reason": _without_places(str(row["reason"]), places)} for row in rejected]),
        "doubtful": pd.DataFrame(doubtful),
    }


def _private_places(config: Config) -> list[str]:
    """Return the folders of the data, the cache and the like, the longest first: one may lie below another."""
    places = [config.paths.cache_dir, Path(tempfile.gettempdir()), Path.cwd(), Path.home()]
    for path in filter(None, (config.data.path, *(source.path for source in config.data.mix))):
        places += [path, path.parent]
    forms = {str(form) for each in places for form in (each.absolute(), each.resolve())}
    return sorted(forms, key=len, reverse=True)


def _without_places(text: str, places: Sequence[str]) -> str:
    """Return a text whose paths begin below private folders: a report is shown to others."""
    for place in places:
        text = text.replace(f"{place}{os.sep}", "")
    return str(public(text))


def _player(path: Path) -> str:
    """Return an HTML player that holds a recording, or the path of one that is not there any more."""
    if not path.is_absolute() or path.suffix != ".flac" or not path.is_file():
        return html.escape(str(path))
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<audio controls preload="none" src="data:audio/flac;base64,{data}"></audio>'


def find_rate_outliers(rates: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which clips (n,) have far too many or too few characters per second.

    The modified z-score of Iglewicz and Hoaglin (1993), |x - median| / (1.4826 MAD) > 3.5, on the logarithm of the
    rate: half and twice the speed are equally far, and outliers do not move the yardstick. Fewer than 10 clips have
    none; a rate of zero is one.
    """
    if len(rates) < MIN_CLIPS_FOR_OUTLIERS:
        return np.zeros(len(rates), dtype=bool)
    logs = np.log(np.maximum(rates, 1e-9))
    distances = np.abs(logs - np.median(logs))
    outliers: NDArray[np.bool_] = distances > OUTLIER_SCORE * max(1.4826 * float(np.median(distances)), _MIN_LOG_SPREAD)
    return outliers


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Return counted clips rounded for reading, with a dash where something has no value."""
    digits = dict.fromkeys(("median_sec", "p5_sec", "p95_sec", "chars_per_sec", "loudness_dbfs"), 1)
    rounded = table.round({**digits, "hours": 2, "clipped_share": 3, "no_speech_share": 3})
    return rounded.astype(object).where(rounded.notna(), "-")


def _read_clips(path: Path) -> pd.DataFrame:
    """Read the table of clips; an empty cell is NA, but a transcript may well read "NA" or "None"."""
    cells = pd.read_csv(io.BytesIO(read_plain(path)), dtype=str, keep_default_na=False, encoding="utf-8")
    older = {name: cells.get(name, "") for name in ("language", "source")}  # older reports have none
    cells = cells.assign(**older)[list(CLIP_TYPES)]
    others = [name for name in CLIP_TYPES if name not in ("id", "split", "text")]
    for name in _TEXT_COLUMNS:
        cells[name] = cells[name].map(lambda cell: cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell)
    cells[others] = cells[others].where(cells[others] != "", None)
    cells["chars_per_sec_outlier"] = cells["chars_per_sec_outlier"] == "True"
    numbers = [name for name, kind in CLIP_TYPES.items() if kind.lower() in ("float64", "int64")]
    cells[numbers] = cells[numbers].apply(pd.to_numeric)
    return cells.astype(CLIP_TYPES)
