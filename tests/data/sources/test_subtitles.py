"""Transcripts of every kind give what is said, in order, with times where there are some."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from src.data.sources import subtitles
from src.data.sources.catalog import SAMPLE_CLIP, read_folder
from src.data.sources.subtitles import Passage, clean_passages, find_transcribed, read_transcript
from src.utils.errors import DataError, SourceUnavailableError

TEXTGRID = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 4
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Anna"
        xmin = 0
        xmax = 4
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "Hello ""you"""
        intervals [2]:
            xmin = 1
            xmax = 2.5
            text = "sil"
        intervals [3]:
            xmin = 2.5
            xmax = 4
            text = "two of 3"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 4
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 4
            text = "HH"
'''
SHORT_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
4
<exists>
1
"IntervalTier"
"words"
0
4
2
0
1
"Hello"
1
2.5
"there"
"""
SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>Hello</i> there.\n\n2\n00:00:03,000 --> 00:00:04,000\nTwo\nlines.\n"
EXPECTED = [("Hello there.", 1.0, 2.5, None), ("Two lines.", 3.0, 4.0, None)]


def rows(passages: list[Passage]) -> list[tuple]:
    return [(p.text, p.start_sec, p.end_sec, p.speaker) for p in passages]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.srt", SRT, EXPECTED),
    ("a.srt", SRT.replace("\n", "\r\n"), EXPECTED),
    ("a.vtt", "WEBVTT - x\n\nNOTE no\n-- text\n\nSTYLE\n::cue {color: red}\n\nintro-1\n"
              "00:01.000 --> 00:02.500 line:0\n<c.yellow>Hello</c> <00:00:02.000>there.\n\n"
              "NOTE not\nthis\n\n00:03.000 --> 00:04.000\nTwo&nbsp;lines.\n",
     EXPECTED),
    ("a.vtt", "WEBVTT\n\n00:01.000 --> 00:02.500\n<v Mary Ann>Yes.</v>\n",
     [("Yes.", 1.0, 2.5, "Mary Ann")]),
    ("a.lrc", "[ar:Somebody]\n[00:01.00]Hello there.\n[00:02.50]\n[00:03.00]<00:03.00>Two <00:03.5>lines.\n"
              "[00:04.00]\n", EXPECTED),
    ("a.json", json.dumps({"text": "x", "language": "en", "segments": [
        {"id": 0, "start": 1.0, "end": 2.5, "text": " Hello there."}, {"start": 3, "end": 4, "text": "Two lines."}]}),
     EXPECTED),
    ("a.json", json.dumps({"segments": [{"start": 1.0, "end": 2.5, "text": "Hello there.", "speaker": "SPEAKER_01",
                                         "words": [{"word": "Hello", "start": 1.0, "score": 0.5}]}],
                           "word_segments": []}),
     [("Hello there.", 1.0, 2.5, "SPEAKER_01")]),
    ("a.json", json.dumps({"transcription": [{"offsets": {"from": 1000, "to": 2500}, "text": " Hello there."}]}),
     EXPECTED[:1]),
    ("a.TextGrid", TEXTGRID, [('Hello "you"', 0.0, 1.0, "Anna"), ("two of 3", 2.5, 4.0, "Anna")]),
    ("a.TextGrid", SHORT_TEXTGRID.replace('"there"', '""'), [("Hello", 0.0, 1.0, None)]),  # as Praat writes silence
    ("a.json", json.dumps({"segments": [{"start": 0, "end": 1, "text": None}, {"start": 1, "end": 2, "text": 7}]}),
     [("7", 1.0, 2.0, None)]),
    ("a.TextGrid", SHORT_TEXTGRID, [("Hello", 0.0, 1.0, None), ("there", 1.0, 2.5, None)]),
    ("a.ass", "[Script Info]\n\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, "
              "Text\nDialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\an8}Hello\\Nthere.\n", EXPECTED[:1]),
])  # fmt: skip
def test_each_format_gives_text_times_and_speakers(tmp_path: Path, name: str, content: str, expected: list) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert rows(read_transcript(tmp_path / name)) == expected


def test_plain_text_is_read_by_lines_and_keeps_its_brackets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One (as he said) two.\n\n[applause]\nAnna: three.\n")
    assert [p.text for p in read_transcript(tmp_path / "a.txt")] == ["One (as he said) two.", "Anna: three."]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1251"])
def test_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    said = "Сегодня хорошая погода, и мы пойдём гулять в большой парк."
    (tmp_path / "a.srt").write_bytes(SRT.replace("<i>Hello</i> there.", said).encode(encoding))
    assert read_transcript(tmp_path / "a.srt")[0].text == said


def test_a_short_western_text_needs_no_guess(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_bytes("1\r\n00:00:01,000 --> 00:00:02,000\r\nGrüße\r\n".encode("cp1252"))
    assert [p.text for p in read_transcript(tmp_path / "a.srt")] == ["Grüße"]


@pytest.mark.parametrize(("text", "expected"), [
    ("- Yes.\n- No.", [("Yes.", None), ("No.", None)]),
    ("– Ja, – sagt er.", [("Ja, – sagt er.", None)]),
    ("-5 degrees", [("-5 degrees", None)]),
    (">> JOHN: Hello.", [("Hello.", "JOHN")]),
    ("DR. SMITH: Sit down.", [("Sit down.", "DR. SMITH")]),
    ("Note: this stays.", [("Note: this stays.", None)]),
    ("[door opens] Come in (laughs).", [("Come in .", None)]),
    ("【音楽】こんにちは（笑）", [("こんにちは", None)]),
    ("♪ la la ♪", []), ("# a song #", []), ("...", []), ("[MUSIC]", []), ("*sighs*", []),
    ("Subtitles by the Amara.org community", []), ("Untertitel im Auftrag des ZDF, 2020", []),
    ("Synced and corrected by elderman", []), ("www.OpenSubtitles.org", []),
    ("He was paid by the hour.", [("He was paid by the hour.", None)]),
    ("{\\an8}<font color=\"#fff\">a &lt; b</font>", [("a < b", None)]),
    ("a\u200e\u202b b\u00a0c", [("a b c", None)]),
    ("x <b>bold</b> 3 < 4", [("x bold 3 < 4", None)]),
])  # fmt: skip
def test_what_is_not_said_is_taken_out(text: str, expected: list) -> None:
    assert [(p.text, p.speaker) for p in clean_passages([Passage(text)])] == expected


def test_a_name_that_begins_many_lines_is_a_speaker() -> None:
    said = clean_passages([Passage(f"Anna: number {i}") for i in range(3)])
    assert {(p.text, p.speaker) for p in said} == {(f"number {i}", "Anna") for i in range(3)}


def test_rolling_captions_say_each_line_once() -> None:
    lines = [f"line {i}" for i in range(10)]
    cues = [Passage(f"{a}\n{b}", i, i + 2) for i, (a, b) in enumerate(itertools.pairwise(lines))]
    assert " ".join(p.text for p in clean_passages(cues)) == " ".join(lines)
    spoken_twice = [Passage(text) for text in ("No.", "No.", "Well,", "yes.", "Good.")]
    assert [p.text for p in clean_passages(spoken_twice)] == ["No.", "No.", "Well,", "yes.", "Good."]


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", "[1, 2]"), ("a.json", "{"), ("a.json", '{"a": 1}'), ("a.json", "[" * 100_000), ("a.TextGrid", "nothing"),
    ("a.TextGrid", SHORT_TEXTGRID[:90]), ("a.ttml", "<tt"), ("a.srt", ""), ("a.vtt", "WEBVTT\n"), ("a.txt", "[music]"),
    ("a.json", '{"segments": [{"start": NaN, "end": 1, "text": "x"}]}'), ("a.lrc", "no times"),
], ids=lambda text: text[:20])  # fmt: skip
def test_files_that_are_no_transcript_are_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_transcript(tmp_path / name)


def test_recordings_are_paired_with_transcripts_of_their_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.mp3", "b.wav", "c.m4a", "d.flac", "sub/e.wav", "f.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a.srt", "a.txt", "a.tsv", "b.de.vtt", "c.m4a.lrc", "sub/e.TextGrid", "f.notes.txt", "ab.srt"):
        (tmp_path / name).touch()
    found = find_transcribed(tmp_path)
    assert [(each.audio.name, each.transcript.name, each.language) for each in found] == [
        ("a.mp3", "a.srt", None), ("b.wav", "b.de.vtt", "de"), ("c.m4a", "c.m4a.lrc", None),
        ("e.wav", "e.TextGrid", None),
    ]  # fmt: skip
    assert "2 recording(s) without a transcript left out: d.flac, f.wav" in caplog.text


def test_a_transcript_in_another_folder_is_taken_where_the_name_is_the_only_one(tmp_path: Path) -> None:
    names = ("audio/a.wav", "audio/b.wav", "more/b.wav", "texts/a.srt", "texts/b.srt", "more/b.de.txt",
             "wav/ann/1.wav", "wav/bob/1.wav", "txt/ann/1.txt", "txt/bob/1.txt")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pairs = ((each.audio, each.transcript) for each in find_transcribed(tmp_path))
    found = dict(tuple(path.relative_to(tmp_path).as_posix() for path in pair) for pair in pairs)
    assert found == {"audio/a.wav": "texts/a.srt", "more/b.wav": "more/b.de.txt",
                     "wav/ann/1.wav": "txt/ann/1.txt", "wav/bob/1.wav": "txt/bob/1.txt"}  # fmt: skip


def test_hostile_transcripts_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.TextGrid").write_text(SHORT_TEXTGRID.replace("\n2\n0\n", "\n999999999999\n0\n"))
    assert [p.text for p in read_transcript(tmp_path / "a.TextGrid")] == ["Hello", "there"]
    (tmp_path / "a.srt").write_text(SRT + "{\\" * 100_000 + "<a" * 100_000 + "[" * 100_000)
    read_transcript(tmp_path / "a.srt")
    monkeypatch.setattr(subtitles, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"a\.srt: over 0 MB"):
        read_transcript(tmp_path / "a.srt")


def test_transcripts_in_two_languages_must_be_chosen_from(tmp_path: Path) -> None:
    for name in ("a.mp3", "a.de.srt", "a.en.srt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"a\.de\.srt, a\.en\.srt"):
        find_transcribed(tmp_path)


def test_a_manifest_goes_before_transcripts(tmp_path: Path) -> None:
    shutil.copy(SAMPLE_CLIP, tmp_path / "a.flac")
    (tmp_path / "a.txt").write_text("x")
    assert len(find_transcribed(tmp_path)) == 1
    with pytest.raises(SourceUnavailableError, match="their transcripts"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.flac,hello\n")
    assert find_transcribed(tmp_path) == []
    assert [u.text for u in read_folder(tmp_path)] == ["hello"]


def test_a_transcript_that_is_a_pipe_or_a_device_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.srt")
    (tmp_path / "endless.vtt").symlink_to("/dev/zero")
    for name in ("pipe.srt", "endless.vtt"):
        with pytest.raises(DataError, match=rf"{name}: .*not a plain file"):
            read_transcript(tmp_path / name)
