"""The data report finds what was put into the data, says nothing else, and survives being saved."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soxr

from src.data.audio import SAMPLE_RATE, Waveform
from src.data.preparation import DatasetSplits
from src.data.report.findings import Finding, fits_script, text_key
from src.data.report.report import (
    CLIP_TYPES,
    CLIPS_FILE,
    REPORT_FILE,
    DataReport,
    build_data_report,
    find_rate_outliers,
)  # fmt: skip
from src.data.utterance import SPLITS, SkippedUtterance, Utterance, hashed_choice
from src.data.vad import VoiceActivityDetector
from src.utils.config import Config
from src.utils.errors import DataError
from tests.data.report_data import clip, noise, plain_clips, splits_of


@pytest.fixture(scope="module")
def detector() -> VoiceActivityDetector:
    return VoiceActivityDetector()


@pytest.fixture(scope="module")
def clean() -> list[Utterance]:
    return plain_clips("a", 20, speakers=10)


@pytest.fixture(scope="module")
def bundled(sample: list[Utterance], detector: VoiceActivityDetector) -> DatasetSplits:
    parts = ([u for u in sample if u.meta["split"] == name][:n] for name, n in zip(SPLITS, (40, 10, 30), strict=True))
    return splits_of(*parts, vad=detector)


@pytest.fixture(scope="module")
def bundled_report(bundled: DatasetSplits) -> DataReport:
    return build_data_report(bundled, Config())


def build(train: Sequence[Utterance], test: Sequence[Utterance] = (), **options: Any) -> DataReport:
    return build_data_report(splits_of(train, test=test), Config(), **options)


def topics(report: DataReport) -> dict[str, Finding]:
    return {finding.topic: finding for finding in report.findings}


def test_clean_data_has_nothing_to_warn_of_but_its_amount(clean: list[Utterance]) -> None:
    report = build(clean)
    assert {f.topic: f.level for f in report.findings} == {
        "amount": "warning", "speech detection": "info", "tokens": "info",
    }  # fmt: skip
    assert report.clips[["tokens", "speech_fraction"]].isna().all(axis=None)


def test_the_bundled_data_is_described_as_it_is(bundled_report: DataReport, bundled: DatasetSplits) -> None:
    assert list(bundled_report.clips.columns) == list(CLIP_TYPES)
    summary = bundled_report.summary().set_index("split")
    assert summary["clips"].tolist() == [40, 10, 30]
    assert summary.loc["train", "hours"] == pytest.approx(sum(u.duration_sec or 0 for u in bundled.train) / 3600)
    assert summary.loc["test", "speakers"] == len({u.speaker for u in bundled.test})
    assert set(summary["sample_rates"]) == {"16000"}
    assert not [f for f in bundled_report.findings if f.level == "error"]
    clips = bundled_report.clips
    assert clips["leading_silence_sec"].between(0, 6).all()
    total = clips["speech_fraction"] * clips["duration_sec"] + clips["leading_silence_sec"]
    assert (total + clips["trailing_silence_sec"] <= clips["duration_sec"] + 1e-6).all()


def test_what_is_wrong_with_recordings_is_told(clean: list[Utterance]) -> None:
    low = [clip(f"t{i}", soxr.resample(noise(2, i), SAMPLE_RATE, 8_000), f"Text {i}.", rate=8_000) for i in range(3)]
    upsampled = soxr.resample(soxr.resample(noise(2, 9), SAMPLE_RATE, 8_000), 8_000, 48_000)
    padded = np.concatenate([noise(1, 2), np.zeros(9 * SAMPLE_RATE, np.float32)])
    waves = {"c": np.clip(noise(2, 1, 0.8), -1, 1), "p": padded, "q": noise(2, 3, 0.002), "s": noise(0.3, 1)}
    train = [*clean, *(clip(name, wave, f"Yes {name}.") for name, wave in waves.items())]
    splits = splits_of(train, test=[*low, clip("u", upsampled, "Text u.", rate=48_000)])
    skipped = [SkippedUtterance("z", "31.00 s, allowed are 0.1 to 30 s (data.min_duration_sec, data.max_duration_sec)")]
    found = topics(build_data_report(replace(splits, skipped=skipped), Config()))
    for topic, ids in {
        "clipping": ("c",), "silence": ("p",), "level": ("q",), "short": ("s",), "sample rate": ("t0", "t1", "t2"),
        "bandwidth": ("u",), "skipped": ("z",),
    }.items():  # fmt: skip
        assert found[topic].ids == ids
    assert "1 for the duration" in found["skipped"].message
    assert found["mixed rates"].level == "warning"  # only the test is narrowband
    assert "8,000 Hz (3)" in found["mixed rates"].message


def test_clips_without_speech_and_with_long_silence_are_told(jfk: Waveform, detector: VoiceActivityDetector) -> None:
    late = np.concatenate([np.zeros(3 * SAMPLE_RATE, np.float32), jfk[: 4 * SAMPLE_RATE]])
    train = [clip("good", jfk, "And so, my fellow Americans."), clip("late", late, "And so."),
             clip("none", noise(3, 1, 0.003), "Hello there.")]  # fmt: skip
    report = build_data_report(splits_of(train, vad=detector), Config())
    found = topics(report)
    assert (found["no speech"].ids, found["no speech"].level) == (("none",), "error")  # one of three: the set's fault
    assert found["long silence"].ids == ("late",)
    rows, start_sec = report.clips.set_index("id"), detector.speech_segments(jfk)[0].start_sec
    assert rows.loc["good", "leading_silence_sec"] == pytest.approx(start_sec, abs=0.04)
    assert rows.loc["late", "leading_silence_sec"] == pytest.approx(3 + start_sec, abs=0.1)
    assert rows.loc["none", "speech_fraction"] == 0
    assert np.isnan(rows.loc["none", "leading_silence_sec"])


def test_swapped_transcripts_show_in_the_pace(bundled: DatasetSplits) -> None:
    long, short = (f(bundled.train, key=lambda u: u.duration_sec or 0) for f in (max, min))
    texts = {long.id: "No.", short.id: "I would like to know where all of these people went after the long day. " * 2}
    train = [replace(u, text=texts.get(u.id, u.text)) for u in bundled.train]
    found = topics(build_data_report(replace(bundled, train=train), Config()))["pace"]
    assert set(found.ids[:2]) == {long.id, short.id}
    assert "1 too fast" in found.message


def test_pace_has_no_outlier_among_equals_or_a_few() -> None:
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(2.5, 0.25, 2_000))
    assert find_rate_outliers(rates).mean() < 0.002  # 3.5 sigma of a normal distribution: 0.0005
    assert not find_rate_outliers(np.full(50, 12.0)).any()
    assert not find_rate_outliers(np.array([1.0, 12.0, 90.0])).any()
    assert find_rate_outliers(np.array([*rates, 0.0, 200.0]))[-2:].all()


def test_copies_are_found_through_containers_and_splits(clean: list[Utterance]) -> None:
    pcm = np.round(noise(2, 77) * 32_768).astype(np.int16)
    report = build(
        [*clean, clip("o", pcm, "One text."), clip("w", pcm, "one text", kind="FLAC"), clip("x", pcm, "Another text.")],
        test=[clip("t", pcm, "One text.", speaker="s9")],
    )
    found = topics(report)
    assert report.findings[0].level == "error"
    assert (found["same audio"].level, found["same audio"].ids) == ("warning", ("w", "x"))
    assert (found["same audio across splits"].level, found["same audio across splits"].ids) == ("error", ("t",))
    assert found["same audio, other text"].ids == ("x",)
    rows = report.clips.set_index("id")
    assert rows.loc[["w", "x", "t"], "duplicate_audio_of"].tolist() == ["o"] * 3
    assert rows.loc["o", "duplicate_audio_of"] is None
    assert rows.loc[["o", "w", "t"], "duplicate_text_count"].tolist() == [3, 3, 3]
    assert found["same texts"].level == "warning"
    assert "1 of 1 test texts are also in training" in found["same texts"].message


def test_speakers_that_are_shared_few_or_unknown_are_told(clean: list[Utterance]) -> None:
    test = [clip("t0", noise(2, 50), "A."), clip("t1", noise(2, 51), "B.", speaker="a3")]
    found = topics(build([*clean, clip("n", noise(2, 52), "C.", speaker=None)], test=test))
    assert found["unknown speakers"].ids == ("n",)
    assert "3 clips of 1 speaker" in found["shared speakers"].message
    assert "2 speakers" in found["few test speakers"].message


def mixed_languages() -> list[Utterance]:
    """Ten clips per language, at paces that would be far off in another language."""
    texts = {
        "en": ("We walked home in the rain {}.", "abcdefghij"), "zh": ("我们冒雨走回家{}。", "甲乙丙丁戊己庚辛壬癸"),
        "hi": ("हम बारिश में घर लौटे {}।", "कखगघचछजझटठ"),
    }  # fmt: skip
    return [
        clip(f"{language}{i}", noise(2.0 + 0.05 * i, 100 * n + i), text.format(letters[i]), speaker=f"s{i}",
             language=language)
        for n, (language, (text, letters)) in enumerate(texts.items()) for i in range(10)
    ]  # fmt: skip


def test_each_language_is_judged_by_its_own_rows(clean: list[Utterance]) -> None:
    clips = mixed_languages()
    assert not {"pace", "capitals", "punctuation", "script", "language"} & set(topics(build(clips)))
    assert "Hindi 10 clips" in topics(build(clips))["languages"].message
    capitals = [replace(u, text=u.text.upper()) for u in clips]  # two of the three have no capitals
    assert "transcripts in English are in capitals" in topics(build(capitals))["capitals"].message
    slow = [replace(u, text=u.text[:5]) if u.id == "hi3" else u for u in clips]
    assert (topics(build(slow))["pace"].ids, "of 10 in Hindi" in topics(build(slow))["pace"].message) == (
        ("hi3",),
        True,
    )
    assert "punctuation" not in topics(build([replace(u, text="เราเดินกลับบ้านกลางสายฝน", language="th") for u in clips]))


def test_marks_that_are_absent_or_do_not_fit_the_text_are_told() -> None:
    changes: dict[str, dict[str, Any]] = {
        "en0": {"language": None}, "hi1": {"text": "hum baarish mein ghar laute"}, "zh2": {"language": "ja"},
        "zh3": {"language": "ko"}, "zh4": {"text": "NBA 比赛结束了"}, "zh5": {"text": "2026"},
    }  # fmt: skip
    found = topics(build([replace(u, **changes.get(u.id, {})) for u in mixed_languages()]))
    assert (found["language"].ids, found["language"].level) == (("en0",), "info")
    assert (found["script"].ids, found["script"].level) == (("hi1",), "warning")  # Korean and Japanese have Chinese too
    alone = build(mixed_languages()[:10], test=mixed_languages()[10:])
    assert any("without training clips: Chinese, Hindi" in finding.message for finding in alone.findings)


def test_latin_capitals_in_another_script_are_no_style() -> None:
    clips = [replace(u, text=f"NBA {u.text}") if i % 2 else u for i, u in enumerate(mixed_languages()[10:])]
    assert "capitals" not in topics(build(clips))


def test_translations_are_in_latin_letters_whatever_is_spoken() -> None:
    clips = [replace(u, text="We walked home.") for u in mixed_languages()]
    assert "script" in topics(build(clips))
    translated = Config.model_validate({"model": {"task": "translate"}})
    assert "script" not in topics(build_data_report(splits_of(clips), translated))


@pytest.mark.parametrize(("language", "text"), [
    ("sr", "Ходали смо кући"), ("sr", "Hodali smo kući"), ("yue", "我哋行返屋企"), ("ja", "カタカナ"), ("ko", "우리는"),
    ("am", "እኛ ወደ ቤት"), ("my", "ကျွန်တော်တို့"), ("bo", "ང་ཚོ"), ("yi", "מיר זענען"), ("ur", "ہم گھر"), ("el", "Πήγαμε"),
    ("pa", "ਅਸੀਂ ਘਰ"), ("pa", "اسیں گھر"), ("hi", "मैंने WhatsApp पर message भेजा"), ("ms", "Kami"), ("ka", "ჩვენ"),
])  # fmt: skip
def test_a_language_has_each_of_its_scripts(language: str, text: str) -> None:
    assert fits_script(text, language)


def test_only_case_and_punctuation_make_no_other_text() -> None:
    pairs = [("कि", "की"), ("हम गए", "हम गये"), ("ਕਿ", "ਕੀ"), ("ไหม", "ใหม่"), ("मां", "माँ"), ("كَتَبَ", "كُتُب")]
    assert all(text_key(a) != text_key(b) for a, b in pairs)
    assert text_key("İSTANBUL!", "tr") == text_key("istanbul", "tr") != text_key("ıstanbul", "tr")
    assert text_key("今天，天气好。", "zh") == text_key("今天 天气好", "zh")
    assert text_key("Don’t walk -- now!") == text_key("don't walk now") == text_key("don't wa\u00adlk now")
    assert text_key("می‌روم", "fa") != text_key("می روم", "fa")  # a joiner is spelling


def test_languages_are_listed_with_words_only_where_spaces_part_them(tmp_path: Path) -> None:
    report = build(mixed_languages()[:21], test=[clip("x", noise(2, 1), "Ja.", language=None)])
    table = report.languages().set_index("code")
    assert table["train"].tolist() == [10, 10, 1, 0] and table.loc[None, "test"] == 1
    assert table.loc["hi", "words"] == 6 and pd.isna(table.loc["zh", "words"])
    assert table.loc["zh", "characters"] == 90 and table.loc["hi", "language"] == "Hindi"
    report.save(tmp_path)
    pd.testing.assert_frame_equal(DataReport.load(tmp_path).languages(), report.languages())
    others = [clip("a", noise(2, 2), "今天天气好", language=None), clip("b", noise(2, 3), "We go.", language="zh")]
    words = build(others).languages().set_index("language")["words"]  # unmarked, and translated
    assert pd.isna(words["not marked"]) and words["Chinese"] == 2


def test_texts_too_long_for_the_decoder_are_an_error(clean: list[Utterance], _tiny_en: tuple[Any, Any]) -> None:
    _, processor = _tiny_en
    long = clip("long", noise(29, 60), "Five, six, seven, eight. " * 60)
    report = build([*clean, long], tokenizer=processor.tokenizer)
    assert (topics(report)["tokens"].level, topics(report)["tokens"].ids) == ("error", ("long",))
    row = report.clips.set_index("id").loc["a0"]
    assert row["tokens"] == len(processor.tokenizer(" " + row["text"]).input_ids)  # the same specials, another order


def test_the_style_of_the_transcripts_is_told_and_of_mixed_ones_the_fewer(clean: list[Utterance]) -> None:
    for topic, change in {
        "capitals": str.upper,
        "punctuation": lambda text: text.lower().replace(".", ""),
        "digits": lambda text: text.replace("a", "7"),
    }.items():
        assert topic in topics(build([replace(u, text=change(u.text)) for u in clean]))
    mixed = [replace(u, text=u.text.upper().replace(".", "")) if i < 4 else u for i, u in enumerate(clean)]
    found = topics(build(mixed))
    assert found["capitals"].ids == tuple(u.id for u in clean[:4])
    assert "20%" in found["capitals"].message and "80%" in found["punctuation"].message


def test_a_report_comes_back_as_it_was_saved(bundled_report: DataReport, tmp_path: Path) -> None:
    clips = bundled_report.clips.copy()
    clips.loc[0, "text"], clips.loc[1, "text"] = "NA", 'None, "nan"\nin two lines'
    clips.loc[2, "speaker"] = None
    clips.loc[3, ["leading_silence_sec", "speech_fraction"]] = np.nan
    clips["tokens"] = clips["tokens"].where(clips.index != 4, 17)
    styles = pd.DataFrame([{"style": "keep", "space": True, "nats": 7.5, "clips": 3, "example": "Hi."}])
    report = replace(bundled_report, clips=clips, skipped=(SkippedUtterance("x", "bad"),), label_styles=styles)
    assert [path.name for path in report.save(tmp_path / "run")] == [REPORT_FILE, CLIPS_FILE]
    again = DataReport.load(tmp_path / "run")
    pd.testing.assert_frame_equal(again.clips, clips)
    assert (again.findings, again.skipped, again.source) == (report.findings, report.skipped, report.source)
    assert again.label_styles is not None
    pd.testing.assert_frame_equal(again.label_styles, styles)
    assert again.hard_clips is None
    assert again.to_text() == report.to_text()


def test_a_report_tells_no_private_place(
    clean: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    mix = [{"source": "folder", "path": tmp_path / name} for name in ("data", "more")]
    config = Config.model_validate({"data": {"mix": mix}})
    names = ["data/b/x.wav", "more/b/x.wav"]
    places = [*(tmp_path / name for name in names), *(Path(p, "x.wav") for p in (Path.cwd(), "/home/somebody", "/a/b"))]
    skipped = [SkippedUtterance(f"{i}", f"utterance {i}: {place}: no such file") for i, place in enumerate(places)]
    report = build_data_report(replace(splits_of(clean), skipped=skipped), config)
    shown = ["b/x.wav", "b/x.wav", "x.wav", "x.wav", "x.wav"]
    assert [row.reason for row in report.skipped] == [
        f"utterance {i}: {name}: no such file" for i, name in enumerate(shown)
    ]
    named = [replace(clip, id=str(tmp_path / "data" / clip.id)) for clip in clean]
    assert list(build_data_report(splits_of(named), config).clips["id"]) == [clip.id for clip in clean]


def test_no_cell_of_the_table_of_clips_is_a_formula(clean: list[Utterance], tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-2 degrees", "@SUM(A1)", "'=1", "''@x", "'tis", " =cmd|x", "＝1", "a=b", "NA", "'", "-"]
    train = [replace(clean[i], id=f"={i}", text=text, speaker=text) for i, text in enumerate(texts)]
    report = build(train)
    report.save(tmp_path)
    with (tmp_path / CLIPS_FILE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ("id", "speaker", "text", "duplicate_audio_of")
    assert {row[name][:1] for row in rows for name in names if set("=+-@＝") & set(row[name].strip()[:1])} == set()
    assert rows[0]["text"] == "'=1+1"
    assert any(row["peak_dbfs"].startswith("-") for row in rows)  # numbers stay numbers
    pd.testing.assert_frame_equal(DataReport.load(tmp_path).clips, report.clips)


def test_a_notebook_shows_whole_and_escaped_texts(clean: list[Utterance]) -> None:
    report = build([*clean, clip("<b>", noise(2, 3, 0.002), "A text.", speaker=None)])
    hard = pd.DataFrame([{"id": "x", "reference": "A <script> text.", "hypothesis": "A long text. " * 9, "wer": 9.0}])
    page = replace(report, hard_clips=hard)._repr_html_()
    assert "<script>" not in page and "NaN" not in page
    for shown in (("A long text. " * 9).strip(), "&lt;b&gt;", "unknown speakers"):
        assert shown in page


def test_a_hashed_choice_is_the_same_in_any_order(clean: list[Utterance]) -> None:
    chosen = [u.id for u in hashed_choice(clean, 5, 0)]
    assert [u.id for u in hashed_choice(clean[::-1], 5, 0)] == chosen != [u.id for u in hashed_choice(clean, 5, 1)]
    assert len(hashed_choice(clean, 1_000, 0)) == 20


def test_a_saved_report_has_no_nan_and_absent_damaged_or_unmeasured_ones_are_refused(
    clean: list[Utterance], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        DataReport.load(tmp_path)
    path, _ = build(clean).save(tmp_path)  # no validation, no test, no speech detection
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert [row["clips"] for row in content["summary"]] == [20, 0, 0]
    assert content["summary"][1]["median_sec"] is content["summary"][0]["no_speech_share"] is None
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match=str(tmp_path)):
        DataReport.load(tmp_path)
    with pytest.raises(DataError, match="utterance a0"):
        build_data_report(replace(splits_of(clean), stats={}), Config())
