"""What was said beside what was recognised, word by word, to read, filter and hear in a notebook or a report.

One piece of HTML that needs nothing else: rows travel as JSON and are drawn a page at a time, so that thousands of
clips stay quick. Edits differ by form as well as by colour. Text of users is only ever put in as text.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import Template
from types import MappingProxyType
from typing import Any

import soundfile as sf

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.edits import AlignedWord, align_words
from src.evaluation.hallucination import is_loop
from src.evaluation.results import Prediction
from src.evaluation.text import get_normalizer
from src.utils.errors import DataError
from src.utils.figures import BLUE, GREEN, ORANGE
from src.utils.templates import read_template

MAX_CLIPS = 5_000  # about 5 MB of text
MAX_AUDIO_CLIPS = 50
MAX_AUDIO_SEC = 600.0  # in all: 2.4 MB of text
PAGE_CLIPS = 25
_MP3 = MappingProxyType({"format": "MP3", "compression_level": 0.9, "bitrate_mode": "CONSTANT"})  # 24 kbit/s at 16 kHz
_LETTERS = MappingProxyType({"equal": "=", "substitute": "s", "delete": "d", "insert": "i"})
_FILTERS = MappingProxyType({
    "all": "all clips",
    "error": "any error",
    "substitution": "substitution",
    "deletion": "deletion",
    "insertion": "insertion",
    "loop": "loop",
    "empty": "empty output",
    "invented": "words on silence",
    "perfect": "perfect",
})  # fmt: skip
_TAGS = MappingProxyType({"loop": "loop", "empty": "empty output", "invented": "words on silence"})


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """How much a view holds.

    Attributes:
        max_clips: the worst of them, where there are more.
        max_audio_clips, max_audio_sec: the worst clips get a player, up to both; seconds of sound.
        page_clips: drawn at once.
    """

    max_clips: int = MAX_CLIPS
    max_audio_clips: int = MAX_AUDIO_CLIPS
    max_audio_sec: float = MAX_AUDIO_SEC
    page_clips: int = PAGE_CLIPS


class AlignmentView:
    """Clips of one model, worst first, as an object that a notebook shows.

    Args:
        rows: of the model, as `load_predictions` or an `EvaluationResult` gives them.
        normalizer: of both texts; that of the evaluation, so that the words are those that were counted.
        recordings: of the clips, by their ids, for players; clips without one have none.
        beside: another model's rows of the same clips, shown below; the stock model's.
        names: of the two models.
        options: defaults without.
    Raises: DataError: no rows, or `beside` lacks some of them. AudioError: a recording that cannot be decoded.
    """

    def __init__(
        self,
        rows: Sequence[Prediction],
        normalizer: str,
        recordings: Iterable[Utterance] = (),
        *,
        beside: Sequence[Prediction] = (),
        names: tuple[str, str] = ("tuned", "stock"),
        options: ViewOptions | None = None,
    ) -> None:
        if not rows:
            raise DataError("alignment view: no rows; evaluate first")
        self._others = _matched(rows, beside)
        self._options = options or ViewOptions()
        self._names = names if beside else names[:1]
        self._normalizer = normalizer
        self._kinds = {row.id: clip_kinds(row, normalizer) for row in rows}
        self._measured = len(rows)
        self.rows = worst_first(rows, self._kinds)[: self._options.max_clips]
        self._audio = _encode_worst(self.rows, {clip.id: clip for clip in recordings}, self._options)

    @property
    def playable(self) -> int:
        """Clips with a player."""
        return len(self._audio)

    def to_html(self) -> str:
        """Return the view as a piece of HTML with its style and script in it."""
        return Template(read_template("src.evaluation", "alignment_view.html")).substitute(
            css=Template(read_template("src.evaluation", "alignment_view.css")).substitute(
                blue=BLUE, orange=ORANGE, green=GREEN
            ),
            js=read_template("src.evaluation", "alignment_view.js"),
            note=html.escape(self._note()),
            data=_json_for_script(self._payload()),
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def _note(self) -> str:
        players = (
            f"{self.playable} of them can be played: the worst, at most {self._options.max_audio_clips} clips or "
            f"{self._options.max_audio_sec / 60:g} minutes"
            if self.playable
            else "no recording was given to play"
        )
        clips = f"{len(self.rows)} clip{'s' * (len(self.rows) != 1)} of the {self._names[0]} model"
        if len(self.rows) < self._measured:
            clips = f"the worst {clips}, of {self._measured} in all"
        return (
            f"{clips}, words after {self._normalizer}. Worst first: loops and words on silence, then by errors, then "
            f"by WER; {players}."
        )

    def _payload(self) -> dict[str, Any]:
        return {
            "names": self._names,
            "filters": list(self._filters().items()),
            "tags": dict(_TAGS),
            "page": self._options.page_clips,
            "rows": [self._row(row) for row in self.rows],
        }

    def _filters(self) -> dict[str, str]:
        if not self._others:
            return dict(_FILTERS)
        model, other = self._names[0], self._names[-1]
        return {**_FILTERS, "worse": f"{model} worse than {other}", "better": f"{model} better than {other}"}

    def _row(self, row: Prediction) -> dict[str, Any]:
        other = self._others.get(row.id)
        kinds = list(self._kinds[row.id])
        if other is not None and other.counts.errors != row.counts.errors:
            kinds.append("worse" if row.counts.errors > other.counts.errors else "better")
        return {
            "id": row.id,
            "speaker": row.speaker,
            "sec": round(row.duration_sec, 2),
            "reference": row.reference,
            "kinds": kinds,
            "said": [self._said(each) for each in (row, other) if each is not None],
            "audio": self._audio.get(row.id),
        }

    def _said(self, row: Prediction) -> dict[str, Any]:
        return {
            "hypothesis": row.hypothesis,
            "wer": None if math.isnan(row.wer) else round(row.wer, 4),
            "errors": row.counts.errors,
            "words": row.reference_words,
            "steps": _packed(align_words(row.reference, row.hypothesis, self._normalizer)),
        }


def clip_kinds(row: Prediction, normalizer: str) -> tuple[str, ...]:
    """Return what a clip counts as: "error", "substitution", ..., "loop", "empty", "invented", "perfect"."""
    normalize = get_normalizer(normalizer)
    loops = is_loop(
        normalize(row.reference),
        normalize(row.hypothesis),
        duration_sec=row.duration_sec,
        num_tokens=row.num_tokens,
    )
    holds = {
        "error": row.counts.errors > 0,
        "substitution": row.substitutions > 0,
        "deletion": row.deletions > 0,
        "insertion": row.insertions > 0,
        "loop": loops,
        "empty": row.reference_words > 0 and row.counts.hypothesis == 0,
        "invented": row.reference_words == 0 and row.insertions > 0,
        "perfect": row.counts.errors == 0,
    }
    return tuple(kind for kind, is_so in holds.items() if is_so)


def worst_first(rows: Sequence[Prediction], kinds: Mapping[str, Sequence[str]]) -> tuple[Prediction, ...]:
    """Sort clips: loops and words on silence, then by errors, then by WER; equal ones as they come.

    Args: kinds: of each clip, by its id.
    """

    def badness(row: Prediction) -> tuple[bool, int, float]:
        made_up = bool({"loop", "invented"} & set(kinds[row.id]))
        return made_up, row.counts.errors, 0.0 if math.isnan(row.wer) else row.wer

    return tuple(sorted(rows, key=badness, reverse=True))


def _matched(rows: Sequence[Prediction], beside: Sequence[Prediction]) -> dict[str, Prediction]:
    others = {row.id: row for row in beside}
    missing = [row.id for row in rows if row.id not in others] if beside else []
    if missing:
        raise DataError(
            f"alignment view: {len(missing)} clips are not in the rows beside (first: {missing[0]}); pass rows of the "
            "same clips, or none"
        )
    return others


def _encode_worst(
    rows: Sequence[Prediction], recordings: Mapping[str, Utterance], options: ViewOptions
) -> dict[str, str]:
    """Encode the first clips that have a recording, until either limit."""
    given = [row for row in rows if row.id in recordings][: options.max_audio_clips]
    seconds = itertools.accumulate(row.duration_sec for row in given)
    taken = [row for row, total in zip(given, seconds, strict=True) if total <= options.max_audio_sec]
    return {row.id: _data_uri(recordings[row.id]) for row in taken}


def _data_uri(utterance: Utterance) -> str:
    samples = decode_audio(utterance, load=partial(load_audio, allow_silence=True)).numpy()  # (T,)
    buffer = io.BytesIO()
    sf.write(buffer, samples, SAMPLE_RATE, **_MP3)  # mp3: Safari before 18.4 plays no Opus in Ogg
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _packed(steps: Sequence[AlignedWord]) -> list[list[str | None]]:
    """Shorten an alignment for the page: runs of equal words are one step, the others hold what they have."""
    packed: list[list[str | None]] = []
    for edit, group in itertools.groupby(steps, key=lambda step: step.edit):
        if edit == "equal":
            packed.append(["=", " ".join(str(step.reference) for step in group)])
            continue
        letter = _LETTERS[edit]
        packed += [[letter, *(word for word in (s.reference, s.hypothesis) if word is not None)] for s in group]
    return packed


def _json_for_script(value: Any) -> str:
    """Write JSON that may stand in a script element: no character in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
