"""Transcripts of long recordings: subtitles, recognisers' JSON, TextGrid and plain text become passages to align.

pysubs2 reads SRT, VTT, ASS, TTML and SAMI. What is in a file but not said is taken out: tags, positions, the dashes and
names of speakers, [music], lyrics, credits, and lines that rolling captions repeat. Times are kept as they are.
"""

from __future__ import annotations

import html
import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import charset_normalizer
import pysubs2
import regex

from src.data.audio import AUDIO_SUFFIXES
from src.data.sources.manifest import decode_western, find_manifests
from src.data.sources.parts import parse_seconds
from src.data.utterance import text_of
from src.utils.errors import DataError, first_line
from src.utils.files import parse_json, read_plain
from src.utils.languages import code_of_language, join_texts

logger = logging.getLogger(__name__)

PREPARATION_FILE = "preparation.json"  # next to the clips that were cut from recordings
# in the order in which they are taken where a recording has several
TRANSCRIPT_SUFFIXES = (
    ".textgrid", ".srt", ".vtt", ".ass", ".ssa", ".ttml", ".smi", ".lrc", ".json", ".txt",
)  # fmt: skip
_DAMAGED = (pysubs2.Pysubs2Error, ParseError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_PYSUBS2 = {".ssa": "ass", ".smi": "sami"}  # formats that are not named as their suffix
MAX_BYTES = 64 << 20  # of a transcript; a word with its times takes 100 bytes of JSON
_ROLLING = 0.3  # share of the cues that begin with the line before: captions that scroll
_NAMED_OFTEN = 3  # lines that begin with one name and a colon
_MAX_CREDIT_CHARS = 100

_TIMING = r"[\d:.,]+[ \t]*-->"
_CUE_ID = regex.compile(rf"^[^\n]*\n(?={_TIMING})", regex.MULTILINE)  # the line before the times
_VTT_BLOCK = regex.compile(r"^(?:NOTE|STYLE|REGION)\b.*?(?:\n[ \t]*\n|\Z)", regex.MULTILINE | regex.DOTALL)
_LRC_LINE = regex.compile(r"^((?:\[\d+:\d+(?:[.:]\d+)?\])+)(.*)$")
_TEXTGRID_TOKEN = regex.compile(r'"((?:[^"]|"")*)"|(?<![\w.\[-])(-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![\w\]])')
_OTHER_TIER = regex.compile(r"phon|syll|tone|tobi|\bpos\b|segment", regex.IGNORECASE)
_WORD_TIER = regex.compile(r"\bwords?\b", regex.IGNORECASE)
_PLAIN_TIER = regex.compile(r"utt|text|trans|sent|word|orth?|ipu|phrase|\d", regex.IGNORECASE)
_NO_SPEECH = frozenset({"sil", "sp", "spn", "silence", "<sil>", "<unk>", "<eps>", "#", "xxx", "noise", "laugh"})

_VOICE = regex.compile(r"<v[\w.]*[ \t]+([^>]+)>")
_TAG = regex.compile(r"\{\\[^{}]{0,300}\}|</?[\w.:][^<>]{0,300}>|</?>")
_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cf}--[\n\u00AD\u200B\u200C\u200D]]", regex.VERSION1)
_SUNG = regex.compile(r"[♩♪♫♬]|^\s*#.*#\s*$")
_BRACKETED = regex.compile(r"\[[^\[\]]*\]|【[^【】]*】|\*[^*\n]*\*")
_ROUND = regex.compile(r"\([^()]*\)|（[^（）]*）")  # in subtitles a sound; in a text it may well be said
_DASH = regex.compile(r"^\s*(?:[-–—‐−]+\s*(?=\D)|>{2,}\s*)")
_NAME = regex.compile(r"^\s*(\p{L}[\p{L}\p{M}\d.'’ -]{0,30}):\s+(?=\S)")
_CREDIT = regex.compile(
    r"(?:www\.|https?:|\w\.(?:com|org|net)\b|opensubtitles|amara)|"
    r"\b(?:subtitle[sd]?|captions?|captioned|transcribed|translated|synced|synchroni[sz]ed|corrected|ripped|encoded)\b"
    r".{0,30}\b(?:by|from)\b|\b(?:untertitel\w*|sous-titr\w*|subt[ií]tulos|legendas|sottotitoli|ondertitel\w*|napisy)\b"
    r".{0,30}\b(?:von|der|im|par|de|por|di|a cura|door|przez)\b|субтитр|字幕[:：由組组製制提]",
    regex.IGNORECASE,
)


@dataclass(frozen=True)
class Passage:
    """A part of a transcript: a cue, a line, or a word; its times may be wrong by seconds, nan where there are none."""

    text: str
    start_sec: float = math.nan
    end_sec: float = math.nan
    speaker: str | None = None


@dataclass(frozen=True)
class TranscribedRecording:
    """A recording, the file that has its text, and the language that the file's name says."""

    audio: Path
    transcript: Path
    language: str | None = None


