"""Caption files: cues as SRT, WebVTT, TSV or JSON, written whole or appended while they are spoken."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from src.inference.captions import DEFAULT_OPTIONS, CaptionOptions, Cue, CueBuilder, spaced
from src.inference.streaming.events import Event
from src.inference.words import Word
from src.utils.errors import DataError, did_you_mean
from src.utils.files import write_text_atomic

_HEADERS: Mapping[str, str] = {".srt": "", ".vtt": "WEBVTT\n\n"}


def to_srt(cues: Sequence[Cue]) -> str:
    """Return SubRip text. It has no escapes: an arrow "-->" becomes "->", as in openai/whisper; blank lines go."""
    return "".join(_srt_block(number, cue) for number, cue in enumerate(cues, start=1))


def to_vtt(cues: Sequence[Cue]) -> str:
    """Return WebVTT text (W3C), with "&", "<" and ">" escaped; blank lines go."""
    return _HEADERS[".vtt"] + "".join(_vtt_block(number, cue) for number, cue in enumerate(cues, start=1))


def to_tsv(cues: Sequence[Cue]) -> str:
    """Return rows of start and end in ms and the text on one line, as openai/whisper writes them."""
    rows = [f"{_ms(cue.start_sec)}\t{_ms(cue.end_sec)}\t{''.join(spaced(_clean_lines(cue)))}\n" for cue in cues]
    return "start\tend\ttext\n" + "".join(rows)


def to_json(cues: Sequence[Cue], *, language: str | None = None) -> str:
    """Return JSON of openai/whisper's shape, a segment a cue, with words where there are any.

    Each text and word begins with the space before it, if any: segments, and words, concatenated give the text.
    """
    texts = spaced(["".join(spaced(_clean_lines(cue))) for cue in cues])
    spelt = iter(spaced([word.text for cue in cues for word in cue.words]))
    segments: list[dict[str, Any]] = []
    for number, (cue, text) in enumerate(zip(cues, texts, strict=True)):
        segments.append({"id": number, "start": cue.start_sec, "end": cue.end_sec, "text": text})
        if cue.words:
            segments[-1]["words"] = [_word_json(word, next(spelt)) for word in cue.words]
    content = {"text": "".join(texts), "language": language, "segments": segments}
    return json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def write_captions(path: str | Path, cues: Sequence[Cue], *, language: str | None = None) -> Path:
    """Write cues as the suffix says: .json, .srt, .tsv or .vtt. The file appears whole.

    Args: language: Whisper's code, for JSON.
    Raises: DataError: another suffix. OSError: the folder cannot be made or written.
    """
    writers = {".srt": to_srt, ".tsv": to_tsv, ".vtt": to_vtt}
    suffix = _known_suffix(Path(path), [".json", *writers])
    text = to_json(cues, language=language) if suffix == ".json" else writers[suffix](cues)
    write_text_atomic(Path(path), text)
    return Path(path)


class LiveCaptionWriter:
    """Appends the cues of a live session to an SRT or WebVTT file, which is valid whenever it is read.

    A "final" event writes all that was said, its last cue for as long as audio was heard. Without one before the end
    the file is that of `make_cues`.

    Args: path: .srt or .vtt; an older file is replaced.
    Raises: DataError: another suffix. OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, options: CaptionOptions = DEFAULT_OPTIONS) -> None:
        self._path, self._builder, self._written = Path(path), CueBuilder(options), 0
        suffix = _known_suffix(self._path, list(_HEADERS))
        self._block = {".srt": _srt_block, ".vtt": _vtt_block}[suffix]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._append(_HEADERS[suffix])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, event: Event) -> None:
        """Take an event; partial ones change nothing.

        Raises: DataError: closed already, or times are not in order. OSError: the file cannot be written.
        """
        if self._file.closed:
            raise DataError(f"{self._path}: these captions are closed; open another LiveCaptionWriter")
        if event.kind == "commit":
            self._show(self._builder.add(event.words))
        elif event.kind == "final":
            self._show(self._builder.finish(event.audio_sec))

    def close(self) -> None:
        """Write what is left. A second call does nothing."""
        if not self._file.closed:
            with self._file:
                self._show(self._builder.finish())

    def _show(self, cues: Sequence[Cue]) -> None:
        for cue in cues:
            self._written += 1
            self._append(self._block(self._written, cue))

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _clean_lines(cue: Cue) -> list[str]:
    """Return the lines without what would end a cue or a row: line ends, tabs, blank lines."""
    return [" ".join(line.split()) for line in cue.lines if line.strip()]


def _srt_block(number: int, cue: Cue) -> str:
    text = re.sub("--+>", "->", "\n".join(_clean_lines(cue)))
    return f"{number}\n{_clock(cue.start_sec, ',')} --> {_clock(cue.end_sec, ',')}\n{text}\n\n"


def _vtt_block(number: int, cue: Cue) -> str:
    text = html.escape("\n".join(_clean_lines(cue)), quote=False)
    return f"{_clock(cue.start_sec, '.')} --> {_clock(cue.end_sec, '.')}\n{text}\n\n"


def _clock(sec: float, mark: str) -> str:
    minutes, ms = divmod(_ms(sec), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{ms // 1000:02}{mark}{ms % 1000:03}"


def _ms(sec: float) -> int:
    return round(sec * 1000)


def _known_suffix(path: Path, known: Sequence[str]) -> str:
    suffix = path.suffix.lower()
    if suffix not in known:
        raise DataError(f"{path}: captions are written as {', '.join(known)}{did_you_mean(suffix, known)}")
    return suffix


def _word_json(word: Word, text: str) -> dict[str, Any]:
    probability = None if math.isnan(word.probability) else word.probability
    return {"word": text, "start": round(word.start_sec, 3), "end": round(word.end_sec, 3), "probability": probability}
