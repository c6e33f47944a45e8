"""A page to record sentences on: each take is checked at once, and goes into a folder that `data.source: folder` reads.

The folder holds a FLAC file per speaker and sentence, at the browser's rate, and metadata.csv. It alone says what is
recorded: however a page or the process ended, the next one goes on with the sentences that a speaker has not read yet.
A new take of a sentence replaces the older one. What one or two people recorded is split by sentence, as a training
needs a validation and a test.

A page sends a take in several messages, and plays what it sent; the server sends no recording to anyone.
Whoever reaches the page may record under any name, but only the sentences of the page, and `MAX_TAKES` in all.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray
from pydantic import Field

from src.data.audio import DecodedAudio, to_mono_16k
from src.data.preprocessing import ClipStats, measure_clip, measure_clipping
from src.data.report.findings import CLIPPED_FRACTION, LONG_SILENCE_SEC, QUIET_DBFS, SHORT_SEC, SILENT_FRACTION
from src.data.sources.catalog import open_source
from src.data.sources.manifest import Row, find_audio, find_manifests, read_rows, read_text, to_csv
from src.data.utterance import NO_SPEAKER, SPLITS, Utterance, text_of
from src.data.vad import VoiceActivityDetector
from src.inference.server.host import LOOPBACK
from src.inference.server.protocol import FULL_SCALE, read_samples
from src.inference.server.served import AudioMessage, PageMessage, ServedPage, complaint
from src.utils.config import Config
from src.utils.errors import AudioError, DataError, MissingDependencyError, visible
from src.utils.files import LOCK, claim, write_bytes_atomic, write_text_atomic
from src.utils.languages import normalize_plain

MANIFEST = "metadata.csv"
COLUMNS = ("file_name", "text", "speaker", "language", "date")
MAX_TAKES = 20_000  # in a folder
MAX_TAKE_SEC = 30.0  # Whisper's window
MAX_SENTENCES, MAX_SENTENCE_CHARS = 10_000, 500  # read aloud in 30 s
MAX_LISTED = 2_000  # recordings of the data whose transcripts are looked at
FROM_DATA = 100  # sentences
MAX_ARRIVING, ARRIVAL_SEC = 8, 30.0  # takes that arrive at once, 46 MB at most; since the last message of one
SpeakerName = Annotated[str, Field(min_length=1, max_length=60)]
_WRITING = Lock()  # a cell that is run again serves a second page on its folder


def launch_recorder(
    folder: str | Path,
    sentences: str | Path | Sequence[str] | None = None,
    *,
    config: Config | None = None,
    speaker: str = "",
    share: bool = False,
    server_name: str = LOOPBACK,
    port: int | None = None,
) -> ServedPage:
    """Serve a page that records sentences into a folder, and show it below the cell of a notebook.

    Args:
        folder: new, or one that was recorded into before.
        sentences: a text file with one per line, or the sentences; None takes transcripts of `config.data` that have
            all its words early.
        config: `data`, `vad`, and `model.language`, which is the language of the sentences.
        speaker: that the page begins with; its user may write another.
        share: open a public address through Gradio's servers: whoever knows it can record, for a week at most.
        server_name: to listen on; only this machine reaches the default.
        port: None takes a free one from 7860 on.

    Raises:
        DataError: no sentence, or a folder with another manifest or that another process records into.
        MissingDependencyError: gradio is absent.
        ConfigError: the address or port is unavailable, or no tunnel can be opened.
    """
    try:
        from src.inference.server import page_layout
    except ImportError as err:
        raise MissingDependencyError(f"the recorder needs gradio 6 ({err}): pip install gradio") from err
    config = config or Config()
    language = config.model.language
    if sentences is None:
        chosen, language = sentences_of_data(config)
    elif isinstance(sentences, str | Path):
        chosen = check_sentences(read_text(Path(sentences)).split("\n"), where=str(sentences))
    else:
        chosen = check_sentences(sentences)
    recorder = Recorder(chosen, RecordingFolder(Path(folder)), language=language, vad=VoiceActivityDetector(config.vad))
    page = page_layout.build_recorder(recorder.find, recorder.hear, speaker=speaker, max_sec=MAX_TAKE_SEC)
    return ServedPage(
        page,
        serve=page_layout.serve,
        ending=recorder.folder.give_back,
        share=share,
        server_name=server_name,
        port=port,
        uploads=False,
    )


# The sentences


def check_sentences(sentences: Iterable[str], *, where: str = "sentences") -> list[str]:
    """Return the sentences without blank and repeated ones; DataError for a line that nobody can read aloud."""
    kept: dict[str, None] = {}
    for number, line in enumerate(sentences, start=1):
        text = " ".join(line.split())
        if len(text) > MAX_SENTENCE_CHARS or visible(text) != text:
            wrong = "a control character" if visible(text) != text else f"over {MAX_SENTENCE_CHARS} characters"
            raise DataError(f"{where}, line {number}: {wrong}; write one sentence per line, of plain text")
        if any(map(str.isalnum, text)):
            kept[text] = None
    if not 0 < len(kept) <= MAX_SENTENCES:
        raise DataError(f"{where}: {len(kept):,} sentences; give 1 to {MAX_SENTENCES:,}, one per line")
    return list(kept)


def sentences_of_data(config: Config) -> tuple[list[str], str | None]:
    """Return transcripts of the data's first source, none of its validation and test, and their language.

    It is `model.language`, else the most frequent one.
    """
    first = next(iter(config.data.parts.values()))
    opened = open_source(first, first.chosen_sources[0])
    listed = islice(opened if isinstance(opened, list) else chain(*opened.values()), MAX_LISTED)
    known = [utterance for utterance in listed if utterance.meta.get("split") in (None, "train")]
    heard = Counter(utterance.language for utterance in known if utterance.language).most_common(1)
    language = config.model.language or (heard[0][0] if heard else None)
    fit = [utterance for utterance in known if language in (None, utterance.language or language)]
    return check_sentences(cover_words(fit, FROM_DATA), where="transcripts of the data"), language


def cover_words(utterances: Sequence[Utterance], limit: int) -> list[str]:
    """Return transcripts in the order in which each brings the most words that none before it has (greedy set cover).

    Those that bring none follow in the order of the data.
    """
    texts = {u.text: set(normalize_plain(u.text, u.language).split()) for u in utterances}
    texts = {t: words for t, words in texts.items() if words and len(t) <= MAX_SENTENCE_CHARS and visible(t) == t}
    chosen: list[str] = []
    while texts and len(chosen) < limit:
        text = max(texts, key=lambda text: len(texts[text]))  # of equals the first
        words = texts.pop(text)
        chosen.append(text)
        for others in texts.values():
            others -= words
    return chosen


# The folder


class RecordingFolder:
    """Takes on the disk, one per speaker and sentence; one process at a time writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        fix = "choose another folder"
        self.give_back = claim(path / LOCK, self, what=path, error=DataError, fix=fix)
        others = [found.name for found in find_manifests(path, depth=0) if found.name != MANIFEST]
        if others:
            raise DataError(f"{path}: has a manifest already, {others[0]}; {fix}")
        self._rows()

    def recorded(self, speaker: str) -> set[str]:
        """Return the sentences of which a speaker's recording is there."""
        rows = [row for row in self._rows() if row["speaker"] == speaker]
        return {row["text"] for row in rows if find_audio(self.path, row["file_name"]).is_file()}

    def keep(
        self, samples: NDArray[np.int16], rate: int, *, text: str, speaker: str, language: str | None, date: datetime
    ) -> Path:
        """Write (T,) samples as FLAC and their row; an older take of the sentence by this speaker is replaced."""
        name, digest = re.sub(r"[^\w-]+", "_", speaker), hashlib.sha256(f"{speaker}\n{text}".encode()).hexdigest()
        file = self.path / f"{name[:40]}-{digest[:12]}.flac"
        row = dict(zip(COLUMNS, (file.name, text, speaker, language, date.isoformat(timespec="seconds")), strict=True))
        encoded = io.BytesIO()
        sf.write(encoded, samples, rate, format="FLAC", subtype="PCM_16")
        with _WRITING:
            before = self._rows()
            rows = [other for other in before if (other["speaker"], other["text"]) != (speaker, text)]
            if len(rows) >= MAX_TAKES:
                raise DataError(f"{self.path}: has {len(rows):,} recordings, the most that a folder takes; use another")
            write_bytes_atomic(file, encoded.getvalue(), durable=True)
            # splits that somebody else wrote stay
            is_ours = not any(other.get("split") for other in before) or before == split_by_sentence(before)
            rows = split_by_sentence([*rows, row]) if is_ours else [*rows, {**row, "split": "train"}]
            table = to_csv(dict.fromkeys([*COLUMNS, *chain(*rows)]), rows)
            write_text_atomic(self.path / MANIFEST, table, durable=True)
        return file

    def _rows(self) -> list[Row]:
        manifest = self.path / MANIFEST
        rows = [row for _, row in read_rows(manifest)] if manifest.exists() else []
        if any({"file_name", "text", "speaker"} - row.keys() for row in rows):
            raise DataError(f"{manifest}: not one that was recorded (file_name, text, speaker); choose another folder")
        return [{name: text_of(cell) for name, cell in row.items()} for row in rows]