def find_transcribed(folder: Path) -> list[TranscribedRecording]:
    """Pair the recordings of a folder, which has no manifest, with transcripts: talk.mp3 with talk.srt or talk.de.srt.

    Recordings without one are left out with a warning; of several transcripts the first kind is taken.

    Raises:
        DataError: transcripts in several languages for one recording.
    """
    if not folder.is_dir() or find_manifests(folder):
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    recordings = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    stems = Counter(audio.stem for audio in recordings)
    by_stem: dict[str, list[TranscribedRecording]] = defaultdict(list)
    for path in (path for path in files if path.suffix.lower() in TRANSCRIPT_SUFFIXES):
        stem, _, mark = path.stem.rpartition(".")
        by_stem[path.stem].append(TranscribedRecording(path, path))
        if stem and f".{mark}".lower() in AUDIO_SUFFIXES:  # talk.mp3.srt
            by_stem[stem].append(TranscribedRecording(path, path))
        elif stem and code_of_language(mark) is not None:
            by_stem[stem].append(TranscribedRecording(path, path, code_of_language(mark)))
    found: list[TranscribedRecording] = []
    without: list[str] = []
    for audio in recordings:
        own = [replace(each, audio=audio) for each in by_stem[audio.stem]]
        beside = [each for each in own if each.transcript.parent == audio.parent]
        beside = beside or [each for each in own if each.transcript.parent.name == audio.parent.name]  # txt/ann/1.txt
        if beside or stems[audio.stem] > 1:  # one in another folder could be that of several recordings
            own = beside
        own.sort(key=lambda each: (TRANSCRIPT_SUFFIXES.index(each.transcript.suffix.lower()), each.transcript.name))
        own = [each for each in own if each.transcript.suffix == own[0].transcript.suffix]
        if len(own) > 1:
            names = ", ".join(each.transcript.name for each in own)
            raise DataError(f"{audio}: several transcripts ({names}); keep the one of the language that is spoken")
        if own:
            found.append(own[0])
        else:
            without.append(audio.name)
    if found and without:
        shown = ", ".join(without[:5])
        logger.warning("%s: %d recording(s) without a transcript left out: %s", folder, len(without), shown)
    return found


def read_transcript(path: Path) -> list[Passage]:
    """Read a transcript by its suffix, without what is not said; passages are in order of time.

    Raises:
        DataError: it cannot be read, is none of its kind, or has no text.
    """
    suffix, content = path.suffix.lower(), read_any_encoding(path)
    read = {".json": _read_json, ".textgrid": _read_textgrid, ".lrc": _read_lrc}
    try:
        if suffix == ".txt":
            passages = [Passage(line) for line in content.split("\n")]
        else:
            passages = read[suffix](content) if suffix in read else _read_subtitles(content, suffix[1:])
    except (*_DAMAGED, DataError) as err:
        what = f"not a {suffix} transcript that can be read ({first_line(err)})"
        raise DataError(f"{path}: {what}; save it again as SRT") from err
    passages = sorted(passages, key=lambda p: 0.0 if math.isnan(p.start_sec) else p.start_sec)  # stable
    spoken = clean_passages(passages, is_prose=suffix == ".txt")
    if not spoken:
        raise DataError(f"{path}: no text that is spoken among {len(passages)} cue(s); check the file")
    return spoken


