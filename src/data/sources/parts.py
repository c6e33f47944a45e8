"""Parts of recordings: manifests whose rows say from where to where in a long recording their text is spoken.

NeMo and lhotse write `offset` and `duration`, Kaldi's `segments` and most spreadsheets a start and an end, in seconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile as sf

from src.data.audio import SAMPLE_RATE, open_regular, stream_audio
from src.data.sources.archives import MORE_SPACE, private_folder
from src.utils.errors import AudioError, DataError
from src.utils.files import atomic_file, file_stamp, locked

START_COLUMNS = ("offset", "start", "start_sec", "start_time", "begin", "begin_time")
END_COLUMNS = ("end", "end_sec", "end_time", "stop")
DURATION_COLUMNS = ("duration", "duration_sec")
TOLERANCE_SEC = 0.1  # times are rounded; a file that is as long as its part is that part, cut already


@dataclass(frozen=True, slots=True)
class AudioPart:
    """A part of a recording, which is decoded once, as a whole, below the system's folder for temporary files."""

    path: Path
    start_sec: float
    end_sec: float | None = None  # None: to the end of the recording
    track: int | None = None  # of its audio tracks, from 1; None: the default one

    def read(self) -> bytes:
        """Return the part as the bytes of a WAV file, 16 kHz mono; or the file, if it is nothing but the part."""
        if self.track is None and self.end_sec is not None:
            with suppress(OSError, TypeError, sf.LibsndfileError), open_regular(self.path) as whole:
                if abs(sf.info(whole).duration - (self.end_sec - self.start_sec)) <= TOLERANCE_SEC:
                    return self.path.read_bytes()
        with sf.SoundFile(_decode_once(self.path, self.track)) as file:
            whole_sec = file.frames / SAMPLE_RATE
            end_sec = whole_sec if self.end_sec is None else self.end_sec
            if abs(end_sec - self.start_sec - whole_sec) > TOLERANCE_SEC:
                if max(end_sec - TOLERANCE_SEC, self.start_sec) > whole_sec:
                    fix = "times are in seconds from its beginning"
                    raise AudioError(f"{self}: the recording ends at {whole_sec:.2f} s; correct the row: {fix}")
                file.seek(round(self.start_sec * SAMPLE_RATE))
                samples = file.read(round((end_sec - self.start_sec) * SAMPLE_RATE), dtype="int16")
            else:
                samples = file.read(dtype="int16")
        wav = io.BytesIO()
        sf.write(wav, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return wav.getvalue()

    def __str__(self) -> str:
        return f"{self.path}, {self.times}"

    @property
    def times(self) -> str:
        """What distinguishes it from other parts of its recording."""
        return f"{self.start_sec:g}-{'end' if self.end_sec is None else f'{self.end_sec:g}'} s"


def part_of_row(row: Mapping[str, Any], path: Path) -> AudioPart | None:
    """Return the part of a recording that a row names; None where it has no start and no end: the whole recording.

    A duration alone is a description of the file.
    """

    def seconds(columns: tuple[str, ...]) -> float | None:
        column = next((c for c in columns if row.get(c) not in (None, "")), None)
        return None if column is None else parse_seconds(row[column], column)

    start_sec, end_sec, duration_sec = map(seconds, (START_COLUMNS, END_COLUMNS, DURATION_COLUMNS))
    if start_sec is None and end_sec is None:
        return None
    start_sec = start_sec or 0.0
    if end_sec is None and duration_sec is not None:
        end_sec = start_sec + duration_sec
    if end_sec is not None and end_sec <= start_sec:
        raise DataError(f"the part begins at {start_sec:g} s and ends at {end_sec:g} s; correct the row")
    return AudioPart(path, start_sec, end_sec)


def parse_seconds(value: Any, where: str) -> float:
    """Read seconds, or a time such as 1:02:03.5; raises `DataError` for anything else and for less than 0."""
    *larger, last = str(value).strip().replace(",", ".").split(":")
    try:
        if isinstance(value, bool) or len(larger) > 2:
            raise ValueError
        seconds = sum((60.0 ** (len(larger) - i) * int(part) for i, part in enumerate(larger)), float(last))
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"{where} is {value!r:.60}; expected seconds from the beginning of the recording, such as 12.5")
    return seconds


def _decode_once(path: Path, track: int | None) -> Path:
    """Return a FLAC file of the whole recording, 16 kHz mono: any part of it can be read without the rest."""
    try:
        decoded = private_folder("recordings") / f"{file_stamp(path)}-{track or 0}.flac"
    except OSError as err:
        raise AudioError(f"{path}: {'no such file' if isinstance(err, FileNotFoundError) else err.strerror}") from err
    if decoded.exists():
        return decoded
    try:
        with locked(Path(f"{decoded}.lock")):  # other threads and processes ask for parts of it at the same time
            if not decoded.exists():
                with (
                    atomic_file(decoded) as partial,
                    sf.SoundFile(partial, "w", SAMPLE_RATE, 1, subtype="PCM_16", format="FLAC") as file,
                ):
                    for block in stream_audio(path, track=track, strict=True):
                        file.write(block)
    except OSError as err:
        raise AudioError(f"{path}: cannot be decoded to {decoded}: {err.strerror or err}; {MORE_SPACE}") from err
    return decoded
