"""The data report: tables, findings and advice to read before training, kept in the run's folder.

No model is needed. `src.evaluation.data_checks` adds what only a model can tell, and the result is
saved the same way.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from src.data.audio import load_audio
from src.data.dataset import decode_audio
from src.data.labels import LabelEncoder
from src.data.preparation import MAX_VAD_CLIPS, DatasetSplits, audio_cache
from src.data.preprocessing import ClipStats, measure_speech
from src.data.report.findings import CLIPPED_FRACTION, LEVELS, Finding, find_all, text_key
from src.data.utterance import SPLITS, SkippedUtterance, Utterance, stable_hash
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREY, ORANGE
from src.utils.files import write_text_atomic

CLIP_TYPES: Mapping[str, str] = {
    "id": "str",
    "split": "str",
    "speaker": "object",
    "duration_sec": "float64",
    "text": "str",
    "characters": "int64",
    "chars_per_sec": "float64",
    "chars_per_sec_outlier": "bool",
    "sample_rate": "int64",
    "channels": "int64",
    "peak_dbfs": "float64",
    "clipped_fraction": "float64",
    "loudness_dbfs": "float64",
    "silent_fraction": "float64",
    "bandwidth_hz": "float64",
    "leading_silence_sec": "float64",
    "trailing_silence_sec": "float64",
    "speech_fraction": "float64",
    "tokens": "Int64",
    "duplicate_audio_of": "object",
    "duplicate_text_count": "int64",
    "audio_sha256": "str",
}
OUTLIER_SCORE = 3.5
MIN_CLIPS_FOR_OUTLIERS = 10
_MIN_LOG_SPREAD = 0.1  # 10%: where all clips speak at one rate, not every small difference is an outlier

REPORT_FILE = "data_report.json"
CLIPS_FILE = "data_report_clips.csv"
_LEVEL_COLORS = {"error": ORANGE, "warning": BLUE, "info": GREY}  # next to the word, which says it already
_SHOWN_SKIPPED = 20


@dataclass(frozen=True, eq=False)
class DataReport:
    """The data of one run.

    Attributes:
        source: the one that was taken.
        label_case: how transcripts were recased.
        clips: one row per clip, columns as in `CLIP_TYPES`; NA where something was not measured.
        findings: errors first.
        skipped: recordings that were left out while checking.
        label_styles: one row per style of writing, with what it costs the model; None where no model was asked.
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
        """Return one row per split, an empty one too; shares are of its clips, NA where nothing was measured."""
        rows = [_summarize(name, self.clips[self.clips["split"] == name]) for name in SPLITS]
        return pd.DataFrame(rows).astype({"max_tokens": "Int64"})

    def findings_table(self) -> pd.DataFrame:
        """Return one row per finding, errors first."""
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

        Raises:
            DataError: it is absent or damaged.
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
                label_styles=None if (rows := content["label_styles"]) is None else pd.DataFrame(rows),
                hard_clips=None if (rows := content["hard_clips"]) is None else pd.DataFrame(rows),
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
        vad: looks for speech where `prepare_datasets` did not; those recordings are decoded again. Where neither did,
            silence before and after speech, and its absence, are not measured.
        max_vad_clips: recordings in which to look, chosen by hash.

    Raises:
        DataError: a clip without measurements, or a language unknown to the tokenizer.
        AudioError: a recording that can no longer be decoded.
    """
    clips = tabulate_clips(splits, config, tokenizer=tokenizer, vad=vad, max_vad_clips=max_vad_clips)
    skipped = tuple(splits.skipped)
    return DataReport(splits.source, splits.label_case, clips, find_all(clips, skipped), skipped)


def tabulate_clips(
    splits: DatasetSplits,
    config: Config,
    *,
    tokenizer: Any | None,
    vad: VoiceActivityDetector | None,
    max_vad_clips: int,
) -> pd.DataFrame:
    """Return one row per clip with the columns of `CLIP_TYPES`, in the order of the splits; NA if not measured.

    Raises:
        DataError: a clip without measurements.
        AudioError: a recording that can no longer be decoded.
    """
    utterances = splits.utterances
    missing = next((u.id for u in utterances if u.id not in splits.stats), None)
    if missing is not None:
        raise DataError(f"utterance {missing}: it was not measured; take the splits from prepare_datasets")
    stats = dict(splits.stats)
    if vad is not None:
        chosen = hashed_choice(utterances, max_vad_clips, config.seed)
        stats |= _find_speech([u for u in chosen if math.isnan(stats[u.id].speech_fraction)], stats, vad, config)
    clips = pd.DataFrame([asdict(stats[u.id]) for u in utterances])
    clips["id"] = [u.id for u in utterances]
    clips["split"] = [name for name, part in splits.parts.items() for _ in part]
    clips["speaker"] = [u.speaker for u in utterances]
    clips["text"] = [u.text for u in utterances]
    clips["characters"] = clips["text"].str.strip().str.len()
    clips["chars_per_sec"] = clips["characters"] / clips["duration_sec"]
    clips["chars_per_sec_outlier"] = find_rate_outliers(clips["chars_per_sec"].to_numpy(dtype=float))
    first = clips.groupby("audio_sha256")["id"].transform("first")
    clips["duplicate_audio_of"] = first.astype(object).where(first != clips["id"], None)
    keys = clips["text"].map(text_key)
    clips["duplicate_text_count"] = keys.groupby(keys).transform("size")
    tokens = None if tokenizer is None else _count_tokens(clips["text"].tolist(), tokenizer, config)
    clips["tokens"] = pd.array(tokens or [None] * len(clips), dtype="Int64")
    return clips[list(CLIP_TYPES)].astype(dict(CLIP_TYPES))


def _count_tokens(texts: Sequence[str], tokenizer: Any, config: Config) -> list[int]:
    """Count the decoder's positions per transcript, prefix and end token included, as `LabelEncoder` makes them."""
    special = len(LabelEncoder(tokenizer, language=config.model.language, task=config.model.task).prefix) + 1
    encoded = tokenizer([" " + text.strip() for text in texts], add_special_tokens=False)["input_ids"]
    return [len(ids) + special for ids in encoded]