def read_any_encoding(path: Path) -> str:
    """Read a text file, which older subtitle tools wrote in any encoding; line ends become newlines."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: over {MAX_BYTES >> 20} MB, which is no transcript; remove it")
        data = read_plain(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        western = decode_western(data)  # a guess needs more text
        best = None if western is not None else charset_normalizer.from_bytes(data).best()
        if western is None and best is None:
            raise DataError(f"{path}: not a text in any known encoding; save it again as UTF-8") from err
        logger.info("%s: read as %s", path, "cp1252" if best is None else best.encoding)
        text = western or str(best).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_subtitles(content: str, suffix: str) -> list[Passage]:
    if suffix in ("srt", "vtt"):
        content = _CUE_ID.sub("\n", _VTT_BLOCK.sub("", content) if suffix == "vtt" else content)
    options = {"keep_unknown_html_tags": True} if suffix in ("srt", "vtt") else {}  # <v Name> says who speaks
    events = pysubs2.SSAFile.from_string(content, format_=_PYSUBS2.get(f".{suffix}", suffix), **options)
    return [
        Passage(event.text.replace(r"\N", "\n").replace(r"\n", "\n").replace(r"\h", " "), event.start / 1000,
                event.end / 1000, event.name or None)
        for event in events if not event.is_comment
    ]  # fmt: skip


def _read_json(content: str) -> list[Passage]:
    """Read segments of whisper, faster-whisper, whisperX, whisper.cpp or this project."""
    found = parse_json(content)
    segments = found if isinstance(found, list) else found.get("segments") or found.get("transcription") or []

    def seconds(segment: Mapping[str, Any], name: str, of_cpp: str) -> float:
        value = segment.get(name, segment.get(f"{name}_sec"))
        if value is None and isinstance(segment.get("offsets"), dict):
            return float(segment["offsets"][of_cpp]) / 1000
        return math.nan if value is None else parse_seconds(value, name)

    times = [(seconds(s, "start", "from"), seconds(s, "end", "to")) for s in segments]
    rows = zip(segments, times, strict=True)
    passages = [Passage(text_of(s["text"]), *span, s.get("speaker") or None) for s, span in rows]
    return passages or [Passage(text_of(found["text"]))]


def _read_lrc(content: str) -> list[Passage]:
    lines = [match for line in content.split("\n") if (match := _LRC_LINE.match(line.strip()))]
    starts = sorted(
        (parse_seconds(mark.replace(":", ".", 2).replace(".", ":", 1), "time"), match[2])
        for match in lines
        for mark in regex.findall(r"[\d:.]+", match[1])
    )
    ends = [start for start, _ in starts[1:]] + [math.nan]
    return [Passage(text, start, end) for (start, text), end in zip(starts, ends, strict=True)]


def _read_textgrid(content: str) -> list[Passage]:
    """Read the interval tiers of utterances, or of words; names of other tiers are taken as the speakers'."""
    found = _TEXTGRID_TOKEN.finditer(content)
    tokens = [(m[1] is not None, (m[2] if m[1] is None else m[1]).replace('""', '"')) for m in found]
    if "TextGrid" not in content[:200] or not tokens:
        raise ValueError("no TextGrid header")
    tiers: dict[str, list[Passage]] = {}
    at = 0
    while at < len(tokens):
        if tokens[at] != (True, "IntervalTier"):
            at += 1
            continue
        name, count = tokens[at + 1][1], min(int(tokens[at + 4][1]), len(tokens))
        rows = [tokens[at + 5 + 3 * i : at + 8 + 3 * i] for i in range(count)]
        at += 5 + 3 * count
        speaker = None if _PLAIN_TIER.search(name) else name.strip()
        passages = [Passage(row[2][1], float(row[0][1]), float(row[1][1]), speaker) for row in rows if len(row) == 3]
        tiers[name] = [p for p in passages if p.text.strip().lower() not in _NO_SPEECH]
    spoken = {name: rows for name, rows in tiers.items() if rows and not _OTHER_TIER.search(name)}
    whole = {name: rows for name, rows in spoken.items() if not _WORD_TIER.search(name)}
    return [passage for rows in (whole or spoken).values() for passage in rows]


def clean_passages(passages: Sequence[Passage], *, is_prose: bool = False) -> list[Passage]:
    """Take out of passages what is not said; those without a word left are dropped.

    In prose, what stands in round brackets may be said, and so may what reads like credits.
    """
    lines = [_TAG.sub("", line) for passage in passages for line in passage.text.split("\n")]
    names = Counter(match[1] for line in lines if (match := _NAME.match(_DASH.sub("", line))))
    known = {name for name, count in names.items() if count >= _NAMED_OFTEN or name == name.upper() != name.lower()}
    cleaned: list[Passage] = []
    for passage in _unrolled(passages):
        voice = _VOICE.search(passage.text)
        speaker = html.unescape(voice[1]).strip() if voice else passage.speaker
        # the lines of one speaker are joined; a dash or a name begins another's
        said: list[tuple[str | None, list[str]]] = [(speaker, [])]
        for line in passage.text.split("\n"):
            line = _INVISIBLE.sub(" ", html.unescape(_TAG.sub("", line)).replace("\xa0", " "))
            if _SUNG.search(line) and not is_prose:
                continue
            line = _BRACKETED.sub(" ", line)
            line = line if is_prose else _ROUND.sub(" ", line)
            bare = _DASH.sub("", line)
            name = match[1] if (match := _NAME.match(bare)) and match[1] in known else None
            bare = bare[match.end() :] if name and match else bare
            if name or bare != line:
                said.append((name or (speaker if len(said) == 1 else None), []))
            said[-1][1].append(" ".join(bare.split()))
        for said_by, parts in said:
            text = join_texts(filter(None, parts)).strip(" _~\\|")
            is_credit = not is_prose and len(text) <= _MAX_CREDIT_CHARS and _CREDIT.search(text)
            if any(map(str.isalnum, text)) and not is_credit:
                cleaned.append(replace(passage, text=text, speaker=said_by))
    return cleaned


def _unrolled(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Drop lines repeated from the cue before, if the file repeats lines throughout, as rolling captions do."""
    given = [(p, [line for line in p.text.split("\n") if _TAG.sub("", line).strip()]) for p in passages]
    plain = [[_TAG.sub("", line).strip() for line in lines] for _, lines in given]
    repeats = sum(bool(own) and own[0] in before for before, own in itertools.pairwise(plain))
    if len(given) < 4 or repeats < _ROLLING * len(given):
        yield from passages
        return
    before: list[str] = []
    for (passage, lines), own in zip(given, plain, strict=True):
        new = [line for line, bare in zip(lines, own, strict=True) if bare not in before]
        before = own or before
        if new:
            yield replace(passage, text="\n".join(new))
