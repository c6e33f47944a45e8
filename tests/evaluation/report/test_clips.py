from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from scipy.signal import correlate

from src.data.audio import load_audio
from src.data.utterance import Utterance
from src.evaluation.evaluator import Prediction
from src.evaluation.metrics import PLAIN, WHISPER_ENGLISH, word_counts
from src.evaluation.report import clips as view
from src.evaluation.report.clips import AlignmentView, Highlights, clip_kinds
from src.utils.errors import AudioError, DataError
from tests.evaluation.report.test_html import Page
from tests.evaluation.run_files import spoken_results

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- "


def clips(*pairs: tuple[str, str], tokens: int | None = None) -> list[Prediction]:
    """Rows of one model, from references and hypotheses."""
    counts = word_counts([r for r, _ in pairs], [h for _, h in pairs], PLAIN)
    return [
        Prediction(
            id=f"c{i}", speaker=f"s{i % 2}", duration_sec=2.0, reference=reference, hypothesis=hypothesis,
            avg_logprob=-0.2, latency_sec=0.1, num_tokens=tokens, **vars(count),
        )
        for i, ((reference, hypothesis), count) in enumerate(zip(pairs, counts, strict=True))
    ]  # fmt: skip


def payload(rows: list[Prediction], *recordings: Utterance, **options: Any) -> dict[str, Any]:
    """What the script of the view reads."""
    page = AlignmentView(rows, PLAIN, recordings, **options).to_html()
    (text,) = re.findall(r'class="av-data">(.*?)</script>', page, re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def test_each_edit_travels_with_its_words_and_any_script_survives() -> None:
    text = "naïve 中文 \u2028 שלום"
    rows = clips(("", "no one"), ("the cat sat on the big mat", "the hat sat on big mat now"), (text, text))
    silent, edited, equal = payload(rows)["rows"]
    assert (silent["said"][0]["rate"], silent["said"][0]["errors"]) == (None, 2)
    assert equal["reference"] == text
    assert edited["said"][0]["steps"] == [
        ["=", "the"], ["s", "cat", "hat"], ["=", "sat on"], ["d", "the"], ["=", "big mat"], ["i", "now"],
    ]  # fmt: skip


def test_kinds_of_a_clip() -> None:
    loop = "of course " * 12
    rows = clips(("a b", "a b"), ("a b", "a c d"), ("of course", loop), ("a b", ""), ("", "thank you"), ("", ""))
    kinds = [set(clip_kinds(row, PLAIN)) for row in rows]
    assert kinds == [
        {"perfect"},
        {"error", "substitution", "insertion"},
        {"error", "insertion", "loop"},
        {"error", "deletion", "empty"},
        {"error", "insertion", "invented"},
        {"perfect"},
    ]
    assert "loop" in clip_kinds(clips(("a b", "a b"), tokens=400)[0], PLAIN)  # more tokens than fit into 2 s


def test_loops_and_words_on_silence_come_first_then_errors_then_wer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clips(("a b c d", "a b x y"), ("", "thanks"), ("a b", "x y"), ("a", "a"), ("go on", "go on " * 12))
    assert [row["id"] for row in payload(rows)["rows"]] == ["c4", "c1", "c2", "c0", "c3"]
    monkeypatch.setattr(view, "MAX_CLIPS", 2)
    assert [row["id"] for row in payload(rows)["rows"]] == ["c4", "c1"]
    assert "worst of 5" in AlignmentView(rows, PLAIN)._repr_html_()


def test_what_users_wrote_is_never_markup() -> None:
    rows = [replace(clips((ATTACK, f"{ATTACK}x"))[0], id=ATTACK, speaker=ATTACK)]
    html = AlignmentView(rows, PLAIN, beside=rows, names=(ATTACK, ATTACK)).to_html()
    page = Page(html)
    assert (page.count("script"), page.count("img")) == (2, 0)
    (row,) = payload(rows)["rows"]
    assert (row["id"], row["speaker"], row["reference"]) == (ATTACK, ATTACK, ATTACK)
    given = [attribute for _, attributes in page.tags for attribute in attributes]
    assert not [name for name in given if name.startswith("on") or name in ("src", "href", "srcset")]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|innerHTML", html)  # and it loads nothing


def test_a_clip_that_is_named_by_its_whole_path_is_shown_by_its_name() -> None:
    rows = [replace(clips(("one", "two"))[0], id="/home/ann/speech/a.wav")]
    assert payload(rows)["rows"][0]["id"] == "a.wav"
    assert "/home/ann" not in AlignmentView(rows, PLAIN, beside=rows, names=("tuned", "stock")).to_html()


def test_the_stock_model_is_shown_too_and_where_tuning_hurt() -> None:
    tuned, stock = clips(("a b", "a x"), ("a b", "a b"), ("a", "a")), clips(("a b", "a b"), ("a b", "x y"), ("a", "a"))
    found = payload(tuned, beside=stock)
    assert found["names"] == ["tuned", "stock"]
    kinds = {row["id"]: {"worse", "better"} & set(row["kinds"]) for row in found["rows"]}
    assert kinds == {"c0": {"worse"}, "c1": {"better"}, "c2": set()}
    assert [said["errors"] for said in found["rows"][0]["said"]] == [1, 0]
    assert {"worse", "better"} <= set(dict(found["filters"]))
    with pytest.raises(DataError, match=r"2 clips.*c1"):
        payload(tuned, beside=stock[:1])
    with pytest.raises(DataError):
        payload([])


def test_a_player_holds_the_recording(sample: list[Utterance]) -> None:
    row = replace(clips(("a", "b"))[0], id=sample[0].id)
    kind, _, data = payload([row], sample[0])["rows"][0]["audio"].partition(";base64,")
    assert kind == "data:audio/mpeg"
    heard, spoken = load_audio(base64.b64decode(data)), load_audio(sample[0].audio)
    assert abs(len(heard) - len(spoken)) < 0.2 * 16_000
    length = min(len(heard), len(spoken))
    best = correlate(heard[:length], spoken[:length], method="fft").max()
    assert best > 0.9 * np.sqrt((heard**2).sum() * (spoken**2).sum())  # the same sound, whatever the codec's delay
    assert len(data) < 4_500 * len(spoken) / 16_000


@pytest.mark.parametrize(("limit", "value"), [("MAX_AUDIO_CLIPS", 2), ("MAX_PLAYERS_SEC", 5.0)])
def test_only_the_worst_carry_sound(
    sample: list[Utterance], monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(view, limit, value)
    rows = clips(*[("a b c", " ".join("x" * i)) for i in range(1, 4)], ("a", "a"))
    audio = [replace(sample[i], id=row.id) for i, row in enumerate(rows)]
    found = payload(rows, *audio)["rows"]  # of 2 s each
    assert [bool(row["audio"]) for row in found] == [True, True, False, False]


def test_a_silent_recording_can_be_played_and_a_broken_one_is_named(tmp_path: Path) -> None:
    sf.write(tmp_path / "silent.wav", np.zeros(16_000, dtype=np.float32), 16_000)
    rows = clips(("", "thank you"))
    assert payload(rows, Utterance("c0", tmp_path / "silent.wav", ""))["rows"][0]["audio"]
    with pytest.raises(AudioError, match=r"c0.*gone\.wav"):
        payload(rows, Utterance("c0", tmp_path / "gone.wav", ""))


def test_texts_without_spaces_are_aligned_by_characters_and_a_mark_alone_stands_on_a_circle() -> None:
    rows = spoken_results("th", "zh")["tuned"].rows
    found = {row["id"]: row for row in payload(list(rows))["rows"]}
    (said,) = found["th0"]["said"]
    assert said["steps"] == [["=", "ช"], ["d", "\u25cc่"], ["=", "ว ย ปิ ด ป ร ะ ตู ด้ ว ย"]]
    assert (said["metric"], said["errors"], said["units"]) == ("CER", 1, 16)
    assert (found["zh0"]["lang"], found["zh0"]["language"], found["th0"]["language"]) == ("zh", "Chinese", "Thai")
    assert {"zh", "th"} <= set(dict(payload(list(rows))["filters"]))


def test_a_translation_is_english_and_a_cut_text_is_marked() -> None:
    (row,) = clips(("close the door", "close the"))
    made = replace(row, language="hi", normalizer=WHISPER_ENGLISH, truncated=True)
    (found,) = payload([made])["rows"]
    assert found["lang"] == "en"
    assert "truncated" in found["kinds"]


def test_the_most_improved_and_the_worst_clip_are_shown_with_what_both_models_heard(sample: list[Utterance]) -> None:
    recordings = sample[:3]
    ids = [clip.id for clip in recordings]
    stock, tuned = (
        [replace(row, id=name) for row, name in zip(clips(*pairs), ids, strict=True)]
        for pairs in (
            [("a b c", "x y z"), ("a b", "a b"), ("a b c d", "a b c")],
            [("a b c", "a b c"), ("a b", "a <b>"), ("a b c d", "a")],
        )
    )
    found = Highlights(stock, tuned, recordings)
    assert {title: row.id for title, row in found.clips.items()} == {"Most improved": ids[0], "Worst": ids[2]}
    shown = found._repr_html_()
    assert shown.count("<audio") == 2
    assert "3 errors in 3 words" in shown and "0 errors in 3 words" in shown
    worse = Highlights(tuned[:1], stock[:1], [])
    assert "No clip improved" in worse._repr_html_() and "no recording" in worse._repr_html_()
    with pytest.raises(DataError, match="no clip in common"):
        Highlights(stock[:1], tuned[1:], recordings)