def _find_speech(
    utterances: Sequence[Utterance], stats: Mapping[str, ClipStats], vad: VoiceActivityDetector, config: Config
) -> dict[str, ClipStats]:
    """Decode recordings again and add where speech is to what was measured on them."""
    cache = audio_cache(config)
    load = cache.load_audio if cache else load_audio

    def measure(utterance: Utterance) -> ClipStats:
        audio = decode_audio(utterance, load=load).numpy()
        return replace(stats[utterance.id], **measure_speech(audio, vad))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(measure, utterances), total=len(utterances), desc="speech", leave=False)
        return {utterance.id: measured for utterance, measured in zip(utterances, found, strict=True)}


def find_rate_outliers(rates: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which clips have far too many or too few characters per second.

    The modified z-score of Iglewicz and Hoaglin (1993), |x - median| / (1.4826 MAD) > 3.5, on the logarithm of the
    rate: half and twice the speed are equally far, and outliers do not move the yardstick. Fewer than 10 clips have
    none; a rate of zero is one.

    Args:
        rates: (n,) characters per second.
    """
    if len(rates) < MIN_CLIPS_FOR_OUTLIERS:
        return np.zeros(len(rates), dtype=bool)
    logs = np.log(np.maximum(rates, 1e-9))
    distances = np.abs(logs - np.median(logs))
    outliers: NDArray[np.bool_] = distances > OUTLIER_SCORE * max(1.4826 * float(np.median(distances)), _MIN_LOG_SPREAD)
    return outliers


def hashed_choice(utterances: Sequence[Utterance], count: int, seed: int) -> list[Utterance]:
    """Choose `count` utterances by a hash of their ids, all where there are fewer: a sample of the whole, never a head.

    Raises:
        DataError: none asked for.
    """
    if count < 1:
        raise DataError(f"{count} clips asked for; ask for at least one")
    return sorted(utterances, key=lambda u: stable_hash(seed, u.id))[:count]


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
