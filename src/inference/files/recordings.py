"""Folders of long recordings with transcripts: cut once into a folder of clips with metadata.csv, which any tool reads.

Next to the clips, `preparation.json` says what became of each recording, and which passages were left out and why.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import soundfile as sf

from src.data.audio import SAMPLE_RATE, Waveform, load_audio
from src.data.sources.archives import unpack
from src.data.sources.manifest import Row, to_csv
from src.data.sources.subtitles import PREPARATION_FILE, TranscribedRecording, find_transcribed, read_transcript
from src.inference.engine_base import Engine
from src.inference.engines import load_engine
from src.inference.files.matching import MIN_SCORE, Excerpt, MatchedRecording, match_transcript
from src.utils.config import Config
from src.utils.errors import DataError
from src.utils.files import atomic_folder, file_stamp, locked, write_json, write_text_atomic
from src.utils.languages import join_texts

logger = logging.getLogger(__name__)

PREPARATION_VERSION = 3  # raise it when recordings would be cut otherwise: they are cut again
MIN_GROUPS = 3  # speakers, or recordings, from which three splits can be cut
COLUMNS = ("file_name", "text", "speaker", "language", "recording", "recording_start", "recording_end", "score")
_NUMBERED_SPEAKER = re.compile(r"(?i)(speaker|spk|s|sprecher|locuteur)?[ _-]?\d+")
_MAX_STEM = 80  # characters of a recording's name in those of its clips


@dataclass(frozen=True)
class Preparation:
    """What became of the recordings of a folder."""

    folder: Path  # with the clips and metadata.csv
    clips: int
    recordings: tuple[Row, ...]  # one row each, as in preparation.json
    rejected: tuple[Row, ...]  # one row per passage

    @property
    def speech_share(self) -> float:
        """Share of all speech that is in the clips."""
        speech = sum(row["speech_sec"] for row in self.recordings)
        return sum(row["covered_sec"] for row in self.recordings) / speech if speech else float("nan")

    def reasons(self) -> Counter[str]:
        """Count the passages that were left out by reason."""
        return Counter(kind_of(row["reason"]) for row in self.rejected)


def kind_of(reason: str) -> str:
    """Return a reason without the words and numbers of its passage."""
    return re.sub(r"'.*'|[\d.]+ ?", "", reason).strip()


def with_clips(config: Config, *, engine: Engine | None = None) -> Config:
    """Return settings whose `data.path` is the folder of clips, where that of the user has recordings with transcripts.

    They are cut once, with `model.variant`, and kept in `paths.cache_dir`. Other settings are returned as they are.
    """
    data = config.data
    if data.mix:
        each = [with_clips(config.model_copy(update={"data": one}), engine=engine).data for one in data.parts.values()]
        mix = tuple(
            source.model_copy(update={"name": name, "path": one.path, "audio_track": one.audio_track})
            for (name, source), one in zip(data.mixed.items(), each, strict=True)
        )
        return config.model_copy(update={"data": data.model_copy(update={"mix": mix})})
    if "folder" not in config.data.chosen_sources or config.data.path is None:
        return config
    path = unpack(config.data.path)
    found = find_transcribed(path)
    if not found:
        return config
    files = sorted({file for each in found for file in (each.audio, each.transcript)})
    chosen = (
        config.data.audio_track,
        config.model.variant,
        config.model.language,
        config.inference.max_segment_sec,
        config.data.on_error,
        config.vad.model_dump(),
    )
    key = repr((PREPARATION_VERSION, [file_stamp(file) for file in files], chosen)).encode()
    folder = config.paths.cache_dir / "clips" / hashlib.sha256(key).hexdigest()[:16]
    with locked(Path(f"{folder}.lock")):  # other processes wait, then find the clips
        if folder.is_dir():
            logger.info("%s: %d recordings with transcripts, cut before into %s", path, len(found), folder)
        else:
            _prepare(found, path, folder, config, engine, MIN_SCORE)
    return config.model_copy(update={"data": config.data.model_copy(update={"path": folder, "audio_track": None})})


def prepare_recordings(
    path: Path, output: Path, config: Config, *, engine: Engine | None = None, min_score: float = MIN_SCORE
) -> Preparation:
    """Cut recordings at the silences between the sentences of their transcripts.

    Args:
        path: a folder, or an archive of one, in which recordings have transcripts of their name: subtitles, JSON of
            whisper or whisperX, TextGrid, or plain text.
        output: a new folder for the clips.
        config: `model.variant` is the model that listens, unless there is an engine; `model.language` the language of
            recordings whose transcript does not name one (talk.de.srt). A short recording with plain text is a clip
            already, and taken as it is.
        engine: from `load_engine`.
        min_score: see `Excerpt.score`; a higher one accepts less.

    Raises:
        DataError: no recording with a transcript; one that cannot be read, unless `data.on_error` is "skip"; or
            nothing of them matches.
    """
    found = find_transcribed(unpack(path))
    if not found:
        what = "no recording with a transcript of its name, or there is a manifest already"
        raise DataError(f"{path}: {what}; put talk.srt, .vtt, .lrc, .json, .TextGrid or .txt next to talk.mp3")
    return _prepare(found, path, output, config, engine, min_score)


def _prepare(
    found: Sequence[TranscribedRecording],
    path: Path,
    output: Path,
    config: Config,
    engine: Engine | None,
    min_score: float,
) -> Preparation:
    """Cut the recordings that were found in a folder or an archive; see `prepare_recordings`."""
    rows: list[Row] = []
    recordings: list[Row] = []
    rejected: list[Row] = []
    listener = cache(lambda: engine or load_engine(config.model.variant, config))
    try:
        with atomic_folder(output) as partial:
            names = _clip_names(found)
            for each in found:
                try:
                    audio, matched = _match(each, config, listener, min_score)
                except DataError as err:
                    if config.data.on_error == "raise":
                        raise
                    logger.warning("left out: %s", err)
                    rejected.append({"recording": each.audio.name, "reason": str(err)})
                    continue
                accepted = [excerpt for excerpt in matched.excerpts if excerpt.reason is None]
                rows += [_write_clip(partial, audio, names[each.audio], e, each, matched) for e in accepted]
                recordings.append(_summary(each, matched, len(accepted)))
                rejected += [_row(each, excerpt) for excerpt in matched.excerpts if excerpt.reason is not None]
                logger.info(
                    "%s: %d clips, %.0f%% of %.1f min of speech; %d passages left out", each.audio, len(accepted),
                    100 * matched.covered_sec / max(matched.speech_sec, 1e-9), matched.speech_sec / 60,
                    len(matched.excerpts) - len(accepted),
                )  # fmt: skip
            if not rows:
                reasons = Counter(row["reason"] for row in rejected).most_common(3)
                fix = "check the pairs and the language; a larger model.variant hears more"
                raise DataError(f"{path}: nothing of {len(found)} transcript(s) matches its recording {reasons}; {fix}")
            _fill_speakers(rows)
            write_text_atomic(partial / "metadata.csv", to_csv(COLUMNS, rows))
            content = {"version": PREPARATION_VERSION, "source": str(path), "model": config.model.variant}
            write_json(partial / PREPARATION_FILE, {**content, "recordings": recordings, "rejected": rejected})
    except OSError as err:
        raise DataError(f"{output}: clips cannot be written: {err.strerror or err}; choose another folder") from err
    return Preparation(output, len(rows), tuple(recordings), tuple(rejected))


def _match(
    source: TranscribedRecording, config: Config, listener: Callable[[], Engine], min_score: float
) -> tuple[Waveform, MatchedRecording]:
    passages = read_transcript(source.transcript)
    track = config.data.audio_track
    audio = load_audio(source.audio, allow_silence=True, track=track)
    duration_sec = len(audio) / SAMPLE_RATE
    if source.transcript.suffix.lower() != ".txt" or duration_sec > config.inference.max_segment_sec:
        heard = match_transcript(audio, passages, listener(), config, language=source.language, min_score=min_score)
        return audio, heard
    # a clip already, unless a part of it is missing
    load_audio(source.audio, allow_silence=True, track=track, strict=True)
    whole = Excerpt(join_texts(p.text for p in passages), 0.0, duration_sec, 0.0, duration_sec)
    language = source.language or config.model.language
    return audio, MatchedRecording((whole,), duration_sec, duration_sec, duration_sec, language)


def _clip_names(found: Sequence[TranscribedRecording]) -> dict[Path, str]:
    """Return the beginning of the names of each recording's clips."""
    names: dict[Path, str] = {}
    taken: Counter[str] = Counter()
    for each in found:
        name = re.sub(r"[^\w.-]+", "_", each.audio.stem)[:_MAX_STEM]
        taken[name] += 1
        names[each.audio] = name if taken[name] == 1 else f"{name}~{taken[name]}"
    return names