def split_by_sentence(rows: Sequence[Row]) -> list[Row]:
    """Give each sentence a split while fewer than three people have recorded; of more, voices are kept apart later."""
    texts = sorted({row["text"] for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    share = max(1, len(texts) // 10)
    held = dict(zip(texts, ["test"] * share + ["validation"] * share, strict=False))
    if len({row["speaker"] for row in rows}) < len(SPLITS) <= len(texts):
        return [{**row, "split": held.get(row["text"], "train")} for row in rows]
    return [{name: cell for name, cell in row.items() if name != "split"} for row in rows]


# A take


@dataclass(frozen=True)
class TakeCheck:
    """What was found in a take."""

    stats: ClipStats
    refusals: tuple[str, ...]  # why it is not kept
    warnings: tuple[str, ...]  # it is kept, and better recorded again


def check_take(samples: NDArray[np.int16], rate: int, vad: VoiceActivityDetector) -> TakeCheck:
    """Judge a take of (T,) samples by the measures and limits of the data report."""
    if len(samples) < SHORT_SEC * rate:
        raise AudioError(f"shorter than {SHORT_SEC} s; read the whole sentence before you press Stop")
    if not samples.any():
        raise AudioError("the microphone gave silence only; is it muted, or another one chosen in the browser?")
    wave = samples.astype(np.float32) / FULL_SCALE
    stats = measure_clip(DecodedAudio(to_mono_16k(wave, rate, name="the take"), rate, 1), vad=vad)
    clipped = measure_clipping(wave)  # resampling blurs flat tops
    before, after = stats.leading_silence_sec, stats.trailing_silence_sec
    refused = {"no speech was found; speak louder, closer to the microphone": not stats.speech_fraction > 0}
    warned = {
        f"cut off at the loudest parts ({clipped:.1%}); lower the input level": clipped > CLIPPED_FRACTION,
        f"too quiet ({stats.loudness_dbfs:.0f} dBFS); speak closer to the microphone": stats.loudness_dbfs < QUIET_DBFS,
        f"silent for {stats.silent_fraction:.0%} of the time": stats.silent_fraction > SILENT_FRACTION,
        f"{before:.1f} s of silence before the speech; begin sooner": before > LONG_SILENCE_SEC,
        f"{after:.1f} s of silence after the speech; press Stop sooner": after > LONG_SILENCE_SEC,
    }
    return TakeCheck(stats, *(tuple(text for text, is_so in each.items() if is_so) for each in (refused, warned)))


# The page's requests


class Place(PageMessage):
    """Asks for the sentence at a place; where `unread`, for the next one from there that the speaker has to read."""

    speaker: SpeakerName
    at: int = Field(ge=0, le=MAX_SENTENCES)
    unread: bool = True


class TakeMessage(AudioMessage):
    """A part of a take."""

    speaker: SpeakerName
    take: str = Field(min_length=1, max_length=100)
    text: str = Field(max_length=MAX_SENTENCE_CHARS)


class Recorder:
    """Which sentence comes next, and what becomes of a take; it knows nothing of Gradio."""

    def __init__(
        self, sentences: Sequence[str], folder: RecordingFolder, *, language: str | None, vad: VoiceActivityDetector
    ) -> None:
        self.sentences, self.folder, self._language, self._vad = sentences, folder, language, vad
        self._arriving: dict[str, tuple[bytearray, float]] = {}  # and when the last part came
        self._lock = Lock()

    async def find(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a `Place` with the sentence `text` there, its place `at`, whether it is `recorded`; or `error`."""
        try:
            place = Place.read(message)
            recorded = await asyncio.to_thread(self.folder.recorded, _speaker(place.speaker))
        except Exception as err:  # noqa: BLE001 - the page's boundary
            return {"error": self._complaint(err)}
        total = len(self.sentences)
        order = [(place.at + step) % total for step in range(total)]
        unread = (at for at in order if self.sentences[at] not in recorded)
        at = next(unread, order[0]) if place.unread else order[0]
        text = self.sentences[at]
        return {"at": at, "text": text, "recorded": text in recorded, **self._progress(recorded)}

    async def hear(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Take a `TakeMessage`; the answer to the last says what was found and whether it is `kept`; or `error`."""
        try:
            valid = TakeMessage.read(message)
            if valid.text not in self.sentences:
                raise DataError("this sentence is not on the page any more; reload the page")
            take = self._collect(valid)
            return {} if take is None else await asyncio.to_thread(self._finish, valid, take)
        except Exception as err:  # noqa: BLE001 - the page's boundary: one take fails, the others go on
            self._arriving.pop(str(message.get("take")), None)
            return {"error": self._complaint(err)}

    def _collect(self, message: TakeMessage) -> bytes | None:
        """Add a part to its take; return the take with the last one."""
        now = time.monotonic()
        if message.first:
            self._arriving = {k: v for k, v in self._arriving.items() if now - v[1] < ARRIVAL_SEC and k != message.take}
            if len(self._arriving) >= MAX_ARRIVING:
                raise AudioError(f"{MAX_ARRIVING} takes are arriving already; record this one again")
            self._arriving[message.take] = bytearray(), now
        if message.take not in self._arriving:
            raise AudioError("the beginning of this take is lost; record it again")
        data, _ = self._arriving[message.take]
        data += message.decoded()
        if len(data) > 2 * MAX_TAKE_SEC * message.rate:
            raise AudioError(f"longer than {MAX_TAKE_SEC:g} s; record it again, faster")
        self._arriving[message.take] = data, now
        return bytes(self._arriving.pop(message.take)[0]) if message.last else None

    def _finish(self, message: TakeMessage, pcm: bytes) -> dict[str, Any]:
        read_samples(pcm, "s16le")  # raises where half a sample is left
        samples, speaker = np.frombuffer(pcm, "<i2").astype(np.int16), _speaker(message.speaker)
        with self._lock:
            check = check_take(samples, message.rate, self._vad)
        if not check.refusals:
            now, text = datetime.now(UTC), message.text
            self.folder.keep(samples, message.rate, text=text, speaker=speaker, language=self._language, date=now)
        return {
            "kept": not check.refusals,
            "remarks": [*check.refusals, *check.warnings],
            "duration": f"{check.stats.duration_sec:.1f} s",
            "level": f"{check.stats.loudness_dbfs:.0f} dBFS",
            "noise": f"{check.stats.loudness_dbfs - check.stats.snr_db:.0f} dBFS",
            **self._progress(self.folder.recorded(speaker)),
        }

    def _progress(self, recorded: set[str]) -> dict[str, int]:
        return {"done": len(recorded & set(self.sentences)), "total": len(self.sentences)}

    def _complaint(self, err: Exception) -> str:
        """Return an error in a line, without the folder's place on this machine."""
        return complaint(err).replace(str(self.folder.path), self.folder.path.name)


def _speaker(name: str) -> str:
    """Return a name as the folder's reader understands it."""
    name = " ".join(visible(name).split())
    if not name[:1].isalnum() or name in NO_SPEAKER:  # no formula of a spreadsheet either
        raise DataError(f"{name!r} is no name of a speaker; begin it with a letter or a digit")
    return name
