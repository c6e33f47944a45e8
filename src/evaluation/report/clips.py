"""Reference and hypothesis of each clip, aligned word by word, to read, filter and hear in a notebook or a report.

The view is one piece of HTML that loads nothing: the clips travel as JSON and are drawn one page at a time, so that
thousands of them stay quick. Edits differ in form as well as in colour. Texts of users are only ever inserted as text.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import soundfile as sf

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import decode_audio
from src.data.utterance import Utterance
from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import is_loop
from src.evaluation.report.summary import counted, render
from src.evaluation.text import align_words, get_normalizer
from src.utils.errors import DataError

_TAGS = {"loop": "loop", "empty": "empty output", "invented": "words on silence"}
_FILTERS = {
    "all": "all clips",
    "error": "any error",
    "substitution": "substitution",
    "deletion": "deletion",
    "insertion": "insertion",
    **_TAGS,
    "perfect": "perfect",
}


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Size of a view.

    Attributes:
        max_clips: the worst ones are kept; 5,000 are about 5 MB of text.
        max_audio_clips: the worst ones get a player.
        max_audio_sec: seconds of sound in all players; 600 s are 2.4 MB of text.
        page_clips: clips on a page.
    """

    max_clips: int = 5_000
    max_audio_clips: int = 50
    max_audio_sec: float = 600.0
    page_clips: int = 25


class AlignmentView:
    """Clips of one model, worst first, as an object that a notebook shows.

    Args:
        rows: of the model, from `load_predictions` or an `EvaluationResult`.
        normalizer: of the evaluation, so that the words are those that were counted.
        recordings: of the clips, by their ids, for players; clips without one have no player.
        beside: rows of another model on the same clips, shown below; those of the stock model.
        names: of the two models.
        options: defaults without.

    Raises:
        DataError: no rows, or `beside` lacks some of them.
        AudioError: a recording that cannot be decoded.
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
        self._others = {row.id: row for row in beside}
        missing = [row.id for row in rows if row.id not in self._others] if beside else []
        if not rows:
            raise DataError("alignment view: no rows; evaluate first")
        if missing:
            raise DataError(
                f"alignment view: {len(missing)} clips are not in the rows beside (first: {missing[0]}); pass rows of "
                "the same clips, or none"
            )
        self._options = options or ViewOptions()
        self._names = names if beside else names[:1]
        self._normalizer = normalizer
        self._kinds = {row.id: clip_kinds(row, normalizer) for row in rows}
        self._measured = len(rows)
        self.rows = worst_first(rows, self._kinds)[: self._options.max_clips]
        self._audio = _encode_worst(self.rows, {clip.id: clip for clip in recordings}, self._options)

    @property
    def playable(self) -> int:
        """Number of clips with a player."""
        return len(self._audio)

    def to_html(self) -> str:
        """Return the view as a piece of HTML, style and script included."""
        filters = dict(_FILTERS)
        if self._others:
            model, other = self._names[0], self._names[-1]
            filters |= {"worse": f"{model} worse than {other}", "better": f"{model} better than {other}"}
        data = {
            "names": self._names,
            "filters": list(filters.items()),
            "tags": _TAGS,
            "page": self._options.page_clips,
            "rows": [self._row(row) for row in self.rows],
        }
        players = (
            f"{self.playable} of them can be played: the worst, at most {self._options.max_audio_clips} clips or "
            f"{self._options.max_audio_sec / 60:g} minutes"
            if self.playable
            else "no recording was given to play"
        )
        clips = f"{counted(len(self.rows), 'clip')} of the {self._names[0]} model"
        if len(self.rows) < self._measured:
            clips = f"the worst {clips}, of {self._measured} in all"
        note = (
            f"{clips}, words after {self._normalizer}. Worst first: loops and words on silence, then by errors, then "
            f"by WER; {players}."
        )
        return render("alignment_view.html", note=note, data=data)

    def _repr_html_(self) -> str:
        return self.to_html()

    def _row(self, row: Prediction) -> dict[str, Any]:
        other = self._others.get(row.id)
        kinds = list(self._kinds[row.id])
        if other is not None and other.errors != row.errors:
            kinds.append("worse" if row.errors > other.errors else "better")
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
        # a run of equal words is one step, an edit is a step with its letter and the words that it has
        steps: list[list[str | None]] = []
        words = align_words(row.reference, row.hypothesis, self._normalizer)
        for edit, group in itertools.groupby(words, key=lambda word: word.edit):
            if edit == "equal":
                steps.append(["=", " ".join(str(word.reference) for word in group)])
            else:
                steps += [[edit[0], *(text for text in (w.reference, w.hypothesis) if text is not None)] for w in group]
        return {
            "hypothesis": row.hypothesis,
            "wer": None if math.isnan(row.wer) else round(row.wer, 4),
            "errors": row.errors,
            "words": row.reference_words,
            "steps": steps,
        }


def clip_kinds(row: Prediction, normalizer: str) -> tuple[str, ...]:
    """Return what a clip counts as: "error", "substitution", ..., "loop", "empty", "invented", "perfect"."""
    normalize = get_normalizer(normalizer)
    texts = normalize(row.reference), normalize(row.hypothesis)
    kinds = {
        "error": row.errors > 0,
        "substitution": row.substitutions > 0,
        "deletion": row.deletions > 0,
        "insertion": row.insertions > 0,
        "loop": is_loop(*texts, duration_sec=row.duration_sec, num_tokens=row.num_tokens),
        "empty": row.reference_words > 0 and row.hypothesis_words == 0,
        "invented": row.reference_words == 0 and row.insertions > 0,
        "perfect": row.errors == 0,
    }
    return tuple(kind for kind, holds in kinds.items() if holds)


def worst_first(rows: Sequence[Prediction], kinds: Mapping[str, Sequence[str]]) -> tuple[Prediction, ...]:
    """Sort clips: loops and words on silence first, then by errors, then by WER."""

    def badness(row: Prediction) -> tuple[bool, int, float]:
        made_up = bool({"loop", "invented"} & set(kinds[row.id]))
        return made_up, row.errors, 0.0 if math.isnan(row.wer) else row.wer

    return tuple(sorted(rows, key=badness, reverse=True))


def _encode_worst(
    rows: Sequence[Prediction], recordings: Mapping[str, Utterance], options: ViewOptions
) -> dict[str, str]:
    """Encode the first clips that have a recording as data URIs, until a limit is reached."""
    given = [row for row in rows if row.id in recordings][: options.max_audio_clips]
    total_sec = itertools.accumulate(row.duration_sec for row in given)
    encoded = {}
    for row, sec in zip(given, total_sec, strict=True):
        if sec > options.max_audio_sec:
            break
        samples = decode_audio(recordings[row.id], load=partial(load_audio, allow_silence=True)).numpy()  # (T,)
        buffer = io.BytesIO()
        # MP3 of 24 kbit/s: Safari before 18.4 plays no Opus in Ogg
        sf.write(buffer, samples, SAMPLE_RATE, format="MP3", compression_level=0.9, bitrate_mode="CONSTANT")
        encoded[row.id] = f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return encoded