def _write_clip(
    folder: Path, audio: Waveform, name: str, excerpt: Excerpt, source: TranscribedRecording, matched: MatchedRecording
) -> Row:
    """Write one clip and return its row; `recording_start` and `_end` are those of its speech."""
    file = folder / f"{name}-{round(excerpt.start_sec * 1000):09d}.flac"
    clip = audio[round(excerpt.cut_start_sec * SAMPLE_RATE) : round(excerpt.cut_end_sec * SAMPLE_RATE)]
    sf.write(file, clip, SAMPLE_RATE, subtype="PCM_16")
    row = _row(source, excerpt)
    values = {**row, "file_name": file.name, "language": matched.language}
    values |= {"recording_start": row["start_sec"], "recording_end": row["end_sec"]}
    return {key: values[key] for key in COLUMNS}


def _row(source: TranscribedRecording, excerpt: Excerpt) -> Row:
    fields = {key: value for key, value in asdict(excerpt).items() if not key.startswith("cut_")}
    rounded = {k: (None if v != v else round(v, 3)) if isinstance(v, float) else v for k, v in fields.items()}
    return {"recording": source.audio.name, **rounded}


def _summary(source: TranscribedRecording, matched: MatchedRecording, clips: int) -> Row:
    return {
        "recording": source.audio.name,
        "transcript": source.transcript.name,
        "language": matched.language,
        "duration_sec": round(matched.duration_sec, 2),
        "speech_sec": round(matched.speech_sec, 2),
        "covered_sec": round(matched.covered_sec, 2),
        "clips": clips,
        "rejected": len(matched.excerpts) - clips,
    }


def _fill_speakers(rows: Sequence[Row]) -> None:
    """Let splits be cut by speaker, else by recording; where there are too few of both, by clip.

    Recognisers number the speakers of each recording: SPEAKER_00 of another one is somebody else.
    """
    for row in rows:
        speaker = row["speaker"] or ""
        if _NUMBERED_SPEAKER.fullmatch(speaker):
            row["speaker"] = f"{row['recording']} {speaker}"
    if not all(row["speaker"] for row in rows) or len({row["speaker"] for row in rows}) < MIN_GROUPS:
        by_recording = MIN_GROUPS <= len({row["recording"] for row in rows}) < len(rows)
        for row in rows:
            row["speaker"] = row["recording"] if by_recording else None
