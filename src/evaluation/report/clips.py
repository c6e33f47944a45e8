"""Reference and hypothesis of each clip, aligned unit by unit, to read, filter and hear in a notebook or a report.

The view is one piece of HTML that loads nothing: the clips travel as JSON and are drawn one page at a time, so that
thousands of them stay quick. Edits differ in form as well as in colour. Texts of users are only ever inserted as text.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import soundfile as sf

from src.data.audio import SAMPLE_RATE, load_audio
from src.data.dataset import decode_audio
from src.data.report.findings import counted
from src.data.utterance import Utterance
from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import WHISPER_ENGLISH, align_words, is_loop, metric_of
from src.evaluation.report.summary import label_of, on_circle, render
from src.utils.errors import DataError
from src.utils.languages import graphemes
from src.utils.runtime import public

MAX_CLIPS = 5_000  # about 5 MB of text
MAX_AUDIO_CLIPS = 50
MAX_PLAYERS_SEC = 600.0  # of all players: 2.4 MB of text
PAGE_CLIPS = 25
_TAGS = {"loop": "loop", "empty": "empty output", "invented": "words on silence", "truncated": "ended at a limit"}
_EDITS = {edit: edit for edit in ("substitution", "deletion", "insertion")}
_FILTERS = {"all": "all clips", "error": "any error", **_EDITS, **_TAGS, "perfect": "perfect"}


class AlignmentView:
    """Clips of one model, worst first, as an object that a notebook shows.

    Its rows are from `load_predictions` or an `EvaluationResult`; `normalizer` is of the evaluation, for rows of older
    runs, which do not name theirs. Clips without a recording have no player. The rows `beside`, shown below, are of
    another model on the same clips, usually the stock model; `names` are of both.
    """

    def __init__(
        self, rows: Sequence[Prediction], normalizer: str, recordings: Iterable[Utterance] = (), *,
        beside: Sequence[Prediction] = (), names: tuple[str, str] = ("tuned", "stock"),
    ) -> None:  # fmt: skip
        others = {row.id: row for row in beside}
        missing = [row.id for row in rows if row.id not in others] if beside else []
        if not rows:
            raise DataError("alignment view: no rows; evaluate first")
        if missing:
            raise DataError(f"alignment view: {len(missing)} clips are not in the rows beside (first: {missing[0]})")
        kinds = {row.id: clip_kinds(row, normalizer) for row in rows}

        normalizers = dict.fromkeys(row.normalizer or normalizer for row in rows)
        alike = len({metric_of(name) for name in normalizers}) == 1  # else errors are of words and of characters
        languages = {row.language: label_of("language", row.language) for row in rows if row.language}

        def badness(row: Prediction) -> tuple[bool, int, float]:
            made_up = not {"loop", "invented"}.isdisjoint(kinds[row.id])
            return made_up, row.errors * alike, 0.0 if math.isnan(row.rate) else row.rate

        shown = sorted(rows, key=badness, reverse=True)[:MAX_CLIPS]
        audio = _encode_worst(shown, {clip.id: clip for clip in recordings})
        clips = []
        for row in shown:
            said, labels = [row], list(kinds[row.id])
            if (other := others.get(row.id)) is not None:
                said.append(other)
                if other.errors != row.errors:
                    labels.append("worse" if row.errors > other.errors else "better")
            named = {"language": languages[row.language]} if len(languages) > 1 and row.language else {}
            labels += [row.language] if named and row.language else []
            clips.append({
                "id": public(row.id), "speaker": row.speaker, "sec": round(row.duration_sec, 2),
                "reference": row.reference,
                "lang": "en" if row.normalizer == WHISPER_ENGLISH else row.language,  # translations are English
                **named, "kinds": labels, "said": [_said(each, normalizer) for each in said],
                "audio": audio.get(row.id),
            })  # fmt: skip
        compared = {kind: f"{names[0]} {kind} than {names[1]}" for kind in ("worse", "better")} if others else {}
        filters = [*_FILTERS.items(), *compared.items(), *(languages.items() if len(languages) > 1 else ())]
        shown_names = names if others else names[:1]
        self._data = {"names": shown_names, "filters": filters, "tags": _TAGS, "page": PAGE_CLIPS, "rows": clips}
        omitted = f", the worst of {len(rows):,}" if len(shown) < len(rows) else ""
        self._note = (
            f"{counted(len(shown), 'clip')} of the {names[0]} model{omitted}, texts after {' + '.join(normalizers)}. "
            f"Worst first: loops and words on silence, then by {'errors, then by ' * alike}error rate; {len(audio)} of "
            "them, the worst that have a recording, can be played."
        )

    def to_html(self) -> str:
        """Return the view as a piece of HTML, style and script included."""
        return render("alignment_view.html", note=self._note, data=self._data)

    _repr_html_ = to_html


class Highlights:
    """The clip that tuning improved most and the tuned model's worst, to read and hear, as a notebook shows them.

    Made from both models' rows on the same clips, and the clips' recordings.
    """

    def __init__(
        self, stock: Sequence[Prediction], tuned: Sequence[Prediction], recordings: Iterable[Utterance]
    ) -> None:
        before = {row.id: row for row in stock}
        rows = [row for row in tuned if row.id in before]
        if not rows:
            raise DataError("highlights: the models have no clip in common; evaluate both on one set")

        def gain(row: Prediction) -> tuple[int, float]:
            return before[row.id].errors - row.errors, -row.duration_sec

        best = max(rows, key=gain)
        others = [row for row in rows if row is not best] or rows
        worst = max(others, key=lambda row: (row.errors, 0.0 if math.isnan(row.rate) else row.rate))
        title = "Most improved" if gain(best)[0] > 0 else "No clip improved; the least changed"
        self.clips = {title: best, "Worst": worst}
        self._before = before
        self._audio = _encode_worst([*self.clips.values()], {clip.id: clip for clip in recordings})

    def _repr_html_(self) -> str:
        clips = []
        for title, row in self.clips.items():
            said = [("said", row.reference, "")]
            for name, each in (("stock", self._before[row.id]), ("tuned", row)):
                unit = {"WER": "word", "CER": "character"}[metric_of(each.normalizer or WHISPER_ENGLISH)]
                said.append((name, each.hypothesis, f"{each.errors} errors in {counted(each.reference_words, unit)}"))
            clips.append((title, public(row.id), self._audio.get(row.id), said))
        return render("highlights.html", clips=clips)


def _said(row: Prediction, normalizer: str) -> dict[str, Any]:
    """Return what a model wrote: a run of equal words is one step, an edit is one with its letter and its words.

    Of a language without spaces the same with characters; those of a run are put together with their combining marks.
    """
    normalizer = row.normalizer or normalizer
    metric = metric_of(normalizer)
    steps: list[list[str]] = []
    aligned = align_words(row.reference, row.hypothesis, normalizer)
    for edit, group in itertools.groupby(aligned, lambda unit: unit.edit):
        if edit == "equal":
            units = [str(unit.reference) for unit in group]
            steps.append(["=", on_circle(" ".join(graphemes("".join(units)) if metric == "CER" else units))])
        else:
            steps += [[edit[0], *(on_circle(t) for t in (u.reference, u.hypothesis) if t is not None)] for u in group]
    counts = {"metric": metric, "errors": row.errors, "units": row.reference_words}
    return {"hypothesis": row.hypothesis, "rate": None if math.isnan(row.rate) else row.rate, **counts, "steps": steps}


def clip_kinds(row: Prediction, normalizer: str) -> tuple[str, ...]:
    """Return what a clip counts as: "error", "substitution", ..., "loop", "empty", "invented", "perfect"."""
    name = row.normalizer or normalizer
    written = "en" if name == WHISPER_ENGLISH else row.language  # English if translated
    audio: dict[str, Any] = {"duration_sec": row.duration_sec, "num_tokens": row.num_tokens, "language": written}
    kinds = {
        "error": row.errors > 0,
        "substitution": row.substitutions > 0,
        "deletion": row.deletions > 0,
        "insertion": row.insertions > 0,
        "loop": is_loop(row.reference, row.hypothesis, name, **audio),
        "empty": row.reference_words > 0 and row.hypothesis_words == 0,
        "invented": row.reference_words == 0 and row.insertions > 0,
        "truncated": row.truncated,
        "perfect": row.errors == 0,
    }
    return tuple(kind for kind, holds in kinds.items() if holds)


def _encode_worst(rows: Sequence[Prediction], recordings: dict[str, Utterance]) -> dict[str, str]:
    """Encode the first clips that have a recording as data URIs, until a limit is reached."""
    given = [row for row in rows if row.id in recordings][:MAX_AUDIO_CLIPS]
    encoded = {}
    for row, total_sec in zip(given, itertools.accumulate(row.duration_sec for row in given), strict=True):
        if total_sec > MAX_PLAYERS_SEC:
            break
        samples = decode_audio(recordings[row.id], load=partial(load_audio, allow_silence=True)).numpy()  # (T,)
        buffer = io.BytesIO()
        # MP3 of 24 kbit/s: Safari before 18.4 plays no Opus in Ogg
        sf.write(buffer, samples, SAMPLE_RATE, format="MP3", compression_level=0.9, bitrate_mode="CONSTANT")
        encoded[row.id] = f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return encoded
